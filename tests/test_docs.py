"""README and docs say what is there: commands, options, recipe keys, links and paths exist; README's commands run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.core import TyperGroup

from pruning.artifact import Description, save
from pruning.data import InputSpec
from pruning.model.anatomy import examine
from pruning.model.surgery import keep_all_plan
from search.cli import app
from search.commands.study import load_study
from search.config import Config, flat
from search.recipe import load_config
from tests.search_tests import tiny

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

SMALL = [
    "model.args={img_size: 8, patch_size: 2, in_chans: 1, num_classes: 10, embed_dim: 32, depth: 3, num_heads: 2}",
    "model.training={epochs: 10, batch_size: 32, max_shift: 0, max_turn: 0}",
    "data.calibration_images=200",
    "data.probe_images=200",
    "exits.epochs=5",
    "space.exit_block=[1, 3]",
    "search.trials=9",
    "cascade.num_levels=3",
    "measure={batch_size: 128, num_rounds: 9, precision: float32}",
]
"""Keys that make the recipe `digits` a matter of seconds. They are added to every command of README that takes it."""

BENCHMARK_OPTIONS = {"--json", "--quick"}

FILE_ENDINGS = {"md", "safetensors"}
"""`search.md` and `model.safetensors` look like keys of a recipe."""

Argv = list[str]


@dataclass(frozen=True)
class Block:
    """A block of code: fenced, with its language, or indented, without one."""

    language: str
    text: str


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^ {4}.+\n|^\n(?= {4}))+)", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[Block]:
    """All blocks of a page, in their order."""
    return [Block(match[1] or "", match[2] or match[3]) for match in BLOCK.finditer(text)]


def inline_code(text: str) -> list[str]:
    """Returns the texts in backticks outside the blocks, each in one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def commands(block: Block) -> list[Argv]:
    """The `vitfront`, `python` and `make` commands of a shell block; a loop is read with its first values."""
    if block.language not in ("", "sh"):
        return []
    text = block.text.replace("\\\n", " ")
    for name, first in re.findall(r"for (\w+) in (\S+)", text):
        text = text.replace(f"${name}", first)
    lines = [line.strip().removeprefix(".venv/bin/") for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(vitfront|python|make)\s", line)]


def commands_of(page: Path) -> list[Argv]:
    """The commands in the blocks of a page."""
    return [argv for block in blocks(page.read_text(encoding="utf-8")) for argv in commands(block)]


def by_page(pages: Sequence[Path] = PAGES) -> Any:
    """Runs a test for each page, under its name."""
    return pytest.mark.parametrize("page", pages, ids=[page.stem for page in pages])


def group() -> TyperGroup:
    """The command line, as the docs may name it."""
    found = typer.main.get_command(app)
    assert isinstance(found, TyperGroup)
    return found


def options_of(command: str) -> set[str]:
    """All options of a command of vitfront."""
    return {option for parameter in group().commands[command].params for option in parameter.opts}


def parsed(argv: Argv) -> dict[str, Any]:
    """Parses a whole command line of vitfront into its values; raises where the command line would refuse it."""
    _, command, *given = argv
    return dict(group().commands[command].make_context(command, list(given)).params)


def config_of(parameters: dict[str, Any]) -> Config:
    """The recipe with a command line's changes. A YAML file of the user's is taken to be a copy of `imagefolder`."""
    recipe = parameters["recipe"]
    is_run = "trials" in parameters  # what study and lottery call a name is not the recipe's
    taken = {key: parameters[key] for key in ("name", "trials", "time_budget", "earlier") if is_run}
    return load_config("imagefolder" if recipe.endswith(".yaml") else recipe, sets=parameters["sets"], **taken)


def is_recipe_key(key: str) -> bool:
    """Tells whether a recipe may have the key, or a section of that name."""
    known = flat(load_config("digits").model_dump(mode="json"))
    return any(name == key or name.startswith(f"{key}.") for name in known)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def runnable(block: Block) -> Iterator[Argv]:
    """Returns the commands that a block of README asks to run: none that need files, serve pages or run the tests.

    `make search` is `vitfront run`, its recipe is made `SMALL`, and bounds are lowered to 0, for a model that is not
    trained to the end.
    """
    if block.language == "python":
        yield [sys.executable, "-c", block.text]
    for argv in commands(block):
        if argv[0] == "python":
            yield [sys.executable, *argv[1:]]
        if argv == ["make", "search"]:
            argv = ["vitfront", "run"]
        if argv[0] != "vitfront" or argv[1] == "ui":
            continue
        parameters = parsed(argv)
        if parameters.get("recipe", parameters.get("name")) != "digits":
            continue
        if "recipe" in parameters:
            argv = [*argv, *(part for change in SMALL for part in ("--set", change))]
        argv = [re.sub(r"^(top1)=.*", r"\1=0", part) for part in argv]
        yield [sys.executable, "-m", "search.cli", *argv[1:]]


def columns(text: str) -> list[str]:
    """The heads of the first table of a text."""
    [head, *_] = [line for line in text.splitlines() if line.startswith("┃")]
    return [cell.strip() for cell in head.strip("┃").split("┃")]


def run(argv: Argv, folder: Path) -> str:
    """Returns the output of a command, run in a folder of its own with all its sweeps; it must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VITFRONT_RUNS": str(folder / "runs")}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_headings_of_readme_answer_what_a_newcomer_asks() -> None:
    asked = "what is it", "does it work on my model", "how long does it take", "how do i ship the result"
    headings = " ".join(re.findall(r"^## (.+)$", README.read_text(encoding="utf-8"), re.MULTILINE)).lower()
    assert [question for question in (*asked, "what does it not do") if question not in headings] == []


@pytest.mark.slow
@pytest.mark.alone
def test_commands_of_readme_run_on_digits_and_print_what_it_shows(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    printed = [run(argv, tmp_path) for block in blocks(text) for argv in runnable(block)]
    assert len(printed) == 6  # search; is my model supported; front, pick, export; load
    [shown] = [block.text for block in blocks(text) if block.language == "text"]
    assert columns(printed[0]) == columns(shown)
    for form in (r"Front of digits: \d+ models from \d+ trials; accuracy on val and test", r"hypervolume [\d.]+; "):
        assert [bool(re.search(f"^{form}", output, re.MULTILINE)) for output in (shown, printed[0])] == [True, True]


def test_python_of_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.model()
    spec = InputSpec(size=(16, 16))
    save(model, Description(name=tiny.NAME, args=tiny.ARGS, input=spec, plan=keep_all_plan(examine(model))), "my-model")
    variables: dict[str, Any] = {}
    for block in blocks((ROOT / "docs" / "library.md").read_text(encoding="utf-8")):
        if block.language == "python":
            exec(compile(block.text, "library.md", "exec"), variables)
    assert variables["logits"].shape == (8, tiny.NUM_CLASSES)
    assert variables["smaller"](torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert variables["timing"].speedup > 0


@by_page()
def test_commands_in_blocks_are_accepted(page: Path) -> None:
    for argv in commands_of(page):
        if argv[0] != "vitfront":
            continue
        parameters = parsed(argv)
        if "recipe" in parameters:
            config_of(parameters)
        if argv[1] == "study" and not parameters["name"].endswith(".yaml"):
            load_study(parameters["name"])


@by_page()
def test_commands_and_options_in_prose_exist(page: Path) -> None:
    everything = BENCHMARK_OPTIONS.union(*map(options_of, group().commands))
    for code in inline_code(page.read_text(encoding="utf-8")):
        words = code.split()
        if words[0] == "vitfront" and len(words) > 1 and words[1] != "X":
            assert words[1] in group().commands, code
            known = options_of(words[1])
        elif words[0].startswith("--"):
            known = everything
        else:
            continue
        assert [word for word in words if word.startswith("--") and word not in known] == [], code


@by_page()
def test_make_targets_exist(page: Path) -> None:
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = [code.split() for code in inline_code(page.read_text(encoding="utf-8"))] + commands_of(page)
    targets = {words[1] for words in named if words[0] == "make" and len(words) > 1}
    assert targets - there == set()


@by_page()
def test_recipe_keys_exist(page: Path) -> None:
    form = re.compile(rf"(?:--set )?((?:{'|'.join(Config.model_fields)})\.(\w+(?:\.\w+)*))")
    for code in inline_code(page.read_text(encoding="utf-8")):
        match = form.match(code)
        if match and match[2] not in FILE_ENDINGS:
            assert is_recipe_key(match[1]), code


@by_page()
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


@by_page()
def test_code_paths_exist(page: Path) -> None:
    codes = [code.split() for code in inline_code(page.read_text(encoding="utf-8"))] + commands_of(page)
    form = re.compile(r"(pruning|search|benchmarks|tests|docs)/[\w./-]*")
    paths = {word for words in codes for word in words if form.fullmatch(word)}
    assert {path for path in paths if not (ROOT / path).exists()} == set()


@by_page()
def test_environment_variables_are_read_by_the_code(page: Path) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "search").rglob("*.py"))
    assert {name for name in re.findall(r"VITFRONT_\w+", page.read_text(encoding="utf-8")) if name not in code} == set()


def test_layers_in_the_docs_are_those_of_the_contracts() -> None:
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no parser of it
    told = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for package in ("pruning", "search"):
        found = re.search(rf'containers = \["{package}"\].*?layers = \[(.*?)\n\]', contracts, re.DOTALL)
        shown = re.search(rf"\n    {package} +(\w+ >(?:.|\n {{6}})*)", told)
        assert found is not None
        assert shown is not None
        layers = [sorted(layer.split(" | ")) for layer in re.findall(r'"(.*?)"', found[1])]
        assert [sorted(re.findall(r"\w+", layer)) for layer in shown[1].split(">")] == layers
