"""Where a search begins, and the profiles that it is told by: in memory and on the disk."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.methods.allocation import allocate
from pruning.methods.profile import Profile, block_costs
from pruning.model.anatomy import examine
from search.config import Config, SpaceConfig
from search.errors import SweepError
from search.outcome import Candidate
from search.records.profiles import ProfileCache
from search.space import Space
from search.trial.context import TrialContext, prepare, profiled
from search.trial.warm_start import NUM_TARGETS, first_candidates, propose
from tests.search_tests import tiny

EXITS = [2, 3]


def config(**space: Any) -> Config:
    return tiny.config(space={"exit_block": [2, 3], "token_reduction": "lfe"} | space)


def space_of(config: Config, **other: Any) -> Space:
    return Space(config.space, tiny.DEPTH, **other)


@pytest.fixture(scope="module")
def context() -> TrialContext:
    return prepare(config(), tiny.model(), tiny.splits(), EXITS, trained=True, profiles={})[0]


def test_a_search_has_the_profiles_that_it_begins_with(context: TrialContext) -> None:
    assert set(context.profiles) == {"lfe"}
    alone, _ = prepare(config(), tiny.model(), tiny.splits(), EXITS, trained=True)
    assert alone.profiles == {}  # no trial of the cascade needs one
    assert profiled(space_of(config(token_reduction=["lfe", "merge"]))) == ("lfe",)
    assert profiled(space_of(config(method=["cascade", "global"], token_reduction=["lfe", "merge"]))) == (
        "lfe",
        "merge",
    )
    assert profiled(space_of(config(method="learned"))) == ()


def test_known_profiles_are_not_measured_again(context: TrialContext) -> None:
    known = replace(context.profiles["lfe"], forward_passes=-1.0)
    again, _ = prepare(config(), tiny.model(), tiny.splits(), EXITS, trained=True, profiles={"lfe": known})
    assert again.profiles == {"lfe": known}


def test_proposals_lie_along_the_front_and_within_the_space(context: TrialContext) -> None:
    space = space_of(config(method=["cascade", "global"]))
    found = propose(context, space)
    assert all(space.holds(candidate) for candidate in found)
    assert len(set(found)) == len(found)
    for method in ("cascade", "global"):
        own = [candidate for candidate in found if candidate.method == method]
        assert own[0].target_ratio < own[1].target_ratio < own[3].target_ratio  # from the middle on
        own.sort(key=lambda candidate: -candidate.target_ratio)
        ratios = [candidate.target_ratio for candidate in own]
        assert len(own) == NUM_TARGETS
        assert ratios[-1] == pytest.approx(0.2)
        assert ratios[0] / ratios[1] == pytest.approx(ratios[-2] / ratios[-1])
        assert [candidate.exit_block for candidate in own] == [3, 3, 2, 2]


def test_budgets_are_dealt_as_the_profile_pays(context: TrialContext) -> None:
    space = space_of(config(exit_block=3, drop_budget=[0.0, 100.0]))
    profile, anatomy = context.profiles["lfe"], examine(context.model)
    for candidate in propose(context, space):
        plan = allocate(profile, anatomy, int(candidate.target_ratio * context.dense_macs))
        costs = block_costs(profile, anatomy, plan)
        total = sum(map(sum, costs))
        assert total > 0
        assert candidate.drop_budget == pytest.approx([9.5 * sum(cost) / total for cost in costs])
        assert candidate.token_share == pytest.approx(sum(tokens for _, tokens in costs) / total)


def test_no_profile_and_targets_that_nothing_reaches_propose_nothing(context: TrialContext) -> None:
    assert propose(replace(context, profiles={}), space_of(config())) == []
    assert propose(context, space_of(config(target_ratio=0.001))) == []


def test_first_candidates_are_the_dense_model_then_what_is_proposed(context: TrialContext) -> None:
    space = space_of(config())
    proposed = propose(context, space)
    dense, *others = first_candidates(space, proposed)
    assert (dense.target_ratio, dense.exit_block) == (1.0, 3)
    assert others[: len(proposed)] == proposed
    assert len(others) == len(proposed) + 1  # and the paper's


# On the disk


def cache(folder: Path, context: TrialContext, **changes: Any) -> ProfileCache:
    given: dict[str, Any] = {"config": context.config, "weights": context.model.state_dict(), "splits": context.splits}
    return ProfileCache(folder, **given | changes)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return bool(one == other)


def test_a_profile_comes_back_as_it_was(context: TrialContext, tmp_path: Path) -> None:
    assert cache(tmp_path / "new", context).read(["lfe"]) == {}
    cache(tmp_path / "new", context).write(context.profiles)
    found = cache(tmp_path / "new", context).read(["lfe", "merge"])
    assert list(found) == ["lfe"]
    assert isinstance(found["lfe"], Profile)
    assert same(found["lfe"], context.profiles["lfe"])


def test_another_model_other_images_or_settings_have_other_profiles(context: TrialContext, tmp_path: Path) -> None:
    cache(tmp_path, context).write(context.profiles)
    images = replace(context.splits.training, pixels=context.splits.training.pixels.flip(0))
    for changes in (
        {"weights": tiny.model(seed=1).state_dict()},
        {"splits": replace(context.splits, training=images)},
        {"config": tiny.config(cascade__batch_size=3)},
    ):
        assert cache(tmp_path, context, **changes).read(["lfe"]) == {}
    assert cache(tmp_path, context, config=config(target_ratio=0.3)).read(["lfe"])  # the space does not matter


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_broken_file_is_named(context: TrialContext, tmp_path: Path, content: bytes) -> None:
    cache(tmp_path, context).write(context.profiles)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(SweepError, match=rf"^{path} holds no profile; remove it, and it is made again$"):
        cache(tmp_path, context).read(["lfe"])


def test_a_file_that_holds_another_class_is_not_unpickled(context: TrialContext, tmp_path: Path) -> None:
    cache(tmp_path, context).write(context.profiles)
    (path,) = tmp_path.iterdir()
    torch.save({"made": context.config}, path)
    with pytest.raises(SweepError, match="holds no profile"):
        cache(tmp_path, context).read(["lfe"])


# Recorded


RECORDED = json.loads((Path(__file__).parents[2] / "data" / "first_candidates.json").read_text())
"""The first candidates of a search, recorded at commit d706483: a list of candidates, then for each
combination, with and without proposals, the places in that list."""
RECORDED_DEPTH = 6


def recorded_space(methods: list[str]) -> Space:
    config = SpaceConfig(
        method=tuple(methods), token_reduction=("merge", "lfe"), exit_block=(2, RECORDED_DEPTH),
        recovery=("none", "distill"),
    )  # fmt: skip
    return Space(config, RECORDED_DEPTH)


def some_proposals(space: Space) -> list[Candidate]:
    """Three of the cascade and three of global, in turn, as far as the space has these methods."""
    proposals = []
    for step in range(3):
        common: dict[str, Any] = {
            "target_ratio": 0.3 + 0.2 * step, "exit_block": 3 + step, "token_reduction": "merge",
            "cutoff_channel": 0.1, "cutoff_token": 0.85,
        }  # fmt: skip
        budgets, zeros = (1.5,) * RECORDED_DEPTH, (0.0,) * RECORDED_DEPTH
        proposals += [
            Candidate(method="cascade", drop_budget=budgets, token_share=0.25 * step, **common),
            Candidate(method="global", drop_budget=zeros, token_share=0.5, **common),
        ]
    return [space.clip(candidate) for candidate in proposals if candidate.method in space.method]


def test_first_candidates_of_every_combination_of_methods_are_those_recorded() -> None:
    for name, places in RECORDED["first"].items():
        methods = name.removesuffix(" proposed").split()
        space = recorded_space(methods)
        proposed = some_proposals(space) if name.endswith(" proposed") else []
        expected = [Candidate.from_json(RECORDED["candidates"][place]) for place in places]
        assert first_candidates(space, proposed) == expected, name
