"""The metric against one image, one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.data import Images
from pruning.model.anatomy import blocks_of, classify, embed, examine, parts_of
from pruning.repair.sensitivity import PATCH_FLOOR, SHRINKAGE, StreamSensitivity, fisher_noise, measure_sensitivity
from tests.pruning_tests import builders


def slow(model: nn.Module, images: Images, *, seed: int) -> list[tuple[Tensor, float]]:
    """(metric, prefix share) of mid and out of every block, by the definition."""
    anatomy, generator = examine(model), torch.Generator().manual_seed(seed)
    (block_anatomy,) = set(anatomy.blocks)
    places, width, prefix = 2 * anatomy.depth, block_anatomy.width, block_anatomy.num_prefix_tokens
    metrics = [torch.zeros(width, width, dtype=torch.float64) for _ in range(places)]
    energy = torch.zeros(places, 2, dtype=torch.float64)
    with torch.no_grad():
        num_classes = model(images.normalized(slice(0, 1))).shape[1]
    signs = torch.randint(2, (len(images), num_classes), generator=generator, dtype=torch.int8) * 2 - 1
    for pixels, _ in images.batches(len(images)):
        for image, signs_of_image in zip(pixels, signs.tolist(), strict=True):
            x, stream = embed(model, image[None]), []
            block: Any
            for block in blocks_of(model):
                parts = parts_of(block)
                x = x + parts.ls1(block.attn(parts.norm1(x)))
                stream.append(x)
                x = x + parts.ls2(block.mlp(parts.norm2(x)))
                stream.append(x)
            logs = F.log_softmax(classify(model, x), dim=1)[0]
            # The gradients of all labels, each as often as the model expects it, with a random sign.
            total = sum(sign * log.detach().exp().sqrt() * log for sign, log in zip(signs_of_image, logs, strict=True))
            assert isinstance(total, Tensor)
            for place, gradient in enumerate(torch.autograd.grad(total, stream)):
                for token, g in enumerate(gradient[0].double()):
                    metrics[place] += torch.outer(g, g)
                    energy[place, int(token >= prefix)] += g @ g
    shares = energy[:, 0] / energy.sum(dim=1)
    return [(shrunk(metric / len(images)), float(share)) for metric, share in zip(metrics, shares, strict=True)]


def shrunk(metric: Tensor) -> Tensor:
    return (1 - SHRINKAGE) * metric + SHRINKAGE * metric.trace() / len(metric) * torch.eye(len(metric)).double()


@pytest.mark.parametrize("family", ["vit", "distilled", "average_pooling", "registers", "layer_scale", "qk_norm"])
def test_sensitivity_equals_a_slow_loop_over_images_and_tokens(family: str) -> None:
    model, images = builders.model(family), builders.images(7)
    sensitivity = measure_sensitivity(model, images, batch_size=3, seed=5)
    expected = slow(model, images, seed=5)
    assert len(sensitivity) == 3
    for place, (metric, share) in zip(
        [at for block in sensitivity for at in (block.mid, block.out)], expected, strict=True
    ):
        assert place.metric.dtype == torch.float64
        torch.testing.assert_close(place.metric, metric, rtol=1e-3, atol=1e-5 * float(metric.abs().max()))
        assert place.prefix_share == pytest.approx(share, rel=1e-4, abs=1e-7)


def test_signs_are_drawn_by_the_seed_and_labels_are_not_looked_at() -> None:
    model, images = builders.model(), builders.images(8)
    other = Images(pixels=images.pixels, labels=(images.labels + 1) % 7, mean=images.mean, std=images.std)
    first, again, reseeded = (
        measure_sensitivity(model, of, seed=seed)[1].mid.metric for of, seed in ((images, 0), (other, 0), (images, 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, reseeded)


@pytest.mark.parametrize("family", ["vit", "average_pooling"])
def test_the_size_of_a_batch_changes_rounding_alone(family: str) -> None:
    """Each image has its own signs."""
    model, images = builders.model(family), builders.images(24)
    at_once, *in_batches = (measure_sensitivity(model, images, batch_size=size, seed=2) for size in (24, 1, 7, 16))
    for split in in_batches:
        for one, two in zip(at_once, split, strict=True):
            for place, again in ((one.mid, two.mid), (one.out, two.out)):
                atol = 1e-6 * float(place.metric.abs().max())
                torch.testing.assert_close(again.metric, place.metric, rtol=1e-4, atol=atol)
                assert again.prefix_share == pytest.approx(place.prefix_share, rel=1e-5, abs=1e-9)


def test_noise_has_the_covariance_of_the_gradients_of_all_labels() -> None:
    logits = torch.tensor([3.0, 0.0, -1.0, 1.0, 2.5])
    p = logits.double().softmax(dim=0)
    of_labels = torch.eye(5).double() - p  # (label, logit): the gradient of each label's log-likelihood
    signs = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 5)
    noise = fisher_noise(logits.expand(32, -1), signs).double()
    torch.testing.assert_close(noise.T @ noise / 32, of_labels.T @ p.diag() @ of_labels, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(noise.mean(dim=0), torch.zeros(5).double(), rtol=0, atol=1e-7)


def test_no_direction_is_free_though_there_are_fewer_images_than_directions() -> None:
    for block in measure_sensitivity(builders.model(), builders.images(2)):
        for place in (block.mid, block.out):
            values = torch.linalg.eigvalsh(place.metric)
            assert values[0] >= SHRINKAGE * values.mean() * (1 - 1e-6) > 0


def test_small_errors_cost_what_the_metric_says() -> None:
    """Noise in the last stream costs a divergence of 1/2 tr(G E[D D^T])."""
    model, images, scale = builders.toy_model(), builders.toy_images(1024, seed=3), 0.02
    place = measure_sensitivity(model, images)[-1].out
    pixels = images.normalized(slice(None))
    with torch.no_grad():
        x = embed(model, pixels)
        for block in blocks_of(model):
            x = block(x)
        noise = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        dense, noisy = (classify(model, stream).double().log_softmax(dim=1) for stream in (x, x + noise))
    measured = (dense.exp() * (dense - noisy)).sum(dim=1).mean()
    assert float(measured) == pytest.approx(scale**2 / 2 * float(place.metric.trace()), rel=0.2)


def test_late_only_the_prefix_counts_where_the_class_token_answers() -> None:
    last = measure_sensitivity(builders.model(), builders.images(4))[-1]
    assert last.out.prefix_share == pytest.approx(1.0)
    assert last.mid.prefix_share == pytest.approx(1.0)  # an MLP mixes no tokens
    assert measure_sensitivity(builders.model("average_pooling"), builders.images(4))[-1].out.prefix_share == 0.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_the_model_is_left_as_it_was(training: bool, wants_gradient: bool) -> None:
    model = builders.model().train(training).requires_grad_(wants_gradient)
    before, modes = builders.state(model), [module.training for module in model.modules()]
    measure_sensitivity(model, builders.images(4))
    assert builders.same_state(model, before)
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.requires_grad == wants_gradient and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_no_hook_stays_where_the_images_do_not_fit() -> None:
    model = builders.model()
    with pytest.raises(AssertionError, match="Input height"):
        measure_sensitivity(model, builders.images(4, size=(40, 40)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_frozen_model_has_the_sensitivity_of_a_free_one_even_without_gradients_around() -> None:
    images = builders.images(4)
    with torch.no_grad():
        frozen = measure_sensitivity(builders.model().requires_grad_(False), images)
    for one, other in zip(frozen, measure_sensitivity(builders.model(), images), strict=True):
        torch.testing.assert_close(one.mid.metric, other.mid.metric)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("patches", [1, 16])
def test_token_weights_share_one_between_prefix_patches_and_the_floor(share: float, prefix: int, patches: int) -> None:
    place = StreamSensitivity(metric=torch.eye(2, dtype=torch.float64), prefix_share=share)
    weights = place.token_weights(prefix + patches, prefix)
    assert weights.shape == (prefix + patches,)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    even = PATCH_FLOOR / (prefix + patches)
    if prefix:
        expected = (1 - PATCH_FLOOR) * share / prefix + even
        assert weights[:prefix].tolist() == pytest.approx([expected] * prefix)
    rest = (1 - share if prefix else 1.0) / patches
    assert weights[prefix:].tolist() == pytest.approx([(1 - PATCH_FLOOR) * rest + even] * patches)
