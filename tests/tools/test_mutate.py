from __future__ import annotations

from dataclasses import replace
from textwrap import dedent

import pytest

from tests.tools.mutate import Coverage, Mutant, Verdict, choose, compare, mutants_of, mutated, read_durations

TEXT = dedent('''
    LIMIT = 3

    @cache(size=1)
    def outer(values: Sequence[Literal[1]], first: int = 2) -> Literal[5]:
        """Takes 4 values."""
        assert values[0] > 6
        kept = values[first:]

        def inner(x):
            return x < 7

        if inner(kept):
            kept += 8
        return kept[-1] if not kept else a and b

    if __name__ == "__main__":
        print(1 + 1)
''')


def changes(text: str) -> set[tuple[str, str, str]]:
    return {(mutant.function, mutant.before, mutant.after) for mutant in mutants_of("search/a.py", text)}


def test_every_operator_bound_index_and_condition_of_a_function_is_a_place() -> None:
    assert changes(TEXT) == {
        ("outer", "first:", "first + 1:"),
        ("inner", "x < 7", "x <= 7"),
        ("inner", "7", "8"),
        ("inner", "7", "6"),
        ("outer", "if inner(kept)", "if not inner(kept)"),
        ("outer", "kept += 8", "kept -= 8"),
        ("outer", "8", "9"),
        ("outer", "8", "7"),
        ("outer", "1", "2"),
        ("outer", "1", "0"),
        ("outer", "not kept", "kept"),
        ("outer", "a and b", "a or b"),
    }


def test_a_mutant_differs_from_the_file_in_its_mistake_alone() -> None:
    [unchanged] = {mutated(TEXT, mutant).replace("x <= 7", "x < 7") for mutant in found("x <= 7")}
    assert len(found("x <= 7")) == 1
    for mutant in mutants_of("search/a.py", TEXT):
        lines = zip(mutated(TEXT, mutant).splitlines(), unchanged.splitlines(), strict=True)
        [(now, before)] = [(now, before) for now, before in lines if now != before]
        assert now.strip() == before.strip().replace(mutant.before, mutant.after) or mutant.before == "1"


def found(after: str) -> list[Mutant]:
    return [mutant for mutant in mutants_of("search/a.py", TEXT) if mutant.after == after]


def test_mutants_stay_the_same_where_files_move_and_lines_shift() -> None:
    def drawn(mutants: list[Mutant], seed: int) -> list[tuple[str, str]]:
        return [(mutant.function, mutant.after) for mutant in choose(mutants, 6, seed)]

    before = [*mutants_of("pruning/a.py", TEXT.replace("kept", "rest")), *mutants_of("search/b.py", TEXT)]
    moved = "\n\nX = 1\n" + TEXT.replace("    ", "  ")
    after = [*mutants_of("pruning/new/c.py", moved.replace("kept", "rest")), *mutants_of("search/d.py", moved)]
    assert drawn(before, 0) == drawn(after, 0)
    assert drawn(before, 0) != drawn(before, 1)


def test_packages_have_mutants_in_proportion_and_no_line_has_two() -> None:
    mutants = [*mutants_of("pruning/a.py", TEXT), *mutants_of("search/b.py", TEXT), *mutants_of("search/c.py", TEXT)]
    chosen = choose(mutants, 6, seed=0)
    assert [mutant.path.split("/")[0] for mutant in chosen] == ["pruning"] * 2 + ["search"] * 4
    assert len({(mutant.path, mutant.line) for mutant in chosen}) == 6


def test_tests_of_a_mutant_are_those_of_its_lines_the_quickest_first() -> None:
    [mutant] = found("x <= 7")
    by_line = {mutant.line - 1: ["a::1"], mutant.line: ["b::slow", "b::1", "c::1"], mutant.line + 1: ["d::1"]}
    coverage = Coverage({"search/a.py": by_line}, {"b::slow": 90.0, "b::1": 0.1, "c::1": 20.0})
    assert coverage.tests_of(mutant) == ["b::1", "c::1"]  # with the third they would take too long
    assert coverage.tests_of(replace(mutant, end_line=mutant.line + 1)) == ["d::1", "b::1", "c::1"]
    assert coverage.tests_of(replace(mutant, path="search/b.py")) == []


def test_durations_are_of_all_phases_and_names_may_have_spaces() -> None:
    text = "1.50s call     tests/a.py::test[1 x]\n0.25s setup    tests/a.py::test[1 x]\n3 passed in 2.00s\n"
    assert read_durations(text) == {"tests/a.py::test[1 x]": pytest.approx(1.75)}


def test_comparison_names_what_is_no_longer_noticed() -> None:
    mutants = list(mutants_of("search/a.py", TEXT))[:3]
    before = [Verdict(mutant, "noticed", "a::1", 1) for mutant in mutants[:2]]
    after = [Verdict(mutants[1], "survived", None, 1), Verdict(mutants[2], "hung", None, 1)]
    text = compare(before, after)
    assert text.splitlines()[1].endswith("2 of 2 noticed (100%)")
    assert "drawn from both: 1" in text
    assert text.splitlines()[-1].startswith("noticed before: survived ")
