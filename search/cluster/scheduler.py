"""The rungs of a search as a Ray `TrialScheduler`."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.suggest.rungs import Promotion


class RungScheduler(FIFOScheduler):
    """Stops the trials that are not promoted at a rung; starts them in the order in which they are suggested."""

    def __init__(self, promotes: Promotion) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._promotes = promotes

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its scheduler to resume by; we resume by the ledger

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Returns Ray's word for going on or stopping; a result without `rungs` is no rung and goes on."""
        if "rungs" not in result:
            return TrialScheduler.CONTINUE
        *earlier, values = result["rungs"]
        return TrialScheduler.CONTINUE if self._promotes(len(earlier), tuple(values)) else TrialScheduler.STOP
