"""What a step does to the rows' state: the twins against plain loops, the kernels against the twins
(interpreted here, on a GPU where there is one), and that they compile."""

from dataclasses import dataclass

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import step
from dsd.kernels.step import Inputs, TokenState
from dsd.tests.kernels.aot import compile_kernel
from dsd.tests.kernels.interpreter import patch, run_interpreted

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    @pytest.mark.slow
    def test_step_kernels_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
plain = pytest.mark.skipif(INTERPRET, reason="of the twins")
BLOCK_SIZE, PAIRS, POISON = 4, 3, 2147480000
I32 = torch.int32


@dataclass
class World:
    """Six rows and the null row, with their tables, and room for a step's inputs."""

    state: TokenState
    cos: Tensor
    sin: Tensor
    inputs: Inputs
    table: Tensor
    seq_lens: Tensor
    drafts: Tensor

    def to(self, device: str) -> "World":
        def moved(fields: object) -> dict[str, object]:
            return {
                name: value.to(device, copy=True) if isinstance(value, Tensor) else value
                for name, value in vars(fields).items()
            }

        rest = {**vars(self)}
        state, inputs = TokenState(**moved(rest.pop("state"))), Inputs(**moved(rest.pop("inputs")))
        return World(state, inputs=inputs, **{k: v.to(device, copy=True) for k, v in rest.items()})


@pytest.fixture
def world() -> World:
    torch.manual_seed(0)
    token_ids = torch.randint(0, 1000, (7, 41), dtype=I32)
    computed = torch.tensor([0, 3, 4, 39, 17, 8, 0], dtype=I32)
    table = torch.arange(7 * 10, dtype=I32).view(7, 10)[:, torch.randperm(10)]
    for row, count in enumerate(computed.tolist()):
        table[row, count // BLOCK_SIZE + 1 :] = POISON
    table[6] = 0
    inputs = Inputs.empty(30, PAIRS, torch.device("cpu"))
    for field in vars(inputs).values():
        field.fill_(POISON)
    return World(
        TokenState(token_ids, computed + 1, computed, table, BLOCK_SIZE),
        torch.rand(40, PAIRS), torch.rand(40, PAIRS), inputs,
        torch.full((5, 10), POISON, dtype=I32), torch.full((5,), POISON, dtype=I32),
        torch.randint(1000, 2000, (7, 5), dtype=I32),
    )  # fmt: skip


def decode(world: World, rows: list[int], query_len: int = 1) -> World:
    lines = torch.tensor(rows, dtype=I32, device=world.cos.device)
    count = len(rows)
    step.decode_inputs(
        world.state, lines, world.cos, world.sin, world.inputs, world.table[:count],
        world.seq_lens[:count], world.drafts, query_len,
    )  # fmt: skip
    return world


def prefill(world: World, chunks: list[list[int]]) -> World:
    table = torch.tensor(chunks, dtype=I32, device=world.cos.device).view(-1, 4)
    most = max((count for _, _, count, _ in chunks), default=0)
    step.chunk_inputs(world.state, table, most, world.cos, world.sin, world.inputs)
    return world


def same(actual: World, expected: World) -> None:
    for got, want in (
        *zip(vars(actual.inputs).values(), vars(expected.inputs).values(), strict=True),
        *zip(
            (x for x in vars(actual.state).values() if isinstance(x, Tensor)),
            (x for x in vars(expected.state).values() if isinstance(x, Tensor)),
            strict=True,
        ),
        (actual.seq_lens, expected.seq_lens),
    ):
        assert torch.equal(got.cpu(), want.cpu())
    blocks = (expected.seq_lens.cpu() + BLOCK_SIZE - 1) // BLOCK_SIZE
    for got, want, count in zip(actual.table, expected.table, blocks.tolist(), strict=True):
        if count <= len(got):  # a line that was filled in; behind its length nothing is promised
            assert torch.equal(got[:count].cpu(), want[:count].cpu())


@plain
def test_decode_inputs_are_the_newest_token_of_each_row(world) -> None:
    before = world.to("cpu")
    decode(world, [3, 0, 6, 4])
    for line, row in enumerate([3, 0, 6, 4]):
        at = int(before.state.num_computed[row]) if row != 6 else 0
        assert world.inputs.input_ids[line] == before.state.token_ids[row, at]
        assert world.inputs.positions[line] == at
        slot = int(before.state.block_table[row, at // BLOCK_SIZE]) * BLOCK_SIZE + at % BLOCK_SIZE
        assert world.inputs.slot_mapping[line] == slot
        assert torch.equal(world.inputs.cos[line], world.cos[at])
        assert torch.equal(world.inputs.sin[line], world.sin[at])
        assert world.seq_lens[line] == (at + 1 if row != 6 else 0)
        assert world.state.num_computed[row] == (at + 1 if row != 6 else 0)
    assert (world.inputs.positions[4:] == POISON).all() and world.seq_lens[4] == POISON


@plain
@pytest.mark.parametrize("query_len", [2, 4])
def test_decode_inputs_of_several_tokens_are_the_newest_and_drafts_behind_it(
    world, query_len
) -> None:
    before, lines = world.to("cpu"), [5, 6, 2, 0]
    decode(world, lines, query_len)
    for line, row in enumerate(lines):
        first = int(before.state.num_computed[row])
        for i in range(query_len):
            token, at = line * query_len + i, first + i if row != 6 else 0
            want = before.state.token_ids[row, at] if i == 0 else before.drafts[row, i - 1]
            assert world.inputs.input_ids[token] == want
            assert world.inputs.positions[token] == at
            block = int(before.state.block_table[row, at // BLOCK_SIZE])
            assert world.inputs.slot_mapping[token] == block * BLOCK_SIZE + at % BLOCK_SIZE
            assert torch.equal(world.inputs.cos[token], world.cos[at])
        assert world.seq_lens[line] == (first + query_len if row != 6 else 0)
        assert world.state.num_computed[row] == (first + 1 if row != 6 else 0)
    assert (world.inputs.positions[4 * query_len :] == POISON).all()


@plain
def test_chunk_inputs_are_the_slices_of_the_rows(world) -> None:
    before = world.to("cpu")
    prefill(world, [[1, 2, 2, 5], [4, 0, 18, 7]])
    for row, start, count, first in ((1, 2, 2, 5), (4, 0, 18, 7)):
        for i in range(count):
            at = start + i
            assert world.inputs.input_ids[first + i] == before.state.token_ids[row, at]
            slot = int(before.state.block_table[row, at // BLOCK_SIZE]) * BLOCK_SIZE
            assert world.inputs.slot_mapping[first + i] == slot + at % BLOCK_SIZE
            assert torch.equal(world.inputs.cos[first + i], world.cos[at])
        assert world.state.num_computed[row] == start + count
    assert (world.inputs.positions[:5] == POISON).all()
    assert (world.inputs.positions[25:] == POISON).all()


DECODES = [[0], [3, 0, 6, 4], [6, 6, 6], [5, 4, 3, 2, 1]]
SEVERAL = [([3, 0, 6, 4], 1), ([5, 6, 2, 0], 2), ([5, 2, 0], 4), ([6, 2], 3), ([0, 5, 6], 6)]
"""(rows, tokens of each)"""
CHUNKS = [[[1, 2, 2, 5], [4, 0, 18, 7]], [[3, 0, 30, 0]], [[2, 4, 1, 29]], []]


@interpreted
@pytest.mark.parametrize("rows", DECODES, ids=str)
def test_decode_inputs_interpreted(world, rows, monkeypatch) -> None:
    got = decode(world.to("cpu"), rows)
    monkeypatch.setattr(step, "runs_kernels", lambda x: False)
    same(got, decode(world, rows))


@interpreted
@pytest.mark.parametrize(("rows", "query_len"), SEVERAL, ids=str)
def test_decode_inputs_of_several_tokens_interpreted(world, rows, query_len, monkeypatch) -> None:
    got = decode(world.to("cpu"), rows, query_len)
    monkeypatch.setattr(step, "runs_kernels", lambda x: False)
    same(got, decode(world, rows, query_len))


@interpreted
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunk_inputs_interpreted(world, chunks, monkeypatch) -> None:
    got = prefill(world.to("cpu"), chunks)
    monkeypatch.setattr(step, "runs_kernels", lambda x: False)
    same(got, prefill(world, chunks))


def scattered(device: str) -> tuple[Tensor, Tensor]:
    """words before and after some spans, the longest of which needs several rounds."""
    words = torch.arange(20_000, dtype=I32, device=device)
    spans = [(3, 0, 2), (19_000, 4, 1000), (5, 1004, 0), (100, 1004, 9001), (99, 10_008, 1)]
    data = -torch.arange(10_012, dtype=I32)
    want = words.clone().cpu()
    for to, start, length in spans:
        want[to : to + length] = data[start : start + length]
    head = torch.tensor([x for span in spans for x in span] + [POISON], dtype=I32)
    step.scatter_words(words, torch.cat((head, data)).to(device), len(spans), len(head))
    return words.cpu(), want


def test_scatter_words_writes_the_spans_and_nothing_else() -> None:
    got, want = scattered("cpu")
    assert torch.equal(got, want)


class TestOnGpu:
    pytestmark = on_gpu

    def test_scatter_words(self) -> None:
        got, want = scattered("cuda")
        assert torch.equal(got, want)

    @pytest.mark.parametrize("rows", DECODES, ids=str)
    def test_decode_inputs(self, world, rows) -> None:
        same(decode(world.to("cuda"), rows), decode(world, rows))

    @pytest.mark.parametrize(("rows", "query_len"), SEVERAL, ids=str)
    def test_decode_inputs_of_several_tokens(self, world, rows, query_len) -> None:
        same(decode(world.to("cuda"), rows, query_len), decode(world, rows, query_len))

    @pytest.mark.parametrize("chunks", CHUNKS, ids=str)
    def test_chunk_inputs(self, world, chunks) -> None:
        same(prefill(world.to("cuda"), chunks), prefill(world, chunks))

    def test_decode_inputs_in_a_graph_follow_the_rows(self, world) -> None:
        there, rows = world.to("cuda"), torch.tensor([3, 0, 6], dtype=I32, device="cuda")

        def run() -> None:
            step.decode_inputs(
                there.state, rows, there.cos, there.sin, there.inputs, there.table[:3],
                there.seq_lens[:3],
            )  # fmt: skip

        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        rows.copy_(torch.tensor([4, 6, 1]))
        graph.replay()
        same(there, decode(decode(world, [3, 0, 6]), [4, 6, 1]))


WORDS, LONGS, FLOATS = (torch.empty(64, dtype=d) for d in (I32, torch.int64, torch.float32))
TABLES = (WORDS, WORDS, WORDS, WORDS, FLOATS, FLOATS, LONGS, LONGS, LONGS, FLOATS, FLOATS)
SIZES = {"SIZE": 64, "PAIRS": 32, "PAIRS_BLOCK": 32}


@plain
@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_step_kernels_compile(arch: int) -> None:
    compile_kernel(step._scatter, (WORDS, WORDS, 64), {"BLOCK": step.SCATTER_BLOCK}, arch, 4)
    for drafts, stride, query_len in ((None, 0, 1), (WORDS, 3, 2), (WORDS, 5, 6)):
        args = (*TABLES, WORDS, WORDS, 256, 4097, 64, 64, drafts, stride)
        lengths = {"LEN": query_len, "LEN_BLOCK": triton.next_power_of_2(query_len)}
        compile_kernel(step._decode_inputs, args, {**SIZES, **lengths}, arch, 1)
    args = (*TABLES, 4097, 64)
    compile_kernel(step._chunk_inputs, args, {**SIZES, "BLOCK": step.TOKENS_BLOCK}, arch, 4)
