"""The same greedy prompts on the CPU and on a GPU, or without and with drafts: where do tokens
differ, and how close was it?

    python -m dsd.tools.compare_devices DIR --prompts 64 --max-tokens 64 [--drafts 3]

By default the activations are quantised 1x128 before fp8 weights on both, so the CPU computes what
the GPU does up to the order of summation; `--dtype float32 --act-quant none` leaves nothing but
that order. A first difference counts as harmless where the two best logits
of the CPU are closer than 0.05; after it the answers go their own ways and are not compared.

With `--drafts N` both are on one device, the GPU if there is one. Drafts change no token, but a
step that verifies them multiplies more rows at once, and other kernels may sum in another order.
"""

import random
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch

from ..ipc.messages import Sampling
from .local_engine import Answer, LocalEngine

HARMLESS = 0.05
WITH_MARGINS = Sampling(temperature=0.0, num_logprobs=2)


class Comparison(NamedTuple):
    same: int
    """Answers without a difference."""
    harmless: int
    harmful: int
    tokens: int
    """Compared ones."""
    margins: list[float]
    """Between the two best logits of what is expected at each first difference."""


def compare(wanted: list[Answer], got: list[Answer]) -> Comparison:
    """First differences and their margins."""
    margins, tokens = [], 0
    for expected, found in zip(wanted, got, strict=True):
        pairs = list(zip(expected.token_ids, found.token_ids, strict=False))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        tokens += len(pairs) if first is None else first + 1
        if first is not None:
            best, second = expected.logprobs[first].top[:2]
            margins.append(best[1] - second[1])
    harmless = sum(margin < HARMLESS for margin in margins)
    return Comparison(
        len(wanted) - len(margins), harmless, len(margins) - harmless, tokens, margins
    )


def random_prompts(count: int, vocab_size: int, seed: int = 5) -> list[list[int]]:
    """Of 1 to 200 tokens."""
    rng = random.Random(seed)
    return [rng.choices(range(3, vocab_size), k=rng.randint(1, 200)) for _ in range(count)]


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True))
@click.option("--prompts", "count", default=64, show_default=True)
@click.option("--max-tokens", default=64, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--act-quant", default="fp8", show_default=True)
@click.option("--drafts", default=0, help="Compare with so many drafts a step, not the devices.")
def main(
    directory: Path, count: int, max_tokens: int, dtype: str, act_quant: str, drafts: int
) -> None:
    """Compare greedy answers: the CPU's and the GPU's, or those without and with drafts."""
    has_gpu = torch.cuda.is_available()
    if not (has_gpu or drafts):
        raise click.ClickException("compare_devices needs a GPU, or --drafts")
    device = "cuda" if has_gpu else "cpu"
    sides = [("without drafts", device, 0), ("with drafts", device, drafts)]
    if not drafts:
        sides = [("cpu", "cpu", 0), ("cuda", "cuda", 0)]
    answers = []
    for name, where, num_nextn in sides:
        engine = LocalEngine(
            directory, where, dtype, act_quant, max_batch_size=32, num_nextn=num_nextn
        )
        prompts = random_prompts(count, engine.ready.vocab_size)
        started = time.monotonic()
        answers.append(engine.generate(prompts, max_tokens, frozenset(), WITH_MARGINS))
        seconds = time.monotonic() - started
        tokens = sum(len(answer.token_ids) for answer in answers[-1])
        click.echo(f"{name}: {tokens} tokens, {engine.num_steps} steps, {seconds:.1f} s")
        del engine
        if has_gpu:
            torch.cuda.empty_cache()
    found = compare(*answers)
    margins = ", ".join(f"{margin:.3f}" for margin in sorted(found.margins)[-8:])
    click.echo(
        f"{found.same} of {count} answers the same; first differences: {found.harmless} harmless, "
        f"{found.harmful} not; {found.tokens} tokens compared; largest margins: {margins or 'none'}"
    )


if __name__ == "__main__":
    main()
