"""What the small model can do, on the held-out half, through dsd's own engine.

    python -m dsd.tools.tiny.evaluate DIR --examples 200

Greedy answers are compared with the right ones, kind by kind. Expert load and MTP acceptance are
measured by teacher forcing on the bf16 export (`--network`).
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from ...model.config import ModelConfig
from ..local_engine import LocalEngine
from . import batches, export, tasks, text
from .network import Network

SEED = 20
MAX_TOKENS = 200
EOS_ID = 1
MTP_EXAMPLES = 1000


class Score:
    """Right answers of one kind."""

    def __init__(self) -> None:
        self.right = 0
        self.asked = 0
        self.wrong: list[tuple[str, str, str]] = []
        """(question, expected, answered), for a look."""

    @property
    def accuracy(self) -> float:
        return self.right / self.asked if self.asked else 0.0


def examples(kinds: Sequence[str], count: int, seed: int = SEED) -> list[tasks.Example]:
    """`count` held-out examples of each kind."""
    rng = random.Random(seed)
    return [tasks.TASKS[kind][0](rng, True) for kind in kinds for _ in range(count)]


def answer_of(completion: str) -> str:
    """What a client sees as the answer: the text after the thinking."""
    return completion.split("</think>")[-1].strip()


def score(
    engine: LocalEngine, tokenizer: Tokenizer, asked: Sequence[tasks.Example]
) -> dict[str, Score]:
    """Asks every example greedily."""
    prompts = [
        tokenizer.encode(text.prompt_text(example), add_special_tokens=False).ids
        for example in asked
    ]
    outputs = engine.generate(prompts, MAX_TOKENS, frozenset([EOS_ID]))
    scores: dict[str, Score] = {}
    for example, output in zip(asked, outputs, strict=True):
        entry = scores.setdefault(example.kind, Score())
        completion = tokenizer.decode(output.token_ids, skip_special_tokens=False)
        answer = re.sub("<｜end▁of▁sentence｜>$", "", answer_of(completion)).strip()
        entry.asked += 1
        if answer == example.answer:
            entry.right += 1
        else:
            entry.wrong.append((example.messages[-1]["content"], example.answer, answer))
    return scores


def overall(scores: dict[str, Score]) -> float:
    """Over all task kinds together, each weighing the same."""
    return sum(entry.accuracy for entry in scores.values()) / len(scores)


@torch.no_grad()
def network_figures(directory: Path) -> dict[str, Any]:
    """MTP acceptance at temperature 0, and each MoE layer's least and most loaded expert as a share
    of the mean; teacher-forced on held-out examples."""
    config = ModelConfig.load(directory)
    network = Network(config)
    network.load_state_dict(export.read_state(directory, config))
    rows = batches.make_rows(SEED, MTP_EXAMPLES, directory, held_out=True)
    accepted = drafted = 0
    network.train()  # the gates count while training
    for start in track(
        range(0, len(rows.ids), 8), "MTP and expert load", console=Console(stderr=True)
    ):
        index = list(range(start, min(start + 8, len(rows.ids))))
        batch = batches.to_batch(rows, index, torch.device("cpu"))  # type: ignore[arg-type]
        logits, drafts = network(batch.packed)
        learned = batch.mtp_targets[:, :-1] != -100
        accepted += int(((drafts.argmax(-1)[:, :-1] == logits.argmax(-1)[:, 1:]) & learned).sum())
        drafted += int(learned.sum())
    loads = [gate.load / gate.load.mean() for gate in network.gates()]
    return {
        "mtp_accepted": accepted / drafted,
        "least_load": [float(load.min()) for load in loads],
        "most_load": [float(load.max()) for load in loads],
    }


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True))
@click.option("--examples", "count", default=200, show_default=True, help="Of each kind.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--act-quant", default="none", show_default=True)
@click.option("--kv-cache-dtype", default="auto", show_default=True)
@click.option("--num-nextn", default=0, show_default=True, help="Drafts of a step.")
@click.option("--relaxed-topk", default=0, show_default=True, help="Inside <think>; 0: off.")
@click.option("--relaxed-delta", default=0.6, show_default=True)
@click.option("--network", is_flag=True, help="MTP and expert load too (bf16 export only).")
@click.option("--show-wrong", default=0, help="Wrong answers to print, of each kind.")
def main(
    directory: Path,
    count: int,
    network: bool,
    show_wrong: int,
    **options: Any,
) -> None:
    """Evaluate the checkpoint in DIRECTORY."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    engine = LocalEngine(directory, **options)
    scores = score(engine, tokenizer, examples(list(tasks.TASKS), count))
    table = Table("task", "right", "of", "accuracy")
    for kind, entry in scores.items():
        table.add_row(kind, str(entry.right), str(entry.asked), f"{entry.accuracy:.1%}")
    table.add_row("all", "", "", f"{overall(scores):.1%}")
    console = Console()
    console.print(table)
    for kind, entry in scores.items():
        for question, expected, answered in entry.wrong[:show_wrong]:
            console.print(f"{kind}: {question[-80:]!r}: expected {expected!r}, got {answered!r}")
    if network:
        console.print(network_figures(directory))


if __name__ == "__main__":
    main()
