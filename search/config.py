"""The recipe of a sweep: frozen, validated when it is made, unknown keys are errors.

A recipe is a YAML file or a shipped name (`search/recipes/`). Relative paths in it count from where the command runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pruning.data import InputSpec
from pruning.methods.cascade import Order
from pruning.methods.learned_gates import RatioGradient
from pruning.plan import TokenReduction
from pruning.scores.criteria import CRITERIA
from pruning.training import Jitter, TrainSettings
from search.errors import ConfigError
from search.limits import RETRIEVAL, parse_limit
from search.method import Method, Recovery

Accuracy = Literal["top1", "recall_at_1", "mean_average_precision"]

FREE = ("trials", "time_budget", "earlier", "patience", "min_gain")
"""Keys of the search that make no other outcomes: a sweep may go on with others."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _ordered(bounds: Any) -> Any:
    if isinstance(bounds, tuple) and bounds[0] > bounds[1]:
        raise ValueError(f"bounds {list(bounds)} are upside down; give the lower one first")
    return bounds


def _each_once(choices: Any) -> Any:
    if isinstance(choices, tuple):
        if not choices:
            raise ValueError("an empty list leaves no choice; give one value at least")
        if twice := [choice for choice in choices if choices.count(choice) > 1]:
            raise ValueError(f"{twice[0]!r} is given twice; give each choice once")
    return choices


def _known_criterion(name: str) -> str:
    if name not in CRITERIA:
        raise ValueError(f"no criterion {name!r}; there are {', '.join(CRITERIA)}")
    return name


def _known_reduction(name: str) -> str:
    if name not in (known := ("auto", *get_args(TokenReduction))):
        raise ValueError(f"no token reduction {name!r}; there are {', '.join(known)}")
    return name


def _auto_alone(choices: Any) -> Any:
    if isinstance(choices, tuple) and "auto" in choices:
        raise ValueError("auto stands for one of the others; leave it out of the list")
    return choices


def _multiple_or_auto(value: int | str) -> int | str:
    if value != "auto" and (isinstance(value, str) or value < 1):
        raise ValueError(f"{value!r} is no width to round to; give a whole number of at least 1, or auto")
    return value


def _known_pattern(text: str) -> str:
    if text != "any":
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None or not 1 <= int(match[1]) < int(match[2]):
            raise ValueError(f"{text!r} is no pattern; give any, or N:M with N below M, as 2:4")
    return text


def _known_limit(text: str) -> str:
    try:
        return parse_limit(text).text
    except ConfigError as error:
        raise ValueError(str(error)) from None


Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Points = Annotated[float, Field(ge=0, le=100)]
Range = Annotated[PositiveShare | tuple[PositiveShare, PositiveShare], AfterValidator(_ordered)]
"""A number, which fixes the parameter, or [low, high]; in (0, 1]."""
Criterion = Annotated[str, AfterValidator(_known_criterion)]
Reduction = Annotated[str, AfterValidator(_known_reduction)]
SparsityPattern = Annotated[str, AfterValidator(_known_pattern)]
LimitText = Annotated[str, AfterValidator(_known_limit)]
Multiple = Annotated[int | str, AfterValidator(_multiple_or_auto)]


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


LocalPath = Annotated[Path | None, AfterValidator(_absolute)]


class _Training(_Section):
    """What every training has."""

    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    max_shift: Annotated[float, Field(ge=0)] = 1.0
    """Images are moved by up to so many pixels each way, anew in every epoch."""
    max_turn: Annotated[float, Field(ge=0, le=1)] = 0.0
    """They are turned by up to so many radians, and scaled by up to this share, each way."""
    flip: bool = False
    """Half of them are mirrored, left to right."""

    def common(self) -> dict[str, Any]:
        """What is handed on as it is, and how images are jittered."""
        names = ("max_shift", "max_turn", "flip")
        jitter = Jitter(**{name: getattr(self, name) for name in names})
        return self.model_dump(exclude={*names}) | {"jitter": jitter}


class TrainingConfig(_Training):
    """Training of the dense model, for data sets where a minute does it. See `pruning.training`."""

    epochs: Annotated[int, Field(ge=1)] = 70
    learning_rate: Annotated[float, Field(gt=0)] = 2e-2
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    warmup_epochs: Annotated[int, Field(ge=0)] = 3
    max_turn: Annotated[float, Field(ge=0, le=1)] = 0.15
    seed: int = 0

    def settings(self) -> TrainSettings:
        return TrainSettings(**self.common())


class ModelConfig(_Section):
    """The dense model."""

    name: str
    """timm's name: vit_* or deit_*."""
    args: dict[str, Any] = {}
    """What `timm.create_model` takes besides: num_classes, img_size, ..."""
    checkpoint: LocalPath = None
    """Your weights: .safetensors or PyTorch."""
    pretrained: bool = False
    """Take timm's own weights, from its hub."""
    training: TrainingConfig | None = None
    """Train it first; the result is kept in runs/.cache."""


class DataConfig(_Section):
    """The images."""

    dataset: str = "folder"
    """`folder`, `digits`, or a name of timm's `create_dataset` (torch/..., hfds/...)."""
    root: LocalPath = None
    """For `folder`: holds one folder a split, each with one folder a class."""
    class_map: LocalPath = None
    """A text file with one class (folder name) a line, in the order of the model's classes."""
    train: str = "train"
    """Name of the split that scores, probes, repair and exits are fitted on."""
    val: str = "val"
    """Name of the split whose accuracy the search sees."""
    test: str | None = None
    """Name of the split that is touched once, for the final front."""
    calibration_images: Annotated[int, Field(ge=8)] = 512
    """Training images for channel scores and repair."""
    probe_images: Annotated[int, Field(ge=8)] = 1000
    """Training images, other ones, on which the cascade measures what a step costs. Exits are fitted on both."""
    val_images: Annotated[int, Field(ge=8)] | None = None
    """At most so many images of val; all by default."""
    confirm_images: Annotated[int, Field(ge=8)] | None = None
    """The final front is confirmed on so many images of val; by default on those that the search saw."""
    test_images: Annotated[int, Field(ge=8)] | None = None
    mean: tuple[float, ...] | None = None
    """Of each channel, in [0, 1]; by default what timm knows of the model. So are the next three."""
    std: tuple[float, ...] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    crop_pct: PositiveShare | None = None
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise on the calibration images, in units of the pixels' range: what do scores and
    repair do on bad images? Probe, val and test images stay clean, and the dense model is trained without."""
    download: bool = False
    """Let timm fetch a torch/... or hfds/... data set that is not there."""
    seed: int = 0
    """Of the choice of images."""


class ExitConfig(_Section):
    """The classifiers of the depth exits. See `pruning.model.exits.fit_exits`."""

    epochs: Annotated[int, Field(ge=1)] = 60
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    distillation: Share = 0.5


class SpaceConfig(_Section):
    """The search space. A number fixes a parameter, [low, high] searches it; of the last six, which are choices, a
    value fixes it and a list searches all of the list."""

    cutoff_channel: Range = (0.02, 0.5)
    """Cut-off frequency of the image filter of the channel score; searched on a log scale."""
    cutoff_token: Range = (0.05, 0.95)
    """Cut-off frequency of the token filter of the token score."""
    drop_budget: Annotated[Points | tuple[Points, Points], AfterValidator(_ordered)] = (0.0, 2.0)
    """Accuracy points that pruning one block may cost; each block has its own."""
    token_share: Annotated[Share | tuple[Share, Share], AfterValidator(_ordered)] = (0.0, 1.0)
    """Share of each block's budget that tokens may spend first; for method `global` the weight of tokens against
    channels: 0.5 as the profile says, 0 channels alone, 1 tokens alone."""
    target_ratio: Range = (0.2, 1.0)
    """Share of the dense MACs to keep."""
    exit_block: Annotated[int | tuple[int, int] | None, AfterValidator(_ordered)] = None
    """The model answers after this many blocks; by default after all of them."""
    method: Annotated[Method | tuple[Method, ...], AfterValidator(_each_once)] = "cascade"
    """Who decides what goes: `cascade`, block by block; `global`, all blocks at once, without budgets; `constant` or
    `decreasing`, a schedule of tokens alone; `learned` and `soft-mask`, trained; `unstructured`, single weights."""
    criterion: Annotated[Criterion | tuple[Criterion, ...], AfterValidator(_each_once)] = "lfs"
    """Score of the channels in the cascade, a key of `pruning.scores.criteria.CRITERIA`."""
    token_reduction: Annotated[
        Reduction | tuple[Reduction, ...], AfterValidator(_each_once), AfterValidator(_auto_alone)
    ] = "lfe"
    """What becomes of the tokens that do not leave a block (`pruning.plan.TokenReduction`). auto: attention-merge, or
    none for a Swin, whose windows need every token."""
    round_to: Annotated[Multiple | tuple[Multiple, ...], AfterValidator(_each_once)] = 1
    """Widths a head and hidden units are multiples of it; [1, 8] tries these two, not what lies between. auto: the
    widths that this device is faster with than with all larger ones, measured once a sweep
    (`pruning.measure.widths`)."""
    pattern: Annotated[SparsityPattern | tuple[SparsityPattern, ...], AfterValidator(_each_once)] = "any"
    """Of method `unstructured`: `any`, as sparse as the target says, or N:M, e.g. `2:4`."""
    recovery: Annotated[Recovery | tuple[Recovery, ...], AfterValidator(_each_once)] = "none"
    """`distill`: a fine-tune after the pruning, by the section `distill`."""


class SearchConfig(_Section):
    """How the space is searched."""

    trials: Annotated[int, Field(ge=1)] = 50
    time_budget: str | float | None = None
    """Stop starting trials after so long: seconds, or 90s, 10m, 2h."""
    sampler: Literal["auto", "gp", "tpe", "nsga2", "random", "grid"] = "auto"
    """auto: Gaussian processes (gp) where the trials are at most 200, else tpe. random, nsga2 and grid are there to
    compare with."""
    earlier: tuple[str, ...] = ()
    """Names of sweeps of the same model and images, from which this one learns; their fronts are tried first."""
    patience: Annotated[int, Field(ge=0)] = 40
    """Stop when the hypervolume has grown by less than `min_gain` over so many measured trials; 0 never stops."""
    min_gain: Share = 0.01
    """As a share of the hypervolume."""
    reduction_factor: Annotated[float, Field(ge=1)] = 1.0
    """Of the trials that come to a rung, one in so many goes on; 1 stops none. Rungs: the model of a quarter of the
    images; for trials that train then the model before the training, and after a third of its epochs."""
    limits: tuple[LimitText, ...] = ()
    """What a model must keep: `top1 >= dense - 0.01`, `macs <= 60%` (of the dense model's), `latency_ms_p50 <= 5`."""
    accuracy: Accuracy = "top1"
    """What is to be accurate: the classification, or the retrieval of training images by val images as queries."""
    seed: int = 0

    @property
    def time_budget_s(self) -> float | None:
        return None if self.time_budget is None else parse_seconds(self.time_budget)

    @model_validator(mode="after")
    def _limits_are_measured(self) -> SearchConfig:
        for limit in map(parse_limit, self.limits):
            if limit.metric in RETRIEVAL and self.accuracy == "top1":
                raise ValueError(f"limit {limit.text!r} is measured only with search.accuracy={limit.metric}")
        return self

    @model_validator(mode="after")
    def _time_budget_is_a_time(self) -> SearchConfig:
        _ = self.time_budget_s
        return self


class CascadeConfig(_Section):
    """The cascade's fixed settings. See `pruning.methods.cascade.CascadeSettings`."""

    alpha: Share = 0.1
    num_levels: Annotated[int, Field(ge=1)] = 15
    batch_size: Annotated[int, Field(ge=1)] = 64
    order: Order = "bottom-up"
    """`top-down` goes from the last block to the first; for channels alone (`space.token_reduction: none`)."""


class LearnedConfig(_Training):
    """Of method `learned`. See `pruning.methods.width.WidthSettings`."""

    count: Literal["macs", "params"] = "macs"
    """What the target is a share of."""
    search_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    score_rate: Annotated[float, Field(gt=0)] = 2.5e-3
    ratio_gradient: RatioGradient = "edge"
    """`open` is the paper's."""
    distillation: Share = 0.5

    def common(self) -> dict[str, Any]:
        common = super().common()
        common["budget_unit"] = common.pop("count")
        return common


class SoftMaskConfig(_Training):
    """Of method `soft-mask`. See `pruning.methods.softmask.SoftMaskSettings`."""

    epochs: Annotated[int, Field(ge=1)] = 5
    gate_rate: Annotated[float, Field(gt=0)] = 2e-2
    l1: Annotated[float, Field(ge=0)] = 1.0
    distillation: Share = 0.5


class DistillConfig(_Training):
    """Of recovery `distill`. See `pruning.methods.finetune.FinetuneSettings`."""

    optimizer: str = "adamw"
    """Any name that timm's `create_optimizer_v2` knows."""
    distillation: Literal["none", "soft", "hard"] = "soft"
    weight: Share = 0.5
    """Of the dense model's answers against the labels."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0


class MeasureConfig(_Section):
    """How throughput is measured."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images in one batch: what your deployment uses."""
    num_rounds: Annotated[int, Field(ge=6)] = 15
    """Dense and pruned are timed in turn so many times."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` takes the one in which this device runs the dense model faster."""


class ResourcesConfig(_Section):
    """What one trial takes of the cluster."""

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    """Cores, and torch threads, of a trial without a GPU."""
    gpus_per_trial: Annotated[float, Field(ge=0, le=1)] | None = None
    """By default 1 where the cluster has any, else 0. Below 1, trials share a GPU."""


class Config(_Section):
    """One sweep."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Its folder in runs/."""
    model: ModelConfig
    data: DataConfig
    exits: ExitConfig = ExitConfig()
    space: SpaceConfig = SpaceConfig()
    search: SearchConfig = SearchConfig()
    cascade: CascadeConfig = CascadeConfig()
    learned: LearnedConfig = LearnedConfig()
    soft_mask: SoftMaskConfig = SoftMaskConfig()
    distill: DistillConfig = DistillConfig()
    measure: MeasureConfig = MeasureConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Config:
        """Raises ConfigError with one line that names the key."""
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def differences(self, other: Config) -> list[str]:
        """Keys that would make other outcomes; how long the search goes on and on what machines do not."""
        mine, theirs = (flat(config.model_dump(mode="json")) for config in (self, other))
        free = ("name", "resources.", *(f"search.{key}" for key in FREE))
        keys = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        return [key for key in keys if not key.startswith(free)]


def load_config(
    recipe: str, *, name: str | None = None, trials: int | None = None, time_budget: str | None = None,
    earlier: Sequence[str] = (), sets: Sequence[str] = (),
) -> Config:  # fmt: skip
    """A recipe with the command line's changes.

    Args:
        recipe: path of a YAML file, or a shipped name.
        sets: `a.b=c` each, c in YAML.

    Raises:
        ConfigError: no such recipe, a key or value that is wrong.
    """
    record = _read_recipe(recipe)
    record.setdefault("name", Path(recipe).stem)
    changes = [*sets]
    changes += [f"search.trials={trials}"] if trials is not None else []
    changes += [f"search.time_budget={time_budget}"] if time_budget is not None else []
    changes += [f"search.earlier={json.dumps(earlier)}"] if earlier else []
    for change in changes:
        _set(record, change)
    if name is not None:
        record["name"] = name  # not through YAML, where 2024 is a number
    return Config.from_dict(record)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with vitfront."""
    folder = resources.files("search") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def input_spec(config: Config, model_default: dict[str, Any], image_size: tuple[int, int]) -> InputSpec:
    """The model's input: the recipe's values where it gives any, else timm's."""
    data = config.data
    return InputSpec(
        size=image_size,
        mean=data.mean or tuple(model_default["mean"]),
        std=data.std or tuple(model_default["std"]),
        interpolation=data.interpolation or model_default["interpolation"],
        crop_pct=data.crop_pct or model_default["crop_pct"],
    )


def parse_seconds(text: str | float) -> float:
    """Seconds in `90`, `90s`, `10m`, `2h`.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(text).strip())
    if match is None:
        raise ConfigError(f"time budget {text!r} is no time; give seconds, or 90s, 10m, 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _read_recipe(recipe: str) -> dict[str, Any]:
    shipped = resources.files("search") / "recipes" / f"{recipe}.yaml"
    source = Path(recipe) if recipe.endswith((".yaml", ".yml")) else shipped
    if not source.is_file():
        raise ConfigError(f"no recipe {recipe!r}; give a YAML file or one of: {', '.join(shipped_recipes())}")
    try:
        record = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {recipe}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{recipe} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{recipe} is not a recipe: it holds {type(record).__name__}, not keys and values")
    return record


def _set(record: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {change!r} is not of the form a.b=c")
    *path, last = key.split(".")
    for part in path:
        inner = record.setdefault(part, {})
        record[part] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change!r}: {part} holds a value, not keys")
        record = inner
    try:
        record[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        record[last] = text


def _one_line(error: ValidationError) -> str:
    """All that is wrong, the key first; of a union's branches, what the best fitting one says."""
    lines: dict[str, str] = {}
    for item in sorted(error.errors(), key=lambda item: -len(item["loc"])):
        key = ".".join(str(part) for part in item["loc"] if not _is_branch(part))
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing" and isinstance(item["loc"][-1], int):
            message = "needs two values, [low, high]"
        given = "" if item["type"] in ("extra_forbidden", "missing", "value_error") else f" (given: {item['input']!r})"
        lines.setdefault(key, message[0].lower() + message[1:] + given)
    return "; ".join(f"{key}: {message}" for key, message in lines.items())


def _is_branch(part: int | str) -> bool:
    """pydantic names the branch of a union in the path: `tuple[...]`, `constrained-float`, an index."""
    return isinstance(part, int) or not part.isidentifier() or part in ("float", "int", "tuple", "str")


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b` -> value; `model.args` stays whole."""
    settings: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict) and key != "args":
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings
