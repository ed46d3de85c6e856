"""The diagnosis of a dense model that is near chance on val: its labels are wrong, or it is broken.

K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.dataset.files import natural_key
from pruning.errors import DataError, ModelError, VitfrontError
from pruning.measure.accuracy import wilson_interval
from pruning.measure.relabelling import UNSEEN, Answers, best_relabelling, best_shift, moved_classes
from search.config import Config

NEAR = 0.05
"""An accuracy is near chance up to this part of the way from chance to 1."""

WORKS = 0.4
"""A renumbering of the labels has put a model right from this part of the way on. A classifier of random weights on top
of good features gets a quarter of the way, in ten classes."""

AS_GOOD = 0.9
"""A cause is named in the place of another one that explains more if it explains this share of it."""

MAP_HINT = "give data.class_map, the names of all classes in the model's order"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A way in which labels may be wrong."""

    mapping: Tensor
    """(K,), int64, the class that each label means, or `UNSEEN`, or `NOTHING`."""
    text: str
    """The fault of the labels, and what to do."""


def is_near_chance(answers: Answers) -> bool:
    """Tells whether answers are hardly better than guesses, and there are enough of them to be sure.

    The 95 % interval of their accuracy reaches down to `Answers.chance`, or nearly so (`NEAR`), and it ends below the
    middle between chance and 1. A few images have a wide interval: 6 of 10 right in two classes are no fault.
    """
    _, high = wilson_interval(answers.top1, len(answers))
    return reaches_chance(answers) and high < _beyond(answers.chance, 0.5)


def reaches_chance(answers: Answers) -> bool:
    """Tells whether the accuracy of answers cannot be told from chance: they are guesses, or too few to tell."""
    low, _ = wilson_interval(answers.top1, len(answers))
    return low <= _beyond(answers.chance, NEAR)


def diagnose(
    config: Config, val: Answers, answer_training: Callable[[], Answers], num_classes: int, names: Sequence[str]
) -> VitfrontError | None:
    """Finds out whether answers on val are wrong, and why.

    They are if they are near chance, or if most images lie in `moved_classes` and a renumbering of the labels puts them
    right.

    Args:
        answer_training: gives the answers to training images. The labels are renumbered to fit these, and tried on val:
            with many classes and few images, there is always a numbering that fits the answers that it was made for.
        names: name of each class, as far as they are known.
    """
    is_guessed = is_near_chance(val)
    if not is_guessed and not _most_are_moved(val, num_classes):
        return None
    training = answer_training()
    is_wrong_in_training = is_near_chance(training) or _most_are_moved(training, num_classes)
    fit, check = (training, val) if is_wrong_in_training else (val.take(slice(0, None, 2)), val.take(slice(1, None, 2)))
    share, text = explain(check, label_causes(fit, num_classes, config, names))
    fault = f"near chance ({val.chance:.3f})" if is_guessed else "and most images have the label of others"
    head = f"dense top-1 on val is {val.top1:.3f} ({len(val)} images), {fault}"
    if text is not None:
        return DataError(f"{head}: with the labels renumbered it is {share:.3f}, so they are wrong; {text}")
    if not is_guessed:
        return None
    if not is_wrong_in_training:
        return DataError(
            f"{head}, but {training.top1:.3f} on training images: the labels of val are not those of train, or the "
            "model knows its training images by heart; compare data.train and data.val"
        )
    if config.model.training is not None:
        return ModelError(
            f"{head}, and {training.top1:.3f} on training images: the training failed; change model.training "
            "(learning_rate, epochs), or look at the images and their labels"
        )
    return ModelError(
        f"{head}, and renumbering the labels does not help (at best {share:.3f}): the weights or the pixels are wrong; "
        "check model.checkpoint, model.checkpoint_key, model.args, data.mean and data.std; "
        "model.expected_top1=0 takes the model as it is"
    )


def explain(answers: Answers, causes: Sequence[Cause]) -> tuple[float, str | None]:
    """Finds the first cause that makes answers right, nearly as well as the best cause.

    Args:
        answers: others than those that the causes were made for.

    Returns:
        The share of right answers if the labels are renumbered so, and the cause's text; without such a cause the
        largest share, and None.
    """
    found = [answers.relabelled(cause.mapping) for cause in causes]
    best = max(share for share, _ in found)
    _, high = wilson_interval(answers.top1, len(answers))
    for (share, count), cause in zip(found, causes, strict=True):
        if not count or share < AS_GOOD * best:
            continue
        low, _ = wilson_interval(share, count)
        if low > high and share > max(2 * answers.top1, _beyond(answers.chance, WORKS)):
            return share, cause.text
    return best, None


def label_causes(answers: Answers, num_classes: int, config: Config, names: Sequence[str]) -> list[Cause]:
    """Lists what may be wrong with labels, the simplest first: their order, a shift by one, any other numbering.

    Args:
        answers: the answers that the shift and the other numbering fit best.
    """
    causes = _orders(num_classes, config, names)
    shift = best_shift(answers, num_classes)
    if shift is not None:
        first, last = name_of(names, shift.first), name_of(names, shift.last)
        until = "on" if shift.last >= int(answers.labels.max()) else f"to {last}"
        problem = "a class folder were missing" if shift.step > 0 else "there were a class folder too many"
        text = f"from {first} {until} every label is shifted by one, as if {problem} before it; {MAP_HINT}"
        causes.append(Cause(mapping=shift.mapping(num_classes), text=text))
    mapping = best_relabelling(answers, num_classes)
    moved = ((mapping >= 0) & (mapping != torch.arange(num_classes))).nonzero().flatten().tolist()
    shown = [f"{name_of(names, label)} is the model's class {int(mapping[label])}" for label in moved[:3]]
    text = f"{', '.join(shown)}{', ...' if len(moved) > 3 else ''}; {MAP_HINT}"
    return [*causes, Cause(mapping=mapping, text=text)]


def name_of(names: Sequence[str], label: int) -> str:
    """Gives the name of a class, or its number where it has no name."""
    return repr(names[label]) if label < len(names) else f"label {label}"


def _orders(num_classes: int, config: Config, names: Sequence[str]) -> list[Cause]:
    """Lists the orders in which torchvision and timm sort classes, where these stand in another one."""
    causes: list[Cause] = []
    if len(names) > num_classes:  # classes that the model does not have: no label is one of them
        return causes
    for library, key in (("torchvision", None), ("timm", natural_key)):
        order = sorted(names, key=key)
        place = {name: index for index, name in enumerate(order)}
        different = [index for index, name in enumerate(order) if names[index] != name]
        if not different:
            continue
        mapping = torch.full((num_classes,), UNSEEN)
        mapping[: len(names)] = torch.tensor([place[name] for name in names])
        shown = range(different[0], min(different[0] + 3, len(order)))
        folders, numbers = ", ".join(order[index] for index in shown), ", ".join(map(str, shown))
        remedy = "" if config.data.class_map is None else "data.class_map=null and "
        text = (
            f"your folders {folders} ... are the model's classes {numbers} ... (as {library} sorts): set {remedy}"
            f"data.class_order={library}"
        )
        causes.append(Cause(mapping=mapping, text=text))
    return causes


def _most_are_moved(answers: Answers, num_classes: int) -> bool:
    return 2 * sum(moved.num_images for moved in moved_classes(answers, num_classes)) > len(answers)


def _beyond(chance: float, part: float) -> float:
    """Gives the accuracy that lies so far on the way from chance to 1."""
    return chance + part * (1 - chance)
