"""The filters against the closed form: a wave of frequency f passes with exp(-f^2 / (2 s^2))."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pruning.errors import SettingError
from pruning.spectrum import low_pass, token_filter
from tests.pruning_tests import builders, reference


@pytest.mark.parametrize("size", [(32, 32), (7, 12), (9, 5), (1, 1), (1, 6)])
@pytest.mark.parametrize("cutoff", [0.01, 0.1, 1.0])
def test_a_constant_image_comes_back_unchanged(size: tuple[int, int], cutoff: float) -> None:
    images = torch.tensor([[-1.5], [2.25]])[:, :, None, None].expand(2, 1, *size)
    torch.testing.assert_close(low_pass(images, cutoff), images)


@pytest.mark.parametrize("size", [(32, 32), (16, 24), (15, 9)])
@pytest.mark.parametrize("wave", [(0, 1), (2, 0), (1, 3), (3, 4)])
@pytest.mark.parametrize("cutoff", [0.1, 0.4, 1.0])
def test_a_wave_passes_with_the_gaussian_of_its_frequency(
    size: tuple[int, int], wave: tuple[int, int], cutoff: float
) -> None:
    height, width = size
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    image = torch.cos(2 * math.pi * (wave[0] * rows + wave[1] * columns) + 0.3)[None, None]
    deviation = cutoff * min(size) / 2
    gain = math.exp(-(wave[0] ** 2 + wave[1] ** 2) / (2 * deviation**2))
    torch.testing.assert_close(low_pass(image, cutoff), gain * image, atol=1e-5, rtol=0)


def test_a_chessboard_all_but_vanishes() -> None:
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1)[None, None]
    assert low_pass(board, 0.2).abs().max() < 1e-6


def test_images_are_filtered_as_by_numpy_on_every_channel() -> None:
    images = builders.batch(2, size=(12, 20))
    rows, columns = np.fft.fftfreq(12, 1 / 12), np.fft.fftfreq(20, 1 / 20)
    gain = np.exp(-(rows[:, None] ** 2 + columns**2) / (2 * (0.3 * 12 / 2) ** 2))
    expected = np.fft.ifft2(np.fft.fft2(images.double().numpy()) * gain).real
    np.testing.assert_allclose(low_pass(images, 0.3).numpy(), expected, atol=1e-5)


def test_the_precision_of_the_images_stays() -> None:
    images = builders.batch(1)
    half = low_pass(images.bfloat16(), 0.2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), low_pass(images, 0.2), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("count", [1, 2, 9, 16])
@pytest.mark.parametrize("cutoff", [0.05, 0.5, 1.0])
def test_the_token_filter_is_the_fourier_filter_of_a_sequence(count: int, cutoff: float) -> None:
    sequence = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    filtered = token_filter(count, cutoff) @ sequence
    torch.testing.assert_close(filtered, torch.tensor(reference.filtered(sequence.tolist(), cutoff)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 9, 16])
@pytest.mark.parametrize("cutoff", [0.001, 0.5, 1.0])
def test_the_token_filter_is_symmetric_and_its_rows_sum_to_one(count: int, cutoff: float) -> None:
    matrix = token_filter(count, cutoff)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(count))


def test_the_least_cutoff_leaves_the_mean() -> None:
    torch.testing.assert_close(token_filter(8, 1e-3), torch.full((8, 8), 1 / 8))
    image = builders.batch(1)
    torch.testing.assert_close(
        low_pass(image, 1e-3), image.mean(dim=(2, 3), keepdim=True).expand_as(image), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("cutoff", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_a_cutoff_out_of_range_is_refused(cutoff: float) -> None:
    with pytest.raises(SettingError, match="out of range"):
        low_pass(builders.batch(1), cutoff)
    with pytest.raises(SettingError, match="out of range"):
        token_filter(4, cutoff)
