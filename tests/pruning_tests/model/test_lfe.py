"""Token scores against loops over their formulas (VTC-LFC, eq. 6-9)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pruning.model.lfe import attention_received, low_frequency_energy, score_tokens
from pruning.spectrum import token_filter
from tests.pruning_tests import builders, reference


def tokens(count: int, *, images: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(images, count, 6, generator=torch.Generator().manual_seed(seed))


def attention(count: int, *, images: int = 3, heads: int = 2, seed: int = 0) -> Tensor:
    logits = torch.randn(images, heads, count, count, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).softmax(dim=-1)


@pytest.mark.parametrize(("prefix", "has_class_token"), [(1, True), (2, True), (5, True), (0, False), (2, False)])
@pytest.mark.parametrize("cutoff", [0.1, 0.85])
def test_scores_equal_the_slow_definition(prefix: int, has_class_token: bool, cutoff: float) -> None:
    x, maps = tokens(prefix + 9), attention(prefix + 9)
    fast = score_tokens(x, maps, token_filter(9, cutoff), num_prefix_tokens=prefix, has_class_token=has_class_token)
    anatomy = replace(builders.anatomy().blocks[0], num_prefix_tokens=prefix, has_class_token=has_class_token)
    expected = [reference.token_scores(*pair, cutoff, anatomy) for pair in zip(x, maps, strict=True)]
    torch.testing.assert_close(fast, torch.tensor(expected))


def test_the_energy_of_a_constant_sequence_is_one() -> None:
    energy = low_frequency_energy(tokens(1).expand(3, 8, 6), token_filter(8, 0.3))
    torch.testing.assert_close(energy, torch.ones(3, 8))


def test_the_energy_of_a_token_that_is_zero_is_zero_and_of_all_others_finite() -> None:
    x = tokens(8)
    x[1, 4] = 0
    energy = low_frequency_energy(x, token_filter(8, 0.3))
    assert energy[1, 4] == 0
    assert energy.isfinite().all() and (energy > 0).sum() == 3 * 8 - 1


def test_the_energy_does_not_change_with_the_scale_of_an_image() -> None:
    x, matrix = tokens(8), token_filter(8, 0.3)
    torch.testing.assert_close(low_frequency_energy(x * 1e3, matrix), low_frequency_energy(x, matrix))


def test_an_alternating_sequence_has_less_energy_than_a_slow_one() -> None:
    fast, slowly = torch.tensor([1.0, -1.0] * 4)[None, :, None], torch.tensor([1.0] * 4 + [2.0] * 4)[None, :, None]
    matrix = token_filter(8, 0.3)
    assert low_frequency_energy(fast, matrix).max() < 0.01 < 0.8 < low_frequency_energy(slowly, matrix).min()


def test_uniform_attention_gives_every_patch_its_closed_form() -> None:
    count = 10
    uniform = torch.full((2, 3, count, count), 1 / count)
    torch.testing.assert_close(attention_received(uniform, 1, True), torch.full((2, 9), 2 / count**2))
    torch.testing.assert_close(attention_received(uniform, 0, False), torch.full((2, 10), 1 / count))


def test_every_image_is_scored_by_itself() -> None:
    x, maps, matrix = tokens(10), attention(10), token_filter(9, 0.5)
    together = score_tokens(x, maps, matrix, num_prefix_tokens=1, has_class_token=True)
    for index in range(3):
        alone = score_tokens(
            x[index : index + 1], maps[index : index + 1], matrix, num_prefix_tokens=1, has_class_token=True
        )
        torch.testing.assert_close(alone[0], together[index])


def test_scores_in_bfloat16_are_near_those_in_float32() -> None:
    x, maps, matrix = tokens(10), attention(10), token_filter(9, 0.5)
    half = score_tokens(x.bfloat16(), maps.bfloat16(), matrix, num_prefix_tokens=1, has_class_token=True)
    full = score_tokens(x, maps, matrix, num_prefix_tokens=1, has_class_token=True)
    torch.testing.assert_close(half, full, rtol=0.05, atol=1e-3)
