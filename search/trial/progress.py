"""The progress of a trial: its epochs, its rungs, and the state from which another process goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The event after each epoch of a trial that trains."""

    progress: dict[str, float]
    """The number of the `epoch`, its `loss`, and what else the training tells."""
    state: Callable[[], dict[str, Any]]
    """Gives all that the trial needs to go on, on the CPU; `torch.save` writes it, without pickled classes."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """The event at a place where the trial may be stopped, with what it has shown so far."""

    values: tuple[tuple[float, float], ...]
    """Accuracy and speed-up at every rung up to this one: the first on a part of the images, others on all."""
    spans: tuple[tuple[float, float], ...]
    """The seconds since the trial began at which the measurement for each rung started and ended."""


Event = Epoch | Rung
"""An event before the end of a trial."""


class Training(Protocol):
    """A training of `pruning` that runs epoch by epoch."""

    @property
    def is_done(self) -> bool: ...

    def run_epoch(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any]) -> None: ...


class TrialProgress:
    """The progress of a trial, in this process and in earlier ones."""

    def __init__(self, state: Mapping[str, Any] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            state: of an `Epoch` of the same trial, to go on from.
            clock: gives seconds.
        """
        self._state: Mapping[str, Any] = state or {}
        self._clock, self._start = clock, clock() - self._state.get("seconds", 0.0)
        self._history: list[dict[str, float]] = list(self._state.get("history", ()))
        self._spans: list[tuple[float, float]] = list(map(tuple, self._state.get("rung_spans", ())))
        self.rungs: list[tuple[float, float]] = list(map(tuple, self._state.get("rungs", ())))
        """Accuracy and speed-up at each rung passed."""

    @property
    def seconds(self) -> float:
        """The wall-clock time of the trial in all processes, without the time between them."""
        return self._clock() - self._start

    def record(self) -> dict[str, Any]:
        """Gives the fields of an outcome that tell of the progress."""
        return {
            "seconds": self.seconds,
            "rungs": tuple(self.rungs),
            "rung_spans": tuple(self._spans),
            "history": tuple(self._history),
        }

    def rung(self, measure: Callable[[], tuple[float, float]]) -> Rung:
        """Measures accuracy and speed-up now, and gives the next rung."""
        began = self.seconds
        self.rungs.append(measure())
        self._spans.append((began, self.seconds))
        return Rung(values=tuple(self.rungs), spans=tuple(self._spans))

    def before(self, stage: str) -> Mapping[str, Any] | None:
        """Gives what an earlier process knew before its training of this stage, if that is where it stopped."""
        return self._state["before"] if self._state.get("stage") == stage else None

    def train(self, stage: str, training: Training, before: Mapping[str, Any]) -> Iterator[Epoch]:
        """Trains to the end, from where an earlier process stopped."""
        if self.before(stage) is not None:
            training.load(self._state["training"])
        while not training.is_done:
            self._history.append(training.run_epoch())
            yield Epoch(
                progress={"epoch": len(self._history), **self._history[-1]},
                state=lambda: {
                    "stage": stage,
                    "before": dict(before),
                    "training": on_cpu(training.state()),
                    "history": list(self._history),
                    "rungs": list(self.rungs),
                    "rung_spans": list(self._spans),
                    "seconds": self.seconds,
                },
            )


def on_cpu(tree: Any) -> Any:
    """Copies nested dicts, lists and tuples, their tensors to the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().cpu().clone()
    if isinstance(tree, dict):
        return {key: on_cpu(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(on_cpu, tree))
    return tree
