"""Reads a class map: a text file with the name of one class a line, in the order of the model's indices."""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from pruning.dataset.files import shown
from pruning.errors import DataError

WANTED = "a class map is UTF-8 text with one class name a line, in the order of the model's classes"

WRONG_LINES = {
    r"\s*$": "is blank",
    r"\s*#": "is a comment",
    r"\s*\.": "names a hidden folder, which is never read",
    r".*\t": "holds a tab",
    r"\s*\d+\s*,|.*,\s*\d+\s*$": "holds an index and a comma",
    r"\s*([{\[]\s*$|[{\[]?[\"'])|.*,\s*$": "is no plain name",
}
"""Regular expression that matches the begin of a line that names no class -> the fault, for messages."""


def composed(name: str) -> str:
    """Gives a name in Unicode's composed form (NFC): macOS writes `é` as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def read_class_map(path: Path) -> tuple[str, ...]:
    """Reads the class names of a class map; nothing but text is read, and nothing is unpickled.

    Returns:
        The names in their order, in Unicode's composed form, without blanks around them.

    Raises:
        DataError: the file is missing or no text, or a line is no name or repeats one; the message tells its number.
    """
    if not os.path.isfile(path):
        raise DataError(f"no class map {path}; give a text file with one class name a line")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read class map {path}: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"cannot read class map {path}: it may be UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not re.search(rb"[\0-\x08\x0e-\x1f]", content):
            place = content.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"cannot read class map {path}: line {place} is not UTF-8; save the file as UTF-8"
            ) from error
        text = "\0"
    if "\0" in text:
        raise DataError(f"cannot read class map {path}: it is not a text file; {WANTED}")
    lines = re.split(r"\r\n|\n|\r", text.rstrip())
    if lines == [""]:
        raise DataError(f"class map {path} is empty; {WANTED}")
    for number, line in enumerate(lines, start=1):
        problem = next((problem for pattern, problem in WRONG_LINES.items() if re.match(pattern, line)), None)
        if problem is not None:
            raise DataError(f"class map {path}: line {number} {problem} ({line.strip()[:40]!r}); {WANTED}")
    names = tuple(composed(line.strip()) for line in lines)
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if first.setdefault(name, number) != number:
            raise DataError(f"class map {path}: lines {first[name]} and {number} are both {name!r}; name a class once")
    if _are_numbered(names):
        raise DataError(f"class map {path}: its lines hold an index ({names[0]!r}); {WANTED}")
    return names


def _are_numbered(names: tuple[str, ...]) -> bool:
    """Tells whether names are `0 cat`, `1 dog`, ... or `cat 0`, `dog 1`, ..., counted from 0 or 1.

    `class 0`, `class 1` are names: without their numbers they would be the same.
    """
    for pattern in (r"(?P<index>\d+)[\s:;=]+(?P<name>\S.*)", r"(?P<name>.*\S)[\s:;=]+(?P<index>\d+)"):
        matches = [re.fullmatch(pattern, name) for name in names]
        found = [(int(match["index"]), match["name"]) for match in matches if match is not None]
        counted = [index for index, _ in found] in (list(range(len(names))), list(range(1, len(names) + 1)))
        if counted and len({name for _, name in found}) == len(names):
            return True
    return False


def names_of_mapping(mapping: Mapping[str, int]) -> tuple[str, ...]:
    """Gives the class names of a mapping from name to index, in the order of the indices.

    Raises:
        DataError: the indices are not 0 to n - 1, each once, or two names are the same in Unicode's composed form.
    """
    wrong = [f"{name!r}: {index!r}" for name, index in mapping.items() if type(index) is not int]
    if wrong:
        raise DataError(f"the class map's indices must be whole numbers, not {shown(wrong)}")
    if not mapping:
        raise DataError("the class map is empty")
    indices = sorted(mapping.values())
    if indices != list(range(len(mapping))):
        raise DataError(
            f"the class map's indices must be 0 to {len(mapping) - 1}, each once; it has {shown(map(str, indices), 10)}"
        )
    names = tuple(composed(name) for name in sorted(mapping, key=mapping.__getitem__))
    if len(set(names)) < len(names):
        repeated = [name for place, name in enumerate(names) if name in names[:place]]
        raise DataError(f"the class map has a name twice, in two Unicode forms: {shown(repeated)}")
    return names
