"""A small run of every kernel, for tools and tests that look at kernels rather than time them.

RUNS[name](m, device) makes tensors for m tokens (rows, sequences) and runs the kernels of that name
once. Nothing is compared: that is `tests/kernels`' work. Tensors are as long as they must be, so
that an access behind them is behind an allocation too; lists of integers are slices of a longer
tensor at an offset that changes with m, as those of a step are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import (
    fp8_gemm,
    fp8_gemm_dot,
    fp8_gemm_swap,
    fused,
    gemm,
    latent,
    latent_store,
    mla,
    mla_absorb,
    moe_dispatch,
    moe_gate,
    moe_gemm,
    moe_route,
    quant,
    sample,
    sample_relaxed,
    step,
)
from ..kernels.drafts import begin_drafts, keep_accepted, put_drafts
from ..kernels.fp8_gemm_work import TILES, Work

Run = Callable[[int, str], object]

BF16, FP8, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
N, K = 328, 1040
"""Of linear maps: no multiple of any tile."""
EXPERTS, TOP_K = 8, 2
WARM_TOKENS = (1, 7, 9, 17, 19, 33, 57, 65, 129, 257)
"""After these numbers of tokens, no run of up to 300 meets a kernel that was not compiled."""
RANK, ROPE, BLOCK = 512, 64, 64
HIDDEN, VOCAB = 1000, 5003


def zeros(device: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def at_an_offset(values: Tensor, m: int) -> Tensor:
    room = values.new_zeros(m % 4 + values.numel())
    room[m % 4 :] = values.flatten()
    return room[m % 4 :].view(values.shape)


def weight(device: str, *lead: int) -> tuple[Tensor, Tensor]:
    scale = torch.ones(*lead, -(-N // 128), -(-K // 128), device=device)
    return zeros(device, *lead, N, K, dtype=FP8), scale


def quantised(m: int, device: str) -> tuple[Tensor, Tensor]:
    return quant.quantize_1x128(zeros(device, m, K), scale_k_major=True)


# ---- GEMMs --------------------------------------------------------------------------------------


def dense(m: int, device: str) -> None:
    """Tiles of every shape, whole and all in pieces of K."""
    w, w_scale = weight(device)
    for tile in TILES:
        tiles = -(-m // tile.bm) * -(-N // tile.bn)
        for work in (Work(tile, tiles, 1), Work(tile, 0, 3)):
            out = zeros(device, m, N)
            fp8_gemm.fp8_gemm_nt_dense(*quantised(m, device), w, w_scale, out, work)


def swap(m: int, device: str) -> None:
    """With and without pieces of K."""
    w, w_scale = weight(device)
    tokens = min(t for t in fp8_gemm_swap.MAX_REGISTERS if m <= t or t == 64)
    for split in (1, 3):
        plan = fp8_gemm_swap.Plan(tokens, 4, split)
        out = zeros(device, m, N)
        fp8_gemm_swap.fp8_gemm_nt_swap(*quantised(m, device), w, w_scale, out, plan)


def dot(m: int, device: str) -> None:
    w, w_scale = weight(device)
    fp8_gemm_dot.fp8_gemm_nt_dot(*quantised(m, device), w, w_scale, zeros(device, m, N))
    for dtype in (BF16, F32):
        fp8_gemm_dot.dequant_gemm_nt(zeros(device, m, K, dtype=dtype), w, w_scale)


def linear(m: int, device: str) -> None:
    """As the model calls it."""
    gemm.linear(zeros(device, m, K), *weight(device), act_quant=True)


def experts_contiguous(m: int, device: str) -> None:
    """m rows to each expert but the last, which has none."""
    rows, (w, w_scale) = EXPERTS * m, weight(device, EXPERTS)
    ends = torch.arange(1, EXPERTS + 1, device=device).clamp(max=EXPERTS - 1) * m
    ends, out = at_an_offset(ends, m), zeros(device, rows, N)
    moe_gemm.grouped_fp8_gemm_nt_contiguous(*quantised(rows, device), w, w_scale, ends, out)
    x = zeros(device, rows, K)
    moe_gemm.grouped_gemm_nt_contiguous(x, w, ends, out, w_scale)
    moe_gemm.grouped_gemm_nt_contiguous(x, zeros(device, EXPERTS, N, K), ends, out)


def experts_slots(m: int, device: str) -> None:
    w, w_scale = weight(device, EXPERTS)
    x, x_scale = (t.unflatten(0, (EXPERTS, m)) for t in quantised(EXPERTS * m, device))
    counts = at_an_offset(torch.arange(EXPERTS, device=device, dtype=torch.int32) % (m + 1), m)
    out = zeros(device, EXPERTS, m, N)
    moe_gemm.grouped_fp8_gemm_nt_masked(x, x_scale, w, w_scale, counts, out)
    x, w = zeros(device, EXPERTS, m, K), zeros(device, EXPERTS, N, K)
    moe_gemm.grouped_gemm_nt_masked(x, w, counts, out)


# ---- attention ----------------------------------------------------------------------------------


def empty_cache(device: str, pages: int, block: int, dtype: torch.dtype) -> Tensor:
    """Of zeros; an fp8 one with scales of 1."""
    cache = latent.latent_cache(pages, block, RANK, ROPE, dtype, device).zero_()
    if dtype == FP8:
        latent.planes(cache, RANK)[2].fill_(1.0)
    return cache


def decode(heads: int, query_len: int = 1, block: int = BLOCK, dtype: torch.dtype = BF16) -> Run:
    """Lengths of 0 to 299 tokens in the pages of a cache that ends with the last one's page. dtype:
    of the cache."""

    def run(m: int, device: str) -> None:
        lens = torch.arange(m, device=device, dtype=torch.int32) * 101 % 300
        pages = -(-300 // block)
        table = torch.arange(m * pages, device=device, dtype=torch.int32).view(m, pages)
        cache = empty_cache(device, m * pages, block, dtype)
        shape = (m, heads) if query_len == 1 else (m, query_len, heads)
        q, lens = zeros(device, *shape, RANK + ROPE), at_an_offset(lens, m)
        mla.mla_decode(q, cache, at_an_offset(table, m), lens, RANK, 0.1)

    return run


def prefill(m: int, device: str) -> None:
    q, kv = zeros(device, m, 16, 192), zeros(device, m + 70, 16, 320)
    k, v = kv.split([192, 128], dim=-1)
    a, a_lse = mla.mla_prefill(q, k, v, 0.1, True)
    mla.merge_attention(a, a_lse, *mla.mla_prefill(q, k, v, 0.1, False))
    ends = torch.tensor([0, m // 2, m], device=device, dtype=torch.int32)
    ends = at_an_offset(ends, m)
    mla.mla_prefill_varlen(q, k, v, ends, ends, m, 0.1, True)


def by_head(m: int, device: str) -> None:
    q, angles = zeros(device, m, 16, 192), zeros(device, m, ROPE // 2, dtype=F32)
    w = zeros(device, 16, 256, RANK)
    mla_absorb.absorb(q, w[:, :128], angles, angles)
    latent, w_uv = zeros(device, m, 16, RANK), w[:, 128:].transpose(1, 2)
    mla_absorb.expand(latent, w_uv)
    mla_absorb.expand_quant(latent, w_uv, scale_k_major=True)


def gather(m: int, device: str) -> None:
    pages = -(-m // BLOCK) + 1
    table = at_an_offset(torch.arange(pages, device=device, dtype=torch.int32), m)
    for dtype in (BF16, FP8):
        cache = empty_cache(device, pages, BLOCK, dtype)
        mla.gather_latent(cache, table, 1, m + 1, RANK, BF16)


# ---- per token ----------------------------------------------------------------------------------


def quantisation(m: int, device: str) -> None:
    for k_major in (False, True):
        quant.quantize_1x128(zeros(device, m, K), scale_k_major=k_major)
    quant.dequantize_128x128(*weight(device), BF16)


def norms(m: int, device: str) -> None:
    x, w = zeros(device, m, HIDDEN), zeros(device, HIDDEN)
    fused.rms_norm(x, w, 1e-6)
    fused.add_rms_norm(x, x, w, 1e-6)
    for k_major in (False, True):
        fused.rms_norm_quant(x, w, 1e-6, scale_k_major=k_major)
        fused.add_rms_norm_quant(x, x, w, 1e-6, scale_k_major=k_major)


def activation(m: int, device: str) -> None:
    fused.silu_mul(zeros(device, m, 2 * HIDDEN))
    for k_major in (False, True):
        fused.silu_mul_quant(zeros(device, m, 2 * HIDDEN), scale_k_major=k_major)


def positions(m: int, device: str) -> None:
    """Rope, embedding and cache."""
    cos, sin = zeros(device, 2, m, ROPE // 2, dtype=F32)
    slots = at_an_offset(torch.arange(m, device=device), m)
    fused.apply_rope(zeros(device, m, 16, ROPE), cos, sin)
    fused.apply_rope(zeros(device, m, ROPE), cos, sin)
    embed, pair = zeros(device, m, HIDDEN), zeros(device, 2, HIDDEN)
    fused.embedding(embed, slots, BF16)
    fused.joined(embed, slots, pair[0], embed, pair[1], 1e-6, BF16)
    both = zeros(device, m, RANK), zeros(device, m, ROPE)
    q_a, kv_a = zeros(device, m, HIDDEN + RANK + ROPE).split([HIDDEN, RANK + ROPE], dim=1)
    w, q_weight = zeros(device, RANK), zeros(device, HIDDEN)
    for dtype in (BF16, FP8):
        cache = empty_cache(device, -(-m // BLOCK), BLOCK, dtype)
        latent_store.store_latent(cache, *both, slots)
        store = latent_store.Store(kv_a, w, 1e-6, cos, sin, cache, slots)
        latent_store.norm_rope_store(*store)
        latent_store.norms_rope_store(q_a, q_weight, store)
        for k_major in (False, True):
            latent_store.norms_rope_store_quant(q_a, q_weight, store, scale_k_major=k_major)


def route(m: int, device: str) -> None:
    logits = torch.arange(m * EXPERTS, device=device, dtype=F32).view(m, EXPERTS).sin()
    bias = zeros(device, EXPERTS, dtype=F32)
    ids, weights = moe_gate.moe_gate(logits, bias, 4, 2, TOP_K, True, 2.5)
    pieces = moe_gate.partial_logits(zeros(device, m, 576), zeros(device, EXPERTS, 576))
    moe_gate.moe_gate(pieces, bias, 4, 2, TOP_K, True, 2.5)
    order, offsets, place = moe_route.permute_by_expert(ids, EXPERTS // 2, 2)
    y, shared = zeros(device, m * TOP_K, HIDDEN), zeros(device, m, HIDDEN)
    moe_route.gather_rows(shared, order, offsets, TOP_K)
    for k_major in (False, True):
        x = quant.quantize_1x128(shared, scale_k_major=k_major)
        moe_route.gather_quantized(*x, order, offsets, TOP_K, k_major)
    moe_route.combine_experts(y, place, weights)
    moe_route.combine_experts(y, place, weights, shared)


def few_to_experts(m: int, device: str) -> None:
    """Dispatched, activated, and through both GEMMs where the card has them."""
    ids = torch.arange(m * TOP_K, device=device).view(m, TOP_K) % EXPERTS
    w, w_scale = weight(device, EXPERTS // 2)
    for k_major in (False, True):
        x = quant.quantize_1x128(zeros(device, m, K), scale_k_major=k_major)
        expected = m * TOP_K / EXPERTS
        rows, scale, _, tiles = moe_dispatch.dispatch(*x, ids, EXPERTS // 2, 2, expected)
    if moe_dispatch.dispatches(ids.numel(), expected, BF16, w):
        out = zeros(device, len(rows), N)
        moe_gemm.grouped_fp8_gemm_nt_tiled(rows, scale, w, w_scale, tiles, out)
    moe_dispatch.silu_mul_dispatched(zeros(device, len(rows), 2 * HIDDEN), tiles)


def rows_state(m: int, device: str) -> None:
    """m rows that decode, and m chunks of one token."""
    words = zeros(device, 8 * m + 64, dtype=torch.int32)
    spans = torch.tensor([[8 * i, i, 1] for i in range(m)], device=device).flatten().int()
    step.scatter_words(words, torch.cat((spans, spans)), m, len(spans))
    ids, table = (zeros(device, m + 1, 70, dtype=torch.int32) for _ in range(2))
    counts = [zeros(device, m + 1, dtype=torch.int32) for _ in range(3)]
    state = step.TokenState(ids, counts[0] + 1, counts[1], table, BLOCK)
    angles = zeros(device, 70, ROPE // 2, dtype=F32)
    inputs = step.Inputs.empty(2 * m, ROPE // 2, torch.device(device))
    lines = at_an_offset(torch.arange(m, device=device, dtype=torch.int32), m)
    out = zeros(device, m, 70, dtype=torch.int32)
    step.decode_inputs(state, lines, angles, angles, inputs, out, counts[2][:m])
    drafts = zeros(device, m + 1, 3, dtype=torch.int32)
    places = step.Inputs.empty(4 * m, ROPE // 2, torch.device(device))
    for query_len in (2, 4):
        step.decode_inputs(
            state, lines, angles, angles, places, out, counts[2][:m], drafts, query_len
        )
    chunks = [[row, 0, 1, m + row] for row in range(m)]
    parts = torch.tensor(chunks, device=device, dtype=torch.int32)
    step.chunk_inputs(state, parts, 1, angles, angles, inputs)


def rows_drafts(m: int, device: str) -> None:
    """m rows of two drafts, whose choices are right; with and without a word on that."""
    counts = zeros(device, 4, m + 1, dtype=torch.int32)
    tokens, computed, ahead, position = (x.clone() for x in counts)
    found = zeros(device, m + 1, 3, dtype=torch.int32)
    state = step.TokenState(found, tokens + 3, computed, found, BLOCK)
    lines = at_an_offset(torch.arange(m, device=device, dtype=torch.int32), m)
    chosen, num_tokens = zeros(device, m, dtype=torch.int64), torch.empty_like(lines)
    left, agreed = lines, zeros(device, m, dtype=torch.bool)
    for place, own in ((0, None), (1, agreed)):
        left = keep_accepted(left, chosen, place, found, state, num_tokens, own)
    hidden, ids = zeros(device, 3 * m, HIDDEN), zeros(device, 3 * m, dtype=torch.int64)
    last = at_an_offset(torch.arange(m, device=device) * 3, m)
    begin_drafts(hidden, ids, last, lines, state.num_tokens, ahead, position)
    for place in (0, 1):
        put_drafts(chosen, lines, place, found, position)


def sampling(m: int, device: str) -> None:
    """m rows, every other one of them with every option."""
    logits = torch.arange(m * VOCAB, device=device, dtype=F32).view(m, VOCAB).sin()
    odd = torch.arange(m + 1, device=device) % 2

    def floats(value: float, off: float) -> Tensor:
        return torch.where(odd == 1, value, off).float()

    ids = zeros(device, m + 1, 64, dtype=torch.int32)
    state = sample.SamplingState(
        temperature=floats(0.7, 0.0), top_k=(odd * 40).int(), top_p=floats(0.9, 1.0),
        min_p=floats(0.05, 0.0), seed=odd.clone(), num_tokens=(odd + 3).int(),
        presence_penalty=floats(0.5, 0.0), frequency_penalty=floats(0.5, 0.0),
        repetition_penalty=floats(1.2, 1.0),
        counts=zeros(device, m + 1, VOCAB, dtype=torch.int32), bias_ids=ids.clone(),
        bias=zeros(device, m + 1, 64, dtype=F32), num_bias=(odd * 2).int(),
        masked_ids=ids.clone(), num_masked=odd.int(), mask_until=(odd * 9).int(),
        bitmask=zeros(device, m + 1, -(-VOCAB // 32), dtype=torch.int32), has_bitmask=odd.int() * 0,
    )  # fmt: skip
    lines = at_an_offset(torch.arange(m, device=device, dtype=torch.int32), m)
    for start in range(4):  # rows of an odd width begin anywhere
        sample.count_tokens(ids.view(-1)[start : start + 9], 4, state.counts[0])
    drafts = zeros(device, m, 3, dtype=torch.int32)[:, 1]
    near = sample_relaxed.near_best(logits.bfloat16(), drafts, lines, state, 10, 0.5)
    chosen = sample.sample_and_append(logits.bfloat16(), lines, state, ids)
    for given in ((None, None), (near, drafts)):
        sample_relaxed.settle(chosen, lines, state, ids, odd.int(), (1, 2), *given)
    sample.sample_rows(logits, lines, state)
    sample.top_logprobs(logits, zeros(device, m, dtype=torch.int64), 5)


RUNS: dict[str, Run] = {
    "fp8_gemm": dense,
    "fp8_gemm_swap": swap,
    "fp8_gemm_dot": dot,
    "linear": linear,
    "moe_gemm contiguous": experts_contiguous,
    "moe_gemm slots": experts_slots,
    "mla seesaw": decode(128),
    "mla seesaw, 2 queries": decode(64, 2),
    "mla transposed": decode(16),
    "mla transposed, 3 queries": decode(16, 3),
    "mla dot": decode(24, 2, 16),
    "mla seesaw, fp8": decode(128, dtype=FP8),
    "mla transposed, fp8": decode(16, dtype=FP8),
    "mla transposed, fp8, 2 queries": decode(16, 2, dtype=FP8),
    "mla dot, fp8": decode(24, 2, 16, dtype=FP8),
    "mla prefill": prefill,
    "mla absorb, expand": by_head,
    "mla gather": gather,
    "quant": quantisation,
    "fused norms": norms,
    "fused silu_mul": activation,
    "fused rope, embedding, store": positions,
    "moe_gate, moe_route": route,
    "moe_dispatch": few_to_experts,
    "step": rows_state,
    "drafts": rows_drafts,
    "sample": sampling,
}
