"""DeepSeek-V3, top down: embedding, layers, head."""

from collections.abc import Mapping

from torch import Tensor

from ..kernels import fused, gemm
from .batch import ForwardBatch
from .config import ModelConfig
from .exchange import LoneStage
from .kv_cache import KVCache
from .layers import MLP, Arithmetic, Quantized, RMSNorm
from .mla import MLA, LazySchedule
from .moe import MoE
from .numerics import Numerics
from .parallel import WHOLE, Layout
from .rope import tables


class DecoderLayer:
    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        layer: int,
        arithmetic: Arithmetic,
        layout: Layout = WHOLE,
    ) -> None:
        self.name = name = f"layers.{layer}"
        eps = config.rms_norm_eps
        self.input_norm = RMSNorm(weights[f"{name}.input_layernorm"], eps, arithmetic)
        self.attn = MLA(config, weights, f"{name}.attn", arithmetic)
        post_norm = weights[f"{name}.post_attention_layernorm"]
        self.post_attn_norm = RMSNorm(post_norm, eps, arithmetic)
        self.mlp: MoE | MLP = (
            MoE(config, weights, name, arithmetic, layout)
            if config.is_moe(layer)
            else MLP(weights, f"{name}.mlp", arithmetic)
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: ForwardBatch,
        cache: Tensor,
        schedule: LazySchedule,
        numerics: Numerics | None,
    ) -> tuple[Tensor, Tensor]:
        """x: [T, hidden], the last layer's output that is not yet added to `residual`."""
        normed: Tensor | Quantized
        if residual is None:
            normed, residual = self.input_norm(x), x
        else:
            normed, _, residual = self.input_norm.add(x, residual)
        x = self.attn(normed, batch, cache, schedule)
        if numerics is not None:
            numerics.check(f"{self.name}.self_attn", x)
        normed, plain, residual = self.post_attn_norm.add(x, residual)
        x = self.mlp(normed, plain) if isinstance(self.mlp, MoE) else self.mlp(normed)
        if numerics is not None:
            numerics.check(f"{self.name}.mlp", x)
        return x, residual

    def maps(self) -> set[tuple[int, int]]:
        """(N, K) of its dense linear maps."""
        attn, mlp = self.attn, self.mlp
        linears = [*attn.down, attn.q, attn.kv_b, attn.o]
        dense = mlp.shared if isinstance(mlp, MoE) else mlp
        if dense is not None:
            linears += [dense.gate_up, dense.down]
        return {tuple(linear.weight.shape) for linear in linears}


class DeepseekV3:
    """The model on one device; of a pipeline, one stage of it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        arithmetic: Arithmetic,
        max_seq_len: int,
        numerics: Numerics | None = None,
        layout: Layout = WHOLE,
    ) -> None:
        self.numerics = numerics
        """Checks what each layer adds, if there is one."""
        self.config = config
        self.dtype = arithmetic.dtype
        self.layout = layout
        self.layers = [
            DecoderLayer(config, weights, layer, arithmetic, layout)
            for layer in layout.layers(config)
        ]
        device = self.layers[0].input_norm.weight.device
        self.stages = LoneStage(config, self.dtype, device)
        """What is before and behind this stage."""
        if layout.is_first_stage or "embed" in weights:
            self.embed = weights["embed"]
        if self.has_head:
            self.norm = weights["norm"]
            self.lm_head = weights["embed" if config.tie_word_embeddings else "lm_head"]
        self.cos, self.sin = tables(config.rope, config.qk_rope_head_dim, max_seq_len, device)

    @property
    def has_head(self) -> bool:
        return self.layout.is_last_stage

    def maps(self) -> set[tuple[int, int]]:
        """(N, K) of every dense linear map of the layers."""
        return {shape for layer in self.layers for shape in layer.maps()}

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states [T, hidden] after the final norm, or as the stage behind receives them;
        writes the tokens' KV into the cache."""
        if self.layout.is_first_stage:
            x = fused.embedding(self.embed, batch.inputs.input_ids, self.dtype)
        else:
            x = self.stages.receive(len(batch.inputs.input_ids))
        if self.numerics is not None:
            self.numerics.check("embed", x)
        schedule = self.layers[0].attn.schedule(batch, cache.layers[0])
        residual: Tensor | None = None
        for layer, layer_cache in zip(self.layers, cache.layers, strict=False):  # MTP's is behind
            x, residual = layer(x, residual, batch, layer_cache, schedule, self.numerics)
        assert residual is not None
        if not self.has_head:
            if self.numerics is not None:
                self.numerics.finish()
            return self.stages.send(x + residual)
        normed, _ = fused.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)
        if self.numerics is not None:
            self.numerics.check("norm", normed)
            self.numerics.finish()
        return normed

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden: [S, hidden] -> [S, vocab_size] float32, in `out` if it is given."""
        return gemm.linear_float32(hidden, self.lm_head, out)
