"""The shipped benchmark recipe on a real ViT-Tiny and real ImageNet images, in a short form."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.commands.run import run_sweep
from search.outcome import State
from search.recipe import load_config
from search.records import ledger
from search.records.folder import Folder
from tests.integration.sweeps import Watcher

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "imagenet-mini"

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: it is no part of the project"),
    *(pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("one_node")),
]

SHORT = [
    "data.calibration_images=16",
    "data.probe_images=20",
    "data.val_images=130",
    "space.target_ratio=[0.5, 1.0]",
    "cascade.num_levels=3",
    "cascade.batch_size=16",
    "measure.batch_size=8",
    "measure.num_rounds=6",
]


PAPERS = ["space=papers", "space.drop_budget=[6.0, 10.0]"]  # one of the 20 probe images, at least
SPACES = {"papers": (3, PAPERS), "default": (7, list[str]())}
"""Name of a space -> number of trials that go beyond its early candidates, and the changes to the recipe."""


@pytest.fixture(scope="module", params=SPACES)
def runs(one_node: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    num_trials, sets = SPACES[request.param]
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the recipe's paths count from there
        config = load_config("benchmarks/imagenet_mini.yaml", name="short", trials=num_trials, sets=SHORT + sets)
    watcher = Watcher()
    run_sweep(config, folder, watcher)
    line, *notes = watcher.notes
    assert line.startswith("dense top-1 on val 0.8")
    assert not any("answers" in note for note in notes)  # no class is told to be moved
    return folder


def test_every_outcome_is_measured(runs: Path) -> None:
    outcomes = ledger.read(Folder(runs, "short").ledger)
    assert len(outcomes) in [num_trials for num_trials, _ in SPACES.values()]
    assert {outcome.state for outcome in outcomes} == {State.MEASURED}
    for outcome in outcomes:
        pairs = zip(outcome.block_drops, outcome.candidate.drop_budget, strict=outcome.candidate.method == "cascade")
        assert all(drop <= budget for drop, budget in pairs)


def test_front_holds_a_faster_model(runs: Path) -> None:
    front = Folder(runs, "short").read_front()
    dense, fastest = front.goal.dense, front.points[-1].measurement
    assert fastest is not None
    assert 0.75 <= dense.top1 <= 0.9  # 82.6 % on all of val; these are 130 of its images
    assert dense.macs == pytest.approx(1.254e9, rel=1e-3)
    assert front.busy_share is not None
    assert front.busy_share > 0.3
    assert fastest.macs < 0.8 * dense.macs
    assert fastest.speedup > 1.1
    assert fastest.top1 > 0.6
