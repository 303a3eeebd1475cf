"""Training batches: examples made by many processes, packed into rows of a fixed length.

row    | doc 1 ............ | doc 2 ....... | doc 3 ...... | padding |
learn       no yes yes yes      no yes yes      no yes yes     no
"""

import multiprocessing
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import tasks, text
from .network import Packed

ROW_TOKENS = 512
CHUNK = 2000
"""Examples that one process makes at a time."""


class Rows(NamedTuple):
    """Packed documents, on the host."""

    ids: np.ndarray
    """[N, ROW_TOKENS] int16."""
    docs: np.ndarray
    """[N, ROW_TOKENS] int8: number of the document in its row, from 1; 0 is padding."""
    learned: np.ndarray
    """[N, ROW_TOKENS] bool: the token is part of an answer."""


class Batch(NamedTuple):
    """On the device, with the targets of both heads; -100 where nothing is learned."""

    packed: Packed
    targets: Tensor
    mtp_targets: Tensor


def make_rows(seed: int, num_examples: int, tokenizer_dir: Path, held_out: bool) -> Rows:
    """Examples of one seed, packed in the order of drawing."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    rng = random.Random(seed)
    rows: list[list[text.Ids]] = [[]]
    room = ROW_TOKENS
    for _ in range(num_examples):
        thinking = held_out or rng.random() >= text.NO_THINKING_SHARE
        document = text.encode(tokenizer, tasks.draw(rng, held_out), thinking)
        if len(document.ids) > room:
            rows.append([])
            room = ROW_TOKENS
        rows[-1].append(document)
        room -= len(document.ids)
    return _fill(rows)


def _fill(rows: list[list[text.Ids]]) -> Rows:
    shape = (len(rows), ROW_TOKENS)
    packed = Rows(np.zeros(shape, np.int16), np.zeros(shape, np.int8), np.zeros(shape, bool))
    for i, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, start=1):
            stop = start + len(document.ids)
            packed.ids[i, start:stop] = document.ids
            packed.docs[i, start:stop] = number
            packed.learned[i, start + document.num_prompt : stop] = True
            start = stop
    return packed


def _make(job: tuple[int, Path]) -> Rows:
    return make_rows(job[0], CHUNK, job[1], held_out=False)


def make_many(seed: int, num_examples: int, tokenizer_dir: Path) -> Rows:
    """Training examples from all cores."""
    jobs = [(seed * 1_000_000 + i, tokenizer_dir) for i in range(-(-num_examples // CHUNK))]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        parts = pool.map(_make, jobs, chunksize=4)
    return Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def to_batch(rows: Rows, index: np.ndarray, device: torch.device) -> Batch:
    """The rows of `index` as tensors."""
    ids = torch.from_numpy(rows.ids[index]).to(device).long()
    docs = torch.from_numpy(rows.docs[index]).to(device)
    learned = torch.from_numpy(rows.learned[index]).to(device)
    same = docs[:, :, None] == docs[:, None, :]
    causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool, device=device).tril()
    starts = torch.zeros_like(ids)
    steps = torch.arange(ROW_TOKENS, device=device).expand_as(ids)
    begins = torch.ones_like(docs, dtype=torch.bool)
    begins[:, 1:] = docs[:, 1:] != docs[:, :-1]
    starts = torch.where(begins, steps, 0).cummax(dim=1).values
    packed = Packed(ids, steps - starts, (same & causal)[:, None])
    return Batch(packed, _targets(ids, docs, learned, 1), _targets(ids, docs, learned, 2))


def _targets(ids: Tensor, docs: Tensor, learned: Tensor, ahead: int) -> Tensor:
    """The token `ahead` positions on, where it is learned and of the same document."""
    targets = torch.full_like(ids, -100)
    wanted = learned[:, ahead:] & (docs[:, ahead:] == docs[:, :-ahead])
    targets[:, :-ahead] = torch.where(wanted, ids[:, ahead:], -100)
    return targets


def epochs(rows: Rows, rows_per_batch: int, seed: int) -> Iterator[np.ndarray]:
    """Shuffled indices of batches, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows.ids))
        for start in range(0, len(order) - rows_per_batch + 1, rows_per_batch):
            yield order[start : start + rows_per_batch]
