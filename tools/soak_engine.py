"""Does the memory that was put aside suffice for every load that is let in?

    python -m dsd.tools.soak_engine DIR --minutes 5 [--load-format dummy] [--kv-cache-dtype fp8]

Scheduler and runner in one process. Twice as many requests as rows are kept waiting, each at a
random one of the extremes: the longest prompt that fits, one of a few tokens, answers that fill the
KV cache to its last block so that rows are preempted, log-probabilities of prompt and answer, every
sampling option. On a GPU a step gets no more memory than was put aside for it, whatever else is
free. Ends with the peak of the allocated memory, or with the error that memory ran out.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import click
import torch

from ..daemon.request import Request
from ..ipc.messages import Sampling
from ..model.memory import SPARE_BYTES
from ..model.runner import InFlight
from .local_engine import LocalEngine

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=0.6, top_p=0.95),
    Sampling(temperature=1.0, top_k=40, min_p=0.05, num_logprobs=20),
    Sampling(temperature=0.7, presence_penalty=0.5, repetition_penalty=1.1),
    Sampling(temperature=0.0, num_logprobs=0, num_prompt_logprobs=20),
)


class Soak:
    def __init__(self, engine: LocalEngine, seed: int) -> None:
        self.engine = engine
        self.scheduler = engine.scheduler()
        self.num_steps = self.num_finished = 0
        self.fullest = 0
        """Most blocks that were held at once."""
        self._random = random.Random(seed)
        self._num_added = 0
        ready = engine.ready
        capacity = (ready.num_blocks - 1) * ready.block_size
        self._longest = min(ready.max_seq_len, capacity - self.scheduler.overrun) - 1

    def add(self) -> None:
        """A request at one of the extremes."""
        draw, ready = self._random, self.engine.ready
        length = draw.choice((1, 3, ready.block_size, self._longest // 8, self._longest // 2))
        if draw.random() < 0.05:
            length = self._longest
        prompt = [draw.randrange(ready.vocab_size) for _ in range(max(1, length))]
        answer = draw.choice((1, 7, ready.block_size + 1, self._longest))
        sampling = draw.choice(SAMPLINGS)
        self._num_added += 1
        name = f"soak-{self._num_added}"
        self.scheduler.add(Request(name, prompt, sampling, answer, frozenset()))

    def run(self, goes_on: Callable[[], bool]) -> None:
        """Keeps the engine full while `goes_on`, then takes the results outstanding."""
        runner, wanted = self.engine.runner, 2 * self.engine.ready.max_batch_size
        in_flight: deque[InFlight] = deque()
        while goes_on():
            while self.scheduler.num_running + self.scheduler.num_waiting < wanted:
                self.add()
            while (step := self.scheduler.schedule()) is not None:
                in_flight.append(runner.launch(step))
            events = self.scheduler.update(runner.collect(in_flight.popleft()))
            self.num_steps += 1
            self.num_finished += sum(event.finish is not None for event in events)
            self.fullest = max(self.fullest, self.scheduler.stats().num_held_blocks)
        while in_flight:
            self.scheduler.update(runner.collect(in_flight.popleft()))


def cap_memory(step_bytes: int) -> None:
    """From now on torch's allocator holds at most what it holds, and `step_bytes`."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    allowed = torch.cuda.memory_reserved() + step_bytes + SPARE_BYTES // 2
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    click.echo(
        f"the allocator may hold {allowed / 1e9:.2f} GB, {step_bytes / 1e9:.2f} of them for steps"
    )


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--minutes", default=5.0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--load-format", type=click.Choice(["auto", "dummy"]), default="auto")
@click.option("--kv-cache-dtype", type=click.Choice(["auto", "fp8"]), default="auto")
@click.option("--kv-cache-gb", default=0.0, help="0: all that the largest steps leave.")
@click.option("--kv-host-cache-gb", default=0.0, help="Host memory for KV blocks; 0: none.")
@click.option("--mtp", "num_nextn", default=0, show_default=True, help="Most drafts of a step.")
@click.option("--max-batch-size", default=256, show_default=True)
@click.option("--max-num-tokens", default=8192, show_default=True)
@click.option("--max-seq-len", default=0, help="0: the model's own limit.")
@click.option("--seed", default=0, show_default=True)
def main(directory: Path, minutes: float, seed: int, **options: object) -> None:
    """Keep the engine of the model in DIRECTORY full."""
    engine = LocalEngine(directory, **options)  # type: ignore[arg-type]
    for note in engine.ready.notes:
        click.echo(note)
    if engine.ready.device.startswith("cuda"):
        cap_memory(engine.runner.largest_step_bytes)
    soak = Soak(engine, seed)
    end = time.monotonic() + minutes * 60
    soak.run(lambda: time.monotonic() < end)
    stats = soak.scheduler.stats()
    click.echo(
        f"{soak.num_steps} steps, {soak.num_finished} requests finished, {stats.num_preemptions} "
        f"preemptions; at most {soak.fullest} of {stats.num_blocks} blocks were held at once"
    )
    if engine.ready.device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_reserved()
        click.echo(f"peak of the allocator {peak / 1e9:.2f} GB; {free / 1e9:.2f} of "
                   f"{total / 1e9:.2f} GB are free now")  # fmt: skip


if __name__ == "__main__":
    main()
