"""`ForwardBatch`: one forward pass as tensors, between the runner and the model."""

from dataclasses import dataclass

from torch import Tensor

from ..kernels.step import Inputs


@dataclass(frozen=True)
class PrefillSlice:
    """One sequence's tokens of this pass, and its tokens that are in the cache already."""

    first: int
    """Index of its first token in the batch."""
    num_tokens: int
    num_cached: int
    block_table: Tensor
    """[max_blocks] int32."""


@dataclass(frozen=True)
class Context:
    """Cached tokens of the prefill slices that are attended to at once, so that the memory of a
    long prefix is bounded. Slice i has keys cu_seqlens[i] ... cu_seqlens[i + 1] - 1 of them."""

    pieces: tuple[tuple[int, int, int], ...]
    """(prefill slice, first cached token, behind the last), in the order of the slices."""
    cu_seqlens: Tensor
    """[number of slices + 1] int32."""


@dataclass(frozen=True)
class Prefills:
    """The slices of one pass; there is at least one."""

    slices: tuple[PrefillSlice, ...]
    cu_seqlens: Tensor
    """[number of slices + 1] int32: where each begins among the prefill tokens."""
    max_tokens: int
    """Of a slice."""
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class ForwardBatch:
    """Decode tokens first (one per sequence), then the prefill slices.

    ```
    tokens   | d0 d1 d2 ... | p0 p0 p0 | p1 p1 ... |
             <- num_decodes -><- slices[0] -> ...
    ```
    """

    inputs: Inputs
    num_decodes: int
    block_table: Tensor
    """[num_decodes, max_blocks] int32; entries past a sequence's length are never read."""
    seq_lens: Tensor
    """[num_decodes] int32, the new token included; 0: a row of padding."""
    prefills: Prefills | None


@dataclass(frozen=True)
class Sampled:
    """What a pass ends with: a line for each token that was wanted."""

    logits: Tensor
    """[S, vocab_size] float32."""
    token_ids: Tensor
    """[S] int64."""

    def first(self, num_lines: int) -> "Sampled":
        return Sampled(self.logits[:num_lines], self.token_ids[:num_lines])
