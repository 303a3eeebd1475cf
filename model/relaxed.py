"""Relaxed acceptance: while a model thinks, a draft that is nearly as good as the choice is taken.

It changes what is generated, so it is off unless somebody asks, and never reaches the answer behind
</think>.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import CheckpointError

OPEN, CLOSE = "<think>", "</think>"
TAG_WINDOW = 4
"""A prompt opens a thought if <think> is among so many last tokens, as R1's template has it."""


@dataclass(frozen=True)
class Relaxed:
    """Which drafts are accepted while a row thinks, besides those that are what is chosen."""

    top_k: int
    """Those among so many best tokens,"""
    delta: float
    """no more than this less likely than the best."""
    think_ids: tuple[int, int]
    """The tokens <think> and </think>."""

    def thinks(self, token_ids: NDArray[np.int32], num_prompt_tokens: int) -> bool:
        """Whether what follows these tokens is thought. A tag within the prompt changes nothing."""
        recent = token_ids[max(num_prompt_tokens - TAG_WINDOW, 0) :]
        tags = recent[np.isin(recent, self.think_ids)]
        return len(tags) > 0 and int(tags[-1]) == self.think_ids[0]


def read_think_ids(model_dir: Path) -> tuple[int, int]:
    """<think> and </think> of the checkpoint's tokenizer. Raises CheckpointError if it has not one
    token for each."""
    ids = dict(_added_tokens(model_dir))
    for tag in (OPEN, CLOSE):
        if tag not in ids:
            raise CheckpointError(
                f"relaxed_topk: the tokenizer in {model_dir} has no token {tag}, "
                "and relaxed acceptance is for what is between the two"
            )
    return ids[OPEN], ids[CLOSE]


def _added_tokens(model_dir: Path) -> Iterator[tuple[str, int]]:
    for token in _fields(model_dir / "tokenizer.json").get("added_tokens", []):
        yield token["content"], token["id"]
    config = _fields(model_dir / "tokenizer_config.json")
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        yield token["content"], int(token_id)


def _fields(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return fields if isinstance(fields, dict) else {}
