"""MLflow's store in a folder of sweeps: its address, for any characters; its artifacts, where the folder was moved."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from search.errors import SweepError


def default_uri(runs: Path) -> str:
    """Returns the store that sweeps are tracked in: `MLFLOW_TRACKING_URI`, or else a SQLite file among the sweeps.

    Raises:
        SweepError: the path of the file cannot be written as an address.
    """
    return os.environ.get("MLFLOW_TRACKING_URI", "").strip() or sqlite_uri(_database_of(runs))


def sqlite_uri(path: Path) -> str:
    """Returns the address of a SQLite file as SQLAlchemy reads it: only from 2.1 on does it know %25 and %3F.

    Raises:
        SweepError: the path has a question mark, and SQLAlchemy is older.
    """
    text = str(path)
    for address in (text, text.replace("%", "%25").replace("?", "%3F")):
        uri = f"sqlite:///{address}"
        if make_url(uri).database == text:
            return uri
    raise SweepError(f"MLflow has no address for {text}; take another --runs, without a question mark in its path")


@contextmanager
def without_half_a_store(runs: Path, uri: str) -> Iterator[None]:
    """Removes the SQLite file in a folder of sweeps if it is made within this block, and fails: a full disk leaves
    half of its tables, with which MLflow could never go on."""
    is_new = is_store_of(runs, uri) and not _database_of(runs).exists()
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                _database_of(runs).unlink()
        raise


def is_store_of(runs: Path, uri: str) -> bool:
    """Tells whether an address is that of the SQLite file in a folder of sweeps, with which it is moved and copied."""
    try:
        return uri.startswith("sqlite") and make_url(uri).database == str(_database_of(runs))
    except ArgumentError:  # no address at all
        return False


def follow_moved_artifacts(runs: Path, artifact_root: Path) -> None:
    """Tells the SQLite file in a folder of sweeps where its artifacts are, after the folder was moved or copied.

    MLflow keeps the address of each experiment's and each run's artifacts and has no call that changes one: it would
    make the old folder again, and write there.

    Raises:
        sqlite3.Error: the file cannot be read or written.
    """
    if not _database_of(runs).is_file():
        return
    new = artifact_root.absolute().as_uri()
    with closing(sqlite3.connect(_database_of(runs))) as database, database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchall():
            return  # empty: MLflow makes its tables
        locations = database.execute("SELECT artifact_location FROM experiments").fetchall()
        for old in {location for (location,) in locations if _is_moved(location, new)}:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                database.execute(
                    f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
                    f"WHERE {column} = :old OR substr({column}, 1, length(:old) + 1) = :old || '/'",
                    {"old": old, "new": new},
                )


@contextmanager
def without_stray_folders(uri: str) -> Iterator[None]:
    """Removes the empty folders that MLflow makes within this block, where it takes an address with %25 for a path."""
    quoted = Path(uri.removeprefix("sqlite:///")).parent
    missing = [folder for folder in (quoted, *quoted.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # it was not made, or is not empty
                folder.rmdir()


def _database_of(runs: Path) -> Path:
    return runs.absolute() / "mlflow.db"


def _is_moved(location: str | None, new: str) -> bool:
    """Tells whether artifacts at a location are those of a folder of sweeps that is somewhere else now."""
    if location is None or location == new:
        return False
    return location.startswith("file:") and location.rpartition("/")[2] == new.rpartition("/")[2]
