"""The prefix cache against a repetition of all comparisons."""

from __future__ import annotations

import random

from pruning.methods.prefix_cache import PrefixCache, Threshold


def compared(value: float, numbers: list[int]) -> tuple[Threshold, list[bool]]:
    threshold = Threshold(value)
    return threshold, [threshold.reaches(number) for number in numbers]


def test_a_threshold_knows_which_numbers_would_have_given_the_same_answers() -> None:
    generator = random.Random(0)
    for _ in range(100):
        numbers = [generator.randrange(10) for _ in range(generator.randrange(4))]
        threshold, answers = compared(generator.randrange(10), numbers)
        same = [value for value in range(10) if compared(value, numbers)[1] == answers]
        assert same == [value for value in range(10) if threshold.low <= value < threshold.high]


def run(prefix_cache: PrefixCache[str], target: float, steps: int, *, num_bytes: int = 1, settings: str = "a") -> None:
    """Compares the target with 10, 20, ... and keeps the state after each step."""
    threshold = Threshold(target)
    for step in range(steps):
        threshold.reaches(10 * (step + 1))
        prefix_cache.keep(settings, [threshold], step, f"{target} after {step}", num_bytes)


def test_the_state_after_the_most_steps_that_are_the_same_is_found() -> None:
    prefix_cache = PrefixCache[str](100)
    run(prefix_cache, 25, 4)  # 10 and 20 are reached, 30 and 40 are not
    for target, expected in ((27, "25 after 3"), (35, "25 after 1"), (15, "25 after 0"), (5, None)):
        assert prefix_cache.farthest("a", [Threshold(target)]) == expected
    assert prefix_cache.farthest("b", [Threshold(25)]) is None


def test_a_threshold_that_goes_on_from_a_state_remembers_the_comparisons_before_it() -> None:
    prefix_cache = PrefixCache[str](100)
    run(prefix_cache, 25, 4)
    threshold = Threshold(27)
    prefix_cache.farthest("a", [threshold])
    assert (threshold.low, threshold.high) == (20, 30)


def test_the_states_used_last_are_kept_within_the_bytes() -> None:
    prefix_cache = PrefixCache[str](10)
    for number, settings in enumerate("abc"):
        run(prefix_cache, 5, 1, num_bytes=5, settings=settings)
        assert prefix_cache.num_bytes == 5 * min(number + 1, 2)
        prefix_cache.farthest("b", [Threshold(5)])
    assert [prefix_cache.farthest(settings, [Threshold(5)]) is None for settings in "abc"] == [True, False, False]
    run(prefix_cache, 5, 1, num_bytes=5, settings="d")
    assert prefix_cache.farthest("b", [Threshold(5)]) is None  # c was looked for later
    run(prefix_cache, 5, 1, num_bytes=11, settings="e")
    assert prefix_cache.num_bytes == 0
