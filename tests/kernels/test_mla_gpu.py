"""Attention on a GPU against its twins: V3's shapes and odd ones, slices of wider tensors, NaN in
every slot that must not be read; and each op captured in a CUDA graph."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsd.kernels import mla, reference
from dsd.tests.kernels import test_mla
from dsd.tests.kernels.test_mla_interpret import twin_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
POISON = 2147480000
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KIND = {BF16: "bfloat16", F16: "bfloat16", F32: "float32"}
"""Row of conftest's tolerance table."""
SCALE = 192**-0.5
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """What torch.empty hands out next is full of NaN."""
    torch.cuda.manual_seed(0)
    torch.full((64 << 20,), float("nan"), device="cuda")


@dataclass(frozen=True)
class Case:
    seq_lens: tuple[int, ...]
    heads: int
    kernel: str
    query_len: int = 1
    block_size: int = 64
    rank: int = 512
    rope: int = 64
    dtype: torch.dtype = BF16


EDGES = (1, 63, 64, 65, 127, 128, 129, 300, 4096)
CORRECTNESS = [
    Case(EDGES, 128, "seesaw"),
    Case((700, 0, 4095), 64, "seesaw"),
    Case((1000,) * 100, 128, "seesaw"),
    Case((16384,), 128, "seesaw"),
    Case((2, 64, 65, 129, 1300), 128, "seesaw", query_len=2),
    Case(EDGES, 16, "transposed"),
    Case((40000, 3), 16, "transposed"),
    Case((100, 900) * 100, 16, "transposed"),
    Case((300, 0, 2049), 32, "transposed"),
    Case((2, 64, 65, 66, 129, 1300), 16, "transposed", query_len=2),
    Case(EDGES, 128, "dot", block_size=16),
    Case(EDGES, 16, "dot", block_size=128),
]
CORNER = [
    Case((0,), 128, "seesaw"),
    Case((0, 0), 16, "transposed"),
    Case((6, 7, 64, 69, 134, 2000), 128, "seesaw", query_len=6),
    Case((6, 64, 66, 130, 3000), 64, "seesaw", query_len=3),
    Case((3, 64, 66, 130, 3000), 16, "transposed", query_len=3),
    Case((1, 77, 500), 8, "dot", block_size=32, rank=256),
    Case((33, 0, 2000), 24, "dot", rank=96, rope=32),
    Case((5, 66, 1300), 16, "dot", query_len=4, rank=128, dtype=F16),
    Case((5, 200), 5, "dot", block_size=1, rank=33, rope=10, dtype=F32),
]


def inside(x: Tensor, poison: float) -> Tensor:
    """x as a slice of a wider tensor of poison, at an odd offset."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 8), poison)
    wide[..., 3:-5] = x
    return wide[..., 3:-5]


def decode_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    paged = test_mla.Case(case.seq_lens, case.heads, case.block_size, case.rank, case.rope)
    cache, table, _ = test_mla.paged(paged)
    shape = (len(case.seq_lens), case.query_len, case.heads, case.rank + case.rope)
    q = torch.randn(shape, device="cuda").to(case.dtype)
    lens = torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda")
    return q, cache.to("cuda", case.dtype), table.cuda(), lens


def decode(case: Case, q: Tensor, cache: Tensor, table: Tensor, lens: Tensor) -> Tensor:
    query = q[:, 0] if case.query_len == 1 else q
    out = mla.mla_decode(query, cache, table, lens, case.rank, SCALE)
    return out.view(*q.shape[:3], case.rank)


@pytest.mark.parametrize("case", CORRECTNESS + CORNER, ids=str)
def test_mla_decode(case: Case, close) -> None:
    q, cache, table, lens = decode_inputs(case)
    odd = (inside(q, float("nan")), cache, inside(table, POISON), inside(lens, POISON))
    if HOPPER:
        tiling = mla.decode_tiling(q, cache, case.query_len, case.heads, case.rank)
        assert tiling.kernel == case.kernel
    got = decode(case, *odd)
    assert torch.equal(got, decode(case, *odd)), "the same inputs gave different bits"
    close(got, twin_decode(q, cache, table, lens, case.rank, SCALE), KIND[case.dtype])


def test_mla_decode_no_rows() -> None:
    q, cache, table, lens = decode_inputs(Case((5,), 16, "transposed"))
    assert mla.mla_decode(q[:0, 0], cache, table[:0], lens[:0], 512, SCALE).shape == (0, 16, 512)


def replays(run: Callable[[], Tensor], change: Callable[[], None], expect: Callable[[], Tensor]):
    """Captures run(), changes its inputs in place, replays. (the graph's, the right one)."""
    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = run()
    change()
    graph.replay()
    torch.cuda.synchronize()
    return out.clone(), expect()


GRAPH = [Case((900, 64, 1), 128, "seesaw"), Case((900, 64, 1), 16, "transposed")]
GRAPH += [Case((900, 64, 1), 16, "dot", block_size=16)]


@pytest.mark.parametrize("case", GRAPH, ids=str)
def test_mla_decode_graph_replayed_with_other_lengths(case: Case, close) -> None:
    static = decode_inputs(Case((3000,) * 3, case.heads, case.kernel, 1, case.block_size))
    q, cache, table, lens = static
    lens.copy_(torch.tensor(case.seq_lens))
    for other in ((1, 3000, 2000), (0, 0, 5), (3000, 2999, 2998)):

        def change(other: tuple[int, ...] = other) -> None:
            lens.copy_(torch.tensor(other))
            q.normal_()
            table.copy_(table.flip(0))

        got, want = replays(
            lambda: decode(case, *static),
            change,
            lambda: twin_decode(q, cache, table, lens, 512, SCALE),
        )
        close(got, want, "bfloat16")


def test_mla_decode_schedule_of_the_step_serves_all_layers() -> None:
    q, cache, table, lens = decode_inputs(Case((3000, 7, 64, 900), 16, "transposed"))
    schedule = mla.decode_schedule(q[:, 0], cache, table, lens, 512)
    args = (q[:, 0], cache, table, lens, 512, SCALE)
    assert torch.equal(mla.mla_decode(*args, schedule), mla.mla_decode(*args))


# ---- prefill ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    num_q: int
    num_k: int
    heads: int
    width: int
    v_width: int
    causal: bool = True
    dtype: torch.dtype = BF16


PREFILL = [
    Prefill(1000, 1000, 16, 192, 128),
    Prefill(300, 1400, 128, 192, 128),
    Prefill(257, 1024, 16, 192, 128, causal=False),
]
PREFILL_CORNER = [
    Prefill(1, 1, 16, 192, 128),
    Prefill(1, 129, 16, 192, 128),
    Prefill(129, 129, 3, 128, 64),
    Prefill(70, 133, 3, 40, 20),
    Prefill(65, 65, 2, 24, 16, dtype=F16),
    Prefill(64, 100, 2, 192, 128, dtype=F32),
]


def prefill_inputs(case: Prefill) -> tuple[Tensor, Tensor, Tensor]:
    """k and v are slices of one tensor, as the up-projection gives them; NaN around."""
    wide = torch.full((case.num_k + 9, case.heads, case.width + case.v_width), float("nan"))
    wide[4:-5] = torch.randn_like(wide[4:-5])
    k, v = wide.to("cuda", case.dtype)[4:-5].split([case.width, case.v_width], dim=-1)
    q = torch.randn(case.heads, case.num_q, case.width, device="cuda").to(case.dtype)
    return q.transpose(0, 1), k, v


@pytest.mark.parametrize("case", PREFILL + PREFILL_CORNER, ids=str)
def test_mla_prefill(case: Prefill, close) -> None:
    q, k, v = prefill_inputs(case)
    out, lse = mla.mla_prefill(q, k, v, SCALE, case.causal)
    want, want_lse = reference.mla_prefill(q, k, v, SCALE, case.causal)
    close(out, want, KIND[case.dtype])
    close(lse, want_lse, "float32")


@pytest.mark.parametrize(("nope", "rope"), [(128, 64), (32, 16), (24, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_mla_prefill_rope_keys_apart(nope: int, rope: int, causal: bool, close) -> None:
    q, k, v = prefill_inputs(Prefill(300, 1400, 16, nope + rope, 32))
    k_pe = torch.full((1404, rope + 8), float("nan"), device="cuda", dtype=BF16)[2:-2, 4:-4]
    k_pe.copy_(k[:, 0, nope:])
    whole = torch.cat((k[..., :nope], k_pe[:, None].expand(-1, 16, -1)), dim=-1)
    out, lse = mla.mla_prefill(q, k[..., :nope], v, SCALE, causal, k_pe=k_pe)
    want, want_lse = reference.mla_prefill(q, whole, v, SCALE, causal)
    close(out, want, "bfloat16")
    close(lse, want_lse, "float32")


def test_mla_prefill_varlen_graph_replayed_with_other_lengths(close) -> None:
    q, k, v = prefill_inputs(Prefill(400, 900, 16, 192, 128))
    cu_q = torch.tensor([0, 100, 400, 400], dtype=torch.int32, device="cuda")
    cu_k = torch.tensor([0, 300, 700, 900], dtype=torch.int32, device="cuda")
    got, want = replays(
        lambda: mla.mla_prefill_varlen(q, k, v, cu_q, cu_k, 300, SCALE, True)[0],
        lambda: (cu_q[1:3].copy_(torch.tensor([1, 201])), cu_k[1:3].copy_(torch.tensor([64, 265]))),
        lambda: mla_prefill_parts(q, k, v, [1, 200, 199], [64, 201, 635]),
    )
    close(got, want, "bfloat16")


def mla_prefill_parts(q: Tensor, k: Tensor, v: Tensor, lens_q: list[int], lens_k: list[int]):
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    return torch.cat([reference.mla_prefill(*part, SCALE, True)[0] for part in parts])


def test_mla_prefill_graph(close) -> None:
    q, k, v = prefill_inputs(Prefill(128, 200, 16, 192, 128))
    got, want = replays(
        lambda: mla.mla_prefill(q, k, v, SCALE, True)[0],
        lambda: k.copy_(k.flip(0)),
        lambda: reference.mla_prefill(q, k, v, SCALE, True)[0],
    )
    close(got, want, "bfloat16")


@pytest.mark.parametrize("width", [128, 20])
@pytest.mark.parametrize("num_tokens", [1, 100])
def test_merge_attention(num_tokens: int, width: int, close) -> None:
    a = torch.randn(num_tokens, 16, width, device="cuda", dtype=BF16)
    b = torch.randn(num_tokens, 32, width, device="cuda", dtype=BF16)[:, ::2]
    a_lse, b_lse = (torch.randn(16, num_tokens, device="cuda") * 20 for _ in range(2))
    a_lse[0], b_lse[1] = float("-inf"), float("-inf")
    got, want = replays(
        lambda: mla.merge_attention(a, a_lse, b, inside(b_lse, float("nan")))[0],
        lambda: (a.normal_(), a_lse[2:].normal_()),
        lambda: reference.merge_attention(a, a_lse, b, b_lse)[0],
    )
    close(got, want, "bfloat16")
    lse = mla.merge_attention(a, a_lse, b, b_lse)[1]
    close(lse, reference.merge_attention(a, a_lse, b, b_lse)[1], "float32")


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 3000), (63, 65), (1000, 2047)])
def test_gather_latent(start: int, stop: int) -> None:
    _, cache, table, _ = decode_inputs(Case((3000,), 1, "dot"))
    got, want = replays(
        lambda: mla.gather_latent(cache, inside(table, POISON)[0], start, stop),
        lambda: table.__setitem__((0, slice(0, 46)), table[0, :46].flip(0)),
        lambda: reference.gather_latent(cache, inside(table, POISON)[0], start, stop, 512, BF16),
    )
    assert torch.equal(got, want)
