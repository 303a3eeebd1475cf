"""How fast the GPU kernels are, against the card's ceilings measured in the same run.

    python -m dsd.tools.bench_kernels [--family gemm] [--filter 'dense m=16 '] [--json FILE]

Each case is one CUDA graph with a call for each of its rotated sets of tensors, replayed: the
median of 7 times, and the least and the greatest. floor: the larger of bytes / read bandwidth and
operations / matmul rate; `of floor` is floor / time. A peer's time is from ANCHORS.md, not from
this run.
"""

import argparse
import importlib
import json
import pkgutil
import statistics
from pathlib import Path

import torch
import triton
import triton.language as tl

from . import kernel_cases
from .kernel_cases import BenchCase, Run

GROUPS = 7
GROUP_US = 4000.0
"""A timed group of replays takes about this long."""
READ_BYTES = 2 << 30
READ_BLOCK = 8192
SQUARE = 8192


@triton.jit
def read_kernel(x, out, num_blocks, BLOCK: tl.constexpr):  # noqa: N803
    """Adds up int32 words, so that they must be read."""
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    at = tl.arange(0, BLOCK)
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        total += tl.load(x + block.to(tl.int64) * BLOCK + at)
    tl.store(out + tl.program_id(0), tl.sum(total))


def time_graph(run: Run, calls: int) -> list[float]:
    """us of one call, GROUPS times. `run` is called once for each of `calls` before."""
    for i in range(calls):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeat = max(1, 8 // calls)
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for i in range(calls):
                run(i)
    once = time_replays(graph, 1)
    replays = max(1, min(200, round(GROUP_US / once)))
    return [time_replays(graph, replays) / (repeat * calls) for _ in range(GROUPS)]


def time_replays(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """us of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / replays


def read_rate() -> float:
    """Bytes/us of reading device memory: what this card does today."""
    words = torch.ones(READ_BYTES // 4, device="cuda", dtype=torch.int32)
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    sums = torch.empty(8 * sms, device="cuda", dtype=torch.int32)
    blocks = words.numel() // READ_BLOCK

    def read(i: int) -> None:
        read_kernel[(8 * sms,)](words, sums, blocks, BLOCK=READ_BLOCK, num_warps=8)

    return READ_BYTES / min(time_graph(read, 1))


def ceilings() -> dict[str, float]:
    """bytes/us of reading, and operations/us of matmuls."""
    found = {"bytes": read_rate()}
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * SQUARE**3
    found["bf16"] = operations / min(time_graph(lambda i: torch.mm(a, b), 1))
    if torch.cuda.get_device_capability() >= (8, 9):
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")

        def multiply(i: int) -> torch.Tensor:
            return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        found["fp8"] = operations / min(time_graph(multiply, 1))
    found["none"] = float("inf")
    return found


def measure(case: BenchCase, ceiling: dict[str, float]) -> dict[str, object]:
    times = time_graph(case.build(), case.rotate)
    us = statistics.median(times)
    by_bytes, by_flops = case.bytes / ceiling["bytes"], case.flops / ceiling[case.flop_kind]
    floor = max(by_bytes, by_flops)
    return {
        "case": case.name,
        "us": round(us, 2),
        "min_us": round(min(times), 2),
        "max_us": round(max(times), 2),
        "tflops": round(case.flops / us / 1e6, 1),
        "gb_per_s": round(case.bytes / us / 1e3, 1),
        "floor_us": round(floor, 2),
        "bound": "bytes" if by_bytes >= by_flops else case.flop_kind,
        "of_floor": round(floor / us, 3),
        "peer_us": case.peer_us,
        "of_peer": None if case.peer_us is None else round(us / case.peer_us, 2),
    }


HEADER = (
    f"{'case':44} {'us':>8} {'[min, max]':>20} {'TFLOP/s':>8} {'GB/s':>7} {'floor':>8} "
    f"{'bound':>5} {'of floor':>8} {'peer':>8} {'of peer':>7}"
)


def line(row: dict[str, object]) -> str:
    span = f"[{row['min_us']}, {row['max_us']}]"
    peer = ("", "") if row["peer_us"] is None else (row["peer_us"], row["of_peer"])
    return (
        f"{row['case']:44} {row['us']:8} {span:>20} {row['tflops']:8} {row['gb_per_s']:7} "
        f"{row['floor_us']:8} {row['bound']:>5} {row['of_floor']:8.0%} {peer[0]:>8} {peer[1]:>7}"
    )


def families() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(kernel_cases.__path__)]


def main() -> None:
    """Prints a table; with --json writes the same to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", action="append", choices=families(), help="all by default")
    parser.add_argument("--filter", action="append", default=[], help="part of the case's name")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels needs a GPU")
    ceiling = ceilings()
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}")
    rates = ", ".join(
        f"{kind} {rate / 1e6:.0f} T/s" for kind, rate in ceiling.items() if kind[0] in "bf"
    )
    print(f"ceilings: {rates}\n{HEADER}")
    rows = []
    for family in options.family or families():
        for case in importlib.import_module(f"{kernel_cases.__name__}.{family}").cases():
            if options.filter and not any(part in case.name for part in options.filter):
                continue
            rows.append({"family": family, **measure(case, ceiling)})
            print(line(rows[-1]), flush=True)
    if options.json:
        del ceiling["none"]
        found = {"card": card, "ceilings_per_us": ceiling, "cases": rows}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
