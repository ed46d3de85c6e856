"""Fingerprints: equal contents have equal ones, whatever the memory's order; any change of a value changes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pruning.fingerprints import (
    fingerprint_of_images,
    fingerprint_of_record,
    fingerprint_of_text,
    fingerprint_of_weights,
    image_hashes,
)


def weights() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1, dtype=torch.int64)}


def pixels() -> Tensor:
    return torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_hash_of_an_image_is_blake2b_of_its_bytes() -> None:
    expected = [hashlib.blake2b(bytes(image.flatten().tolist()), digest_size=16).digest() for image in pixels()]
    assert image_hashes(pixels()) == expected
    assert image_hashes(pixels()[:0]) == []


def test_the_order_of_names_and_of_memory_does_not_count() -> None:
    first = weights()
    turned = {"b": first["b"], "a": first["a"].T.contiguous().T}
    assert fingerprint_of_weights(turned) == fingerprint_of_weights(first)
    assert image_hashes(pixels()[::2]) == image_hashes(pixels()[::2].clone())
    assert image_hashes(pixels().transpose(2, 3)) == image_hashes(pixels().transpose(2, 3).contiguous())


@pytest.mark.parametrize(
    "changed",
    [
        {"a": weights()["a"] + torch.tensor([0, 0, 1e-6])},
        {"a": weights()["a"].reshape(3, 2)},
        {"a": weights()["a"].double()},
        {"a": weights()["a"].bfloat16()},
        {"b": torch.tensor(2)},
        {"c": torch.zeros(0)},
    ],
    ids=["a value", "a shape", "a type", "a smaller type", "a whole number", "one more"],
)
def test_any_change_of_weights_changes_their_fingerprint(changed: dict[str, Tensor]) -> None:
    assert fingerprint_of_weights(weights() | changed) != fingerprint_of_weights(weights())
    assert len(fingerprint_of_weights(weights() | changed)) == 32


def test_a_pixel_a_label_or_the_order_changes_the_fingerprint_of_images() -> None:
    labels, brighter = torch.arange(5), pixels()
    brighter[3, 2, 1, 0] ^= 1
    order = torch.tensor([1, 0, 2, 3, 4])
    prints = {
        fingerprint_of_images(image_hashes(images), of)
        for images, of in (
            (pixels(), labels),
            (brighter, labels),
            (pixels(), labels.flip(0)),
            (pixels()[order], labels[order]),
            (pixels()[:4], labels[:4]),
        )
    }
    assert len(prints) == 5
    assert fingerprint_of_images(image_hashes(pixels()), labels) in prints


def test_texts_have_fingerprints_too() -> None:
    assert fingerprint_of_text("ä") == hashlib.blake2b("ä".encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Record:
    """A record of today."""

    size: tuple[int, int]
    name: str


@dataclass(frozen=True)
class LaterRecord:
    """The record with a field that was added later, its other fields in another order."""

    name: str
    size: tuple[int, int]
    later: str | None = None


def test_a_record_keeps_its_fingerprint_when_a_field_is_added_that_is_none() -> None:
    before = fingerprint_of_record(Record(size=(8, 8), name="a"))
    assert before == hashlib.blake2b(b'{"name": "a", "size": [8, 8]}', digest_size=16).hexdigest()
    assert fingerprint_of_record(LaterRecord(size=(8, 8), name="a")) == before
    others = [Record((8, 9), "a"), Record((8, 8), "b"), LaterRecord("a", (8, 8), later="x")]
    assert before not in {fingerprint_of_record(other) for other in others}
