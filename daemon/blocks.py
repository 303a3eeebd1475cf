"""Who owns which KV block, and which blocks hold a prefix that someone may want again.

Every block but 0 is in exactly one of three states:

    free    nothing worth keeping    a stack: the block used last is handed out first
    held    refcount > 0             by one or more requests, whether or not its hash is known
    cached  refcount 0, hash known   in order of release; the oldest is evicted if none is free

Block 0 is the null block: padding rows write there, so it is never handed out. A `HostCache`, if
there is one, is told what becomes of cached blocks.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from .host_cache import HostCache

DIGEST_SIZE = 16


class BlockPool:
    """Reference counts and the prefix cache of one KV pool."""

    def __init__(
        self, num_blocks: int, block_size: int, hash_key: bytes, host: HostCache | None = None
    ) -> None:
        assert num_blocks >= 2, f"{num_blocks=}: block 0 is the null block"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._host = host
        # Keyed, so that nobody can compute which prefixes collide; the key is hashed in only once.
        self._hasher = hashlib.blake2b(key=hash_key, digest_size=DIGEST_SIZE)
        self._refcounts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, then cached ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_blocks - 1 - len(self._free) - len(self._idle)

    # ---- ownership ----

    def allocate(self, n: int) -> list[int]:
        """`n` blocks of refcount 1 and unknown content."""
        assert 0 <= n <= self.num_available, f"{n=} > {self.num_available=}"
        while len(self._free) < n:
            self._evict()
        split = len(self._free) - n
        block_ids = self._free[split:]
        del self._free[split:]
        refcounts = self._refcounts
        for block_id in block_ids:
            refcounts[block_id] = 1
        return block_ids

    def hold(self, block_ids: Sequence[int]) -> None:
        """One more owner for blocks that `match` found."""
        for block_id in block_ids:
            if not self._refcounts[block_id]:
                del self._idle[block_id]
                if self._host is not None:
                    self._host.held(block_id)
            self._refcounts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """One owner less. Tail first: a prefix is of use only with all of its head, so the head
        is to be evicted last."""
        refcounts, hashes, host = self._refcounts, self._hashes, self._host
        for block_id in reversed(block_ids):
            refcounts[block_id] -= 1
            if refcounts[block_id]:
                assert refcounts[block_id] > 0, f"{block_id=} freed twice"
            elif (block_hash := hashes[block_id]) is None:
                self._free.append(block_id)
            else:
                self._idle[block_id] = None
                if host is not None:
                    host.released(block_id, block_hash)

    def _evict(self) -> None:
        block_id, _ = self._idle.popitem(last=False)
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block_id] = None
        self._free.append(block_id)
        if self._host is not None:
            self._host.evicted(block_id, block_hash)

    # ---- the prefix cache ----

    def root(self, salt: bytes) -> bytes:
        """The parent of a first block. A digest itself, so that no salt can pose as a block's."""
        hasher = self._hasher.copy()
        hasher.update(b"salt:" + salt)
        return hasher.digest()

    def extend_hashes(self, hashes: list[bytes], salt: bytes, token_bytes: bytes) -> None:
        """Appends the digests of the full blocks that follow those already in `hashes`.

        token_bytes: int32 of the tokens after `len(hashes)` blocks; a rest is ignored.
        Each digest covers its parent's and so every token before.
        """
        digest = hashes[-1] if hashes else self.root(salt)
        num_bytes = 4 * self.block_size
        blank = self._hasher.copy
        for start in range(0, len(token_bytes) - num_bytes + 1, num_bytes):
            hasher = blank()
            hasher.update(digest + token_bytes[start : start + num_bytes])
            digest = hasher.digest()
            hashes.append(digest)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix; `hold` them before the next `allocate`."""
        block_ids: list[int] = []
        lookup = self._by_hash.get
        for block_hash in hashes:
            block_id = lookup(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_idle(self, block_ids: Sequence[int]) -> int:
        """How many of the blocks `hold` would take from those available."""
        refcounts = self._refcounts
        return [refcounts[block_id] for block_id in block_ids].count(0)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """A held block's KV is computed: others may read it. If another block has the same
        content already, that one stays the cache's, and this one dies with its owner."""
        assert self._refcounts[block_id] > 0, f"{block_id=} has no owner"
        if self._hashes[block_id] is None and block_hash not in self._by_hash:
            self._hashes[block_id] = block_hash
            self._by_hash[block_hash] = block_id

    # ---- for tests and for idle moments ----

    def cached_hashes(self) -> dict[bytes, int]:
        """Everything that `match` can find, held or not."""
        return dict(self._by_hash)

    def check(self, owners: Mapping[int, int] | None = None) -> None:
        """Asserts every invariant; `owners`: the refcount that each held block should have."""
        held = {i: count for i, count in enumerate(self._refcounts) if count}
        assert 0 not in held, "the null block was handed out"
        assert len(self._free) + len(held) + len(self._idle) == self.num_blocks - 1
        assert {*self._free, *held, *self._idle} == set(range(1, self.num_blocks))
        assert min(held.values(), default=1) > 0
        assert owners is None or dict(owners) == held, f"{owners=} != {held=}"
        for block_id in self._free:
            assert self._hashes[block_id] is None, f"free {block_id=} has a hash"
        cached = {i: block_hash for i in self._idle if (block_hash := self._hashes[i]) is not None}
        assert len(cached) == len(self._idle), f"{self._idle} and not all have a hash"
        if self._host is not None:
            self._host.check(cached)
        hashes = {h: i for i, h in enumerate(self._hashes) if h is not None}
        assert hashes == self._by_hash
