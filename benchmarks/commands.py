"""Runs `vitfront run` as a user does, in a process of its own, and reads from its lines what was there when."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

TRIAL = re.compile(r"\d+/\d+ t\d+(?:\.\d+)? top-1 ([\d.]+), ([\d.]+) x as fast")
PREPARED = re.compile(r"all prepared after (\d+):(\d+)")
FIRST_LINE = "dense top-1 on val"


class Point(NamedTuple):
    """A model that was measured."""

    ended_s: float
    """Seconds from the beginning of the command to the end of the trial."""
    top1: float
    speedup: float


@dataclass
class CommandRun:
    """A command that has ended, or was ended."""

    points: list[Point] = field(default_factory=list)
    """Measured trials, in the order in which they ended."""
    first_line_s: float | None = None
    """Seconds to the line that tells the dense accuracy."""
    prepared_s: float | None = None
    """Seconds to the end of the preparation."""
    command_s: float = 0.0
    """Seconds of the whole command."""


def run_command(
    arguments: Sequence[str], *, checkout: Path = ROOT, cwd: Path = ROOT, kill_after_s: float | None = None
) -> CommandRun:  # fmt: skip
    """Runs `vitfront run ARGUMENTS` to its end.

    Args:
        checkout: the project's folder whose code runs.
        cwd: folder in which the command runs.
        kill_after_s: seconds after which it is ended, for a command that has no time budget that it keeps.
    """
    command = [sys.executable, "-m", "search.cli", "run", *arguments]
    run, start = CommandRun(), time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(kill_after_s or threading.TIMEOUT_MAX, kill)
        timer.daemon = True
        timer.start()
        for line in process.stderr:
            now = time.monotonic() - start
            print(f"{now:6.1f} {line}", end="", file=sys.stderr, flush=True)
            _read(line, now, run)
        timer.cancel()
    assert killed.is_set() or process.returncode == 0, f"the command failed with exit code {process.returncode}"
    run.command_s = time.monotonic() - start
    return run


def _read(line: str, now: float, run: CommandRun) -> None:
    if line.startswith(FIRST_LINE):
        run.first_line_s = now
    if match := TRIAL.match(line):
        run.points.append(Point(now, float(match[1]), float(match[2])))
    if PREPARED.match(line):
        run.prepared_s = now
