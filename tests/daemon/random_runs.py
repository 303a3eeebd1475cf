"""Seeded runs in which clients, engine and worker do anything at any time."""

import random

from dsd.daemon.request import Request
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import Sampling
from dsd.tests.daemon.model_worker import HASH_KEY, STOP_TOKEN, Harness


def random_scheduler(rng: random.Random, cls: type[Scheduler] = Scheduler) -> Scheduler:
    """Small enough that everything runs short all the time."""
    num_nextn = rng.choice((0, 0, 0, 1, 2, 3, 5))
    block_size, pipeline_depth = rng.choice((1, 2, 2, 3, 4)), rng.randint(1, 3)
    num_extra_blocks = -(-(pipeline_depth + 1) * num_nextn // block_size)
    return cls(
        max_batch_size=rng.randint(1, 6),
        max_num_tokens=rng.choice((1, 3, 5, 8, 40)),
        max_seq_len=rng.choice((8, 16, 40)),
        num_blocks=rng.randint(3, 20) + num_extra_blocks,
        block_size=block_size,
        pipeline_depth=pipeline_depth,
        num_nextn=num_nextn,
        num_nextn_by_batch_size=rng.choice(((), ((1, 5), (2, 2)))),
        hash_key=HASH_KEY,
        graph_batch_sizes=rng.choice(((), (1, 2, 4))),
    )


def random_request(rng: random.Random, number: int) -> Request:
    """Two tokens and many repeats, so that prefixes are shared by chance."""
    prompt = [1, 2, 1, 1, 2, 2, 1, 2, 1, 1, 1, 2, 2, 2][: rng.randint(0, 14)]
    prompt += rng.choices((1, 2), k=rng.randint(1, 4))
    sampling = Sampling(
        min_tokens=rng.choice((0, 0, 3)),
        num_logprobs=rng.choice((-1, -1, -1, -1, -1, 2)),
        num_prompt_logprobs=rng.choice((-1, -1, -1, 0)),
    )
    return Request(
        f"r{number}",
        prompt,
        sampling,
        max_tokens=rng.choice((0, 1, 2, 5, 9, 14, 20)),
        stop_token_ids=rng.choice((frozenset(), frozenset([STOP_TOKEN]))),
        priority=rng.choice((0, 0, 0, 1, -1)),
        salt=rng.choice((b"", b"", b"", b"tenant")),
    )


def random_run(seed: int, cls: type[Scheduler] = Scheduler, num_actions: int = 120) -> Harness:
    """Anything may happen at any time; in the end everything ends."""
    rng = random.Random(seed)
    harness = Harness(random_scheduler(rng, cls), rng, acceptance=rng.choice((0.0, 0.5, 0.9, 1.0)))
    # Some runs are crowded, some have an engine that keeps up.
    weights = rng.choice(((2, 1, 1, 8, 8, 0.05), (4, 0.1, 0.1, 8, 6, 0), (1, 0.3, 0.3, 6, 6, 0)))
    for number in range(num_actions):
        action = rng.choices(("add", "abort", "finish", "schedule", "update", "reset"), weights)[0]
        if action == "add":
            harness.add(random_request(rng, number))
        elif action in ("abort", "finish"):
            getattr(harness, action)(rng.choice([*harness.live, "nobody"]))
        elif action == "schedule":
            harness.schedule()
        elif action == "update" and harness.in_flight:
            harness.update()
        elif action == "reset":
            harness.reset()
    harness.drain()
    return harness
