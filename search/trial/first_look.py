"""The first look at a dense model: its top-1 accuracy on val, before anything is spent on a model that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pruning.data import Images, Splits
from pruning.errors import DataError, ModelError, VitfrontError
from pruning.measure.accuracy import top1, wilson_interval
from pruning.measure.relabelling import Answers, moved_classes
from pruning.measure.stopwatch import fastest_precision, keep_freed_memory
from pruning.precision import Precision
from pruning.training import train
from search.config import Config
from search.trial.context import lease_on
from search.trial.diagnosis import MAP_HINT, diagnose, is_near_chance, name_of, reaches_chance
from search.trial.inputs import Inputs
from search.trial.measure import finite_logits

Answering = Callable[[Config, nn.Module, Images, Precision], torch.Tensor]
"""`search.trial.measure.finite_logits`, or one that shares the work."""

NUM_TRAINING_IMAGES = 5000
"""Number of training images that a diagnosis looks at."""


@dataclass(frozen=True, kw_only=True)
class FirstLook:
    """The dense model's accuracy on val, and what is wrong with it."""

    precision: Precision
    """The precision in which the model is measured."""
    top1: float
    """Accuracy on val, in [0, 1]."""
    num_images: int
    """Number of val images."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each."""
    fault: VitfrontError | None = None
    """The reason why the model is not to be pruned; None if it is all right."""

    @property
    def line(self) -> str:
        """The accuracy with its 95 % interval, for people."""
        low, high = wilson_interval(self.top1, self.num_images)
        return f"dense top-1 on val {self.top1:.3f} ({low:.3f} to {high:.3f}, {self.num_images} images)"


def look(
    config: Config, inputs: Inputs, *, device: torch.device | None = None,
    when_trained: Callable[[Precision], None] = lambda precision: None, answer: Answering = finite_logits,
) -> FirstLook:  # fmt: skip
    """Trains the dense model if the recipe says so, and measures its top-1 on val: once a sweep, before all else.

    Training images are looked at only where something is wrong, to find out what.

    Args:
        inputs: its model is moved and trained in place.
        device: the device to work on; by default this machine's first GPU, or else the CPU.
        when_trained: called with the precision as soon as that and the weights are final.
        answer: gives the logits of the model on images.

    Raises:
        VitfrontError: the training diverged, or the dense model's logits are not finite. All other faults are told in
            what it returns, for `tell` to raise.
    """
    keep_freed_memory()
    model = _trained(config, inputs, device or local_device())
    precision = _precision(config, model, inputs.splits)
    when_trained(precision)
    val = inputs.splits.val
    logits = answer(config, model, val, precision)

    def answer_training() -> Answers:
        images = inputs.splits.training.take(slice(0, NUM_TRAINING_IMAGES))
        return _answers(answer(config, model, images, precision), images)

    answers = _answers(logits, val)
    notes, fault = judge(config, answers, answer_training, logits.shape[1], inputs.classes or ())
    return FirstLook(
        precision=precision, top1=top1(logits, val.labels), num_images=len(val), notes=tuple(notes), fault=fault
    )


def judge(
    config: Config, val: Answers, answer_training: Callable[[], Answers], num_classes: int, names: Sequence[str] = ()
) -> tuple[list[str], VitfrontError | None]:
    """Finds what is wrong with a model's answers on val.

    A model that is untrained on purpose, or searched by retrieval and so perhaps without a classifier, is held to
    `model.expected_top1` alone; if that is 0, any model is right.

    Args:
        answer_training: gives the answers to training images; called only if those on val are wrong.
        names: name of each class, as far as they are known.

    Returns:
        Remarks, and the reason why the model is not to be pruned, or None.
    """
    notes: list[str] = []
    expected = config.model.expected_top1
    if not config.model.untrained and expected != 0 and config.search.accuracy == "top1":
        if len(val.labels.unique()) == 1:
            only = name_of(names, int(val.labels[0]))
            return notes, DataError(f"all {len(val)} val images are of one class, {only}; give images of several")
        fault = diagnose(config, val, answer_training, num_classes, names)
        if fault is not None:
            return notes, fault
        notes = _remarks(val, num_classes, names)
    low, high = wilson_interval(val.top1, len(val))
    if expected is not None and high < expected:
        return notes, ModelError(
            f"dense top-1 on val is {val.top1:.3f} ({low:.3f} to {high:.3f}), below model.expected_top1, {expected:g}; "
            "check the weights, data.mean and data.std, and the labels, or expect less"
        )
    return notes, None


def tell(first: FirstLook, notes: Sequence[str], say: Callable[[str], None]) -> None:
    """Tells the accuracy and all remarks, then raises what is wrong.

    Args:
        notes: remarks on the inputs; they follow the accuracy.
        say: called with one line of text each.

    Raises:
        VitfrontError: `first.fault`.
    """
    say(first.line)
    for note in (*notes, *first.notes):
        say(f"note: {note}")
    if first.fault is not None:
        raise first.fault


def local_device() -> torch.device:
    """Gives the device of this machine: its first GPU, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _remarks(val: Answers, num_classes: int, names: Sequence[str]) -> list[str]:
    """Notes what is odd about answers that are not wrong as a whole."""
    notes = []
    if reaches_chance(val):
        assert not is_near_chance(val)
        notes.append(f"{len(val)} val images are too few to tell this model from chance ({val.chance:.3f})")
    moved = moved_classes(val, num_classes)
    if moved:
        shown = [
            f"{one.num_moved} of {one.num_images} val images of {name_of(names, one.label)} as class {one.meant}"
            for one in moved[:3]
        ]
        more = f" and {len(moved) - 3} classes more" if len(moved) > 3 else ""
        notes.append(f"the model answers {', '.join(shown)}{more}: their labels may be wrong; if so, {MAP_HINT}")
    return notes


def _answers(logits: torch.Tensor, images: Images) -> Answers:
    return Answers(predicted=logits.argmax(dim=1).cpu(), labels=images.labels)


def _trained(config: Config, inputs: Inputs, device: torch.device) -> nn.Module:
    """Gives the dense model on the device, in eval mode, without gradients."""
    model: nn.Module = inputs.model.to(device)
    if config.model.training is not None and not inputs.trained:
        train(model, inputs.splits.training, config.model.training.settings())
    return model.eval().requires_grad_(False)


def _precision(config: Config, model: nn.Module, splits: Splits) -> Precision:
    if config.measure.precision != "auto":
        return config.measure.precision
    device = next(model.parameters()).device
    batch = splits.val.normalized(slice(0, config.measure.batch_size), device)
    with lease_on(device).exclusive():
        return fastest_precision(model, batch)
