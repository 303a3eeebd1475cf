"""The model worker's host memory, and what must be true of it and of the copies of a step."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from dsd.daemon.host_cache import BACKGROUND_COPIES, RESERVE
from dsd.ipc.messages import Step

if TYPE_CHECKING:
    from dsd.daemon.scheduler import Scheduler

Slot = tuple[int, int]


class ModelHost:
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, list[int]] = {}
        """Fingerprints of a block by slot of the host cache."""
        self.draft_slots: dict[int, list[int | None]] = {}
        """Of the draft layer, where there is one."""
        self.slots_before: dict[bytes, int] = {}
        self.cached_before: dict[bytes, int] = {}
        self.seen: set[bytes] = set()
        """Every digest that was ever cached on the GPU."""

    def copy(
        self,
        step: Step,
        kv: dict[Slot, int],
        known: dict[Slot, int],
        draft_kv: dict[Slot, int],
        writing: Collection[int],
        in_use: Collection[int],
    ) -> None:
        """Makes the step's copies, in its order.

        writing: blocks that steps in flight write; in_use: those that they or live rows hold.
        """
        assert len({slot for _, slot in step.offloads}) == len(step.offloads), "a slot twice"
        for block_id, slot in step.offloads:
            places = [(block_id, i) for i in range(self.block_size)]
            assert block_id not in writing, f"{block_id=} is being written"
            assert all(place in known for place in places), f"{block_id=} is not full"
            assert all(kv[place] == known[place] for place in places)
            self.slots[slot] = [kv[place] for place in places]
            self.draft_slots[slot] = [draft_kv.get(place) for place in places]
        targets = [block_id for _, block_id in step.restores]
        assert len(set(targets)) == len(targets)
        assert not {*targets} & {*writing, *in_use}, f"{targets} are restored into and in use"
        for slot, block_id in step.restores:
            content = {(block_id, i): value for i, value in enumerate(self.slots[slot])}
            kv.update(content)
            known.update(content)
            for i, value in enumerate(self.draft_slots[slot]):
                if value is not None:
                    draft_kv[block_id, i] = value

    def look(self, scheduler: "Scheduler") -> None:
        """Remembers what is cached, here and on the GPU, before a step is planned."""
        host = scheduler._host
        self.slots_before = {} if host is None else host.cached_hashes()
        self.cached_before = scheduler._pool.cached_hashes()

    def check_step(self, step: Step, scheduler: "Scheduler") -> None:
        """What has just been planned loses nothing that there is room for, keeps the reserve, and
        lets others find what comes back."""
        host, pool = scheduler._host, scheduler._pool
        if host is None:
            assert not step.offloads and not step.restores
            return
        slots, cached = host.cached_hashes(), pool.cached_hashes()
        lost = self.cached_before.keys() - cached.keys() - slots.keys() - self.slots_before.keys()
        read, written = {slot for slot, _ in step.restores}, {slot for _, slot in step.offloads}
        all_busy = len(read | written) == host.num_slots
        assert not lost or all_busy, "an evicted block has no copy"
        # Where another block had the same content, that one was the cache's, and may be evicted.
        back = {digest for digest, slot in slots.items() if slot in read}
        assert back <= cached.keys() | self.cached_before.keys(), "what came back cannot be found"
        if not step.restores and len(step.offloads) < BACKGROUND_COPIES and not all_busy:
            num_copied = pool.num_available - len(host._pending)
            assert not host._pending or num_copied >= int(RESERVE * pool.num_blocks), "no reserve"

    def check(self, scheduler: "Scheduler", legit: Mapping[bytes, int]) -> None:
        """What is said to be in a slot is there; cached blocks without a copy wait for theirs."""
        host, pool = scheduler._host, scheduler._pool
        if host is None:
            return
        slots, cached = host.cached_hashes(), pool.cached_hashes()
        for digest, slot in slots.items():
            assert self.slots[slot][-1] == legit[digest], f"{slot=} holds something else"
        self.seen |= cached.keys()
        if len(self.seen) <= host.num_slots:
            assert self.seen <= slots.keys() | cached.keys(), "something was dropped for nothing"
            idle = {i for i in pool._idle if pool._hashes[i] not in slots}
            assert idle == host._pending.keys()
