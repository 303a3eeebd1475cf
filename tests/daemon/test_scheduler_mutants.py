"""Would the tests notice? Each mutant is the scheduler with one seeded bug; the random driver,
which is the faster half of `test_scheduler_machine.py`, must find every one."""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from dsd.daemon.scheduler import Scheduler
from dsd.tests.daemon.random_runs import random_run

pytestmark = pytest.mark.slow
DAEMON = Path(__file__).parents[2] / "daemon"
# In order of import, so that a module finds the mutated ones that it needs.
MODULES = (
    "ticks", "host_cache", "blocks", "waiting", "flight", "decode_set", "drafting", "results",
    "prefix_cache", "invariants", "prefill", "scheduler",
)  # fmt: skip
MAX_SEEDS = 400


@dataclass(frozen=True)
class Mutant:
    name: str
    module: str
    old: str
    new: str


MUTANTS = [
    Mutant("blocks_return_early", "scheduler", "if last_step > self._done:", "if False:"),
    Mutant(
        "late_tokens_are_kept", "results", "elif request.phase is not Phase.FINISHED and", "elif"
    ),
    Mutant(
        "late_drafts_are_kept", "results", "if request.phase is not Phase.FINISHED:", "if True:"
    ),
    Mutant("tokens_after_the_end_are_kept", "results", "                    break\n", ""),
    Mutant(
        "min_tokens_off_by_one", "results", "num_tokens > request.sa", "num_tokens >= request.sa"
    ),
    Mutant(
        "length_is_not_checked", "results", "elif num_tokens == request.max_tokens", "elif False"
    ),
    Mutant(
        "victim_has_results_outstanding",
        "scheduler",
        "return None if self._last_step(victim) > self._done else victim",
        "return victim",
    ),
    Mutant("victim_is_the_oldest", "scheduler", "max(concerned, key", "min(concerned, key"),
    Mutant(
        "admission_leaves_no_headroom", "scheduler", "self._decoding.num_growing + len", "0 * len"
    ),
    Mutant(
        "admission_leaves_too_much",
        "scheduler",
        "return self._decoding.num_growing",
        "return 1 + self._decoding.num_growing",
    ),
    Mutant(
        "decodes_cost_no_budget",
        "scheduler",
        "num_decodes = len(flight.decoding) * (1 + flight.num_drafts)",
        "num_decodes = 0",
    ),
    Mutant(
        "one_step_too_many_in_flight",
        "scheduler",
        "_in_flight) >= self.pipe",
        "_in_flight) > self.pipe",
    ),
    Mutant(
        "prompt_logprobs_come_twice", "scheduler", "[max(num_scored - chunk.start, 0) :]", "[:]"
    ),
    Mutant("echo_samples_a_token", "scheduler", "is_last and request.max_tokens > 0", "is_last"),
    Mutant("cached_blocks_are_not_held", "prefix_cache", "self._pool.hold(found)", "pass"),
    Mutant(
        "aborted_request_stays_queued",
        "scheduler",
        "            self._waiting.remove(request)\n        elif",
        "            pass\n        elif",
    ),
    Mutant(
        "released_row_is_lost", "scheduler", "            self._free_rows.append(request.row)\n", ""
    ),
    Mutant(
        "preempted_request_loses_its_place",
        "scheduler",
        "        self._waiting.push(request)\n\n    def _plan",
        "        request.arrival += 1000\n        self._waiting.push(request)\n\n    def _plan",
    ),
    Mutant(
        "reset_forgets_an_event",
        "scheduler",
        "in self._requests.values():\n            request.phase",
        "in [*self._requests.values()][1:]:\n            request.phase",
    ),
    Mutant(
        "newest_is_admitted_first",
        "waiting",
        "-request.arrival, request)",
        "request.arrival, request)",
    ),
    Mutant("passed_request_is_left_no_blocks", "scheduler", "first.num_left // ", "0 // "),
    Mutant(
        "passing_prompts_take_all",
        "prefill",
        "self.num_tokens // 2, self.work / 2",
        "self.num_tokens, self.work",
    ),
    Mutant(
        "prompt_that_does_not_fit_stops_others",
        "prefill",
        "yield from self._joining(request)",
        "yield from self._joining(None)",
    ),
    Mutant(
        "prompt_stands_still", "prefill", "max(room.fitting(start), least)", "room.fitting(start)"
    ),
    Mutant("whole_prompt_is_cached", "prefix_cache", "(len(token_bytes) - 4)", "len(token_bytes)"),
    Mutant(
        "scoring_reads_the_cache",
        "prefix_cache",
        "request.sampling.num_prompt_logprobs >= 0",
        "False",
    ),
    Mutant(
        "output_is_hashed_from_its_start", "prefix_cache", "max(start - num_prompt_tokens, 0)", "0"
    ),
    Mutant(
        "block_comes_one_step_late",
        "decode_set",
        "self._offsets[row] + 1)",
        "self._offsets[row] + 2)",
    ),
    Mutant(
        "block_is_cached_one_step_early",
        "decode_set",
        "self._done_clock) // self._block_size",
        "self._done_clock + 1) // self._block_size",
    ),
    Mutant(
        "ended_row_still_fills_blocks",
        "decode_set",
        "(self._grow, self._fill, self._end)",
        "(self._grow, self._end)",
    ),
    Mutant(
        "row_leaves_one_step_late", "decode_set", ">= request.max_tokens", "> request.max_tokens"
    ),
    Mutant("row_leaves_too_early", "decode_set", "+ num_in_flight >=", "+ num_in_flight + 1 >="),
    Mutant(
        "ended_row_is_planned_again", "scheduler", "self._drain(self._decoding.settle())", "pass"
    ),
    Mutant(
        "rejected_positions_are_cached",
        "decode_set",
        "if self._overrun:\n                self._look_at(row)",
        "if False:\n                self._look_at(row)",
    ),
    Mutant(
        "only_accepted_drafts_get_blocks",
        "decode_set",
        "[row] + clock +",
        "[row] + self._clock + 1 +",
    ),
    Mutant("every_draft_counts_as_accepted", "decode_set", "- 1 - known_at", "- known_at"),
    Mutant(
        "drafts_cost_no_budget",
        "scheduler",
        "len(flight.decoding) * (1 + flight.num_drafts)",
        "len(flight.decoding)",
    ),
    Mutant(
        "drafts_are_verified_that_nobody_made",
        "scheduler",
        "self._within_tokens(self._num_next_drafts)",
        "self._within_tokens(self.num_nextn)",
    ),
    Mutant("draft_layer_has_no_blocks", "scheduler", "// 4 + self.lookahead", "// 4"),
    Mutant(
        "drafts_take_the_last_blocks",
        "scheduler",
        "self.block_size - self.overrun",
        "self.block_size",
    ),
    Mutant("drafts_preempt", "scheduler", "if num_blocks <= self._pool.num_available else 0", ""),
    Mutant(
        "ended_row_still_decodes",
        "decode_set",
        "is not None:\n            self._snapshot = None\n        del",
        "is not None:\n            pass\n        del",
    ),
    Mutant("evicted_block_is_still_found", "blocks", "del self._by_hash[block_hash]", "pass"),
    Mutant("salt_is_ignored", "blocks", 'b"salt:" + salt', 'b"salt:"'),
    Mutant(
        "digest_forgets_the_parent", "blocks", "digest + token_bytes[start", "token_bytes[start"
    ),
    Mutant("shared_block_is_freed_by_the_first", "blocks", "if refcounts[block_id]:", "if False:"),
    Mutant("held_block_can_be_evicted", "blocks", "del self._idle[block_id]", "pass"),
    Mutant(
        "null_block_is_handed_out",
        "blocks",
        "range(num_blocks - 1, 0, -1)",
        "range(num_blocks - 1, -1, -1)",
    ),
    Mutant("released_block_is_not_noted", "blocks", "host.released(block_id, block_hash)", "pass"),
    Mutant("held_block_waits_for_its_copy", "blocks", "self._host.held(block_id)", "pass"),
    Mutant("evicted_block_is_lost", "blocks", "self._host.evicted(block_id, block_hash)", "pass"),
    Mutant(
        "overwritten_block_is_copied",
        "host_cache",
        "self._pending.pop(block_id, None)\n        if block_hash",
        "if block_hash",
    ),
    Mutant(
        "copied_block_is_copied_again", "host_cache", "if block_hash not in self._slots", "if 1"
    ),
    Mutant(
        "slot_is_reused_while_it_is_read",
        "host_cache",
        "            self._busy.add(self._slots[block_hash])\n",
        "",
    ),
    Mutant(
        "slot_is_written_twice_in_a_step",
        "host_cache",
        "        self._busy.add(slot)\n        self._off",
        "        self._off",
    ),
    Mutant("slots_stay_busy", "host_cache", "        self._busy.clear()\n", ""),
    Mutant("dropped_slot_is_still_found", "host_cache", "del self._slots[block_hash]", "pass"),
    Mutant("copies_are_planned_twice", "host_cache", "self._restores = [], []", "self._r = [], []"),
    Mutant("nothing_is_copied_ahead", "host_cache", "if num_missing > 0 and", "if False and"),
    Mutant(
        "one_block_less_comes_back",
        "host_cache",
        "num_found < len(hashes) and",
        "num_found < len(hashes) - 1 and",
    ),
    Mutant(
        "lost_worker_kept_its_host_blocks",
        "scheduler",
        "HostCache | None = None\n        if self.num_host_blocks:",
        "HostCache | None = getattr(self, '_host', None)\n"
        "        if self.num_host_blocks and not self._host:",
    ),
    Mutant(
        "host_prefix_begins_at_the_first_block",
        "prefix_cache",
        "(request)[num_found:]",
        "(request)[0:]",
    ),
    Mutant(
        "scoring_reads_the_host",
        "prefix_cache",
        "hashes = self._hashes(request)[num_found:]",
        "hashes = request.block_hashes[num_found:]",
    ),
    Mutant(
        "restored_block_is_not_found_again",
        "prefix_cache",
        "self._pool.register(block_id, block_hash)\n",
        "pass\n",
    ),
    Mutant(
        "restored_tokens_are_computed_too",
        "scheduler",
        "(len(cached) + num_restored) *",
        "len(cached) *",
    ),
]


def build(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> type[Scheduler]:
    """The Scheduler class of the daemon's modules with the mutant's line replaced."""
    for name in MODULES:
        path = DAEMON / f"{name}.py"
        source = path.read_text()
        if name == mutant.module:
            assert mutant.old in source, f"{mutant.old!r} is no longer in {path}"
            source = source.replace(mutant.old, mutant.new)
        module = ModuleType(f"dsd.daemon.{name}")
        module.__package__ = "dsd.daemon"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, f"{path} ({mutant.name})", "exec"), module.__dict__)
    cls = import_module("dsd.daemon.scheduler").Scheduler
    assert isinstance(cls, type)
    return cls


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_seeded_bug_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = build(mutant, monkeypatch)
    for seed in range(MAX_SEEDS):
        try:
            random_run(seed, cls)
        except Exception:
            # Whatever the bug leads to.
            return
    pytest.fail(f"{MAX_SEEDS} runs did not notice")


def test_no_bug_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = build(Mutant("none", "", "", ""), monkeypatch)
    assert cls is not Scheduler
    for seed in range(100):
        random_run(seed, cls)
