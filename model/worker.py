"""Process main of one worker: the only file that knows both `ipc` and torch.

    python -m dsd.model.worker ADDRESS RANK

Loads what the daemon names, then turns Steps into StepOutputs, one after the other. It lives as
long as its standard input is open: when the daemon dies, however it dies, the pipe closes and the
worker exits.
"""

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque

from ..ipc.channel import BlockingChannel
from ..ipc.messages import (
    PROTOCOL,
    Failed,
    FromWorker,
    Hello,
    Load,
    Progress,
    Step,
    Stop,
    ToWorker,
)
from ..kernels.compilations import compilations
from .build import build
from .config import CheckpointError
from .runner import InFlight, Runner

Channel = BlockingChannel[ToWorker, FromWorker]
PROGRESS_INTERVAL_S = 0.1
POLL_INTERVAL_S = 20e-6
"""Between looks at the device and at the socket while a step runs."""
TIMER_SLACK_NS = 1000
PR_SET_TIMERSLACK = 29


def main() -> None:
    """Connects, loads, and works until told to stop."""
    address, rank = sys.argv[1], int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):  # to the whole group: the daemon's to handle
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_daemon, name="daemon-watch", daemon=True).start()
    with BlockingChannel[ToWorker, FromWorker](address, ToWorker) as channel:
        channel.send(Hello(PROTOCOL, os.getpid(), rank))
        load = channel.receive()
        if isinstance(load, Stop):
            return  # the daemon ends before it has begun
        assert isinstance(load, Load), load
        try:
            runner, ready = build(load, Reporter(channel, load.epoch))
        except CheckpointError as error:
            channel.send(Failed(load.epoch, str(error), user_error=True))
            return
        except OSError as error:
            message = f"{error.filename or load.model_dir} cannot be read: {error.strerror}"
            channel.send(Failed(load.epoch, message, user_error=True))
            return
        except (RuntimeError, MemoryError) as error:  # torch's way to say: out of memory
            traceback.print_exc()
            channel.send(Failed(load.epoch, _does_not_fit(load, error), user_error=True))
            return
        channel.send(ready)
        _wake_in_time()
        serve(channel, runner)


def _does_not_fit(load: Load, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"the model cannot be set up with max_batch_size {load.max_batch_size}, max_num_tokens "
        f"{load.max_num_tokens}, max_seq_len {load.max_seq_len} and kv_cache_gb "
        f"{load.kv_cache_gb} (0: chosen here), kv_host_cache_gb {load.kv_host_cache_gb} and "
        f"num_nextn {load.num_nextn}: {reason}"
    )


def serve(channel: Channel, runner: Runner) -> None:
    """Runs steps in order until Stop. On a GPU a step is launched as soon as it arrives, also while
    those before it still run; results leave in order, as they end."""
    in_flight: deque[InFlight] = deque()
    try:
        while True:
            if in_flight and in_flight[0].done():
                channel.send(runner.collect(in_flight[0]))
                in_flight.popleft()
            elif in_flight and not channel.has_message():
                time.sleep(POLL_INTERVAL_S)
            else:
                message = channel.receive()
                if isinstance(message, Stop):
                    break
                assert isinstance(message, Step), message
                in_flight.append(_launch(runner, message))
        for launched in in_flight:
            channel.send(runner.collect(launched))
    except RuntimeError:  # a GPU says so late: any of the steps under way may be the one
        for launched in in_flight:
            print(f"under way: {describe(launched.step)}", file=sys.stderr)
        raise


def _launch(runner: Runner, step: Step) -> InFlight:
    before = compilations().compiled
    try:
        launched = runner.launch(step)
    except RuntimeError:
        print(f"cannot be launched: {describe(step)}", file=sys.stderr)
        raise
    if compilations().compiled > before:  # everybody waited for it
        print(f"compiled a kernel that was not rehearsed: {describe(step)}", file=sys.stderr)
    return launched


def describe(step: Step) -> str:
    """The shapes of a step, for the log of a failure."""
    chunks = ", ".join(f"{chunk.start}+{chunk.num_tokens}" for chunk in step.chunks)
    graph = f", padded to {step.padded_size}" if not step.chunks else ""
    return (
        f"step {step.seq}: {len(step.decodes) // 4} decodes{graph}, chunks [{chunks}], "
        f"{step.num_drafts} drafts verified, {step.num_next_drafts} made, "
        f"{len(step.offloads)} blocks to the host, {len(step.restores)} back"
    )


class Reporter:
    """Progress to the daemon, a few times a second."""

    def __init__(self, channel: Channel, epoch: int) -> None:
        self._channel = channel
        self._epoch = epoch
        self._last = 0.0
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """How much of a stage is done; every new stage is news."""
        now = time.monotonic()
        if stage != self._stage or done == total or now - self._last >= PROGRESS_INTERVAL_S:
            self._last, self._stage = now, stage
            self._channel.send(Progress(self._epoch, stage, done, total))


def _wake_in_time() -> None:
    """Sleeps of microseconds: Linux rounds them up to 50 if nobody says otherwise."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)


def _exit_with_daemon() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
