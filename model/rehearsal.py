"""Passes over the null row, before any request: the largest ones, to see what memory they take, and
ones of many sizes, so that whatever a step may launch has been compiled.

The null row's block table is the null block throughout: what these passes compute means nothing.
"""

from collections.abc import Callable

from ..ipc.messages import Chunk, Sampling, Step, pack_int32
from ..kernels import gemm, moe_dispatch
from ..kernels.compat import num_sms
from .chunks import CONTEXT_TOKENS
from .graphs import drafts_of
from .runner import Runner

MAX_LOGPROBS = 20
"""Alternatives that a request may ask for with each token of its prompt."""


KINDS_OF_SIZES = (7, 9, 17, 19, 33, 57, 65, 129, 257, 577, 1793)
"""Numbers of tokens for which kernels have variants beside those of the powers of two: small ones
for tiles of rows, the last two for experts (with V3's 8 of 256)."""


class Rehearsal:
    def __init__(self, runner: Runner, max_num_tokens: int, max_seq_len: int) -> None:
        self._runner = runner
        self._max_num_tokens = max_num_tokens
        self._max_seq_len = max_seq_len
        self._longest = min(max_num_tokens, max_seq_len)

    def _dispatched_sizes(self) -> list[int]:
        config, layout = self._runner.model.config, self._runner.model.layout
        ranks = layout.tp_size if layout.attention_dp else 1
        top_k = config.num_experts_per_tok * ranks  # pairs of a rank's own token
        return moe_dispatch.warm_up_tokens(top_k, config.n_routed_experts, self._longest)

    def largest_passes(self) -> None:
        """What takes the most memory: a prompt as long as a step allows, behind a cached prefix,
        with log-probabilities; as many prompts as there are rows; and as many decodes with drafts,
        which have logits for each draft."""
        rows = self._runner.rows
        rows.sampling[rows.null] = Sampling(num_prompt_logprobs=MAX_LOGPROBS, num_logprobs=0)
        rows.num_prompt_tokens[rows.null] = self._max_seq_len
        cached = min(CONTEXT_TOKENS, self._max_seq_len - self._longest)
        whole, rest = divmod(self._max_num_tokens, self._longest)
        lengths = [self._longest] * whole + [rest] * (rest > 0)
        self._pass([(cached if n == self._longest else 0, n) for n in lengths])
        rows.sampling[rows.null] = Sampling()
        each = max(1, min(self._max_num_tokens // rows.null, self._max_seq_len))
        self._pass([(0, each)] * min(rows.null, self._max_num_tokens // each))
        if rows.num_nextn:
            query_len = rows.num_nextn + 1
            num_decodes = min(rows.null, (self._max_num_tokens - 1) // query_len)
            rest = min(self._max_num_tokens - num_decodes * query_len, self._longest)
            self._pass([(0, rest)], num_decodes)
        rows.reset_null()

    def largest_decode(self) -> None:
        null, num_nextn = self._runner.rows.null, self._runner.rows.num_nextn
        self._runner.decode(null, num_nextn, num_nextn)

    def all_sizes(self, report: Callable[[int, int], None]) -> None:
        """Chunks of every kind of size, alone and behind a cached prefix; and what only some
        requests ask for. `report`: how many passes are done, of how many."""
        rows = self._runner.rows
        sizes = {1 << i for i in range(self._longest.bit_length())} | {self._longest}
        sizes |= {size for size in KINDS_OF_SIZES if size <= self._longest}
        if rows.device.type == "cuda":
            sms = num_sms(rows.words)
            sizes |= set(gemm.warm_up_tokens(self._runner.maps(), self._longest, sms))
            sizes |= set(self._dispatched_sizes())
        for done, size in enumerate(sorted(sizes)):
            report(done, len(sizes))
            cached = min(CONTEXT_TOKENS, self._max_seq_len - size, 1000)
            self._pass([(0, size)])
            self._pass([(cached, size)])
        decodes = {1 << i for i in range(rows.null.bit_length())} | {65, 129, 257, rows.null}
        for size in sorted(size for size in decodes if size <= rows.null):
            for drafts in drafts_of(rows.num_nextn):
                self._runner.decode(size, *drafts)
        rows.sampling[rows.null] = Sampling(presence_penalty=1.0)
        rows.count(rows.null)
        rows.sampling[rows.null] = Sampling()
        rows.reset_null()

    def _pass(self, parts: list[tuple[int, int]], num_decodes: int = 0) -> None:
        """Chunks of the null row: (first position, number of tokens) of each; beside decodes of it
        with all their drafts."""
        null = self._runner.rows.null
        chunks = tuple(Chunk(null, start, count, True) for start, count in parts)
        num_nextn = self._runner.rows.num_nextn
        mode, decodes = "mixed" if num_decodes else "prefill", pack_int32([null] * num_decodes)
        num_drafts = num_nextn if num_decodes else 0
        step = Step(0, 0, mode, 0, (), (), decodes, chunks, num_drafts, num_nextn)
        self._runner.run(step)
