"""How fast the engine is: scheduler and runner in one process, two steps in flight.

    python -m dsd.tools.make_checkpoint DIR --v3 --layers 6 --config-only
    python -m dsd.tools.bench_engine DIR [--tp 8] [--batch 1,16,64,128,256,64@8192] [--trace DIR]

Decode: `batch` prompts are computed, then every row decodes; the time of a step is that between two
results. floor: what the step must read (`model/plan.py`) / the read bandwidth measured before.
Prefill: distinct prompts, one token each. The weights are random unless `--load-format auto`; with
`--tp`, `--ep` or `--pp` one rank's share runs alone, its exchanges left out. Without are the daemon
and the wire between the processes. With `--mtp N` every step verifies and makes N drafts, of which
so many are accepted as `--accepted` says; tokens of random weights choose their experts by
themselves, with `--same-experts` all take the same ones.

`--trace DIR` profiles a few steps more at each batch, writes a Chrome trace of each, and says how
long the GPU was busy and idle; the profiler's own cost is in the idle time.
"""

import dataclasses
import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import click
import torch

from ..daemon.request import Refused, Request
from ..ipc.messages import Sampling, Step
from ..model.config import CheckpointError, ModelConfig
from ..model.parallel import Layout
from ..model.plan import floor_bytes
from ..model.runner import InFlight
from .forced_acceptance import force, share_experts
from .gpu_trace import TRACE_STEPS, Busy, trace
from .local_engine import LocalEngine

WARMUP_STEPS = 8
PREFILL_STEPS = 8
"""A prefill run fills about so many steps."""
PIPELINE_DEPTH = 2
ENGINE_OPTIONS = ("max_num_tokens", "load_format", "dtype", "act_quant", "num_nextn")
ENGINE_OPTIONS += ("kv_cache_dtype", "kv_cache_gb")
CPU_READ_BYTES = 1 << 28


# ---- driving ------------------------------------------------------------------------------------


class Driver:
    """What engine and worker do between them, without the wire."""

    def __init__(self, engine: LocalEngine, sampling: Sampling) -> None:
        self.runner = engine.runner
        self.sampling = sampling
        self.vocab_size = engine.ready.vocab_size
        self.max_num_tokens = engine.ready.max_num_tokens
        self.num_nextn = engine.ready.num_nextn
        self.scheduler = engine.scheduler()
        self._random = torch.Generator().manual_seed(0)
        self._num_requests = 0
        self._in_flight: deque[tuple[Step, InFlight]] = deque()

    def add(self, num_prompt_tokens: int, max_tokens: int) -> Request:
        """A request with a random prompt that nothing but `max_tokens` ends."""
        self._num_requests += 1
        prompt = torch.randint(self.vocab_size, (num_prompt_tokens,), generator=self._random)
        name = f"bench-{self._num_requests}"
        request = Request(name, prompt.tolist(), self.sampling, max_tokens, frozenset())
        self.scheduler.add(request)
        return request

    def advance(self) -> Step | None:
        """Plans all it may, then takes one result; returns its step. None: nothing is left."""
        while (step := self.scheduler.schedule()) is not None:
            self._in_flight.append((step, self.runner.launch(step)))
        if not self._in_flight:
            return None
        step, launched = self._in_flight.popleft()
        self.scheduler.update(self.runner.collect(launched))
        return step

    def clear(self, requests: list[Request]) -> None:
        """Ends the requests and takes what is still in flight."""
        for request in requests:
            self.scheduler.abort(request.request_id)
        while self.advance() is not None:
            pass
        assert not self.scheduler.has_work


# ---- decode -------------------------------------------------------------------------------------


class Point(NamedTuple):
    """What to measure: `batch` rows that each have `prompt` tokens before they decode."""

    batch: int
    prompt: int


@dataclass(frozen=True)
class Decode:
    batch: int
    prompt: int
    context: float
    """Mean number of tokens that a row attended to."""
    median_ms: float
    p99_ms: float
    mean_ms: float
    tokens_per_s: float
    tokens_per_step: float
    """Of a row."""
    floor_gb: float
    floor_ms: float
    of_floor: float
    busy: Busy | None


def max_tokens(point: Point, steps: int, max_num_tokens: int, num_nextn: int = 0) -> int:
    """More than a row can generate before the measurement ends: the first rows decode while the
    last prompts are computed, in what half of a step's tokens at least leave for them."""
    room = (max_num_tokens - point.batch) // (2 if num_nextn else 1)
    prefill_steps = math.ceil(point.batch * point.prompt / room)
    num_steps = prefill_steps + 2 * PIPELINE_DEPTH + WARMUP_STEPS + steps + TRACE_STEPS
    return num_steps * (1 + num_nextn)


def start_decoding(driver: Driver, point: Point, steps: int) -> list[Request]:
    """Until every row of the point decodes and the pipeline is warm. Raises ClickException."""
    limit = max_tokens(point, steps, driver.max_num_tokens, driver.num_nextn)
    requests = [driver.add(point.prompt, limit) for _ in range(point.batch)]
    warm = 0
    while warm < WARMUP_STEPS:
        step = driver.advance()
        if step is None:
            raise click.ClickException(
                f"batch {point.batch} with prompts of {point.prompt} tokens never ran as a whole: "
                f"the KV cache of {driver.scheduler.stats().num_blocks} blocks is too small"
            )
        warm += is_decode(step, point.batch, driver.num_nextn)
    return requests


def is_decode(step: Step, batch: int, num_drafts: int) -> bool:
    whole = step.mode == "decode" and len(step.decodes) == 4 * batch
    return whole and step.num_drafts == step.num_next_drafts == num_drafts


def measure_decode(
    driver: Driver, point: Point, steps: int, floor: "Floor", trace_dir: Path | None
) -> Decode:
    requests = start_decoding(driver, point, steps)
    lengths = [len(request.prompt_ids) + len(request.output_ids) for request in requests]
    times_ms = []
    last = perf_counter()
    for _ in range(steps):
        step = driver.advance()
        now = perf_counter()
        assert step is not None and is_decode(step, point.batch, driver.num_nextn), step
        times_ms.append((now - last) * 1000)
        last = now
    later = [len(request.prompt_ids) + len(request.output_ids) for request in requests]
    per_step = statistics.mean(later[i] - lengths[i] for i in range(point.batch)) / steps
    context = statistics.mean(lengths) + per_step * (steps - 1) / 2
    busy = None
    if trace_dir is not None:
        path = trace_dir / f"decode-{point.batch}x{point.prompt}.json"
        busy = trace(driver.advance, path)
    driver.clear(requests)
    num_bytes = floor.num_bytes(point.batch, context)
    median_ms, floor_ms = statistics.median(times_ms), num_bytes / floor.bandwidth * 1000
    return Decode(
        batch=point.batch,
        prompt=point.prompt,
        context=context,
        median_ms=median_ms,
        p99_ms=sorted(times_ms)[math.ceil(0.99 * steps) - 1],
        mean_ms=statistics.mean(times_ms),
        tokens_per_s=point.batch * per_step * 1000 / statistics.mean(times_ms),
        tokens_per_step=per_step,
        floor_gb=num_bytes / 1e9,
        floor_ms=floor_ms,
        of_floor=floor_ms / median_ms,
        busy=busy,
    )


class Floor(NamedTuple):
    config: ModelConfig
    layout: Layout
    itemsize: int
    bandwidth: float
    """Bytes/s."""
    entry_bytes: int = 0
    num_drafts: int = 0
    same_experts: bool = False

    def num_bytes(self, batch: int, context: float) -> float:
        own = (self.config, self.layout, batch, context, self.itemsize, self.entry_bytes)
        return floor_bytes(*own, self.num_drafts, self.same_experts)


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of reading memory; take it before the model fills that."""
    if device.type == "cuda":
        from .bench_kernels import read_rate  # needs Triton and a GPU

        bandwidth = read_rate() * 1e6
        torch.cuda.empty_cache()
        return bandwidth
    words = torch.ones(CPU_READ_BYTES // 4)
    best = math.inf
    for _ in range(3):
        start = perf_counter()
        words.sum()
        best = min(best, perf_counter() - start)
    return CPU_READ_BYTES / best


# ---- prefill ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    prompt: int
    num_prompts: int
    tokens_per_s: float
    """The best run's."""
    worst_tokens_per_s: float


def measure_prefill(driver: Driver, prompt: int, runs: int) -> Prefill:
    num_prompts = max(1, PREFILL_STEPS * driver.max_num_tokens // prompt)
    run_prefill(driver, prompt, 1)
    rates = [num_prompts * prompt / run_prefill(driver, prompt, num_prompts) for _ in range(runs)]
    return Prefill(prompt, num_prompts, max(rates), min(rates))


def run_prefill(driver: Driver, prompt: int, num_prompts: int) -> float:
    """Seconds until each of so many new prompts has its first token."""
    for _ in range(num_prompts):
        driver.add(prompt, 1)
    start = perf_counter()
    while driver.advance() is not None:
        pass
    return perf_counter() - start


# ---- the command --------------------------------------------------------------------------------


def points(text: str, prompt: int) -> list[Point]:
    """ "1,64@8192": batches, each with its own prompt length where one is named."""
    found = []
    for part in text.split(","):
        batch, _, length = part.partition("@")
        if not batch.isdigit() or not int(batch) or (length and not length.isdigit()):
            raise click.BadParameter(f"{part!r} is neither BATCH nor BATCH@PROMPT")
        found.append(Point(int(batch), int(length or prompt)))
    return found


DECODE_HEADER = (
    f"{'batch':>6} {'context':>8} {'ms/step':>8} {'p99':>8} {'mean':>8} {'tok/step':>8} "
    f"{'tok/s':>9} "
    f"{'floor GB':>9} {'floor ms':>9} {'of floor':>8}"
)
BUSY_HEADER = f" {'busy ms':>8} {'idle ms':>8} {'kernels':>8}"
PREFILL_HEADER = f"{'prompt':>8} {'prompts':>8} {'tok/s':>10} {'worst':>10}"


def decode_line(row: Decode) -> str:
    line = (
        f"{row.batch:6} {row.context:8.0f} {row.median_ms:8.3f} {row.p99_ms:8.3f} "
        f"{row.mean_ms:8.3f} {row.tokens_per_step:8.2f} {row.tokens_per_s:9.0f} "
        f"{row.floor_gb:9.3f} {row.floor_ms:9.3f} "
        f"{row.of_floor:8.0%}"
    )
    if row.busy is None:
        return line
    return line + f" {row.busy.busy_ms:8.3f} {row.busy.idle_ms:8.3f} {row.busy.num_kernels:8.0f}"


def prefill_line(row: Prefill) -> str:
    return (
        f"{row.prompt:8} {row.num_prompts:8} {row.tokens_per_s:10.0f} "
        f"{row.worst_tokens_per_s:10.0f}"
    )


def open_engine(
    model_dir: Path, layout: Layout, wanted: list[Point], prefills: list[int], **options: Any
) -> LocalEngine:
    """An engine with room for everything that is to be measured. Raises CheckpointError."""
    steps, max_num_tokens = options.pop("steps"), options["max_num_tokens"]
    max_batch_size = max(point.batch for point in wanted)
    if max_num_tokens <= max_batch_size:
        raise click.BadParameter(f"max_num_tokens {max_num_tokens} <= batch {max_batch_size}")
    num_nextn = options["num_nextn"]
    lengths = [
        point.prompt + max_tokens(point, steps, max_num_tokens, num_nextn) for point in wanted
    ]
    return LocalEngine(
        model_dir,
        layout=layout,
        max_batch_size=max_batch_size,
        max_seq_len=max(lengths + [prompt + 2 for prompt in prefills]),
        **options,
    )


def describe(engine: LocalEngine, layout: Layout, bandwidth: float) -> str:
    ready = engine.ready
    card = torch.cuda.get_device_name() if ready.device.startswith("cuda") else ready.device
    kv_tokens = (ready.num_blocks - 1) * ready.block_size
    head = (
        f"{card}, torch {torch.__version__}, {ready.dtype}; read {bandwidth / 1e12:.3f} TB/s\n"
        f"{layout}\nweights {ready.weight_bytes / 1e9:.2f} GB, KV cache {kv_tokens} tokens"
    )
    return "\n".join((head, *ready.notes))


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--batch", default="1,16,64,128,256", show_default=True, help="BATCH or BATCH@PROMPT."
)
@click.option("--prompt", default=1024, show_default=True, help="Tokens before decoding begins.")
@click.option("--steps", default=64, show_default=True, help="Decode steps to time at each batch.")
@click.option("--prefill", default="1024,8192", show_default=True, help="Prompt lengths; '': none.")
@click.option("--prefill-runs", default=2, show_default=True)
@click.option("--tp-size", "--tp", default=1, show_default=True)
@click.option("--ep-size", "--ep", default=1, show_default=True)
@click.option("--pp-size", "--pp", default=1, show_default=True)
@click.option("--pp-rank", default=0, show_default=True, help="The stage that is measured.")
@click.option("--enable-attention-dp", is_flag=True)
@click.option("--mtp", "num_nextn", default=0, show_default=True, help="Drafts of each step.")
@click.option(
    "--accepted", default=2.82, show_default=True, help="Tokens a step, whatever the drafts are."
)
@click.option("--same-experts", is_flag=True, help="Every token takes the same ones.")
@click.option("--few-graphs", is_flag=True, help="Capture the batches that are measured alone.")
@click.option("--max-num-tokens", default=8192, show_default=True, help="Tokens in one step.")
@click.option("--load-format", type=click.Choice(["dummy", "auto"]), default="dummy")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--act-quant", type=click.Choice(["auto", "none", "fp8"]), default="auto")
@click.option("--kv-cache-dtype", type=click.Choice(["auto", "fp8"]), default="auto")
@click.option("--kv-cache-gb", default=0.0, help="0: what the largest batch needs, if it fits.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--trace", "trace_dir", type=click.Path(path_type=Path, file_okay=False))
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def main(directory: Path, **given: Any) -> None:
    """Measure the engine on the model in DIRECTORY."""
    name = given.pop("device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if (trace_dir := given["trace_dir"]) is not None:
        if name != "cuda":
            raise click.UsageError("--trace says what a GPU does; there is none")
        trace_dir.mkdir(parents=True, exist_ok=True)
    try:
        bench(directory, torch.device(name), **given)
    except (CheckpointError, Refused) as error:
        raise click.ClickException(str(error)) from error


def bench(directory: Path, device: torch.device, **given: Any) -> None:
    """Loads, measures and prints. Raises CheckpointError, or Refused for a prompt that is too long
    for the KV cache."""
    wanted, steps = points(given["batch"], given["prompt"]), given["steps"]
    prefills = [int(length) for length in given["prefill"].split(",") if length]
    layout = Layout(
        tp_size=given["tp_size"],
        ep_size=given["ep_size"],
        pp_size=given["pp_size"],
        pp_rank=given["pp_rank"],
        attention_dp=given["enable_attention_dp"],
    )
    options = {key: given[key] for key in ENGINE_OPTIONS}
    options |= {"steps": steps, "device": device.type}
    if given["same_experts"] and (layout.attention_dp or layout.ep_size > 1):
        raise click.UsageError("--same-experts: one rank would hold them all; not with EP")
    if given["few_graphs"]:
        options["cuda_graph_batch_sizes"] = tuple(sorted({point.batch for point in wanted}))
    bandwidth = read_bandwidth(device)
    engine = open_engine(directory, layout, wanted, prefills, **options)
    click.echo(describe(engine, layout, bandwidth))
    sampling = Sampling(temperature=given["temperature"], top_p=given["top_p"])
    if num_nextn := given["num_nextn"]:
        force(engine.runner, min(given["accepted"], num_nextn + 1))
    if given["same_experts"]:
        share_experts(engine.runner)
    driver = Driver(engine, sampling)
    itemsize = getattr(torch, engine.ready.dtype).itemsize
    kv = engine.runner.cache.layers[0]
    entry_bytes = kv.nbytes // kv.shape[:2].numel()
    config, same = ModelConfig.load(directory), given["same_experts"]
    floor = Floor(config, layout, itemsize, bandwidth, entry_bytes, num_nextn, same)

    click.echo(f"\n{DECODE_HEADER}{'' if given['trace_dir'] is None else BUSY_HEADER}")
    rows: list[Decode | Prefill] = []
    for point in wanted:
        rows.append(row := measure_decode(driver, point, steps, floor, given["trace_dir"]))
        click.echo(decode_line(row))
    click.echo(f"\n{PREFILL_HEADER}" if prefills else "")
    for length in prefills:
        rows.append(filled := measure_prefill(driver, length, given["prefill_runs"]))
        click.echo(prefill_line(filled))
    if (json_path := given["json_path"]) is not None:
        found = {"bandwidth": bandwidth, "rows": [dataclasses.asdict(row) for row in rows]}
        json_path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
