"""Runs `vitfront run` so that every trial is measured at its rungs and goes on, which a replay with rungs needs.

The sweeps of `digits_rungs`, the table that benchmarks/bm_fidelities.py searches, were run on two workers, by

    python tests/data/record_rungs.py digits --trials 60 --name rungs-random --set search.sampler=random SETS
    python tests/data/record_rungs.py digits --trials 60 --name rungs-gp --set search.sampler=gp SETS

with `--set space.recovery=distill --set distill.epochs=48 --set search.reduction_factor=3 --set search.patience=0` for
SETS; record_table.py made one table of both. Short searches of lowest priority ran beside them now and then; the first
was stopped and went on twice. Freed memory was not kept then (pruning/measure/stopwatch.py), so speed-ups are
noisier than now.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

from search.cli import app
from search.suggest.rungs import Rungs

if __name__ == "__main__":
    with patch.object(Rungs, "promotes", lambda *_: True):
        app(["run", *sys.argv[1:]])
