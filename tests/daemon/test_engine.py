"""The engine by itself: what it tells its scheduler about the steps that the worker took."""

import asyncio

from dsd.daemon.config import EngineConfig
from dsd.daemon.engine import Engine
from dsd.ipc.messages import Ready, Step, StepOutput, pack_int32
from dsd.tests.daemon.scheduler_kit import make_request

NUM_ROWS = 4
READY = Ready(
    epoch=1, device="none", dtype="none", vocab_size=512, max_batch_size=8, max_num_tokens=8192,
    max_seq_len=131072, num_blocks=4000, block_size=64, num_parameters=0, weight_bytes=0,
)  # fmt: skip


class Worker:
    """Answers steps of an engine: 8 ms, and 10 us for each token."""

    def __init__(self, max_itl_ms: float, overlaps: bool = False) -> None:
        self.steps = asyncio.Queue[Step]()
        config = EngineConfig(max_itl_ms=max_itl_ms, enable_overlap_scheduler=overlaps)
        self.engine = Engine(config, 16, self.steps.put)
        self.engine.worker_ready(READY)

    async def answer(self) -> int:
        """Returns how many tokens of prompts the step had."""
        step = await self.steps.get()
        num_prompt_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        num_decodes = len(step.decodes) // 4
        num_sampled = num_decodes + sum(chunk.sample for chunk in step.chunks)
        time_us = 8000 + 10 * (num_decodes + num_prompt_tokens)
        token_ids = pack_int32([7] * num_sampled)
        self.engine.step_done(StepOutput(step.epoch, step.seq, token_ids, compute_us=time_us))
        return num_prompt_tokens


async def long_prompt_among_decodes(worker: Worker, num_steps: int) -> list[int]:
    """The sizes of the long prompt's chunks; half-way the goal becomes 20 ms."""
    async with asyncio.TaskGroup() as group:
        running = group.create_task(worker.engine.run())
        await worker.engine.wait_ready()
        await worker.engine.submit([make_request(10, 1000) for _ in range(NUM_ROWS)])
        await worker.answer()
        await worker.answer()
        await worker.engine.submit([make_request(100_000, 10)])
        await worker.answer()
        chunks = [await worker.answer() for _ in range(num_steps)]
        worker.engine.max_itl_ms = 20.0
        chunks += [await worker.answer() for _ in range(num_steps)]
        running.cancel()
    return chunks


def test_steps_keep_to_the_goal_and_to_another_one_after_a_reload() -> None:
    chunks = asyncio.run(long_prompt_among_decodes(Worker(max_itl_ms=40.0), 20))
    assert chunks[0] < chunks[2] < chunks[19]
    assert 8 + 0.010 * (chunks[19] + NUM_ROWS) < 40
    assert chunks[19] > 2000
    assert 8 + 0.010 * (chunks[39] + NUM_ROWS) < 20
    assert chunks[39] > 800


def test_steps_without_a_goal_have_a_quarter_until_there_is_one() -> None:
    chunks = asyncio.run(long_prompt_among_decodes(Worker(max_itl_ms=0.0), 5))
    assert chunks[:5] == [2048 - NUM_ROWS] * 5
    assert 8 + 0.010 * (chunks[9] + NUM_ROWS) < 20


async def chunks_without_a_result(worker: Worker) -> list[int]:
    """Of the two steps that are planned before anything is known."""
    async with asyncio.TaskGroup() as group:
        running = group.create_task(worker.engine.run())
        await worker.engine.wait_ready()
        await worker.engine.submit([make_request(10, 1000), make_request(100_000, 10)])
        chunks = [await worker.answer() for _ in range(2)]
        running.cancel()
    return chunks


def test_limit_holds_before_the_first_result() -> None:
    chunks = asyncio.run(chunks_without_a_result(Worker(max_itl_ms=0.0, overlaps=True)))
    assert chunks == [8192, 2048 - 1]


async def first_chunk_after_a_reload(worker: Worker) -> int:
    """No step has had a prompt since."""
    async with asyncio.TaskGroup() as group:
        running = group.create_task(worker.engine.run())
        await worker.engine.wait_ready()
        await worker.engine.submit([make_request(10, 1000)])
        await worker.answer()
        await worker.answer()
        worker.engine.max_itl_ms = 9.0
        await worker.engine.submit([make_request(100_000, 10)])
        chunks = [await worker.answer() for _ in range(2)]
        running.cancel()
    return next(chunk for chunk in chunks if chunk)


def test_new_goal_holds_for_the_next_prompt() -> None:
    assert 0 < asyncio.run(first_chunk_after_a_reload(Worker(max_itl_ms=0.0))) < 256
