"""Command-line flags of `dsd`: our names, the guide's, and where each one goes in `Config`.

Dashes and underscores are the same (`normalise`), and so are the long and the short form of a flag.
A flag that is not given leaves the file's value alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import yaml

from .config import ConfigError, Overrides

F = TypeVar("F", bound=Callable[..., Any])


class Flag(NamedTuple):
    names: tuple[str, ...]
    section: str
    key: str
    kind: Any
    help: str


def _choice(*values: str) -> click.Choice[str]:
    return click.Choice(values)


FLAGS = (
    Flag(("--host",), "server", "host", str, "Address to listen on."),
    Flag(("--port",), "server", "port", int, "TCP port; 0 takes any free one."),
    Flag(("--uds",), "server", "uds", str, "Unix socket of the HTTP API."),
    Flag(("--runtime-dir",), "server", "runtime_dir", str, "Directory of the sockets."),
    Flag(("--max-queued-requests",), "server", "max_queued_requests", int, "Waiting limit."),
    Flag(("--drain-timeout-s",), "server", "drain_timeout_s", float, "Longest drain, seconds."),
    Flag(("--device",), "model", "device", _choice("auto", "cpu", "cuda"), "Where the model runs."),
    Flag(
        ("--dtype",),
        "model",
        "dtype",
        _choice("auto", "float32", "bfloat16"),
        "Of activations and KV.",
    ),
    Flag(
        ("--act-quant",),
        "model",
        "act_quant",
        _choice("auto", "none", "fp8"),
        "Of activations, 1x128.",
    ),
    Flag(
        ("--load-format",),
        "model",
        "load_format",
        _choice("auto", "dummy"),
        "dummy: random weights.",
    ),
    Flag(("--max-seq-len",), "model", "max_seq_len", int, "Longest prompt and answer together."),
    Flag(("--max-batch-size",), "engine", "max_batch_size", int, "Sequences that run at once."),
    Flag(("--max-num-tokens",), "engine", "max_num_tokens", int, "Tokens in one step."),
    Flag(("--max-itl-ms",), "engine", "max_itl_ms", float, "Goal for inter-token latency, ms."),
    Flag(("--block-size",), "engine", "block_size", int, "Tokens in a KV block."),
    Flag(("--kv-cache-gb",), "engine", "kv_cache_gb", float, "Size of the KV cache, GB."),
    Flag(
        ("--kv-cache-free-gpu-memory-fraction", "--kv-cache-free-gpu-mem-fraction"),
        "engine",
        "kv_cache_free_gpu_memory_fraction",
        float,
        "Share of the free GPU memory for KV.",
    ),
    Flag(
        ("--kv-cache-dtype",),
        "engine",
        "kv_cache_dtype",
        _choice("auto", "fp8"),
        "Of the KV cache.",
    ),
    Flag(
        ("--fp8-gemm",),
        "engine",
        "fp8_gemm",
        _choice("auto", "triton", "torch"),
        "Whose kernels for dense fp8 maps.",
    ),
    Flag(
        ("--kv-host-cache-gb",),
        "engine",
        "kv_host_cache_gb",
        float,
        "Host memory for KV that the GPU has no room for, GB.",
    ),
    Flag(
        ("--mtp", "--spec-decode-nextn"),
        "engine",
        "num_nextn",
        int,
        "Tokens that the MTP layer drafts in a step, 0 to 5.",
    ),
    Flag(
        ("--mtp-relaxed-topk",),
        "engine",
        "relaxed_topk",
        int,
        "Inside <think>, accept drafts among so many best tokens (0: off).",
    ),
    Flag(
        ("--mtp-relaxed-delta",),
        "engine",
        "relaxed_delta",
        float,
        "How much less likely than the best they may be.",
    ),
    Flag(("--tp-size", "--tp"), "parallel", "tp_size", int, "Tensor-parallel ranks."),
    Flag(("--ep-size", "--ep"), "parallel", "ep_size", int, "Expert-parallel ranks."),
    Flag(("--pp-size", "--pp"), "parallel", "pp_size", int, "Pipeline stages."),
    Flag(
        ("--log-level",),
        "log",
        "level",
        _choice("debug", "info", "warning", "error"),
        "What to log.",
    ),
    Flag(("--log-format",), "log", "format", _choice("auto", "json", "console"), "How to log."),
)
SWITCHES = (
    Flag(("--enable-overlap-scheduler",), "engine", "enable_overlap_scheduler", bool,
         "Plan a step before the last one's result is known (on by default)."),
    Flag(("--use-cuda-graph",), "engine", "use_cuda_graph", bool, "CUDA graphs for decode."),
    Flag(("--enable-attention-dp",), "parallel", "enable_attention_dp", bool,
         "Attention-data parallelism."),
    Flag(("--print-iter-log",), "engine", "print_iter_log", bool, "Log every step."),
    Flag(("--check-numerics",), "engine", "check_numerics", bool,
         "Look for NaN in every layer; slow."),
)  # fmt: skip

YAML_SECTIONS = {
    "use_cuda_graph": "engine",
    "cuda_graph_padding_enabled": "engine",
    "cuda_graph_batch_sizes": "engine",
    "print_iter_log": "engine",
    "enable_overlap_scheduler": "engine",
    "kv_cache_dtype": "engine",
    "load_format": "model",
    "enable_attention_dp": "parallel",
}
"""Keys of the guide's `--extra_llm_api_options` file, in `pytorch_backend_config` or beside it."""


RELAXED = "use_relaxed_acceptance_for_thinking"
RELAXED_DEFAULTS = {"relaxed_topk": 10, "relaxed_delta": 0.6}
RELAXED_KEYS = {RELAXED, *RELAXED_DEFAULTS}
"""Of its `speculative_config`."""

UNSUPPORTED = {"moe_backend": "a MoE back end"}
"""Keys of the guide's file that this version knows, and refuses."""


def normalise(name: str) -> str:
    """click's token normaliser: `--max_batch_size` is `--max-batch-size`."""
    return name.replace("_", "-")


def engine_options(command: F) -> F:
    """Adds every flag of `FLAGS` and `SWITCHES`, and those that are not values of `Config`."""
    for flag in reversed(FLAGS):
        command = click.option(*flag.names, flag.key, type=flag.kind, default=None, help=flag.help)(
            command
        )
    for flag in reversed(SWITCHES):
        name = flag.names[0]
        command = click.option(f"{name}/--no-{name[2:]}", flag.key, default=None, help=flag.help)(
            command
        )
    command = click.option(
        "--extra-llm-api-options",
        type=click.Path(path_type=Path),
        help="YAML file of further options, as the guide writes it.",
    )(command)
    command = click.option(
        "--spec-decode-algo",
        type=click.Choice(["MTP"]),
        default=None,
        help="The guide's name for --mtp; its --spec-decode-nextn says how many tokens.",
    )(command)
    return click.option(
        "--backend",
        type=click.Choice(["pytorch"]),
        default=None,
        help="Accepted for the guide's sake; there is one backend.",
    )(command)


def overrides(values: dict[str, Any]) -> Overrides:
    """Flags (over the YAML file's keys) as sections. Raises ConfigError."""
    result: Overrides = {}
    yaml_path = values.get("extra_llm_api_options")
    if yaml_path is not None:
        result = read_yaml(yaml_path)
    for flag in (*FLAGS, *SWITCHES):
        if (value := values.get(flag.key)) is not None:
            result.setdefault(flag.section, {})[flag.key] = value
    if values.get("spec_decode_algo") and "num_nextn" not in result.get("engine", {}):
        raise ConfigError("--spec-decode-algo MTP needs --spec-decode-nextn N")
    return result


def read_yaml(path: Path) -> Overrides:
    """The guide's options file. Raises ConfigError for a key that means nothing here."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no keys")
    inner = fields.pop("pytorch_backend_config", None) or {}
    if not isinstance(inner, dict):
        raise ConfigError(f"{path}: pytorch_backend_config holds no keys")
    result: Overrides = {}
    for key, value in {**fields, **inner}.items():
        section = YAML_SECTIONS.get(key)
        if key == "speculative_config":
            result.setdefault("engine", {}).update(_speculation(path, value))
            continue
        if key in UNSUPPORTED:
            what = UNSUPPORTED[key]
            raise ConfigError(f"{path}: {key}: {what} is not supported by this version")
        if section is None:
            raise ConfigError(f"{path}: unknown key {key!r}")
        result.setdefault(section, {})[key] = value
    return result


def _speculation(path: Path, fields: Any) -> dict[str, Any]:
    """Of the guide's `speculative_config`: keys of the engine's section."""
    names = {"decoding_type", "num_nextn_predict_layers"}
    if not isinstance(fields, dict) or not names <= fields.keys() <= names | RELAXED_KEYS:
        raise ConfigError(
            f"{path}: speculative_config needs the keys {' and '.join(sorted(names))}, "
            f"and may have {', '.join(sorted(RELAXED_KEYS))}"
        )
    if (algorithm := fields["decoding_type"]) != "MTP":
        raise ConfigError(f"{path}: decoding_type is {algorithm!r}; this version knows MTP")
    result = {"num_nextn": fields["num_nextn_predict_layers"]}
    if fields.get(RELAXED):
        given = {key: fields[key] for key in RELAXED_DEFAULTS if key in fields}
        result |= RELAXED_DEFAULTS | given
    return result
