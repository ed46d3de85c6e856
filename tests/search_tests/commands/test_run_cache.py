"""Profiles on the disk: found again by their model, images and settings alone, and told when they are broken."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.methods.profile import Profile
from search.config import Fingerprints
from search.errors import SweepError
from search.records.profiles import ProfileCache
from search.trial.context import TrialContext
from tests.search_tests import tiny

FINGERPRINTS = Fingerprints(weights="weights", preprocessing="as timm", train="images", val="more images")


@pytest.fixture(scope="module")
def context() -> TrialContext:
    config = tiny.config(space={"token_reduction": "lfe"})
    return tiny.prepared(config, tiny.inputs(config), profiles={}, timer=tiny.timer)[0]


def cache(folder: Path, context: TrialContext, **changes: Any) -> ProfileCache:
    arguments: dict[str, Any] = {
        "config": context.config,
        "fingerprints": FINGERPRINTS,
        "splits": context.splits,
    }
    return ProfileCache(folder, **arguments | changes)


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
    profiles = cache(tmp_path / "new", context).read(["lfe", "merge"])
    assert list(profiles) == ["lfe"]
    assert isinstance(profiles["lfe"], Profile)
    assert same(profiles["lfe"], context.profiles["lfe"])


def test_another_model_other_images_or_settings_have_other_profiles(context: TrialContext, tmp_path: Path) -> None:
    cache(tmp_path, context).write(context.profiles)
    for changes in (
        {"fingerprints": FINGERPRINTS.model_copy(update={"weights": "other"})},
        {"fingerprints": FINGERPRINTS.model_copy(update={"train": "other"})},
        {"fingerprints": FINGERPRINTS.model_copy(update={"preprocessing": "other"})},
        {"splits": context.splits.thinned(2)},
        {"splits": replace(context.splits, num_calibration=8)},
        {"config": tiny.config(data__noise=0.1)},
        {"config": tiny.config(cascade__batch_size=3)},
    ):
        assert cache(tmp_path, context, **changes).read(["lfe"]) == {}
    other_space = tiny.config(space__target_ratio=0.3)
    assert cache(tmp_path, context, config=other_space).read(["lfe"]).keys() == {"lfe"}


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
