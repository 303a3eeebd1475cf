"""Blocks that leave the GPU for host memory, and come back."""

import io
import random
from collections import deque
from typing import Any

import httpx
import pytest
from rich.console import Console

from dsd.daemon.dsctl import show
from dsd.daemon.host_cache import BACKGROUND_COPIES, HostCache
from dsd.daemon.request import Request
from dsd.daemon.scheduler import Scheduler
from dsd.daemon.scheduler_stats import HostCacheStats
from dsd.daemon.status import describe_progress
from dsd.ipc.messages import Load, Progress, Sampling, Step, StepOutput
from dsd.tests.conftest import Daemon
from dsd.tests.daemon.random_runs import random_run
from dsd.tests.daemon.scheduler_kit import GREEDY, answer, make_request, make_scheduler, plan
from dsd.tests.fake_worker import FakeModel, Options, continuation

PROMPT = list(range(1, 10))
"""Two full blocks of four and a token."""


def tiny(**changes: object) -> Scheduler:
    """Four blocks of four tokens on the GPU, eight in host memory."""
    return make_scheduler(**{"num_blocks": 5, "num_host_blocks": 8} | changes)


def run(scheduler: Scheduler, *requests: Request) -> list[Step]:
    """One step at a time until all have ended."""
    for request in requests:
        scheduler.add(request)
    steps = []
    while scheduler.has_work:
        steps.append(plan(scheduler))
        answer(scheduler, steps[-1])
    return steps


def crowd_out(scheduler: Scheduler) -> list[Step]:
    """Somebody needs every block of the GPU."""
    return run(scheduler, make_request(16, 0))


def host(scheduler: Scheduler) -> HostCacheStats:
    stats = scheduler.stats().host
    assert stats is not None
    return stats


# ---- out ----


def test_evicted_blocks_are_copied_by_the_step_that_overwrites_them() -> None:
    scheduler = tiny()
    (first,) = run(scheduler, make_request(PROMPT, 1))
    assert first.offloads == ()
    (step,) = crowd_out(scheduler)
    blocks = first.joins[0].block_table
    assert {block for block, _ in step.offloads} == set(blocks[:2]) <= {*step.joins[0].block_table}
    assert len({slot for _, slot in step.offloads}) == 2
    assert (host(scheduler).num_offloaded_blocks, host(scheduler).num_used_blocks) == (2, 2)


def test_blocks_are_copied_ahead_until_the_reserve_is_there() -> None:
    """10 of 41 blocks. 36 are cached, one is held while the step is planned, 3 are free."""
    scheduler = make_scheduler(
        num_blocks=41, max_num_tokens=999, max_seq_len=999, num_host_blocks=99
    )
    long = make_request(144, 1)
    (step,) = run(scheduler, long)
    table = step.joins[0].block_table
    (step,) = run(scheduler, make_request(1, 0))
    # The tail first, as it will be evicted.
    assert [block for block, _ in step.offloads] == [*reversed(table[-7:])]
    (step,) = run(scheduler, make_request(1, 0))
    assert step.offloads == ()


def test_copies_ahead_are_bounded_and_not_repeated_at_eviction() -> None:
    scheduler = make_scheduler(
        num_blocks=401, max_num_tokens=9999, max_seq_len=9999, num_host_blocks=999
    )
    (step,) = run(scheduler, make_request(4 * 399, 1))
    table = step.joins[0].block_table
    copied = []
    for _ in range(3):
        (step,) = run(scheduler, make_request(1, 0))
        assert len(step.offloads) == BACKGROUND_COPIES
        copied += [block for block, _ in step.offloads]
    assert copied == [*reversed(table[-48:])]
    (step,) = run(scheduler, make_request(4 * 20, 0))
    assert not {block for block, _ in step.offloads} & {*copied}


def test_full_host_drops_what_was_used_longest_ago() -> None:
    cache = HostCache(num_slots=2, num_blocks=0)
    cache.evicted(1, b"a")
    cache.evicted(2, b"b")
    cache.take(0)
    assert cache.claim([b"a"]) == 1
    cache.restore([(b"a", 3)])
    cache.take(0)
    cache.evicted(4, b"c")
    assert cache.cached_hashes() == {b"a": 0, b"c": 1}
    cache.take(0)
    cache.released(3, b"a")
    cache.evicted(5, b"d")
    assert cache.cached_hashes() == {b"a": 0, b"d": 1}


def test_without_host_memory_steps_carry_no_copies() -> None:
    scheduler = tiny(num_host_blocks=0)
    run(scheduler, make_request(PROMPT, 1))
    crowd_out(scheduler)
    steps = run(scheduler, make_request(PROMPT, 1))
    assert all(step.offloads == step.restores == () for step in steps)
    assert scheduler.stats().host is None


# ---- back ----


def away(**changes: object) -> Scheduler:
    """PROMPT's blocks are in host memory, and only there."""
    scheduler = tiny(**changes)
    run(scheduler, make_request(PROMPT, 1))
    crowd_out(scheduler)
    return scheduler


def test_prefix_hit_goes_on_in_host_memory() -> None:
    scheduler = away()
    request = make_request([*PROMPT, 70, 71], 1)
    step = run(scheduler, request)[0]
    (join,) = step.joins
    assert [block for _, block in step.restores] == [*join.block_table[:2]]
    assert join.num_cached_tokens == request.num_cached_tokens == 8
    assert (step.chunks[0].start, step.chunks[0].num_tokens) == (8, 3)
    assert (host(scheduler).num_restored_blocks, host(scheduler).num_restored_tokens) == (2, 8)


def test_prefix_hit_begins_on_the_gpu_and_goes_on_in_host_memory() -> None:
    scheduler = tiny()
    run(scheduler, make_request(PROMPT, 1))
    run(scheduler, make_request(12, 0))  # takes one cached block: the tail
    (step,) = run(scheduler, make_request(PROMPT, 1))
    assert step.joins[0].num_cached_tokens == 8
    assert [block for _, block in step.restores] == [step.joins[0].block_table[1]]


def test_blocks_that_come_back_are_shared_from_the_same_step_on() -> None:
    scheduler = away()
    steps = run(scheduler, make_request(PROMPT, 1), make_request(PROMPT, 1))
    first, second = steps[0].joins
    assert first.block_table[:2] == second.block_table[:2]
    assert len(steps[0].restores) == 2
    assert [join.num_cached_tokens for join in (first, second)] == [8, 8]


def test_aborted_at_once_its_restored_blocks_stay_for_the_next() -> None:
    scheduler = away()
    request = make_request(PROMPT, 4)
    scheduler.add(request)
    step = plan(scheduler)
    scheduler.abort(request.request_id)
    scheduler.check()
    assert scheduler.stats().num_held_blocks == 3, "the step in flight holds them"
    answer(scheduler, step)
    step = run(scheduler, make_request(PROMPT, 1))[0]
    assert (step.restores, step.joins[0].num_cached_tokens) == ((), 8)


def test_at_least_the_last_token_is_computed() -> None:
    scheduler = away()
    step = run(scheduler, make_request(PROMPT[:8], 1))[0]
    assert (len(step.restores), step.joins[0].num_cached_tokens) == (1, 4)


@pytest.mark.parametrize(
    ("sampling", "salt"), [(GREEDY, b"tenant"), (Sampling(num_prompt_logprobs=0), b"")]
)
def test_another_tenant_and_scoring_find_nothing(sampling: Sampling, salt: bytes) -> None:
    scheduler = away()
    steps = run(scheduler, make_request(PROMPT, 1, sampling, salt=salt))
    assert all(step.restores == () for step in steps)
    assert steps[0].joins[0].num_cached_tokens == 0


def test_preempted_request_finds_what_it_had() -> None:
    """Two rows want four blocks each; there are five."""
    scheduler = tiny(num_blocks=6, pipeline_depth=1)
    old, young = make_request(4, 12), make_request(4, 12)
    steps = run(scheduler, old, young)
    assert young.num_preemptions == 1
    again = [step for step in steps if step.joins][-1]
    assert again.joins[0].num_cached_tokens >= 4
    assert again.restores
    assert len(young.output_ids) == 12


def test_reset_forgets_what_the_lost_worker_had() -> None:
    scheduler = away()
    scheduler.reset(1)
    steps = run(scheduler, make_request(PROMPT, 1))
    assert steps[0].restores == ()
    assert host(scheduler).num_used_blocks == 0


# ---- one step reads and writes the same slots ----


def test_slot_that_is_read_is_not_written_by_the_same_step() -> None:
    cache = HostCache(num_slots=2, num_blocks=0)
    cache.evicted(1, b"a")
    cache.evicted(2, b"b")
    assert cache.take(0) == (((1, 0), (2, 1)), ())
    assert cache.claim([b"a", b"x"]) == 1
    cache.evicted(3, b"c")  # b was used after a, but a is about to be read
    cache.evicted(4, b"d")  # there is no slot left for it
    cache.restore([(b"a", 9)])
    assert cache.take(0) == (((3, 1),), ((0, 9),))
    cache.check({})
    assert cache.cached_hashes() == {b"a": 0, b"c": 1}


# ---- anything may happen ----


def test_random_runs_restore_blocks() -> None:
    """Or the harness would compare nothing."""
    found = [stats.host for seed in range(80) if (stats := random_run(seed).scheduler.stats()).host]
    assert sum(stats.num_restored_blocks for stats in found if stats) > 10


class Conversations:
    """People who talk in turns with a model that needs more KV than the GPU has."""

    def __init__(self, seed: int, num_host_blocks: int) -> None:
        self.rng = random.Random(seed)
        num_blocks, block_size = self.rng.randint(8, 14), self.rng.choice((2, 4))
        self.scheduler = Scheduler(
            max_batch_size=3,
            max_num_tokens=self.rng.choice((7, 32)),
            max_seq_len=(num_blocks - 1) * block_size,
            num_blocks=num_blocks,
            block_size=block_size,
            num_host_blocks=num_host_blocks,
        )
        options = Options(num_blocks=num_blocks, num_host_blocks=num_host_blocks)
        load = Load(0, "", "", "", "", 3, 32, 0, block_size, 0, 0, kv_host_cache_gb=1)
        self.worker = FakeModel(options, load)
        self.talks: dict[str, list[int]] = {f"r{i}": [i + 1] * 5 for i in range(6)}
        self.answers: list[list[int]] = []

    def turn(self, name: str) -> Request:
        """What was said so far, and a question."""
        self.talks[name] += self.rng.choices(range(9), k=self.rng.randint(1, 6))
        if len(self.talks[name]) > self.scheduler.max_seq_len - 8:
            self.talks[name] = self.talks[name][:5]
        return Request(name, list(self.talks[name]), GREEDY, self.rng.randint(1, 8))

    def run(self, num_rounds: int) -> None:
        """Some speak at once; FakeModel looks at the KV of every position that it attends to."""
        in_flight: deque[StepOutput] = deque()
        for _ in range(num_rounds):
            requests = [self.turn(name) for name in self.rng.sample(sorted(self.talks), 3)]
            for request in requests:
                self.scheduler.add(request)
            while self.scheduler.has_work:
                while (step := self.scheduler.schedule()) is not None:
                    in_flight.append(self.worker.run(step))
                self.scheduler.update(in_flight.popleft())
            for request in requests:
                assert request.output_ids == continuation([*request.prompt_ids], request.max_tokens)
                self.talks[request.request_id] += request.output_ids
                self.answers.append(request.output_ids)


@pytest.mark.parametrize("seed", range(6))
def test_conversations_get_the_tokens_that_they_get_without_host_memory(seed: int) -> None:
    with_host, without = Conversations(seed, 60), Conversations(seed, 0)
    with_host.run(12)
    without.run(12)
    assert with_host.answers == without.answers
    stats, plain = with_host.scheduler.stats(), without.scheduler.stats()
    assert stats.host is not None
    assert stats.host.num_restored_tokens > 40
    assert stats.num_cached_tokens > plain.num_cached_tokens + 40


# ---- through the daemon ----


def test_progress_of_pinning_is_told_in_gb() -> None:
    progress = Progress(1, "pinning", 3 * 10**9, 2 * 10**11)
    assert describe_progress(progress) == "pinning host memory: 3 of 200 GB"


def complete(daemon: Daemon, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    body = {"model": "Tiny-V3", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    url = f"{daemon.url}/v1/completions"
    answer = httpx.post(url, json=body | {"return_token_ids": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    fields: dict[str, Any] = answer.json()
    return fields


def talk(daemon: Daemon) -> list[dict[str, Any]]:
    """Three conversations in turns, each of which takes most of the KV cache."""
    talks = [list(range(10 * i, 10 * i + 100)) for i in (1, 12, 23)]
    answers = []
    for _ in range(3):
        for said in talks:
            answers.append(complete(daemon, said, 8))
            said += [*answers[-1]["choices"][0]["token_ids"], 9]
    return answers


def tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


FLAGS = ("--block-size", "16", "--max-seq-len", "144", "--kv-host-cache-gb")


@pytest.mark.slow
def test_daemon_finds_conversations_in_host_memory_and_says_so(start_fake) -> None:
    daemon = start_fake(*FLAGS, "0.5", worker={"num_blocks": 11, "num_host_blocks": 40})
    answers = talk(daemon)
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert cached == [0] * 3 + [96] * 3 + [112] * 3
    host = daemon.status()["kv_host_cache"]
    assert (host["num_blocks"], host["restored_tokens"]) == (40, 16 * host["restored"])
    assert host["restored"] >= 30
    assert 20 <= host["used"] <= host["offloaded"]
    text = httpx.get(f"{daemon.url}/metrics").text
    for line in (
        f"dsd:prefix_cache_host_hits_total {host['restored_tokens']}.0",
        f"dsd:kv_host_cache_restored_blocks_total {host['restored']}.0",
        f"dsd:kv_host_cache_offloaded_blocks_total {host['offloaded']}.0",
        f"dsd:kv_host_cache_used_blocks {host['used']}.0",
        "dsd:kv_host_cache_blocks 40.0",
    ):
        assert line in text
    console = Console(file=io.StringIO(), width=200, record=True)
    show(daemon.status(), console)
    assert f"{host['used']} of 40 KV blocks" in console.export_text()
    daemon.assert_clean()
    assert daemon.stop() == 0


@pytest.mark.slow
def test_daemon_and_model_answer_alike_with_and_without_host_memory(
    start_daemon, small_checkpoint
) -> None:
    answers = {}
    for gb in ("0", "0.01"):
        daemon = start_daemon(
            str(small_checkpoint), *FLAGS, gb, "--kv-cache-gb", "0.0012", "--dtype", "float32"
        )
        answers[gb] = talk(daemon)
        status = daemon.status()
        assert status["kv_cache"]["num_blocks"] < 20, "the cache is not too small"
        assert ("kv_host_cache" in status) == (gb != "0")
        if gb != "0":
            assert status["kv_host_cache"]["restored"] >= 20
            assert "host memory keeps" in daemon.log.read_text()
        assert daemon.stop() == 0
    assert tokens(answers["0"]) == tokens(answers["0.01"])
