"""Makes one table of several finished sweeps of digits, without the parts that no replay needs (plans, notes).

    python tests/data/record_table.py runs/table-auto runs/table-random runs/table-tpe --to tests/data/digits_table

The sweeps of the table in this folder were run on two workers, with short checks of lowest priority beside them now and
then, by

    vitfront run digits --trials 120 --name table-auto --set search.patience=0      # Optuna's GPSampler then
    vitfront run digits --trials 150 --name table-random --set search.sampler=random --set search.patience=0
    vitfront run digits --trials 90 --name table-tpe --from table-random --set search.sampler=tpe \\
        --set search.patience=0                                                     # stopped by Ctrl-C after 59
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from pruning.plan import BlockPlan, Plan
from search.outcome import Outcome
from search.records import ledger
from search.records.folder import Folder

NO_BLOCK = BlockPlan(keep_heads=(0,), keep_qk=((0,),), keep_v=((0,),), keep_hidden=(0,), num_tokens=1)
"""Plan of a block that stands for all of them, which would be 3 MB; a replay shows how many blocks there are."""


def stripped(outcome: Outcome, number: int) -> Outcome:
    plan = None if outcome.plan is None else Plan(blocks=(NO_BLOCK,) * outcome.plan.exit_block)
    return replace(outcome, id=f"t{number:03d}", plan=plan, block_drops=(), notes=(), history=())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    folders = [Folder(path.parent, path.name) for path in args.sweeps]
    outcomes = [outcome for folder in folders for outcome in ledger.read(folder.ledger)]
    front = replace(folders[0].read_front(), name=args.to.name, points=(), knee=None, trials=len(outcomes))
    table = Folder(args.to.parent, args.to.name)
    args.to.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(stripped(outcome, number).to_json()) for number, outcome in enumerate(outcomes)]
    table.ledger.write_text("".join(f"{line}\n" for line in lines))
    table.write_front(front)


if __name__ == "__main__":
    main()
