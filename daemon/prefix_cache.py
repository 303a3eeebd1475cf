"""Requests meet the blocks of earlier ones: what a request's blocks are called, and found by."""

from array import array
from collections.abc import Sequence

from .blocks import BlockPool
from .host_cache import HostCache
from .request import Request


class PrefixCache:
    """Computes a request's hash chain at most once (`Request.block_hashes`) and only as far as
    somebody asks."""

    def __init__(
        self, pool: BlockPool, host: HostCache | None = None, has_drafts: bool = False
    ) -> None:
        self._pool = pool
        self._host = host
        self._has_drafts = has_drafts
        self._block_size = pool.block_size
        self._packed: tuple[Request, bytes] | None = None

    def token_bytes(self, request: Request) -> bytes:
        """int32 of everything the request knows. Kept for the one asked about last: the first in
        line may be asked about at each step until it fits."""
        if self._packed is None or self._packed[0] is not request:
            num_tokens = len(request.prompt_ids) + len(request.output_ids)
            self._packed = (request, _token_bytes(request, 0, num_tokens))
        return self._packed[1]

    def find(self, request: Request) -> list[int]:
        """Blocks that hold a prefix of the request. Never the block of its last token: one token
        must be computed to have logits. Prompt log-probabilities need every position computed.

        With drafts, never the last one found either, here or on the host: the draft layer's KV of a
        position depends on the token after it, and after the last block that is another request's.
        (Where two requests computed the same block and went on differently, one position of it
        keeps the token of the first. A draft may be worse for that, a token never is.)"""
        hashes = self._hashes(request)
        found = self._pool.match(hashes)
        if not self._has_drafts or (self._host and self._host.holds(hashes[len(found) :])):
            return found
        return found[:-1]

    def num_found(self, request: Request) -> int:
        """Blocks that the request would not compute: those that `find` finds, and those that the
        host has behind them."""
        found = len(self.find(request))
        if self._host is None:
            return found
        return found + len(self._on_host(self._host, request, found))

    def _hashes(self, request: Request) -> list[bytes]:
        """Of the blocks that the request may find."""
        if request.sampling.num_prompt_logprobs >= 0:
            return []
        token_bytes = self.token_bytes(request)
        num_bytes = 4 * self._block_size
        num_full = (len(token_bytes) - 4) // num_bytes
        hashes = request.block_hashes
        if len(hashes) < num_full:
            rest = token_bytes[len(hashes) * num_bytes : num_full * num_bytes]
            self._pool.extend_hashes(hashes, request.salt, rest)
        return hashes[:num_full]

    def assign(self, request: Request, found: list[int], num_fresh: int) -> int:
        """Gives the request the blocks that `find` found, and fresh ones. Returns how many of these
        the step restores from the host, where the prefix may go on."""
        self._pool.hold(found)
        claimed = [] if self._host is None else self._claim(self._host, request, len(found))
        fresh = self._pool.allocate(num_fresh)
        request.block_ids = found + fresh
        self._packed = None  # from now on the request knows more with each step
        if self._host is not None and claimed:
            restored = list(zip(claimed, fresh, strict=False))
            self._host.restore(restored)
            for block_hash, block_id in restored:
                self._pool.register(block_id, block_hash)
        return len(claimed)

    def _claim(self, host: HostCache, request: Request, num_found: int) -> list[bytes]:
        hashes = self._on_host(host, request, num_found)
        return hashes[: host.claim(hashes)]

    def _on_host(self, host: HostCache, request: Request, num_found: int) -> list[bytes]:
        """Of the blocks behind the first `num_found`, those that the host gives back."""
        hashes = self._hashes(request)[num_found:]
        return hashes[: max(host.holds(hashes) - self._has_drafts, 0)]

    def store(self, request: Request, first: int, stop: int) -> None:
        """Blocks `first` to `stop - 1` of the request are computed, and their tokens accepted."""
        hashes = request.block_hashes
        if len(hashes) < stop:
            start, end = len(hashes) * self._block_size, stop * self._block_size
            self._pool.extend_hashes(hashes, request.salt, _token_bytes(request, start, end))
        for i in range(first, stop):
            self._pool.register(request.block_ids[i], hashes[i])


def _token_bytes(request: Request, start: int, end: int) -> bytes:
    """int32 of tokens `start` to `end - 1` of prompt and output."""
    num_prompt_tokens = len(request.prompt_ids)
    token_bytes = b""
    if start < num_prompt_tokens:
        token_bytes = _pack(request.prompt_ids[start:end])
    if end > num_prompt_tokens:
        first = max(start - num_prompt_tokens, 0)
        token_bytes += _pack(request.output_ids[first : end - num_prompt_tokens])
    return token_bytes


def _pack(token_ids: Sequence[int]) -> bytes:
    """`pack_int32` of ids, never negative: from a list, "I" takes a third of the time of "i"."""
    return array("I", token_ids).tobytes()
