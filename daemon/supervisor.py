"""The supervisor actor: spawns the worker, hands it what to load, and starts another when it dies.

spawn -> Hello -> Load -> Progress ... -> Ready -> (StepOutput ...) -> death -> back-off -> spawn
                                      `-> Failed (the checkpoint is at fault): give up
"""

import asyncio
import contextlib
import os
import stat
import sys
import time
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from ..ipc.channel import AsyncChannel, ChannelError
from ..ipc.messages import (
    PROTOCOL,
    Failed,
    FromWorker,
    Hello,
    Load,
    Progress,
    Ready,
    Step,
    StepOutput,
    Stop,
    ToWorker,
)
from . import logs
from .config import worker_environment, worker_socket_name
from .engine import Engine

log = logs.get("supervisor")

MAX_REBUILDS = 3
REBUILD_WINDOW_S = 600.0
STEPS_THAT_FORGIVE = 1000
"""A worker that completed so many steps had not failed at once; its death does not count."""
STOP_TIMEOUT_S = 2.0
LAST_WORDS_S = 0.2
"""A dead worker's `Failed` is in our socket by then: it does not exit before it is sent."""
WORKER_COMMAND = (sys.executable, "-P", "-m", "dsd.model.worker")


class WorkerFailed(Exception):
    """The model cannot be served; one sentence."""


class Supervisor:
    """Owns the worker process and its channel. `run` is its only task."""

    def __init__(
        self,
        load: Callable[[int], Load],
        runtime_dir: Path,
        on_progress: Callable[[Progress], None],
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self._load = load
        self._runtime_dir = runtime_dir
        self._on_progress = on_progress
        self._command = tuple(command)
        self._channel: AsyncChannel[FromWorker, ToWorker] | None = None
        self._epoch = 0
        self._deaths: deque[float] = deque()
        self.worker_pid: int | None = None
        self.rebuilds = 0

    async def send(self, step: Step) -> None:
        """To the worker. A step for a worker that has just died is dropped: its rows end or join
        again when the loss is handled."""
        if self._channel is not None:
            with contextlib.suppress(ChannelError):
                await self._channel.send(step)

    async def run(self, engine: Engine) -> None:
        """Keeps a worker alive. Raises WorkerFailed if that cannot be done."""
        while True:
            self._epoch += 1
            steps_before = engine.counters.steps
            why = await self._one_life(engine, self._epoch)
            log.error("worker lost", why=why, epoch=self._epoch)
            engine.worker_lost(f"the model's worker was lost ({why})")
            self._count_death(engine.counters.steps - steps_before, why)
            self.rebuilds += 1
            await asyncio.sleep(min(5.0, 0.1 * 2 ** len(self._deaths)))

    def _count_death(self, steps: int, why: str) -> None:
        if steps >= STEPS_THAT_FORGIVE:
            self._deaths.clear()
            return
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - REBUILD_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > MAX_REBUILDS:
            raise WorkerFailed(
                f"the worker was lost {len(self._deaths)} times in {REBUILD_WINDOW_S:.0f} s "
                f"({why}); giving up"
            )

    async def _one_life(self, engine: Engine, epoch: int) -> str:
        """From spawn to death; returns why it died."""
        path = self._runtime_dir / worker_socket_name(epoch)
        address = f"ipc://{path}"
        channel = AsyncChannel[FromWorker, ToWorker](address, FromWorker)
        process: Process | None = None
        failed = False
        try:
            spawning = asyncio.ensure_future(self._spawn(address))
            try:
                process = await asyncio.shield(spawning)
            except asyncio.CancelledError:
                process = await spawning  # it may run already, and must be ended
                raise
            self._channel, self.worker_pid = channel, process.pid
            why = await self._watch(process, channel, engine, epoch)
            failed = True
            return why
        finally:
            self._channel, self.worker_pid = None, None
            try:
                if process is not None:
                    polite = engine.ready is not None and not failed
                    await self._end(process, channel, epoch, polite)
            finally:
                channel.close()
                path.unlink(missing_ok=True)

    async def _spawn(self, address: str) -> Process:
        return await asyncio.create_subprocess_exec(
            *self._command,
            address,
            "0",
            stdin=asyncio.subprocess.PIPE,
            env=worker_environment(),
        )

    async def _watch(
        self,
        process: Process,
        channel: AsyncChannel[FromWorker, ToWorker],
        engine: Engine,
        epoch: int,
    ) -> str:
        """Until the worker dies, says that it failed, or breaks the protocol; returns which."""
        reader = asyncio.ensure_future(self._read(channel, engine, epoch))
        death = asyncio.ensure_future(process.wait())
        broken = asyncio.ensure_future(engine.wait_broken())
        tasks = {reader, death, broken}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self._channel = None
            if broken.done():
                return broken.result()
            if not reader.done():
                await asyncio.wait({reader}, timeout=LAST_WORDS_S)
            return reader.result() if reader.done() else _how_it_died(process)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(
        self, channel: AsyncChannel[FromWorker, ToWorker], engine: Engine, epoch: int
    ) -> str:
        """Hands on what the worker says, until it says that it failed or breaks the protocol."""
        try:
            while True:
                why = await self._hand_on(await channel.receive(), channel, engine, epoch)
                if why is not None:
                    return why
        except ChannelError as error:
            return str(error)

    async def _hand_on(
        self,
        message: FromWorker,
        channel: AsyncChannel[FromWorker, ToWorker],
        engine: Engine,
        epoch: int,
    ) -> str | None:
        """Why the worker must go, if it must."""
        match message:
            case StepOutput():
                engine.step_done(message)
            case Progress():
                self._on_progress(message)
            case Hello():
                if message.protocol not in (PROTOCOL, PROTOCOL - 1):
                    raise WorkerFailed(
                        f"the worker speaks protocol {message.protocol}, not {PROTOCOL}"
                    )
                await channel.send(self._load(epoch))
            case Ready():
                if min(message.max_batch_size, message.max_num_tokens, message.max_seq_len) < 1:
                    raise ChannelError(f"a worker without room: {message}")
                if message.num_blocks < 2 or message.block_size < 1:
                    raise ChannelError(f"a worker without a KV cache: {message}")
                if message.num_nextn < 0:
                    raise ChannelError(f"a worker with {message.num_nextn} drafts")
                engine.worker_ready(message)
            case Failed():
                if message.user_error:
                    raise WorkerFailed(message.message)
                return message.message
        return None

    async def _end(
        self,
        process: Process,
        channel: AsyncChannel[FromWorker, ToWorker],
        epoch: int,
        polite: bool,
    ) -> None:
        """Asks a worker that serves, then insists. It ends by itself too when its standard input
        closes, as it does when this process dies."""
        try:
            if polite and process.returncode is None:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    with contextlib.suppress(ChannelError):
                        await channel.send(Stop(epoch))
                    await process.wait()
        except TimeoutError:
            log.warning("the worker does not stop; killing it", pid=process.pid)
        finally:
            await _reap(process)


async def _reap(process: Process) -> None:
    """Kills what still runs and waits for its end, which is soon; a cancellation waits too."""
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is None:
        process.kill()
    dying = asyncio.ensure_future(process.wait())
    try:
        await asyncio.shield(dying)
    except asyncio.CancelledError:
        await dying
        raise


def _how_it_died(process: Process) -> str:
    code = process.returncode
    if code is None:
        return "it stopped answering"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def prepare_runtime_dir(path: Path) -> None:
    """Makes the directory of the sockets, for this user alone; one that exists must be this user's,
    and no link. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.lstat()
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise PermissionError(13, "is not a directory of this user", str(path))
