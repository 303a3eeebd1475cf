"""A request as the daemon's core knows it: what was asked, and what became of it.

A `Request` is one sequence. `n > 1` and lists of prompts are several Requests that the front
groups. Everything below the line in `Request.__init__` belongs to the scheduler, and only the
scheduler writes it.
"""

import enum
from collections.abc import Sequence

import msgspec

from ..ipc.messages import LogprobEntry, Sampling


class FinishReason(enum.StrEnum):
    """Why a request ended. Every accepted request ends exactly once."""

    STOP = "stop"
    """An end-of-sequence or stop token, or a stop string."""
    LENGTH = "length"
    ABORT = "abort"
    """The client went away, or the daemon is going."""
    ERROR = "error"
    """The worker was lost."""


class Refused(Exception):
    """The request can never be served; the message has the numbers."""


class Phase(enum.IntEnum):
    WAITING = 0
    PREFILL = 1
    DECODE = 2
    DRAINING = 3
    """Everything it may generate has been scheduled; results are outstanding."""
    FINISHED = 4


class TokenEvent(msgspec.Struct, gc=False):
    """What one step did for one request. `finish` is set in the last event and only there."""

    request: "Request"
    token_id: int
    """-1: the event carries no token (abort, error, prompt log-probabilities alone)."""
    logprob: LogprobEntry | None = None
    prompt_logprobs: tuple[LogprobEntry, ...] = ()
    finish: FinishReason | None = None
    message: str = ""
    """For FinishReason.ERROR: one sentence for the client."""


class Request:
    """One sequence, from its prompt to its terminal event."""

    __slots__ = (
        "arrival", "block_hashes", "block_ids", "max_tokens", "num_cached_tokens", "num_computed",
        "num_preemptions", "num_scheduled", "output_ids", "phase", "priority",
        "prompt_ids", "request_id", "row", "salt", "sampling", "stop_token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_token_ids: frozenset[int] = frozenset(),
        priority: int = 0,
        salt: bytes = b"",
    ) -> None:
        self.request_id = request_id
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stop_token_ids = stop_token_ids
        """End-of-sequence ids too, unless the client asked to ignore them."""
        self.priority = priority
        """Smaller is sooner."""
        self.salt = salt
        """Prefixes are shared only between requests of the same salt."""

        # ---- the scheduler's ----
        self.phase = Phase.WAITING
        self.arrival = 0
        self.row = -1
        self.output_ids: list[int] = []
        """Every generated token that `update` accepted."""
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_scheduled = 0
        """Tokens whose KV is computed once all steps in flight are done; stands still in DECODE,
        as the next does (see `decode_set`)."""
        self.num_computed = 0
        """Tokens whose KV is known to be computed."""
        self.num_cached_tokens = 0
        """Prompt tokens that the prefix cache saved at first admission."""
        self.num_preemptions = 0

    @property
    def num_tokens(self) -> int:
        """Known ones, of prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_final(self) -> int:
        """Most tokens that must ever be computed: the last one generated need not be."""
        return len(self.prompt_ids) + self.max_tokens - 1

    @property
    def num_left(self) -> int:
        """Tokens to compute before the next one is sampled; of a waiting request, all it has."""
        return self.num_tokens - self.num_scheduled

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id} {self.phase.name} row={self.row} "
            f"prompt={len(self.prompt_ids)} output={len(self.output_ids)})"
        )
