"""Calls of the command line in this process, and the files that they leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.cli import main


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs one command; gives its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    code = stopped.value.code
    return (0 if code is None else int(code)), printed.out, printed.err


def files(folder: Path) -> set[str]:
    """Lists the files and folders below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check_refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, says: list[str]) -> None:
    """Expects one line that says these things, exit code 2, nothing printed as a result, no file more or less."""
    before = files(folder)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("vitfront: ")
    assert err.count("\n") == 1
    for words in says:
        assert words in err
    assert files(folder) == before
