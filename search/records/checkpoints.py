"""Trials that were training when a sweep stopped: one file each, which the driver writes and a resumed sweep reads.

A file is what `torch.save` writes of plain containers and tensors; it is read without unpickling any class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from search.errors import SweepError
from search.outcome import Candidate
from search.records.files import write_by


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trial on its way."""

    id: str
    candidate: Candidate
    state: Mapping[str, Any]
    """Of `search.trial.trial.Epoch`."""


class Checkpoints:
    """The files of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, checkpoint: Checkpoint) -> None:
        """Replaces what an earlier epoch of the trial wrote, whole or not at all.

        Raises:
            SweepError: the disk refuses.
        """
        record = {"candidate": asdict(checkpoint.candidate), "state": dict(checkpoint.state)}

        def write(draft: Path) -> None:
            draft.parent.mkdir(parents=True, exist_ok=True)
            torch.save(record, draft)

        write_by(self._path(checkpoint.id), write)

    def remove(self, trial_id: str) -> None:
        """The trial has ended."""
        self._path(trial_id).unlink(missing_ok=True)

    def read(self, done: Collection[str]) -> list[Checkpoint]:
        """What is left of earlier runs, by id; the files of trials that ended since are removed.

        Raises:
            SweepError: a file cannot be read.
        """
        found = []
        for path in sorted(self.folder.glob("t*.pt")):
            if path.stem in done:
                path.unlink()
                continue
            try:
                record = torch.load(path, weights_only=True)
                candidate = Candidate.from_json(record["candidate"])
            except Exception as error:  # unpickling has errors of its own
                raise SweepError(f"cannot read {path} ({error}); remove it to run its trial anew") from error
            found.append(Checkpoint(id=path.stem, candidate=candidate, state=record["state"]))
        return found

    def _path(self, trial_id: str) -> Path:
        return self.folder / f"{trial_id}.pt"
