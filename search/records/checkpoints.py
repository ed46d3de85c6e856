"""Checkpoints of trials that train: one file a trial, written by the driver, read when a stopped sweep resumes.

A file is what `torch.save` writes of plain containers and tensors; it is read without unpickling any class.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pruning.errors import first_line_of
from search.errors import SweepError
from search.outcome import Candidate
from search.records.files import write_by


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a trial after one of its epochs."""

    id: str
    """Id of the trial."""
    candidate: Candidate
    state: Mapping[str, Any]
    """Plain containers and tensors from which the trial goes on."""


class Checkpoints:
    """The checkpoint files of one sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint of an earlier epoch of the trial, wholly or not at all.

        Raises:
            SweepError: the disk refuses.
        """
        record = {"candidate": asdict(checkpoint.candidate), "state": dict(checkpoint.state)}

        def write(draft: Path) -> None:
            draft.parent.mkdir(parents=True, exist_ok=True)
            torch.save(record, draft)

        write_by(self._path(checkpoint.id), write)

    def remove(self, trial_id: str) -> None:
        """Removes the checkpoint of a trial that has ended, if it has one."""
        self._path(trial_id).unlink(missing_ok=True)

    def read(self, done: Collection[str]) -> list[Checkpoint]:
        """Reads the checkpoints that earlier runs left, by trial id.

        Args:
            done: ids of trials that have ended since; their files are removed.

        Raises:
            SweepError: a file cannot be read.
        """
        checkpoints = []
        for path in sorted(self.folder.glob("t*.pt")):
            if path.stem in done:
                path.unlink()
                continue
            try:
                record = torch.load(path, weights_only=True)
                candidate = Candidate.from_json(record["candidate"])
                checkpoints.append(Checkpoint(id=path.stem, candidate=candidate, state=record["state"]))
            except Exception as error:  # unpickling has errors of its own
                raise SweepError(
                    f"cannot read {path} ({first_line_of(error)}); remove it to run its trial anew"
                ) from error
        return checkpoints

    def _path(self, trial_id: str) -> Path:
        return self.folder / f"{trial_id}.pt"
