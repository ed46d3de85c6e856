"""The two consoles of the command line: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console, RenderableType

OUT = Console(width=None if sys.stdout.isatty() else 120)
ERR = Console(stderr=True)

Report = Iterable[RenderableType]
"""A result told to people: tables and texts, from top to bottom."""


def show(items: Report) -> None:
    """Prints tables and texts as results; brackets in a text are text."""
    for item in items:
        OUT.print(item, markup=False, highlight=False)


def say(text: str) -> None:
    """Prints a line about what goes on, however long."""
    ERR.print(text, markup=False, highlight=False, soft_wrap=True)


def fail(text: str) -> None:
    """Prints an error as one red line, however long."""
    ERR.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
