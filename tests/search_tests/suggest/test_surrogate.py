"""The Gaussian process against scikit-learn's, the expected gain against sampling, and where suggestions go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from search.config import SpaceConfig
from search.front import hypervolume
from search.outcome import Candidate
from search.space import Space
from search.suggest.surrogate import GaussianProcess, Observation, Surrogate, expected_gain

SPACE = Space(SpaceConfig(exit_block=(2, 3), method=("cascade", "global")), depth=3)
FRONT = np.array([[0.9, 1.2], [0.8, 2.0], [0.7, 1.9], [0.6, 2.5], [0.4, 3.0]])
REFERENCE = np.array([0.5, 1.0])


def wave(points: np.ndarray) -> np.ndarray:
    """The last axis has no part in it."""
    return np.sin(5 * points[:, 0]) + 3 * points[:, 1] ** 2 + 7


@pytest.mark.parametrize("count", [1, 5, 40])
def test_process_gives_what_scikit_learn_does_at_the_same_lengths(count: int) -> None:
    rng = np.random.default_rng(0)
    points, at = rng.random((count, 3)), rng.random((20, 3))
    values, lengths, noise = wave(points), np.array([0.5, 1.0, 3.0]), 0.01
    mean, deviation = GaussianProcess(points, values, np.log([*lengths, noise])).at(at)
    scale = values.std() or 1.0
    theirs = GaussianProcessRegressor(Matern(lengths, nu=2.5), alpha=noise, optimizer=None)
    theirs.fit(points, (values - values.mean()) / scale)
    their_mean, their_deviation = theirs.predict(at, return_std=True)
    np.testing.assert_allclose(mean, values.mean() + scale * their_mean, rtol=1e-9)
    np.testing.assert_allclose(deviation, scale * their_deviation, rtol=1e-6)


def test_fitted_process_predicts_and_knows_how_well() -> None:
    rng = np.random.default_rng(0)
    points, at = rng.random((60, 3)), rng.random((200, 3))
    fitted = GaussianProcess.fitted(points, wave(points) + 0.05 * rng.standard_normal(60))
    mean, deviation = fitted.at(at)
    error = np.abs(mean - wave(at))
    assert error.mean() < 0.05
    assert (error < 2 * deviation).mean() > 0.9
    lengths = np.exp(fitted.logs[:-1])
    assert lengths[2] > 3 * lengths[:2].max()


def test_fit_is_as_likely_as_scikit_learns_without_a_prior() -> None:
    rng = np.random.default_rng(1)
    points = rng.random((80, 2))
    values = wave(points) + 0.1 * rng.standard_normal(80)
    kernel = ConstantKernel(1.0, "fixed") * Matern([1.0, 1.0], nu=2.5) + WhiteKernel(0.01, (1e-5, 1.0))
    theirs = GaussianProcessRegressor(kernel).fit(points, (values - values.mean()) / values.std())
    logs = GaussianProcess.fitted(points, values).logs
    assert theirs.log_marginal_likelihood(logs) > theirs.log_marginal_likelihood_value_ - 3


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0]], ids=["one", "equal"])
def test_process_of_values_without_a_spread_gives_their_value(values: list[float]) -> None:
    points = np.random.default_rng(0).random((len(values), 2))
    mean, deviation = GaussianProcess.fitted(points, np.array(values)).at(points)
    np.testing.assert_allclose(mean, values)
    assert np.isfinite(deviation).all()


@pytest.mark.parametrize("front", [FRONT, FRONT[:1], FRONT[:0], FRONT[[1, 1]]], ids=["five", "one", "none", "twice"])
def test_expected_gain_is_the_mean_of_sampled_gains(front: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    mean, deviation = np.array([[0.85, 1.9], [0.7, 1.5], [0.3, 2.0]]), np.array([[0.05, 0.3], [0.1, 0.4], [0.1, 0.1]])
    gains = expected_gain(mean, deviation, front, REFERENCE)
    before = hypervolume(front, REFERENCE)
    for gain, middle, width in zip(gains, mean, deviation, strict=True):
        drawn = rng.normal(middle, width, size=(4000, 2))
        sampled = np.array([hypervolume(np.vstack((front, each)), REFERENCE) - before for each in drawn])
        assert gain == pytest.approx(sampled.mean(), abs=4 * sampled.std() / np.sqrt(len(sampled)) + 1e-12)


def test_expected_gain_of_what_is_certain_is_its_gain() -> None:
    points = np.array([[0.85, 2.2], [0.75, 1.5], [0.95, 3.5], [0.4, 9.0], [0.9, 1.2]])
    gains = expected_gain(points, np.full_like(points, 1e-9), FRONT, REFERENCE)
    exact = [hypervolume(np.vstack((FRONT, each)), REFERENCE) - hypervolume(FRONT, REFERENCE) for each in points]
    np.testing.assert_allclose(gains, exact, atol=1e-7)


def surrogate(**other: Any) -> Surrogate:
    settings: dict[str, Any] = {"reference": (0.5, 1.0), "seed": 0} | other
    return Surrogate(SPACE, lambda values: SPACE.of_values(SPACE.snap(values)), **settings)


def tried(
    candidate: Candidate,
    values: tuple[float, float] | None = None,
    rungs: tuple[tuple[float, float], ...] = (),
    **excesses: float,
) -> Observation:
    return Observation(candidate=candidate, values=values, excesses=excesses, rungs=rungs)


def made_up(candidate: Candidate) -> tuple[float, float]:
    """Best at a token share of 0.2, by the cascade; less is faster."""
    off = abs(candidate.token_share - 0.2) + 0.2 * (candidate.method == "global")
    return 0.9 - 0.3 * (1 - candidate.target_ratio) ** 2 - 0.3 * off, 2 - candidate.target_ratio


def test_suggestions_are_new_and_go_where_the_gain_is() -> None:
    source = surrogate()
    known = [tried(each, made_up(each)) for each in dict.fromkeys(source.sample_uniform() for _ in range(8))]
    for _ in range(25):
        suggested = source.suggest(known, [])
        assert suggested is not None
        assert SPACE.holds(suggested)
        assert suggested not in {each.candidate for each in known}
        known.append(tried(suggested, made_up(suggested)))
    late = [each.candidate for each in known[-15:]]
    assert sum(abs(each.token_share - 0.2) < 0.1 for each in late) >= 13
    assert sum(each.method == "cascade" for each in late) >= 13
    gained = hypervolume(np.array([each.values for each in known]), REFERENCE)
    at_random = [made_up(source.sample_uniform()) for _ in range(len(known))]
    assert gained > hypervolume(np.array(at_random), REFERENCE)


def test_what_is_expected_of_running_candidates_is_no_gain_any_more() -> None:
    source = surrogate()
    known = [tried(each, made_up(each)) for each in dict.fromkeys(source.sample_uniform() for _ in range(12))]
    running = list[Candidate]()
    for _ in range(6):
        suggested = surrogate().suggest(known, running)
        assert suggested is not None
        running.append(suggested)
    assert len(set(running)) == 6
    values = np.array([made_up(each) for each in running])
    spread = hypervolume(values, REFERENCE) / hypervolume(values[:1], REFERENCE)
    assert spread > 1.05  # together they gain more than the first alone: they lie along the front


def test_what_fails_and_what_is_beyond_a_limit_is_avoided() -> None:
    rng = surrogate(seed=3)
    some = list(dict.fromkeys(rng.sample_uniform() for _ in range(40)))
    fails = [tried(each, None if each.target_ratio < 0.5 else made_up(each)) for each in some]
    limited = [tried(each, made_up(each), macs=0.5 - each.target_ratio) for each in some]
    free = [tried(each, made_up(each)) for each in some]
    found = {}
    for name, known in {"fails": fails, "limited": limited, "free": free}.items():
        source = surrogate()
        asked = list[Candidate]()
        for _ in range(6):
            suggested = source.suggest(known, asked)
            assert suggested is not None
            asked.append(suggested)
        found[name] = np.mean([each.target_ratio >= 0.48 for each in asked])
    assert found["free"] <= 0.5
    assert found["fails"] >= 0.8
    assert found["limited"] >= 0.8


def test_what_was_stopped_by_bad_luck_is_suggested_again_until_it_has_ended() -> None:
    """Where no neighbours can be tried in its place."""
    drawing = surrogate(seed=3)
    some = list(dict.fromkeys(drawing.sample_uniform() for _ in range(40)))
    lucky = replace(some[0], token_share=0.2, target_ratio=0.3, method="cascade")
    found = made_up(lucky)
    table, known = [*some, lucky], [tried(each, made_up(each), rungs=(made_up(each),)) for each in some[:20]]

    def nearest(values: Mapping[str, Any]) -> Candidate:
        share, ratio = values["token_share"], values["target_ratio"]
        return min(table, key=lambda each: abs(each.token_share - share) + abs(each.target_ratio - ratio))

    def suggested(*others: Observation, running: Sequence[Candidate] = ()) -> Candidate | None:
        return Surrogate(SPACE, nearest, reference=(0.5, 1.0), seed=0).suggest([*known, *others], running)

    stopped = tried(lucky, rungs=(found,))
    assert suggested(stopped) == lucky
    assert suggested(stopped, running=[lucky]) != lucky
    assert suggested(stopped, tried(lucky, found)) != lucky
    assert suggested(stopped, tried(lucky)) != lucky  # it failed then


def test_what_was_seen_at_rungs_tells_of_the_end_but_is_not_taken_for_it() -> None:
    """Early accuracy is far too high everywhere, but highest where the end is as well."""
    drawing = surrogate(seed=3)
    some = list(dict.fromkeys(drawing.sample_uniform() for _ in range(40)))

    def known(with_rungs: bool) -> list[Observation]:
        found = []
        for number, each in enumerate(some):
            top1, speedup = made_up(each)
            rungs = ((top1 + 0.09, speedup), (top1 + 0.05, speedup))
            if number < 6:
                found.append(tried(each, (top1, speedup), rungs=rungs if with_rungs else ()))
            elif with_rungs:
                found.append(tried(each, rungs=rungs[: 1 + number % 2]))
        return found

    far, gained = {}, {}
    for with_rungs in (False, True):
        source, asked, shown = surrogate(), list[Candidate](), known(with_rungs)
        for _ in range(8):
            suggested = source.suggest(shown, asked)
            assert suggested is not None
            asked.append(suggested)
        far[with_rungs] = np.mean([abs(each.token_share - 0.2) for each in asked])
        gained[with_rungs] = hypervolume(np.array([made_up(each) for each in asked]), REFERENCE)
    assert far[True] < 0.7 * far[False]
    assert gained[True] > gained[False]


def test_nothing_is_suggested_where_all_was_tried() -> None:
    whole = SPACE.first_candidates()[0]
    source = Surrogate(SPACE, lambda _: whole, None, seed=0)
    assert source.suggest([tried(whole, (0.9, 1.0))], []) is None
