"""The expected gain of hypervolume against sampling, and where suggestions go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from search.outcome import Candidate
from search.pareto import hypervolume
from search.space import Space
from search.suggest.duration import Duration
from search.suggest.surrogate import MAX_FITTED, Observation, Surrogate, best_and_latest, expected_gain
from tests.search_tests.builders import papers_space

SPACE = Space(papers_space(exit_block=(2, 3), method=("cascade", "global")), depth=3)
FRONT = np.array([[0.9, 1.2], [0.8, 2.0], [0.7, 1.9], [0.6, 2.5], [0.4, 3.0]])
REFERENCE = np.array([0.5, 1.0])


@pytest.mark.parametrize("front", [FRONT, FRONT[:1], FRONT[:0], FRONT[[1, 1]]], ids=["five", "one", "none", "twice"])
def test_expected_gain_is_the_mean_of_sampled_gains(front: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    mean, deviation = np.array([[0.85, 1.9], [0.7, 1.5], [0.3, 2.0]]), np.array([[0.05, 0.3], [0.1, 0.4], [0.1, 0.1]])
    gains = expected_gain(mean, deviation, front, REFERENCE)
    before = hypervolume(front, REFERENCE)
    for gain, middle, width in zip(gains, mean, deviation, strict=True):
        drawn = rng.normal(middle, width, size=(2000, 2))
        sampled = np.array([hypervolume(np.vstack((front, point)), REFERENCE) - before for point in drawn])
        assert gain == pytest.approx(sampled.mean(), abs=4 * sampled.std() / np.sqrt(len(sampled)) + 1e-12)


def test_expected_gain_of_what_is_certain_is_its_gain() -> None:
    points = np.array([[0.85, 2.2], [0.75, 1.5], [0.95, 3.5], [0.4, 9.0], [0.9, 1.2]])
    gains = expected_gain(points, np.full_like(points, 1e-9), FRONT, REFERENCE)
    exact = [hypervolume(np.vstack((FRONT, point)), REFERENCE) - hypervolume(FRONT, REFERENCE) for point in points]
    np.testing.assert_allclose(gains, exact, atol=1e-7)


def surrogate(**other: Any) -> Surrogate:
    settings: dict[str, Any] = {"reference": (0.5, 1.0), "seed": 0} | other
    return Surrogate(SPACE, lambda values: SPACE.of_values(SPACE.snap(values)), **settings)


def sample(count: int, **settings: Any) -> list[Candidate]:
    """Different candidates from all of the space, at most so many."""
    source = surrogate(**settings)
    return list(dict.fromkeys(source.sample_uniform() for _ in range(count)))


def observed(
    candidate: Candidate,
    values: tuple[float, float] | None = None,
    rungs: tuple[tuple[float, float], ...] = (),
    **excesses: float,
) -> Observation:
    return Observation(candidate=candidate, values=values, excesses=excesses, rungs=rungs)


def values_of(candidate: Candidate) -> tuple[float, float]:
    """Made-up objectives: best at a token share of 0.2, by the cascade; a smaller target is faster."""
    off = abs(candidate.token_share - 0.2) + 0.2 * (candidate.method == "global")
    return 0.9 - 0.3 * (1 - candidate.target_ratio) ** 2 - 0.3 * off, 2 - candidate.target_ratio


def suggest_many(source: Surrogate, observations: list[Observation], count: int) -> list[Candidate]:
    """Suggestions while none of them has ended."""
    running = list[Candidate]()
    for _ in range(count):
        suggested = source.suggest(observations, running)
        assert suggested is not None
        running.append(suggested)
    return running


def test_suggestions_are_new_and_go_where_the_gain_is() -> None:
    source = surrogate()
    observations = [observed(one, values_of(one)) for one in dict.fromkeys(source.sample_uniform() for _ in range(8))]
    for _ in range(18):
        suggested = source.suggest(observations, [])
        assert suggested is not None
        assert SPACE.holds(suggested)
        assert suggested not in {one.candidate for one in observations}
        observations.append(observed(suggested, values_of(suggested)))
    late = [one.candidate for one in observations[-10:]]
    assert sum(abs(candidate.token_share - 0.2) < 0.1 for candidate in late) >= 9
    assert sum(candidate.method == "cascade" for candidate in late) >= 9
    gained = hypervolume(np.array([one.values for one in observations]), REFERENCE)
    at_random = [values_of(source.sample_uniform()) for _ in observations]
    assert gained > hypervolume(np.array(at_random), REFERENCE)


def test_what_is_expected_of_running_candidates_is_no_gain_any_more() -> None:
    observations = [observed(one, values_of(one)) for one in sample(12)]
    running = suggest_many(surrogate(), observations, 6)
    assert len(set(running)) == 6
    values = np.array([values_of(candidate) for candidate in running])
    spread = hypervolume(values, REFERENCE) / hypervolume(values[:1], REFERENCE)
    assert spread > 1.05  # together they gain more than the first alone: they lie along the front


def test_what_fails_and_what_is_beyond_a_limit_is_avoided() -> None:
    candidates = sample(40, seed=3)
    observations = {
        "fails": [observed(one, None if one.target_ratio < 0.5 else values_of(one)) for one in candidates],
        "limited": [observed(one, values_of(one), macs=0.5 - one.target_ratio) for one in candidates],
        "free": [observed(one, values_of(one)) for one in candidates],
    }
    share_large = {
        name: np.mean([one.target_ratio >= 0.48 for one in suggest_many(surrogate(), known, 6)])
        for name, known in observations.items()
    }
    assert share_large["free"] <= 0.5
    assert share_large["fails"] >= 0.8
    assert share_large["limited"] >= 0.8


def test_what_was_stopped_by_bad_luck_is_suggested_again_until_it_has_ended() -> None:
    """Only recorded candidates can be tried, so that no neighbours are in its place."""
    candidates = sample(40, seed=3)
    lucky = replace(candidates[0], token_share=0.2, target_ratio=0.3, method="cascade")
    table = [*candidates, lucky]
    observations = [observed(one, values_of(one), rungs=(values_of(one),)) for one in candidates[:20]]

    def nearest(values: Mapping[str, Any]) -> Candidate:
        share, ratio = values["token_share"], values["target_ratio"]
        return min(table, key=lambda one: abs(one.token_share - share) + abs(one.target_ratio - ratio))

    def suggest(*others: Observation, running: Sequence[Candidate] = ()) -> Candidate | None:
        return Surrogate(SPACE, nearest, reference=(0.5, 1.0), seed=0).suggest([*observations, *others], running)

    stopped = observed(lucky, rungs=(values_of(lucky),))
    assert suggest(stopped) == lucky
    assert suggest(stopped, running=[lucky]) != lucky
    assert suggest(stopped, observed(lucky, values_of(lucky))) != lucky
    assert suggest(stopped, observed(lucky)) != lucky  # it failed then


def test_what_was_seen_at_rungs_tells_of_the_end_but_is_not_taken_for_it() -> None:
    """Early accuracy is far too high everywhere, but highest where the end is as well."""

    def observations(with_rungs: bool) -> list[Observation]:
        known = []
        for number, candidate in enumerate(sample(40, seed=3)):
            top1, speedup = values_of(candidate)
            rungs = ((top1 + 0.09, speedup), (top1 + 0.05, speedup))
            if number < 6:
                known.append(observed(candidate, (top1, speedup), rungs=rungs if with_rungs else ()))
            elif with_rungs:
                known.append(observed(candidate, rungs=rungs[: 1 + number % 2]))
        return known

    distance, gained = {}, {}
    for with_rungs in (False, True):
        suggested = suggest_many(surrogate(), observations(with_rungs), 6)
        distance[with_rungs] = np.mean([abs(candidate.token_share - 0.2) for candidate in suggested])
        gained[with_rungs] = hypervolume(np.array([values_of(candidate) for candidate in suggested]), REFERENCE)
    assert distance[True] < 0.7 * distance[False]
    assert gained[True] > gained[False]


@pytest.mark.parametrize("reference", [None, (0.5, 1.0)])
def test_accuracies_below_the_reference_are_all_as_bad(reference: tuple[float, float] | None) -> None:
    candidates = sample(12)
    good, bad = candidates[:6], candidates[6:]

    def suggest(lost: float) -> Candidate | None:
        observations = [observed(one, values_of(one)) for one in good]
        observations += [observed(one, (0.4 - lost, values_of(one)[1])) for one in bad]
        return surrogate(reference=reference).suggest(observations, [])

    assert (suggest(0.0) == suggest(0.3)) is (reference is not None)


def test_nothing_is_suggested_where_all_was_tried() -> None:
    only = SPACE.clip(sample(1)[0])
    source = Surrogate(SPACE, lambda _: only, None, seed=0)
    assert source.suggest([observed(only, (0.9, 1.0))], []) is None


# Seconds


def timed(observation: Observation, seconds: float, **other: bool) -> Observation:
    return replace(observation, duration=Duration(seconds=seconds, **other))


@pytest.mark.parametrize("seconds", [0.0, 0.01, 7.0, 3600.0])
def test_where_all_trials_take_as_long_or_nobody_knows_the_gain_alone_counts(seconds: float) -> None:
    observations = [observed(one, values_of(one)) for one in sample(12)]
    alike = [timed(observation, seconds) for observation in observations]
    assert suggest_many(surrogate(), alike, 3) == suggest_many(surrogate(), observations, 3)


def test_a_method_that_is_ten_times_as_slow_and_a_little_better_is_tried_less_but_not_never() -> None:
    """The cascade is better by 0.04: in the long run it makes the front."""

    def values_of(candidate: Candidate) -> tuple[float, float]:
        off = 0.15 * abs(candidate.token_share - 0.3) + 0.04 * (candidate.method == "global")
        return 0.93 - 0.25 * (1 - candidate.target_ratio) ** 2 - off, candidate.target_ratio**-0.7

    share_cheap = {}
    for is_timed in (False, True):
        source, methods = surrogate(), list[str]()
        observations = [observed(one, values_of(one)) for one in sample(8)]
        observations = [timed(one, 10.0 if one.candidate.method == "cascade" else 1.0) for one in observations]
        if not is_timed:
            observations = [timed(one, 0.0) for one in observations]
        for _ in range(24):
            suggested = source.suggest(observations, [])
            assert suggested is not None
            methods.append(suggested.method)
            seconds = 0.0 if not is_timed else 10.0 if suggested.method == "cascade" else 1.0
            observations.append(timed(observed(suggested, values_of(suggested)), seconds))
        share_cheap[is_timed] = [methods[:12].count("global") / 12, methods[12:].count("global") / 12]
    assert share_cheap[True][0] >= 0.6 > 0.4 >= share_cheap[False][0]  # the cheap one first
    assert share_cheap[True][1] < share_cheap[True][0]  # then the slow one, where it can win


def test_seconds_are_predicted_for_methods_that_were_timed_on_this_machine() -> None:
    source = surrogate()
    cascade, other = (replace(sample(1)[0], method=method) for method in ("cascade", "global"))
    cascades = [one for one in sample(60) if one.method == "cascade"][:10]
    observations = [timed(observed(one, values_of(one)), 5.0) for one in cascades]
    assert source.predicted_seconds(cascade) is None
    source.suggest([replace(one, duration=replace(one.duration, is_elsewhere=True)) for one in observations], [])
    assert source.predicted_seconds(cascade) is None
    source.suggest(observations, [])
    assert source.predicted_seconds(cascade) == pytest.approx(5.0)
    assert source.predicted_seconds(other) is None


# Methods that can run, and observations that are fitted


def test_only_candidates_of_the_methods_that_can_run_are_suggested() -> None:
    observations = [observed(one, values_of(one)) for one in sample(12)]
    source = surrogate()
    assert {source.sample_uniform(["global"]).method for _ in range(30)} == {"global"}
    for _ in range(4):
        suggested = source.suggest(observations, [], ["global"])
        assert suggested is not None
        assert suggested.method == "global"
        observations.append(observed(suggested, values_of(suggested)))


def test_of_many_observations_the_best_and_the_latest_are_fitted() -> None:
    rng = np.random.default_rng(0)
    candidates = sample(MAX_FITTED + 60)
    good = {3, 7, 20}
    observations = [
        observed(one, (0.9, 2.0 + row / 1000) if row in good else tuple(0.4 * rng.random(2)))  # type: ignore[arg-type]
        for row, one in enumerate(candidates)
    ]
    observations[-2] = observed(candidates[-2])  # failed
    kept = best_and_latest(observations)
    assert len(kept) == MAX_FITTED
    assert kept == [one for one in observations if one in kept]
    assert {observations[row].candidate for row in good} <= {one.candidate for one in kept}
    assert kept[-MAX_FITTED // 4 :] == observations[-MAX_FITTED // 4 :]
    assert best_and_latest(observations[-MAX_FITTED:]) == observations[-MAX_FITTED:]
