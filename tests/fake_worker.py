"""A worker without torch: the real protocol, deterministic tokens, and faults on demand.

    python -P tests/fake_worker.py ADDRESS RANK

It holds the daemon to the protocol: order of steps, starts of chunks, block tables, and that no
row's KV is overwritten while the row lives. A breach is reported as `Failed(user_error=True)`, so
that the daemon ends and says what it did. `FAKE_WORKER` in the environment is a JSON object of
`Options`.
"""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq

from dsd.ipc.channel import BlockingChannel
from dsd.ipc.messages import (
    PROTOCOL,
    Chunk,
    Failed,
    FromWorker,
    Hello,
    Join,
    Load,
    LogprobEntry,
    Progress,
    Ready,
    Step,
    StepOutput,
    Stop,
    ToWorker,
    pack_int32,
    unpack_int32,
)

VOCAB_SIZE = 512
FIRST_TOKEN, NUM_TOKENS = 100, 200
"""Sampled tokens are in this range: text for the small tokenizer, never an end token."""
PROGRESS_INTERVAL_S = 0.05
POISON = -1
"""In place of the fingerprint of a rejected draft."""
NUM_STEPS_AHEAD = 3
"""A row may run past the longest sequence by the tokens of so many steps."""


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """What a test wants of the worker."""

    step_s: float = 0.0
    load_s: float = 0.0
    num_blocks: int = 129
    max_batch_size: int = 64
    max_num_tokens: int = 256
    max_seq_len: int = 2048
    die_at_step: int = 0
    """Exits with status 7 before it answers this step; 0: never."""
    die_at_load: bool = False
    failure: str = ""
    """Answers Load with Failed and this sentence."""
    user_error: bool = True
    hello_protocol: int = PROTOCOL
    garbage_at_step: int = 0
    """Sends, in place of the answer, bytes that are no message."""
    deaf: bool = False
    """Answers no step."""
    draft_acceptance: int = 60
    """Percent of the drafts that are right."""


class Breach(Exception):
    """The daemon broke the protocol."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Breach(message)


def next_token(last: int, position: int) -> int:
    """The token that follows `last`, which is at `position`."""
    return FIRST_TOKEN + (last * 31 + position * 17) % NUM_TOKENS


def continuation(prompt: list[int], count: int) -> list[int]:
    """What the fake model says after a prompt: the oracle of the tests."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens[-1], len(tokens) - 1))
    return tokens[len(prompt) :]


@dataclass
class Row:
    tokens: list[int]
    num_computed: int
    block_table: list[int]
    num_prompt_tokens: int
    num_logprobs: int
    num_prompt_logprobs: int
    prefixes: list[int] = field(default_factory=list)
    """Fingerprint of tokens[: i + 1] for each computed i."""
    drafts: list[int] = field(default_factory=list)


class FakeModel:
    """Rows and the KV cache as bookkeeping. Raises Breach."""

    def __init__(self, options: Options, load: Load) -> None:
        self.options = options
        self.epoch = load.epoch
        self.block_size = load.block_size
        self.rows: dict[int, Row] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.seq = 0
        self.num_nextn = load.num_nextn
        self.num_next_drafts = 0
        """Of the step before."""

    def run(self, step: Step) -> StepOutput:
        require(step.epoch == self.epoch, f"epoch {step.epoch}, not {self.epoch}")
        require(step.seq == self.seq + 1, f"seq {step.seq} after {self.seq}")
        self.seq = step.seq
        for join in step.joins:
            self._join(join)
        for grow in step.grows:
            require(grow.row in self.rows, f"grow of row {grow.row}, which never joined")
            self._add_blocks(self.rows[grow.row], grow.block_ids)
        decodes = list(unpack_int32(step.decodes))
        self._check_shape(step, decodes)
        sampled = [(row, self._decode(row, step.num_drafts)) for row in decodes]
        prompt_logprobs = {}
        for index, chunk in enumerate(step.chunks):
            entries = self._prefill(chunk)
            if entries:
                prompt_logprobs[index] = entries
        sampled += [(chunk.row, self._sample(chunk.row)) for chunk in step.chunks if chunk.sample]
        self.num_next_drafts = step.num_next_drafts
        for row, _ in sampled:
            self._draft(row)
        tokens = [(row, token) for row, new_tokens in sampled for token in new_tokens]
        logprobs = {
            index: self._entry(token, self.rows[row].num_logprobs)
            for index, (row, token) in enumerate(tokens)
            if self.rows[row].num_logprobs >= 0
        }
        counts = pack_int32(len(new_tokens) for _, new_tokens in sampled)
        return StepOutput(
            step.epoch,
            step.seq,
            pack_int32(token for _, token in tokens),
            logprobs,
            prompt_logprobs,
            compute_us=1,
            num_tokens=counts if step.num_drafts else b"",
        )

    def _check_shape(self, step: Step, decodes: list[int]) -> None:
        chunk_rows = [chunk.row for chunk in step.chunks]
        require(decodes or chunk_rows, f"step {step.seq} is empty")
        require(len({*decodes, *chunk_rows}) == len(decodes) + len(chunk_rows), "a row twice")
        num_drafts = step.num_drafts
        require(0 <= num_drafts <= self.num_next_drafts, f"{num_drafts} drafts that nobody made")
        require(0 <= step.num_next_drafts <= self.num_nextn, f"{step.num_next_drafts} drafts")
        num_tokens = len(decodes) * (1 + num_drafts)
        num_tokens += sum(chunk.num_tokens for chunk in step.chunks)
        require(num_tokens <= self.options.max_num_tokens, f"{num_tokens} tokens in one step")
        mode = "decode" if not chunk_rows else "mixed" if decodes else "prefill"
        require(step.mode == mode, f"mode {step.mode} of a {mode} step")
        require(step.padded_size >= len(decodes), f"padded to {step.padded_size}")

    def _join(self, join: Join) -> None:
        tokens = list(unpack_int32(join.token_ids))
        require(0 <= join.row < self.options.max_batch_size, f"row {join.row}")
        require(1 <= join.num_prompt_tokens <= len(tokens), f"{join.num_prompt_tokens=}")
        require(0 <= join.num_cached_tokens < len(tokens), f"{join.num_cached_tokens=}")
        require(all(0 <= token < VOCAB_SIZE for token in tokens), "a token out of range")
        sampling = join.sampling
        row = Row(tokens, join.num_cached_tokens, [], join.num_prompt_tokens,
                  sampling.num_logprobs, sampling.num_prompt_logprobs)  # fmt: skip
        self._add_blocks(row, join.block_table)
        require(len(row.block_table) * self.block_size >= len(tokens), "too few blocks in a join")
        for position in range(join.num_cached_tokens):
            self._fingerprint(row, position)
        self._check_kv(row)
        self.rows[join.row] = row

    def _add_blocks(self, row: Row, block_ids: tuple[int, ...]) -> None:
        row.block_table.extend(block_ids)
        table = row.block_table
        require(len(set(table)) == len(table), f"a block twice in a table: {table}")
        require(all(0 < block < self.options.num_blocks for block in block_ids), f"{block_ids}")

    def _fingerprint(self, row: Row, position: int) -> int:
        before = row.prefixes[-1] if row.prefixes else 0
        require(len(row.prefixes) == position, f"position {position} after {len(row.prefixes)}")
        row.prefixes.append(hash((before, row.tokens[position])))
        return row.prefixes[-1]

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.block_size)
        require(index < len(row.block_table), f"position {position} has no block")
        return row.block_table[index], offset

    def _check_kv(self, row: Row) -> None:
        for position, prefix in enumerate(row.prefixes):
            require(self.kv.get(self._slot(row, position)) == prefix,
                    f"the KV of position {position} is another's: {row.block_table}")  # fmt: skip

    def _compute(self, row: Row, start: int, num_tokens: int) -> None:
        for position in range(start, start + num_tokens):
            self.kv[self._slot(row, position)] = self._fingerprint(row, position)
        row.num_computed = start + num_tokens
        self._check_kv(row)

    def _decode(self, index: int, num_drafts: int) -> list[int]:
        """The row's new tokens: its drafts up to the first wrong one, and the right one there."""
        require(index in self.rows, f"decode of row {index}, which never joined")
        row = self.rows[index]
        start = row.num_computed
        require(start == len(row.tokens) - 1, f"row {index} decodes during prefill")
        room = self.options.max_seq_len + NUM_STEPS_AHEAD * (1 + self.num_nextn)
        require(start + num_drafts < room, f"row {index} is at position {start}")
        new_tokens: list[int] = []
        for draft in [*row.drafts[:num_drafts], -1]:
            new_tokens += self._sample(index)
            if draft != new_tokens[-1]:
                break
        self._compute(row, start, len(new_tokens))
        for position in range(start + len(new_tokens), start + num_drafts + 1):
            self.kv[self._slot(row, position)] = POISON
        return new_tokens

    def _draft(self, index: int) -> None:
        row = self.rows[index]
        tokens = list(row.tokens)
        row.drafts = []
        for _ in range(self.num_next_drafts):
            position = len(tokens) - 1
            tokens.append(next_token(tokens[-1], position))
            is_right = position * 7 % 100 < self.options.draft_acceptance
            row.drafts.append(tokens[-1] if is_right else FIRST_TOKEN - 1)
        if self.num_next_drafts > 1:
            # Up to there the draft layer writes its own KV.
            self._slot(row, len(row.tokens) + self.num_next_drafts - 3)

    def _prefill(self, chunk: Chunk) -> tuple[LogprobEntry, ...]:
        require(chunk.row in self.rows, f"chunk of row {chunk.row}, which never joined")
        row = self.rows[chunk.row]
        end = chunk.start + chunk.num_tokens
        require(chunk.start == row.num_computed, f"chunk at {chunk.start}, not {row.num_computed}")
        require(chunk.num_tokens >= 1 and end <= len(row.tokens), f"chunk of {chunk.num_tokens}")
        require(not chunk.sample or end == len(row.tokens), "a sample before the prompt's end")
        self._compute(row, chunk.start, chunk.num_tokens)
        if row.num_prompt_logprobs < 0:
            return ()
        scored = row.tokens[chunk.start + 1 : min(end + 1, row.num_prompt_tokens)]
        return tuple(self._entry(token, row.num_prompt_logprobs) for token in scored)

    def _sample(self, index: int) -> list[int]:
        row = self.rows[index]
        row.tokens.append(next_token(row.tokens[-1], len(row.tokens) - 1))
        return row.tokens[-1:]

    def _entry(self, token: int, num_top: int) -> LogprobEntry:
        top = tuple(((token + i) % VOCAB_SIZE, -0.5 - i) for i in range(num_top))
        return LogprobEntry(token, -0.5, top)


class FakeWorker:
    """The process main, as `dsd.model.worker` has it."""

    def __init__(self, options: Options, address: str) -> None:
        self.options = options
        self.channel = BlockingChannel[ToWorker, FromWorker](address, ToWorker)

    def run(self, rank: int) -> None:
        with self.channel as channel:
            channel.send(Hello(self.options.hello_protocol, os.getpid(), rank))
            load = channel.receive()
            if isinstance(load, Stop):
                return
            assert isinstance(load, Load), load
            if self.options.failure:
                channel.send(Failed(load.epoch, self.options.failure, self.options.user_error))
                return
            self._load(load)
            try:
                self._serve(FakeModel(self.options, load))
            except Breach as breach:
                channel.send(Failed(load.epoch, f"protocol breach: {breach}", user_error=True))

    def _load(self, load: Load) -> None:
        start, total_s = time.monotonic(), self.options.load_s
        while (done_s := time.monotonic() - start) < total_s:
            share = int(100 * done_s / total_s)
            self.channel.send(Progress(load.epoch, "loading", share * 10**7, 10**9))
            time.sleep(min(PROGRESS_INTERVAL_S, total_s - done_s))
            if self.options.die_at_load:
                os._exit(7)
        options = self.options
        self.channel.send(Progress(load.epoch, "loading", 10**9, 10**9))
        self.channel.send(
            Ready(
                epoch=load.epoch,
                device="fake",
                dtype="float32",
                vocab_size=VOCAB_SIZE,
                max_batch_size=load.max_batch_size or options.max_batch_size,
                max_num_tokens=load.max_num_tokens or options.max_num_tokens,
                max_seq_len=load.max_seq_len or options.max_seq_len,
                num_blocks=options.num_blocks,
                block_size=load.block_size,
                num_parameters=0,
                weight_bytes=0,
                notes=("this worker computes nothing",),
                num_nextn=load.num_nextn,
            )
        )
        options.max_batch_size = load.max_batch_size or options.max_batch_size
        options.max_num_tokens = load.max_num_tokens or options.max_num_tokens

    def _serve(self, model: FakeModel) -> None:
        while True:
            message = self.channel.receive()
            if isinstance(message, Stop):
                return
            require(isinstance(message, Step), f"{type(message).__name__} in place of a step")
            assert isinstance(message, Step)
            if self.options.step_s:
                time.sleep(self.options.step_s)
            output = model.run(message)
            if message.seq == self.options.die_at_step:
                os._exit(7)
            if message.seq == self.options.garbage_at_step:
                self._raw().send(b"\xc1 no message")
            elif not self.options.deaf:
                self.channel.send(output)

    def _raw(self) -> "zmq.Socket[Any]":
        return self.channel._socket


def _exit_with_daemon() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> None:
    address, rank = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_daemon, daemon=True).start()
    options = msgspec.json.decode(os.environ.get("FAKE_WORKER", "{}"), type=Options)
    FakeWorker(options, address).run(rank)


if __name__ == "__main__":
    main()
