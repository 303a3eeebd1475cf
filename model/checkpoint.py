"""Which tensors a checkpoint of the family holds: name, shape, and where each one goes.

No torch here: the loader, the checkpoint tools and the planner share this table. Names are those of
the published checkpoints. In memory, gate and up of an MLP are one weight (gate first), and the
experts of a layer are stacked.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .config import FP8_BLOCK, ModelConfig
from .parallel import WHOLE, Layout


class TensorSpec(NamedTuple):
    """One tensor of a checkpoint and its place in memory."""

    name: str
    shape: tuple[int, ...]
    """In the checkpoint."""
    part: tuple[range, ...]
    """What of it the rank holds, a range for each dimension."""
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


def tensors(config: ModelConfig, layout: Layout = WHOLE, mtp: bool = False) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint of which the rank holds a part; with `mtp` those of the first
    MTP layer too, which the last stage holds. Raises CheckpointError for a layout that the sizes do
    not allow."""
    hidden, vocab = config.hidden_size, config.vocab_size
    rows = layout.vocabulary(config)
    has_head = layout.is_last_stage and not config.tie_word_embeddings
    drafts = layout.is_last_stage and mtp
    if layout.is_first_stage or drafts or (layout.is_last_stage and config.tie_word_embeddings):
        yield _plain("model.embed_tokens.weight", (vocab, hidden), "embed", rows)
    for layer in layout.layers(config):
        yield from _layer(config, layout, layer)
    if drafts:
        yield from _mtp_layer(config, layout)
    if layout.is_last_stage:
        yield _plain("model.norm.weight", (hidden,), "norm")
    if has_head:
        yield _plain("lm_head.weight", (vocab, hidden), "lm_head", rows)


def targets(
    config: ModelConfig, layout: Layout = WHOLE, mtp: bool = False
) -> dict[str, TargetSpec]:
    """The tensors in memory that `tensors` fill, by name. Names count layers as the checkpoint
    does; experts and rows are the rank's own."""
    found: dict[str, TargetSpec] = {}
    for spec in tensors(config, layout, mtp):
        rows, *others = (len(held) for held in spec.part)
        shape = (spec.row + rows, *others)
        if spec.expert is not None:
            shape = (len(layout.experts(config)), *shape)
        old = found.get(spec.target)
        if old is None or old.shape < shape:
            found[spec.target] = TargetSpec(shape, spec.kind)
    return found


def is_ignored(config: ModelConfig, name: str) -> bool:
    """True for tensors that a checkpoint may hold beside `tensors`: the MTP layers, which follow
    the last layer (of one that is served, its copies of embedding and head), buffers that old
    exports wrote, and a head that is tied."""
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


def _plain(name: str, shape: tuple[int, ...], target: str, rows: range | None = None) -> TensorSpec:
    whole = tuple(range(size) for size in shape)
    return TensorSpec(name, shape, whole if rows is None else (rows, *whole[1:]), "plain", target)


def _linear(
    config: ModelConfig,
    name: str,
    shape: tuple[int, int],
    target: str,
    rows: range | None = None,
    columns: range | None = None,
    expert: int | None = None,
    row: int = 0,
) -> Iterator[TensorSpec]:
    """A weight [N, K], of which the rank holds `rows` and `columns` (None: all)."""
    part = (
        range(shape[0]) if rows is None else rows,
        range(shape[1]) if columns is None else columns,
    )
    yield TensorSpec(f"{name}.weight", shape, part, "linear", target, expert, row)
    if config.fp8:
        blocks = tuple(_blocks(held) for held in part)
        yield TensorSpec(
            f"{name}.weight_scale_inv",
            scale_shape(shape),
            blocks,
            "scale",
            f"{target}.scale",
            expert,
            row // FP8_BLOCK,
        )


def _blocks(held: range) -> range:
    assert held.start % FP8_BLOCK == 0, held
    return range(held.start // FP8_BLOCK, -(-held.stop // FP8_BLOCK))


def _layer(config: ModelConfig, layout: Layout, layer: int) -> Iterator[TensorSpec]:
    name, target, hidden = f"model.layers.{layer}", f"layers.{layer}", config.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield _plain(f"{name}.{norm}.weight", (hidden,), f"{target}.{norm}")
    yield from _attention(config, layout, f"{name}.self_attn", f"{target}.attn")
    if not config.is_moe(layer):
        width, held = config.intermediate_size, layout.dense_width(config)
        yield from _mlp(config, f"{name}.mlp", f"{target}.mlp", width, held)
        return
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    gate = f"{name}.mlp.gate"
    yield _plain(f"{gate}.weight", (experts, hidden), f"{target}.gate")
    yield TensorSpec(
        f"{gate}.e_score_correction_bias",
        (experts,),
        (range(experts),),
        "float32",
        f"{target}.gate_bias",
    )
    held = layout.expert_width(config)
    for index, expert in enumerate(layout.experts(config)):
        source = f"{name}.mlp.experts.{expert}"
        yield from _mlp(config, source, f"{target}.experts", width, held, index)
    if held := layout.shared_width(config):
        shared = width * config.n_shared_experts
        yield from _mlp(config, f"{name}.mlp.shared_experts", f"{target}.shared", shared, held)


def _mtp_layer(config: ModelConfig, layout: Layout) -> Iterator[TensorSpec]:
    """A decoder layer behind the last one, with what makes its input and reads its output. Its
    embedding and head are the model's own, of which the checkpoint holds copies."""
    layer, hidden = config.num_hidden_layers, config.hidden_size
    name, target = f"model.layers.{layer}", f"layers.{layer}"
    yield _plain(f"{name}.enorm.weight", (hidden,), f"{target}.enorm")
    yield _plain(f"{name}.hnorm.weight", (hidden,), f"{target}.hnorm")
    part = range(hidden), layout.joined_width(config)
    eh_proj = f"{name}.eh_proj.weight"
    yield TensorSpec(eh_proj, (hidden, 2 * hidden), part, "plain", f"{target}.eh_proj")
    yield from _layer(config, layout, layer)
    yield _plain(f"{name}.shared_head.norm.weight", (hidden,), f"{target}.head_norm")


def _attention(config: ModelConfig, layout: Layout, name: str, target: str) -> Iterator[TensorSpec]:
    hidden, count, held = config.hidden_size, config.num_attention_heads, layout.heads(config)

    def slices(width: int) -> range:
        return range(held.start * width, held.stop * width)

    width = config.qk_head_dim
    q_target, q_rows = f"{target}.q", slices(width)
    if config.q_lora_rank is None:
        yield from _linear(config, f"{name}.q_proj", (count * width, hidden), q_target, q_rows)
    else:
        rank = config.q_lora_rank
        yield from _linear(config, f"{name}.q_a_proj", (rank, hidden), f"{target}.q_a")
        yield _plain(f"{name}.q_a_layernorm.weight", (rank,), f"{target}.q_a_norm")
        yield from _linear(config, f"{name}.q_b_proj", (count * width, rank), q_target, q_rows)
    yield from _linear(
        config, f"{name}.kv_a_proj_with_mqa", (config.latent_dim, hidden), f"{target}.kv_a"
    )
    rank = config.kv_lora_rank
    yield _plain(f"{name}.kv_a_layernorm.weight", (rank,), f"{target}.kv_a_norm")
    width = config.qk_nope_head_dim + config.v_head_dim
    yield from _linear(
        config, f"{name}.kv_b_proj", (count * width, rank), f"{target}.kv_b", slices(width)
    )
    width = config.v_head_dim
    yield from _linear(
        config, f"{name}.o_proj", (hidden, count * width), f"{target}.o", columns=slices(width)
    )


def _mlp(
    config: ModelConfig,
    name: str,
    target: str,
    width: int,
    held: range,
    expert: int | None = None,
) -> Iterator[TensorSpec]:
    """`held`: the rank's slice of `width`. Its gate rows come first, then its up rows."""
    hidden, up_row = config.hidden_size, len(held)
    gate_up = f"{target}.gate_up"
    shape = (width, hidden)
    yield from _linear(config, f"{name}.gate_proj", shape, gate_up, held, None, expert)
    yield from _linear(config, f"{name}.up_proj", shape, gate_up, held, None, expert, up_row)
    yield from _linear(
        config, f"{name}.down_proj", (hidden, width), f"{target}.down", None, held, expert
    )
