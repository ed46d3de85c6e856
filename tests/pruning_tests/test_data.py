"""Images from folders and from the digits, and what is said where something is wrong with them."""

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
from sklearn.datasets import load_digits

from pruning.data import Images, InputSpec, Splits, balanced_subset
from pruning.dataset.classes import folder_classes
from pruning.dataset.splits import load_split
from pruning.errors import DataError, SettingError
from tests.pruning_tests import builders

SPEC = InputSpec(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_pct=1.0)
GREY = InputSpec(size=(8, 8), mean=(0.5,), std=(0.25,), crop_pct=1.0)


def write(root: Path, split: str = "val", mode: str = "RGB", **counts: int) -> dict[str, np.ndarray[Any, Any]]:
    """So many 8 x 8 images a class; name -> pixels (height, width[, channel])."""
    generator = np.random.default_rng(0)
    pixels = {}
    for label, count in counts.items():
        folder = root / split / label
        folder.mkdir(parents=True)
        for index in range(count):
            shape = (8, 8, 3) if mode == "RGB" else (8, 8)
            values = generator.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(values).save(folder / f"{index}.png")
            pixels[f"{label}/{index}.png"] = values
    return pixels


def folder(root: Path, spec: InputSpec = SPEC, **other: Any) -> Images:
    return load_split("folder", "val", spec, root=root, **({"num_classes": 3} | other))


def test_folders_give_their_pixels_and_the_labels_of_the_class_map(tmp_path: Path) -> None:
    written = write(tmp_path, cat=2, dog=3)
    images = folder(tmp_path, class_map={"dog": 0, "bird": 1, "cat": 2})
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape == (5, 3, 8, 8)
    assert images.labels.tolist() == [2, 2, 0, 0, 0]
    for pixels, expected in zip(images.pixels, written.values(), strict=True):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_a_class_map_can_be_a_text_file_and_is_alphabetic_without_one(tmp_path: Path) -> None:
    write(tmp_path, cat=2, dog=3)
    (tmp_path / "classes.txt").write_text("bird\ndog\ncat\n")
    assert folder(tmp_path, class_map=tmp_path / "classes.txt").labels.tolist() == [2, 2, 1, 1, 1]
    assert folder(tmp_path).labels.tolist() == [0, 0, 1, 1, 1]
    assert folder_classes(tmp_path, "val") == {"cat": 0, "dog": 1}


def test_a_class_may_be_named_like_the_split(tmp_path: Path) -> None:
    write(tmp_path, train=1, val=2)
    images = folder(tmp_path)
    assert images.labels.tolist() == [0, 1, 1]
    assert folder_classes(tmp_path, "val") == {"train": 0, "val": 1}


def test_class_folders_unknown_to_the_map_are_named(tmp_path: Path) -> None:
    write(tmp_path, cat=1, cow=1, dog=1, ewe=1)
    (tmp_path / "val" / ".cache").mkdir()  # hidden, so no class
    with pytest.raises(DataError, match=r"2 of 4 folders in .*val are no class of the class map: cow, ewe$"):
        folder(tmp_path, class_map={"cat": 0, "dog": 1})


def test_of_many_unknown_class_folders_the_first_five_are_named(tmp_path: Path) -> None:
    counts: dict[str, Any] = {f"n{index}": 1 for index in range(7)}
    write(tmp_path, **counts)
    with pytest.raises(DataError, match=r"7 of 7 .* n0, n1, n2, n3, n4, \.\.\.$"):
        folder(tmp_path, class_map={"cat": 0})


def test_a_class_map_that_is_missing_or_not_a_list_is_refused(tmp_path: Path) -> None:
    write(tmp_path, cat=1)
    with pytest.raises(DataError, match=r"no class map .*nowhere\.txt"):
        folder(tmp_path, class_map=tmp_path / "nowhere.txt")
    (tmp_path / "classes.xml").write_text("<cat/>")
    with pytest.raises(DataError, match=r"cannot read class map .*classes\.xml"):
        folder(tmp_path, class_map=tmp_path / "classes.xml")


def test_labels_beyond_the_models_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, cat=1, dog=1, ewe=1)
    assert folder(tmp_path, num_classes=3).labels.max() == 2
    with pytest.raises(DataError, match="class index 2, but the model has 2 classes"):
        folder(tmp_path, num_classes=2)


def test_no_folder_no_root_and_no_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*val"):
        folder(tmp_path)
    with pytest.raises(DataError, match=r"needs data\.root"):
        load_split("folder", "val", SPEC, num_classes=3)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot open .*val"):
        folder(tmp_path)
    with pytest.raises(DataError, match=r"no image in .*val"):
        folder_classes(tmp_path, "val")


def test_images_outside_a_class_folder_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path, cat=1)
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "stray.png")
    with pytest.raises(DataError, match=r"images lie outside a class folder in .*val"):
        folder_classes(tmp_path, "val")


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_a_corrupt_image_is_named(content: bytes | None, tmp_path: Path) -> None:
    write(tmp_path, cat=2, dog=2)
    broken = tmp_path / "val" / "dog" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100] if content is None else content)
    with pytest.raises(DataError, match=rf"cannot read .*{broken.relative_to(tmp_path)}"):
        folder(tmp_path)


def test_only_images_that_are_drawn_are_decoded(tmp_path: Path) -> None:
    write(tmp_path, cat=4, dog=4)
    drawn = balanced_subset(torch.tensor([0] * 4 + [1] * 4), 4, seed=7).tolist()
    for index in set(range(8)) - set(drawn):
        (tmp_path / "val" / ("cat", "dog")[index // 4] / f"{index % 4}.png").write_bytes(b"broken")
    images = folder(tmp_path, limit=4, seed=7)
    assert images.labels.tolist() == [index // 4 for index in drawn]


def test_a_limit_draws_the_same_images_for_the_same_seed(tmp_path: Path) -> None:
    write(tmp_path, cat=6, dog=6, ewe=6)
    first, again, other = (folder(tmp_path, limit=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.pixels, other.pixels)
    assert Counter(first.labels.tolist()) == {0: 3, 1: 3, 2: 3}


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
    pixels = folder(tmp_path).pixels[0]
    assert pixels.shape == (3, 8, 8)
    assert (pixels[0, 1:-1] > 150).all() and (pixels[1, 1:-1] < 50).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_model_of_one_channel_gets_grey_images(mode: str, tmp_path: Path) -> None:
    written = write(tmp_path, mode=mode, cat=3)
    images = folder(tmp_path, GREY)
    assert images.pixels.shape == (3, 1, 8, 8)
    for pixels, source in zip(images.pixels, written.values(), strict=True):
        np.testing.assert_array_equal(pixels[0].numpy(), np.asarray(Image.fromarray(source).convert("L")))


def test_a_model_of_three_channels_gets_grey_images_threefold(tmp_path: Path) -> None:
    (source,) = write(tmp_path, mode="L", cat=1).values()
    for channel in folder(tmp_path).pixels[0]:
        np.testing.assert_array_equal(channel.numpy(), source)


def test_torchvisions_own_folders_give_the_same_images(tmp_path: Path) -> None:
    write(tmp_path, cat=2, dog=3)
    for spec in (SPEC, GREY):
        images = folder(tmp_path, spec)
        torchvisions = load_split("torch/image_folder", "val", spec, root=tmp_path, num_classes=3)
        assert torch.equal(torchvisions.pixels, images.pixels) and torch.equal(torchvisions.labels, images.labels)
    (tmp_path / "val" / "dog" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot read image 3"):
        load_split("torch/image_folder", "val", SPEC, root=tmp_path, num_classes=3)


def test_a_torchvision_data_set_is_read_by_its_targets(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):  # the IDX format: a magic number, the sizes, the values
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, 5, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + values.tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (0x801, 5))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes([7, 0, 9, 3, 3]))
    spec = InputSpec(size=(28, 28), mean=(0.5,), std=(0.25,), crop_pct=1.0)
    images = load_split("torch/mnist", "val", spec, root=tmp_path, num_classes=10)
    assert images.labels.tolist() == [7, 0, 9, 3, 3]
    np.testing.assert_array_equal(images.pixels[:, 0].numpy(), values)
    assert load_split("torch/mnist", "val", spec, root=tmp_path, num_classes=10, limit=4).labels.unique().numel() == 4


@pytest.mark.parametrize("dataset", ["imagenet", "nonsense"])
def test_a_data_set_of_no_known_kind_is_refused(dataset: str) -> None:
    with pytest.raises(DataError, match=f"no data set '{dataset}'; give folder, digits"):
        load_split(dataset, "val", SPEC, num_classes=3)


def test_what_a_library_says_of_its_data_set_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot open torch/nonsense"):
        load_split("torch/nonsense", "val", SPEC, num_classes=3, root=tmp_path)


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


def digits(split: str, **other: Any) -> Images:
    return load_split("digits", split, GREY, num_classes=10, **other)


def test_digit_splits_are_disjoint_and_hold_everything_in_equal_shares() -> None:
    splits = {split: digits(split) for split in ("train", "val", "test")}
    assert [len(images) for images in splits.values()] == [1077, 360, 360]
    pictures = [bytes(image.flatten().tolist()) for images in splits.values() for image in images.pixels]
    expected = (torch.from_numpy(load_digits().images) * 255 / 16).round().to(torch.uint8)
    assert sorted(pictures) == sorted(bytes(image.flatten().tolist()) for image in expected)
    for images in splits.values():
        shares = torch.bincount(images.labels, minlength=10) / len(images)
        assert shares.min() > 0.09 and shares.max() < 0.11


def test_digits_are_grey_eights_of_full_contrast() -> None:
    images = digits("val")
    assert images.pixels.shape == (360, 1, 8, 8) and images.pixels.dtype == torch.uint8
    assert images.pixels.min() == 0 and images.pixels.max() == 255
    assert torch.equal(digits("val", limit=20).labels.bincount(), torch.full((10,), 2))


def test_digits_go_with_their_own_labels() -> None:
    data = load_digits()
    label_of = {
        bytes((picture * 255 / 16).round().astype(np.uint8).flatten().tolist()): int(label)
        for picture, label in zip(data.images, data.target, strict=True)
    }
    images = digits("train")
    for image, label in zip(images.pixels, images.labels.tolist(), strict=True):
        assert label_of[bytes(image.flatten().tolist())] == label


def test_digits_of_another_size_or_split_are_refused() -> None:
    with pytest.raises(DataError, match="digits has no split 'validation'; it has train, val, test"):
        digits("validation")
    for spec in (SPEC, InputSpec(size=(16, 16), mean=(0.5,), std=(0.5,))):
        with pytest.raises(DataError, match="digits are 8 x 8 with 1 channel"):
            load_split("digits", "val", spec, num_classes=10)


def test_decoding_leaves_no_thread_behind(tmp_path: Path) -> None:
    write(tmp_path, cat=3)
    before = threading.active_count()
    folder(tmp_path)
    assert threading.active_count() == before
