"""The dense model of a recipe, with the weights that the recipe gives it."""

from __future__ import annotations

from torch import nn

from pruning.errors import ModelError
from pruning.model.anatomy import examine
from pruning.model.loading import create_model
from pruning.model.weights import load_checkpoint, load_pretrained
from search.config import ModelConfig
from search.errors import ConfigError


def load_dense(recipe: ModelConfig) -> tuple[nn.Module, tuple[str, ...]]:
    """Creates the recipe's dense model, with its weights, and notes of one line each on where they come from.

    What the recipe gives no weights (all of the model, or a new classifier) has random ones, of torch's seed.

    Raises:
        ConfigError: the recipe gives no weights, or several.
        ModelError: there is no such model, or it does not classify images.
        CheckpointError: the weights cannot be read or do not fit.
    """
    _check_source(recipe)
    model = create_model(recipe.name, args=recipe.args)
    _check_task(model)
    if recipe.checkpoint is not None:
        return model, (load_checkpoint(model, recipe.checkpoint, recipe.checkpoint_key),)
    if recipe.pretrained:
        will_be_trained = recipe.training is not None
        return model, (load_pretrained(model, recipe.name, recipe.args, new_classifier=will_be_trained),)
    if recipe.training is None:
        return model, ("weights: random (model.untrained)",)
    return model, ()


def _check_source(recipe: ModelConfig) -> None:
    """Refuses a recipe that leaves open which weights are meant."""
    given = [f"model.{key}" for key in ("checkpoint", "pretrained", "untrained") if getattr(recipe, key)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} contradict each other; give one of them")
    if not given and recipe.training is None:
        raise ConfigError(
            "the model has no weights: give model.checkpoint, model.pretrained=true or model.training, or say "
            "model.untrained=true to try something out with random ones"
        )
    if recipe.checkpoint_key is not None and recipe.checkpoint is None:
        raise ConfigError(f"model.checkpoint_key={recipe.checkpoint_key} needs model.checkpoint: give the file")


def _check_task(model: nn.Module) -> None:
    """Refuses a model that does not tell classes of images apart."""
    anatomy = examine(model)
    if anatomy.num_classes < 1:
        raise ModelError("the model has no classifier (num_classes is 0); give model.args.num_classes")
    if anatomy.in_channels not in (1, 3):
        raise ModelError(
            f"the model takes {anatomy.in_channels} channels, images have 1 or 3; give model.args.in_chans"
        )
