"""Step -> ForwardBatch -> forward -> sample -> StepOutput.

`launch` puts a step on the device's stream and returns; `collect` waits for it and reads its
result. Between the two the host is free: on a GPU the next step is launched while this one runs.
A step of decodes alone replays a captured graph; chunks of prompts run eagerly.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ipc.messages import Step, StepOutput
from ..kernels import step as kernels
from . import sampler
from .batch import ForwardBatch, Sampled
from .chunks import ChunkPlan
from .deepseek import DeepseekV3
from .graphs import DecodeGraphs
from .host_blocks import HostBlocks
from .kv_cache import KVCache
from .rows import Delta, Rows
from .sampler import Logprobs, to_host
from .timing import StepClock, StepTimes

NONE = np.zeros(0, np.int32)


@dataclass(frozen=True)
class InFlight:
    """A step on the device's stream. Its tensors are the host's, and filled when it has ended."""

    step: Step
    token_ids: Tensor | None
    """[S] int64."""
    logprobs: Logprobs | None
    logprob_lines: list[tuple[int, int]]
    """(index into token_ids, number of best) of each of `logprobs`."""
    prompt_logprobs: dict[int, list[Logprobs]]
    """By chunk."""
    times: StepTimes

    def done(self) -> bool:
        return self.times.done()


class Runner:
    """Owns the model, its KV cache and its rows, and does what a Step says."""

    def __init__(self, model: DeepseekV3, cache: KVCache, rows: Rows) -> None:
        self.model = model
        self.cache = cache
        self.rows = rows
        self.host: HostBlocks | None = None
        """Where blocks of the cache are offloaded to; None: no step may ask for that."""
        self.device = rows.device
        self.graphs = DecodeGraphs(self.decode, self.device)
        self._clock = StepClock(self.device)
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
            plan = ChunkPlan(delta, step.chunks, self._decodes)
        carried = delta.send(self.rows.words)
        for join in step.joins:
            self.rows.count(join.row)
        hidden = None
        sampled: Sampled | None
        if plan is None:
            sampled = self.graphs.run(len(self._decodes), step.padded_size)
        else:
            hidden, sampled = self._mixed(plan, carried)
        return self._finish(step, plan, hidden, sampled, times)

    def collect(self, launched: InFlight) -> StepOutput:
        """The result of a launched step; waits for it."""
        compute_us, idle_us = launched.times.wait()
        step, logprobs = launched.step, {}
        if launched.logprobs is not None:
            found = launched.logprobs.entries([num for _, num in launched.logprob_lines])
            for (line, _), entry in zip(launched.logprob_lines, found, strict=True):
                logprobs[line] = entry
        token_ids = NONE if launched.token_ids is None else launched.token_ids.numpy()
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
        )

    def decode(self, num_lines: int) -> Sampled:
        """The next token of the first `num_lines` rows of the batch, null rows included."""
        lines = self.rows.batch[:num_lines]
        inputs = self._empty_inputs(num_lines)
        batch = ForwardBatch(inputs, num_lines, *self._decode_inputs(lines, inputs), None)
        logits = self.model.logits(self.model.forward(batch, self.cache))
        return Sampled(logits, sampler.choose(logits, lines, self.rows))

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

    def _empty_inputs(self, num_tokens: int) -> kernels.Inputs:
        return kernels.Inputs.empty(num_tokens, self.model.cos.shape[1], self.device)

    def _decode_inputs(self, lines: Tensor, inputs: kernels.Inputs) -> tuple[Tensor, Tensor]:
        """Fills in the inputs of decodes; returns their block table and lengths."""
        tokens, model = self.rows.tokens, self.model
        most = tokens.block_table.shape[1]
        table = torch.empty(len(lines), most, dtype=torch.int32, device=self.device)
        seq_lens = torch.empty(len(lines), dtype=torch.int32, device=self.device)
        kernels.decode_inputs(tokens, lines, model.cos, model.sin, inputs, table, seq_lens)
        return table, seq_lens

    def _mixed(self, plan: ChunkPlan, carried: Tensor) -> tuple[Tensor, Sampled | None]:
        """Decodes and chunks in one pass: its hidden states, and what is sampled of them."""
        rows, model = self.rows, self.model
        inputs = self._empty_inputs(plan.num_tokens)
        decodes = self._decode_inputs(rows.batch[: plan.num_decodes], inputs)
        chunks = plan.table(carried)
        kernels.chunk_inputs(rows.tokens, chunks, plan.max_tokens, model.cos, model.sin, inputs)
        prefills = plan.prefills(carried, rows.tokens.block_table)
        batch = ForwardBatch(inputs, plan.num_decodes, *decodes, prefills)
        hidden = model.forward(batch, self.cache)
        lines, tokens = plan.lines(carried)
        if not len(lines):
            return hidden, None
        logits = model.logits(hidden[tokens])
        return hidden, Sampled(logits, sampler.choose(logits, lines, rows))

    def _finish(
        self,
        step: Step,
        plan: ChunkPlan | None,
        hidden: Tensor | None,
        sampled: Sampled | None,
        times: StepTimes,
    ) -> InFlight:
        """Sends the results on their way to the host."""
        lines = self._logprob_lines
        if plan is not None:
            num_decodes = plan.num_decodes
            lines = lines + [(num_decodes + i, num) for i, num in self._wanting(plan.sampled)]
        logprobs = None
        if sampled is not None and lines:
            index = torch.tensor([line for line, _ in lines], device=self.device)
            most = max(num for _, num in lines)
            logprobs = Logprobs.of(sampled.logits[index], sampled.token_ids[index], most)
        prompt_logprobs = {}
        if plan is not None and hidden is not None:
            prompt_logprobs = self._prompt_logprobs(plan, hidden)
        token_ids = None if sampled is None else to_host(sampled.token_ids)
        times.finish()
        return InFlight(step, token_ids, logprobs, lines, prompt_logprobs, times)

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
