"""The sets of weights in a checkpoint that may be a model's, each with the prefix under which they are there.

The prefix is what stands before the model's own names: `state_dict_ema.module.` where a mapping `state_dict_ema` holds
`module.cls_token`. The wrappers of a file and those of a model are so found alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Candidate:
    """A set of weights of a file, under the names that the model may know."""

    prefix: str
    mapping: str
    """The dotted name of the mapping with the weights: the outer part of the prefix."""
    weights: dict[str, Any]
    sources: frozenset[str] = frozenset()
    """The dotted names in the file of what is in `weights`."""
    changes: tuple[str, ...] = ()
    """Remarks on the conversion by timm's rules."""


def find_candidates(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> list[Candidate]:
    """Finds the prefixes under which the file has at least half of the model's names, the fullest first."""
    counts: Counter[str] = Counter()
    for name in checkpoint.values:
        start = 0
        while start >= 0:
            if name[start:] in state:
                counts[name[:start]] += 1
            start = name.find(".", start) + 1 or -1
    prefixes = [prefix for prefix, count in counts.most_common() if 2 * count >= len(state)]
    return [_candidate(checkpoint, state, prefix) for prefix in prefixes]


def _candidate(checkpoint: Checkpoint, state: Mapping[str, Tensor], prefix: str) -> Candidate:
    """Takes the model's names under a prefix, and the tensors beside them in the same mappings."""
    values = checkpoint.values
    mappings = {checkpoint.mappings[prefix + name] for name in state if prefix + name in values}
    weights = {
        name[len(prefix) :]: value
        for name, value in values.items()
        if name.startswith(prefix)
        and (name[len(prefix) :] in state or (isinstance(value, Tensor) and checkpoint.mappings[name] in mappings))
    }
    outer = min(mappings, key=len)
    return Candidate(
        prefix, outer if prefix.startswith(outer) else prefix, weights, frozenset(prefix + name for name in weights)
    )


def whole_mappings(checkpoint: Checkpoint) -> list[Candidate]:
    """Takes each mapping that has tensors, as a whole, for timm's conversions to look at."""
    tensors: dict[str, dict[str, Any]] = {}
    for name, value in checkpoint.values.items():
        if isinstance(value, Tensor):
            mapping = checkpoint.mappings[name]
            tensors.setdefault(mapping, {})[name[len(mapping) :]] = value
    return [
        Candidate(mapping, mapping, weights, frozenset(mapping + name for name in weights))
        for mapping, weights in tensors.items()
    ]


def with_key(candidates: Sequence[Candidate], key: str) -> list[Candidate]:
    """Gives the candidates below a name of the file, or those outside all names if the key is empty."""
    start = f"{key.rstrip('.')}."
    return [each for each in candidates if (each.prefix.startswith(start) if key else not each.prefix)]


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Gives the first candidate of each prefix."""
    return list({candidate.prefix: candidate for candidate in reversed([*candidates])}.values())[::-1]


def are_equal(one: Candidate, other: Candidate) -> bool:
    """Tells whether two candidates have the same names with the same values."""
    pairs: list[tuple[Any, Any]] = [(value, other.weights.get(name)) for name, value in one.weights.items()]
    return len(one.weights) == len(other.weights) and all(
        a is b or (_is_plain(a) and _is_plain(b) and torch.equal(a, b)) for a, b in pairs
    )


def _is_plain(value: Any) -> bool:
    """Tells whether a value is a tensor that can be compared."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def keys_of(candidates: Sequence[Candidate], others: Sequence[Candidate]) -> str:
    """Lists the values of model.checkpoint_key that choose among sets of weights."""
    keys = [outer_part(candidate, [*others, *candidates]) or candidate.prefix for candidate in candidates]
    return ", ".join(key.rstrip(".") or '""' for key in keys)


def outer_part(candidate: Candidate, others: Sequence[Candidate]) -> str:
    """Gives the part of the prefix that tells a set of weights from others: its mapping alone where that suffices."""
    alone = all(other.prefix == candidate.prefix or other.mapping != candidate.mapping for other in others)
    return candidate.mapping if alone else candidate.prefix
