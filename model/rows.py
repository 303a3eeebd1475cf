"""Device-side state of the running rows: what a `Join` creates, and each step advances.

A `Step` carries changes only. Everything that the next step needs of a row is here, on the device:
its tokens (so the token sampled by step n is step n+1's input without a trip to the host), how many
of them have their KV, where that is, and how its tokens are chosen. `token_ids[row, i]` for i >=
`num_tokens[row]` is never read.

    token_ids[row]   | prompt ......... | generated .... |   (unwritten)
    positions        0                                   num_tokens[row]
    KV in the cache  <------ num_computed[row] ------>
    drafts[row]                                         | d_1 ... d_N |   what may follow

All but the counts of penalties is int32 words of one tensor, so that a step's changes are one copy
to the device and one kernel: `Delta`. The last row is the null row, whose lines pad a captured
graph: as the model sees it it is empty, its block table is the null block, and what is chosen for
it is written to itself and means nothing.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ipc.messages import Grow, Join, Sampling
from ..kernels import sample
from ..kernels.step import TokenState, scatter_words
from .relaxed import Relaxed

MAX_BIAS = 1024
"""Entries of a row's logit_bias."""
MAX_MASKED = 192
"""Tokens of a row that are banned while it has fewer than min_tokens."""
MIN_TEMPERATURE = 1e-6
"""Below it logits / temperature may overflow, and nothing but the best token is chosen anyway."""
ALIGN = 4
"""Words: whatever begins in the words or in a delta begins at a multiple of 16 bytes, so that
kernels are compiled once."""
COUNTS = ("num_tokens", "num_computed", "top_k", "num_bias", "num_masked", "mask_until")
FLOATS = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip

Words = NDArray[np.int32]


class Delta:
    """Changes of one step, and vectors that only this step needs, on their way to the device."""

    def __init__(self) -> None:
        self._spans: list[int] = []
        self._parts: list[Words] = []
        self._length = 0
        self.tables: dict[int, Words] = {}
        """Whole block tables that are on their way, by row: what a row gets more is written here,
        since spans may not overlap."""

    def put(self, to: int, values: Words) -> None:
        """words[to : to + len(values)] = values, once this is sent."""
        if len(values):
            self._spans += (to, self._length, len(values))
            self.carry(values)

    def carry(self, values: Words) -> slice:
        """Where in the result of `send` these values will lie."""
        start, self._length = self._length, self._length + len(values)
        self._parts.append(values)
        if padding := -self._length % ALIGN:
            self._parts.append(np.zeros(padding, np.int32))
            self._length += padding
        return slice(start, start + len(values))

    def send(self, words: Tensor) -> Tensor:
        """Applies the changes to `words`; returns what was carried, on its device. Waits for
        nothing."""
        if not self._length:
            return words[:0]
        first_data = -(-len(self._spans) // ALIGN) * ALIGN
        staging = torch.empty(
            first_data + self._length, dtype=torch.int32, pin_memory=words.is_cuda
        )
        host = staging.numpy()
        host[: len(self._spans)] = self._spans
        np.concatenate(self._parts, out=host[first_data:])
        staging = staging.to(words.device, non_blocking=True)
        scatter_words(words, staging, len(self._spans) // 3, first_data)
        return staging[first_data:]


class _Field(NamedTuple):
    """Where in the words `width` words of each row lie, one row after the other."""

    start: int
    width: int
    rows: int

    def view(self, words: Tensor) -> Tensor:
        flat = words[self.start : self.start + self.rows * self.width]
        return flat if self.width == 1 else flat.view(self.rows, self.width)


class Rows:
    """All state of `max_batch_size` rows and of the null row, which is the last."""

    def __init__(
        self,
        max_batch_size: int,
        max_seq_len: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
        num_nextn: int = 0,
        relaxed: Relaxed | None = None,
    ) -> None:
        """num_nextn: drafts of a row; max_seq_len then has room for what runs over a row's end."""
        num_rows = max_batch_size + 1
        self.device = device
        self.null = max_batch_size
        self.num_nextn = num_nextn
        self.relaxed = relaxed
        self._fields: dict[str, _Field] = {}
        size = 0
        for name, width in {
            "token_ids": max_seq_len + 1,
            "block_table": -(-max_seq_len // block_size),
            "bias_ids": MAX_BIAS,
            "bias": MAX_BIAS,
            "masked_ids": MAX_MASKED,
            "seed": 2,
            "drafts": num_nextn,
            **dict.fromkeys((*COUNTS, *FLOATS, "batch", "thinking"), 1),
        }.items():
            self._fields[name] = _Field(size, width, num_rows)
            size += -(-num_rows * width // ALIGN) * ALIGN
        self.words = torch.zeros(size, dtype=torch.int32, device=device)
        self._make_views(vocab_size, block_size)
        self.sampling: list[Sampling] = [Sampling()] * num_rows
        """As the rows' Joins said."""
        self.num_prompt_tokens: list[int] = [0] * num_rows
        self._num_joined: list[int] = [0] * num_rows
        """Tokens that the row's Join brought."""
        self._num_blocks: list[int] = [0] * num_rows
        self.reset_null()

    def _make_views(self, vocab_size: int, block_size: int) -> None:
        view = {name: field.view(self.words) for name, field in self._fields.items()}
        num_rows, device = self.null + 1, self.device
        self.batch = view["batch"]
        """[max_batch_size + 1] int32: the rows of the decode batch, then the null row."""
        self.drafts = view["drafts"].view(num_rows, self.num_nextn)
        """[R, num_nextn] int32; some token ids where a step drafted less."""
        self.thinking = view["thinking"]
        """[R] int32, 0 or 1; of use where acceptance is relaxed."""
        tokens = ("token_ids", "num_tokens", "num_computed", "block_table")
        view["block_table"] = view["block_table"].view(num_rows, -1)  # one block wide, perhaps
        self.tokens = TokenState(*(view[name] for name in tokens), block_size)
        whole = ("top_k", "bias_ids", "num_bias", "masked_ids", "num_masked", "mask_until")
        self.choice = sample.SamplingState(
            num_tokens=view["num_tokens"],
            seed=view["seed"].view(torch.int64).flatten(),
            counts=torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device),
            bitmask=torch.zeros(num_rows, -(-vocab_size // 32), dtype=torch.int32, device=device),
            has_bitmask=torch.zeros(num_rows, dtype=torch.int32, device=device),
            **{name: view[name].view(torch.float32) for name in (*FLOATS, "bias")},
            **{name: view[name] for name in whole},
        )

    def reset_null(self) -> None:
        """The null row as nothing but a rehearsal changes it, and nobody decodes."""
        delta = Delta()
        self._put_sampling(delta, self.null, Sampling(temperature=0.0), 0)
        self._put(delta, "num_tokens", self.null, 1)
        self._put(delta, "num_computed", self.null, 0)
        self._put(delta, "thinking", self.null, 0)
        self.put_batch(delta, np.zeros(0, np.int32))
        delta.send(self.words)

    def join(self, delta: Delta, join: Join) -> None:
        """Creates the row, over whatever was there. `count` follows once the delta is sent."""
        row, ids = join.row, np.frombuffer(join.token_ids, np.int32)
        assert len(ids) <= self._fields["token_ids"].width, f"{len(ids)=}"
        self._put_values(delta, "token_ids", row, ids)
        self._put(delta, "num_tokens", row, len(ids))
        self._put(delta, "num_computed", row, join.num_cached_tokens)
        if self.relaxed is not None:
            thinks = self.relaxed.thinks(ids, join.num_prompt_tokens)
            self._put(delta, "thinking", row, int(thinks))
        self.num_prompt_tokens[row] = join.num_prompt_tokens
        self._num_joined[row] = len(ids)
        self._num_blocks[row] = 0
        if self.num_nextn:
            # Drafts may run over the blocks that the row has: they must not find another row's.
            table = np.zeros(self._fields["block_table"].width, np.int32)
            self._put_values(delta, "block_table", row, table)
            delta.tables[row] = table
        self.grow(delta, Grow(row, join.block_table))
        self.sampling[row] = join.sampling
        self._put_sampling(delta, row, join.sampling, join.num_prompt_tokens)

    def grow(self, delta: Delta, grow: Grow) -> None:
        """Appends blocks to the row's block table."""
        start, field = self._num_blocks[grow.row], self._fields["block_table"]
        self._num_blocks[grow.row] = stop = start + len(grow.block_ids)
        assert stop <= field.width, f"{stop=} > {field.width=}"
        if (table := delta.tables.get(grow.row)) is not None:
            table[start:stop] = grow.block_ids
            return
        to = field.start + grow.row * field.width + start
        delta.put(to, np.array(grow.block_ids, np.int32))

    def put_batch(self, delta: Delta, rows: Words) -> None:
        """The rows that decode, from now on."""
        padded = np.full(self.null + 1, self.null, np.int32)
        padded[: len(rows)] = rows
        delta.put(self._fields["batch"].start, padded)

    def count(self, row: int) -> None:
        """Counts the tokens of a row that has joined, where its sampling depends on that."""
        if penalises(self.sampling[row]):
            token_ids = self.tokens.token_ids[row, : self._num_joined[row]]
            num_prompt = self.num_prompt_tokens[row]
            sample.count_tokens(token_ids, num_prompt, self.choice.counts[row])

    def _put_sampling(self, delta: Delta, row: int, of: Sampling, num_prompt_tokens: int) -> None:
        values = {name: getattr(of, name) for name in FLOATS}
        if of.temperature > 0:
            values["temperature"] = max(of.temperature, MIN_TEMPERATURE)
        for name, value in values.items():
            self._put_values(delta, name, row, np.array([value], np.float32).view(np.int32))
        self._put(delta, "top_k", row, min(of.top_k, (1 << 31) - 1))
        self._put_values(delta, "seed", row, np.array([of.seed], np.uint64).view(np.int32))
        assert len(of.logit_bias) <= MAX_BIAS and len(of.masked_token_ids) <= MAX_MASKED
        self._put(delta, "num_bias", row, len(of.logit_bias))
        ids, values = zip(*of.logit_bias, strict=True) if of.logit_bias else ((), ())
        self._put_values(delta, "bias_ids", row, np.array(ids, np.int32))
        self._put_values(delta, "bias", row, np.array(values, np.float32).view(np.int32))
        self._put(delta, "num_masked", row, len(of.masked_token_ids))
        self._put_values(delta, "masked_ids", row, np.array(of.masked_token_ids, np.int32))
        self._put(delta, "mask_until", row, num_prompt_tokens + of.min_tokens)

    def _put(self, delta: Delta, name: str, row: int, value: int) -> None:
        self._put_values(delta, name, row, np.array([value], np.int32))

    def _put_values(self, delta: Delta, name: str, row: int, values: Words) -> None:
        field = self._fields[name]
        delta.put(field.start + row * field.width, values)


def penalises(sampling: Sampling) -> bool:
    """Whether the choice of a token depends on which ones came before."""
    return bool(
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
    )
