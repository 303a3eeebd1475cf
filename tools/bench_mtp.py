"""What drafting gives: tokens a step, how often each draft is right, and tokens a second.

    python -m dsd.tools.bench_mtp DIR [--num-nextn 0,1,2,3] [--batch 1,8]

The prompts are held-out questions that the small model was trained for (`tools/tiny/tasks.py`), so
that drafts are what they are in use; DIR has a tokenizer that reads them. Rows are driven without a
scheduler, one step after the other, a batch of questions at a time until all of it have ended.
Tokens are compared with those without drafts. Only decode steps are timed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import click
from tokenizers import Tokenizer

from ..ipc.messages import Sampling
from ..model.runner import Runner
from .hand_driver import HandDriver
from .local_engine import LocalEngine
from .tiny import evaluate, tasks, text

MAX_SEQ_LEN = 1024
HEADER = f"{'batch':>6} {'drafts':>7} {'steps':>6} {'tok/step':>9} {'tok/s':>8}  right, by place"


class Drafted(NamedTuple):
    """Of one number of drafts and one batch size."""

    batch: int
    num_nextn: int
    num_steps: int
    """Decode steps."""
    tokens_per_step: float
    """Of a row."""
    right: list[float]
    """How often the first draft was accepted, the first two, ..."""
    tokens_per_s: float


def questions(model_dir: Path, count: int) -> list[list[int]]:
    """`count` prompts of each kind of task."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    asked = evaluate.examples(list(tasks.TASKS), count)
    return [
        tokenizer.encode(text.prompt_text(example), add_special_tokens=False).ids
        for example in asked
    ]


def measure(
    runner: Runner, prompts: Sequence[list[int]], batch: int, sampling: Sampling, max_tokens: int
) -> tuple[Drafted, list[list[int]]]:
    """Answers all prompts; and the answers."""
    num_nextn, answers = runner.rows.num_nextn, []
    num_steps, seconds, counts = 0, 0.0, []
    for start in range(0, len(prompts), batch):
        driver = HandDriver(runner)
        for prompt in prompts[start : start + batch]:
            driver.add(prompt, max_tokens, sampling, stop_token_ids=frozenset([evaluate.EOS_ID]))
        driver.step(0, num_nextn)  # the prompts
        begin = perf_counter()
        while not all(row.ended for row in driver.rows):
            driver.step(num_nextn, num_nextn)
            num_steps += 1
        seconds += perf_counter() - begin
        answers += [row.token_ids for row in driver.rows]
        # A row's last step may have been cut short by its end.
        counts += [count for row in driver.rows for count in row.accepted[:-1]]
    num_tokens = sum(len(answer) - 1 for answer in answers)
    right = [sum(count > i for count in counts) / len(counts) for i in range(1, num_nextn + 1)]
    per_step = sum(counts) / len(counts)
    return Drafted(batch, num_nextn, num_steps, per_step, right, num_tokens / seconds), answers


def line_of(row: Drafted) -> str:
    right = " ".join(f"{share:.3f}" for share in row.right)
    return (
        f"{row.batch:6} {row.num_nextn:7} {row.num_steps:6} {row.tokens_per_step:9.2f} "
        f"{row.tokens_per_s:8.1f}  {right}"
    )


def bench(
    model_dir: Path,
    num_nextn: Sequence[int],
    batches: Sequence[int],
    examples: int,
    max_tokens: int,
    sampling: Sampling,
    tell: Callable[[str], None],
    **options: Any,
) -> list[Drafted]:
    """Raises CheckpointError, and ClickException where a draft changed a token."""
    prompts = questions(model_dir, examples)
    rows: list[Drafted] = []
    plain: list[list[int]] | None = None
    tell(HEADER)
    for count in num_nextn:
        engine = LocalEngine(
            model_dir,
            max_batch_size=max(batches),
            max_num_tokens=max(batches) * max(len(prompt) for prompt in prompts),
            max_seq_len=MAX_SEQ_LEN,
            num_nextn=count,
            **options,
        )
        for batch in batches:
            row, answers = measure(engine.runner, prompts, batch, sampling, max_tokens)
            rows.append(row)
            tell(line_of(row))
            plain = answers if plain is None else plain
            lossless = options.get("dtype") == "float32" and not options.get("relaxed_topk")
            if lossless and answers != plain:
                raise click.ClickException(f"{row.num_nextn} drafts, {batch=}: other tokens")
    return rows


def _integers(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--num-nextn", default="0,1,2,3,5", show_default=True, callback=_integers)
@click.option("--batch", "batches", default="1,8", show_default=True, callback=_integers)
@click.option("--examples", default=2, show_default=True, help="Questions of each kind.")
@click.option("--max-tokens", default=120, show_default=True, help="Of an answer.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", default="float32", show_default=True, help="float32: tokens are compared.")
@click.option("--act-quant", default="none", show_default=True)
@click.option("--relaxed-topk", default=0, show_default=True, help="Inside <think>; 0: off.")
@click.option("--relaxed-delta", default=0.6, show_default=True)
def main(directory: Path, temperature: float, **given: Any) -> None:
    """Measure drafting on the model in DIRECTORY."""
    bench(directory, sampling=Sampling(temperature=temperature, seed=1), tell=click.echo, **given)


if __name__ == "__main__":
    main()
