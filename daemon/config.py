"""`Config`: what the operator wants. From a TOML file, then flags over it; frozen afterwards.

Each component takes its own section. This is the only file that reads the environment.
"""

import os
import re
import tempfile
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(gt=0.0, le=1.0)]
Seconds = Annotated[float, Meta(gt=0.0, le=604800.0)]
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket path on Linux."""
MAX_EPOCH = 99999


class ConfigError(Exception):
    """The configuration cannot be used; one sentence that names file, line or field."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Unknown keys are refused."""


class ServerConfig(_Section, frozen=True):
    """Where and as what the daemon serves."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """0: any free port; the log names it."""
    uds: str = ""
    """Unix socket of the same HTTP API; empty: api.sock in `runtime_dir`."""
    runtime_dir: str = ""
    """Directory of the sockets; empty: systemd's, else a directory of this user's."""
    served_model_name: tuple[str, ...] = ()
    """Names that requests may use; empty: the directory's name."""
    max_queued_requests: Positive = 1024
    """Sequences that may wait; more are refused with 429."""
    drain_timeout_s: Seconds = 300.0


class ModelSection(_Section, frozen=True):
    """Which checkpoint, and how it is computed."""

    model_dir: str = ""
    """Empty: the model that comes with dsd."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    act_quant: Literal["auto", "none", "fp8"] = "auto"
    """Whether activations are quantised 1x128 before fp8 weights; auto: on a GPU."""
    max_seq_len: NotNegative = 0
    """0: the checkpoint's max_position_embeddings."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: the checkpoint's safetensors; dummy: random weights, for measurements."""


class EngineConfig(_Section, frozen=True):
    """Batching and memory. 0 means: chosen for the machine, and logged."""

    max_batch_size: NotNegative = 0
    max_num_tokens: NotNegative = 0
    max_itl_ms: Annotated[float, Meta(ge=0.0, le=60000.0)] = 0.0
    """Goal for the time between two tokens of a sequence while prompts are computed; 0: none."""
    block_size: Literal[16, 32, 64, 128] = 64
    kv_cache_gb: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    kv_cache_free_gpu_memory_fraction: Fraction = 0.9
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    kv_host_cache_gb: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    """Host memory for KV blocks that the GPU has no room for; here 0 means none."""
    enable_overlap_scheduler: bool = True
    """Plan step n + 1 before the result of step n is known."""
    use_cuda_graph: bool = True
    cuda_graph_padding_enabled: bool = True
    cuda_graph_batch_sizes: tuple[Positive, ...] = ()
    print_iter_log: bool = False
    check_numerics: bool = False
    """Look for NaN in every layer of every step; slow."""
    fp8_gemm: Literal["auto", "triton", "torch"] = "auto"
    num_nextn: Annotated[int, Meta(ge=0, le=5)] = 0
    """Most tokens that the MTP layer drafts for a sequence in a step; 0: off."""
    num_nextn_by_batch_size: tuple[tuple[Positive, NotNegative], ...] = ((8, 5), (64, 3), (256, 1))
    """(largest number of decoding sequences, most drafts); none above the last."""
    relaxed_topk: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Inside <think> a draft among so many best tokens is accepted; 0: drafts change no token."""
    relaxed_delta: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.6
    """How much less likely than the best token such a draft may be."""


class ParallelConfig(_Section, frozen=True):
    """How the model is spread over GPUs."""

    tp_size: Positive = 1
    ep_size: Positive = 1
    pp_size: Positive = 1
    enable_attention_dp: bool = False


class LogConfig(_Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"
    """auto: console on a terminal, else JSON lines."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything, by section. Sections and keys are those of the TOML file."""

    server: ServerConfig = ServerConfig()
    model: ModelSection = ModelSection()
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()


RELOADABLE = {
    ("server", "served_model_name"),
    ("server", "max_queued_requests"),
    ("server", "drain_timeout_s"),
    ("engine", "max_itl_ms"),
    ("engine", "print_iter_log"),
    ("log", "level"),
}
"""What `dsctl reload` changes in place."""

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "tools" / "tiny" / "dsd-tiny"
"""The small trained model that comes with dsd."""

Overrides = dict[str, dict[str, Any]]
"""section -> key -> value, as flags give them."""


def load(path: Path | None, overrides: Overrides) -> Config:
    """The file (if any) with the overrides over it. Raises ConfigError."""
    fields: dict[str, Any] = {} if path is None else _read_toml(path)
    for section, values in overrides.items():
        table = fields.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(_locate(path, f"expected a table at `$.{section}`"))
        table.update(values)
    try:
        config = msgspec.convert(fields, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_locate(path, str(error))) from error
    _check(config)
    return config


def model_dir(model: ModelSection) -> Path:
    """The checkpoint's directory; where nobody named one, the model that comes with dsd."""
    return Path(model.model_dir) if model.model_dir else SHIPPED_MODEL


def changes(old: Config, new: Config) -> list[tuple[str, str]]:
    """(section, key) of everything that differs."""
    return [
        (section, key)
        for section in Config.__struct_fields__
        for key in getattr(old, section).__struct_fields__
        if getattr(getattr(old, section), key) != getattr(getattr(new, section), key)
    ]


def _check(config: Config) -> None:
    parallel = config.parallel
    # Of dummy weights rank 0's share runs alone, for measurements, if it has a head to sample with.
    dummy = config.model.load_format == "dummy"
    for name in ("pp_size",) if dummy else ("tp_size", "ep_size", "pp_size"):
        if (size := getattr(parallel, name)) != 1:
            raise ConfigError(f"{name} is {size}; this version runs on one rank")
    if parallel.enable_attention_dp and not dummy:
        raise ConfigError("enable_attention_dp is true; this version runs on one rank")
    batch, tokens = config.engine.max_batch_size, config.engine.max_num_tokens
    if batch and tokens and tokens < batch:
        raise ConfigError(f"max_num_tokens {tokens} is less than max_batch_size {batch}")
    sizes = [size for size, _ in config.engine.num_nextn_by_batch_size]
    if any(size >= larger for size, larger in pairwise(sizes)):
        raise ConfigError(f"num_nextn_by_batch_size: the batch sizes {sizes} do not rise")
    if config.engine.relaxed_topk and not config.engine.num_nextn:
        raise ConfigError(
            f"relaxed_topk is {config.engine.relaxed_topk}, but num_nextn is 0: there are no drafts"
        )
    server = config.server
    worker_socket = runtime_dir(server) / worker_socket_name(MAX_EPOCH)
    for path in (api_socket(server), control_socket(server), worker_socket):
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"the socket path {path} has {len(os.fsencode(path))} bytes; "
                f"Linux allows {MAX_SOCKET_PATH}"
            )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _locate(path: Path | None, message: str) -> str:
    """Adds file and line to msgspec's message, which names a field in one of two ways."""
    if path is None:
        return message
    place = re.search(r"`\$\.([\w.]+)", message)
    unknown = re.search(r"unknown field `([^`]+)`", message)
    names = [*(place.group(1).split(".") if place else ()), *(unknown.groups() if unknown else ())]
    wanted = (names[0], names[1] if len(names) > 1 else "") if names else ("", "")
    section = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if header := re.match(r"\s*\[+\s*([\w-]+)", line):
            section = header.group(1)
        key = re.match(r"\s*\"?([\w-]+)\"?\s*=", line)
        found = (section, key.group(1) if key else "") if section or not key else (key.group(1), "")
        if found == wanted:
            return f"{path}, line {number}: {message}"
    return f"{path}: {message}"


# ---- the environment ----------------------------------------------------------------------------


def runtime_dir(server: ServerConfig) -> Path:
    """Where the sockets are: the configured directory, systemd's, or one of this user's."""
    if server.runtime_dir:
        return Path(server.runtime_dir)
    if under_systemd := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(under_systemd.split(":")[0])
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "dsd"
    return Path(tempfile.gettempdir()) / f"dsd-{os.geteuid()}"


def api_socket(server: ServerConfig) -> Path:
    return Path(server.uds) if server.uds else runtime_dir(server) / "api.sock"


def control_socket(server: ServerConfig) -> Path:
    return runtime_dir(server) / "control.sock"


def worker_socket_name(epoch: int) -> str:
    """Of one life of the worker, in the runtime directory."""
    return f"worker-0.{epoch}.sock"


def worker_environment() -> dict[str, str]:
    """What workers are started with. OpenMP's threads spin while they wait for each other; where
    others want the cores too, its default (for ever) makes a small model four times slower."""
    return {
        "GOMP_SPINCOUNT": "20000",
        # Else what the largest steps leave behind is in pieces of the wrong size.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
    }


def notify_socket() -> str | None:
    """systemd's, if it waits for this process."""
    return os.environ.get("NOTIFY_SOCKET")
