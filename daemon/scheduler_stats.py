"""A moment's numbers, for metrics and `dsctl status`. Counters count since the start."""

import msgspec

from .drafting import DraftStats


class HostCacheStats(msgspec.Struct, frozen=True):
    num_blocks: int
    """Slots for them."""
    num_used_blocks: int
    num_offloaded_blocks: int
    """Copied to the host; those of the next came back."""
    num_restored_blocks: int
    num_restored_tokens: int
    """That no request had to compute again, those of preempted ones included."""


class SchedulerStats(msgspec.Struct, frozen=True):
    num_running: int
    num_waiting: int
    num_in_flight: int
    num_blocks: int
    """Usable ones: free + held + cached."""
    num_free_blocks: int
    num_held_blocks: int
    num_cached_blocks: int
    num_prompt_tokens: int
    """Of first admissions; so is the next."""
    num_cached_tokens: int
    num_preemptions: int
    host: HostCacheStats | None = None
    """None: the host keeps no blocks."""
    drafts: DraftStats | None = None
    """None: no step has drafts."""
