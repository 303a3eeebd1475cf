"""What a rank must at least do, in bytes, from sizes alone. No torch.

`floor_bytes` is the floor of a decode step: no implementation that keeps weights and KV in device
memory reads less. Divided by the memory's bandwidth it is the shortest time of a step.
"""

import functools
import math
from typing import NamedTuple

from . import checkpoint
from .config import ModelConfig
from .parallel import Layout

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class WeightBytes(NamedTuple):
    """Bytes of a rank's weights, as a decode step reads them."""

    every_step: int
    """Read whole by every step, however few tokens it has."""
    routed: int
    """Of all its routed experts, of which a step reads those that its tokens chose."""


@functools.cache
def weight_bytes(config: ModelConfig, layout: Layout, itemsize: int = 2) -> WeightBytes:
    """`itemsize`: bytes of an activation. In it the absorbed attention keeps kv_b, dequantised
    (W_UK and W_UV). The embedding, of which a step reads a row for each token, is left out."""
    return _sum(config, layout, checkpoint.targets(config, layout), itemsize)


@functools.cache
def mtp_bytes(config: ModelConfig, layout: Layout, itemsize: int = 2) -> WeightBytes:
    """The same of one pass of the MTP layer, without the head."""
    without = checkpoint.targets(config, layout)
    every = checkpoint.targets(config, layout, mtp=True)
    own = {name: spec for name, spec in every.items() if name not in without}
    return _sum(config, layout, own, itemsize)


def _sum(
    config: ModelConfig, layout: Layout, targets: dict[str, checkpoint.TargetSpec], itemsize: int
) -> WeightBytes:
    every_step = routed = 0
    for name, spec in targets.items():
        count = math.prod(spec.shape)
        if ".attn.kv_b" in name:
            every_step += 0 if spec.kind == "scale" else count * itemsize
        elif ".experts." in name:
            routed += count * _itemsize(config, spec.kind, itemsize)
        elif name != "embed" or (config.tie_word_embeddings and layout.is_last_stage):
            every_step += count * _itemsize(config, spec.kind, itemsize)
    return WeightBytes(every_step, routed)


def _itemsize(config: ModelConfig, kind: str, itemsize: int) -> int:
    if kind in ("scale", "float32"):
        return 4
    if kind == "linear" and config.fp8:
        return 1
    return min(itemsize, ITEMSIZE[config.dtype])


def expected_experts(config: ModelConfig, layout: Layout, batch: int) -> float:
    """How many of the rank's routed experts a decode step touches in one layer, on average, if the
    gate prefers none. `batch`: sequences of this rank; in attention-DP the others bring as many.

    A token misses an expert with probability 1 - top_k / n_experts, however its choice is limited
    to groups, because no expert is special; tokens choose by themselves.
    """
    num_tokens = batch * layout.tp_size if layout.attention_dp else batch
    missed = (1 - config.num_experts_per_tok / config.n_routed_experts) ** num_tokens
    return len(layout.experts(config)) * (1 - missed)


def floor_bytes(
    config: ModelConfig,
    layout: Layout,
    batch: int,
    context: float,
    itemsize: int = 2,
    entry_bytes: int = 0,
    num_drafts: int = 0,
    same_experts: bool = False,
) -> float:
    """Bytes that a decode step of `batch` sequences must read on this rank: each weight that it
    touches, once, and the KV of `context` tokens (their mean) of each sequence.

    `entry_bytes`: of one token's KV in one layer; 0: unquantised, of `itemsize` bytes each number.
    `num_drafts`: verified and made by the step; the MTP layer and the head are read once for each.
    `same_experts`: all tokens of the step choose those of one.
    """
    weights = weight_bytes(config, layout, itemsize)
    kv_layer_bytes = batch * context * (entry_bytes or config.latent_dim * itemsize)
    num_bytes = weights.every_step + kv_layer_bytes * len(layout.layers(config))
    num_bytes += weights.routed * _share(
        config, layout, 1 if same_experts else batch * (1 + num_drafts)
    )
    if num_drafts:
        own = mtp_bytes(config, layout, itemsize)
        head = math.prod((len(layout.vocabulary(config)), config.hidden_size))
        passes = num_drafts * (own.every_step + kv_layer_bytes)
        passes += num_drafts * head * _itemsize(config, "lm_head", itemsize)
        share = _share(config, layout, 1 if same_experts else batch)
        num_bytes += passes + num_drafts * own.routed * share
    return num_bytes


def _share(config: ModelConfig, layout: Layout, num_tokens: int) -> float:
    """Of the rank's routed experts of a layer, those that so many of its own tokens touch."""
    return expected_experts(config, layout, num_tokens) / len(layout.experts(config))
