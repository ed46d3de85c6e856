"""The combinations of parameters that stand for full products."""

from __future__ import annotations

from itertools import combinations, product

from tests.pruning_tests import builders


def test_every_two_values_of_two_parameters_meet_in_fewer_combinations_than_all() -> None:
    choices = ["abcde", (0, 1, 5), (1, 2, 4, 8), (True, False)]
    chosen = builders.every_pair(*choices)
    for one, other in combinations(range(4), 2):
        assert {(values[one], values[other]) for values in chosen} == set(product(choices[one], choices[other]))
    assert len(set(chosen)) == len(chosen) <= 24 < 120
    assert chosen == builders.every_pair(*choices)


def test_in_rotation_each_has_as_many_others_as_asked_and_all_take_turns() -> None:
    chosen = builders.in_rotation("abc", range(4), 2)
    assert chosen == [("a", 0), ("a", 1), ("b", 2), ("b", 3), ("c", 0), ("c", 1)]
