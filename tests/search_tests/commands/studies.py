"""Studies for tests, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from search.commands.study_report import SHARE


def write_study(folder: Path, **changes: Any) -> str:
    """Writes a study of two targets of a schedule; returns its path.

    Args:
        changes: other values of its keys.
    """
    study = {
        "question": "How small?", "source": "here", "x": SHARE, "x_label": "MACs", "answer": "best-series",
        "series_by": "space.method", "set": {"space.token_reduction": "merge"},
        "each": {"space.method": ["constant"], "space.target_ratio": [0.9, 0.7]},
    } | changes  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return str(folder / "mine.yaml")
