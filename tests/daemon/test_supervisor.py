"""The supervisor with workers that misbehave."""

import asyncio
import sys
from pathlib import Path

import pytest

from dsd.daemon.config import EngineConfig
from dsd.daemon.engine import Engine
from dsd.daemon.supervisor import Supervisor
from dsd.ipc.messages import Load, Progress, StepOutput

LINGERS = """
import sys, time
from dsd.ipc.channel import BlockingChannel
from dsd.ipc.messages import Failed, ToWorker
channel = BlockingChannel(sys.argv[1], ToWorker)
channel.send(Failed(1, "it failed", user_error=False))
time.sleep(60)
"""
READY = """
import sys
from dsd.ipc.channel import BlockingChannel
from dsd.ipc.messages import *
channel = BlockingChannel(sys.argv[1], ToWorker)
channel.send(Hello(PROTOCOL, 1, 0))
load = channel.receive()
channel.send(Ready(load.epoch, "cpu", "float32", 100, 4, 16, 64, 9, 16, 1, 1))
while not isinstance(channel.receive(), Stop):
    pass
"""


def _load(epoch: int) -> Load:
    return Load(epoch, "", "cpu", "auto", "none", 4, 16, 64, 16, 0.0, 0.9)


def _ignore(_: Progress) -> None:
    pass


def _supervisor(directory: Path, script: str) -> tuple[Supervisor, Engine]:
    command = (sys.executable, "-P", "-c", script)
    supervisor = Supervisor(_load, directory, _ignore, command)
    return supervisor, Engine(EngineConfig(), 8, supervisor.send)


@pytest.fixture
def source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the package where this test found it."""
    root = Path(__file__).resolve().parents[2] / ".typing"
    monkeypatch.setenv("PYTHONPATH", str(root))


def test_stop_while_a_failed_worker_lingers_ends_at_once(tmp_path: Path, source_tree) -> None:
    async def scenario() -> None:
        supervisor, engine = _supervisor(tmp_path, LINGERS)
        task = asyncio.ensure_future(supervisor.run(engine))
        async with asyncio.timeout(20):
            while supervisor.worker_pid is None:
                await asyncio.sleep(0.01)
            while supervisor.worker_pid is not None:  # it has said that it failed
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled()

    asyncio.run(scenario())


def test_result_that_fits_no_step_costs_the_worker_not_the_daemon(
    tmp_path: Path, source_tree
) -> None:
    async def scenario() -> None:
        supervisor, engine = _supervisor(tmp_path, READY)
        tasks = [asyncio.ensure_future(engine.run()), asyncio.ensure_future(supervisor.run(engine))]
        async with asyncio.timeout(20):
            await engine.wait_ready()
            assert engine.ready is not None
            first = engine.ready.epoch
            engine.step_done(StepOutput(first, 7, b""))
            while engine.ready is None or engine.ready.epoch == first:
                await asyncio.sleep(0.01)
        assert not any(task.done() for task in tasks)
        assert supervisor.rebuilds == 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
