"""What drafts do to the rows' state: the twins against plain loops, the kernels against the twins
(interpreted here, on a GPU where there is one), and that they compile."""

from dataclasses import dataclass

import pytest
import torch
import triton
from torch import Tensor

from dsd.kernels import drafts
from dsd.kernels.step import TokenState
from dsd.tests.kernels.aot import compile_kernel
from dsd.tests.kernels.interpreter import patch, run_interpreted
from dsd.tools import forced_acceptance

INTERPRET = triton.knobs.runtime.interpret
if INTERPRET:
    patch()
else:

    @pytest.mark.slow
    def test_draft_kernels_in_the_interpreter_equal_their_twins() -> None:
        run_interpreted(__file__)


interpreted = pytest.mark.skipif(not INTERPRET, reason="run by the test above")
plain = pytest.mark.skipif(INTERPRET, reason="of the twins")
ROWS, PLACES, POISON = 300, 3, 2147480000
NULL = ROWS - 1
I32, I64 = torch.int32, torch.int64


@dataclass
class World:
    """Rows, the last of them the null row, and lines of some of them."""

    lines: Tensor
    num_tokens: Tensor
    num_computed: Tensor
    drafts: Tensor
    chosen: Tensor
    """[places, lines]: mostly what was drafted."""
    hidden: Tensor
    input_ids: Tensor
    last: Tensor

    @property
    def state(self) -> TokenState:
        return TokenState(self.drafts, self.num_tokens, self.num_computed, self.drafts, 8)


def world(num_lines: int, device: str = "cpu") -> World:
    """Every fourth line is the null row's. What may be a slice is one, at an odd place."""
    torch.manual_seed(num_lines)
    wide = torch.randint(0, 50, (ROWS, PLACES + 2), dtype=I32)
    lines = torch.cat((torch.randperm(NULL), torch.full((9,), NULL))).int()
    lines[3::4] = NULL
    lines = lines[: num_lines + 1]
    found = wide[lines[1:].long(), :PLACES].t().long()
    wrong = torch.rand(found.shape) < 0.3
    num_tokens = torch.randint(2, 1000, (ROWS,), dtype=I32)
    hidden = torch.randn(3 * num_lines, 2600).bfloat16()
    last = torch.randperm(3 * num_lines)[: num_lines + 1]
    return World(
        lines.to(device)[1:], num_tokens.to(device),
        torch.full_like(num_tokens, POISON, device=device), wide.to(device)[:, :PLACES],
        torch.where(wrong, found + 1, found).to(device), hidden.to(device)[:, 40:2540],
        torch.randint(0, 99, (3 * num_lines,)).to(device), last.to(device)[1:],
    )  # fmt: skip


def kept(world: World, agreed: Tensor | None = None) -> list[Tensor]:
    """Of each place, what is left; and what the rows and lines have in the end."""
    num_tokens, left, found = torch.full_like(world.lines, POISON), world.lines, []
    for place, chosen in enumerate(world.chosen):
        world.num_tokens[: ROWS - 1] += 1
        own = None if agreed is None else agreed[place]
        left = drafts.keep_accepted(left, chosen, place, world.drafts, world.state, num_tokens, own)
        found.append(left)
    return [*found, num_tokens, world.num_computed[:NULL]]


def agreed_of(world: World) -> Tensor:
    return torch.rand(PLACES, len(world.lines)).to(world.lines.device) < 0.7


def begun(world: World) -> list[Tensor]:
    """What drafting begins with, and the rows after two drafts."""
    ahead, position = (torch.full_like(world.num_tokens, POISON) for _ in range(2))
    own = drafts.begin_drafts(
        world.hidden, world.input_ids, world.last, world.lines, world.num_tokens, ahead, position
    )
    for place in (0, 2):
        drafts.put_drafts(world.chosen[place], world.lines, place, world.drafts, position)
    return [*own, *(x[:NULL] for x in (ahead, position, world.drafts))]


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want.cpu())


LINES = [1, 5, 128, 297]


@plain
@pytest.mark.parametrize("own", [False, True], ids=["drafted", "agreed"])
def test_rows_are_kept_until_a_draft_is_wrong(own: bool) -> None:
    given, before = world(60), world(60)
    agreed = agreed_of(given) if own else None
    *left, num_tokens, num_computed = kept(given, agreed)
    for line, row in enumerate(before.lines.tolist()):
        count, known = 1, int(before.num_tokens[row])
        if row == NULL:
            assert num_tokens[line] == 1 and all(rows[line] == NULL for rows in left)
            continue
        for place in range(PLACES):
            same_token = before.drafts[row, place] == before.chosen[place, line]
            if not (same_token if agreed is None else agreed[place, line]):
                break
            assert left[place][line] == row
            count += 1
        assert all(rows[line] == NULL for rows in left[count - 1 :])
        assert num_tokens[line] == count
        assert num_computed[row] == known + count - 1
    assert torch.equal(given.lines, before.lines)
    untouched = torch.ones(ROWS, dtype=torch.bool)
    untouched[before.lines.long()] = False
    assert (given.num_computed[untouched] == POISON).all()
    assert given.num_computed[NULL] == POISON


@plain
def test_drafting_begins_at_the_last_token_but_one() -> None:
    given, before = world(20), world(20)
    hidden, following, ahead, position, drafted = begun(given)
    real = before.lines != NULL
    rows = before.lines[real].long()
    assert torch.equal(hidden, before.hidden[before.last])
    assert torch.equal(following, before.input_ids[before.last])
    assert torch.equal(ahead[rows], before.num_tokens[rows] - 2)
    assert torch.equal(position[rows], before.num_tokens[rows] + 2), "two drafts further"
    assert torch.equal(drafted[rows][:, [0, 2]], before.chosen[[0, 2]][:, real].t().int())
    untouched = torch.ones(NULL, dtype=torch.bool)
    untouched[rows] = False
    assert (ahead[untouched] == POISON).all() and (position[untouched] == POISON).all()
    assert torch.equal(drafted[untouched], before.drafts[:NULL][untouched])
    assert torch.equal(drafted[:, 1], before.drafts[:NULL, 1])


@interpreted
@pytest.mark.parametrize("num_lines", LINES)
def test_draft_kernels_interpreted(num_lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    agreed = agreed_of(world(num_lines))
    got = [kept(world(num_lines)), kept(world(num_lines), agreed), begun(world(num_lines))]
    monkeypatch.setattr(drafts, "runs_kernels", lambda x: False)
    same(got[0], kept(world(num_lines)))
    same(got[1], kept(world(num_lines), agreed))
    same(got[2], begun(world(num_lines)))


def forced(given: World) -> list[Tensor]:
    return [
        forced_acceptance.hashed_below(limit, given.lines, given.num_tokens, back)
        for limit, back in ((0, 1), (1234, 1), (2900, 2), (4096, 3))
    ]


@interpreted
@pytest.mark.parametrize("num_lines", LINES)
def test_forced_acceptance_interpreted(num_lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    got = forced(world(num_lines))
    monkeypatch.setattr(forced_acceptance, "runs_kernels", lambda x: False)
    same(got, forced(world(num_lines)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("num_lines", LINES)
    def test_draft_kernels(self, num_lines: int) -> None:
        agreed = agreed_of(world(num_lines))
        same(kept(world(num_lines, "cuda")), kept(world(num_lines)))
        same(kept(world(num_lines, "cuda"), agreed.cuda()), kept(world(num_lines), agreed))
        same(begun(world(num_lines, "cuda")), begun(world(num_lines)))
        same(forced(world(num_lines, "cuda")), forced(world(num_lines)))

    def test_draft_kernels_in_a_graph_follow_the_rows(self) -> None:
        there, fresh = world(40, "cuda"), world(40, "cuda")

        def run() -> list[Tensor]:
            return [*kept(there), *begun(there)]

        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        for name, x in vars(fresh).items():
            getattr(there, name).copy_(x)
        there.lines.copy_(fresh.lines.flip(0))
        fresh.lines.copy_(fresh.lines.flip(0).clone())
        graph.replay()
        same(got, [*kept(fresh), *begun(fresh)])


WORDS, LONGS = torch.empty(64, dtype=I32), torch.empty(64, dtype=I64)
STATES, FLAGS = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bool)


@plain
@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_draft_kernels_compile(arch: int) -> None:
    block = {"BLOCK": drafts.LINES_BLOCK}
    for agreed in (None, FLAGS):
        args = (WORDS, LONGS, WORDS, agreed, WORDS, WORDS, WORDS, WORDS, 5, 0, 256, 3)
        assert compile_kernel(drafts._keep_accepted, args, block, arch, 1).spills == 0
    args = (STATES, LONGS, LONGS, WORDS, WORDS, WORDS, WORDS, STATES, LONGS, 7168)
    sizes = {"WIDTH": 7168, "BLOCK": drafts.HIDDEN_BLOCK}
    assert compile_kernel(drafts._begin_drafts, args, sizes, arch, 4).spills == 0
    args = (LONGS, WORDS, WORDS, WORDS, 5, 0, 3)
    assert compile_kernel(drafts._put_drafts, args, block, arch, 1).spills == 0
    args, block = (WORDS, WORDS, FLAGS, 5, 1234, 1), {"BLOCK": forced_acceptance.BLOCK}
    block["GRAIN"] = forced_acceptance.GRAIN
    assert compile_kernel(forced_acceptance._hashed_below, args, block, arch, 1).spills == 0
