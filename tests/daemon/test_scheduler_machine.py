"""Any interleaving of clients, engine and worker that Hypothesis can think of."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dsd.tests.daemon.model_worker import Harness
from dsd.tests.daemon.random_runs import random_request, random_scheduler

SETTINGS = settings(
    max_examples=500,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
seeds = st.integers(0, 2**16)


class SchedulerMachine(RuleBasedStateMachine):
    """`Harness` checks the protocol, the events and every invariant after each rule."""

    @initialize(seed=seeds)
    def start(self, seed: int) -> None:
        rng = random.Random(seed)
        self.number = 0
        self.harness = Harness(random_scheduler(rng), rng, rng.choice((0.0, 0.5, 0.9, 1.0)))

    @rule(seed=seeds)
    def add(self, seed: int) -> None:
        self.number += 1
        self.harness.add(random_request(random.Random(seed), self.number))

    @rule(pick=st.integers(0, 9))
    def abort(self, pick: int) -> None:
        self.harness.abort(self.some_id(pick))

    @rule(pick=st.integers(0, 9))
    def finish(self, pick: int) -> None:
        self.harness.finish(self.some_id(pick))

    def some_id(self, pick: int) -> str:
        """A live request's, or one of nobody."""
        live = sorted(self.harness.live)
        return live[pick] if pick < len(live) else "nobody"

    @rule()
    def schedule(self) -> None:
        self.harness.schedule()

    @precondition(lambda self: self.harness.in_flight)
    @rule()
    def update(self) -> None:
        self.harness.update()

    @rule(num_steps=st.integers(2, 12))
    def run(self, num_steps: int) -> None:
        """What an engine does: as many steps in flight as possible."""
        for _ in range(num_steps):
            while self.harness.schedule():
                pass
            if self.harness.in_flight:
                self.harness.update()

    @rule(really=st.integers(0, 9))
    def reset(self, really: int) -> None:
        if not really:
            self.harness.reset()

    @invariant()
    def counts_agree(self) -> None:
        stats = self.harness.scheduler.stats()
        total = stats.num_free_blocks + stats.num_held_blocks + stats.num_cached_blocks
        assert total == stats.num_blocks
        assert stats.num_in_flight == len(self.harness.in_flight)

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.drain()


def test_scheduler_machine_keeps_every_promise_for_a_while() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=settings(SETTINGS, max_examples=15))


@pytest.mark.slow
def test_scheduler_machine_keeps_every_promise() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=SETTINGS)
