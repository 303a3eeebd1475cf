"""Blocks of the KV cache that go to host memory and come back, to the bit."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsd.ipc.messages import Chunk, Join, Sampling, pack_int32
from dsd.model import host_blocks
from dsd.model.host_blocks import STAGED_BLOCKS, HostBlocks

Prompt = Callable[[int, int], list[int]]
NUM_BLOCKS = 50
LAYERS = [((16, 72), torch.bfloat16), ((16, 3), torch.float32), ((16, 656), torch.uint8)]


def make_layers() -> list[Tensor]:
    """Differently shaped, and every byte is its own."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for shape, dtype in LAYERS:
        num_bytes = NUM_BLOCKS * shape[0] * shape[1] * dtype.itemsize
        data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
        layers.append(data.view(dtype).view(NUM_BLOCKS, *shape))
    return layers


def content(layers: list[Tensor], block_id: int) -> list[bytes]:
    return [layer[block_id].contiguous().view(torch.uint8).numpy().tobytes() for layer in layers]


@pytest.mark.parametrize("slots_per_piece", [1000, 3, 1])
def test_blocks_come_back_to_the_bit(monkeypatch, slots_per_piece: int) -> None:
    block_bytes = sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in LAYERS)
    monkeypatch.setattr(host_blocks, "PINNED_BYTES", slots_per_piece * block_bytes)
    layers, taken = make_layers(), []
    host = HostBlocks(layers, 40, lambda done, total: taken.append((done, total)))
    assert host.slot_bytes == block_bytes
    assert taken[0] == (0, 40 * block_bytes)
    assert taken[-1] == (40 * block_bytes, 40 * block_bytes)
    before = [content(layers, block_id) for block_id in range(NUM_BLOCKS)]
    rng = random.Random(0)
    count = 2 * STAGED_BLOCKS + 1
    blocks, slots = rng.sample(range(NUM_BLOCKS), count), rng.sample(range(40), count)
    host.copy(list(zip(blocks, slots, strict=True)), [])
    assert [content(layers, block_id) for block_id in range(NUM_BLOCKS)] == before
    for layer in layers:
        layer.zero_()
    targets = rng.sample(range(NUM_BLOCKS), count)
    host.copy([], list(zip(slots, targets, strict=True)))
    for block_id, target in zip(blocks, targets, strict=True):
        assert content(layers, target) == before[block_id]
    untouched = set(range(NUM_BLOCKS)) - {*targets}
    assert all(not any(map(any, content(layers, block_id))) for block_id in untouched)


def test_a_block_is_read_before_the_same_step_restores_into_it() -> None:
    layers = make_layers()
    host = HostBlocks(layers, 2)
    first, second = content(layers, 1), content(layers, 2)
    host.copy([(1, 0)], [])
    host.copy([(2, 1)], [(0, 2), (1, 3)])
    assert (content(layers, 2), content(layers, 3)) == (first, second)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_logits_after_a_restore_are_those_of_the_kv_that_never_left(
    make_checkpoint, make_case, open_runner, row_of, watch_logits, prompt_of: Prompt, dtype: str
) -> None:
    checkpoint = make_checkpoint(make_case("v3"))
    runner = open_runner(checkpoint.directory, dtype=dtype, num_blocks=12, num_host_blocks=4)
    ids = prompt_of(48, 3)
    row, logits = row_of(runner), watch_logits(runner)

    def join(blocks: tuple[int, ...]) -> dict[str, Any]:
        joined = Join(0, pack_int32(ids), len(ids), 32, blocks, Sampling(temperature=0.0))
        return {"joins": (joined,), "chunks": (Chunk(0, 32, 16, True),)}

    row.prefill(ids, [32, 16], Sampling(temperature=0.0))  # into blocks 11, 10, 9
    row.run(**join((11, 10, 1)))
    row.run(offloads=((11, 3), (10, 1)), **join((11, 10, 2)))
    for layer in runner.cache.layers:
        layer.fill_(float("nan"))
    row.run(restores=((3, 7), (1, 4)), **join((7, 4, 5)))
    stayed, leaving, back = logits[-3:]
    assert torch.equal(stayed, leaving)
    assert torch.equal(stayed, back)


def test_step_with_copies_for_a_runner_without_host_memory_asserts(
    make_checkpoint, make_case, open_runner, row_of, prompt_of: Prompt
) -> None:
    runner = open_runner(make_checkpoint(make_case("v3")).directory)
    with pytest.raises(AssertionError, match="copies"):
        row_of(runner).run(offloads=((1, 0),))


@pytest.mark.parametrize("too_much", [False, True])
def test_host_memory_that_cannot_be_is_refused_with_the_numbers(
    make_checkpoint, make_case, open_runner, monkeypatch, too_much: bool
) -> None:
    directory = make_checkpoint(make_case("v3")).directory
    if too_much:
        options = {"num_host_blocks": 10**12}
    else:
        monkeypatch.setattr("dsd.tests.model.conftest.kv_cache.block_bytes", lambda *sizes: 1)
        options = {"num_host_blocks": 1}
    with pytest.raises(RuntimeError, match=r"kv_host_cache_gb is .* GB of host memory are free"):
        open_runner(directory, **options)


def rounds(engine: Any, prompt_of: Prompt, num_rounds: int) -> list[list[int]]:
    """Four people in turns, two at once; returns what was asked in each of the last round."""
    talks = [prompt_of(60, i) for i in range(4)]
    for number in range(num_rounds):
        for pair in ((0, 1), (2, 3)):
            for i in pair:
                talks[i] = [*talks[i], *prompt_of(9, 10 * number + i)]
                engine.add(f"{i} {number}", talks[i], 7)
            engine.run()
            for i in pair:
                talks[i] = [*talks[i], *engine.outputs[f"{i} {number}"]]
    return [engine.prompts[f"{i} {num_rounds - 1}"] for i in range(4)]


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_conversations_that_do_not_fit_get_their_tokens_from_the_host(
    make_checkpoint, make_case, open_engine, prompt_of: Prompt, pipeline_depth: int
) -> None:
    checkpoint = make_checkpoint(make_case("v3"))
    options = {"num_blocks": 20, "max_seq_len": 200, "max_num_tokens": 50}
    engine = open_engine(
        checkpoint.directory, pipeline_depth=pipeline_depth, num_host_blocks=60, **options
    )
    rounds(engine, prompt_of, 4)
    for request_id, prompt in engine.prompts.items():
        checkpoint.check_greedy(prompt, engine.outputs[request_id])
    host = engine.scheduler.stats().host
    assert host.num_restored_tokens > 200
    # All that a conversation has said before is found, but for the block that is not full.
    for request in engine.requests.values():
        before = len(request.prompt_ids) - 9 - 1
        if not request.request_id.endswith(" 0"):
            assert request.num_cached_tokens == before // 16 * 16, request
