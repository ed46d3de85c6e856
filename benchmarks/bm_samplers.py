"""Compares samplers, ours and those of libraries: hypervolume after so many trials and seconds, over seeds.

    python benchmarks/bm_samplers.py [--quick] [--json] [--out benchmarks/results] [--table FOLDER]

The table (`tests/data/digits_table`) is of finished sweeps of digits, by random candidates and two samplers of Optuna
(tests/data/record_table.py). Every sampler searches it with the same first candidates, on two simulated workers. Its
suggestions are moved to the nearest recorded candidate, none twice, which favours the random sampler less where they
lie dense; `botorch` chooses among the recorded candidates themselves. Hypervolume is that of the search (val), as in
`vitfront run`. A grid ends once nothing new of it is left. `gp by trials` is `gp` without the seconds of trials.

The table is not fresh to `gp`: 900 candidates a suggestion, instead of 1,800, were chosen on six seeds of it.

A table of 329 trials says nothing of searches with hundreds. These search a made-up task: extremely randomised trees
fitted to the table answer any candidate, with the noise of 360 images and of a stopwatch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from pictures import band, drawn
from scipy.stats import t
from sklearn.ensemble import ExtraTreesRegressor

from pruning.measure.stopwatch import device_name
from search.commands.replay import Recorded, replay
from search.front import hypervolume_of, running_hypervolume
from search.goal import Goal
from search.outcome import Candidate, Outcome
from search.parameter import Choice
from search.recipe import load_config
from search.space import Space
from search.suggest.ask import CandidateSearch, History, Suggestion
from search.suggest.samplers import NUM_RANDOM, SamplerSettings
from search.trial.warm_start import first_candidates

TABLE = Path(__file__).parents[1] / "tests" / "data" / "digits_table"
RUNS: dict[str, tuple[int, ...]] = {
    "gp": (20, 40), "gp by trials": (20, 40), "botorch": (20, 40), "random": (20, 40, 120), "nsga2": (20, 40, 120),
    "tpe": (20, 40, 120), "grid": (20, 40, 120), "optuna-gp": (20, 40),
}  # fmt: skip
"""Sampler -> the numbers of trials after which its hypervolume is read."""

NUM_SEEDS = {"botorch": 3, "optuna-gp": 2}
"""Sampler -> number of seeds, where it is not `DEFAULT_SEEDS`: those of libraries take a minute of CPU for each."""

DEFAULT_SEEDS = 6

MADE_UP: dict[str, tuple[int, ...]] = {"random": (120, 250), "tpe": (120, 250), "gp by trials": (120, 250)}
"""Sampler -> the numbers of trials on the made-up task."""

NUM_MADE_UP = 2
"""Number of seeds on the made-up task."""

SECONDS = (100, 200)
"""Seconds of searching with one worker, suggestions included, after which hypervolume is read."""

NOISE = (0.007, 0.03)
"""Standard deviations of the made-up task: of accuracy, and of the logarithm of speed-up."""


@dataclass(frozen=True)
class Curve:
    """One search: after each of its trials, the hypervolume and the seconds of one worker."""

    hypervolumes: Sequence[float]
    seconds: Sequence[float]
    suggesting_s: float
    """Seconds of CPU for a suggestion, on average, after the first candidates."""

    def after(self, num_trials: int) -> float:
        return self.hypervolumes[min(num_trials, len(self.hypervolumes)) - 1]

    def at(self, seconds: float) -> float:
        reached = int(np.searchsorted(self.seconds, seconds, side="right"))
        return self.hypervolumes[reached - 1] if reached else 0.0


Curves = dict[str, list[Curve]]
"""Sampler -> its searches, one a seed."""


class Timed:
    """A search whose suggestions are timed, and who may not be told the seconds of trials."""

    def __init__(self, search: Any, *, tells_seconds: bool) -> None:
        self._search, self._tells_seconds = search, tells_seconds
        self.seconds: dict[str, float] = {}
        """Trial -> seconds of CPU until it was suggested, those of all threads."""

    def ask(self) -> Suggestion | None:
        start = time.process_time()
        suggestion: Suggestion | None = self._search.ask()
        if suggestion is not None:
            self.seconds[suggestion.id] = time.process_time() - start
        return suggestion

    def tell(self, trial_id: str, outcome: Outcome) -> None:
        self._search.tell(trial_id, outcome if self._tells_seconds else replace(outcome, seconds=0.0))


class BoTorchSearch:
    """Suggests, of the recorded candidates, the one with the largest noisy expected improvement by BoTorch.

    Its model is that of BoTorch's tutorial on several objectives: a SingleTaskGP of each, inputs in the unit cube (a
    choice with an axis for each of its values), outcomes standardised; pending points are those that run.
    """

    def __init__(self, recorded: Recorded, goal: Goal, seed: int) -> None:
        self._recorded, self._goal, self._seed = recorded, goal, seed
        self._first = [recorded.nearest(candidate) for candidate in first_candidates(recorded.space)]
        self._points = {one.candidate: point_of(recorded.space, one.candidate) for one in recorded.outcomes}
        self._running: dict[str, Candidate] = {}
        self._known: dict[Candidate, tuple[float, float]] = {}
        self._count = 0
        self._rng = np.random.default_rng(seed)

    def ask(self) -> Suggestion | None:
        tried = self._known.keys() | self._running.values()
        new = [candidate for candidate in self._points if candidate not in tried]
        first = next((one for one in self._first if one not in tried), None)
        if not new:
            return None
        if first is not None:
            candidate = first
        elif len(self._known) < NUM_RANDOM:
            candidate = new[self._rng.integers(len(new))]
        else:
            candidate = self._best(new)
        suggestion = Suggestion(id=f"t{self._count:03d}", candidate=candidate, is_resumed=False, has_rungs=False)
        self._count += 1
        self._running[suggestion.id] = candidate
        return suggestion

    def tell(self, trial_id: str, outcome: Outcome) -> None:
        row = self._goal.values([outcome])[0]
        self._known[self._running.pop(trial_id)] = (row[0], row[1])

    def _best(self, new: list[Candidate]) -> Candidate:
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.models.transforms import Standardize
        from botorch.optim import optimize_acqf_discrete
        from botorch.sampling import SobolQMCNormalSampler
        from gpytorch.mlls import SumMarginalLogLikelihood

        def points(candidates: Sequence[Candidate]) -> torch.Tensor:
            return torch.tensor(np.array([self._points[one] for one in candidates]), dtype=torch.float64)

        known, reference = points(list(self._known)), torch.tensor(self._goal.reference, dtype=torch.float64)
        values = torch.tensor(list(self._known.values()), dtype=torch.float64)
        values[:, 0] = values[:, 0].clamp(min=float(reference[0]))  # as ours does: all below is as bad
        models = [SingleTaskGP(known, column[:, None], outcome_transform=Standardize(1)) for column in values.T]
        model = ModelListGP(*models)
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        gain = qLogNoisyExpectedHypervolumeImprovement(
            model=model, ref_point=reference.tolist(), X_baseline=known, prune_baseline=True,
            sampler=SobolQMCNormalSampler(torch.Size([128]), seed=self._seed),
            X_pending=points(list(self._running.values())) if self._running else None,
        )  # fmt: skip
        choices = points(new)
        best, _ = optimize_acqf_discrete(gain, q=1, choices=choices)
        return new[int((choices - best).abs().sum(dim=1).argmin())]


def point_of(space: Space, candidate: Candidate) -> list[float]:
    """Places a candidate in the unit cube: a choice has an axis for each of its values."""
    values, point = space.values_of(candidate), list[float]()
    for name, parameter in space.parameters().items():
        if isinstance(parameter, Choice):
            point += [float(values[name] == value) for value in parameter.values]
        else:
            point.append(parameter.share(values[name]))
    return point


class MadeUp:
    """A task that answers any candidate, by trees that are fitted to a table; see the top of this file."""

    def __init__(self, recorded: Recorded) -> None:
        self.space, self.dense = recorded.space, recorded.dense
        self._template = recorded.outcomes[0]
        points = np.array([point_of(self.space, one.candidate) for one in recorded.outcomes])
        rows = [
            (one.measurement.top1, np.log(one.measurement.speedup), np.log(one.seconds))
            for one in recorded.outcomes
            if one.measurement is not None
        ]
        self._trees = ExtraTreesRegressor(100, min_samples_leaf=2, random_state=0).fit(points, np.array(rows))

    def outcomes(self, trial_id: str, candidate: Candidate, rng: np.random.Generator) -> tuple[Outcome, Outcome]:
        """Returns the outcome of a trial as it is measured, and as it would be without noise."""
        top1, log_speedup, log_seconds = self._trees.predict([point_of(self.space, candidate)])[0]
        values = np.array([top1, log_speedup])
        measured, true = (
            replace(self.dense, top1=float(accuracy), speedup=float(np.exp(log)))
            for accuracy, log in (values + rng.normal(0, NOISE), values)
        )
        outcome = replace(
            self._template, id=trial_id, candidate=candidate, measurement=measured, seconds=float(np.exp(log_seconds))
        )
        return outcome, replace(outcome, measurement=true)


def new_search(sampler: str, recorded: Recorded | MadeUp, goal: Goal, seed: int, num_trials: int) -> Any:
    """Creates a search by the name of a sampler."""
    if sampler == "botorch":
        assert isinstance(recorded, Recorded)
        return BoTorchSearch(recorded, goal, seed)
    name = {"gp by trials": "gp", "optuna-gp": "random"}.get(sampler, sampler)
    nearest: Callable[[Candidate], Candidate] = (
        recorded.nearest if isinstance(recorded, Recorded) else lambda candidate: candidate
    )
    search = CandidateSearch(
        recorded.space,
        SamplerSettings(sampler=name, seed=seed, num_trials=num_trials),  # type: ignore[arg-type]
        History(first_candidates=first_candidates(recorded.space)),
        goal,
        nearest_allowed=nearest,
    )
    if sampler == "optuna-gp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            search.learner.study.sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=NUM_RANDOM)
    return search


def searched(sampler: str, recorded: Recorded | MadeUp, goal: Goal, seed: int, num_trials: int) -> Curve:
    """Runs one search, on two simulated workers."""
    search: Any = Timed(new_search(sampler, recorded, goal, seed, num_trials), tells_seconds=sampler != "gp by trials")
    num_first = len(first_candidates(recorded.space))
    outcomes, true = list[Outcome](), list[Outcome]()
    if isinstance(recorded, Recorded):
        outcomes = [outcome for [outcome] in replay(recorded, search, num_trials, num_workers=2)]
        true = outcomes
    else:
        rng, waiting = np.random.default_rng(1000 + seed), list[Suggestion]()
        while len(outcomes) < num_trials:
            while len(waiting) < 2:
                suggestion = search.ask()
                assert suggestion is not None
                waiting.append(suggestion)
            done = waiting.pop(0)
            outcome, without_noise = recorded.outcomes(done.id, done.candidate, rng)
            outcomes.append(outcome)
            true.append(without_noise)
            search.tell(done.id, outcome)
    suggesting = [search.seconds[one.id] for one in outcomes]
    return Curve(
        hypervolumes=running_hypervolume(true, goal),
        seconds=np.cumsum([one.seconds + lost for one, lost in zip(outcomes, suggesting, strict=True)]).tolist(),
        suggesting_s=float(
            np.mean([seconds for name, seconds in search.seconds.items() if int(name[1:]) >= num_first])
        ),
    )


def read(task: str, sampler: str, milestones: tuple[int, ...], curves: list[Curve]) -> list[dict[str, Any]]:
    """Reads the hypervolume of a sampler's searches: a row for each number of trials, and of seconds if recorded."""
    after = [(f"{count} trials", [curve.after(count) for curve in curves]) for count in milestones]
    if task == "recorded":
        after += [(f"{count} s", [curve.at(count) for curve in curves]) for count in SECONDS]
    rows = [
        {
            "task": task, "sampler": sampler, "after": when, "hypervolume": float(np.mean(values)),
            "half_interval": half_interval(values), "seeds": len(curves),
            "seconds_a_suggestion": float(np.mean([curve.suggesting_s for curve in curves])),
        }
        for when, values in after
    ]  # fmt: skip
    for row in rows:
        print(row, file=sys.stderr, flush=True)
    return rows


def half_interval(values: Sequence[float]) -> float:
    """Computes half of the 95 % interval of the mean."""
    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def rows_of(curves: list[Curve]) -> NDArray[np.float64]:
    """Returns the hypervolume of each search after each trial; one that ended early keeps its last."""
    longest = max(len(curve.hypervolumes) for curve in curves)
    return np.array([[curve.after(count) for count in range(1, longest + 1)] for curve in curves])


def draw(curves: Curves, best: float, path: Path) -> None:
    with drawn(path) as (axes,):
        for sampler, searches in curves.items():
            volumes = rows_of(searches)
            band(axes, np.arange(1, volumes.shape[1] + 1), volumes, sampler)
        axes.axhline(best, color="grey", linestyle=":", label="the whole table")
        axes.set(xlabel="trials", ylabel="hypervolume on val", title="digits recorded: mean and range of the seeds")


def text_of(rows: list[dict[str, Any]], command: str, num_rows: int, best: float) -> str:
    lines = [
        "# Samplers on a recorded sweep", "", f"    {command}", "",
        f"{device_name(torch.device('cpu'))}, one thread, other work beside it. Recorded: {num_rows} trials of digits,",
        f"whose own hypervolume is {best:.4f}. Made up: trees fitted to them, which answer any candidate.",
        "Mean over the seeds and its 95 % interval; after so many trials, or seconds of one worker with its",
        "suggestions; seconds a suggestion are of CPU.", "", "![hypervolume over trials](samplers.png)", "",
        "| task | sampler | after | hypervolume | seeds | seconds a suggestion |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {row['task']} | {row['sampler']} | {row['after']} | {row['hypervolume']:.4f} ± {row['half_interval']:.4f} "
        f"| {row['seeds']} | {row['seconds_a_suggestion']:.3f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three seeds, fewer trials, nothing of libraries")
    parser.add_argument("--json", action="store_true", help="rows on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="folder for samplers.{md,json,png}")
    parser.add_argument("--table", type=Path, default=TABLE, help="folder of a finished sweep")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recorded = Recorded.read(args.table, load_config("digits", sets=["space=papers"]))
    goal = Goal(dense=recorded.dense)
    best = hypervolume_of(recorded.outcomes, goal)
    rows, curves, text = list[dict[str, Any]](), Curves(), ""
    jobs = [("recorded", sampler, counts, NUM_SEEDS.get(sampler, DEFAULT_SEEDS)) for sampler, counts in RUNS.items()]
    jobs += [("made up", sampler, counts, NUM_MADE_UP) for sampler, counts in MADE_UP.items()]
    if args.quick:
        jobs = [
            (task, name, counts[:1], 3) for task, name, counts, seeds in jobs[: -len(MADE_UP)] if name not in NUM_SEEDS
        ]
    for task, sampler, counts, num_seeds in jobs:
        searched_in = recorded if task == "recorded" else MadeUp(recorded)
        found = [searched(sampler, searched_in, goal, seed, counts[-1]) for seed in range(num_seeds)]
        rows += read(task, sampler, counts, found)
        if task == "recorded":
            curves[sampler] = found
        text = text_of(rows, " ".join(["python", *sys.argv]), len(recorded.outcomes), best)
        if args.out is not None:  # after each, since some take long
            (args.out / "samplers.md").write_text(text)
            (args.out / "samplers.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            draw(curves, best, args.out / "samplers.png")
    print(json.dumps({"rows": rows}) if args.json else text, end="")


if __name__ == "__main__":
    main()
