"""Small checkpoints with an MTP layer, and drafts that are right or wrong on purpose."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsd.ipc.messages import Sampling
from dsd.model import checkpoint
from dsd.model.config import ModelConfig
from dsd.tools.hand_driver import HandDriver

MANY = tuple(range(180))
"""Tokens to ban for a while: more than half of the vocabulary, so that it shows."""
SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.5),
    Sampling(temperature=0.8, top_p=0.9, top_k=40, seed=1, num_logprobs=2),
    Sampling(temperature=1.0, seed=2**63 + 5, min_p=0.02, logit_bias=((3, 4.0), (9, -5.0))),
    Sampling(temperature=0.0, min_tokens=7, masked_token_ids=MANY, num_logprobs=0),
    Sampling(temperature=1.2, seed=3, frequency_penalty=2.0, min_tokens=4, masked_token_ids=MANY),
)


def add_mtp_layer(source: Path, directory: Path) -> Path:
    """A copy of the checkpoint, with a random MTP layer."""
    fields = json.loads((source / "config.json").read_text())
    fields["num_nextn_predict_layers"] = 1
    (directory / "config.json").write_text(json.dumps(fields))
    config = ModelConfig.load(directory)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for spec in checkpoint.tensors(config, mtp=True):
        if spec.name not in tensors:
            value = torch.randn(spec.shape, generator=generator)
            last = spec.shape[-1]
            tensors[spec.name] = 1 + 0.1 * value if len(spec.shape) == 1 else value * last**-0.5
    save_file(tensors, directory / "model.safetensors")
    return directory


Forced = Callable[[int, int], int]
"""(row, step) -> how many of its drafts are to be right."""


def force_drafts(driver: HandDriver, expected: list[list[int]], right: Forced) -> None:
    """Overwrites every row's drafts: the first ones are what the row is going to choose."""
    drafts, vocab = driver.runner.rows.drafts, driver.runner.model.config.vocab_size
    for i, row in enumerate(driver.rows):
        num_right = right(i, len(row.accepted))
        following = expected[i][len(row.token_ids) :]
        for j in range(drafts.shape[1]):
            token = following[j] if j < len(following) else 0
            drafts[i, j] = token if j < num_right else (token + 1) % vocab


def draft_kv(driver: HandDriver, row: int) -> Tensor:
    """[num_computed, D]: the MTP layer's KV of a row, in the order of its tokens."""
    return _entries(driver, row)[: int(driver.runner.rows.tokens.num_computed[row])]


def _entries(driver: HandDriver, row: int) -> Tensor:
    layer, table = driver.runner.cache.layers[-1], driver.runner.rows.tokens.block_table[row]
    return layer[table[table > 0].long()].flatten(0, 1)


def poison_unknown(driver: HandDriver) -> None:
    """NaN wherever a row's KV is not computed, in every layer."""
    rows, size = driver.runner.rows, driver.runner.cache.block_size
    for i in range(len(driver.rows)):
        table = rows.tokens.block_table[i]
        table = table[table > 0].long()
        positions = torch.arange(len(table) * size)
        positions = positions[positions >= rows.tokens.num_computed[i]]
        slots = table[positions // size] * size + positions % size
        for layer in driver.runner.cache.layers:
            layer.flatten(0, 1)[slots] = float("nan")
