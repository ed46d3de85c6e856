"""Builders of outcomes: choose the two objectives, the rest follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from pruning.plan import BlockPlan, Plan
from search.config import PRESETS, SpaceConfig
from search.goal import Goal
from search.outcome import Candidate, Measurement, Outcome, State

DENSE_IMG_S = 100.0


def papers_space(**changes: Any) -> SpaceConfig:
    """Builds a search space with VTC-LFC's method, score, token reduction and widths; `changes` override its keys."""
    return SpaceConfig(**PRESETS["papers"] | changes)


def measurement(top1: float, speedup: float, **other: Any) -> Measurement:
    """Builds a measurement whose other fields agree with the two; `other` overrides them."""
    measurement = Measurement(
        top1=top1,
        top1_low=top1 - 0.01,
        top1_high=top1 + 0.01,
        throughput_img_s=DENSE_IMG_S * speedup,
        speedup=speedup,
        speedup_low=speedup * 0.95,
        speedup_high=speedup * 1.05,
        latency_ms_p50=64_000 / (DENSE_IMG_S * speedup),
        macs=round(1_234_567 / speedup),
        params=round(5_700_000 / speedup),
    )
    return replace(measurement, **other)


def plan(exit_block: int = 2) -> Plan:
    """Builds a plan whose blocks are all alike."""
    block = BlockPlan(
        keep_heads=(0, 2), keep_qk=((0, 1), (1, 3)), keep_v=((0,), (2,)), keep_hidden=(1, 4), num_tokens=9
    )
    return Plan(blocks=(block,) * exit_block)


def candidate(exit_block: int = 2, **other: Any) -> Candidate:
    """Builds a candidate of the cascade; `other` overrides its fields."""
    candidate = Candidate(
        cutoff_channel=0.1,
        cutoff_token=0.8,
        drop_budget=(1.5, 0.5, 0.25),
        token_share=0.5,
        target_ratio=0.6,
        exit_block=exit_block,
    )
    return replace(candidate, **other)


def outcome(id: str, top1: float, speedup: float, **other: Any) -> Outcome:
    """Builds a measured outcome; `other` are fields of its measurement."""
    return Outcome(
        id=id,
        state=State.MEASURED,
        candidate=candidate(),
        plan=plan(),
        measurement=measurement(top1, speedup, **other),
        block_drops=(1.25, 0.5),
        forward_passes=12.0,
        seconds=3.5,
    )


def failed(id: str, state: State = State.FAILED, reason: str = "RuntimeError: out of memory") -> Outcome:
    """Builds an outcome without a measurement."""
    return Outcome(id=id, state=state, candidate=candidate(), reason=reason, seconds=0.5)


DENSE = measurement(0.9, 1.0)
GOAL = Goal(dense=DENSE)


def same(one: Any, other: Any) -> bool:
    """Tells whether two nested things are equal bit for bit, and of the same classes."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return bool(one == other)
