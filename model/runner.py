"""Step -> ForwardBatch -> forward -> sample -> StepOutput."""

import time

import torch
from torch import Tensor

from ..ipc.messages import Chunk, LogprobEntry, Step, StepOutput, pack_int32, unpack_int32
from . import sampler
from .batch import ForwardBatch, PrefillSlice
from .deepseek import DeepseekV3
from .kv_cache import KVCache
from .rows import Rows


class Runner:
    """Owns the model, its KV cache and its rows, and does what a Step says."""

    def __init__(self, model: DeepseekV3, cache: KVCache, rows: Rows) -> None:
        self.model = model
        self.cache = cache
        self.rows = rows
        self.device = rows.device

    @torch.inference_mode()
    def run(self, step: Step) -> StepOutput:
        """Computes one step. Its rows' new tokens are in `rows` when this returns."""
        started = time.perf_counter_ns()
        for join in step.joins:
            self.rows.join(join)
        for grow in step.grows:
            self.rows.grow(grow)
        decodes = unpack_int32(step.decodes).tolist()
        batch = self._batch(decodes, step.chunks)
        hidden = self.model.forward(batch, self.cache)
        self._advance(decodes, step.chunks)
        prompt_logprobs = self._prompt_logprobs(step.chunks, batch, hidden)
        sampled = decodes + [chunk.row for chunk in step.chunks if chunk.sample]
        token_ids, logprobs = self._sample(hidden[batch.logits_indices], sampled)
        return StepOutput(
            epoch=step.epoch,
            seq=step.seq,
            token_ids=pack_int32(token_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            compute_us=(time.perf_counter_ns() - started) // 1000,
        )

    def _batch(self, decodes: list[int], chunks: tuple[Chunk, ...]) -> ForwardBatch:
        rows, device = self.rows, self.device
        decode_rows = torch.tensor(decodes, dtype=torch.int64, device=device)
        row_parts, position_parts = [decode_rows], [rows.num_computed[decode_rows]]
        prefills, logits_indices, first = [], list(range(len(decodes))), len(decodes)
        for chunk in chunks:
            self._check(chunk)
            stop = chunk.start + chunk.num_tokens
            row_parts.append(torch.full((chunk.num_tokens,), chunk.row, device=device))
            position_parts.append(torch.arange(chunk.start, stop, device=device))
            table = rows.block_table[chunk.row]
            prefills.append(PrefillSlice(first, chunk.num_tokens, chunk.start, table))
            first += chunk.num_tokens
            if chunk.sample:
                logits_indices.append(first - 1)
        row_of, positions = torch.cat(row_parts), torch.cat(position_parts)
        return ForwardBatch(
            input_ids=rows.token_ids[row_of, positions],
            positions=positions,
            slot_mapping=rows.slots(row_of, positions),
            num_decodes=len(decodes),
            block_table=rows.block_table[decode_rows],
            seq_lens=(rows.num_computed[decode_rows] + 1).int(),
            prefills=tuple(prefills),
            logits_indices=torch.tensor(logits_indices, dtype=torch.int64, device=device),
        )

    def _check(self, chunk: Chunk) -> None:
        computed = int(self.rows.num_computed[chunk.row])
        assert chunk.start == computed, f"{chunk=} but {computed=}"

    def _advance(self, decodes: list[int], chunks: tuple[Chunk, ...]) -> None:
        self.rows.num_computed[decodes] += 1
        for chunk in chunks:
            self.rows.num_computed[chunk.row] += chunk.num_tokens

    def _sample(
        self, hidden: Tensor, row_ids: list[int]
    ) -> tuple[list[int], dict[int, LogprobEntry]]:
        if not row_ids:
            return [], {}
        logits = self.model.logits(hidden)
        chosen = sampler.choose(logits, row_ids, self.rows)
        self.rows.append(torch.tensor(row_ids, device=self.device), chosen)
        logprobs = {}
        for i, row in enumerate(row_ids):
            wanted = self.rows.sampling[row].num_logprobs
            if wanted >= 0:
                logprobs[i] = sampler.entries(logits[i : i + 1], chosen[i : i + 1], wanted)[0]
        return chosen.tolist(), logprobs

    def _prompt_logprobs(
        self, chunks: tuple[Chunk, ...], batch: ForwardBatch, hidden: Tensor
    ) -> dict[int, tuple[LogprobEntry, ...]]:
        """For chunks that ask: entries of the prompt tokens that follow each of the chunk's."""
        found = {}
        for i, (chunk, prefill) in enumerate(zip(chunks, batch.prefills, strict=True)):
            wanted = self.rows.sampling[chunk.row].num_prompt_logprobs
            if wanted < 0:
                continue
            stop = min(chunk.start + chunk.num_tokens, self.rows.num_prompt_tokens[chunk.row] - 1)
            following = self.rows.token_ids[chunk.row, chunk.start + 1 : stop + 1]
            own = hidden[prefill.first : prefill.first + len(following)]
            slices = zip(
                own.split(sampler.PROMPT_LOGITS_SLICE),
                following.split(sampler.PROMPT_LOGITS_SLICE),
                strict=True,
            )
            found[i] = tuple(
                entry
                for part, ids in slices
                for entry in sampler.entries(self.model.logits(part), ids, wanted)
            )
        return found
