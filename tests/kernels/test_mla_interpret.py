"""The plain Triton kernels of attention in Triton's interpreter, against their twins: which split,
which page, which mask. Outside the interpreter one test runs this file again inside it."""

from dataclasses import replace

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import mla, mla_schedule, reference
from dsd.tests.kernels.interpreter import patch, run_interpreted
from dsd.tests.kernels.test_mla import Case, paged

pytestmark = pytest.mark.slow

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    def test_attention_kernels_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")
KIND = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DECODE = [
    (Case((1, 64, 65, 300), 16, 64, rank=64, rope=16), 1, torch.float32),
    (Case((511, 0, 33), 8, 16, rank=48, rope=16), 1, torch.bfloat16),
    (Case((129, 6, 7), 5, 128, rank=33, rope=10), 6, torch.float32),
    (Case((258, 128), 16, 64, rank=64, rope=16), 2, torch.float32),
]


def twin_decode(
    q: Tensor, cache: Tensor, table: Tensor, lens: Tensor, rank: int, scale: float
) -> Tensor:
    """A query token at a time, as a sequence that ends with it."""
    batch, query_len, heads, _ = q.shape
    out = torch.zeros(batch, query_len, heads, rank, dtype=q.dtype, device=q.device)
    for i in range(query_len):
        seen = lens - (query_len - 1 - i)
        rows = seen > 0
        out[rows, i] = reference.mla_decode(q[rows, i], cache, table[rows], seen[rows], rank, scale)
    return out


@interpreted
@pytest.mark.parametrize("sms", [1, 6, 40])
@pytest.mark.parametrize(("case", "query_len", "dtype"), DECODE, ids=str)
def test_mla_decode(
    case: Case, query_len: int, dtype: torch.dtype, sms: int, close, monkeypatch
) -> None:
    monkeypatch.setattr(mla_schedule, "num_sms", lambda _: sms)
    cache, table, _ = paged(case)
    cache, lens = cache.to(dtype), torch.tensor(case.seq_lens, dtype=torch.int32)
    q = torch.randn(len(lens), query_len, case.heads, case.rank + case.rope).to(dtype)
    want = twin_decode(q, cache, table, lens, case.rank, 0.2)
    query = q[:, 0] if query_len == 1 else q
    got = mla.mla_decode(query, cache, table, lens, case.rank, 0.2)
    close(got.view(want.shape), want, KIND[dtype])


@interpreted
@pytest.mark.parametrize("unit", [64, 128])
@pytest.mark.parametrize("parts", [1, 7, 66])
@pytest.mark.parametrize(
    "lens",
    [[1], [16384], [0, 0], [100] * 70, [5000, 3, 0, 128, 129, 4095], list(range(0, 6500, 100))],
    ids=lambda lens: f"{len(lens)}x{lens[-1]}",
)
def test_schedule_covers_every_token_once_in_balanced_items(
    lens: list[int], parts: int, unit: int, monkeypatch
) -> None:
    monkeypatch.setattr(mla_schedule, "num_sms", lambda _: parts)
    tiling = mla_schedule.Tiling("dot", 64, 1, unit)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    schedule = mla_schedule.make_schedule(seq_lens, 64, max(lens) + 1, tiling)
    items, splits = schedule.items.tolist(), schedule.splits.tolist()
    used = [item for item in items if item[3] != mla_schedule.EMPTY]
    assert items[len(used) :] == [[0, 0, 0, mla_schedule.EMPTY]] * (len(items) - len(used))
    slots = []
    for b, length in enumerate(lens):
        mine = [item for item in used if item[0] == b]
        edges = [0] + [end for _, _, end, _ in mine]
        assert [begin for _, begin, _, _ in mine] == edges[:-1] and edges[-1] == length
        assert all(begin % unit == 0 for _, begin, _, _ in mine)
        if len(mine) == 1:
            assert mine[0][3] == mla_schedule.DIRECT and splits[b][1] == 0
        else:
            assert splits[b] == [mine[0][3], len(mine)]
            assert all(end - begin >= unit for _, begin, end, _ in mine[:-1])
            slots += [slot for *_, slot in mine]
    assert slots == list(range(len(slots)))
    longest = max(end - begin for _, begin, end, _ in used)
    assert longest <= max(1024, 2.5 * sum(lens) / parts, 128)


@interpreted
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("num_q", "num_k", "width", "v_width"),
    [(1, 1, 40, 20), (70, 133, 40, 20), (33, 97, 24, 16), (130, 130, 192, 128), (5, 64, 128, 64)],
)
def test_mla_prefill(num_q: int, num_k: int, width: int, v_width: int, causal: bool, close) -> None:
    kv = torch.randn(num_k, 2, width + v_width)
    q, (k, v) = torch.randn(2, num_q, width).transpose(0, 1), kv.split([width, v_width], dim=-1)
    for dtype in (torch.float32, torch.bfloat16):
        parts = [x.to(dtype) for x in (q, k, v)]
        out, lse = mla.mla_prefill(*parts, 0.2, causal)
        want, want_lse = reference.mla_prefill(*parts, 0.2, causal)
        close(out, want, KIND[dtype])
        close(lse, want_lse, "float32")


@interpreted
@pytest.mark.parametrize(("nope", "rope"), [(32, 16), (24, 8)])
def test_mla_prefill_rope_keys_apart(nope: int, rope: int, close) -> None:
    q, k = torch.randn(33, 3, nope + rope), torch.randn(97, 3, nope)
    v, k_pe = torch.randn(97, 3, 20), torch.randn(97, rope)
    out, lse = mla.mla_prefill(q, k, v, 0.2, True, k_pe=k_pe)
    whole = torch.cat((k, k_pe[:, None].expand(-1, 3, -1)), dim=-1)
    want, want_lse = reference.mla_prefill(q, whole, v, 0.2, True)
    close(out, want, "float32")
    close(lse, want_lse, "float32")


@interpreted
def test_mla_prefill_varlen_equals_one_at_a_time(close) -> None:
    lens_q, lens_k = [3, 0, 70, 1], [9, 4, 70, 100]
    q, k, v = (torch.randn(n, 2, d) for n, d in ((74, 40), (183, 40), (183, 20)))
    cu_q, cu_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k))
    out, lse = mla.mla_prefill_varlen(q, k, v, cu_q, cu_k, 70, 0.3, True)
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    want = [reference.mla_prefill(*part, 0.3, True) for part in parts]
    close(out, torch.cat([o for o, _ in want]), "float32")
    close(lse, torch.cat([s for _, s in want], dim=1), "float32")


@interpreted
def test_queries_before_the_first_key_are_zeros_and_merge_away(close) -> None:
    q, k, v = torch.randn(5, 2, 40), torch.randn(3, 2, 40), torch.randn(3, 2, 20)
    out, lse = mla.mla_prefill(q, k, v, 0.3, causal=True)
    assert (out[:2] == 0).all() and torch.isneginf(lse[:, :2]).all()
    other, other_lse = reference.mla_prefill(q, k, v, 0.3, causal=False)
    merged, merged_lse = mla.merge_attention(out, lse, other, other_lse)
    close(merged[:2], other[:2], "float32")
    close(merged_lse[:, :2], other_lse[:, :2], "float32")
    both, both_lse = mla.merge_attention(out[:2], lse[:, :2].contiguous(), out[:2], lse[:, :2])
    assert (both == 0).all() and torch.isneginf(both_lse).all()


@interpreted
def test_merge_attention(close) -> None:
    a, b = torch.randn(19, 3, 20), torch.randn(19, 6, 20)[:, ::2]
    a_lse, b_lse = torch.randn(3, 19) * 30, torch.randn(3, 25)[:, :19]
    for got, want in zip(
        mla.merge_attention(a, a_lse, b, b_lse),
        reference.merge_attention(a, a_lse, b, b_lse),
        strict=True,
    ):
        close(got, want, "float32")


@interpreted
def test_gather_latent(close) -> None:
    cache, table, (latent,) = paged(replace(Case((77,), 1, 16), rank=130, rope=14))
    for start, stop in ((0, 0), (0, 77), (15, 49), (16, 17), (76, 77)):
        close(mla.gather_latent(cache, table[0], start, stop), latent[start:stop], "exact")
