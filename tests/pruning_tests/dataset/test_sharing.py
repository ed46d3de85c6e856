"""Splits that share images: test may share none, train and val are told with their number."""

from __future__ import annotations

import pytest

from pruning.dataset.sharing import check_shared, contradictory_labels
from pruning.errors import DataError

A, B, C, D = b"a", b"b", b"c", b"d"


def test_splits_without_a_common_image_pass_in_silence() -> None:
    assert check_shared({"train": [A, A], "val": [B], "test": [C, D]}) == []
    assert check_shared({"train": [A], "val": [B]}) == []


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": [A], "val": [B, C], "test": [C, D, C]}, "2 of the 3 test images are in val too"),
        ({"train": [A, B], "val": [C], "test": [D, B]}, "1 of the 2 test images are in train too"),
    ],
    ids=["val and test", "train and test"],
)
def test_test_images_that_were_seen_before_are_refused_or_allowed(splits: dict[str, list[bytes]], said: str) -> None:
    with pytest.raises(DataError, match=f"^{said}, .*data.shared_images=allow$"):
        check_shared(splits)
    assert check_shared(splits, "allow") == [f"{said}: accuracy on test is too high"]


def test_val_images_among_the_training_images_are_told_with_their_number() -> None:
    remarks = check_shared({"train": [A, B], "val": [A, B, C], "test": [D]})
    assert remarks == ["2 of the 3 val images are in train too: accuracy on val is too high"]


def test_copies_of_an_image_under_two_labels_are_told_with_their_number() -> None:
    assert contradictory_labels("val", [A, B, C, A], [0, 1, 2, 0]) == []
    remarks = contradictory_labels("val", [A, B, C, A, A, D], [0, 1, 2, 1, 0, 0])
    assert remarks == ["3 of the 6 val images are there under two labels, as copies"]
