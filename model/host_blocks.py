"""KV blocks in host memory: a slot holds one block, all layers of it.

    offload   block, layer by layer --gather--> staging ---one copy---> slot
    restore   block, layer by layer <-scatter-- staging <--one copy---- slot

On a GPU the copies have a stream of their own, in the order of the steps, and the slots are pinned
memory. The host waits for nothing. The stream on which the model runs waits for what comes back,
and, before it writes a block, for the copy that reads it. What `Step` promises does the rest.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor

STAGED_BLOCKS = 16
"""Blocks in the staging memory; of DeepSeek-V3's, that is 72 MB of the GPU's memory."""
PINNED_BYTES = 1 << 30
"""Of one piece of host memory. PyTorch rounds what it pins up to a power of two, so this is one."""

Copies = Sequence[tuple[int, int]]


class HostBlocks:
    def __init__(
        self,
        layers: Sequence[Tensor],
        num_slots: int,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """layers: [num_blocks, ...] contiguous, any dtype; `report`: bytes taken, of how many."""
        device = layers[0].device
        self._layers = [_as_words(layer) for layer in layers]
        ends = list(accumulate(layer.shape[1] for layer in self._layers))
        self._columns = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        self.num_slots = num_slots
        self.slot_bytes = 8 * ends[-1]
        self._pieces: list[Tensor] = []
        self._slots_per_piece = max(1, PINNED_BYTES // self.slot_bytes)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging = torch.empty(STAGED_BLOCKS, ends[-1], dtype=torch.int64, device=device)
        self._reading: dict[int, torch.cuda.Event] = {}
        """By block: when the copy that reads it is done. Those that are done go, oldest first."""
        self._take_memory(report)

    def _take_memory(self, report: Callable[[int, int], None]) -> None:
        total = self.num_slots * self.slot_bytes
        for first in range(0, self.num_slots, self._slots_per_piece):
            report(first * self.slot_bytes, total)
            count = min(self._slots_per_piece, self.num_slots - first)
            pin = self._stream is not None
            shape = count, self.slot_bytes // 8
            self._pieces.append(torch.empty(shape, dtype=torch.int64, pin_memory=pin))
        report(total, total)

    def slot(self, index: int) -> Tensor:
        """[slot_bytes // 8] int64, in host memory: the block's bytes, one layer after the other."""
        piece, row = divmod(index, self._slots_per_piece)
        return self._pieces[piece][row]

    # ---- copies ----

    def copy(self, offloads: Copies, restores: Copies) -> None:
        """A step's copies, (block, slot) and (slot, block). What is put on the current stream after
        this finds the restored blocks in place."""
        self._forget_done()
        if not offloads and not restores:
            return
        with self._on_own_stream():
            for some in _batches(offloads):
                self._offload(some)
            if offloads and self._stream is not None:
                self._note_reads([block for block, _ in offloads], self._stream.record_event())
            for some in _batches(restores):
                self._restore(some)
        if restores and self._stream is not None:
            torch.cuda.current_stream(self._staging.device).wait_stream(self._stream)

    def before_writes(self, block_ids: Iterable[int]) -> None:
        """What is put on the current stream after this may write these blocks."""
        if not self._reading:
            return
        for event in {self._reading.pop(block_id, None) for block_id in block_ids} - {None}:
            torch.cuda.current_stream(self._staging.device).wait_event(event)

    def _on_own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _offload(self, pairs: Copies) -> None:
        block_ids = self._index([block for block, _ in pairs])
        staging = self._staging[: len(pairs)]
        for layer, columns in zip(self._layers, self._columns, strict=True):
            torch.index_select(layer, 0, block_ids, out=staging[:, columns])
        for staged, (_, slot) in zip(staging, pairs, strict=True):
            self.slot(slot).copy_(staged, non_blocking=True)

    def _restore(self, pairs: Copies) -> None:
        block_ids = self._index([block for _, block in pairs])
        staging = self._staging[: len(pairs)]
        for staged, (slot, _) in zip(staging, pairs, strict=True):
            staged.copy_(self.slot(slot), non_blocking=True)
        for layer, columns in zip(self._layers, self._columns, strict=True):
            layer.index_copy_(0, block_ids, staging[:, columns])

    def _index(self, block_ids: list[int]) -> Tensor:
        device = self._staging.device
        index = torch.tensor(block_ids, pin_memory=device.type == "cuda")
        return index.to(device, non_blocking=True)

    def _note_reads(self, block_ids: list[int], event: torch.cuda.Event) -> None:
        for block_id in block_ids:
            self._reading.pop(block_id, None)
            self._reading[block_id] = event

    def _forget_done(self) -> None:
        while self._reading:
            block_id = next(iter(self._reading))
            if not self._reading[block_id].query():
                break
            del self._reading[block_id]


def _as_words(layer: Tensor) -> Tensor:
    """[num_blocks, bytes of a block // 8] int64."""
    assert layer.is_contiguous(), f"{layer.stride()=}"
    words = layer.view(len(layer), -1).view(torch.uint8)
    assert words.shape[1] % 8 == 0, f"a block has {words.shape[1]} bytes in a layer"
    return words.view(torch.int64)


def _batches(pairs: Copies) -> Iterable[Copies]:
    for start in range(0, len(pairs), STAGED_BLOCKS):
        yield pairs[start : start + STAGED_BLOCKS]
