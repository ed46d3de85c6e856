"""Search space <-> candidate."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from pruning.plan import TokenReduction
from search.config import SpaceConfig
from search.errors import ConfigError
from search.outcome import FILTERED, SCHEDULES, TOKENLESS, Candidate, Method, Recovery

T = TypeVar("T")

PAPER_CUTOFF_CHANNEL, PAPER_CUTOFF_TOKEN = 0.1, 0.85
"""VTC-LFC's, for DeiT."""

PAPER_POINTS = 9.5
"""Accuracy points that VTC-LFC's blocks may cost together."""

NUM_STEPS = 8
"""Of the grid on which cut-offs, budgets and token shares are suggested: cascades that begin alike share that part."""

REPEATED = 100
"""A grid is searched for so many points for each candidate that is wanted."""


class Chooser(Protocol):
    """Who chooses a value of a range or a list: an Optuna trial, or a test's fake."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A range, ends included."""

    low: float
    high: float
    is_whole: bool = False
    is_log: bool = False

    def at(self, share: float) -> float:
        """The value at a share of the range, in [0, 1]."""
        value = self.low * (self.high / self.low) ** share if self.is_log else self.low + share * (self.high - self.low)
        return round(value) if self.is_whole else min(max(value, self.low), self.high)  # rounding errors

    def share(self, value: float) -> float:
        """Of the range that lies below a value; the inverse of `at`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def levels(self, count: int) -> tuple[float, ...]:
        """So many values, evenly spread, from end to end; fewer whole numbers if there are not so many."""
        return tuple(dict.fromkeys(self.at(index / (count - 1)) for index in range(count)))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several."""

    values: tuple[Any, ...]


Parameter = Numbers | Choice


def ask(chooser: Chooser, name: str, parameter: Parameter) -> Any:
    """What the chooser chooses of it."""
    if isinstance(parameter, Choice):
        return chooser.suggest_categorical(name, parameter.values)
    if parameter.is_whole:
        return chooser.suggest_int(name, int(parameter.low), int(parameter.high))
    return chooser.suggest_float(name, parameter.low, parameter.high, log=parameter.is_log)


class Space:
    """The space of one model's candidates: every parameter a range or a list, or fixed where it has one value.

    What has no effect in a candidate (see `Candidate.to_params`) has one value there, so that candidates that do the
    same are equal: VTC-LFC's cut-offs and the score `lfs`, or what the space has nearest to them, and budgets of 0.
    """

    def __init__(
        self, config: SpaceConfig, depth: int, exits: Sequence[int] | None = None, *, has_windows: bool = False
    ) -> None:
        """
        Args:
            exits: blocks after which the model may answer; by default each.
            has_windows: attention is within windows, so tokens cannot be reduced.

        Raises:
            ConfigError: exits or token reductions do not fit the model.
        """
        self.depth = depth
        self.cutoff_channel = _bounds(config.cutoff_channel)
        self.cutoff_token = _bounds(config.cutoff_token)
        self.drop_budget = _bounds(config.drop_budget)
        self.token_share = _bounds(config.token_share)
        self.target_ratio = _bounds(config.target_ratio)
        asked = config.exit_block if config.exit_block is not None else depth
        low, high = asked if isinstance(asked, tuple) else (asked, asked)
        self.method: tuple[Method, ...] = _choices(config.method)
        self.criterion: tuple[str, ...] = _choices(config.criterion)
        self.token_reduction: tuple[TokenReduction, ...] = _token_reductions(config, has_windows)
        self.round_to: tuple[Any, ...] = _choices(config.round_to)
        self.pattern: tuple[str, ...] = _choices(config.pattern)
        self.recovery: tuple[Recovery, ...] = _choices(config.recovery)
        if low < 1 or high > depth:
            wrong = low if low < 1 else high
            raise ConfigError(f"space.exit_block: {wrong} is no exit of a model with {depth} blocks; give 1 to {depth}")

        self.exit_blocks: list[int] = [block for block in exits or range(1, depth + 1) if low <= block <= high]
        """All exits that a candidate may have, ascending."""
        if not self.exit_blocks:
            ends = ", ".join(map(str, exits or ()))
            raise ConfigError(f"space.exit_block: {asked} has no exit; the model may answer after blocks {ends}")

    def choose(self, chooser: Chooser) -> Candidate:
        """A candidate; what is fixed or has no effect is not asked for."""

        def number(name: str, bounds: tuple[float, float], log: bool = False) -> float:
            low, high = bounds
            return low if low == high else chooser.suggest_float(name, low, high, log=log)

        def choice(name: str, choices: tuple[T, ...]) -> T:
            chosen: T = choices[0] if len(choices) == 1 else chooser.suggest_categorical(name, choices)
            return chosen

        method = choice("method", self.method)
        is_cascade, is_schedule, is_learned = method == "cascade", method in SCHEDULES, method == "learned"
        is_sparse = method == "unstructured"
        criterion = choice("criterion", self.criterion) if is_cascade else _allowed("lfs", self.criterion)
        token_reduction: TokenReduction = (
            "none" if method in TOKENLESS else choice("token_reduction", self.token_reduction)
        )
        exit_block = self.exit_blocks[-1] if is_learned else self._choose_exit(chooser)
        budgets = [number(f"drop_budget.{block}", self.drop_budget) for block in range(exit_block if is_cascade else 0)]
        cutoff_channel = _clipped(PAPER_CUTOFF_CHANNEL, self.cutoff_channel)
        if is_cascade and criterion == "lfs":
            cutoff_channel = number("cutoff_channel", self.cutoff_channel, log=True)
        cutoff_token = _clipped(PAPER_CUTOFF_TOKEN, self.cutoff_token)
        if token_reduction in FILTERED:
            cutoff_token = number("cutoff_token", self.cutoff_token)
        has_share = token_reduction != "none" and not is_schedule
        pattern = choice("pattern", self.pattern) if is_sparse else "any"
        return Candidate(
            method=method,
            criterion=criterion,
            token_reduction=token_reduction,
            round_to=self.round_to[0] if is_schedule or is_sparse else choice("round_to", self.round_to),
            exit_block=exit_block,
            cutoff_channel=cutoff_channel,
            cutoff_token=cutoff_token,
            token_share=number("token_share", self.token_share) if has_share else self.token_share[0],
            target_ratio=number("target_ratio", self.target_ratio) if pattern == "any" else kept_share(pattern),
            drop_budget=(*budgets, *[0.0] * (self.depth - len(budgets))),
            pattern=pattern,
            recovery="none" if is_learned else choice("recovery", self.recovery),
        )

    def parameters(self) -> Mapping[str, Parameter]:
        """All that `choose` may ask for, whatever was chosen before: by following every choice."""
        return self._parameters

    @cached_property
    def _parameters(self) -> dict[str, Parameter]:
        found: dict[str, Parameter] = {}
        paths: list[dict[str, Any]] = [{}]
        while paths:
            explorer = _Explorer(paths.pop())
            self.choose(explorer)
            found |= explorer.asked
            paths += explorer.others
        return found

    def snap(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values with the numbers that a cascade begins with, all but its target and its exit, on a coarse grid."""
        parameters, rounded = self.parameters(), dict(values)
        for name, value in values.items():
            parameter = parameters[name]
            if isinstance(parameter, Numbers) and name not in ("target_ratio", "exit_block"):
                rounded[name] = parameter.at(round(parameter.share(value) * NUM_STEPS) / NUM_STEPS)
        return rounded

    def of_values(self, values: Mapping[str, Any]) -> Candidate:
        """The candidate with a value for each of `parameters`; what has no effect there is ignored."""
        return self.choose(_Given(values))

    def values_of(self, candidate: Candidate) -> dict[str, Any]:
        """The nearest value to the candidate's for each of `parameters`."""
        nearest = _Nearest(candidate)
        return {name: ask(nearest, name, parameter) for name, parameter in self.parameters().items()}

    def full_grid(self, count: int, seed: int) -> list[Candidate]:
        """Up to `count` candidates of a grid over `parameters`, in random order, none twice.

        The grid has every choice, and of every number as many values as leave it at most `count` points; at least 2.
        """
        parameters = self.parameters()

        def axes(levels: int) -> list[tuple[Any, ...]]:
            return [each.values if isinstance(each, Choice) else each.levels(levels) for each in parameters.values()]

        levels = 2
        while levels < count and math.prod(map(len, axes(levels + 1))) <= count:
            levels += 1
        chosen = axes(levels)
        size = math.prod(map(len, chosen))
        found: dict[Candidate, None] = {}
        # What has no effect makes one candidate of several points. The grid may be too large to be listed.
        for place in random.Random(seed).sample(range(size), min(size, REPEATED * count)):
            values = {}
            for name, axis in zip(parameters, chosen, strict=True):
                place, index = divmod(place, len(axis))
                values[name] = axis[index]
            found[self.of_values(values)] = None
            if len(found) == count:
                break
        return list(found)

    def _choose_exit(self, chooser: Chooser) -> int:
        exits = self.exit_blocks
        if len(exits) == 1:
            return exits[0]
        if exits == list(range(exits[0], exits[-1] + 1)):
            return chooser.suggest_int("exit_block", exits[0], exits[-1])
        return int(chooser.suggest_categorical("exit_block", exits))

    def clip(self, candidate: Candidate) -> Candidate:
        """The nearest candidate within the space; a choice that is not allowed becomes the first that is."""
        return self.choose(_Nearest(candidate))

    def holds(self, candidate: Candidate) -> bool:
        """Whether it is one of this space; what is of a model with another depth is not."""
        return len(candidate.drop_budget) == self.depth and self.clip(candidate) == candidate

    def first_candidates(self, proposed: Sequence[Candidate] = ()) -> list[Candidate]:
        """What to try before the search knows anything: the dense model, then what is proposed, or else the papers'
        settings. All within the space, none twice.

        VTC-LFC: cut-offs 0.1 and 0.85, 9.5 points spread evenly over the blocks, 0.56 of them for tokens; here with
        the target at a quarter, half and three quarters of its range. WDPruning's depth: an exit at 10 of 12 blocks,
        nothing else pruned; and the first exit there is. Method `global`: the profile's own weights at the same three
        targets, all blocks kept; so is learned width. Proposals take the place of all but the middle target of VTC-LFC,
        of each method that they are for.
        """
        low, high = self.target_ratio
        targets = [low + part * (high - low) for part in (0.5, 0.25, 0.75)]

        def at(target_ratio: float, points: float, exit_block: int, method: Method, token_share: float) -> Candidate:
            return self.clip(
                Candidate(
                    method=method,
                    cutoff_channel=PAPER_CUTOFF_CHANNEL,
                    cutoff_token=PAPER_CUTOFF_TOKEN,
                    drop_budget=(points / self.depth,) * self.depth,
                    token_share=token_share,
                    target_ratio=target_ratio,
                    exit_block=exit_block,
                )
            )

        first: list[Candidate] = []
        if "cascade" in self.method:
            dense = at(1.0, 0.0, self.depth, "cascade", 0.56)
            papers = [at(target, PAPER_POINTS, self.depth, "cascade", 0.56) for target in targets]
            exits = (round(self.depth * 10 / 12), self.exit_blocks[0])
            depth_only = [at(1.0, 0.0, exit_block, "cascade", 0.56) for exit_block in exits]
            others = [papers[0]] if proposed else [papers[0], *depth_only, *papers[1:]]
            first += [dense, *[each for each in proposed if each.method == "cascade"], *others]
        if "global" in self.method:
            dense_too = [] if first else [at(1.0, 0.0, self.depth, "global", 0.5)]
            whole = [at(target, 0.0, self.depth, "global", 0.5) for target in targets]
            first += dense_too + ([each for each in proposed if each.method == "global"] or whole)
        for method in self.method:
            if method in SCHEDULES | TOKENLESS:
                wanted = targets if method == "learned" else [targets[0]]
                wanted = wanted if first or method in TOKENLESS else [1.0, *wanted]
                first += [at(target, 0.0, self.depth, method, 0.5) for target in wanted]
        return list(dict.fromkeys(first))


class _Given:
    """Chooses what was chosen before."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._values[name])

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._values[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._values[name]


class _Explorer:
    """Follows one path through the choices, and remembers those beside it. The last exit needs the most."""

    def __init__(self, path: Mapping[str, Any]) -> None:
        self._path = dict(path)
        self.asked: dict[str, Parameter] = {}
        self.others: list[dict[str, Any]] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked[name] = Numbers(low=low, high=high, is_log=log)
        return low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.asked[name] = Numbers(low=low, high=high, is_whole=True)
        return high

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked[name] = Choice(values=tuple(choices))
        if name not in self._path:
            self.others += [self._path | {name: choice} for choice in choices[1:]]
            self._path[name] = choices[0]
        return self._path[name]


class _Nearest:
    """Chooses what is nearest to a candidate."""

    def __init__(self, candidate: Candidate) -> None:
        budgets = {f"drop_budget.{block}": points for block, points in enumerate(candidate.drop_budget)}
        self._wanted: dict[str, Any] = vars(candidate) | budgets

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return _clipped(self._wanted[name], (low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(_clipped(self._wanted[name], (low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        wanted = self._wanted[name]
        if name == "exit_block":  # of those after a Swin's stages
            return min(choices, key=lambda block: abs(block - wanted))
        return _allowed(wanted, choices)


def _token_reductions(config: SpaceConfig, has_windows: bool) -> tuple[TokenReduction, ...]:
    methods = set(_choices(config.method))
    if methods <= TOKENLESS:
        return ("none",)
    asked: tuple[Any, ...] = _choices(config.token_reduction)
    if asked == ("auto",):
        asked = ("none",) if has_windows else ("attention-merge",)
    if "none" in asked and SCHEDULES & methods:
        raise ConfigError("space.token_reduction: a schedule takes tokens alone, which none does not; leave one out")
    if has_windows and asked != ("none",):
        raise ConfigError(
            f"space.token_reduction: {', '.join(asked)} cannot be done to this model: its attention is in windows, "
            "which need every token of the grid; give none or auto"
        )
    return asked


def kept_share(pattern: str) -> float:
    """N:M -> N / M."""
    keep, group = pattern.split(":")
    return int(keep) / int(group)


def _bounds(value: Any) -> tuple[float, float]:
    return (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value), float(value))


def _choices(value: T | tuple[T, ...]) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _clipped(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _allowed(wanted: T, choices: Sequence[T]) -> T:
    return wanted if wanted in choices else choices[0]
