"""Errors as one line."""

from __future__ import annotations

import pytest

from pruning.errors import first_line_of


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no such file"), "no such file"),
        (RuntimeError("\n  cannot load\nTraceback ...\n"), "cannot load"),
        (KeyError(), "KeyError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_an_error_is_told_by_its_first_line_or_by_its_class(error: Exception, line: str) -> None:
    assert first_line_of(error) == line
