"""Search space <-> candidate."""

from __future__ import annotations

from typing import Any, Protocol

from search.config import SpaceConfig
from search.errors import ConfigError
from search.outcome import Candidate


class Chooser(Protocol):
    """Who chooses a value in a range: an Optuna trial, or a test's fake."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...


class Space:
    """The space of one model's candidates: every parameter a range, or fixed where low = high."""

    def __init__(self, config: SpaceConfig, depth: int) -> None:
        """Raises ConfigError where the exits do not fit the model's depth."""
        self.depth = depth
        self.cutoff_channel = _bounds(config.cutoff_channel)
        self.cutoff_token = _bounds(config.cutoff_token)
        self.drop_budget = _bounds(config.drop_budget)
        self.token_share = _bounds(config.token_share)
        self.target_ratio = _bounds(config.target_ratio)
        exits = config.exit_block if config.exit_block is not None else depth
        self.exit_block = exits if isinstance(exits, tuple) else (exits, exits)
        low, high = self.exit_block
        if low < 1 or high > depth:
            wrong = low if low < 1 else high
            raise ConfigError(f"space.exit_block: {wrong} is no exit of a model with {depth} blocks; give 1 to {depth}")

    @property
    def exit_blocks(self) -> range:
        """All exits that a candidate may have."""
        return range(self.exit_block[0], self.exit_block[1] + 1)

    def choose(self, chooser: Chooser) -> Candidate:
        """A candidate; the budgets of blocks past its exit are not asked for."""

        def number(name: str, bounds: tuple[float, float], log: bool = False) -> float:
            low, high = bounds
            return low if low == high else chooser.suggest_float(name, low, high, log=log)

        low, high = self.exit_block
        exit_block = low if low == high else chooser.suggest_int("exit_block", low, high)
        budgets = [number(f"drop_budget.{block}", self.drop_budget) for block in range(exit_block)]
        return Candidate(
            exit_block=exit_block,
            cutoff_channel=number("cutoff_channel", self.cutoff_channel, log=True),
            cutoff_token=number("cutoff_token", self.cutoff_token),
            token_share=number("token_share", self.token_share),
            target_ratio=number("target_ratio", self.target_ratio),
            drop_budget=(*budgets, *[0.0] * (self.depth - exit_block)),
        )

    def clip(self, candidate: Candidate) -> Candidate:
        """The nearest candidate within the space."""

        def clipped(value: float, bounds: tuple[float, float]) -> float:
            return min(max(value, bounds[0]), bounds[1])

        exit_block = int(clipped(candidate.exit_block, self.exit_block))
        budgets = [clipped(points, self.drop_budget) for points in candidate.drop_budget[:exit_block]]
        return Candidate(
            exit_block=exit_block,
            cutoff_channel=clipped(candidate.cutoff_channel, self.cutoff_channel),
            cutoff_token=clipped(candidate.cutoff_token, self.cutoff_token),
            token_share=clipped(candidate.token_share, self.token_share),
            target_ratio=clipped(candidate.target_ratio, self.target_ratio),
            drop_budget=(*budgets, *[0.0] * (self.depth - exit_block)),
        )

    def first_candidates(self) -> list[Candidate]:
        """What to try before the search knows anything: the dense model, and the papers' settings.

        VTC-LFC: cut-offs 0.1 and 0.85, 9.5 points spread evenly over the blocks, 0.56 of them for tokens; here with
        the target at a quarter, half and three quarters of its range. WDPruning's depth: an exit at 10 of 12 blocks,
        nothing else pruned; and the first exit there is. All within the space, none twice.
        """
        low, high = self.target_ratio
        points = 9.5 / self.depth

        def at(target_ratio: float, budget: float, exit_block: int) -> Candidate:
            return self.clip(
                Candidate(
                    cutoff_channel=0.1,
                    cutoff_token=0.85,
                    drop_budget=(budget,) * self.depth,
                    token_share=0.56,
                    target_ratio=target_ratio,
                    exit_block=exit_block,
                )
            )

        papers = [at(low + part * (high - low), points, self.depth) for part in (0.5, 0.25, 0.75)]
        depth_only = [at(1.0, 0.0, exit_block) for exit_block in (round(self.depth * 10 / 12), self.exit_block[0])]
        unique: list[Candidate] = []
        for candidate in (at(1.0, 0.0, self.depth), papers[0], *depth_only, *papers[1:]):
            if candidate not in unique:
                unique.append(candidate)
        return unique


def _bounds(value: Any) -> tuple[float, float]:
    return (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value), float(value))
