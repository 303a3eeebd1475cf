"""The engine's benchmark on a CPU: what it drives, what it counts, what it prints."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from dsd.ipc.messages import Sampling
from dsd.model.config import ModelConfig
from dsd.model.parallel import Layout
from dsd.model.plan import floor_bytes
from dsd.tools import bench_engine, gpu_trace
from dsd.tools.bench_engine import Driver, Point
from dsd.tools.local_engine import LocalEngine
from dsd.tools.make_checkpoint import SMALL, write_config

FIELDS: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "moe_intermediate_size": 256}
QUICK = ["--device", "cpu", "--max-num-tokens", "64", "--steps", "6"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several only wait for each other on matrices as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_config(tmp_path, FIELDS)
    return tmp_path


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 1/128 s each time it is read; a memory of 1 TB/s."""
    clock = itertools.count()
    monkeypatch.setattr(bench_engine, "perf_counter", lambda: next(clock) / 128)
    monkeypatch.setattr(bench_engine, "read_bandwidth", lambda device: 1e12)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(bench_engine.main, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_stage_is_measured_alone_and_one_that_there_is_not_is_refused(directory: Path) -> None:
    arguments = [str(directory), *QUICK, "--batch", "2", "--prompt", "20", "--prefill", "", "--pp"]
    assert "in stage 0 of 2 runs alone" in run(*arguments, "2", "--kv-cache-gb", "0.01")
    result = CliRunner().invoke(bench_engine.main, [*arguments, "2", "--pp-rank", "2"])
    assert result.exit_code == 1 and "pp_rank 2 is not one of pp_size 2" in result.output


@pytest.mark.slow
@pytest.mark.usefixtures("slow_clock")
def test_rows_hold_the_clocks_times_and_the_floor_of_the_share(directory: Path) -> None:
    path = directory / "found.json"
    batches = ["--batch", "1,5,3@40", "--prompt", "30", "--prefill", "50,100", "--tp", "2"]
    output = run(str(directory), *batches, *QUICK, "--json", str(path))
    assert "1.000 TB/s" in output and "tp_size=2" in output
    config = ModelConfig.load(directory)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["prompt"]) for row in rows[:3]] == [(1, 30), (5, 30), (3, 40)]
    for row in rows[:3]:
        assert row["median_ms"] == row["mean_ms"] == row["p99_ms"] == 1000 / 128
        assert row["tokens_per_s"] == row["batch"] * 128
        num_bytes = floor_bytes(config, Layout(tp_size=2), row["batch"], row["context"])
        assert row["floor_gb"] == pytest.approx(num_bytes / 1e9)
        assert row["floor_ms"] == pytest.approx(num_bytes / 1e9)
        assert row["of_floor"] == pytest.approx(row["floor_ms"] * 0.128)
    # A prompt of 30, its first token, 8 steps to warm up, and the mean of 6 steps.
    assert rows[0]["context"] == 30 + 1 + 8 + 2.5
    # 8 steps of 64 tokens hold 10 prompts of 50 and 5 of 100; the clock is read twice.
    assert [(row["num_prompts"], row["tokens_per_s"]) for row in rows[3:]] == [
        (10, 500 * 128),
        (5, 500 * 128),
    ]
    tables = output[output.index(bench_engine.DECODE_HEADER) :]
    assert len(tables.splitlines()) == 1 + 3 + 2 + 2


def test_two_steps_are_in_flight_and_results_come_in_order(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    engine = LocalEngine(directory, device="cpu", max_batch_size=2, load_format="dummy")
    launch, collect = engine.runner.launch, engine.runner.collect

    def launched(step: Any) -> Any:
        calls.append(("launch", step.seq))
        return launch(step)

    def collected(handle: Any) -> Any:
        output = collect(handle)
        calls.append(("collect", output.seq))
        return output

    monkeypatch.setattr(engine.runner, "launch", launched)
    monkeypatch.setattr(engine.runner, "collect", collected)
    driver = Driver(engine, Sampling(temperature=0.0))
    requests = [driver.add(20, 6), driver.add(20, 6)]
    while driver.advance() is not None:
        pass
    assert [len(request.output_ids) for request in requests] == [6, 6]
    assert calls[:5] == [
        ("launch", 1),
        ("launch", 2),
        ("collect", 1),
        ("launch", 3),
        ("collect", 2),
    ]
    assert [seq for kind, seq in calls if kind == "collect"] == list(range(1, 7))


def test_clear_ends_what_runs_and_leaves_no_block_held(directory: Path) -> None:
    engine = LocalEngine(directory, device="cpu", max_batch_size=3, load_format="dummy")
    driver = Driver(engine, Sampling(temperature=0.0))
    requests = bench_engine.start_decoding(driver, Point(3, 70), 10)
    assert driver.scheduler.stats().num_running == 3
    driver.clear(requests)
    assert driver.scheduler.stats().num_held_blocks == 0
    driver.scheduler.check()


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--batch", "1,x"], "'x' is neither"),
        (["--batch", "0"], "'0' is neither"),
        (["--batch", "8@y"], "'8@y' is neither"),
        (["--batch", "64"], "max_num_tokens 64 <= batch 64"),
        (["--batch", "1", "--trace", "traces"], "--trace"),
        (["--batch", "1", "--tp", "4"], "a rank's part"),
        (["--batch", "1", "--tp", "4", "--ep", "3"], "no multiple of ep_size 3"),
        (["--batch", "1", "--load-format", "auto"], "neither"),
        pytest.param(
            ["--batch", "8", "--prompt", "60", "--kv-cache-gb", "0.0008"],
            "too small",
            marks=pytest.mark.slow,
        ),
        (["--batch", "1", "--prompt", "600", "--kv-cache-gb", "0.0008"], "do not fit the KV cache"),
    ],
)
@pytest.mark.usefixtures("slow_clock")
def test_what_cannot_be_measured_is_one_sentence(
    directory: Path, arguments: list[str], piece: str
) -> None:
    result = CliRunner().invoke(
        bench_engine.main, [str(directory), *QUICK, "--prefill", "", *arguments]
    )
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert piece in result.output


def test_trace_busy_is_the_union_of_all_streams_and_idle_what_is_between() -> None:
    def event(category: str, start: float, length: float) -> dict[str, Any]:
        return {"cat": category, "ts": start, "dur": length, "name": "x"}

    events = [
        event("kernel", 1000.0, 100.0),
        event("kernel", 1050.0, 20.0),  # inside the first, on another stream
        event("gpu_memcpy", 1090.0, 60.0),  # 50 more
        event("gpu_user_annotation", 900.0, 5000.0),
        event("cpu_op", 0.0, 9000.0),
        {"cat": "kernel_name", "ph": "M", "name": "no time"},
        event("kernel", 1350.0, 150.0),  # after 200 idle
    ]
    busy = gpu_trace.read_trace({"traceEvents": events[::-1]}, 2)
    assert busy == (0.15, 0.1, 1.5)
    with pytest.raises(click.ClickException, match="no work"):
        gpu_trace.read_trace({"traceEvents": events[3:6]}, 2)


def test_bandwidth_of_this_machine_is_a_machines() -> None:
    """1 GB/s to 10 TB/s."""
    assert 1e9 < bench_engine.read_bandwidth(torch.device("cpu")) < 1e13
