"""The text of a class map: what is read, and what is refused with the number of its line."""

from __future__ import annotations

import os
import pickle
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from pruning.dataset.class_map import names_of_mapping, read_class_map
from pruning.errors import DataError


def file(folder: Path, content: bytes | str, name: str = "classes.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"cat\nsea lion\ncaf\xc3\xa9\n",
        b"cat\nsea lion\ncaf\xc3\xa9",
        b"cat\r\nsea lion\r\ncaf\xc3\xa9\r\n",
        b"cat\rsea lion\rcaf\xc3\xa9\r",
        b"\xef\xbb\xbfcat\nsea lion\ncaf\xc3\xa9\n\n \n",
        b" cat\nsea lion  \ncaf\xc3\xa9",
        b"cat\nsea lion\ncafe\xcc\x81\n",
    ],
    ids=["plain", "no last line end", "Windows", "old Mac", "BOM and blank end", "blanks around", "decomposed"],
)
@pytest.mark.parametrize("name", ["classes.txt", "classes", "names.csv"])
def test_names_are_the_lines_however_they_are_written(content: bytes, name: str, tmp_path: Path) -> None:
    assert read_class_map(file(tmp_path, content, name)) == ("cat", "sea lion", "café")


def test_names_with_digits_commas_and_symbols_are_names(tmp_path: Path) -> None:
    names = ("0", "10", "9", "class 1", "class 2", "tench, Tinca tinca", "C#", "Boeing 747", "a:b", "100%", "+1", "-")
    assert read_class_map(file(tmp_path, "\n".join(names))) == names
    numbered = ("class 0", "class 1", "class 2")
    assert read_class_map(file(tmp_path, "\n".join(numbered))) == numbered


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("cat\n\ndog\n", "line 2 is blank"),
        ("\ncat\ndog\n", "line 1 is blank"),
        ("cat\n  \ndog\n", "line 2 is blank"),
        ("# classes\ncat\n", "line 1 is a comment ('# classes')"),
        ("cat\ndog\ncat\n", "lines 1 and 3 are both 'cat'"),
        ("cat\ndog\ncat \n", "lines 1 and 3 are both 'cat'"),
        ("café\n" + unicodedata.normalize("NFD", "café"), "lines 1 and 2 are both 'café'"),
        ("cat\n.git\n", "line 2 names a hidden folder, which is never read ('.git')"),
        ("0\tcat\n1\tdog\n", "line 1 holds a tab"),
        ("cat\ndog\t1\n", "line 2 holds a tab"),
        ("0,cat\n1,dog\n", "line 1 holds an index and a comma ('0,cat')"),
        ("name,index\ncat,0\n", "line 2 holds an index and a comma ('cat,0')"),
        ("0 cat\n1 dog\n", "its lines hold an index ('0 cat')"),
        ("1: cat\n2: dog\n", "its lines hold an index ('1: cat')"),
        ("cat 0\ndog 1\n", "its lines hold an index ('cat 0')"),
        ('{\n  "cat": 0,\n  "dog": 1\n}', "line 1 is no plain name ('{')"),
        ('["cat", "dog"]', "line 1 is no plain name"),
        ("cat,\ndog,\n", "line 1 is no plain name ('cat,')"),
        ("", "is empty"),
        ("\n\n", "is empty"),
    ],
)
def test_lines_that_are_no_names_are_refused_with_their_number(content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_class_map(file(tmp_path, content))
    assert says in str(error.value) and "classes.txt" in str(error.value) and "\n" not in str(error.value)


class Harmful:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["names.pkl", "names.txt"])
def test_a_pickle_is_never_unpickled(name: str, tmp_path: Path) -> None:
    path = file(tmp_path, pickle.dumps({"cat": Harmful(tmp_path / "harm")}), name)
    with pytest.raises(DataError, match=rf"cannot read class map .*{name}: it is not a text file"):
        read_class_map(path)
    old = file(tmp_path, pickle.dumps({"cat": Harmful(tmp_path / "harm")}, protocol=0), name)  # of letters alone
    read_class_map(old)
    assert not (tmp_path / "harm").exists()


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for content in (b"\x89PNG\r\n\x1a\n", b"cat\n\x00dog\n", b"\x80\x02}q\x00."):
        with pytest.raises(DataError, match="it is not a text file"):
            read_class_map(file(tmp_path, content))
    with pytest.raises(DataError, match="line 2 is not UTF-8; save the file as UTF-8"):
        read_class_map(file(tmp_path, "cat\ncafé\n".encode("latin-1")))
    with pytest.raises(DataError, match="it may be UTF-16; save it as UTF-8"):
        read_class_map(file(tmp_path, "cat\ndog".encode("utf-16")))
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(DataError, match=r"no class map .*; give a text file with one class name a line"):
            read_class_map(path)


def test_a_mapping_gives_its_names_in_the_order_of_their_indices() -> None:
    assert names_of_mapping({"dog": 1, "cat": 0, unicodedata.normalize("NFD", "é"): 2}) == ("cat", "dog", "é")


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({}, "the class map is empty"),
        ({"cat": 0, "dog": 0}, "must be 0 to 1, each once; it has 0, 0"),
        ({"cat": 1, "dog": 2}, "must be 0 to 1, each once; it has 1, 2"),
        ({"cat": 0, "dog": "1"}, "must be whole numbers, not 'dog': '1'"),
        ({"cat": False, "dog": True}, "must be whole numbers, not 'cat': False, 'dog': True"),
        ({"cat": 0.0}, "must be whole numbers, not 'cat': 0.0"),
        ({"é": 0, unicodedata.normalize("NFD", "é"): 1}, "has a name twice, in two Unicode forms: é"),
    ],
)
def test_mappings_that_do_not_number_their_names_are_refused(mapping: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as error:
        names_of_mapping(mapping)
    assert says in str(error.value)
