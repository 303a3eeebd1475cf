"""The MTP layer itself: its weights, its logits, its KV, and the room that it needs."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsd.ipc.messages import Grow, Join, Load, Sampling, pack_int32
from dsd.kernels.reference_sample import gumbel_noise
from dsd.kernels.sample_state import SamplingState
from dsd.kernels.step import Inputs, TokenState
from dsd.model import checkpoint, decodes, kv_cache, loader
from dsd.model.batch import ForwardBatch
from dsd.model.build import build
from dsd.model.config import CheckpointError, ModelConfig
from dsd.model.graphs import drafts_of
from dsd.model.kv_cache import KVCache
from dsd.model.parallel import Layout
from dsd.model.rehearsal import Rehearsal
from dsd.model.rows import Delta, Rows
from dsd.tests.model.mtp_kit import add_mtp_layer
from dsd.tools.hand_driver import HandDriver
from dsd.tools.tiny import evaluate, export, tasks, text
from dsd.tools.tiny.configuration import CONFIG
from dsd.tools.tiny.network import Network, Packed

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)
TINY = Path(export.__file__).parent / "dsd-tiny"


@pytest.fixture(scope="session")
def mtp_dir(make_checkpoint, make_case, tmp_path_factory) -> Path:
    source = make_checkpoint(make_case("mtp")).directory
    return add_mtp_layer(source, tmp_path_factory.mktemp("mtp"))


def load_of(directory: Path, num_nextn: int, **changes: object) -> Load:
    fields = {"load_format": "auto", "max_seq_len": 100, "kv_cache_gb": 0.01, **changes}
    return Load(
        epoch=0, model_dir=str(directory), device="cpu", dtype="float32", act_quant="none",
        max_batch_size=4, max_num_tokens=64, block_size=16, num_nextn=num_nextn,
        kv_cache_free_gpu_memory_fraction=0.9, **fields,
    )  # fmt: skip


def built(load: Load):
    return build(load, lambda stage, done, total: None)


# ---- weights ------------------------------------------------------------------------------------


def test_load_with_mtp_adds_the_layer_behind_the_last_and_nothing_else(mtp_dir: Path) -> None:
    config = ModelConfig.load(mtp_dir)
    plain = checkpoint.targets(config)
    targets = checkpoint.targets(config, mtp=True)
    own = targets.keys() - plain.keys()
    assert all(name.startswith(f"layers.{config.num_hidden_layers}.") for name in own)
    assert {"enorm", "hnorm", "eh_proj", "head_norm"} < {name.split(".", 2)[2] for name in own}
    weights = loader.load(config, mtp_dir, torch.float32, CPU, lambda *_: None, mtp=True)
    assert weights.keys() == targets.keys()
    dummy = loader.dummy(config, Layout(), torch.float32, CPU, mtp=True)
    assert {name: w.shape for name, w in dummy.items()} == {n: w.shape for n, w in weights.items()}


def test_last_stage_of_a_pipeline_holds_the_mtp_layer_and_its_embedding(mtp_dir: Path) -> None:
    config = ModelConfig.load(mtp_dir)
    first, last = (
        checkpoint.targets(config, Layout(pp_size=2, pp_rank=rank), mtp=True) for rank in (0, 1)
    )
    name = f"layers.{config.num_hidden_layers}.eh_proj"
    assert name in last and name not in first and "embed" in last and "embed" in first


def test_ranks_sums_of_the_joined_states_are_the_whole(mtp_dir: Path) -> None:
    config = ModelConfig.load(mtp_dir)
    name, both = (
        f"layers.{config.num_hidden_layers}.eh_proj",
        torch.randn(3, 2 * config.hidden_size),
    )

    def part(layout: Layout) -> torch.Tensor:
        weights = loader.load(
            config, mtp_dir, torch.float32, CPU, lambda *_: None, layout, mtp=True
        )
        held = layout.joined_width(config)
        assert len(held) == 2 * config.hidden_size // layout.tp_size
        return both[:, held.start : held.stop] @ weights[name].t()

    parts = [part(Layout(tp_size=2, tp_rank=rank)) for rank in (0, 1)]
    torch.testing.assert_close(sum(parts), part(Layout()))


def test_build_without_an_mtp_layer_in_config_names_the_field(
    make_checkpoint, make_case, tmp_path: Path
) -> None:
    source = make_checkpoint(make_case("mtp")).directory
    fields = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"num_nextn 2: .*num_nextn_predict_layers 0"):
        built(load_of(tmp_path, 2))


def test_build_without_the_layers_tensors_names_the_first(make_checkpoint, make_case) -> None:
    directory = make_checkpoint(make_case("mtp")).directory
    assert ModelConfig.load(directory).num_nextn_predict_layers == 1, "transformers' default"
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3\.enorm\.weight"):
        built(load_of(directory, 1))
    built(load_of(directory, 0))


@pytest.mark.parametrize("num_nextn", [-1, 6])
def test_build_with_more_drafts_than_a_decode_can_verify_is_refused(mtp_dir, num_nextn) -> None:
    with pytest.raises(CheckpointError, match=f"num_nextn {num_nextn} is not between 0 and 5"):
        built(load_of(mtp_dir, num_nextn))


# ---- room ---------------------------------------------------------------------------------------


def test_build_makes_room_behind_max_seq_len_for_three_steps_of_drafts(mtp_dir: Path) -> None:
    for num_nextn, room, layers in ((0, 0, 3), (3, 12, 4)):
        runner, ready = built(load_of(mtp_dir, num_nextn))
        assert ready.num_nextn == num_nextn and ready.max_seq_len == 100
        tokens = runner.rows.tokens
        assert tokens.token_ids.shape[1] == 100 + room + 1
        assert tokens.block_table.shape[1] == -(-(100 + room) // 16)
        assert runner.model.cos.shape[0] == 100 + room
        assert len(runner.cache.layers) == layers


def test_block_bytes_are_those_of_a_block_of_the_cache(mtp_dir: Path) -> None:
    config = ModelConfig.load(mtp_dir)
    for num_layers in (1, 4):
        cache = KVCache(config, 3, 16, torch.float32, CPU, num_layers)
        size = sum(layer.nbytes for layer in cache.layers)
        assert size == 3 * kv_cache.block_bytes(config, 16, torch.float32, num_layers)


def test_join_clears_the_block_table_behind_its_blocks() -> None:
    rows = Rows(2, max_seq_len=64, block_size=8, vocab_size=50, device=CPU, num_nextn=2)
    for blocks, more in (((1, 2, 3, 4, 5, 6, 7), ()), ((8, 9), (4,))):
        delta = Delta()
        rows.join(delta, Join(0, pack_int32([3]), 1, 0, blocks, GREEDY))
        rows.grow(delta, Grow(0, more))
        delta.send(rows.words)
    assert rows.tokens.block_table[0].tolist() == [8, 9, 4, 0, 0, 0, 0, 0]
    delta = Delta()
    rows.grow(delta, Grow(0, (5, 6)))
    delta.send(rows.words)
    assert rows.tokens.block_table[0].tolist() == [8, 9, 4, 5, 6, 0, 0, 0]


# ---- accept -------------------------------------------------------------------------------------


def test_accept_stops_at_the_first_wrong_draft_whatever_follows() -> None:
    """Four rows of two known tokens, the last one padding. The choices are 10, 11, 12."""
    rows = Rows(3, max_seq_len=64, block_size=8, vocab_size=50, device=CPU, num_nextn=2)
    for row in range(3):
        delta = Delta()
        rows.join(delta, Join(row, pack_int32([3, 4]), 2, 1, (1,), GREEDY))
        delta.send(rows.words)
    rows.drafts[:] = torch.tensor([[10, 11], [9, 11], [10, 9], [10, 11]])
    logits = torch.zeros(4, 3, 50)
    logits[:, range(3), [10, 11, 12]] = 1.0
    lines = torch.tensor([1, 0, 3, 2], dtype=torch.int32)
    sampled = decodes.accept(logits.flatten(0, 1), lines, 4, 3, rows)
    assert sampled.num_tokens is not None
    assert sampled.num_tokens[[0, 1, 3]].tolist() == [1, 3, 2]
    assert rows.tokens.num_tokens[:3].tolist() == [5, 3, 4]
    assert rows.tokens.num_computed[:3].tolist() == [4, 2, 3]
    assert rows.tokens.token_ids[0, :5].tolist() == [3, 4, 10, 11, 12]
    assert rows.tokens.token_ids[1, 2] == 10 and rows.tokens.token_ids[2, 2:4].tolist() == [10, 11]
    assert decodes.last_accepted(sampled, 4, 3)[[0, 1, 3]].tolist() == [0, 5, 10]


# ---- logits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Network]:
    """An export of a random network of the small model's sizes, and the network rounded to it."""
    directory = tmp_path_factory.mktemp("untrained")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    config = ModelConfig.load(directory)
    torch.manual_seed(3)
    export.write_bf16(directory, Network(config))
    network = Network(config)
    network.load_state_dict(export.read_state(directory, config))
    return directory, network.eval()


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [512, 17])
def test_logits_of_the_layer_are_the_training_networks(
    untrained, prompt_of, monkeypatch, chunk_size: int
) -> None:
    directory, network = untrained
    prompt = prompt_of(50, 1)
    driver = HandDriver(built(load_of(directory, 2))[0])
    driver.add(prompt, 8, GREEDY, chunk_size)
    mtp = driver.runner.drafter.mtp
    seen: list[tuple[int, Tensor]] = []
    forward = mtp.forward

    def noted(hidden: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        own = forward(hidden, batch, cache)
        seen.append((int(batch.inputs.positions), driver.runner.model.logits(own)))
        return own

    monkeypatch.setattr(mtp, "forward", noted)
    (tokens,) = driver.run(2)
    ids = [*prompt, *tokens]
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
    batch = Packed(torch.tensor([ids]), torch.arange(len(ids))[None], mask)
    with torch.no_grad():
        _, expected = network(batch)
    firsts = [(position, logits) for position, logits in seen[::2] if position < len(ids) - 1]
    assert len(firsts) > 3, "for each step's first draft it is computed from known tokens"
    for position, logits in firsts:
        torch.testing.assert_close(logits[0], expected[0, position], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(temperature=0.6, top_p=0.95, seed=4, frequency_penalty=0.1)],
    ids=["greedy", "drawn"],
)
def test_small_model_gives_the_same_tokens_and_first_drafts_are_nearly_all_right(sampling) -> None:
    """By teacher forcing 99.9 % are (`tools/tiny/evaluate.py`)."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    asked = evaluate.examples(list(tasks.TASKS), 1)[:4]
    prompts = [tokenizer.encode(text.prompt_text(e), add_special_tokens=False).ids for e in asked]
    found = []
    for num_nextn in (0, 1, 3):
        load = load_of(TINY, num_nextn, max_seq_len=1000, kv_cache_gb=0.1)
        driver = HandDriver(built(load)[0])
        for prompt in prompts:
            driver.add(prompt, 60, sampling, stop_token_ids=frozenset([1]))
        found.append(driver.run(num_nextn))
        counts = [count for row in driver.rows for count in row.accepted[:-1]]
        assert not num_nextn or sum(count > 1 for count in counts) / len(counts) > 0.97
    assert found[0] == found[1] == found[2]


def test_drafts_follow_each_other_with_the_noise_of_their_own_positions(
    mtp_dir, prompt_of, monkeypatch
) -> None:
    driver = HandDriver(built(load_of(mtp_dir, 3))[0])
    seeds = torch.tensor([7, 8])
    for i, seed in enumerate(seeds.tolist()):
        driver.add(prompt_of(9 + i), 20, Sampling(temperature=1.0, seed=seed))
    runner, mtp = driver.runner, driver.runner.drafter.mtp
    for _ in range(2):
        driver.step(3, 3)
    passes: list[tuple[Tensor, Inputs, Tensor, Tensor]] = []
    stored: list[Tensor] = []
    forward, store = mtp.forward, mtp.store

    def noted(hidden: Tensor, batch: ForwardBatch, cache: KVCache) -> Tensor:
        own = forward(hidden, batch, cache)
        passes.append((hidden, batch.inputs, batch.seq_lens.clone(), own))
        return own

    def noted_store(hidden: Tensor, batch: ForwardBatch, cache: KVCache) -> None:
        stored.append(hidden)
        store(hidden, batch, cache)

    monkeypatch.setattr(mtp, "forward", noted)
    monkeypatch.setattr(mtp, "store", noted_store)
    output = driver.step(3, 3)
    assert len(passes) == 3 and len(stored) == 1
    counts = torch.frombuffer(bytearray(output.num_tokens), dtype=torch.int32)
    tokens, drafts = runner.rows.tokens, runner.rows.drafts[:2]
    num_tokens = tokens.num_tokens[:2]
    before = stored[0][torch.tensor([0, 4]) + counts - 1]
    following = tokens.token_ids[[0, 1], num_tokens.long() - 1]
    for i, (hidden, inputs, seq_lens, own) in enumerate(passes):
        assert torch.equal(hidden, before) and torch.equal(inputs.input_ids, following)
        assert inputs.positions.tolist() == (num_tokens + i - 2).tolist()
        assert seq_lens.tolist() == (num_tokens + i - 1).tolist()
        before, following = own, drafts[:, i]
        noise = gumbel_noise(seeds, num_tokens.long() + i, runner.model.config.vocab_size)
        assert torch.equal((runner.model.logits(before) + noise).argmax(-1), drafts[:, i])


def test_accepting_and_drafting_ask_the_host_for_nothing(monkeypatch) -> None:
    """On meta tensors whatever needs a value raises, as it would in a captured graph. Kernels and
    model are stood in for."""
    with torch.device("meta"):
        rows = SimpleNamespace(
            relaxed=None,
            drafts=torch.zeros(5, 3, dtype=torch.int32),
            tokens=TokenState(*(torch.zeros(5, dtype=torch.int32) for _ in range(4)), 8),
            choice=meta_choice(),
        )
        lines = torch.zeros(4, dtype=torch.int32)
        logits, ids = torch.zeros(4 * 4, 50), torch.zeros(4 * 4, dtype=torch.int64)
        hidden = torch.zeros(4 * 4, 16)
        monkeypatch.setattr(decodes.sampler, "choose", lambda _, left, *own: left.long())
        monkeypatch.setattr(decodes.sample, "sample_rows", lambda _, lines, state: lines.long())
        monkeypatch.setattr(decodes, "empty_inputs", lambda count, model: Inputs(*[lines] * 5))
        monkeypatch.setattr(decodes, "fill_inputs", lambda *_: (lines, lines))
        mtp = SimpleNamespace(forward=lambda hidden, *_: hidden, store=lambda *_: None)
        mtp.model = SimpleNamespace()
        mtp.model.logits = lambda hidden: hidden
        sampled = decodes.accept(logits, lines, 4, 4, rows)
        last = decodes.last_accepted(sampled, 4, 4)
        batch = ForwardBatch(Inputs(*[ids] * 5), 4, lines, lines, None, 4)
        decodes.Drafter(mtp, rows).follow(hidden, batch, lines, last, 3, None)
    assert sampled.token_ids.shape == (16,) and sampled.num_tokens.shape == (4,)
    assert sampled.num_tokens.dtype == torch.int32 and last.dtype == torch.int64


def meta_choice() -> SamplingState:
    names = [field.name for field in fields(SamplingState)]
    return SamplingState(**{name: torch.zeros(5, dtype=torch.int32) for name in names})


@pytest.mark.slow
@pytest.mark.parametrize("max_num_tokens", [16, 64])
def test_rehearsal_with_drafts_changes_no_row_and_no_block_but_the_null_ones(
    mtp_dir, max_num_tokens: int
) -> None:
    runner = built(load_of(mtp_dir, 2))[0]
    rows, delta = runner.rows, Delta()
    rows.join(delta, Join(0, pack_int32([5, 6, 7]), 3, 0, (1,), GREEDY))
    delta.send(rows.words)
    rows.drafts[0] = torch.tensor([8, 9])
    for layer in runner.cache.layers:
        layer.fill_(float("nan"))
    before, seen = rows.words.clone(), []
    logits = runner.model.logits

    def noted(hidden: Tensor, out: Tensor | None = None) -> Tensor:
        seen.append(len(hidden))
        return logits(hidden, out)

    runner.model.logits = noted
    rehearsal = Rehearsal(runner, max_num_tokens, 64)
    rehearsal.all_sizes(lambda done, total: None)
    rehearsal.largest_passes()
    rehearsal.largest_decode()
    assert 4 * 3 + 1 in seen, "four decodes with two drafts, and a chunk"
    rows.reset_null()
    for own in (rows.tokens.token_ids[rows.null], rows.drafts[rows.null]):
        start = own.storage_offset()
        before[start : start + len(own)] = own
    assert torch.equal(rows.words, before)
    for layer in runner.cache.layers:
        assert torch.isnan(layer[1:]).all(), "only the null block may be written"


def test_graphs_are_captured_for_every_length_of_drafts() -> None:
    assert drafts_of(0) == [(0, 0)]
    assert drafts_of(2) == [(2, 2), (1, 1), (0, 0)]
