"""The wheel that `pip install` would get: an editable install hides what it lacks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pruning", "search")

IMPORT_ALL = """
import importlib, json, sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
target, *names = sys.argv[1:]
sys.path.insert(0, target)
print(json.dumps([importlib.import_module(name).__file__ for name in names]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which the wheel was installed; it is built of a copy, so that none is left in the tree."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(wheels))
    [wheel] = wheels.glob("*.whl")
    pip("install", str(wheel), "--no-compile", "--target", str(target))
    return target


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def files(suffix: str) -> list[Path]:
    """Lists the modules of both packages, in the checkout."""
    return [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob(f"*{suffix}"))]


@pytest.mark.slow
def test_wheel_has_every_module_and_each_can_be_imported(installed: Path, tmp_path: Path) -> None:
    modules = [path for path in files(".py") if path.name != "__init__.py"]
    names = [".".join(path.with_suffix("").parts) for path in modules]
    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(installed), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(installed / path) for path in modules]


@pytest.mark.slow
def test_wheel_has_the_recipes_and_the_studies(installed: Path) -> None:
    recipes = files(".yaml")
    assert {path.parent.name for path in recipes} == {"recipes", "studies"}
    assert [path for path in recipes if not (installed / path).is_file()] == []
