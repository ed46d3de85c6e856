"""The methods that make a model smaller, and what is true of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["cascade", "global", "constant", "decreasing", "learned", "soft-mask", "unstructured"]
"""The name of a method, a key of `METHODS`."""

Recovery = Literal["none", "distill"]
"""The training that follows the pruning: none, or a fine-tune that also learns from the dense model."""


@dataclass(frozen=True, kw_only=True)
class MethodTraits:
    """The traits of a method that searches, trials and records depend on."""

    summary: str
    """One line on how the method prunes, and where it comes from."""
    takes_channels: bool
    """The method narrows heads and hidden units, so `round_to` has an effect."""
    takes_tokens: bool
    """The method reduces tokens. All others keep every token, whatever the token reduction."""
    has_budgets: bool = False
    """The method prunes block by block: each block has a budget of accuracy points, and a criterion scores channels."""
    needs_profile: bool = False
    """The method allocates by a profile of the dense model, one for every token reduction."""
    trains: bool = False
    """The method trains the weights while it prunes."""
    repairs: bool = False
    """The method repairs the pruned model in closed form, so its weights follow from the plan and the dense model."""
    is_sparse: bool = False
    """The method sets single weights to 0, by `pattern`, and leaves all shapes as they are."""
    serves_every_exit: bool = False
    """One trial gives a model for each exit up to the candidate's. Its training leaves nothing to recover."""

    @property
    def is_schedule(self) -> bool:
        """The method takes tokens alone, by a fixed rule."""
        return self.takes_tokens and not self.takes_channels

    @property
    def has_rungs(self) -> bool:
        """A trial can be judged early: without training, a model made from a part of the images costs little."""
        return self.repairs


METHODS: dict[Method, MethodTraits] = {
    "cascade": MethodTraits(
        summary="block by block, as far as each block's accuracy budget goes (VTC-LFC)",
        takes_channels=True, takes_tokens=True, has_budgets=True, repairs=True,
    ),
    "global": MethodTraits(
        summary="all blocks at once, every unit at one price of a multiply-add",
        takes_channels=True, takes_tokens=True, needs_profile=True, repairs=True,
    ),
    "constant": MethodTraits(
        summary="tokens alone, as many from every block (ToMe)",
        takes_channels=False, takes_tokens=True, repairs=True,
    ),
    "decreasing": MethodTraits(
        summary="tokens alone, fewer and fewer from block to block (ToMe)",
        takes_channels=False, takes_tokens=True, repairs=True,
    ),
    "learned": MethodTraits(
        summary="widths trained together with the weights, for all exits at once (WDPruning)",
        takes_channels=True, takes_tokens=False, trains=True, serves_every_exit=True,
    ),
    "soft-mask": MethodTraits(
        summary="gates trained under an L1 penalty (VTP, network slimming)",
        takes_channels=True, takes_tokens=False, trains=True,
    ),
    "unstructured": MethodTraits(
        summary="the smallest single weights become 0, all shapes stay",
        takes_channels=False, takes_tokens=False, is_sparse=True,
    ),
}  # fmt: skip
"""Every method with its traits. The functions that run them are in `search.trial.methods`."""
