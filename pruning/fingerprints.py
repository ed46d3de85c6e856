"""Fingerprints: short hashes by which weights and images are told apart.

A hash is BLAKE2b of 128 bits: two contents that differ have different ones for all practical purposes. Tensors are
hashed where they lie, without a copy; images one by one in parallel, some 2 GB a second on two cores.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NUM_BYTES = 16
"""Size of a hash."""


def fingerprint_of_text(text: str) -> str:
    """Returns the hash of a text, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=NUM_BYTES).hexdigest()


def fingerprint_of_record(record: DataclassInstance) -> str:
    """Returns the hash of a dataclass's plain values, 32 hexadecimal digits.

    A value of None is left out, so that a field which is added later, None as before, keeps the hash.
    """
    values = {name: value for name, value in asdict(record).items() if value is not None}
    return fingerprint_of_text(json.dumps(values, sort_keys=True))


def fingerprint_of_weights(weights: Mapping[str, Tensor]) -> str:
    """Returns the hash of a model's tensors, 32 hexadecimal digits: names, types, shapes and values, in any order."""
    hasher = hashlib.blake2b(digest_size=NUM_BYTES)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(_bytes_of(tensor))
    return hasher.hexdigest()


def image_hashes(pixels: Tensor) -> list[bytes]:
    """Returns the hash of each image's pixels, whatever its label.

    Args:
        pixels: (B, ...), uint8.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_hash_one, pixels))


def fingerprint_of_images(hashes: Iterable[bytes], labels: Tensor) -> str:
    """Returns the hash of images with their labels, 32 hexadecimal digits; their order counts.

    Args:
        hashes: of each image, as `image_hashes` gives them.
        labels: (B,), int64.
    """
    hasher = hashlib.blake2b(b"".join(hashes), digest_size=NUM_BYTES)
    hasher.update(_bytes_of(labels.contiguous()))
    return hasher.hexdigest()


def _hash_one(image: Tensor) -> bytes:
    return hashlib.blake2b(_bytes_of(image.contiguous()), digest_size=NUM_BYTES).digest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Views a contiguous tensor's memory as bytes."""
    array: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.data
