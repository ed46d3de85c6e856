"""The records of a search: candidate, measurement, outcome. They are plain, and go to JSON and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Literal

from pruning.plan import Plan, TokenReduction
from search.method import METHODS, Method, Recovery

RoundTo = int | Literal["auto"]

FILTERED: frozenset[TokenReduction] = frozenset({"lfe", "lfe-merge"})
"""The token reductions with a filter, as in `pruning.model.tokens.REDUCERS`, which needs torch; a record does not."""


class State(str, Enum):
    """The state in which a trial ended."""

    MEASURED = "measured"
    """The trial gave a model, which was measured."""
    INFEASIBLE = "infeasible"
    """No model satisfies the candidate."""
    STOPPED = "stopped"
    """The search stopped the trial at a rung."""
    FAILED = "failed"
    """The trial broke; `reason` says why."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One point of the search space."""

    cutoff_channel: float
    """Cut-off frequency of the image filter when channels are scored (LFS), in (0, 1]."""
    cutoff_token: float
    """Cut-off frequency of the token filter when tokens are scored (LFE), in (0, 1]."""
    drop_budget: tuple[float, ...]
    """Accuracy points (1 = one percent of the images) that pruning a block may cost; one entry a dense block, the
    entries past `exit_block` have no effect. All 0 but for method `cascade`, which alone has budgets."""
    token_share: float
    """Weight of tokens against channels, in [0, 1]. Cascade: share of each block's budget that tokens may spend first.
    Global: 0.5 weighs channels and tokens as the profile does, 0 takes channels alone, 1 tokens alone. A schedule
    ignores it."""
    target_ratio: float
    """Share of the dense MACs to keep, in (0, 1]: pruning stops when it is reached. Method `unstructured`: share of the
    blocks' weights to keep."""
    exit_block: int
    """The model answers after this many blocks. Method `learned` gives a model for each exit up to here."""
    method: Method = "cascade"
    """The method that prunes, a key of `search.method.METHODS`."""
    criterion: str = "lfs"
    """Channel score of method `cascade`, a key of `pruning.scores.criteria.CRITERIA`."""
    token_reduction: TokenReduction = "lfe"
    """Way to reduce tokens at the end of each block."""
    round_to: RoundTo = 1
    """Number, at least 1, that head widths and hidden units are multiples of; auto: only widths that measured faster
    than every larger one on this device."""
    pattern: str = "any"
    """Sparsity pattern of method `unstructured`: `any` weights go, or all but N of every M neighbours (`2:4`), whatever
    the target."""
    recovery: Recovery = "none"
    """Training after the pruning. Method `learned`, which trains all along, ignores it."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Candidate:
        return cls(**record | {"drop_budget": tuple(record["drop_budget"])})

    def to_params(self) -> dict[str, float | int | str]:
        """Gives the parameters that have an effect, named as in the search space: `drop_budget.0`, ..."""
        method = METHODS[self.method]
        params: dict[str, float | int | str] = {"method": self.method, "exit_block": self.exit_block}
        if self.pattern == "any":
            params["target_ratio"] = self.target_ratio
        if method.takes_channels:
            params["round_to"] = self.round_to
        if method.takes_tokens:
            params["token_reduction"] = self.token_reduction
            if method.takes_channels and self.token_reduction != "none":
                params["token_share"] = self.token_share
            if self.token_reduction in FILTERED:
                params["cutoff_token"] = self.cutoff_token
        if method.has_budgets:
            params["criterion"] = self.criterion
            if self.criterion == "lfs":
                params["cutoff_channel"] = self.cutoff_channel
            budgets = self.drop_budget[: self.exit_block]
            params |= {f"drop_budget.{block}": points for block, points in enumerate(budgets)}
        if method.is_sparse:
            params["pattern"] = self.pattern
        if self.recovery != "none":
            params["recovery"] = self.recovery
        return params


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The measured accuracy, speed and cost of a model; intervals cover 95 %."""

    top1: float
    """Accuracy on `val`, in [0, 1]."""
    top1_low: float
    """Lower end of the 95 % interval of `top1`."""
    top1_high: float
    """Upper end of the 95 % interval of `top1`."""
    throughput_img_s: float
    """Images a second at the recipe's batch size: dense throughput of a reference run times `speedup`."""
    speedup: float
    """Dense time / time of this model: the median over rounds, in which both are timed in turn."""
    speedup_low: float
    """Lower end of the 95 % interval of `speedup`."""
    speedup_high: float
    """Upper end of the 95 % interval of `speedup`."""
    latency_ms_p50: float
    """Median time of one batch of the recipe's batch size, in milliseconds."""
    macs: int
    """Multiply-adds an image, one multiply-add counted as one."""
    params: int
    """Number of parameters."""
    top1_test: float | None = None
    """Accuracy on `test`, in [0, 1]; measured for the final front alone."""
    sparsity: float = 0.0
    """Share of the blocks' weights that are 0, counted; in [0, 1]."""
    recall_at_1: float | None = None
    """Share of the val images whose nearest training image is of their class; measured where the recipe searches by
    retrieval."""
    num_images: int | None = None
    """Number of val images that the accuracy is known from, where a model that is faster beyond doubt was seen to be
    the more accurate one on them; None if it is known from all."""
    mean_average_precision: float | None = None
    """Mean over the val images of the average precision of their ranking of the training images, in [0, 1]; measured
    where the recipe searches by retrieval."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a trial: candidate, plan and measurement, or candidate and the reason why there is none."""

    id: str
    """Name of the outcome: `t000`, `t001`, ... in the order of the suggestions; `t001.9` is from the same trial, for an
    exit after block 9."""
    state: State
    candidate: Candidate
    reason: str | None = None
    plan: Plan | None = None
    measurement: Measurement | None = None
    block_drops: tuple[float, ...] = ()
    """Accuracy points that pruning each kept block cost on the probe images; each within its budget."""
    forward_passes: float = 0.0
    """Cost of the pruning in forward passes of the dense model over the probe images (a backward pass is two)."""
    notes: tuple[str, ...] = ()
    """Notes on the repair: layers of which only the bias could be repaired, for want of images."""
    seconds: float = 0.0
    """Wall-clock time of the trial."""
    ended_s: float = 0.0
    """Time at which the trial ended, in seconds of searching since the sweep began; stops between runs do not count."""
    waited_s: float = 0.0
    """Seconds that its worker waited for it, since the trial before."""
    rungs: tuple[tuple[float, float], ...] = ()
    """Accuracy and speed-up at each rung that the trial passed, or where it was stopped."""
    rung_spans: tuple[tuple[float, float], ...] = ()
    """Seconds since the trial began at which the measurement for each rung started and ended."""
    history: tuple[dict[str, float], ...] = ()
    """Reports after each epoch of a trial that trains: loss, ..."""
    has_weights: bool = False
    """The weights were trained, and are kept; else they follow from the plan and the dense model."""
    same_as: str | None = None
    """Id of the earlier outcome that fine-tuned the same plan: its weights and its measurement are this one's too."""

    def __post_init__(self) -> None:
        measured = self.state is State.MEASURED
        assert measured == (self.measurement is not None and self.plan is not None), self.state
        assert measured or self.reason, "an outcome without a measurement says why"

    @property
    def trial(self) -> str:
        """The id of the trial that gave the outcome."""
        return self.id.split(".")[0]

    @property
    def weights_id(self) -> str:
        """The id under which the weights are kept, if they were trained."""
        return self.same_as or self.id

    def to_json(self) -> dict[str, Any]:
        plain = {"id": self.id, "state": self.state.value, "candidate": asdict(self.candidate), "reason": self.reason}
        measured = {
            "plan": self.plan and self.plan.to_json(),
            "measurement": self.measurement and asdict(self.measurement),
        }
        cost = {"block_drops": self.block_drops, "forward_passes": self.forward_passes}
        cost |= {"seconds": self.seconds, "ended_s": self.ended_s, "waited_s": self.waited_s}
        progress = {"rungs": self.rungs, "rung_spans": self.rung_spans, "history": self.history}
        kept = {"notes": self.notes, "has_weights": self.has_weights, "same_as": self.same_as}
        return plain | measured | cost | progress | kept

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Outcome:
        return cls(
            **record
            | {
                "state": State(record["state"]),
                "candidate": Candidate.from_json(record["candidate"]),
                "plan": record["plan"] and Plan.from_json(record["plan"]),
                "measurement": record["measurement"] and Measurement(**record["measurement"]),
                "block_drops": tuple(record["block_drops"]),
                "notes": tuple(record.get("notes", ())),
                "rungs": tuple(map(tuple, record.get("rungs", ()))),
                "rung_spans": tuple(map(tuple, record.get("rung_spans", ()))),
                "history": tuple(record.get("history", ())),
            }
        )


def num_trials(outcomes: Sequence[Outcome]) -> int:
    """Counts the trials that gave the outcomes."""
    return len({outcome.trial for outcome in outcomes})


def idle_share(outcomes: Sequence[Outcome]) -> float:
    """Gives the share of the workers' time, from their first trials to their last, in which they waited for a trial."""
    waited = sum(outcome.waited_s for outcome in outcomes)
    total = waited + sum(outcome.seconds for outcome in outcomes)
    return waited / total if total else 0.0
