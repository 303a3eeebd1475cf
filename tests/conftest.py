"""Shared fixtures: a small checkpoint, and daemons to talk to."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / ".typing"), "HF_HUB_OFFLINE": "1"}
READY_TIMEOUT_S = 60


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of the true architecture, with a tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("checkpoint") / "Tiny-V3"
    maker = [sys.executable, "-P", "-m", "dsd.tools.make_checkpoint", str(directory)]
    subprocess.run(maker, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    return directory


class Daemon:
    """A `dsd serve` process and how to reach it."""

    def __init__(self, process: subprocess.Popen[bytes], runtime_dir: Path, log: Path) -> None:
        self.process = process
        self.runtime_dir = runtime_dir
        self.log = log
        self.url = ""

    @property
    def uds(self) -> str:
        return str(self.runtime_dir / "api.sock")

    def dsctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "dsd.daemon.dsctl"]
        command += ["--runtime-dir", str(self.runtime_dir), *arguments]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    def status(self) -> dict[str, Any]:
        return json.loads(self.dsctl("status", "--json").stdout)

    def find_url(self) -> str:
        """From the control socket, which answers before anything is loaded."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            result = self.dsctl("status", "--json")
            if result.returncode == 0:
                self.url = json.loads(result.stdout)["listening"][0]
                return self.url
            time.sleep(0.05)
        raise AssertionError(f"the daemon did not start:\n{self.log.read_text()}")

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if httpx.get(f"{self.url}/readyz").status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"the daemon did not become ready:\n{self.log.read_text()}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


StartDaemon = Callable[..., Daemon]


@pytest.fixture(scope="session")
def start_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartDaemon]:
    """Starts daemons on free ports; ends those that a test left running."""
    started: list[Daemon] = []

    def start(*arguments: str, wait: bool = True) -> Daemon:
        directory = tmp_path_factory.mktemp("run")
        log = directory / "log"
        command = [sys.executable, "-P", "-m", "dsd.daemon.cli", "serve", *arguments]
        command += ["--port", "0", "--runtime-dir", str(directory)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output)
        daemon = Daemon(process, directory, log)
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
def daemon(start_daemon: StartDaemon, small_checkpoint: Path) -> Daemon:
    """One daemon for all tests that leave it as they found it; float32: tokens are exact."""
    return start_daemon(str(small_checkpoint), "--dtype", "float32", "--max-num-tokens", "256")
