"""Images in memory, and the pixels that they have."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pruning.data import Images, InputSpec, Splits, balanced_subset
from pruning.errors import DataError, SettingError
from tests.pruning_tests import builders
from tests.pruning_tests.dataset import trees


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_a_corrupt_image_is_named(content: bytes | None, tmp_path: Path) -> None:
    trees.write(tmp_path, cat=2, dog=2)
    broken = tmp_path / "val" / "dog" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100] if content is None else content)
    with pytest.raises(DataError, match=rf"cannot read .*{broken.relative_to(tmp_path)}"):
        trees.images(tmp_path)


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 1), (5, 2), (9, 0), (12, 1), (100, 2)])
def test_a_subset_takes_every_class_as_often_as_possible(count: int, seed: int) -> None:
    labels = torch.tensor([0] * 9 + [2] * 3 + [5] * 2)
    chosen = balanced_subset(labels, count, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(count, 14)
    got = Counter(labels[chosen].tolist())
    # As cards are dealt: one image of each class in turn, while a class has some left.
    turns = [(turn, label) for label, most in ((0, 9), (2, 3), (5, 2)) for turn in range(most)]
    dealt = [turn for turn, _ in sorted(turns)[:count]]
    for label, most in ((0, 9), (2, 3), (5, 2)):
        assert min(most, max(dealt)) <= got[label] <= min(most, max(dealt) + 1)


def test_a_subset_is_shuffled_and_seeded() -> None:
    labels = torch.arange(100) % 10
    first, again, other = (balanced_subset(labels, 50, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert labels[first][:10].tolist() != sorted(labels[first][:10].tolist())


def test_a_larger_image_is_resized_and_its_centre_taken(tmp_path: Path) -> None:
    (tmp_path / "val" / "cat").mkdir(parents=True)
    canvas = np.zeros((32, 16, 3), dtype=np.uint8)  # upright: above black, in the middle red, below green
    canvas[8:24, :, 0], canvas[24:, :, 1] = 200, 200
    Image.fromarray(canvas).save(tmp_path / "val" / "cat" / "0.png")
    pixels = trees.images(tmp_path).pixels[0]
    assert pixels.shape == (3, 8, 8)
    assert (pixels[0, 1:-1] > 150).all() and (pixels[1, 1:-1] < 50).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_model_of_one_channel_gets_grey_images(mode: str, tmp_path: Path) -> None:
    written = trees.write(tmp_path, mode=mode, cat=3)
    images = trees.images(tmp_path, trees.GREY)
    assert images.pixels.shape == (3, 1, 8, 8)
    for pixels, source in zip(images.pixels, written.values(), strict=True):
        np.testing.assert_array_equal(pixels[0].numpy(), np.asarray(Image.fromarray(source).convert("L")))


def test_a_model_of_three_channels_gets_grey_images_threefold(tmp_path: Path) -> None:
    (source,) = trees.write(tmp_path, mode="L", cat=1).values()
    for channel in trees.images(tmp_path).pixels[0]:
        np.testing.assert_array_equal(channel.numpy(), source)


def test_normalisation_leaves_the_pixels_as_they_are() -> None:
    images = builders.images(3)
    before = images.pixels.clone()
    for _ in range(2):
        images.normalized(slice(None))
        images.normalized(torch.tensor([2, 0]))
    assert torch.equal(images.pixels, before)


def test_an_input_is_told_in_one_line() -> None:
    spec = InputSpec(size=(224, 224), crop_pct=0.9)
    scale = "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    assert spec.summary() == f"224x224, bicubic, crop 0.9 center, {scale}"
    other = InputSpec(size=(64, 32), mean=(0.5,), std=(0.25,), crop_pct=1.0, crop_mode="squash", exif="apply")
    assert other.summary() == "64x32 (height x width), bicubic, crop 1 squash, mean (0.5), std (0.25), EXIF applied"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mean": (123.675, 116.28, 103.53)}, r"data\.mean is \(123.675, 116.28, 103.53\), not in \[0, 1\]; .* by 255"),
        ({"std": (58.395, 57.12, 57.375)}, r"data\.std is \(58.395, .*\), not in \(0, 1\]; .* divide it by 255"),
        ({"mean": (-0.1, 0.5, 0.5)}, r"data\.mean is \(-0\.1, 0\.5, 0\.5\), not in \[0, 1\]$"),
        ({"mean": (float("nan"),) * 3}, r"data\.mean is \(nan, nan, nan\), not in"),
        ({"std": (0.2, 0.0, 0.2)}, r"data\.std is \(0\.2, 0, 0\.2\), not in \(0, 1\]$"),
        ({"std": (float("inf"),) * 3}, r"data\.std is \(inf, inf, inf\), not in"),
        ({"crop_pct": 0.0}, r"data\.crop_pct is 0\.0; give a share"),
        ({"crop_pct": float("nan")}, r"data\.crop_pct is nan"),
        ({"crop_mode": "centre"}, r"data\.crop_mode is 'centre'; give one of center, squash, border"),
        ({"interpolation": "random"}, r"data\.interpolation is 'random'; give one of nearest, bilinear, bicubic"),
        ({"exif": "turn"}, r"data\.exif is 'turn'; give one of ignore, apply"),
    ],
)
def test_an_input_that_no_model_takes_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(SettingError, match=expected):
        InputSpec(size=(8, 8), **settings)


def test_normalisation_is_by_its_formula() -> None:
    images = Images(
        pixels=torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8),
        labels=torch.tensor([3, 1]),
        mean=(0.485, 0.2),
        std=(0.229, 0.5),
    )
    (pixels, labels), *rest = images.batches(2)
    assert pixels.dtype == torch.float32 and labels.tolist() == [3, 1] and not rest
    for image in range(2):
        for channel, (mean, std) in enumerate(((0.485, 0.229), (0.2, 0.5))):
            expected = (images.pixels[image, channel].double() / 255 - mean) / std
            torch.testing.assert_close(pixels[image, channel].double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(images.normalized(torch.tensor([1, 0])), pixels.flip(0))


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_batches_give_every_image_once_and_in_order(size: int, lengths: list[int]) -> None:
    images = builders.images(5)
    batches = list(images.batches(size))
    assert [len(labels) for _, labels in batches] == lengths
    assert torch.equal(torch.cat([labels for _, labels in batches]), images.labels)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), images.normalized(slice(None)))


def test_taking_some_images_keeps_pixels_and_labels_together() -> None:
    images = builders.images(5)
    some = images.take(torch.tensor([4, 0]))
    assert torch.equal(some.pixels, images.pixels[[4, 0]]) and torch.equal(some.labels, images.labels[[4, 0]])
    assert len(some) == 2 and some.mean == images.mean


def splits(count: int = 21, num_calibration: int = 9) -> Splits:
    return Splits(
        training=builders.images(count), num_calibration=num_calibration, val=builders.images(10, seed=1), test=None
    )


def storage(images: Images) -> tuple[int, int]:
    return images.pixels.untyped_storage().data_ptr(), images.labels.untyped_storage().data_ptr()


def test_calibration_and_probe_are_the_training_images_in_their_order() -> None:
    dealt = splits()
    assert (len(dealt.calibration), len(dealt.probe)) == (9, 12)
    for name in ("pixels", "labels"):
        parts = [getattr(part, name) for part in (dealt.calibration, dealt.probe)]
        assert torch.equal(torch.cat(parts), getattr(dealt.training, name))


@pytest.mark.parametrize("every", [1, 4])
def test_calibration_and_probe_copy_no_pixel_of_the_training_images(every: int) -> None:
    dealt = splits()
    thinned = dealt.thinned(every)
    for part in (dealt.calibration, dealt.probe, thinned.training, thinned.calibration, thinned.probe):
        assert storage(part) == storage(dealt.training)
    assert storage(thinned.val) == storage(dealt.val)
    assert dealt.probe.pixels.data_ptr() == dealt.training.pixels[9:].data_ptr()


def test_splits_that_go_to_another_process_hold_the_training_images_once() -> None:
    dealt = splits(count=400)
    size = dealt.training.pixels.numel() + dealt.val.pixels.numel()
    assert size < len(pickle.dumps(dealt)) < 1.1 * size
    again = pickle.loads(pickle.dumps(dealt))
    assert torch.equal(again.calibration.pixels, dealt.calibration.pixels)
    assert storage(again.probe) == storage(again.training)


def test_thinned_splits_have_one_in_so_many_images_of_each_part_but_all_to_train_on() -> None:
    dealt = splits(count=12, num_calibration=9)
    thinned = dealt.thinned(4)
    assert torch.equal(thinned.calibration.pixels, dealt.training.pixels[:9][[0, 4, 8]])
    assert torch.equal(thinned.probe.labels, dealt.training.labels[9:])  # three are too few to leave any out
    assert torch.equal(thinned.val.labels, dealt.val.labels[[0, 4, 8]])
    assert thinned.training is dealt.training and dealt.every == 1


def test_decoding_leaves_no_thread_behind(tmp_path: Path) -> None:
    trees.write(tmp_path, cat=3)
    before = threading.active_count()
    trees.images(tmp_path)
    assert threading.active_count() == before
