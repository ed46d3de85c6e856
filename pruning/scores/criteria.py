"""The channel criteria by name."""

from __future__ import annotations

from collections.abc import Callable

from pruning.scores import activation, lfs, magnitude, obs, random, taylor
from pruning.scores.channel import ChannelScores, ScoringInput

CRITERIA: dict[str, Callable[[ScoringInput], ChannelScores]] = {
    "lfs": lfs.score,
    "taylor": taylor.score,
    "magnitude": magnitude.score,
    "activation": activation.score,
    "random": random.score,
    "obs": obs.score,
}
