"""`ForwardBatch`: one forward pass as tensors, between the runner and the model."""

from dataclasses import dataclass, replace

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
    """Decode tokens first (`query_len` of each sequence), then the prefill slices.

    ```
    tokens   | d0 d0 d1 d1 ...       | p0 p0 p0 | p1 p1 ... |
             <- num_decode_tokens --><- slices[0] -> ...
    ```
    """

    inputs: Inputs
    num_decodes: int
    block_table: Tensor
    """[num_decodes, max_blocks] int32; entries past a sequence's length are never read."""
    seq_lens: Tensor
    """[num_decodes] int32, the new tokens included; 0: a row of padding."""
    prefills: Prefills | None
    query_len: int = 1

    @property
    def num_decode_tokens(self) -> int:
        return self.num_decodes * self.query_len

    def following(self, input_ids: Tensor) -> "ForwardBatch":
        """The same places with other tokens: [T] int64."""
        return replace(self, inputs=replace(self.inputs, input_ids=input_ids))


@dataclass(frozen=True)
class Sampled:
    """What a pass ends with: a line for each token that was wanted, `query_len` of them for each
    decode, then one for each chunk that samples."""

    logits: Tensor | None
    """[S, vocab_size] float32. None: the last stage has them."""
    token_ids: Tensor
    """[S] int64."""
    num_tokens: Tensor | None = None
    """[decodes] int32: of a decode's lines, the first so many are tokens. None: all are."""

    def first(self, num_decodes: int, query_len: int) -> "Sampled":
        """Of a batch of decodes, what the first of them got."""
        stop = num_decodes * query_len
        num_tokens = None if self.num_tokens is None else self.num_tokens[:num_decodes]
        logits = None if self.logits is None else self.logits[:stop]
        return Sampled(logits, self.token_ids[:stop], num_tokens)
