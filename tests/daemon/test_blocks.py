import pytest

from dsd.daemon.blocks import BlockPool
from dsd.ipc.messages import pack_int32


def make_pool(num_blocks: int = 5, block_size: int = 2) -> BlockPool:
    return BlockPool(num_blocks, block_size, b"key")


def hashes_of(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, salt, pack_int32(tokens))
    return hashes


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks that hold the tokens and are registered; refcount 1."""
    hashes = hashes_of(pool, tokens)
    block_ids = pool.allocate(len(hashes))
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        pool.register(block_id, block_hash)
    return block_ids


def test_allocate_everything_never_hands_out_the_null_block() -> None:
    pool = make_pool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert (pool.num_free, pool.num_held, pool.num_cached) == (0, 4, 0)
    pool.check({1: 1, 2: 1, 3: 1, 4: 1})


def test_allocate_more_than_available_asserts() -> None:
    with pytest.raises(AssertionError, match="num_available"):
        make_pool(5).allocate(5)


def test_free_unregistered_blocks_are_free_again() -> None:
    pool = make_pool()
    pool.free(pool.allocate(3))
    assert (pool.num_free, pool.num_held, pool.num_cached) == (4, 0, 0)
    pool.check({})


def test_free_twice_asserts() -> None:
    pool = make_pool()
    block_ids = pool.allocate(1)
    pool.free(block_ids)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(block_ids)


def test_free_registered_blocks_stay_cached_and_match() -> None:
    pool = make_pool()
    block_ids = fill(pool, [1, 2, 3, 4])
    pool.free(block_ids)
    assert (pool.num_free, pool.num_cached, pool.num_available) == (2, 2, 4)
    assert pool.match(hashes_of(pool, [1, 2, 3, 4, 5, 6])) == block_ids
    assert pool.match(hashes_of(pool, [1, 2, 9, 9])) == block_ids[:1]
    assert pool.match(hashes_of(pool, [9, 9, 3, 4])) == []
    pool.check({})


def test_hold_cached_block_counts_owners() -> None:
    pool = make_pool()
    block_ids = fill(pool, [1, 2])
    pool.free(block_ids)
    assert pool.num_idle(block_ids) == 1
    pool.hold(block_ids)
    pool.hold(block_ids)
    assert pool.num_idle(block_ids) == 0
    pool.check({block_ids[0]: 2})
    pool.free(block_ids)
    assert pool.num_held == 1
    pool.free(block_ids)
    assert pool.num_cached == 1


def test_allocate_no_free_block_evicts_the_tail_before_the_head() -> None:
    pool = make_pool(4)
    block_ids = fill(pool, [1, 2, 3, 4, 5, 6])
    pool.free(block_ids)
    assert pool.allocate(1) == block_ids[2:]
    hashes = hashes_of(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match(hashes) == block_ids[:2]
    pool.check()


def test_allocate_evicts_what_was_used_longest_ago() -> None:
    pool = make_pool(4)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.free(old)
    pool.free(new)
    pool.hold(old)
    pool.free(old)
    pool.allocate(2)
    assert pool.match(hashes_of(pool, [3, 4])) == []
    assert pool.match(hashes_of(pool, [1, 2])) == old


def test_register_same_content_twice_keeps_the_first() -> None:
    pool = make_pool()
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    assert pool.match(hashes_of(pool, [1, 2])) == first
    pool.free(second)
    assert (pool.num_free, pool.num_cached) == (3, 0)
    pool.check({first[0]: 1})


def test_hashes_other_salt_or_key_share_nothing() -> None:
    pool = make_pool()
    other_key = BlockPool(5, 2, b"other")
    digests = [
        *hashes_of(pool, [1, 2, 3, 4]),
        *hashes_of(pool, [1, 2, 3, 4], b"tenant"),
        *hashes_of(other_key, [1, 2, 3, 4]),
    ]
    assert len(set(digests)) == 6
    assert {len(digest) for digest in digests} == {16}


def test_hashes_salt_that_is_a_digest_does_not_continue_its_chain() -> None:
    pool = make_pool()
    first, second = hashes_of(pool, [1, 2, 3, 4])
    assert hashes_of(pool, [3, 4], salt=first) != [second]


def test_extend_hashes_in_pieces_equals_at_once() -> None:
    pool = make_pool()
    hashes = hashes_of(pool, [1, 2, 3])
    pool.extend_hashes(hashes, b"", pack_int32([3, 4, 5, 6, 7]))
    assert hashes == hashes_of(pool, [1, 2, 3, 4, 5, 6, 7])
