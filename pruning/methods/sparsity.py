"""Unstructured sparsity: single weights are zero, and the shapes stay.

Dense kernels multiply by the zeros as by anything else, so a model gets no faster; only the 2:4 pattern does, on GPUs
that have kernels for it. Its accuracy and throughput are measured like those of any other method.

The weights are those of the blocks' linear layers: embedding, norms, biases and classifier stay dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.errors import SettingError
from pruning.model.anatomy import blocks_of, parts_of

Masks = dict[str, Tensor]
"""Layer name -> bool, of the weight's shape; True where the weight stays."""

MaskSchedule = Callable[[nn.Module, int, int], Masks | None]
"""A function that chooses masks as a training goes on. It is called before every step with the model, the number of the
step, from 0, and that of all steps; it returns the masks from here on, or None where those in force stay. It has no
memory, so that a training can go on from its state."""


@dataclass(frozen=True)
class Pattern:
    """An N:M pattern: `keep` of every `group` weights in a row of inputs stay."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group:
            raise SettingError(f"pattern {self.keep}:{self.group} keeps nothing or everything; give 1 to group - 1")


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of all blocks: `3.fc1` is the fourth block's first MLP layer."""
    for index, block in enumerate(blocks_of(model)):
        parts = parts_of(block)
        for name in ("qkv", "proj", "fc1", "fc2"):
            yield f"{index}.{name}", getattr(parts, name)


def magnitude_masks(model: nn.Module, sparsity: float) -> Masks:
    """Keeps the largest weights of all layers together (global magnitude).

    Args:
        sparsity: share of the weights that go, in [0, 1); of equal ones the later go first.

    Raises:
        SettingError: the sparsity is out of range.
    """
    if not 0 <= sparsity < 1:
        raise SettingError(f"sparsity {sparsity} is out of range; give 0 at least, and less than 1")
    layers = dict(sparse_layers(model))
    sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in layers.values()])
    kept = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[sizes.argsort(descending=True, stable=True)[: len(sizes) - round(sparsity * len(sizes))]] = True
    masks, start = Masks(), 0
    for name, layer in layers.items():
        masks[name] = kept[start : start + layer.weight.numel()].view_as(layer.weight)
        start += layer.weight.numel()
    return masks


def pattern_masks(model: nn.Module, pattern: Pattern) -> Masks:
    """Keeps the largest `keep` of every `group` neighbours along a layer's inputs; of equal ones the first.

    Raises:
        SettingError: a layer's inputs are not whole groups (names it).
    """
    masks = Masks()
    for name, layer in sparse_layers(model):
        if layer.in_features % pattern.group:
            raise SettingError(f"layer {name} has {layer.in_features} inputs, which are no groups of {pattern.group}")
        groups = layer.weight.detach().abs().unflatten(1, (-1, pattern.group))
        best = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.keep]
        masks[name] = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).flatten(1)
    return masks


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets the weights that are masked to 0, in place."""
    for name, layer in sparse_layers(model):
        layer.weight.mul_(masks[name])


def sparsity_of(model: nn.Module) -> float:
    """Share of the blocks' weights that are 0, counted; in [0, 1]."""
    weights = [layer.weight.detach() for _, layer in sparse_layers(model)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def gradual(step: int, num_steps: int, final: float) -> float:
    """The sparsity at a step of a cubic schedule from 0 to `final` (Zhu and Gupta 2017): fast first, then slower."""
    done = min(1.0, (step + 1) / num_steps)
    return final * (1 - (1 - done) ** 3)


@dataclass(frozen=True, kw_only=True)
class GradualMagnitude:
    """A `MaskSchedule` that keeps the largest weights of all layers together, ever fewer (Zhu and Gupta 2017).

    A masked weight is 0, the smallest, and so does not come back.
    """

    sparsity: float
    """Share of the blocks' weights that are gone at the end, in [0, 1)."""
    share: float = 0.6
    """Share of the steps after which the masks stay as they are; in (0, 1]."""
    every: int = 10
    """Steps from one choice to the next."""

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise SettingError(f"sparsity {self.sparsity} is out of range; give 0 at least, and less than 1")
        if not 0 < self.share <= 1:
            raise SettingError(f"share {self.share} is out of range; give more than 0, and 1 at most")
        if self.every < 1:
            raise SettingError(f"every {self.every} is out of range; give 1 at least")

    def __call__(self, model: nn.Module, step: int, total_steps: int) -> Masks | None:
        """Chooses the masks from a step on, counted from 0; None where those before stay."""
        num_steps = max(1, round(self.share * total_steps))
        is_last = step == num_steps - 1
        if not is_last and (step >= num_steps or step % self.every):
            return None
        return magnitude_masks(model, gradual(step, num_steps, self.sparsity))


@torch.no_grad()
def scale_to_fan_in(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Scales every output's weights up by sqrt(inputs / inputs that stay), in place (Evci et al. 2022).

    A layer that is drawn for all its inputs and then masked gives a signal, and a gradient, that is too small.
    """
    for name, layer in sparse_layers(model):
        left = masks[name].sum(dim=1, keepdim=True).clamp_min(1)
        layer.weight.mul_((layer.in_features / left).sqrt())
