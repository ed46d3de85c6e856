"""timm's interface on pruned models: features between blocks, other image sizes, and how to go on training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet  # what `features_only=True` wraps a model in
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from pruning.errors import PlanError
from pruning.model.anatomy import blocks_of, examine
from pruning.model.exits import truncate
from pruning.model.surgery import apply_plan, keep_all_plan
from pruning.plan import TOKEN_REDUCTIONS, Plan, TokenReduction
from tests.pruning_tests import builders

COUNTS = (16, 10, 5)
"""Patch tokens that leave each block, of 16."""
SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1, 2], "num_heads": [2, 4, 4], "window_size": 4,
    "num_classes": 7,
}  # fmt: skip
FAMILIES = ("vit", "distilled", "registers", "average_pooling")

every_reduction = pytest.mark.parametrize("kind", TOKEN_REDUCTIONS)


@functools.cache
def dense(family: str, **args: Any) -> Any:
    if family == "swin":
        return builders.randomised(timm.create_model("swin_tiny_patch4_window7_224", **SWIN))
    return builders.model(family, **args)


def plan_of(model: nn.Module, kind: TokenReduction, exit_block: int | None = None) -> Plan:
    """A random plan that reduces tokens, of the blocks up to an exit."""
    plan = replace(builders.plan(examine(model), num_tokens=COUNTS, seed=3), token_reduction=kind)
    return replace(plan, blocks=plan.blocks[:exit_block])


def pruned(family: str, kind: TokenReduction, exit_block: int | None = None, **args: Any) -> Any:
    model = dense(family, **args)
    plan = plan_of(model, kind, exit_block)
    return apply_plan(truncate(model, plan.exit_block), plan)


def pruned_swin(exit_block: int = 5) -> Any:
    plan = builders.plan(examine(dense("swin")), seed=3)
    plan = replace(plan, token_reduction="none", blocks=plan.blocks[:exit_block])
    return apply_plan(truncate(dense("swin"), exit_block), plan)


def check_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Vision transformers whose tokens are reduced


@pytest.mark.parametrize(
    ("family", "kind", "exit_block"), builders.every_pair(list(FAMILIES), TOKEN_REDUCTIONS, [2, 3])
)
def test_intermediates_are_what_the_model_cut_there_ends_with(
    family: str, kind: TokenReduction, exit_block: int
) -> None:
    model, x = pruned(family, kind, exit_block), builders.batch()
    prefix = model.num_prefix_tokens
    cut = [pruned(family, kind, end).forward_features(x) for end in range(1, exit_block + 1)]
    final, normed = model.forward_intermediates(x, norm=True, output_fmt="NLC")
    check_equal(normed, [stream[:, prefix:] for stream in cut])
    assert [tuple(patches.shape[1:]) for patches in normed] == [(count, 24) for count in COUNTS[:exit_block]]
    torch.testing.assert_close(final, model.forward_features(x))
    raw = model.forward_intermediates(x, norm=False, output_fmt="NLC", intermediates_only=True)
    check_equal([model.norm(patches) for patches in raw], normed)  # each norm is of a token alone
    by_name = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True, output_dict=True)
    check_equal(by_name["image_intermediates"], normed)
    torch.testing.assert_close(by_name["image_features"], final)
    if prefix:
        pairs = model.get_intermediate_layers(x, exit_block, return_prefix_tokens=True, norm=True)
        check_equal([torch.cat([prefixes, patches], dim=1) for patches, prefixes in pairs], cut)
        check_equal(by_name["image_intermediates_prefix"], [prefixes for _, prefixes in pairs])


def arguments_of_all_kinds() -> list[dict[str, Any]]:
    return [
        {"output_fmt": fmt, "indices": indices, "norm": norm, "stop_early": stop_early} | more
        for fmt in ("NCHW", "NLC")
        for indices in (None, 2, [0], [1, -1], [1, 0, 1])
        for norm in (False, True)
        for stop_early in (False, True)
        for more in ({}, {"return_prefix_tokens": True}, {"intermediates_only": True}, {"output_dict": True})
    ]


def check_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert found.is_contiguous() == expected.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    elif isinstance(found, dict):
        assert list(found) == list(expected)
        check_same(list(found.values()), list(expected.values()))
    else:
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check_same(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_have_the_form_of_timms_for_all_arguments(family: str) -> None:
    """The class for reduced tokens, on dense blocks, against timm's own."""
    model, x = dense(family), builders.batch(2)
    reduced = pruned(family, "merge")
    reduced.blocks = model.blocks
    assert type(reduced) is not type(model)
    for arguments in arguments_of_all_kinds():
        check_same(reduced.forward_intermediates(x, **arguments), model.forward_intermediates(x, **arguments))


@every_reduction
def test_grid_is_given_where_it_is_whole_and_refused_where_tokens_are_gone(kind: TokenReduction) -> None:
    model, x = pruned("vit", kind), builders.batch()
    (grid,) = model.forward_intermediates(x, [0], intermediates_only=True)
    (patches,) = model.forward_intermediates(x, [0], intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(grid, patches.transpose(1, 2).unflatten(2, (4, 4)))
    message = "^block 2 leaves 5 of 16 patch tokens, which are no grid; give output_fmt='NLC' .or reshape=False.$"
    with pytest.raises(PlanError, match=message):
        model.forward_intermediates(x, [0, 2])
    with pytest.raises(PlanError, match="block 2 leaves 5 of 16"):
        model.get_intermediate_layers(x, 1, reshape=True)


def test_half_of_the_tokens_are_not_taken_for_a_grid_of_half_the_width() -> None:
    """timm's own reshape would take 8 tokens of 24 channels for 16 of 12."""
    plan = replace(builders.plan(examine(dense("vit")), num_tokens=(8, 8, 8)), token_reduction="attention")
    model: Any = apply_plan(dense("vit"), plan)
    assert VisionTransformer.forward_intermediates(model, builders.batch(), [0])[1][0].shape == (4, 12, 4, 4)
    with pytest.raises(PlanError, match="leaves 8 of 16 patch tokens"):
        model.forward_intermediates(builders.batch(), [0])


@every_reduction
def test_model_cut_by_timm_gives_the_features_of_the_exit(kind: TokenReduction) -> None:
    x = builders.batch()
    for kept in (1, 2, 3):
        model = pruned("vit", kind)
        model.prune_intermediate_layers([kept - 1], prune_head=False)
        torch.testing.assert_close(model(x), pruned("vit", kind, kept)(x))


@every_reduction
def test_timms_feature_extractor_takes_a_pruned_model(kind: TokenReduction) -> None:
    for exit_block in (2, 3):
        model, x = pruned("vit", kind, exit_block), builders.batch()
        expected = model.get_intermediate_layers(x, [0, 1])
        assert len(model.feature_info) == exit_block
        getter = FeatureGetterNet(model, out_indices=(0, 1), norm=False, output_fmt="NLC")
        check_equal(getter(x), expected)
        assert getter.feature_info.channels() == [24, 24]


@pytest.mark.parametrize("family", FAMILIES)
@every_reduction
def test_features_and_head_make_the_logits_and_a_new_head_has_its_classes(family: str, kind: TokenReduction) -> None:
    model, x = pruned(family, kind), builders.batch()
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (4, 24)
    model.reset_classifier(5)
    assert model(x).shape == (4, 5)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert head.out_features == 5


@pytest.mark.parametrize("family", ["vit", "distilled", "swin"])
def test_checkpointed_gradients_are_the_same(family: str) -> None:
    model = (pruned_swin() if family == "swin" else pruned(family, "attention-merge")).train()
    gradients, calls = [], []
    blocks_of(model)[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(builders.batch()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert len(calls) == 3  # once, and twice where it is checkpointed
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("family", ["vit", "distilled", "registers"])
def test_weight_decay_and_layer_groups_are_those_of_the_dense_model(family: str) -> None:
    model = pruned(family, "merge")
    assert model.no_weight_decay() == dense(family).no_weight_decay()
    check_groups(model, dense(family))


def check_groups(model: nn.Module, reference: nn.Module) -> None:
    """Expects each parameter, by its place, to have the learning rate of the dense model's."""
    scales = [
        sorted((round(group["lr_scale"], 6), len(group["params"])) for group in param_groups_layer_decay(each))
        for each in (model, reference)
    ]
    assert scales[0] == scales[1]


@every_reduction
def test_attention_mask_is_refused(kind: TokenReduction) -> None:
    model, x = pruned("vit", kind), builders.batch()
    for use in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(PlanError, match=r"^a pruned block takes no attention mask"):
            use(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))


def test_copies_of_a_reduced_model_are_whole() -> None:
    model, x = pruned("distilled", "merge"), builders.batch()
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    assert torch.equal(copied(x), model(x))
    check_equal(copied.get_intermediate_layers(x, 3), model.get_intermediate_layers(x, 3))
    assert isinstance(model, VisionTransformer)


def test_model_that_keeps_its_tokens_stays_timms_class() -> None:
    model: Any = apply_plan(dense("vit"), replace(builders.plan(examine(dense("vit"))), token_reduction="none"))
    assert type(model) is VisionTransformer
    grids = model.forward_intermediates(builders.batch(), intermediates_only=True)
    assert [tuple(grid.shape) for grid in grids] == [(4, 24, 4, 4)] * 3


# Images of another size


@pytest.mark.parametrize("size", [(24, 32), (48, 48), (16, 16)])
@pytest.mark.parametrize("family", FAMILIES)
@every_reduction
def test_images_of_another_size_are_refused_where_tokens_are_reduced(
    kind: TokenReduction, family: str, size: tuple[int, int]
) -> None:
    model = pruned(family, kind, dynamic_img_size=True)
    assert model(builders.batch()).shape == (4, 7)
    patches = size[0] * size[1] // 64
    message = f"^the model was pruned for images of 16 patches, and got {patches}; resize the images, or prune it for"
    with pytest.raises(PlanError, match=message):
        model(builders.batch(size=size))


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_another_size_are_taken_where_all_tokens_stay(family: str) -> None:
    model = dense(family, dynamic_img_size=True)
    whole = apply_plan(model, replace(keep_all_plan(examine(model)), token_reduction="none"))
    plan = replace(builders.plan(examine(model), seed=3), token_reduction="none")
    at_32, at_48 = (builders.batch(size=size) for size in ((32, 32), (48, 24)))
    slim: Any = apply_plan(model, plan)
    assert torch.equal(whole(at_48), model(at_48))
    resized = copy.deepcopy(model)
    resized.set_input_size(img_size=(48, 24))  # timm's own: positions are interpolated once, not in each run
    torch.testing.assert_close(slim(at_48), apply_plan(resized, with_tokens(plan, 18))(at_48), rtol=1e-4, atol=1e-4)
    assert slim(at_32).shape == (4, 7)
    assert slim.forward_intermediates(at_48, [1], intermediates_only=True)[0].shape == (4, 24, 6, 3)


def with_tokens(plan: Plan, num_tokens: int) -> Plan:
    return replace(plan, blocks=tuple(replace(block, num_tokens=num_tokens) for block in plan.blocks))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lfe", "merge"])
def test_another_size_is_refused_by_a_compiled_model_too(kind: TokenReduction) -> None:
    model = pruned("vit", kind, dynamic_img_size=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(builders.batch()), model(builders.batch()))
    with pytest.raises(PlanError, match="pruned for images of 16 patches, and got 36"):
        compiled(builders.batch(size=(48, 48)))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_wrong_size_and_channels_are_timms_own_errors(family: str) -> None:
    model = pruned_swin() if family == "swin" else pruned("vit", "lfe")
    with pytest.raises(AssertionError, match="Input height"):
        model(builders.batch(size=(48, 48)))
    with pytest.raises(RuntimeError, match="channels"):
        model(builders.batch()[:, :1])


# Swin


@pytest.mark.parametrize("exit_block", [2, 3, 5])
def test_intermediates_of_a_swin_are_the_ends_of_its_stages(exit_block: int) -> None:
    model, x = pruned_swin(exit_block), builders.batch()
    num_stages = (2, 3, 5).index(exit_block) + 1
    final, grids = model.forward_intermediates(x, norm=True)
    sizes = [(4, 16, 16, 16), (4, 32, 8, 8), (4, 64, 4, 4)]
    assert [tuple(grid.shape) for grid in grids] == sizes[:num_stages]
    torch.testing.assert_close(grids[-1], model.forward_features(x).permute(0, 3, 1, 2))
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert len(model.feature_info) == num_stages


def test_answers_of_a_swin_have_the_form_of_timms_for_all_arguments() -> None:
    model, x = dense("swin"), builders.batch(2)
    whole: Any = apply_plan(model, replace(keep_all_plan(examine(model)), token_reduction="none"))
    assert type(whole) is not type(model)
    for arguments in arguments_of_all_kinds():
        if arguments["output_fmt"] == "NCHW" and not {"return_prefix_tokens", "output_dict"} & arguments.keys():
            expected = model.forward_intermediates(x, **arguments)
            check_same(whole.forward_intermediates(x, **arguments), expected)
    with pytest.raises(AssertionError, match="NCHW"):
        whole.forward_intermediates(x, output_fmt="NLC")
    assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("indices", [(0, 2), (0, 1), (0,)])
def test_timms_feature_extractor_takes_a_swin(indices: tuple[int, ...]) -> None:
    for make in (pruned_swin, lambda: apply_plan(dense("swin"), keep_all_plan(examine(dense("swin"))))):
        model: Any = make()
        expected = model.forward_intermediates(builders.batch(), list(indices), intermediates_only=True)
        getter = FeatureGetterNet(model, out_indices=indices, norm=False)
        check_equal(getter(builders.batch()), expected)
        assert getter.feature_info.channels() == [(16, 32, 64)[index] for index in indices]
        assert len(blocks_of(model)) == (2, 3, 5)[indices[-1]]


def test_swin_that_is_cut_after_a_stage_can_be_pruned_and_read() -> None:
    model: Any = truncate(dense("swin"), 3)
    assert examine(model).depth == 3
    check_equal(
        model.forward_intermediates(builders.batch(), intermediates_only=True),
        dense("swin").forward_intermediates(builders.batch(), [0, 1], intermediates_only=True),
    )


def test_weight_decay_and_layer_groups_of_a_swin_are_those_of_the_dense_one() -> None:
    model, reference = pruned_swin(), dense("swin")
    assert len(model.no_weight_decay()) == len(reference.no_weight_decay()) == 5
    assert all(name in dict(model.named_parameters()) for name in model.no_weight_decay())
    groups = {group["lr_scale"] for group in param_groups_layer_decay(model)}
    assert len(groups) == len({group["lr_scale"] for group in param_groups_layer_decay(reference)})


def test_pruned_swin_keeps_its_size_and_takes_another_head() -> None:
    model = pruned_swin()
    with pytest.raises(PlanError, match=r"^a Swin that was pruned or cut keeps its image size"):
        model.set_input_size(img_size=64)
    model.reset_classifier(5)
    assert (model(builders.batch()).shape, model.get_classifier().out_features) == ((4, 5), 5)
    model.patch_embed.strict_img_size = False
    with pytest.raises(PlanError, match=r"^the model was pruned for grids of .16, 16. patches, and got .32, 16.$"):
        model(builders.batch(size=(64, 32)))
