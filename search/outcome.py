"""What was asked and what came of it: candidate, measurement, outcome. Plain records, JSON both ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from pruning.plan import Plan


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
    """Accuracy points (1 = one percent of the images) that pruning a block may cost; one entry a dense
    block, the entries past `exit_block` have no effect."""
    token_share: float
    """Share of each block's budget that tokens may spend first, in [0, 1]."""
    target_ratio: float
    """Share of the dense MACs to keep, in (0, 1]: the cascade stops when it is reached."""
    exit_block: int
    """The model answers after this many blocks."""

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Candidate:
        return cls(**record | {"drop_budget": tuple(record["drop_budget"])})

    def to_params(self) -> dict[str, float | int]:
        """Flat and named as in the search space: `drop_budget.0`, ...; only what has an effect."""
        params: dict[str, float | int] = {
            "cutoff_channel": self.cutoff_channel,
            "cutoff_token": self.cutoff_token,
            "token_share": self.token_share,
            "target_ratio": self.target_ratio,
            "exit_block": self.exit_block,
        }
        budgets = self.drop_budget[: self.exit_block]
        return params | {f"drop_budget.{block}": points for block, points in enumerate(budgets)}


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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Candidate + plan + measurement, or candidate + the reason why there is none."""

    id: str
    """`t000`, `t001`, ... in the order of the suggestions."""
    state: State
    candidate: Candidate
    reason: str | None = None
    plan: Plan | None = None
    measurement: Measurement | None = None
    block_drops: tuple[float, ...] = ()
    """Accuracy points that pruning each kept block cost on the probe images; each within its budget."""
    forward_passes: float = 0.0
    """Cost of the pruning in forward passes of the dense model over the probe images (a backward pass is two)."""
    seconds: float = 0.0
    """Wall-clock time of the trial."""

    def __post_init__(self) -> None:
        measured = self.state is State.MEASURED
        assert measured == (self.measurement is not None and self.plan is not None), self.state
        assert measured or self.reason, "an outcome without a measurement says why"

    def to_json(self) -> dict[str, Any]:
        plain = {"id": self.id, "state": self.state.value, "candidate": asdict(self.candidate), "reason": self.reason}
        measured = {
            "plan": self.plan and self.plan.to_json(),
            "measurement": self.measurement and asdict(self.measurement),
        }
        cost = {"block_drops": self.block_drops, "forward_passes": self.forward_passes, "seconds": self.seconds}
        return plain | measured | cost

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
            }
        )
