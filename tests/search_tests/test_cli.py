"""The command line: its results, and its errors of one line with exit code 2 and nothing new in the folder."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pruning.artifact import load
from pruning.measure.cost import count_params
from pruning.plan import BlockShape
from search.front import Front
from search.goal import Goal
from search.outcome import Outcome
from search.records import ledger
from search.records.folder import Folder
from search.space import Space
from search.trial.inputs import load_inputs
from tests.search_tests import builders, tiny
from tests.search_tests.builders import papers_space
from tests.search_tests.command_line import call, check_refused, files
from tests.search_tests.disk import largest_file
from tests.search_tests.test_space import Chooser

OUTCOMES = [
    tiny.kept_whole(builders.outcome(*measured))
    for measured in (("t000", 0.9, 1.0), ("t001", 0.88, 2.0), ("t002", 0.5, 2.5))
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all classes in train and val, to be copied."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        tiny.write_images(folder / split)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path) -> Path:
    """The folder in which commands run, with images of all classes in images/train and images/val."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "images")
    return tmp_path


def corrupt(folder: Path) -> None:
    next((folder / "images" / "val").rglob("*.png")).write_bytes(b"\x89PNG not really")


def without_images(folder: Path) -> None:
    for image in (folder / "images" / "val").rglob("*.png"):
        image.unlink()


def without_val(folder: Path) -> None:
    (folder / "images" / "val").rename(folder / "elsewhere")


def with_a_map_of_other_classes(folder: Path) -> None:
    (folder / "classes.txt").write_text("cat\ndog\na\nb\n")


def with_other_weights(folder: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in tiny.model().state_dict().items()}
    weights["head.weight"] = torch.zeros(9, 32)
    save_file(weights, folder / "other.safetensors")


def with_images_outside_classes(folder: Path) -> None:
    image = next((folder / "images" / "train" / "a").glob("*.png"))
    image.rename(folder / "images" / "train" / image.name)


def with_a_map_that_is_no_text(folder: Path) -> None:
    (folder / "classes.txt").write_bytes(b"\xff\xfe\x00")


def with_a_map_of_another_kind(folder: Path) -> None:
    (folder / "classes.csv").write_text("a,0\nb,1\nc,2\nd,3\n")


def with_a_pickled_map(folder: Path) -> None:
    (folder / "classes.pkl").write_bytes(pickle.dumps({"a": 0, "b": 1, "c": 2, "d": 3}))


def with_folders_in_doubt(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / "images" / split / "a").rename(folder / "images" / split / "Z")


def with_a_file_for_runs(folder: Path) -> None:
    (folder / "runs").write_text("in the way")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "changes", "says"),
    [
        pytest.param(nothing, ["model.name=vit_tiny_patch16_225"], ["vit_tiny_patch16_224"], id="unknown model"),
        pytest.param(
            nothing, ["model={name: resnet18, untrained: true}"], ["timm.models.resnet", "supported", "deit_"],
            id="not a ViT",
        ),
        pytest.param(
            nothing, ["model.checkpoint=gone.safetensors", "model.untrained=false"], ["gone.safetensors"],
            id="no checkpoint",
        ),
        pytest.param(
            with_other_weights, ["model.checkpoint=other.safetensors", "model.untrained=false"],
            ["head.weight is [9, 32], not [4, 32]", "other.safetensors"], id="weights that do not fit",
        ),
        pytest.param(without_images, [], ["images/val"], id="empty image folder"),
        pytest.param(without_val, [], ["images/val"], id="no image folder"),
        pytest.param(corrupt, [], ["images/val", ".png"], id="corrupt image"),
        pytest.param(
            with_a_map_of_other_classes, ["data.class_map=classes.txt"], ["images/train", "class map"],
            id="folders of no class",
        ),
        pytest.param(nothing, ["data.class_map=gone.txt"], ["gone.txt"], id="no class map"),
        pytest.param(
            with_a_map_that_is_no_text, ["data.class_map=classes.txt"], ["cannot read class map", "classes.txt"],
            id="class map that is no text",
        ),
        pytest.param(
            with_a_map_of_another_kind, ["data.class_map=classes.csv"],
            ["class map", "classes.csv", "line 1 holds an index and a comma ('a,0')"], id="class map of another kind",
        ),
        pytest.param(
            with_a_pickled_map, ["data.class_map=classes.pkl"], ["classes.pkl: it is not a text file"],
            id="class map that is a pickle",
        ),
        pytest.param(with_folders_in_doubt, [], ["b, c, d", "Z, b, c", "data.class_order=timm"], id="class order"),
        pytest.param(nothing, ["data.test=exam"], ["images/exam", "data.root holds train, val"], id="no such split"),
        pytest.param(nothing, ["data.test=val"], ["data.val=val and data.test=val"], id="val and test are one"),
        pytest.param(nothing, ["data.download=true"], ["does not use data.download"], id="key without a use"),
        pytest.param(with_images_outside_classes, [], ["outside", "images/train"], id="images outside class folders"),
        pytest.param(nothing, ["data.dataset=folders"], ["'folders'", "folder, digits"], id="unknown data set"),
        pytest.param(nothing, ["data.interpolation=cubic"], ["data.interpolation", "bicubic"], id="interpolation"),
        pytest.param(nothing, ["model.args.depth=0"], ["depth is 0"], id="model without blocks"),
        pytest.param(nothing, ["model.args.num_classes=2"], ["2 classes"], id="more classes than the model has"),
        pytest.param(nothing, ["space.exit_block=[1, 9]"], ["space.exit_block: 9", "3 blocks"], id="exit too deep"),
        pytest.param(nothing, ["space.target_ratio=[0.9, 0.2]"], ["space.target_ratio", "upside down"], id="bounds"),
        pytest.param(nothing, ["space.sparsity=0.5"], ["space.sparsity: unknown key"], id="unknown key"),
        pytest.param(nothing, ["search.trials"], ["'search.trials'"], id="--set without a value"),
        pytest.param(with_a_file_for_runs, [], ["runs"], id="a file where runs/ should be"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path, spoil: Callable[[Path], None], changes: list[str], says: list[str]
) -> None:
    tiny.write_recipe(folder / "tiny.yaml")
    spoil(folder)
    sets = [argument for change in changes for argument in ("--set", change)]
    check_refused(capsys, folder, "run", "tiny.yaml", *sets, says=says)


def test_no_space_for_the_run_folder_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    tiny.write_recipe(folder / "tiny.yaml")
    (folder / "runs").mkdir()
    with largest_file(100):
        check_refused(capsys, folder, "run", "tiny.yaml", says=["cannot write runs/tiny/config.yaml: File too large"])


def test_unknown_recipe_is_answered_with_the_shipped_ones(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    check_refused(capsys, folder, "run", "nothing", says=["'nothing'", "digits", "imagefolder"])


def test_wrong_time_is_told_what_a_time_is(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    check_refused(capsys, folder, "run", "--time-budget", "soon", says=["'soon'", "10m"])


def test_unknown_option_is_an_error_of_the_same_code(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, _, err = call(capsys, "run", "--budget", "3")
    assert code == 2
    assert "--budget" in err


@pytest.fixture
def sweep(folder: Path) -> Path:
    """A finished sweep, as its files."""
    place = Folder(folder / "runs", "mine")
    with ledger.Ledger(place.ledger) as book:
        for outcome in OUTCOMES:
            book.append(outcome)
    place.config.write_text(yaml.safe_dump(tiny.record(name="mine") | {"search": {"trials": 3}}))
    place.front.write_text(json.dumps(record(OUTCOMES)))
    for outcome in OUTCOMES:
        tiny.save_model(place.models / outcome.id, seed=int(outcome.id[1:]))
    return folder


def record(outcomes: list[Outcome]) -> dict[str, object]:
    return Front.of("mine", outcomes, builders.GOAL, trials=len(outcomes)).to_json()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["front", "yours"], ["'yours'", "mine"]),
        (["front", "mine", "--pick", "t009"], ["'t009'", "t001"]),
        (["front", "mine", "--at-least", "top1=high"], ["'top1=high'"]),
        (["front", "mine", "--at-least", "accuracy=0.5"], ["'accuracy'", "top1"]),
        (["front", "mine", "--at-least", "top1=0.95", "--pick", "knee"], ["0.95", "0.9"]),
        (["export", "mine", "--to", "images"], ["images exists"]),
        (["export", "mine", "--to", "new", "--format", "tflite"], ["'tflite'", "safetensors"]),
        (["export", "mine", "--to", "new", "--pick", "best"], ["'best'", "knee"]),
        (["prune", "digits", "--target-ratio", "1.5"], ["target ratio 1.5"]),
        (["prune", "digits", "--to", "images"], ["images exists"]),
        (["run", "tiny.yaml", "--name", "mine", "--set", "search.seed=9"], ["search.seed", "other settings"]),
    ],
)
def test_wrong_question_about_a_sweep_is_one_line(
    capsys: pytest.CaptureFixture[str], sweep: Path, arguments: list[str], says: list[str]
) -> None:
    tiny.write_recipe(sweep / "tiny.yaml")
    check_refused(capsys, sweep, *arguments, says=says)


def test_finished_sweep_is_shown_without_running_anything(capsys: pytest.CaptureFixture[str], sweep: Path) -> None:
    tiny.write_recipe(sweep / "tiny.yaml")
    place = Folder(sweep / "runs", "mine")
    fingerprints = load_inputs(tiny.config(), sweep / "runs").fingerprints
    place.config.write_text(place.read_config().model_copy(update={"fingerprints": fingerprints}).to_yaml())
    before = files(sweep)
    code, out, err = call(capsys, "run", "tiny.yaml", "--name", "mine", "--trials", "3", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(record(OUTCOMES)))
    assert files(sweep) == before


@pytest.mark.parametrize("how", ["option", "environment"])
def test_tilde_in_a_path_is_the_home_folder(
    capsys: pytest.CaptureFixture[str], sweep: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("HOME", str(sweep))
    monkeypatch.chdir("/")
    if how == "environment":
        monkeypatch.setenv("VITFRONT_RUNS", "~/runs")
    code, out, _ = call(capsys, "front", "mine", "--json", *(["--runs=~/runs"] if how == "option" else []))
    assert (code, json.loads(out)["name"]) == (0, "mine")


def test_empty_path_is_refused(capsys: pytest.CaptureFixture[str], sweep: Path) -> None:
    code, out, err = call(capsys, "front", "mine", "--runs", "")
    assert (code, out) == (2, "")
    assert "it is empty; give a" in err


@pytest.mark.parametrize("name", ["set #2", "a: b", "[x]", "100%", "yes"])
def test_folder_of_images_of_any_name_is_the_one_that_is_read(
    capsys: pytest.CaptureFixture[str], folder: Path, name: str
) -> None:
    tiny.write_recipe(folder / "tiny.yaml")
    (folder / name / "train").mkdir(parents=True)
    check_refused(capsys, folder, "run", "tiny.yaml", "--set", f"data.root={name}", says=[f"{name}/train"])


def test_front_is_a_table_of_the_dense_model_and_every_point(capsys: pytest.CaptureFixture[str], sweep: Path) -> None:
    code, out, _ = call(capsys, "front", "mine")
    rows = [line for line in out.splitlines() if line.startswith("│")]
    assert code == 0
    assert [row.split()[1] for row in rows] == ["dense", "t001", "t002"]  # t000 cannot be told from the dense model
    assert "0.8800" in rows[1]
    assert "2.00" in rows[1]
    assert out.endswith("outcomes and plans are in runs/mine\n")


@pytest.fixture
def table(sweep: Path) -> Path:
    """A finished sweep of many candidates within the recipe's space."""
    space = Space(papers_space(), tiny.DEPTH)
    ledger_file = Folder(sweep / "runs", "mine").ledger
    ledger_file.unlink()
    with ledger.Ledger(ledger_file) as book:
        for number in range(40):
            outcome = builders.outcome(f"t{number:03d}", 0.9 - number / 100, 1 + number / 20)
            book.append(replace(outcome, candidate=space.choose(Chooser(seed=number))))
    return sweep


def test_a_finished_sweep_is_replayed_and_compared(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    tiny.write_recipe(table / "tiny.yaml")
    for name in ("again-0", "again-1"):
        code, out, _ = call(
            capsys, "run", "tiny.yaml", "--replay", "runs/mine", "--name", name, "--trials", "12",
            "--set", f"search.seed={name[-1]}", "--set", "search.sampler=tpe",
        )  # fmt: skip
        assert code == 0
        assert f"Front of {name}: " in out
        assert "models from 12 trials" in out
    code, out, _ = call(capsys, "compare", "again-0", "again-1", "--to", "figure.html")
    assert code == 0
    row = next(line for line in out.splitlines() if "again" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][:2] == ["again", "2"]
    assert "±" in row and "(12)" in row
    assert "plotly" in (table / "figure.html").read_text(encoding="utf-8")
    code, out, _ = call(capsys, "compare", "again-0", "--json")
    [curve] = json.loads(out)["by_trial"]
    assert (code, curve["num_seeds"], len(curve["mean"])) == (0, 1, 12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "tiny.yaml", "--replay", "runs/yours", "--name", "x"], ["'yours'", "mine"]),
        (["run", "tiny.yaml", "--replay", "runs/mine", "--name", "x"], ["recorded", "search space"]),
        (["compare", "yours", "mine"], ["'yours'", "mine"]),
        (["compare", "mine"], ["'mine'", "before the times"]),
    ],
)
def test_wrong_replay_is_one_line(
    capsys: pytest.CaptureFixture[str], sweep: Path, arguments: list[str], says: list[str]
) -> None:
    tiny.write_recipe(sweep / "tiny.yaml")
    check_refused(capsys, sweep, *arguments, says=says)


def test_replay_into_a_folder_that_exists_is_one_line(capsys: pytest.CaptureFixture[str], table: Path) -> None:
    tiny.write_recipe(table / "tiny.yaml")
    arguments = ["run", "tiny.yaml", "--replay", "runs/mine", "--name", "mine"]
    check_refused(capsys, table, *arguments, says=["mine exists", "--name"])


@pytest.mark.parametrize(("accuracy", "called"), [("recall_at_1", "recall@1"), ("mean_average_precision", "mAP")])
def test_front_of_a_retrieval_sweep_is_shown_bounded_and_picked_by_its_metric(
    capsys: pytest.CaptureFixture[str], sweep: Path, accuracy: str, called: str
) -> None:
    def retrieved(id: str, top1: float, value: float, speedup: float) -> Outcome:
        return builders.outcome(id, top1, speedup, **{accuracy: value})

    outcomes = [
        retrieved("t000", 0.5, 0.9375, 1.0),
        retrieved("t001", 0.6, 0.92, 2.0),
        retrieved("t002", 0.9, 0.3, 9.9),
    ]
    goal = Goal(dense=builders.measurement(0.9, 1.0, **{accuracy: 0.95}), accuracy=accuracy)
    Folder(sweep / "runs", "mine").write_front(Front.of("mine", outcomes, goal, trials=3))
    code, out, _ = call(capsys, "front", "mine", "--at-least", f"{accuracy}=0.9")
    head = next(line for line in out.splitlines() if line.startswith("┃"))
    rows = [line.replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    assert code == 0
    assert head.replace("┃", " ").split()[:3] == [called, "val", "test"]
    assert [row[0] for row in rows] == ["dense", "t000", "t001"]
    assert rows[1][1:3] == ["0.9375", "0.5000"]
    assert max(map(len, out.splitlines())) <= 120 and "…" not in out
    code, out, _ = call(capsys, "front", "mine", "--pick", "most-accurate", "--json")
    assert [point["id"] for point in json.loads(out)["points"]] == ["t000"]


def test_bounds_and_pick_leave_one_point(capsys: pytest.CaptureFixture[str], sweep: Path) -> None:
    code, out, _ = call(capsys, "front", "mine", "--at-least", "top1=0.8", "--pick", "fastest", "--json")
    assert code == 0
    shown, full = json.loads(out), json.loads(json.dumps(record(OUTCOMES)))
    assert [point["id"] for point in shown["points"]] == ["t001"]
    assert shown | {"points": full["points"]} == full


def test_export_copies_the_picked_model(capsys: pytest.CaptureFixture[str], sweep: Path) -> None:
    code, out, _ = call(capsys, "export", "mine", "--pick", "fastest", "--to", "new/model")
    assert code == 0
    assert "t002" in out
    assert files(sweep / "new" / "model") == files(sweep / "runs" / "mine" / "models" / "t002")


def shapes_of(outcome: Outcome) -> list[BlockShape]:
    assert outcome.plan is not None
    return [block.shape for block in outcome.plan.blocks]


def widths_and_dense_widths(outcome: Outcome) -> list[tuple[int, int]]:
    """Pairs every width of the pruned model with the width before pruning."""
    dense_widths = (16, 16, 128)
    return [
        pair
        for shape in shapes_of(outcome)
        for pair in zip((shape.qk_width, shape.v_width, shape.num_hidden), dense_widths, strict=True)
    ]


def check_saved(folder: Path, outcome: Outcome) -> torch.nn.Module:
    """Expects a saved model to be the outcome's, and loads it."""
    model, description = load(folder)
    assert outcome.measurement is not None
    assert description.plan == outcome.plan
    assert count_params(model) == outcome.measurement.params
    return model


def test_one_model_is_pruned_globally_with_the_best_reduction_and_widths_measured_here_and_saved(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    tiny.write_recipe(folder / "tiny.yaml", space__round_to=5, space__token_reduction="lfe")
    code, out, err = call(capsys, "prune", "tiny.yaml", "--to", "out/model", "--json")
    assert code == 0
    line, *notes = err.splitlines()
    assert line.startswith("dense top-1 on val 0.")
    assert notes and all(note.startswith("note: ") for note in notes)
    outcome = Outcome.from_json(json.loads(out))
    candidate = outcome.candidate
    assert (candidate.method, candidate.token_reduction, candidate.round_to) == ("global", "attention-merge", "auto")
    assert outcome.plan is not None
    assert (outcome.plan.token_reduction, outcome.plan.exit_block) == ("attention-merge", 3)
    assert all(width % 8 == 0 for width, _ in widths_and_dense_widths(outcome))
    check_saved(folder / "out" / "model", outcome)
    assert not (folder / "runs").exists()


def test_model_that_is_worse_than_expected_is_one_line_more_and_nothing_is_saved(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    tiny.write_recipe(folder / "tiny.yaml", model__expected_top1=1.0)
    code, out, err = call(capsys, "prune", "tiny.yaml", "--to", "out")
    assert (code, out) == (2, "")
    line, *_, error = err.splitlines()
    assert line.startswith("dense top-1 on val 0.")
    assert error.startswith("vitfront: dense top-1 on val is 0.") and "below model.expected_top1, 1; " in error
    assert not (folder / "out").exists()


def test_cascade_prunes_to_the_depth_and_widths_that_are_asked_and_tells_what_each_block_cost(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    tiny.write_recipe(folder / "tiny.yaml")
    given = ["--method", "cascade", "--criterion", "lfs", "--budget", "100", "--target-ratio", "0.5"]
    given += ["--exit-block", "2", "--round-to", "12", "--token-reduction", "none"]
    code, out, _ = call(capsys, "prune", "tiny.yaml", *given, "--json")
    assert code == 0
    outcome = Outcome.from_json(json.loads(out))
    candidate = outcome.candidate
    assert (candidate.method, candidate.criterion, candidate.drop_budget) == ("cascade", "lfs", (100.0,) * 3)
    assert (candidate.round_to, candidate.token_reduction, candidate.exit_block) == (12, "none", 2)
    assert len(outcome.block_drops) == 2
    assert [shape.num_tokens for shape in shapes_of(outcome)] == [16, 16]
    assert all(width % 12 == 0 or width == dense for width, dense in widths_and_dense_widths(outcome))
    assert any(width < dense for width, dense in widths_and_dense_widths(outcome))


def write_swin(folder: Path) -> None:
    args = tiny.SWIN_ARGS | {"img_size": 8, "patch_size": 1, "in_chans": 1, "num_classes": 10}
    data = {"dataset": "digits", "calibration_images": 60, "probe_images": 40, "val_images": 30}
    tiny.write_recipe(
        folder / "swin.yaml",
        model={"name": tiny.SWIN, "args": args, "untrained": True},
        data=data | {"mean": [0.3], "std": [0.38]},
    )


def test_pruned_model_is_told_block_by_block(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    write_swin(folder)
    code, out, _ = call(capsys, "prune", "swin.yaml", "--round-to", "8")
    assert code == 0
    lines = out.splitlines()
    rows = [line.replace("│", " ").split() for line in lines if line.startswith("│")]
    assert [(row[0], row[1], row[5]) for row in rows] == [
        ("0", "2/2", "64/64"),
        ("1", "2/2", "64/64"),
        ("2", "4/4", "16/16"),
        ("3", "4/4", "16/16"),
    ]
    assert [row[4].partition("/")[2] for row in rows] == ["64", "64", "128", "128"]
    assert all(int(row[4].partition("/")[0]) % 8 == 0 for row in rows)
    assert all(len(row) == 8 and row[7].endswith("%") for row in rows)
    before_after, ratio, *notes = lines[max(n for n, line in enumerate(lines) if line.startswith("└")) + 1 :]
    assert before_after.startswith("top-1 ") and before_after.count(" -> ") == 3
    assert "x as fast" in ratio and ratio.endswith("of the MACs")
    assert all(note.startswith("note: block ") for note in notes)


def test_swin_pruned_up_to_a_stage_is_saved_and_loaded_again(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    write_swin(folder)
    code, out, err = call(
        capsys, "prune", "swin.yaml", "--exit-block", "2", "--target-ratio", "0.3", "--to", "out", "--json"
    )
    assert code == 0, err
    outcome = Outcome.from_json(json.loads(out))
    assert (outcome.candidate.token_reduction, outcome.candidate.round_to) == ("none", "auto")
    model = check_saved(folder / "out", outcome)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--token-reduction", "lfe"], ["lfe cannot be done to this model", "none or auto"]),
        (["--exit-block", "1"], ["1 has no exit", "after blocks 2, 4"]),
        (["--exit-block", "5"], ["5 is no exit", "4 blocks"]),
        (["--token-share", "1"], ["token share 1 ", "none"]),
        (["--set", "model.args.window_size=3"], ["pads its grid", "window_size"]),
    ],
)
def test_what_a_swin_cannot_do_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], folder: Path, given: list[str], says: list[str]
) -> None:
    write_swin(folder)
    check_refused(capsys, folder, "prune", "swin.yaml", *given, says=says)


def test_sweep_of_a_swin_that_is_asked_to_reduce_tokens_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    write_swin(folder)
    check_refused(capsys, folder, "run", "swin.yaml", says=["space.token_reduction: lfe", "none or auto"])


def test_tokens_alone_are_not_pruned_where_none_may_go(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    tiny.write_recipe(folder / "tiny.yaml")
    given = ["--token-share", "1", "--token-reduction", "none"]
    check_refused(capsys, folder, "prune", "tiny.yaml", *given, says=["token share 1 ", "none", "less"])


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--method", "best", "space.method: "),
        ("--criterion", "best", "space.criterion: "),
        ("--token-reduction", "best", "space.token_reduction: "),
        ("--round-to", "0", "space.round_to: "),
        ("--round-to", "-8", "space.round_to: "),
        ("--round-to", "best", "space.round_to: "),
        ("--round-to", "7.5", "space.round_to: "),
    ],
)
def test_choice_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, option: str, value: str, key: str
) -> None:
    tiny.write_recipe(folder / "tiny.yaml")
    check_refused(capsys, folder, "prune", "tiny.yaml", option, value, says=[key])
