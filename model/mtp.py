"""Multi-token prediction: the layer that drafts what follows the next token.

DeepSeek-V3 (arXiv 2412.19437), section 2.2. At position i it takes what the model made of the
tokens up to i, and token i + 1, and predicts token i + 2:

    x = eh_proj [enorm(embedding(token i + 1)) ; hnorm(hidden i)]
    hidden' = head_norm(layer(x))          logits = hidden' lm_head^T

It is a decoder layer like the others, with its own KV. Embedding and head are the model's. Further
drafts come from the same layer: `hidden'` takes the place of the model's hidden state at i + 1, and
the draft that of token i + 2. (A checkpoint may hold one module for each depth. They are not used:
the second one's KV at i depends on token i + 2, so it would have to be computed again, from the
first one's hidden states of earlier steps, whenever a draft was wrong.)

The hidden state is the one after the final norm, in training as in serving.
"""

from collections.abc import Mapping

from torch import Tensor

from ..kernels import fused
from .batch import ForwardBatch
from .config import ModelConfig
from .deepseek import DecoderLayer, DeepseekV3
from .kv_cache import KVCache
from .layers import Arithmetic, Linear
from .parallel import WHOLE, Layout


class MTP:
    """The MTP layer of a model, whose KV is the last layer of the cache."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        arithmetic: Arithmetic,
        model: DeepseekV3,
        layout: Layout = WHOLE,
    ) -> None:
        layer = config.num_hidden_layers
        name = f"layers.{layer}"
        self.config = config
        self.model = model
        self.enorm = weights[f"{name}.enorm"]
        self.hnorm = weights[f"{name}.hnorm"]
        held = layout.joined_width(config)
        self._held = slice(held.start, held.stop)
        self.eh_proj = Linear.load(weights, f"{name}.eh_proj", arithmetic)
        self.layer = DecoderLayer(config, weights, layer, arithmetic, layout)
        self.head_norm = weights[f"{name}.head_norm"]

    def forward(self, hidden: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """hidden: [T, hidden] of the model or of this layer, after its norm; batch: the places of
        `hidden`, with the token behind each as input id -> [T, hidden] after the norm; for the
        model's `logits`."""
        eps, numerics, own = self.config.rms_norm_eps, self.model.numerics, cache.layers[-1]
        schedule = self.layer.attn.schedule(batch, own)
        x = self._joined(hidden, batch)
        x, residual = self.layer(x, None, batch, own, schedule, numerics)
        normed, _ = fused.add_rms_norm(x, residual, self.head_norm, eps)
        if numerics is not None:
            numerics.check("head_norm", normed)
            numerics.finish()
        return normed

    def store(self, hidden: Tensor, batch: ForwardBatch, cache: KVCache) -> None:
        """Writes the KV that `forward` would write, and computes nothing else."""
        x = self.layer.input_norm(self._joined(hidden, batch))
        self.layer.attn.store(x, batch.inputs, cache.layers[-1])

    def _joined(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, hidden]: what the layer takes; of a TP rank its part of the sum."""
        model, ids = self.model, batch.inputs.input_ids
        both = fused.joined(
            model.embed, ids, self.enorm, hidden, self.hnorm, self.config.rms_norm_eps, model.dtype
        )
        return self.eh_proj(both[:, self._held])
