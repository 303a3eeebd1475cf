"""What the sampler knows of every row of a device, and how its kernels are told."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, float32, int32, int64

from . import reference_sample as reference
from .compat import runs_kernels
from .reference_sample import IN_PROMPT


class StatePointers(NamedTuple):
    """`SamplingState` as the kernels take it; strides are in elements of a tensor's own type."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    num_tokens: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    num_bias: Tensor
    num_masked: Tensor
    mask_until: Tensor
    has_bitmask: Tensor
    seed: Tensor
    counts: Tensor
    bias_ids: Tensor
    bias: Tensor
    masked_ids: Tensor
    bitmask: Tensor
    row_stride: int
    """Of all [R] tensors but `seed`."""
    seed_stride: int
    counts_stride: int
    bias_stride: int
    masked_stride: int
    bitmask_stride: int


@dataclass(frozen=True)
class SamplingState:
    """Sampling options and history of R rows. Views of one int32 arena will do: all is int32 or
    float32 but the seed, and all [R] tensors but the seed have one stride, whatever it is."""

    temperature: Tensor
    """[R] float32; 0 takes the best token, without noise; less than 1e-6 counts as that."""
    top_k: Tensor
    """[R] int32; 0 is off."""
    top_p: Tensor
    """[R] float32; 1 is off."""
    min_p: Tensor
    """[R] float32; 0 is off."""
    seed: Tensor
    """[R] int64: the bits of an unsigned one."""
    num_tokens: Tensor
    """[R] int32, prompt and generated: the position of the token that is drawn."""
    presence_penalty: Tensor
    frequency_penalty: Tensor
    repetition_penalty: Tensor
    """These three: [R] float32; 0, 0 and 1 are off."""
    counts: Tensor
    """[R, V] int32: how often the row generated the token; plus IN_PROMPT if its prompt has it.
    Of a row whose penalties are off it is neither read nor written."""
    bias_ids: Tensor
    bias: Tensor
    num_bias: Tensor
    """[R, L] int32, [R, L] float32, [R] int32; what is behind num_bias is never read."""
    masked_ids: Tensor
    num_masked: Tensor
    mask_until: Tensor
    """[R, M] int32, [R] int32, [R] int32: tokens (stops, mostly) that are banned while
    num_tokens < mask_until."""
    bitmask: Tensor
    has_bitmask: Tensor
    """[R, ceil(V/32)] int32, [R] int32: bit i of word w allows token 32 w + i, if there is one."""

    @property
    def vocab_size(self) -> int:
        return self.counts.shape[1]

    @cached_property
    def pointers(self) -> StatePointers:
        """Checks the tensors once, since they stay where they are."""
        self._check()
        return StatePointers(
            **{
                name: getattr(self, name) for name in StatePointers._fields if name[-6:] != "stride"
            },
            row_stride=self.temperature.stride(0),
            seed_stride=self.seed.stride(0),
            counts_stride=self.counts.stride(0),
            bias_stride=self.bias.stride(0),
            masked_stride=self.masked_ids.stride(0),
            bitmask_stride=self.bitmask.stride(0),
        )

    def _check(self) -> None:
        floats = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        floats += ("repetition_penalty",)
        ints = ("top_k", "num_tokens", "num_bias", "num_masked", "mask_until", "has_bitmask")
        for name in (*floats, *ints, "seed"):
            x = getattr(self, name)
            dtype = int64 if name == "seed" else float32 if name in floats else int32
            assert x.dtype == dtype and x.shape == self.seed.shape, (name, x.dtype, x.shape)
            assert name == "seed" or x.stride() == self.temperature.stride(), (name, x.stride())
        for name in ("counts", "bias_ids", "bias", "masked_ids", "bitmask"):
            x = getattr(self, name)
            assert x.dtype == (float32 if name == "bias" else int32), (name, x.dtype)
            assert x.dim() == 2 and len(x) == len(self.seed), (name, x.shape)
            assert x.stride(1) == 1 or x.shape[1] <= 1, (name, x.stride())
        assert self.bias.shape == self.bias_ids.shape, (self.bias.shape, self.bias_ids.shape)
        assert self.bias.stride() == self.bias_ids.stride()
        assert self.bitmask.shape[1] == -(-self.vocab_size // 32), self.bitmask.shape


def count_tokens(token_ids: Tensor, num_prompt_tokens: int, counts: Tensor) -> None:
    """Fills a row of `SamplingState.counts`: [V] int32. token_ids: [prompt + generated] int32 or
    int64."""
    assert counts.dtype == int32 and counts.is_contiguous() and token_ids.is_contiguous()
    if not runs_kernels(counts):
        reference.count_tokens(token_ids, num_prompt_tokens, counts)
        return
    counts.zero_()
    grid = (triton.cdiv(len(token_ids), 1024),)
    _count[grid](token_ids, counts, len(token_ids), num_prompt_tokens, BIT=IN_PROMPT, BLOCK=1024)


@triton.jit(
    do_not_specialize=["length", "num_prompt"],
    do_not_specialize_on_alignment=["token_ids", "counts"],  # rows of tensors of any width
)
def _count(token_ids, counts, length, num_prompt, BIT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + at, at < length, 0)
    tl.atomic_add(counts + token, 1, (at >= num_prompt) & (at < length), sem="relaxed")
    tl.atomic_or(counts + token, BIT, (at < num_prompt) & (at < length), sem="relaxed")
