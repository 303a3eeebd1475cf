"""The sampler at DeepSeek-V3's vocabulary: one step's tokens for 1, 64 and 256 rows. No peers were
measured."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import sample
from ...kernels.sample import SamplingState
from . import BenchCase, Run, rotation

VOCAB = 129280
ROWS = (1, 64, 256)
GREEDY = {"temperature": 0.0}
NOISE = {"temperature": 0.6}
TOP_P = {"temperature": 0.6, "top_p": 0.95}
TOP_K_TOP_P = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def state_of(rows: int, **options: float) -> SamplingState:
    """Rows that differ in their seeds alone."""
    zeros = torch.zeros(rows, dtype=torch.int32, device="cuda")
    off = torch.zeros(rows, device="cuda")
    return SamplingState(
        temperature=off + options["temperature"],
        top_k=zeros + int(options.get("top_k", 0)),
        top_p=off + options.get("top_p", 1.0),
        min_p=off,
        seed=torch.arange(rows, device="cuda"),
        num_tokens=zeros + 1000,
        presence_penalty=off + options.get("presence_penalty", 0.0),
        frequency_penalty=off,
        repetition_penalty=off + 1.0,
        counts=torch.zeros(rows, VOCAB, dtype=torch.int32, device="cuda"),
        bias_ids=zeros[:, None],
        bias=off[:, None],
        num_bias=zeros,
        masked_ids=zeros[:, None],
        num_masked=zeros,
        mask_until=zeros,
        bitmask=torch.zeros(rows, VOCAB // 32, dtype=torch.int32, device="cuda"),
        has_bitmask=zeros,
    )


def flat(rows: int, dtype: torch.dtype) -> Tensor:
    """At temperature 0.6 top-p 0.95 leaves some 6,000 tokens: more than any text needs."""
    return (torch.randn(rows, VOCAB, device="cuda") * 2).to(dtype)


def peaked(rows: int, dtype: torch.dtype) -> Tensor:
    """A few tokens far above the others, as a trained model has it."""
    logits = flat(rows, dtype)
    best = torch.randint(0, VOCAB, (rows, 12), device="cuda")
    return logits.scatter_(1, best, (18 + torch.randn(rows, 12, device="cuda") * 2).to(dtype))


def sample_case(
    name: str,
    rows: int,
    options: dict[str, float],
    make: Callable[[int, torch.dtype], Tensor] = flat,
    dtype: torch.dtype = torch.bfloat16,
) -> BenchCase:
    num_bytes = rows * VOCAB * dtype.itemsize
    rotate = rotation(num_bytes)

    def build() -> Run:
        state, lines = state_of(rows, **options), torch.arange(rows, device="cuda")
        sets = [make(rows, dtype) for _ in range(rotate)]
        return lambda i: sample.sample_rows(sets[i], lines, state)

    return BenchCase(f"sample_rows {name} rows={rows}", build, num_bytes, 0, "none", rotate)


def logprobs_case(rows: int) -> BenchCase:
    num_bytes = rows * VOCAB * 4
    rotate = rotation(2 * num_bytes)

    def build() -> Run:
        sets = [flat(rows, torch.float32) for _ in range(rotate)]
        chosen = torch.zeros(rows, device="cuda", dtype=torch.int64)
        return lambda i: sample.top_logprobs(sets[i], chosen, 20)

    return BenchCase(f"top_logprobs rows={rows}", build, 2 * num_bytes, 0, "none", rotate)


def cases() -> list[BenchCase]:
    found = []
    for rows in ROWS:
        found += [
            sample_case("greedy", rows, GREEDY),
            sample_case("greedy, float32", rows, GREEDY, dtype=torch.float32),
            sample_case("noise", rows, NOISE),
            sample_case("top-p", rows, TOP_P),
            sample_case("top-p, float32", rows, TOP_P, dtype=torch.float32),
            sample_case("top-p, peaked", rows, TOP_P, peaked),
            sample_case("top-k top-p", rows, TOP_K_TOP_P),
            sample_case("top-k top-p, peaked", rows, TOP_K_TOP_P, peaked),
            sample_case("penalty, top-p", rows, TOP_P | {"presence_penalty": 0.5}),
        ]
    return [*found, logprobs_case(1), logprobs_case(64)]
