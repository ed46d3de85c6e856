"""Axes and bands that the benchmarks' pictures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from search.views.page import GRID_COLOUR

mpl.use("Agg")


@contextmanager
def drawn(path: Path, num_panels: int = 1) -> Iterator[list[Axes]]:
    """Gives axes side by side to draw on, and saves them as PNG in the end."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, num_panels, figsize=(6.5 * num_panels, 4.5), squeeze=False)
    yield list(grid.flat)
    for axes in grid.flat:
        axes.grid(color=GRID_COLOUR)
        axes.set_axisbelow(True)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def band(axes: Axes, at: ArrayLike, curves: ArrayLike, label: str) -> None:
    """Draws the mean of some curves, and the range in which all of them lie.

    Args:
        at: (n,)
        curves: (count, n)
    """
    values = np.asarray(curves)
    (line,) = axes.plot(at, values.mean(axis=0), label=label)
    axes.fill_between(at, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.12, linewidth=0)
