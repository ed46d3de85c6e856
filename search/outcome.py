"""What was asked and what came of it: candidate, measurement, outcome. Plain records, JSON both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Literal

from pruning.plan import Plan, TokenReduction
from search.method import METHODS, Method, Recovery

RoundTo = int | Literal["auto"]

FILTERED: frozenset[TokenReduction] = frozenset({"lfe", "lfe-merge"})
"""The token reductions with a filter. `pruning.model.tokens.REDUCERS` knows too, but takes torch; a record does not."""


class State(str, Enum):
    """How a trial ended."""

    MEASURED = "measured"
    """A model came out and was measured."""
    INFEASIBLE = "infeasible"
    """No model satisfies the candidate."""
    STOPPED = "stopped"
    """The search gave it up before its end."""
    FAILED = "failed"
    """It broke; `reason` says why."""


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
    """In [0, 1]. Cascade: share of each block's budget that tokens may spend first. Global: 0.5 weighs channels and
    tokens as the profile does, 0 takes channels alone, 1 tokens alone. No effect on a schedule."""
    target_ratio: float
    """Share of the dense MACs to keep, in (0, 1]: pruning stops when it is reached. Method `unstructured`: share of the
    blocks' weights to keep."""
    exit_block: int
    """The model answers after this many blocks. Method `learned` gives a model for each exit up to here."""
    method: Method = "cascade"
    """Who decides what goes."""
    criterion: str = "lfs"
    """Score of the channels, a key of `pruning.scores.criteria.CRITERIA`; for method `cascade`."""
    token_reduction: TokenReduction = "lfe"
    """What becomes of the tokens that do not leave a block."""
    round_to: RoundTo = 1
    """Widths a head and hidden units are multiples of it, at least 1; auto: those that this device is faster with."""
    pattern: str = "any"
    """For method `unstructured`: `any` weights go, or all but N of every M neighbours (`2:4`), whatever the target."""
    recovery: Recovery = "none"
    """No effect on method `learned`, which trains all along."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Candidate:
        return cls(**record | {"drop_budget": tuple(record["drop_budget"])})

    def to_params(self) -> dict[str, float | int | str]:
        """Flat and named as in the search space: `drop_budget.0`, ...; only what has an effect."""
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
    """What a model does, measured; intervals cover 95 %."""

    top1: float
    """Accuracy on `val`, in [0, 1]."""
    top1_low: float
    top1_high: float
    throughput_img_s: float
    """Images a second at the recipe's batch size: dense throughput of a reference run times `speedup`."""
    speedup: float
    """Paired ratio to dense: the median over repeats, dense and pruned timed in turn."""
    speedup_low: float
    speedup_high: float
    latency_ms_p50: float
    """Median time of one batch of the recipe's batch size, in milliseconds."""
    macs: int
    """Multiply-adds an image, one multiply-add counted as one."""
    params: int
    top1_test: float | None = None
    """Accuracy on `test`, in [0, 1]; taken for the final front alone."""
    sparsity: float = 0.0
    """Share of the blocks' weights that are 0, counted; in [0, 1]."""
    recall_at_1: float | None = None
    """Share of the val images whose nearest training image is of their class; taken where the recipe searches by it,
    as is the next."""
    mean_average_precision: float | None = None
    """Mean over the val images of the average precision of their ranking of the training images, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Candidate + plan + measurement, or candidate + the reason why there is none."""

    id: str
    """`t000`, `t001`, ... in the order of the suggestions; `t001.9` is what the same trial found for an exit after
    block 9."""
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
    """What the user should know of the repair: layers of which only the bias could be, for want of images."""
    seconds: float = 0.0
    """Wall-clock time of the trial."""
    ended_s: float = 0.0
    """When the trial ended, in seconds of searching since the sweep began; stops between runs do not count."""
    waited_s: float = 0.0
    """How long its worker had waited for it, since the trial before."""
    rungs: tuple[tuple[float, float], ...] = ()
    """Accuracy and speed-up at each rung that it passed, or where it was stopped."""
    rung_spans: tuple[tuple[float, float], ...] = ()
    """When it began to be measured at each of them, and when it had been; in seconds since the trial began."""
    history: tuple[dict[str, float], ...] = ()
    """What was reported after each epoch of a trial that trains."""
    has_weights: bool = False
    """Its weights were trained, and are kept; else they follow from the plan and the dense model."""
    same_as: str | None = None
    """Id of the earlier outcome that trained the same plan: its weights and its measurement are this one's too."""

    def __post_init__(self) -> None:
        measured = self.state is State.MEASURED
        assert measured == (self.measurement is not None and self.plan is not None), self.state
        assert measured or self.reason, "an outcome without a measurement says why"

    @property
    def trial(self) -> str:
        """Id of the trial that it came of."""
        return self.id.split(".")[0]

    @property
    def weights_id(self) -> str:
        """Under which its weights are kept, if it has any of its own."""
        return self.same_as or self.id

    def to_json(self) -> dict[str, Any]:
        plain = {"id": self.id, "state": self.state.value, "candidate": asdict(self.candidate), "reason": self.reason}
        measured = {
            "plan": self.plan and self.plan.to_json(),
            "measurement": self.measurement and asdict(self.measurement),
        }
        cost = {"block_drops": self.block_drops, "forward_passes": self.forward_passes}
        cost |= {"seconds": self.seconds, "ended_s": self.ended_s, "waited_s": self.waited_s}
        course = {"rungs": self.rungs, "rung_spans": self.rung_spans, "history": self.history}
        kept = {"notes": self.notes, "has_weights": self.has_weights, "same_as": self.same_as}
        return plain | measured | cost | course | kept

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
    """The trials that the outcomes came of."""
    return len({outcome.trial for outcome in outcomes})


def idle_share(outcomes: Sequence[Outcome]) -> float:
    """Share of the workers' time, from their first trials to their last, in which they waited for the next one."""
    waited = sum(outcome.waited_s for outcome in outcomes)
    total = waited + sum(outcome.seconds for outcome in outcomes)
    return waited / total if total else 0.0
