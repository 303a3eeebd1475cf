"""`ForwardBatch`: one forward pass as tensors, between the runner and the model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PrefillSlice:
    """One sequence's tokens of this pass, and its tokens that are in the cache already."""

    first: int
    """Index of its first token in the batch."""
    num_tokens: int
    num_cached: int
    block_table: Tensor
    """[num_blocks_of_it] int32."""


@dataclass(frozen=True)
class ForwardBatch:
    """Decode tokens first (one per sequence), then the prefill slices.

    ```
    tokens   | d0 d1 d2 ... | p0 p0 p0 | p1 p1 ... |
             <- num_decodes -><- prefills[0] -> ...
    ```
    """

    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    slot_mapping: Tensor
    """[T] int64: block * block_size + offset."""
    num_decodes: int
    block_table: Tensor
    """[num_decodes, max_blocks] int32; entries past a sequence's length are never read."""
    seq_lens: Tensor
    """[num_decodes] int32, the new token included."""
    prefills: tuple[PrefillSlice, ...]
    logits_indices: Tensor
    """[S] int64: tokens whose logits are wanted."""
