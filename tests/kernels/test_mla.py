from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels.mla import gather_latent, merge_attention, mla_decode, mla_prefill

GARBAGE_BLOCK = 2147480000


@dataclass(frozen=True)
class Case:
    seq_lens: tuple[int, ...]
    heads: int
    block_size: int
    rank: int = 512
    rope: int = 64


CORRECTNESS = [Case((1, 64, 65, 300), 16, 64), Case((511, 33), 8, 16), Case((700,), 128, 64)]
CORNER = [
    Case((1,), 1, 1, rank=8, rope=2),
    Case((16, 32, 48), 3, 16, rank=24, rope=6),
    Case((1, 2, 3, 4, 5), 2, 1, rank=20, rope=4),
    Case((7, 1, 100), 5, 128, rank=33, rope=10),
]


def paged(case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A cache whose unread slots are NaN, tables whose unread entries are no blocks at all, and
    the sequences' latents."""
    size, width = case.block_size, case.rank + case.rope
    needed = [-(-n // size) for n in case.seq_lens]
    cache = torch.full((sum(needed) + 3, size, width), float("nan"))
    free = (torch.randperm(sum(needed) + 2) + 1).tolist()
    table = torch.full((len(needed), max(needed) + 2), GARBAGE_BLOCK, dtype=torch.int32)
    latents = []
    for row, (length, blocks) in enumerate(zip(case.seq_lens, needed, strict=True)):
        latent = torch.randn(length, width)
        for i in range(blocks):
            table[row, i] = block = free.pop()
            part = latent[i * size : (i + 1) * size]
            cache[block, : len(part)] = part
        latents.append(latent)
    return cache, table, latents


@pytest.mark.parametrize("case", CORRECTNESS + CORNER, ids=str)
def test_mla_decode_equals_plain_attention_over_up_projected_heads(case: Case, close) -> None:
    nope, v_dim = 24, 20
    cache, table, latents = paged(case)
    batch, scale = len(case.seq_lens), (nope + case.rope) ** -0.5
    q_nope, q_pe = torch.randn(batch, case.heads, nope), torch.randn(batch, case.heads, case.rope)
    w_uk = torch.randn(case.heads, nope, case.rank) * case.rank**-0.5
    w_uv = torch.randn(case.heads, v_dim, case.rank) * case.rank**-0.5

    q = torch.cat((torch.einsum("bhn,hnr->bhr", q_nope, w_uk), q_pe), dim=-1)
    seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32)
    out = mla_decode(q, cache, table, seq_lens, case.rank, scale)
    got = torch.einsum("bhr,hvr->bhv", out, w_uv)

    for row, latent in enumerate(latents):
        c_kv, k_pe = latent.double().split([case.rank, case.rope], dim=-1)
        k_nope = torch.einsum("hnr,tr->htn", w_uk.double(), c_kv)
        v = torch.einsum("hvr,tr->htv", w_uv.double(), c_kv)
        scores = torch.einsum("hn,htn->ht", q_nope[row].double(), k_nope)
        scores += torch.einsum("hp,tp->ht", q_pe[row].double(), k_pe)
        want = torch.einsum("ht,htv->hv", (scores * scale).softmax(-1), v)
        close(got[row], want, "float32")


def test_mla_decode_row_does_not_depend_on_its_neighbours() -> None:
    case = Case((40, 3, 129), 4, 16, rank=32, rope=8)
    cache, table, _ = paged(case)
    q, seq_lens = torch.randn(3, 4, 40), torch.tensor(case.seq_lens, dtype=torch.int32)
    together = mla_decode(q, cache, table, seq_lens, 32, 0.2)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = mla_decode(q[rows], cache, table[rows], seq_lens[rows], 32, 0.2)
        assert torch.equal(alone[0], together[row])


def test_gather_latent_any_range_reads_just_that_range() -> None:
    cache, table, (latent,) = paged(Case((77,), 1, 16, rank=8, rope=2))
    for start in (0, 1, 15, 16, 17, 64, 76, 77):
        for stop in (start, start + 1, 33, 64, 77):
            if start <= stop <= 77:
                assert torch.equal(gather_latent(cache, table[0], start, stop), latent[start:stop])


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int) -> tuple[Tensor, Tensor]:
    """Query i sees keys 0 ... first + i. One query, one head at a time, in float64."""
    num_q, heads = q.shape[:2]
    out = torch.empty(num_q, heads, v.shape[2], dtype=torch.float64)
    lse = torch.empty(heads, num_q, dtype=torch.float64)
    for i in range(num_q):
        for h in range(heads):
            seen = slice(0, first + i + 1)
            scores = k[seen, h].double() @ q[i, h].double() * scale
            out[i, h] = scores.softmax(0) @ v[seen, h].double()
            lse[h, i] = scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize(("num_q", "num_k"), [(1, 1), (9, 9), (1, 30), (7, 30), (30, 30), (2, 3)])
def test_mla_prefill_causal_aligns_the_ends(num_q: int, num_k: int, close) -> None:
    q, k, v = torch.randn(num_q, 3, 40), torch.randn(num_k, 3, 40), torch.randn(num_k, 3, 20)
    out, lse = mla_prefill(q, k, v, 0.3, causal=True)
    want_out, want_lse = plain(q, k, v, 0.3, num_k - num_q)
    assert lse.dtype == torch.float32
    close(out, want_out, "float32")
    close(lse, want_lse, "float32")


@pytest.mark.parametrize("num_new", [1, 5, 32])
@pytest.mark.parametrize("splits", [[32], [1, 31], [16, 16], [5, 20, 7], [1] * 32])
def test_merge_attention_of_any_split_equals_one_shot(
    splits: list[int], num_new: int, close
) -> None:
    """As a prefill does it: its own tokens causally, then the context in slices."""
    num_k = 32 + num_new
    q, k, v = torch.randn(num_new, 2, 24), torch.randn(num_k, 2, 24), torch.randn(num_k, 2, 16)
    want_out, want_lse = mla_prefill(q, k, v, 1.0, causal=True)
    out, lse = mla_prefill(q, k[32:], v[32:], 1.0, causal=True)
    for k_part, v_part in zip(k[:32].split(splits), v[:32].split(splits), strict=True):
        part = mla_prefill(q, k_part, v_part, 1.0, causal=False)
        out, lse = merge_attention(out, lse, *part)
    close(out, want_out, "float32")
    close(lse, want_lse, "float32")


def test_merge_attention_far_apart_scores_do_not_overflow(close) -> None:
    q, k, v = torch.ones(1, 1, 4), torch.ones(2, 1, 4), torch.randn(2, 1, 3)
    k[0] *= 1000
    parts = [mla_prefill(q, k[i : i + 1], v[i : i + 1], 1.0, causal=False) for i in (0, 1)]
    for a, b in (parts, parts[::-1]):
        out, lse = merge_attention(*a, *b)
        close(out, v[:1], "float32")
        assert lse.item() == 4000
