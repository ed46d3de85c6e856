"""Tiny models, images and plans, all from a seed; and combinations of parameters that are fewer than all.

Parameters are drawn wide: at timm's own initialisation (0.02, no bias) a block barely changes its input, and a
pruned model equals the dense one whatever is wrong with it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.measure.widths import AllowedWidths
from pruning.model.anatomy import Anatomy, examine
from pruning.plan import BlockPlan, Indices, Plan, TokenReduction
from pruning.repair.flow import CalibrationStream
from pruning.repair.sensitivity import measure_sensitivity
from pruning.training import Jitter, TrainSettings, train

ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 7,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "average_pooling": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "registers_average": ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 2}),
    "registers_alone": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "reg_tokens": 2}),
    "layer_scale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "no_qkv_bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
}


def model(family: str = "vit", *, seed: int = 0, **args: Any) -> nn.Module:
    """A random dense model in eval mode."""
    name, more = FAMILIES[family]
    return randomised(timm.create_model(name, **(ARGS | more | args)), seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model itself, its parameters drawn wide, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_gain = key.endswith("gamma") or ("norm" in key and key.endswith("weight"))
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(is_gain))
    return model.eval()


def images(
    count: int = 12, *, seed: int = 0, num_classes: int = 7, size: tuple[int, int] = (32, 32), channels: int = 3
) -> Images:
    """Noise with random labels."""
    generator = torch.Generator().manual_seed(seed)
    return Images(
        pixels=torch.randint(0, 256, (count, channels, *size), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, num_classes, (count,), generator=generator),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def batch(count: int = 4, *, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def plan(anatomy: Anatomy, *, seed: int = 0, num_tokens: Sequence[int] | None = None) -> Plan:
    """A random plan: every block of other heads and widths; `num_tokens` a block (default: all stay)."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    def some(count: int, kept: int) -> Indices:
        return tuple(sorted(torch.randperm(count, generator=generator)[:kept].tolist()))

    blocks = []
    for index, dense in enumerate(anatomy.blocks):
        heads = some(dense.num_heads, drawn(1, dense.num_heads))
        qk, v = drawn(1, dense.head_dim - 1), drawn(1, dense.head_dim - 1)
        qk = dense.head_dim if dense.has_qk_norm else qk
        blocks.append(
            BlockPlan(
                keep_heads=heads,
                keep_qk=tuple(some(dense.head_dim, qk) for _ in heads),
                keep_v=tuple(some(dense.head_dim, v) for _ in heads),
                keep_hidden=some(dense.num_hidden, drawn(1, dense.num_hidden - 1)),
                num_tokens=dense.num_patches if num_tokens is None else num_tokens[index],
            )
        )
    return Plan(blocks=tuple(blocks))


def calibration_stream(
    model: nn.Module, images: Images, index: int, kind: TokenReduction = "lfe", *, batch_size: int = 64
) -> CalibrationStream:
    """The images as they enter block `index` of a model that is not pruned."""
    sensitivity = measure_sensitivity(model, images, batch_size=batch_size)
    stream = CalibrationStream(
        model, images, sensitivity, token_reduction=kind, cutoff_token=0.85, batch_size=batch_size
    )
    for block in stream.blocks[:index]:
        stream.advance(block)
    return stream


def allowed_widths(seed: int, head_dim: int = 8, num_hidden: int = 96) -> AllowedWidths:
    """Allowed widths of no pattern, the dense widths among them."""
    generator = random.Random(seed)
    pairs = generator.sample(list(itertools.product(range(1, head_dim + 1), repeat=2)), 6)
    hidden = {*generator.sample(range(1, num_hidden), 5), num_hidden}
    return AllowedWidths(attention=(*pairs, (head_dim, head_dim)), hidden=tuple(sorted(hidden)))


def toy_images(count: int, *, seed: int) -> Images:
    """Four classes that a tiny model learns in a second, not perfectly: four smooth patterns under noise."""
    patterns = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    smooth = torch.nn.functional.interpolate(patterns, size=(32, 32), mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    strength = 0.15 + torch.rand(count, 1, 1, 1, generator=generator)
    noisy = strength * smooth[labels] + 1.5 * torch.randn(count, 3, 32, 32, generator=generator)
    pixels = (128 + 40 * noisy).clamp(0, 255).to(torch.uint8)
    return Images(pixels=pixels, labels=labels, mean=(0.5,) * 3, std=(0.25,) * 3)


def toy_model(family: str = "vit", *, seed: int = 0, **args: Any) -> nn.Module:
    """A model that was trained on the toy images, from `seed`; a fresh copy at every call."""
    return copy.deepcopy(_toy_model(family, seed, tuple(sorted(args.items()))))


@functools.cache
@torch.enable_grad()  # the first test that wants it may run without
def _toy_model(family: str, seed: int, args: tuple[tuple[str, Any], ...]) -> nn.Module:
    trained = model(family, seed=seed, num_classes=4, **dict(args))
    settings = TrainSettings(
        epochs=12, batch_size=64, learning_rate=1e-2, warmup_epochs=1, jitter=Jitter(max_shift=0), seed=seed
    )
    train(trained, toy_images(256, seed=1), settings)
    return trained


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors, to compare with later."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def every_pair(*choices: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations of parameters in which every two values of two of them meet; always the same ones."""
    places = list(itertools.combinations(range(len(choices)), 2))
    combinations = list(itertools.product(*choices))

    def pairs(chosen: tuple[Any, ...]) -> set[tuple[int, int, Any, Any]]:
        return {(one, other, chosen[one], chosen[other]) for one, other in places}

    missing = set().union(*map(pairs, combinations))
    taken = []
    while missing:
        taken.append(max(combinations, key=lambda chosen: len(pairs(chosen) & missing)))
        missing -= pairs(taken[-1])
    return taken


def in_rotation(ones: Sequence[Any], others: Sequence[Any], times: int) -> list[tuple[Any, Any]]:
    """Every one with so many of the others, which take turns."""
    turns = itertools.cycle(others)
    return [(one, next(turns)) for one in ones for _ in range(times)]


def anatomy(family: str = "vit", **args: Any) -> Anatomy:
    return examine(model(family, **args))
