"""Which tensors a checkpoint of the family holds: name, shape, and where each one goes.

No torch here: the loader, the checkpoint tools and the planner share this table. Names are those of
the published checkpoints. In memory, gate and up of an MLP are one weight (gate first), and the
experts of a layer are stacked.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .config import FP8_BLOCK, ModelConfig


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint and its place in memory."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """"linear" (e4m3 where the checkpoint is), "scale" (its float32 scales), "plain", or
    "float32"."""
    target: str
    """Name of the tensor in memory that holds it."""
    expert: int | None = None
    """Index into the target's first dimension."""
    row: int = 0
    """First row of the target (after `expert`) that it fills."""


class TargetSpec(NamedTuple):
    """One tensor in memory."""

    shape: tuple[int, ...]
    kind: str


def tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor that the checkpoint must hold, MTP layers left out."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield TensorSpec("model.embed_tokens.weight", (vocab, hidden), "plain", "embed")
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, layer)
    yield TensorSpec("model.norm.weight", (hidden,), "plain", "norm")
    if not config.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (vocab, hidden), "plain", "lm_head")


def targets(config: ModelConfig) -> dict[str, TargetSpec]:
    """The tensors in memory that `tensors` fill, by name."""
    found: dict[str, TargetSpec] = {}
    for spec in tensors(config):
        rows = spec.row + spec.shape[0]
        shape = (rows, *spec.shape[1:])
        if spec.expert is not None:
            shape = (config.n_routed_experts, *shape)
        old = found.get(spec.target)
        if old is None or old.shape < shape:
            found[spec.target] = TargetSpec(shape, spec.kind)
    return found


def is_ignored(config: ModelConfig, name: str) -> bool:
    """True for tensors that a checkpoint may hold beside `tensors`: the MTP layers, which follow
    the last layer, buffers that old exports wrote, and a head that is tied."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if config.tie_word_embeddings and name == "lm_head.weight":
        return True
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 4 or not parts[2].isdigit():
        return False
    first = config.num_hidden_layers
    return first <= int(parts[2]) < first + config.num_nextn_predict_layers


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the 128x128 scales of a weight [N, K]."""
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def _linear(
    config: ModelConfig,
    name: str,
    shape: tuple[int, int],
    target: str,
    expert: int | None = None,
    row: int = 0,
) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", shape, "linear", target, expert, row)
    if config.fp8:
        scale = f"{target}.scale"
        yield TensorSpec(
            f"{name}.weight_scale_inv", scale_shape(shape), "scale", scale, expert, row // FP8_BLOCK
        )


def _layer(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    name, target, hidden = f"model.layers.{layer}", f"layers.{layer}", config.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{name}.{norm}.weight", (hidden,), "plain", f"{target}.{norm}")
    yield from _attention(config, f"{name}.self_attn", f"{target}.attn")
    if not config.is_moe(layer):
        yield from _mlp(config, f"{name}.mlp", f"{target}.mlp", config.intermediate_size)
        return
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    gate = f"{name}.mlp.gate"
    yield TensorSpec(f"{gate}.weight", (experts, hidden), "plain", f"{target}.gate")
    yield TensorSpec(
        f"{gate}.e_score_correction_bias", (experts,), "float32", f"{target}.gate_bias"
    )
    for expert in range(experts):
        source = f"{name}.mlp.experts.{expert}"
        yield from _mlp(config, source, f"{target}.experts", width, expert)
    if config.n_shared_experts:
        shared = width * config.n_shared_experts
        yield from _mlp(config, f"{name}.mlp.shared_experts", f"{target}.shared", shared)


def _attention(config: ModelConfig, name: str, target: str) -> Iterator[TensorSpec]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_width = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield from _linear(config, f"{name}.q_proj", (q_width, hidden), f"{target}.q")
    else:
        rank = config.q_lora_rank
        yield from _linear(config, f"{name}.q_a_proj", (rank, hidden), f"{target}.q_a")
        yield TensorSpec(f"{name}.q_a_layernorm.weight", (rank,), "plain", f"{target}.q_a_norm")
        yield from _linear(config, f"{name}.q_b_proj", (q_width, rank), f"{target}.q")
    yield from _linear(
        config, f"{name}.kv_a_proj_with_mqa", (config.latent_dim, hidden), f"{target}.kv_a"
    )
    rank = config.kv_lora_rank
    yield TensorSpec(f"{name}.kv_a_layernorm.weight", (rank,), "plain", f"{target}.kv_a_norm")
    kv_width = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield from _linear(config, f"{name}.kv_b_proj", (kv_width, rank), f"{target}.kv_b")
    out_width = heads * config.v_head_dim
    yield from _linear(config, f"{name}.o_proj", (hidden, out_width), f"{target}.o")


def _mlp(
    config: ModelConfig, name: str, target: str, width: int, expert: int | None = None
) -> Iterator[TensorSpec]:
    hidden = config.hidden_size
    gate_up = f"{target}.gate_up"
    yield from _linear(config, f"{name}.gate_proj", (width, hidden), gate_up, expert)
    yield from _linear(config, f"{name}.up_proj", (width, hidden), gate_up, expert, row=width)
    yield from _linear(config, f"{name}.down_proj", (hidden, width), f"{target}.down", expert)
