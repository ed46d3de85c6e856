"""Depth exits: the model answers after an earlier block, through a classifier of the exit's own (WDPruning).

An exit's classifier is a copy of the model's tail (final norm and head, both heads of a distilled DeiT; a new one where
the stream has another width there, as after an earlier stage of a Swin), fitted to the features after its block. The
blocks stay frozen, so one pass over the images gives the features of every exit.

B images, T tokens that the tail reads, C width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pruning.data import Images
from pruning.device_sharing import yielding_between
from pruning.errors import PlanError
from pruning.losses import distillation_loss
from pruning.model.anatomy import TAIL_PREFIXES, Anatomy, blocks_of, classify, embed, examine, tail_tokens, with_blocks
from pruning.precision import Precision, autocast

ExitHead = dict[str, Tensor]
"""The parameters of one exit's tail (norm and classifier), by the names they have in the model."""


def exit_head_of(model: nn.Module) -> ExitHead:
    """Copies the parameters of the model's own tail."""
    state = model.state_dict()
    return {name: state[name].clone() for name in state if name.startswith(TAIL_PREFIXES)}


def truncate(model: nn.Module, exit_block: int, exit_head: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Copies the model so that it answers after `exit_block` blocks.

    Args:
        exit_head: that exit's norm and classifier; by default the model's own.

    Raises:
        PlanError: the model cannot answer after so many blocks.
    """
    _check_exit(exit_block, examine(model))
    shorter = with_blocks(model, [copy.deepcopy(block) for block in blocks_of(model)[:exit_block]])
    if exit_head is not None:
        missing, unknown = shorter.load_state_dict(dict(exit_head), strict=False)
        assert not unknown and not any(name.startswith(TAIL_PREFIXES) for name in missing)
    return shorter


def _check_exit(exit_block: int, anatomy: Anatomy) -> None:
    if not 1 <= exit_block <= anatomy.depth:
        raise PlanError(
            f"exit after block {exit_block} of a model with {anatomy.depth} blocks; give 1 to {anatomy.depth}"
        )
    if exit_block not in anatomy.exits:
        ends = ", ".join(map(str, anatomy.exits))
        raise PlanError(f"exit after block {exit_block} is within a stage; give the end of one: {ends}")


def fit_exits(
    model: nn.Module,
    images: Images,
    exit_blocks: Sequence[int],
    *,
    epochs: int = 60,
    learning_rate: float = 2e-3,
    distillation: float = 0.5,
    batch_size: int = 64,
    precision: Precision = "float32",
    seed: int = 0,
) -> dict[int, ExitHead]:
    """Fits the classifiers of several exits, each on cached features; the model is left as it was.

    Loss: (1 - distillation) * cross-entropy + distillation * KL(dense logits || exit logits); AdamW, cosine schedule.

    Args:
        exit_blocks: the model answers after this many blocks, 1 to depth; the depth itself gets the model's own tail.
        distillation: weight of the dense logits, in [0, 1].

    Returns:
        The fitted tail of each exit, by its exit block.

    Raises:
        PlanError: the model cannot answer after so many blocks.
    """
    anatomy = examine(model)
    depth = anatomy.depth
    for exit_block in exit_blocks:
        _check_exit(exit_block, anatomy)
    earlier = sorted(set(exit_blocks) - {depth})
    exit_heads: dict[int, ExitHead] = {}
    if earlier:
        features, logits = _features(model, images, earlier, batch_size, precision)
        for exit_block in earlier:
            exit_heads[exit_block] = _fit(
                truncate(model, exit_block), features[exit_block], images.labels.to(logits.device), logits,
                epochs=epochs, learning_rate=learning_rate, distillation=distillation, seed=seed,
            )  # fmt: skip
    return exit_heads | ({depth: exit_head_of(model)} if depth in exit_blocks else {})


@torch.no_grad()
def _features(
    model: nn.Module, images: Images, exit_blocks: Sequence[int], batch_size: int, precision: Precision
) -> tuple[dict[int, Tensor], Tensor]:
    """Returns the tokens that each exit's tail reads, (B, T, C), and the dense logits, (B, K)."""
    device = next(model.parameters()).device
    kept: dict[int, list[Tensor]] = {exit_block: [] for exit_block in exit_blocks}
    logits = []
    with autocast(device, precision):
        for batch, _ in images.batches(batch_size, device):
            x = embed(model, batch)
            for index, block in enumerate(blocks_of(model), start=1):
                x = block(x)
                if index in kept:
                    kept[index].append(tail_tokens(model, x).float())
            logits.append(classify(model, x).float())
    return {exit_block: torch.cat(parts) for exit_block, parts in kept.items()}, torch.cat(logits)


def _fit(
    tail: nn.Module,
    features: Tensor,
    labels: Tensor,
    dense_logits: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    distillation: float,
    seed: int,
) -> ExitHead:
    parameters = [value for name, value in tail.named_parameters() if name.startswith(TAIL_PREFIXES)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    size = min(256, len(features))
    steps = epochs * -(-len(features) // size)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in yielding_between(torch.randperm(len(features), generator=generator).split(size)):
            chosen = chosen.to(features.device)
            logits = classify(tail, features[chosen])
            loss = distillation_loss(logits, labels[chosen], dense_logits[chosen], teacher_weight=distillation)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return exit_head_of(tail)
