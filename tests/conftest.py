"""Shared fixtures: a small checkpoint, and daemons to talk to."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import psutil
import pytest

from dsd.daemon.dsctl import ask

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT / ".typing"),
    "HF_HUB_OFFLINE": "1",
    # Threads of several workers that spin for the same cores are ten times slower than one each.
    "OMP_NUM_THREADS": "1",
}
READY_TIMEOUT_S = 60
DSD = (sys.executable, "-P", "-m", "dsd.daemon.cli")
FAKE_DSD = (sys.executable, "-P", str(ROOT / "tests" / "fake_daemon.py"))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the true architecture, with a tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("checkpoint") / "Tiny-V3"
    maker = [sys.executable, "-P", "-m", "dsd.tools.make_checkpoint", str(directory)]
    subprocess.run(maker, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return directory


class Daemon:
    """A `dsd serve` process and how to reach it."""

    def __init__(
        self, process: subprocess.Popen[bytes], runtime_dir: Path, log: Path, started: float
    ) -> None:
        self.process = process
        self.runtime_dir = runtime_dir
        self.log = log
        self.started = started
        """Monotonic moment before the process was spawned."""
        self.url = ""

    @property
    def uds(self) -> str:
        return str(self.runtime_dir / "api.sock")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def dsctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "dsd.daemon.dsctl"]
        command += ["--runtime-dir", str(self.runtime_dir), *arguments]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    def ask(self, command: str) -> dict[str, Any]:
        """What dsctl asks, without the cost of its process. Raises click.ClickException."""
        return ask(self.runtime_dir / "control.sock", command)

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    @property
    def worker_pid(self) -> int:
        return int(self.status()["ranks"][0]["pid"])

    def find_url(self) -> str:
        """From the control socket, which answers before anything is loaded."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.url = self.status()["listening"][0]
            except click.ClickException:
                time.sleep(0.02)
            else:
                return self.url
        raise AssertionError(f"the daemon did not start:\n{self.log.read_text()}")

    def is_ready(self) -> bool:
        return httpx.get(f"{self.url}/readyz").status_code == 200

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.is_ready():
                return
            time.sleep(0.03)
        raise AssertionError(f"the daemon did not become ready:\n{self.log.read_text()}")

    def held_blocks(self) -> int:
        return int(self.status()["kv_cache"]["held"])

    def wait_idle(self, timeout_s: float = 10.0) -> float:
        """Until no block is held; returns how long that took."""
        start = time.monotonic()
        while (status := self.status())["kv_cache"]["held"] or status["requests"]["running"]:
            assert time.monotonic() - start < timeout_s, status
            time.sleep(0.01)
        return time.monotonic() - start

    def assert_clean(self) -> None:
        """Idle, and no block is lost."""
        self.wait_idle()
        status = self.status()
        kv, requests = status["kv_cache"], status["requests"]
        assert kv["held"] + kv["cached"] + kv["free"] == kv["num_blocks"]
        assert (requests["running"], requests["waiting"]) == (0, 0)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


StartDaemon = Callable[..., Daemon]


def _starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    started: list[Daemon] = []

    def start(
        *arguments: str,
        wait: bool = True,
        command: tuple[str, ...] = DSD,
        runtime_dir: Path | None = None,
        worker: dict[str, Any] | None = None,
    ) -> Daemon:
        directory = tmp_path_factory.mktemp("run")
        log = directory / "log"
        line = [*command, "serve", *arguments]
        line += ["--port", "0", "--runtime-dir", str(runtime_dir or directory)]
        environment = {**ENVIRONMENT, "FAKE_WORKER": json.dumps(worker or {})}
        before = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(line, env=environment, stdout=output, stderr=output)
        daemon = Daemon(process, runtime_dir or directory, log, before)
        started.append(daemon)
        daemon.find_url()
        if wait:
            daemon.wait_ready()
        return daemon

    yield start
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()


@pytest.fixture(scope="session")
def start_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Starts daemons on free ports; ends those that a test left running."""
    yield from _starter(tmp_path_factory)


@pytest.fixture(scope="session")
def daemon(start_daemon: StartDaemon, small_checkpoint: Path) -> Daemon:
    """One daemon for all tests that leave it as they found it; float32: tokens are exact."""
    return start_daemon(str(small_checkpoint), "--dtype", "float32", "--max-num-tokens", "256")


@pytest.fixture
def start_fake(
    tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path
) -> Iterator[StartDaemon]:
    """Starts daemons whose worker is `fake_worker.py`; `worker={...}` are its options."""
    starter = _starter(tmp_path_factory)
    start = next(starter)

    def start_fake(*arguments: str, **options: Any) -> Daemon:
        return start(str(small_checkpoint), *arguments, command=FAKE_DSD, **options)

    yield start_fake
    for _ in starter:
        pass


@pytest.fixture(scope="module")
def fake_daemon(start_daemon: StartDaemon, small_checkpoint: Path) -> Iterator[Daemon]:
    """One daemon with a fake worker of 20 ms steps, for a module's tests."""
    daemon = start_daemon(str(small_checkpoint), command=FAKE_DSD, worker={"step_s": 0.02})
    yield daemon
    assert daemon.stop() == 0, daemon.log.read_text()
