"""Which KV blocks have a copy in host memory, and which copies the next step makes.

The GPU's prefix cache forgets the block that was released longest ago; this one still has it:

    held --released--> cached --evicted--> overwritten            a block on the GPU
                         |        |             ^
              in the background   at the latest | restored: a prefix hit goes on here
                         v        v             |
                       slot of the host --------'                 dropped: used longest ago

Blocks are copied in the background in the order in which they will be evicted, a few in a step, so
that a reserve of blocks can be handed out at no cost. One that is evicted before its turn is copied
then. A block that comes back keeps its copy.

Nothing here waits for a result, because the worker makes the copies in the order of the steps, and
because of what they touch: a block is offloaded when its content is known to be computed, and
restored into when no step in flight holds it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from ..ipc.messages import Copies
from .scheduler_stats import HostCacheStats

BACKGROUND_COPIES = 16
"""That a step makes. Of DeepSeek-V3's blocks of 64 tokens, 16 are 72 MB in bf16."""
RESERVE = 0.25
"""Share of the GPU's blocks that are to be free or to have their copy. A larger one would fill the
host with what is on the GPU anyway, and copy what is used again before long."""


class HostCache:
    """Slots of host memory by the hash of what they hold. It is the hash of `BlockPool`, so a
    prefix is shared here with whom it is shared there."""

    def __init__(self, num_slots: int, num_blocks: int) -> None:
        """`num_blocks`: of the GPU."""
        assert num_slots >= 1
        self.num_slots = num_slots
        self._num_offloaded = 0
        self._num_restored = 0
        self._reserve = int(RESERVE * num_blocks)
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        """Used longest ago first. A use: its block was released, or comes back."""
        self._pending: dict[int, bytes] = {}
        """Hash by block: cached ones that had no copy when they were released, oldest first."""
        self._offloads: list[tuple[int, int]] = []
        self._restores: list[tuple[int, int]] = []
        self._busy: set[int] = set()
        """Slots that the step being planned reads or writes: it writes none of them again."""

    def stats(self, block_size: int) -> HostCacheStats:
        return HostCacheStats(
            num_blocks=self.num_slots,
            num_used_blocks=len(self._slots),
            num_offloaded_blocks=self._num_offloaded,
            num_restored_blocks=self._num_restored,
            num_restored_tokens=self._num_restored * block_size,
        )

    # ---- what happens to blocks on the GPU ----

    def released(self, block_id: int, block_hash: bytes) -> None:
        """Nobody holds the block any more; its content stays until it is evicted."""
        if block_hash in self._slots:
            self._slots.move_to_end(block_hash)
        else:
            self._pending[block_id] = block_hash

    def held(self, block_id: int) -> None:
        """Somebody holds a released block again."""
        self._pending.pop(block_id, None)

    def evicted(self, block_id: int, block_hash: bytes) -> None:
        """The step being planned may overwrite the block."""
        self._pending.pop(block_id, None)
        if block_hash not in self._slots:
            self._offload(block_id, block_hash)

    # ---- a request meets what is here ----

    def holds(self, hashes: Sequence[bytes]) -> int:
        """How many of a prefix's next blocks are here."""
        num_found = 0
        while num_found < len(hashes) and hashes[num_found] in self._slots:
            num_found += 1
        return num_found

    def claim(self, hashes: Sequence[bytes]) -> int:
        """How many of a prefix's next blocks are here. They stay until the step is planned, so that
        blocks can be allocated for them, which may evict others; then `restore` them."""
        num_found = self.holds(hashes)
        for block_hash in reversed(hashes[:num_found]):  # the head is to be dropped last
            self._slots.move_to_end(block_hash)
            self._busy.add(self._slots[block_hash])
        return num_found

    def restore(self, claimed: Sequence[tuple[bytes, int]]) -> None:
        """(hash, fresh block) of those that come back, before the step being planned computes."""
        self._restores += [(self._slots[block_hash], block_id) for block_hash, block_id in claimed]
        self._num_restored += len(claimed)

    # ---- what the step does ----

    def take(self, num_available: int) -> tuple[Copies, Copies]:
        """`Step.offloads` and `Step.restores` of the step that has been planned. While a request
        waits for its blocks, nothing is copied out that can wait.

        num_available: blocks of the GPU that are free or cached.
        """
        num_missing = self._reserve - (num_available - len(self._pending))
        if num_missing > 0 and not self._restores:
            self._offload_some(min(num_missing, BACKGROUND_COPIES - len(self._offloads)))
        copies = tuple(self._offloads), tuple(self._restores)
        self._offloads, self._restores = [], []
        self._busy.clear()
        return copies

    def _offload_some(self, most: int) -> None:
        for block_id in list(islice(self._pending, max(most, 0))):
            if self._offload(block_id, self._pending[block_id]):
                del self._pending[block_id]

    def _offload(self, block_id: int, block_hash: bytes) -> bool:
        """False: no slot is to be had for it."""
        slot = self._free.pop() if self._free else self._drop()
        if slot is None:
            return False
        self._slots[block_hash] = slot
        self._busy.add(slot)
        self._offloads.append((block_id, slot))
        self._num_offloaded += 1
        return True

    def _drop(self) -> int | None:
        """The slot that was used longest ago; None: the step needs them all."""
        for block_hash, slot in self._slots.items():
            if slot not in self._busy:
                del self._slots[block_hash]
                return slot
        return None

    # ---- for tests and for idle moments ----

    def cached_hashes(self) -> dict[bytes, int]:
        """Slot by hash."""
        return dict(self._slots)

    def check(self, cached: dict[int, bytes]) -> None:
        """Asserts every invariant between two steps; `cached`: hash by block of the GPU's cached
        ones, oldest first."""
        assert sorted([*self._free, *self._slots.values()]) == list(range(self.num_slots))
        assert not self._offloads and not self._restores, "copies that are in no step"
        pending = {i: block_hash for i, block_hash in cached.items() if i in self._pending}
        assert list(pending.items()) == list(self._pending.items())
        assert self._slots.keys().isdisjoint(pending.values())
