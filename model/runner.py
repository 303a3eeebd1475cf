"""Step -> ForwardBatch -> forward -> sample -> StepOutput.

`launch` puts a step on the device's stream and returns; `collect` waits for it and reads its
result. Between the two the host is free: on a GPU the next step is launched while this one runs.
A step of decodes alone replays a captured graph; chunks of prompts run eagerly.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ipc.messages import Step, StepOutput
from ..kernels import step as kernels
from . import sampler
from .batch import ForwardBatch, Sampled
from .chunks import ChunkPlan
from .decodes import Accepts, Drafter, accept, empty_inputs, fill_inputs, last_accepted, received
from .deepseek import DeepseekV3
from .graphs import DecodeGraphs
from .host_blocks import HostBlocks
from .kv_cache import KVCache
from .mtp import MTP
from .rows import Delta, Rows, Words
from .sampler import Logprobs, to_device, to_host
from .timing import StepClock, StepTimes

NONE = np.zeros(0, np.int32)
Kept = NDArray[np.bool_]


@dataclass(frozen=True)
class InFlight:
    """A step on the device's stream. Its tensors are the host's, and filled when it has ended."""

    step: Step
    token_ids: Tensor | None
    """[S] int64, `query_len` for each decode, then one for each chunk that samples."""
    num_tokens: Tensor | None
    """[decodes] int32: so many of a decode's are tokens. None: all are."""
    logprobs: Logprobs | None
    logprob_lines: list[tuple[int, int]]
    """(index into `token_ids`, number of best) of each of `logprobs`."""
    prompt_logprobs: dict[int, list[Logprobs]]
    """By chunk."""
    times: StepTimes

    def done(self) -> bool:
        return self.times.done()

    def counts(self) -> Words:
        """How many of `token_ids` belong to each decode, then to each chunk; empty: one each."""
        if self.num_tokens is None or self.token_ids is None:
            return NONE
        counts = self.num_tokens.numpy()
        chunks = len(self.token_ids) - len(counts) * self.query_len
        return np.concatenate((counts, np.ones(chunks, np.int32)))

    def kept(self, counts: Words) -> Kept:
        """[S] bool: which of `token_ids` are tokens."""
        assert self.token_ids is not None
        kept = np.ones(len(self.token_ids), np.bool_)
        if len(counts):
            num_decodes = len(self.step.decodes) // 4
            of_decodes = kept[: num_decodes * self.query_len].reshape(num_decodes, -1)
            of_decodes[:] = np.arange(self.query_len) < counts[:num_decodes, None]
        return kept

    @property
    def query_len(self) -> int:
        return self.step.num_drafts + 1


class Runner:
    """Owns the model, its KV cache and its rows, and does what a Step says."""

    def __init__(
        self, model: DeepseekV3, cache: KVCache, rows: Rows, mtp: MTP | None = None
    ) -> None:
        """mtp: keeps up with the model and drafts what steps ask for; `rows` have room for it."""
        assert (mtp is not None) == (rows.num_nextn > 0), rows.num_nextn
        self.model = model
        self.cache = cache
        self.rows = rows
        self.host: HostBlocks | None = None
        """Where blocks of the cache are offloaded to; None: no step may ask for that."""
        self.device = rows.device
        self.drafter = None if mtp is None else Drafter(mtp, rows)
        self.accepts: Accepts | None = None
        """Which drafts become tokens, if not those that are chosen: for random weights' timing."""
        self.graphs = DecodeGraphs(self.decode, self.device)
        self.largest_step_bytes = 0
        """Of a GPU's memory, that is kept free for steps."""
        self._clock = StepClock(self.device)
        self._logits: Tensor | None = None
        """Of the last step of decodes; see `share_logits`."""
        self._packed = b""
        """`Step.decodes` of the last step: it changes seldom."""
        self._decodes = NONE
        self._logprob_lines: list[tuple[int, int]] = []
        """(line, number of best) of the decodes that want log-probabilities."""

    def run(self, step: Step) -> StepOutput:
        """Computes one step, from beginning to end."""
        return self.collect(self.launch(step))

    @torch.inference_mode()
    def launch(self, step: Step) -> InFlight:
        """Puts a step on the stream. Steps are computed in the order of their launches."""
        assert max(step.num_drafts, step.num_next_drafts) <= self.rows.num_nextn, step
        times = self._clock.start()
        self._copy_blocks(step)
        delta = Delta()
        for join in step.joins:
            self.rows.join(delta, join)
        for grow in step.grows:
            self.rows.grow(delta, grow)
        self._set_decodes(delta, step.decodes)
        plan = None
        if step.chunks:
            plan = ChunkPlan(delta, step.chunks, self._decodes, step.num_drafts + 1)
        carried = delta.send(self.rows.words)
        for join in step.joins:
            self.rows.count(join.row)
        hidden = None
        sampled: Sampled | None
        if plan is None:
            drafts = step.num_drafts, step.num_next_drafts
            sampled = self.graphs.run(len(self._decodes), step.padded_size, *drafts)
        else:
            hidden, sampled = self._mixed(step, plan, carried)
        return self._finish(step, plan, hidden, sampled, times)

    def collect(self, launched: InFlight) -> StepOutput:
        """The result of a launched step; waits for it."""
        compute_us, idle_us = launched.times.wait()
        step, logprobs = launched.step, {}
        token_ids, counts = NONE, launched.counts()
        if launched.token_ids is not None:
            kept = launched.kept(counts)
            token_ids = launched.token_ids.numpy()[kept]
            if launched.logprobs is not None:
                places = np.cumsum(kept) - 1
                found = launched.logprobs.entries([num for _, num in launched.logprob_lines])
                for (line, _), entry in zip(launched.logprob_lines, found, strict=True):
                    if kept[line]:
                        logprobs[int(places[line])] = entry
        return StepOutput(
            epoch=step.epoch,
            seq=step.seq,
            token_ids=token_ids.astype(np.int32).tobytes(),
            logprobs=logprobs,
            prompt_logprobs={
                i: tuple(entry for part in parts for entry in part.entries())
                for i, parts in launched.prompt_logprobs.items()
            },
            compute_us=compute_us,
            idle_us=idle_us,
            num_tokens=counts.tobytes(),
        )

    @torch.inference_mode()
    def decode(self, num_lines: int, num_drafts: int = 0, num_next_drafts: int = 0) -> Sampled:
        """The next tokens of the first `num_lines` rows of the batch, null rows included: one, and
        as many more as drafts are right; and drafts for the next step."""
        rows, query_len = self.rows, num_drafts + 1
        lines = rows.batch[:num_lines]
        inputs = empty_inputs(num_lines * query_len, self.model)
        where = fill_inputs(rows.tokens, lines, rows.drafts, query_len, self.model, inputs)
        batch = ForwardBatch(inputs, num_lines, *where, None, query_len)
        hidden = self.model.forward(batch, self.cache)
        sampled = self._choose(hidden, lines, num_lines, query_len, self._logits)
        if self.drafter is not None:
            last = last_accepted(sampled, num_lines, query_len)
            batch = batch.following(sampled.token_ids)
            self.drafter.follow(hidden, batch, lines, last, num_next_drafts, self.cache)
        return sampled

    def _choose(
        self,
        hidden: Tensor,
        lines: Tensor,
        num_decodes: int,
        query_len: int,
        logits: Tensor | None = None,
    ) -> Sampled:
        """hidden: [S, hidden], `query_len` for each of the decodes, one for each line behind them;
        logits: where they go, if there is a place."""
        if not self.model.has_head:
            return received(self.model.stages.receive_tokens(lines), lines, self.rows)
        logits = self.model.logits(hidden, None if logits is None else logits[: len(hidden)])
        return accept(logits, lines, num_decodes, query_len, self.rows, self.accepts)

    def maps(self) -> set[tuple[int, int]]:
        """(N, K) of every dense linear map of the layers, the MTP layer's included."""
        own = set() if self.drafter is None else self.drafter.mtp.layer.maps()
        return self.model.maps() | own

    def _copy_blocks(self, step: Step) -> None:
        """To and from the host; and what this step writes is written once it has been read."""
        if self.host is None:
            assert not step.offloads and not step.restores, f"{step.seq=} copies, and nobody can"
            return
        self.host.copy(step.offloads, step.restores)
        for join in step.joins:
            num_cached_blocks = join.num_cached_tokens // self.cache.block_size
            self.host.before_writes(join.block_table[num_cached_blocks:])
        for grow in step.grows:
            self.host.before_writes(grow.block_ids)

    def share_logits(self) -> None:
        """From now on all steps of decodes leave their logits in one place: or every captured graph
        would keep its own."""
        if not self.model.has_head:
            return
        most = self.rows.null * (self.rows.num_nextn + 1)
        size = most, self.model.lm_head.shape[0]
        self._logits = torch.empty(size, dtype=torch.float32, device=self.device)

    def _set_decodes(self, delta: Delta, packed: bytes) -> None:
        if packed == self._packed:
            return
        self._packed, self._decodes = packed, np.frombuffer(packed, np.int32)
        self.rows.put_batch(delta, self._decodes)
        self._logprob_lines = self._wanting(self._decodes.tolist())

    def _wanting(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """(index, number of best) of the rows that want log-probabilities of their tokens."""
        wanted = ((i, self.rows.sampling[row].num_logprobs) for i, row in enumerate(rows))
        return [(i, num) for i, num in wanted if num >= 0]

    def _mixed(self, step: Step, plan: ChunkPlan, carried: Tensor) -> tuple[Tensor, Sampled | None]:
        """Decodes and chunks in one pass: its hidden states, and what is sampled of them."""
        rows, model, query_len = self.rows, self.model, step.num_drafts + 1
        inputs = empty_inputs(plan.num_tokens, model)
        decodes = rows.batch[: plan.num_decodes]
        where = fill_inputs(rows.tokens, decodes, rows.drafts, query_len, model, inputs)
        chunks = plan.table(carried)
        kernels.chunk_inputs(rows.tokens, chunks, plan.max_tokens, model.cos, model.sin, inputs)
        prefills = plan.prefills(carried, rows.tokens.block_table)
        batch = ForwardBatch(inputs, plan.num_decodes, *where, prefills, query_len)
        hidden = model.forward(batch, self.cache)
        lines, tokens = plan.lines(carried)
        sampled = None
        if len(lines):
            sampled = self._choose(hidden[tokens], lines, plan.num_decodes, query_len)
        if self.drafter is not None:
            # The same tokens, each replaced by the one behind it.
            later = replace(rows.tokens, token_ids=rows.tokens.token_ids[:, 1:])
            kernels.chunk_inputs(later, chunks, plan.max_tokens, model.cos, model.sin, inputs)
            last = tokens[batch.num_decode_tokens :]
            if sampled is not None:
                own = slice(batch.num_decode_tokens)
                inputs.input_ids[own] = sampled.token_ids[own]
                last = torch.cat((last_accepted(sampled, plan.num_decodes, query_len), last))
            self.drafter.follow(hidden, batch, lines, last, step.num_next_drafts, self.cache)
        return hidden, sampled

    def _finish(
        self,
        step: Step,
        plan: ChunkPlan | None,
        hidden: Tensor | None,
        sampled: Sampled | None,
        times: StepTimes,
    ) -> InFlight:
        """Sends the results on their way to the host."""
        query_len = step.num_drafts + 1
        lines = [
            (first * query_len + i, num)
            for first, num in self._logprob_lines
            for i in range(query_len)
        ]
        if plan is not None:
            behind = plan.num_decodes * query_len
            lines += [(behind + i, num) for i, num in self._wanting(plan.sampled)]
        logprobs = None
        if sampled is not None and sampled.logits is not None and lines:
            index = to_device([line for line, _ in lines], self.device)
            most = max(num for _, num in lines)
            logprobs = Logprobs.of(sampled.logits[index], sampled.token_ids[index], most)
        prompt_logprobs = {}
        if plan is not None and hidden is not None and self.model.has_head:
            prompt_logprobs = self._prompt_logprobs(plan, hidden)
        token_ids = num_tokens = None
        if sampled is not None:
            token_ids = to_host(sampled.token_ids)
            if sampled.num_tokens is not None:
                num_tokens = to_host(sampled.num_tokens)
        times.finish()
        return InFlight(step, token_ids, num_tokens, logprobs, lines, prompt_logprobs, times)

    def _prompt_logprobs(self, plan: ChunkPlan, hidden: Tensor) -> dict[int, list[Logprobs]]:
        """For chunks that ask: of the prompt tokens that follow each of the chunk's."""
        found = {}
        for i, (chunk, first) in enumerate(zip(plan.chunks, plan.first_tokens, strict=True)):
            wanted = self.rows.sampling[chunk.row].num_prompt_logprobs
            if wanted < 0:
                continue
            stop = min(chunk.start + chunk.num_tokens, self.rows.num_prompt_tokens[chunk.row] - 1)
            following = self.rows.tokens.token_ids[chunk.row, chunk.start + 1 : stop + 1].long()
            own = hidden[first : first + len(following)]
            found[i] = [
                Logprobs.of(self.model.logits(part), ids, wanted)
                for part, ids in zip(
                    own.split(sampler.PROMPT_LOGITS_SLICE),
                    following.split(sampler.PROMPT_LOGITS_SLICE),
                    strict=True,
                )
            ]
        return found
