"""Accuracy image by image: a model that is beaten beyond doubt is not measured on all of val.

A rival is a model that was measured on all images and is faster beyond doubt. On the same images the difference of two
models varies far less than the accuracy of either, so a hundred images often tell which one is better.

B images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_IMAGES = 96
"""A model is beaten on no fewer images."""

NUM_LOOKS = 16
"""The number of times that a model is compared with its rivals, evenly over the images."""

CONFIDENCE = 3.5
"""A model is beaten if it is that many standard errors below a rival: at `NUM_LOOKS` looks, in less than
one case in 250 wrongly."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A model that was measured on all images."""

    top1: float
    """Its accuracy, in [0, 1]."""
    speedup_low: float
    """Lower end of the 95 % interval of its speed-up."""
    right: bytes
    """One bit an image, in the order of `shuffled`: 1 where its answer is right."""

    @classmethod
    def of(cls, right: NDArray[np.bool_], speedup_low: float) -> Rival:
        """Makes a rival of its right answers, (B,)."""
        return cls(top1=float(right.mean()), speedup_low=speedup_low, right=np.packbits(right).tobytes())

    def right_of_first(self, count: int) -> NDArray[np.bool_]:
        """Tells which of the first images it answers right: (count,)."""
        return np.unpackbits(np.frombuffer(self.right, dtype=np.uint8), count=count).astype(np.bool_)


class RivalStore(Protocol):
    """Rivals by the ids of their trials; a dict is one."""

    def values(self) -> Iterable[Rival]: ...

    def __setitem__(self, key: str, rival: Rival, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The answers of a model, as far as it was looked at."""

    right: NDArray[np.bool_]
    """(n,), for the first images in the order of `shuffled`; n = B unless it is beaten."""
    top1: float
    """Accuracy on all B images; if it is beaten, that of the rival plus their difference on the first n."""


def shuffled(count: int) -> Tensor:
    """Gives the order in which images are looked at: the same for all models, and no class before another. (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def judge_answers(
    answer: Callable[[slice], NDArray[np.bool_]], count: int, rivals: Iterable[Rival], speedup_high: float
) -> Judged:
    """Looks at a model's answers until it is beaten, or at all of them.

    Args:
        answer: images, of the order of `shuffled` -> whether each is answered right, (n,).
        count: B.
        rivals: those that are not faster than `speedup_high` beyond doubt are left alone.
        speedup_high: upper end of the 95 % interval of the model's speed-up.
    """
    faster = [rival for rival in rivals if rival.speedup_low > speedup_high]
    step = max(1, math.ceil(count / NUM_LOOKS))
    right = np.zeros(0, dtype=np.bool_)
    for start in range(0, count, step):
        right = np.append(right, answer(slice(start, min(start + step, count))))
        if MIN_IMAGES <= len(right) < count:
            lost = [rival.top1 - lead for rival in faster if (lead := _lead(right, rival, count)) is not None]
            if lost:
                return Judged(right=right, top1=max(0.0, min(lost)))
    return Judged(right=right, top1=float(right.mean()))


def _lead(right: NDArray[np.bool_], rival: Rival, count: int) -> float | None:
    """Computes by how much a rival is better on the first images; None if that might be chance."""
    seen = len(right)
    difference = rival.right_of_first(seen).astype(np.float64) - right
    lead = float(difference.mean())
    # The images are drawn without replacement; a difference that was never seen may still occur.
    variance = (difference.var() + 1 / seen) / seen * (1 - seen / count)
    return lead if lead > CONFIDENCE * math.sqrt(variance) else None
