"""The search space of one model: from the values that a sampler chooses to a candidate, and back."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

from pruning.plan import TokenReduction
from search.config import SpaceConfig
from search.errors import ConfigError
from search.method import METHODS, Method, Recovery
from search.outcome import FILTERED, Candidate
from search.parameter import Choice, Chooser, Numbers, Parameter, value_of

T = TypeVar("T")

PAPER_CUTOFF_CHANNEL, PAPER_CUTOFF_TOKEN = 0.1, 0.85
"""VTC-LFC's cut-off frequencies for DeiT."""

SNAP_STEPS = 8
"""The steps of the grid that `Space.snap` rounds to. Cascades that begin with equal values share that work."""

POINTS_PER_CANDIDATE = 100
"""The most grid points that are drawn for each candidate of a grid; several points may give the same candidate."""


class Space:
    """The space of one model's candidates: every parameter is a range or a list, or fixed where it has one value.

    A parameter without effect in a candidate (see `Candidate.to_params`) has one value there, so that candidates that
    do the same are equal: VTC-LFC's cut-offs and the score `lfs`, or what the space has nearest, and budgets of 0.
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
        self.method: tuple[Method, ...] = _methods(config, has_windows)
        self.criterion: tuple[str, ...] = _choices(config.criterion)
        self.token_reduction: tuple[TokenReduction, ...] = _token_reductions(config, self.method, has_windows)
        self.round_to: tuple[Any, ...] = _choices(config.round_to)
        self.pattern: tuple[str, ...] = _choices(config.pattern)
        self.recovery: tuple[Recovery, ...] = _choices(config.recovery)
        self.exit_blocks: list[int] = _exit_blocks(config, depth, exits)
        """All exits that a candidate may have, ascending."""

    def choose(self, chooser: Chooser) -> Candidate:
        """Makes a candidate of what the chooser chooses; it is not asked for what is fixed or has no effect."""
        name = _choice(chooser, "method", self.method)
        method = METHODS[name]
        criterion = _allowed("lfs", self.criterion)
        if method.has_budgets:
            criterion = _choice(chooser, "criterion", self.criterion)
        token_reduction: TokenReduction = "none"
        if method.takes_tokens:
            token_reduction = _choice(chooser, "token_reduction", self.token_reduction)
        exit_block = self.exit_blocks[-1] if method.serves_every_exit else self._choose_exit(chooser)
        budgeted = range(exit_block if method.has_budgets else 0)
        budgets = [_number(chooser, f"drop_budget.{block}", self.drop_budget) for block in budgeted]
        cutoff_channel = _clipped(PAPER_CUTOFF_CHANNEL, self.cutoff_channel)
        if method.has_budgets and criterion == "lfs":
            cutoff_channel = _number(chooser, "cutoff_channel", self.cutoff_channel, log=True)
        cutoff_token = _clipped(PAPER_CUTOFF_TOKEN, self.cutoff_token)
        if token_reduction in FILTERED:
            cutoff_token = _number(chooser, "cutoff_token", self.cutoff_token)
        pattern = _choice(chooser, "pattern", self.pattern) if method.is_sparse else "any"
        round_to, token_share = self.round_to[0], self.token_share[0]
        if method.takes_channels:
            round_to = _choice(chooser, "round_to", self.round_to)
            if token_reduction != "none":
                token_share = _number(chooser, "token_share", self.token_share)
        target_ratio = kept_share(pattern)
        if target_ratio is None:
            target_ratio = _number(chooser, "target_ratio", self.target_ratio)
        return Candidate(
            method=name,
            criterion=criterion,
            token_reduction=token_reduction,
            round_to=round_to,
            exit_block=exit_block,
            cutoff_channel=cutoff_channel,
            cutoff_token=cutoff_token,
            token_share=token_share,
            target_ratio=target_ratio,
            drop_budget=(*budgets, *[0.0] * (self.depth - len(budgets))),
            pattern=pattern,
            recovery="none" if method.serves_every_exit else _choice(chooser, "recovery", self.recovery),
        )

    def _choose_exit(self, chooser: Chooser) -> int:
        exits = self.exit_blocks
        if len(exits) == 1:
            return exits[0]
        if exits == list(range(exits[0], exits[-1] + 1)):
            return chooser.suggest_int("exit_block", exits[0], exits[-1])
        return int(chooser.suggest_categorical("exit_block", exits))

    def parameters(self) -> Mapping[str, Parameter]:
        """Gives all parameters that `choose` may ask for, whatever was chosen before, by following every choice."""
        return self._parameters

    @cached_property
    def _parameters(self) -> dict[str, Parameter]:
        parameters: dict[str, Parameter] = {}
        paths: list[dict[str, Any]] = [{}]
        while paths:
            explorer = _Explorer(paths.pop())
            self.choose(explorer)
            parameters |= explorer.parameters
            paths += explorer.other_paths
        return parameters

    def of_values(self, values: Mapping[str, Any]) -> Candidate:
        """Makes the candidate of a value for each of `parameters`; a value without effect there is ignored."""
        return self.choose(_Given(values))

    def values_of(self, candidate: Candidate) -> dict[str, Any]:
        """Gives the value nearest to the candidate's for each of `parameters`."""
        nearest = _Nearest(candidate)
        return {name: value_of(parameter, name, nearest) for name, parameter in self.parameters().items()}

    def snap(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Rounds the values to a grid of `SNAP_STEPS`; choices, whole exits and the target ratio stay as they are."""
        snapped = dict(values)
        for name, value in values.items():
            parameter = self.parameters()[name]
            if isinstance(parameter, Numbers) and name not in ("target_ratio", "exit_block"):
                snapped[name] = parameter.at(round(parameter.share(value) * SNAP_STEPS) / SNAP_STEPS)
        return snapped

    def full_grid(self, count: int, seed: int) -> list[Candidate]:
        """Gives up to `count` candidates of a grid over `parameters`, in random order, none twice.

        The grid has every choice, and as many values of each number as leave it at most `count` points; at least 2.
        """
        axes = self._grid_axes(count)
        num_points = math.prod(map(len, axes.values()))
        # A value without effect makes several points one candidate. The grid may be too large to list.
        points = random.Random(seed).sample(range(num_points), min(num_points, POINTS_PER_CANDIDATE * count))
        candidates: dict[Candidate, None] = {}
        for point in points:
            candidates[self.of_values(_values_at(point, axes))] = None
            if len(candidates) == count:
                break
        return list(candidates)

    def _grid_axes(self, count: int) -> dict[str, tuple[Any, ...]]:
        """Gives the grid's values of each parameter."""

        def axes(levels: int) -> dict[str, tuple[Any, ...]]:
            return {
                name: parameter.values if isinstance(parameter, Choice) else parameter.levels(levels)
                for name, parameter in self.parameters().items()
            }

        levels = 2
        while levels < count and math.prod(map(len, axes(levels + 1).values())) <= count:
            levels += 1
        return axes(levels)

    def clip(self, candidate: Candidate) -> Candidate:
        """Gives the nearest candidate within the space; a choice that is not allowed becomes the first that is."""
        return self.choose(_Nearest(candidate))

    def holds(self, candidate: Candidate) -> bool:
        """Tells whether a candidate lies in this space; one of a model with another depth does not."""
        return len(candidate.drop_budget) == self.depth and self.clip(candidate) == candidate


class _Given:
    """Chooses values that were chosen before."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._values[name])

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._values[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._values[name]


class _Explorer:
    """Follows one path through the choices, and remembers the paths that branch off. The last exit needs the most."""

    def __init__(self, path: Mapping[str, Any]) -> None:
        self._path = dict(path)
        self.parameters: dict[str, Parameter] = {}
        self.other_paths: list[dict[str, Any]] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.parameters[name] = Numbers(low=low, high=high, is_log=log)
        return low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.parameters[name] = Numbers(low=low, high=high, is_whole=True)
        return high

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.parameters[name] = Choice(values=tuple(choices))
        if name not in self._path:
            self.other_paths += [self._path | {name: choice} for choice in choices[1:]]
            self._path[name] = choices[0]
        return self._path[name]


class _Nearest:
    """Chooses the values nearest to a candidate's."""

    def __init__(self, candidate: Candidate) -> None:
        budgets = {f"drop_budget.{block}": points for block, points in enumerate(candidate.drop_budget)}
        self._wanted: dict[str, Any] = vars(candidate) | budgets

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return _clipped(self._wanted[name], (low, high))

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(_clipped(self._wanted[name], (low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        wanted = self._wanted[name]
        if name == "exit_block":  # a Swin has exits at the ends of its stages alone
            return min(choices, key=lambda block: abs(block - wanted))
        return _allowed(wanted, choices)


def _exit_blocks(config: SpaceConfig, depth: int, exits: Sequence[int] | None) -> list[int]:
    bounds = config.exit_block if config.exit_block is not None else depth
    low, high = bounds if isinstance(bounds, tuple) else (bounds, bounds)
    if low < 1 or high > depth:
        wrong = low if low < 1 else high
        raise ConfigError(f"space.exit_block: {wrong} is no exit of a model with {depth} blocks; give 1 to {depth}")
    allowed = [block for block in exits or range(1, depth + 1) if low <= block <= high]
    if not allowed:
        ends = ", ".join(map(str, exits or ()))
        raise ConfigError(f"space.exit_block: {bounds} has no exit; the model may answer after blocks {ends}")
    return allowed


def _methods(config: SpaceConfig, has_windows: bool) -> tuple[Method, ...]:
    """Gives the methods; without schedules of tokens where `auto` finds that tokens cannot be reduced."""
    names: tuple[Method, ...] = _choices(config.method)
    others = tuple(name for name in names if not METHODS[name].is_schedule)
    return others if has_windows and config.token_reduction == "auto" and others else names


def _token_reductions(config: SpaceConfig, names: Sequence[Method], has_windows: bool) -> tuple[TokenReduction, ...]:
    methods = [METHODS[name] for name in names]
    if not any(method.takes_tokens for method in methods):
        return ("none",)
    reductions: tuple[Any, ...] = _choices(config.token_reduction)
    if reductions == ("auto",):
        reductions = ("none",) if has_windows else ("attention-merge",)
    if "none" in reductions and any(method.takes_tokens and not method.takes_channels for method in methods):
        raise ConfigError("space.token_reduction: a schedule takes tokens alone, which none does not; leave one out")
    if has_windows and reductions != ("none",):
        raise ConfigError(
            f"space.token_reduction: {', '.join(reductions)} cannot be done to this model: its attention is in "
            "windows, which need every token of the grid; give none or auto"
        )
    return reductions


def kept_share(pattern: str) -> float | None:
    """Gives the share of weights that a pattern keeps: N / M for N:M, None for `any`, where the target decides."""
    if pattern == "any":
        return None
    keep, group = pattern.split(":")
    return int(keep) / int(group)


def _values_at(point: int, axes: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Gives the values at a point of a grid, whose first axis changes fastest."""
    values = {}
    for name, axis in axes.items():
        point, index = divmod(point, len(axis))
        values[name] = axis[index]
    return values


def _number(chooser: Chooser, name: str, bounds: tuple[float, float], *, log: bool = False) -> float:
    low, high = bounds
    return low if low == high else chooser.suggest_float(name, low, high, log=log)


def _choice(chooser: Chooser, name: str, choices: tuple[T, ...]) -> T:
    chosen: T = choices[0] if len(choices) == 1 else chooser.suggest_categorical(name, choices)
    return chosen


def _bounds(value: Any) -> tuple[float, float]:
    return (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value), float(value))


def _choices(value: T | tuple[T, ...]) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,)


def _clipped(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _allowed(wanted: T, choices: Sequence[T]) -> T:
    return wanted if wanted in choices else choices[0]
