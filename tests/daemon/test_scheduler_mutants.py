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

DAEMON = Path(__file__).parents[2] / "daemon"
# In order of import, so that a module finds the mutated ones that it needs.
MODULES = (
    "ticks", "blocks", "waiting", "flight", "decode_set", "prefix_cache", "invariants", "prefill",
    "scheduler",
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
    Mutant("late_tokens_are_kept", "scheduler", "FINISHED:\n            return", "WAITING: return"),
    Mutant(
        "min_tokens_off_by_one", "scheduler", "num_tokens > request.sa", "num_tokens >= request.sa"
    ),
    Mutant(
        "length_is_not_checked", "scheduler", "elif num_tokens == request.max_tokens", "elif False"
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
        "room(self.max_num_tokens, num_decodes",
        "room(self.max_num_tokens, 0",
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
    Mutant("cached_blocks_are_not_held", "scheduler", "self._pool.hold(cached)", "pass"),
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
        "self._offsets[row] + 1",
        "self._offsets[row] + 2",
    ),
    Mutant(
        "block_is_cached_one_step_early",
        "decode_set",
        "(num_full + 1) * self._block_size - ",
        "(num_full + 1) * self._block_size - 1 - ",
    ),
    Mutant(
        "ended_row_still_fills_blocks",
        "decode_set",
        "(self._grow, self._fill, self._end)",
        "(self._grow, self._end)",
    ),
    Mutant("row_leaves_one_step_late", "decode_set", "- offset - 1", "- offset"),
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
