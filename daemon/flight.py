"""A step whose result is outstanding."""

from dataclasses import dataclass, field

from ..ipc.messages import Chunk
from .request import Request


@dataclass(slots=True)
class Flight:
    """What `update` must know of a step when its result comes."""

    seq: int
    decoding: list[Request]
    """In the order of `Step.decodes`. Shared between steps: never changed."""
    num_drafts: int = 0
    chunks: list[tuple[Request, Chunk]] = field(default_factory=list)
    prefilled: list[Request] = field(default_factory=list)
    """Those whose last chunk this is, if they sample: their tokens follow those of `decoding`."""
    releases: list[Request] = field(default_factory=list)
    """Ended before this step, their last one, came back."""
