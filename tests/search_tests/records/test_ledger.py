"""The ledger under kills, broken lines, full disks and second writers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search.errors import SweepError
from search.outcome import Outcome, State
from search.records import ledger
from search.records.ledger import Ledger
from tests.search_tests import builders
from tests.search_tests.disk import largest_file

OUTCOMES = (
    builders.outcome("t000", 0.9, 1.5, top1_test=0.89),
    builders.failed("t001", reason="RuntimeError: line one\nline two \u2028 \N{SNOWMAN}"),
    builders.failed("t002", State.INFEASIBLE, "nothing is left"),
    builders.outcome("t003", 0.8, 2.5),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "digits" / "outcomes.jsonl"


def write(path: Path, outcomes: tuple[Outcome, ...]) -> None:
    with Ledger(path) as file:
        for outcome in outcomes:
            file.append(outcome)


def test_outcomes_come_back_equal_and_in_order(path: Path) -> None:
    write(path, OUTCOMES)
    assert ledger.read(path) == OUTCOMES
    assert path.read_bytes().count(b"\n") == len(OUTCOMES)


def test_missing_ledger_is_empty_and_is_not_made_by_reading(path: Path) -> None:
    assert ledger.read(path) == ()
    assert not path.exists()


def test_opened_again_it_tells_what_it_found_and_appends(path: Path) -> None:
    write(path, OUTCOMES[:2])
    with Ledger(path) as file:
        assert file.found == OUTCOMES[:2]
        file.append(OUTCOMES[2])
    assert ledger.read(path) == OUTCOMES[:3]


def test_outcome_is_readable_as_soon_as_it_is_appended(path: Path) -> None:
    with Ledger(path) as file:
        file.append(OUTCOMES[0])
        assert ledger.read(path) == OUTCOMES[:1]


def test_ledger_cut_at_any_byte_keeps_the_whole_lines(path: Path) -> None:
    write(path, OUTCOMES)
    content = path.read_bytes()
    newlines = [place for place, byte in enumerate(content) if byte == ord("\n")]
    near_newlines = {place + offset for place in newlines for offset in (-1, 0, 1)}
    for length in sorted(near_newlines | set(range(0, len(content), 31))):
        path.write_bytes(content[:length])
        count = content[:length].count(b"\n")
        assert ledger.read(path) == OUTCOMES[:count]
        assert path.stat().st_size == length


def test_writer_cuts_a_torn_line_off_before_it_appends(path: Path) -> None:
    write(path, OUTCOMES[:2])
    with path.open("ab") as file:
        file.write(b'{"id": "t00')
    write(path, OUTCOMES[2:])
    assert ledger.read(path) == OUTCOMES


@pytest.mark.parametrize("broken", [b"{", b"", b"[]", b'{"id": "t000"}', b"\xff", b'{"state": "MEASURED"}'])
def test_broken_line_in_the_middle_is_named(path: Path, broken: bytes) -> None:
    write(path, OUTCOMES)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join((lines[0], broken, *lines[2:])))
    with pytest.raises(SweepError, match=r"outcomes\.jsonl, line 2 is not an outcome"):
        ledger.read(path)
    before = path.read_bytes()
    with pytest.raises(SweepError, match="line 2"):
        Ledger(path)
    assert path.read_bytes() == before


def test_second_writer_is_refused_until_the_first_is_done(path: Path) -> None:
    with Ledger(path) as file:
        ledger.read(path)  # must not give the lock back
        with pytest.raises(SweepError, match="is being run by another process"):
            Ledger(path)
        file.append(OUTCOMES[0])
    write(path, OUTCOMES[1:])
    assert ledger.read(path) == OUTCOMES


def test_refused_writer_does_not_cut_what_the_first_is_writing(path: Path) -> None:
    with Ledger(path), path.open("ab") as half:
        half.write(b'{"id": ')
        half.flush()
        with pytest.raises(SweepError):
            Ledger(path)
        assert path.read_bytes() == b'{"id": '


def test_lock_holds_between_processes_and_ends_with_a_kill(path: Path) -> None:
    code = "import sys; from pathlib import Path; from search.records.ledger import Ledger\n"
    code += "ledger = Ledger(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    root = Path(ledger.__file__).parents[2]
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(SweepError, match="is being run by another process"):
            Ledger(path)
        assert ledger.read(path) == ()
        other.kill()
        other.wait()
    write(path, OUTCOMES[:1])
    assert ledger.read(path) == OUTCOMES[:1]


def test_broken_ledger_gives_its_lock_back(path: Path) -> None:
    write(path, OUTCOMES[:1])
    content = path.read_bytes()
    path.write_bytes(b"{\n")
    with pytest.raises(SweepError, match="line 1"):
        Ledger(path)
    path.write_bytes(content)
    write(path, OUTCOMES[1:])
    assert ledger.read(path) == OUTCOMES


def test_full_disk_is_reported_and_leaves_the_ledger_as_it_was(path: Path) -> None:
    with Ledger(path) as file:
        file.append(OUTCOMES[0])
        before = path.read_bytes()
        with (
            largest_file(len(before) + 20),
            pytest.raises(SweepError, match=r"cannot use the ledger .*outcomes\.jsonl: File too large"),
        ):
            file.append(OUTCOMES[1])
        assert path.read_bytes() == before
        file.append(OUTCOMES[1])
    assert ledger.read(path) == OUTCOMES[:2]


def test_ledger_that_cannot_be_opened_names_path_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match=r"file/outcomes\.jsonl: (Not a directory|File exists)"):
        Ledger(tmp_path / "file" / "outcomes.jsonl")
    with pytest.raises(SweepError, match="Is a directory"):
        ledger.read(tmp_path)
