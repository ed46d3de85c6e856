"""The recipe of a sweep: frozen, validated on construction, unknown keys are errors.

`search.recipe` reads one from a YAML file. Relative paths in it count from where the command runs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pruning.methods.cascade import Order
from pruning.methods.learned_gates import RatioGradient
from pruning.training import Jitter, TrainSettings
from search.errors import ConfigError
from search.fields import (
    Bounds,
    Choices,
    Criterion,
    LimitText,
    LocalPath,
    Multiple,
    Points,
    PositiveShare,
    Reduction,
    Seed,
    Share,
    SparsityPattern,
    auto_alone,
    parse_seconds,
)
from search.limits import RETRIEVAL, parse_limit
from search.method import Method, Recovery

Accuracy = Literal["top1", "recall_at_1", "mean_average_precision"]

RESUMABLE = ("trials", "time_budget", "earlier", "patience", "min_gain")
"""Keys of the section `search` that may change when a sweep resumes."""


FINGERPRINTED_KEYS = (
    "model.checkpoint", "model.checkpoint_key", "model.pretrained", "model.untrained", "model.expected_top1",
    "data.root", "data.class_map", "data.class_order", "data.exif", "data.download", "data.shared_images",
)  # fmt: skip
"""Keys that say where inputs come from: whether these are the same is told by their fingerprints, not by a path."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class _Training(_Section):
    """The settings that every training has."""

    epochs: Annotated[int, Field(ge=1)] = 10
    """Number of epochs."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Number of images in a training step."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate at the top of its schedule: a warm-up, then a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Weight decay of matrices; vectors have none."""
    max_shift: Annotated[float, Field(ge=0)] = 1.0
    """Training images are moved by up to this many pixels each way, anew in every epoch."""
    max_turn: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Training images are turned by up to this many radians, and scaled by up to this share, each way."""
    flip: bool = False
    """Half of the training images are mirrored, left to right."""

    def common(self) -> dict[str, Any]:
        """Gives the settings by their names in `pruning`, with how images are jittered as one."""
        names = ("max_shift", "max_turn", "flip")
        jitter = Jitter(**{name: getattr(self, name) for name in names})
        return self.model_dump(exclude={*names}) | {"jitter": jitter}


class TrainingConfig(_Training):
    """The training of the dense model, for data sets where a minute suffices. See `pruning.training`."""

    epochs: Annotated[int, Field(ge=1)] = 70
    """Number of epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-2
    """Learning rate at the top of its schedule: a warm-up, then a cosine."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of matrices; vectors have none."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 3
    """Number of epochs in which the learning rate rises."""
    max_turn: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Training images are turned by up to this many radians, and scaled by up to this share, each way."""
    seed: Seed = 0
    """Seed of the first weights, the order of the images and their jitter."""

    def settings(self) -> TrainSettings:
        """Gives the settings as `pruning.training.train` takes them."""
        return TrainSettings(**self.common())


class ModelConfig(_Section):
    """The dense model."""

    name: str
    """timm's name of the model: vit_*, deit_*, deit3_* or swin_*."""
    args: dict[str, Any] = {}
    """Further arguments of `timm.create_model`: num_classes, img_size, ..."""
    checkpoint: LocalPath = None
    """File with your weights: .safetensors or PyTorch, a state dict or a checkpoint with one in it."""
    checkpoint_key: str | None = None
    """Name of the weights to take where the checkpoint holds several: `state_dict`, `state_dict_ema`, `teacher`, ...
    By default the only ones, or those with `ema` in their name."""
    pretrained: bool = False
    """Take timm's own weights, from its hub."""
    untrained: bool = False
    """Take random weights, to try something out. Without it a recipe needs a checkpoint, pretrained or training."""
    expected_top1: Share | None = None
    """Top-1 accuracy that the dense model must reach on val, in [0, 1], before anything else is done. It has failed if
    the 95 % interval of its accuracy lies below; 0 takes a model whatever its accuracy, even one near chance."""
    training: TrainingConfig | None = None
    """Train the model first; the result is kept in runs/.cache."""


class DataConfig(_Section):
    """The images."""

    dataset: str = "folder"
    """`folder`, `digits`, `torch/<name>` (torchvision) or `hfds/<name>` (Hugging Face)."""
    root: LocalPath = None
    """Folder that holds one folder a split, each with one folder a class; for torch/... and hfds/... the folder that
    their library keeps the data set in."""
    class_map: LocalPath = None
    """Text file with one class (folder name) a line, in the order of the model's classes; it names all of them."""
    class_order: Literal["timm", "torchvision"] | None = None
    """Library whose rules say what the class folders mean: `timm` sorts numbers in names by their value, whatever the
    case, and takes the innermost folder of an image; `torchvision` sorts names as plain text, and takes the outermost.
    Asked for where the two differ."""
    train: str = "train"
    """Name of the split for scores, probes, repair, exits and trainings."""
    val: str = "val"
    """Name of the split whose accuracy the search sees."""
    test: str | None = None
    """Name of the split that is measured once, for the final front."""
    calibration_images: Annotated[int, Field(ge=8)] = 512
    """Number of training images for channel scores and repair."""
    probe_images: Annotated[int, Field(ge=8)] = 1000
    """Number of further training images, on which the cascade measures what a step costs."""
    val_images: Annotated[int, Field(ge=8)] | None = None
    """Largest number of val images; all of them by default."""
    confirm_images: Annotated[int, Field(ge=8)] | None = None
    """Number of val images that confirm the final front; by default the images that the search saw."""
    test_images: Annotated[int, Field(ge=8)] | None = None
    """Largest number of test images; all of them by default."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, in [0, 1]; by default timm's for this model."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, in (0, 1]; by default timm's for this model."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    """Interpolation when images are resized; by default timm's for this model."""
    crop_pct: PositiveShare | None = None
    """Share of the resized image that the centre crop keeps, in (0, 1]; by default timm's for this model."""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """Way to give images the model's shape: cut (`center`), stretch (`squash`) or pad (`border`); by default timm's for
    this model."""
    exif: Literal["ignore", "apply"] | None = None
    """Orientation that a camera left in an image's EXIF data: `ignore` it as timm does, or `apply` it."""
    shared_images: Literal["refuse", "allow"] = "refuse"
    """Images that are in both train and test, or in both val and test: `refuse` them, or `allow` them with a note."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise on the calibration images, in units of the pixels' range. It shows how
    scores and repair cope with bad images: all other images stay clean, and the dense model is trained without."""
    download: bool = False
    """Let timm download a torch/... data set that is missing; a hfds/... one is always fetched."""
    seed: Seed = 0
    """Seed of the choice of images."""


class ExitConfig(_Section):
    """The classifiers of the depth exits. See `pruning.model.exits.fit_exits`."""

    epochs: Annotated[int, Field(ge=1)] = 60
    """Number of epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    """Learning rate of the classifiers."""
    distillation: Share = 0.5
    """Weight of the dense model's answers against the labels, in [0, 1]."""


PRESETS: dict[str, dict[str, Any]] = {
    "papers": {"method": "cascade", "criterion": "lfs", "token_reduction": "lfe", "round_to": 1},
}
"""Name of a preset of the search space -> the keys of `space` that it fixes. papers: those of VTC-LFC."""


class SpaceConfig(_Section):
    """The search space. A number fixes a parameter, [low, high] searches it; a word fixes a choice, a list searches all
    of the list."""

    cutoff_channel: Bounds[PositiveShare] = (0.02, 0.5)
    """Cut-off frequency of the image filter of criterion lfs, in (0, 1]; searched on a log scale."""
    cutoff_token: Bounds[PositiveShare] = (0.05, 0.95)
    """Cut-off frequency of the token filter of lfe and lfe-merge, in (0, 1]."""
    drop_budget: Bounds[Points] = (0.0, 2.0)
    """Accuracy points that pruning one block may cost, for method cascade; each block has its own."""
    token_share: Bounds[Share] = (0.0, 1.0)
    """Method cascade: share of each block's budget that tokens may spend first. Method global: weight of tokens against
    channels, 0.5 as the profile says, 0 channels alone, 1 tokens alone."""
    target_ratio: Bounds[PositiveShare] = (0.2, 1.0)
    """Share of the dense model's multiply-adds (MACs) to keep, in (0, 1]."""
    exit_block: Bounds[int] | None = None
    """Number of blocks after which the model answers; by default all of them."""
    method: Choices[Method] = ("global", "constant")
    """Method that prunes: `cascade`, block by block; `global`, all blocks at once, without budgets; `constant` or
    `decreasing`, a schedule of tokens alone; `learned` and `soft-mask`, trained; `unstructured`, single weights."""
    criterion: Choices[Criterion] = "lfs"
    """Channel score of method cascade: lfs, taylor, magnitude, activation, random, obs."""
    token_reduction: Annotated[Choices[Reduction], AfterValidator(auto_alone)] = "auto"
    """Way to reduce tokens (`pruning.plan.TokenReduction`), or none. auto: attention-merge, or none for a Swin, whose
    windows need every token."""
    round_to: Choices[Multiple] = "auto"
    """Number that head widths and hidden units are multiples of; [1, 8] tries these two, not what lies between. auto:
    only widths that measured faster than every larger one on this machine (`pruning.measure.widths`)."""
    pattern: Choices[SparsityPattern] = "any"
    """Sparsity pattern of method unstructured: `any`, as sparse as the target says, or N:M, e.g. `2:4`."""
    recovery: Choices[Recovery] = "none"
    """Training after the pruning: `none`, or `distill`, a fine-tune by the section `distill`."""


class SearchConfig(_Section):
    """The search of the space: its length, its sampler and its goal."""

    trials: Annotated[int, Field(ge=1)] = 50
    """Number of trials in all, those of an earlier run included."""
    time_budget: str | float | None = None
    """Time of the whole command, from its start to its front: seconds, or 90s, 10m, 2h. A trial starts only if it and
    the confirmation of the front still fit."""
    sampler: Literal["auto", "gp", "tpe", "nsga2", "random", "grid"] = "auto"
    """Sampler of candidates. auto: Gaussian processes (gp). tpe, nsga2, random and grid are there to compare with."""
    earlier: tuple[str, ...] = ()
    """Names of earlier sweeps of the same model and images to learn from; their fronts are tried first."""
    patience: Annotated[int, Field(ge=0)] = 40
    """Stop when the hypervolume has grown by less than `min_gain` over this many measured trials; 0 never stops."""
    min_gain: Share = 0.01
    """Share of the hypervolume below which `patience` counts its growth as none."""
    reduction_factor: Annotated[float, Field(ge=1)] = 1.0
    """Each rung lets one trial in this many go on: 1 stops none, 2 the worse half (ASHA). Rungs: pruned with a quarter
    of the images; before fine-tuning; after a third of the epochs."""
    limits: tuple[LimitText, ...] = ()
    """Limits that a model must keep: `top1 >= dense - 0.01`, `macs <= 60%` (of the dense model's),
    `latency_ms_p50 <= 5`."""
    accuracy: Accuracy = "top1"
    """Accuracy to optimise: classification (top1), or retrieval, in which val images query the sweep's training
    images."""
    seed: Seed = 0
    """Seed of the sampler."""

    @property
    def time_budget_s(self) -> float | None:
        """The time budget in seconds."""
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
    """Weight of the cross-entropy in the channel score lfs, in [0, 1]; the rest is that of the drift from the dense
    model's answers."""
    num_levels: Annotated[int, Field(ge=1)] = 15
    """Number of counts to try for tokens, and for channels, between none and all that may go."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Number of images in one batch of scoring, repairing and measuring accuracy."""
    order: Order = "bottom-up"
    """Order of the blocks. `top-down` goes from the last block to the first, for channels alone
    (`space.token_reduction: none`)."""


class LearnedConfig(_Training):
    """The settings of method learned. See `pruning.methods.width.WidthSettings`."""

    count: Literal["macs", "params"] = "macs"
    """Unit of the target: a share of the multiply-adds, or of the parameters."""
    search_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Share of the training after which the widths are fixed, in (0, 1)."""
    score_rate: Annotated[float, Field(gt=0)] = 2.5e-3
    """Learning rate of the scores."""
    ratio_gradient: RatioGradient = "edge"
    """Gates that feel the gradient of the size: those at the `edge` between open and closed; or, as in the paper, all
    that are `open`."""
    distillation: Share = 0.5
    """Weight of the dense model's answers against the labels, in [0, 1]."""

    def common(self) -> dict[str, Any]:
        """Gives the settings by their names in `pruning`, where `count` is `budget_unit`."""
        common = super().common()
        common["budget_unit"] = common.pop("count")
        return common


class SoftMaskConfig(_Training):
    """The settings of method soft-mask. See `pruning.methods.softmask.SoftMaskSettings`."""

    epochs: Annotated[int, Field(ge=1)] = 5
    """Number of epochs."""
    gate_rate: Annotated[float, Field(gt=0)] = 2e-2
    """Learning rate of the gates."""
    l1: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the L1 penalty: what it adds to the loss while all gates are 1."""
    distillation: Share = 0.5
    """Weight of the dense model's answers against the labels, in [0, 1]."""


class DistillConfig(_Training):
    """The settings of recovery distill. See `pruning.methods.finetune.FinetuneSettings`."""

    optimizer: str = "adamw"
    """Any optimizer name that timm's `create_optimizer_v2` knows."""
    distillation: Literal["none", "soft", "hard"] = "soft"
    """Distillation by the dense model's probabilities (soft), by its first choice (hard), or none."""
    weight: Share = 0.5
    """Weight of the dense model's answers against the labels, in [0, 1]."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of soft distillation: all logits are divided by it."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a label that is spread over all classes, in [0, 1)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Mixes images and labels in pairs, a share of each from Beta(mixup, mixup); 0 mixes none."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Puts a box of another image into each, its share from Beta(cutmix, cutmix); 0 for none."""


class MeasureConfig(_Section):
    """The measurement of throughput."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Number of images in one timed batch: take what your deployment uses."""
    num_rounds: Annotated[int, Field(ge=6)] = 15
    """Number of rounds in which dense and pruned model are timed in turn."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of all models; `auto` takes the one in which this device runs the dense model faster."""


class ResourcesConfig(_Section):
    """The resources of the cluster that one trial takes."""

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    """Number of cores, and of torch threads, of a trial without a GPU."""
    gpus_per_trial: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of a GPU for each trial; by default 1 where the cluster has any, else 0."""


class Fingerprints(_Section):
    """The hashes of what a sweep was made from, as `config.yaml` keeps them. A recipe that has them pins its inputs:
    weights or images that differ are refused."""

    weights: str | None = None
    """Hash of the dense model's weights; None as long as they are to be trained."""
    first_weights: str | None = None
    """Hash of the weights that the dense model's training starts from; None without `model.training`."""
    classes: str | None = None
    """Hash of the names of the classes, in their order; None where the data set has no names."""
    preprocessing: str | None = None
    """Hash of the size, scaling and cropping by which images become the model's input."""
    train: str | None = None
    """Hash of the training images that were drawn, pixels and labels, without noise."""
    val: str | None = None
    """Hash of the val images."""
    confirm: str | None = None
    """Hash of the val images that confirm the front; None where `data.confirm_images` is."""
    test: str | None = None
    """Hash of the test images; None where `data.test` is."""

    def changes(self, now: Fingerprints) -> list[str]:
        """Gives the names of what is known in both and differs: `the weights`, `the val images`, ..."""
        mine, theirs = self.model_dump(), now.model_dump()
        if mine["first_weights"] is None and theirs["first_weights"] is not None:  # trained further now
            mine |= {"first_weights": mine["weights"], "weights": None}
        return [
            name for key, name in FINGERPRINTED.items()
            if None not in (mine[key], theirs[key]) and mine[key] != theirs[key]
        ]  # fmt: skip


FINGERPRINTED = {
    "first_weights": "the weights that training starts from",
    "weights": "the weights",
    "classes": "the order of the classes",
    "preprocessing": "the preprocessing",
    "train": "the training images",
    "val": "the val images",
    "confirm": "the val images to confirm with",
    "test": "the test images",
}
"""Field of `Fingerprints` -> its name in messages."""


class Config(_Section):
    """The recipe of one sweep."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the sweep and of its folder in runs/."""
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
    fingerprints: Fingerprints | None = None
    """Hashes of the inputs; a sweep writes them into its config.yaml."""

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Config:
        """Validates a recipe.

        Raises:
            ConfigError: one line that names each key that is wrong.
        """
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    def to_yaml(self) -> str:
        """Writes the recipe with all of its keys."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def differences(self, other: Config) -> list[str]:
        """Gives the keys that differ and would change outcomes.

        How long and on which machines a sweep runs does not; where its inputs lie does not, if they are the same.
        """
        mine, theirs = (flat(config.model_dump(mode="json")) for config in (self, other))
        free = ("name", "resources.", "fingerprints", *FINGERPRINTED_KEYS, *(f"search.{key}" for key in RESUMABLE))
        keys = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
        return [key for key in keys if not key.startswith(free)]


MESSAGES = {
    "extra_forbidden": "unknown key",
    "tuple_type": "input should be a list, [a, b, ...]",
    "dict_type": "input should be keys and values, {key: value, ...}",
    "model_type": "input should be keys and values, {key: value, ...}",
}
"""Kind of pydantic's errors -> message, where pydantic speaks of Python."""


def _one_line(error: ValidationError) -> str:
    """Gives all that is wrong, the key first; a union tells the message of the branch that fits best."""
    lines: dict[str, str] = {}
    for item in sorted(error.errors(), key=lambda item: -len(item["loc"])):
        key = ".".join(str(part) for part in item["loc"] if not _is_branch(part))
        message = MESSAGES.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing" and isinstance(item["loc"][-1], int):
            message = "needs two values, [low, high]"
        given = "" if item["type"] in ("extra_forbidden", "missing", "value_error") else f" (given: {item['input']!r})"
        lines.setdefault(key, message[0].lower() + message[1:] + given)
    return "; ".join(f"{key}: {message}" for key, message in lines.items())


def _is_branch(part: int | str) -> bool:
    """Tells whether a part of pydantic's path is the branch of a union: `tuple[...]`, `constrained-float`, an index."""
    return isinstance(part, int) or not part.isidentifier() or part in ("float", "int", "tuple", "str")


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to `a.b` -> value; `model.args` stays whole."""
    settings: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict) and key != "args":
            settings |= flat(value, f"{prefix}{key}.")
        else:
            settings[prefix + key] = value
    return settings
