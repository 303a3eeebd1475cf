"""`Layout`: which part of the model one rank holds.

Ranks form `pp_size` stages of `tp_size` ranks; a stage has consecutive layers, the first one the
embedding, the last one norm and head. Inside a stage the flags mean what they do in TensorRT-LLM:

    what                                      plain                    attention-DP
    attention: heads (rows of q and kv_b,     tp_size slices           whole on every rank
      columns of o); dense MLPs and shared
      experts: width; MTP's eh_proj: columns;
      embedding and head: vocabulary
    routed experts                            ep_size groups of experts, the width of each expert
                                              in tp_size / ep_size slices
    norms, gate, q_a, kv_a                    whole on every rank

So TP 8 with EP 4 is TP 2 x EP 4 for the experts: rank r holds group r % 4, slice r // 4. Heads and
vocabulary are cut evenly or not at all. Weights in fp8 are cut between their 128x128 scale blocks;
a size that does not allow the layout raises CheckpointError. One exception, because the published
shared expert is narrow: where its width cannot be cut, rank 0 of the stage holds it whole and the
others nothing, which leaves the sum over the ranks as it is.

Knows nothing of torch or of processes. All methods give ranges of the whole model's indices.
"""

import msgspec

from .config import FP8_BLOCK, CheckpointError, ModelConfig


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's place. The default is one rank that holds everything."""

    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    """Divides `tp_size`: the expert groups lie inside the TP group."""
    pp_size: int = 1
    pp_rank: int = 0
    attention_dp: bool = False

    def __post_init__(self) -> None:
        for what in ("tp", "pp"):
            rank, size = getattr(self, f"{what}_rank"), getattr(self, f"{what}_size")
            if not 0 <= rank < size:
                raise CheckpointError(f"{what}_rank {rank} is not one of {what}_size {size}")
        if self.ep_size < 1 or self.tp_size % self.ep_size:
            raise CheckpointError(
                f"tp_size {self.tp_size} is no multiple of ep_size {self.ep_size}"
            )

    # ---- places in groups ----

    @property
    def ep_rank(self) -> int:
        return self.tp_rank % self.ep_size

    @property
    def moe_tp_size(self) -> int:
        """Slices of each routed expert's width."""
        return self.tp_size // self.ep_size

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // self.ep_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    # ---- what this rank holds ----

    def layers(self, config: ModelConfig) -> range:
        """The stage's layers. The first stages have one more where the sizes ask for it: dense
        layers are light, and the last stage has the head."""
        if config.num_hidden_layers < self.pp_size:
            raise CheckpointError(
                f"num_hidden_layers {config.num_hidden_layers} is less than pp_size {self.pp_size}"
            )
        each, more = divmod(config.num_hidden_layers, self.pp_size)
        start = self.pp_rank * each + min(self.pp_rank, more)
        return range(start, start + each + (self.pp_rank < more))

    def heads(self, config: ModelConfig) -> range:
        held = self._cut("num_attention_heads", config.num_attention_heads)
        if config.fp8 and len(held) < config.num_attention_heads:
            nope, rope, v_dim = (
                config.qk_nope_head_dim,
                config.qk_rope_head_dim,
                config.v_head_dim,
            )
            for what, width in (
                (f"q_proj, {nope} + {rope} rows a head", nope + rope),
                (f"kv_b_proj, {nope} + {v_dim} rows a head", nope + v_dim),
                (f"o_proj, {v_dim} columns a head", v_dim),
            ):
                self._check_blocks(f"{len(held)} heads of {what}", len(held) * width)
        return held

    def vocabulary(self, config: ModelConfig) -> range:
        """Rows of embedding and head."""
        return self._cut("vocab_size", config.vocab_size)

    def joined_width(self, config: ModelConfig) -> range:
        """Of what the MTP layer's eh_proj takes: two hidden states."""
        return self._cut("2 * hidden_size", 2 * config.hidden_size)

    def dense_width(self, config: ModelConfig) -> range:
        """Of the dense layers' `intermediate_size`."""
        held = self._cut("intermediate_size", config.intermediate_size)
        if config.fp8:
            self._check_blocks("intermediate_size", len(held))
        return held

    def shared_width(self, config: ModelConfig) -> range:
        """Of the shared experts' width; may be empty, see above."""
        width = config.moe_intermediate_size * config.n_shared_experts
        block = FP8_BLOCK if config.fp8 else 1
        if not self.attention_dp and width % (self.tp_size * block):
            return range(width if self.tp_rank == 0 else 0)
        return self._cut("moe_intermediate_size", width)

    def experts(self, config: ModelConfig) -> range:
        """The routed experts of which this rank holds a slice."""
        if config.n_routed_experts % self.ep_size:
            raise CheckpointError(
                f"n_routed_experts {config.n_routed_experts} is no multiple of "
                f"ep_size {self.ep_size}"
            )
        count = config.n_routed_experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)

    def expert_width(self, config: ModelConfig) -> range:
        """Of each routed expert's `moe_intermediate_size`."""
        size, parts = config.moe_intermediate_size, self.moe_tp_size
        ranks = f"tp_size {self.tp_size} / ep_size {self.ep_size}"
        if size % parts:
            raise CheckpointError(f"moe_intermediate_size {size} is no multiple of {ranks}")
        if config.fp8:
            self._check_blocks(f"moe_intermediate_size over {ranks}", size // parts)
        return _part(size, parts, self.moe_tp_rank)

    def local(self, config: ModelConfig) -> ModelConfig:
        """`config` with the sizes that code for one rank must see to run this rank's attention,
        MLPs, embedding and head. Expert groups and stages are more than sizes: not here."""
        return msgspec.structs.replace(
            config,
            num_attention_heads=len(self.heads(config)),
            vocab_size=len(self.vocabulary(config)),
        )

    # ---- inside ----

    def _cut(self, what: str, size: int) -> range:
        """This rank's slice of what is cut over the TP group, or is whole in attention-DP."""
        if self.attention_dp:
            return range(size)
        if size % self.tp_size:
            raise CheckpointError(f"{what} {size} is no multiple of tp_size {self.tp_size}")
        return _part(size, self.tp_size, self.tp_rank)

    def _check_blocks(self, what: str, width: int) -> None:
        if width % FP8_BLOCK:
            raise CheckpointError(
                f"tp_size {self.tp_size}, ep_size {self.ep_size}: a rank's part of {what} is "
                f"{width}; weights in fp8 are cut at multiples of {FP8_BLOCK}"
            )


WHOLE = Layout()
"""One rank that holds everything."""


def _part(size: int, parts: int, index: int) -> range:
    width = size // parts
    return range(index * width, (index + 1) * width)
