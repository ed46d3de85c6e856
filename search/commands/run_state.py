"""A sweep that is running, as all parts of its driver know it."""

from __future__ import annotations

from dataclasses import dataclass

from search.config import Config
from search.observer import Observer
from search.records.folder import Folder
from search.records.ledger import Ledger
from search.space import Space
from search.trial.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that is running: its recipe, its inputs, its records, and who watches it."""

    config: Config
    inputs: Inputs
    folder: Folder
    ledger: Ledger
    """The ledger in `folder`, opened for writing."""
    observer: Observer
    num_slots: int
    """Number of trials that fit on the cluster at once."""
    began: float
    """Time on the monotonic clock at which the command began."""

    @property
    def space(self) -> Space:
        return self.inputs.space

    @property
    def deadline(self) -> float | None:
        """Time on the monotonic clock at which the command is to end; None for no such time."""
        budget_s = self.config.search.time_budget_s
        return None if budget_s is None else self.began + budget_s
