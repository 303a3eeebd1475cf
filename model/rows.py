"""Device-side state of the running rows: what a `Join` creates, and each step advances.

A `Step` carries changes only. Everything that the next step needs of a row is here, on the device:
its tokens (so the token sampled by step n is step n+1's input without a trip to the host), how many
of them have their KV, and where. `token_ids[row, i]` for i >= `num_tokens[row]` is never read.

    token_ids[row]   | prompt ......... | generated .... |   (unwritten)
    positions        0                                   num_tokens[row]
    KV in the cache  <------ num_computed[row] ------>
"""

import torch
from torch import Tensor

from ..ipc.messages import Grow, Join, Sampling

MIN_TEMPERATURE = 1e-6
"""Below it logits / temperature may overflow, and nothing but the best token is chosen anyway."""


class Rows:
    def __init__(
        self, max_batch_size: int, max_seq_len: int, block_size: int, device: torch.device
    ) -> None:
        max_blocks = -(-max_seq_len // block_size)
        self.device = device
        self.block_size = block_size
        self.token_ids = torch.zeros(
            max_batch_size, max_seq_len + 1, dtype=torch.int64, device=device
        )
        self.num_tokens = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.num_computed = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(max_batch_size, max_blocks, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(max_batch_size, dtype=torch.float32, device=device)
        self.top_p = torch.ones(max_batch_size, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.min_p = torch.zeros(max_batch_size, dtype=torch.float32, device=device)
        self.seed = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.sampling: list[Sampling] = [Sampling()] * max_batch_size
        """What no kernel reads row by row: penalties, bias, masks, log-probabilities."""
        self.num_prompt_tokens: list[int] = [0] * max_batch_size
        self._num_blocks: list[int] = [0] * max_batch_size

    def join(self, join: Join) -> None:
        """Creates the row, over whatever was there."""
        row, sampling = join.row, join.sampling
        ids = torch.frombuffer(bytearray(join.token_ids), dtype=torch.int32)
        self.token_ids[row, : len(ids)] = ids.to(self.device)
        self.num_tokens[row] = len(ids)
        self.num_computed[row] = join.num_cached_tokens
        self.num_prompt_tokens[row] = join.num_prompt_tokens
        self._num_blocks[row] = 0
        self.grow(Grow(row, join.block_table))
        self.sampling[row] = sampling
        self.temperature[row] = max(sampling.temperature, MIN_TEMPERATURE)
        self.top_p[row] = sampling.top_p
        self.top_k[row] = sampling.top_k
        self.min_p[row] = sampling.min_p
        self.seed[row] = sampling.seed - (1 << 64) if sampling.seed >= 1 << 63 else sampling.seed

    def grow(self, grow: Grow) -> None:
        """Appends blocks to the row's block table."""
        start = self._num_blocks[grow.row]
        stop = start + len(grow.block_ids)
        assert stop <= self.block_table.shape[1], f"{stop=} > {self.block_table.shape=}"
        self.block_table[grow.row, start:stop] = torch.tensor(grow.block_ids, dtype=torch.int32)
        self._num_blocks[grow.row] = stop

    def slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Cache slots of (row, position) pairs: [T] int64."""
        blocks = self.block_table[rows, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def append(self, rows: Tensor, token_ids: Tensor) -> None:
        """The newly sampled token of each row."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1
