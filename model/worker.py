"""Process main of one worker: the only file that knows both `ipc` and torch.

    python -m dsd.model.worker ADDRESS RANK

Loads what the daemon names, then turns Steps into StepOutputs, one after the other. It lives as
long as its standard input is open: when the daemon dies, however it dies, the pipe closes and the
worker exits.
"""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from ..ipc.channel import BlockingChannel
from ..ipc.messages import (
    PROTOCOL,
    Failed,
    FromWorker,
    Hello,
    Load,
    Progress,
    Ready,
    Step,
    Stop,
    ToWorker,
)
from . import kv_cache, loader
from .config import CheckpointError, ModelConfig
from .deepseek import DeepseekV3
from .parallel import WHOLE, Layout
from .rows import Rows
from .runner import Runner

Channel = BlockingChannel[ToWorker, FromWorker]
PROGRESS_INTERVAL_S = 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}


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
        serve(channel, runner)


def _does_not_fit(load: Load, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"the model cannot be set up with max_batch_size {load.max_batch_size}, max_num_tokens "
        f"{load.max_num_tokens}, max_seq_len {load.max_seq_len} and kv_cache_gb "
        f"{load.kv_cache_gb} (0: chosen here): {reason}"
    )


def serve(channel: Channel, runner: Runner) -> None:
    """Runs steps in order until Stop."""
    while True:
        message = channel.receive()
        if isinstance(message, Stop):
            return
        assert isinstance(message, Step), message
        channel.send(runner.run(message))


def build(load: Load, report: "Reporter", layout: Layout = WHOLE) -> tuple[Runner, Ready]:
    """Everything between Load and Ready. Raises CheckpointError.

    A share of a TP layout runs alone, without its exchanges: for measurements.
    """
    if (layout.ep_size, layout.pp_size) != (1, 1):
        raise CheckpointError(
            f"ep_size {layout.ep_size}, pp_size {layout.pp_size}: "
            "this version computes shares of a TP layout only"
        )
    model_dir = Path(load.model_dir)
    config = ModelConfig.load(model_dir)
    device = _device(load.device)
    dtype = DTYPES[config.dtype if load.dtype == "auto" else load.dtype]
    max_seq_len = load.max_seq_len or config.max_position_embeddings
    if max_seq_len > config.max_position_embeddings:
        raise CheckpointError(
            f"max_seq_len {max_seq_len} is more than the checkpoint's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    max_batch_size, max_num_tokens = _batch_limits(load, device)
    act_quant = load.act_quant == "fp8" or (load.act_quant == "auto" and device.type == "cuda")
    if load.load_format == "dummy":
        weights = loader.dummy(config, layout, dtype, device)
    else:
        weights = loader.load(config, model_dir, dtype, device, report.bytes_done, layout)
    config = layout.local(config)
    report.stage("building")
    model = DeepseekV3(config, weights, dtype, max_seq_len, act_quant)
    num_blocks = kv_cache.choose_num_blocks(
        config,
        load.block_size,
        dtype,
        device,
        max_batch_size,
        max_seq_len,
        load.kv_cache_gb,
        load.kv_cache_free_gpu_memory_fraction,
    )
    cache = kv_cache.KVCache(config, num_blocks, load.block_size, dtype, device)
    rows = Rows(max_batch_size, max_seq_len, load.block_size, device)
    ready = Ready(
        epoch=load.epoch,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        num_blocks=num_blocks,
        block_size=load.block_size,
        num_parameters=sum(w.numel() for n, w in weights.items() if not n.endswith(".scale")),
        weight_bytes=sum(weight.nbytes for weight in weights.values()),
        notes=_notes(config, load, act_quant, device),
    )
    return Runner(model, cache, rows), ready


class Reporter:
    """Progress to the daemon, a few times a second."""

    def __init__(self, channel: Channel | None, epoch: int) -> None:
        self._channel = channel
        self._epoch = epoch
        self._last = 0.0
        self._stage = "loading"

    def stage(self, name: str) -> None:
        self._stage = name
        self._send(0, 0)

    def bytes_done(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= PROGRESS_INTERVAL_S:
            self._last = now
            self._send(done, total)

    def _send(self, done: int, total: int) -> None:
        if self._channel is not None:
            self._channel.send(Progress(self._epoch, self._stage, done, total))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError("device cuda was asked for, but this machine has no usable GPU")
    return torch.device(name)


def _batch_limits(load: Load, device: torch.device) -> tuple[int, int]:
    """max_batch_size and max_num_tokens, chosen for the device where nobody named them."""
    batch_size, num_tokens = (256, 8192) if device.type == "cuda" else (32, 512)
    batch_size = load.max_batch_size or min(batch_size, load.max_num_tokens or batch_size)
    return batch_size, load.max_num_tokens or max(num_tokens, batch_size)


def _notes(
    config: ModelConfig, load: Load, act_quant: bool, device: torch.device
) -> tuple[str, ...]:
    notes = []
    if load.load_format == "dummy":
        notes.append("load_format is dummy: the weights are random, and so are the answers")
    if config.fp8:
        notes.append(
            "activations are quantised 1x128 and multiplied in fp8"
            if act_quant
            else "fp8 weights are dequantised as they are used"
        )
    if config.kv_cache_fp8:
        notes.append("hf_quant_config.json asks for an fp8 KV cache; it is kept unquantised")
    if config.num_nextn_predict_layers:
        notes.append("the MTP layers of the checkpoint are not used by this version")
    notes.append(
        "this version has no CUDA graphs: use_cuda_graph, cuda_graph_padding_enabled and "
        "cuda_graph_batch_sizes have no effect"
    )
    if device.type == "cpu":
        notes.append(f"the model runs on {torch.get_num_threads()} CPU threads")
    return tuple(notes)


def _exit_with_daemon() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
