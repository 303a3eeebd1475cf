"""The two commands as people type them: names of flags, files, what is printed, exit statuses."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from dsd.daemon import cli, options
from dsd.daemon import config as configuration
from dsd.daemon.config import ConfigError, load
from dsd.tests.conftest import DSD, ENVIRONMENT, FAKE_DSD

GUIDE_YAML = """\
pytorch_backend_config:
    use_cuda_graph: true
    cuda_graph_padding_enabled: true
    cuda_graph_batch_sizes:
    - 1
    - 2
    - 4
    - 384
    print_iter_log: true
    enable_overlap_scheduler: true
enable_attention_dp: false
"""


def dsd(
    *arguments: str, command: tuple[str, ...] = DSD, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def no_node(monkeypatch) -> list[Any]:
    """Nothing is served; the Configs that would be."""
    seen: list[Any] = []

    class NoNode:
        def __init__(self, config: Any, *_: Any) -> None:
            seen.append(config)

        async def run(self) -> None:
            pass

    monkeypatch.setattr("dsd.daemon.node.Node", NoNode)
    return seen


@pytest.fixture
def configured(no_node) -> Callable[..., Any]:
    """The Config that a command line gives, without a daemon."""

    def configure(*arguments: str) -> Any:
        result = CliRunner().invoke(cli.main, ["serve", *arguments])
        assert result.exit_code == 0, result.output
        return no_node[-1]

    return configure


def spellings(name: str) -> list[str]:
    return sorted({name, "--" + name[2:].replace("-", "_")})


@pytest.mark.parametrize("flag", options.FLAGS, ids=lambda flag: flag.key)
def test_flag_sets_its_key_in_every_spelling(configured, small_checkpoint, tmp_path, flag) -> None:
    values = {str: "x", int: "1", float: "0.5"}
    by_key = {"device": "cpu", "dtype": "float32", "act_quant": "none", "kv_cache_dtype": "auto",
              "load_format": "dummy", "fp8_gemm": "torch",
              "level": "error", "format": "json", "block_size": "32", "host": "127.0.0.1",
              "runtime_dir": str(tmp_path), "uds": str(tmp_path / "u")}  # fmt: skip
    value = by_key.get(flag.key) or values[flag.kind]
    expected = flag.kind(value) if isinstance(flag.kind, type) else value
    for name in flag.names:
        for spelling in spellings(name):
            for arguments in ([spelling, value], [f"{spelling}={value}"]):
                more = ("--mtp", "1") if flag.key == "relaxed_topk" else ()
                config = configured(str(small_checkpoint), *arguments, *more)
                assert getattr(getattr(config, flag.section), flag.key) == expected


@pytest.mark.parametrize("flag", options.SWITCHES, ids=lambda flag: flag.key)
def test_switch_turns_on_and_off_in_every_spelling(configured, small_checkpoint, flag) -> None:
    off = "--no-" + flag.names[0][2:]
    cases = [(name, False) for name in spellings(off)]
    if flag.key != "enable_attention_dp":  # this version refuses it
        cases += [(name, True) for name in spellings(flag.names[0])]
    for name, value in cases:
        config = configured(str(small_checkpoint), name)
        assert getattr(getattr(config, flag.section), flag.key) is value


def test_the_guides_command_line_works_as_written(configured, small_checkpoint, tmp_path) -> None:
    path = tmp_path / "extra-llm-api-config.yml"
    path.write_text(GUIDE_YAML)
    config = configured(
        "deepseek-ai/DeepSeek-V3", "--model_path", str(small_checkpoint), "--backend", "pytorch",
        "--max_batch_size", "161", "--max_num_tokens", "1160", "--tp", "1", "--ep_size", "1",
        "--pp_size", "1", "--kv_cache_free_gpu_mem_fraction", "0.95", "--host", "localhost",
        "--extra_llm_api_options", str(path),
    )  # fmt: skip
    assert config.server.served_model_name == ("deepseek-ai/DeepSeek-V3",)
    assert config.model.model_dir == str(small_checkpoint)
    assert config.engine.cuda_graph_batch_sizes == (1, 2, 4, 384)
    assert config.engine.print_iter_log is True
    assert config.engine.max_batch_size == 161
    assert config.engine.kv_cache_free_gpu_memory_fraction == 0.95


def test_flag_goes_over_yaml_which_goes_over_the_file(
    configured, small_checkpoint, tmp_path
) -> None:
    toml, yaml = tmp_path / "dsd.toml", tmp_path / "extra.yml"
    toml.write_text("[engine]\nprint_iter_log = false\nuse_cuda_graph = true\nblock_size = 16\n")
    yaml.write_text("print_iter_log: true\nuse_cuda_graph: false\n")
    config = configured(
        str(small_checkpoint), "--config", str(toml), "--extra-llm-api-options", str(yaml),
        "--use-cuda-graph",
    )  # fmt: skip
    assert config.engine.print_iter_log is True
    assert config.engine.use_cuda_graph is True
    assert config.engine.block_size == 16


@pytest.mark.parametrize(
    "arguments",
    [("--mtp", "3"), ("--spec_decode_algo", "MTP", "--spec_decode_nextn", "3"), ()],
)
def test_mtp_has_our_flag_the_guides_and_its_yaml(
    configured, small_checkpoint, tmp_path, arguments
) -> None:
    if not arguments:
        path = tmp_path / "extra.yml"
        path.write_text(
            "speculative_config:\n    decoding_type: MTP\n    num_nextn_predict_layers: 3\n"
        )
        arguments = ("--extra_llm_api_options", str(path))
    assert configured(str(small_checkpoint), *arguments).engine.num_nextn == 3


@pytest.mark.parametrize(
    ("arguments", "text", "relaxed"),
    [
        (("--mtp", "2"), "", (0, 0.6)),
        (("--mtp", "2", "--mtp-relaxed-topk", "5", "--mtp_relaxed_delta", "0.25"), "", (5, 0.25)),
        ((), "use_relaxed_acceptance_for_thinking: true", (10, 0.6)),
        ((), "use_relaxed_acceptance_for_thinking: true, relaxed_delta: 0.5", (10, 0.5)),
        ((), "use_relaxed_acceptance_for_thinking: false, relaxed_topk: 15", (0, 0.6)),
    ],
)
def test_relaxed_acceptance_has_our_flags_and_the_guides_yaml(
    configured, small_checkpoint, tmp_path, arguments, text, relaxed
) -> None:
    if text:
        path = tmp_path / "extra.yml"
        fields = f"decoding_type: MTP, num_nextn_predict_layers: 2, {text}"
        path.write_text(f"speculative_config: {{{fields}}}\n")
        arguments = ("--extra_llm_api_options", str(path))
    engine = configured(str(small_checkpoint), *arguments).engine
    assert (engine.num_nextn, engine.relaxed_topk, engine.relaxed_delta) == (2, *relaxed)


def test_mtp_table_whose_sizes_do_not_rise_is_refused(small_checkpoint, no_node, tmp_path) -> None:
    path = tmp_path / "dsd.toml"
    path.write_text("[engine]\nnum_nextn_by_batch_size = [[8, 3], [8, 1]]\n")
    result = CliRunner().invoke(cli.main, ["serve", str(small_checkpoint), "--config", str(path)])
    assert result.exit_code == 2, result.output
    assert "[8, 8] do not rise" in result.output


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("speculation: true\n", "unknown key 'speculation'"),
        ("pytorch_backend_config:\n  moe: 1\n", "unknown key 'moe'"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "holds no keys"),
        ("pytorch_backend_config: 5\n", "holds no keys"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("use_cuda_graph: perhaps\n", "use_cuda_graph"),
        ("cuda_graph_batch_sizes: [0]\n", "cuda_graph_batch_sizes"),
        ("5: 1\n", "unknown key 5"),
        ("speculative_config: MTP\n", "needs the keys"),
        ("speculative_config:\n  decoding_type: MTP\n", "num_nextn_predict_layers"),
        ("speculative_config: {decoding_type: Eagle, num_nextn_predict_layers: 1}\n", "'Eagle'"),
        ("speculative_config: {decoding_type: MTP, num_nextn_predict_layers: 6}\n", "<= 5"),
        (
            "speculative_config: {decoding_type: MTP, num_nextn_predict_layers: 2, "
            "use_relaxed_acceptance_for_thinking: true, relaxed_topk: many}\n",
            "relaxed_topk",
        ),
        (
            "speculative_config: {decoding_type: MTP, num_nextn_predict_layers: 2, eagle: 1}\n",
            "may have relaxed_delta",
        ),
    ],
)
def test_bad_yaml_is_one_sentence_and_status_2(
    small_checkpoint, no_node, tmp_path, text, piece
) -> None:
    path = tmp_path / "extra.yml"
    path.write_text(text)
    arguments = ["serve", str(small_checkpoint), "--extra_llm_api_options", str(path)]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2, result.output
    assert piece in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["--colour"], "--colour"),
        (["--port", "x"], "'x' is not a valid integer"),
        (["--port", "65536"], "<= 65535"),
        (["--port", "-1"], ">= 0"),
        (["--dtype", "int4"], "int4"),
        (["--block-size", "17"], "17"),
        (["--mtp", "6"], "<= 5"),
        (["--mtp", "-1"], ">= 0"),
        (["--mtp-relaxed-topk", "10"], "num_nextn is 0"),
        (["--mtp", "1", "--mtp-relaxed-delta", "1.5"], "<= 1.0"),
        (["--mtp", "1", "--mtp-relaxed-topk", "-1"], ">= 0"),
        (["--spec_decode_algo", "MTP"], "needs --spec-decode-nextn"),
        (["--spec_decode_algo", "Medusa"], "Medusa"),
        (["--tp", "2"], "tp_size is 2"),
        (["--ep", "2"], "ep_size is 2"),
        (["--pp", "2"], "pp_size is 2"),
        (["--pp", "2", "--load-format", "dummy"], "pp_size is 2"),
        (["--enable-attention-dp"], "enable_attention_dp"),
        (["--max-num-tokens", "4", "--max-batch-size", "8"], "max_num_tokens 4"),
        (["--kv-cache-free-gpu-memory-fraction", "1.5"], "<= 1.0"),
        (["--drain-timeout-s", "nan"], "drain_timeout_s"),
        (["--drain-timeout-s", "inf"], "drain_timeout_s"),
        (["--kv-cache-gb", "nan"], "kv_cache_gb"),
        (["--max-itl-ms", "-1"], "max_itl_ms"),
        (["--max-itl-ms", "nan"], "max_itl_ms"),
        (["--kv-cache-gb", "inf"], "kv_cache_gb"),
        (["--kv-host-cache-gb", "-1"], "kv_host_cache_gb"),
        (["--backend", "tensorrt"], "tensorrt"),
        (["--config", "/no/such.toml"], "/no/such.toml"),
        (["extra", "words"], "unexpected extra argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_command_line_names_the_fault_and_exits_with_2(
    small_checkpoint, no_node, arguments, piece
) -> None:
    result = CliRunner().invoke(cli.main, ["serve", str(small_checkpoint), *arguments])
    assert result.exit_code == 2, result.output
    assert piece in result.output
    assert "Traceback" not in result.output


def test_model_directory_that_is_missing_is_named(tmp_path) -> None:
    for arguments in (["/no/dir"], ["name", "--model-path", "/no/dir"]):
        result = CliRunner().invoke(cli.main, ["serve", *arguments])
        assert result.exit_code == 2
        assert "/no/dir does not exist" in result.output


def test_environment_decides_where_the_sockets_are(monkeypatch) -> None:
    server = load(None, {}).server
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert str(os.geteuid()) in str(configuration.runtime_dir(server))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert configuration.control_socket(server) == Path("/run/user/7/dsd/control.sock")
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/dsd:/run/other")
    assert configuration.api_socket(server) == Path("/run/dsd/api.sock")
    with pytest.raises(ConfigError, match="Linux allows 107"):
        load(None, {"server": {"uds": "/" + "u" * 107}})
    load(None, {"server": {"uds": "/" + "u" * 106}})


# ---- generate -----------------------------------------------------------------------------------

LINE = re.compile(r"""^Prompt: (['"].*['"]), Generated text: (['"].*['"])$""")


def test_generate_prints_the_guides_lines_in_order_and_nothing_else(
    small_checkpoint, tmp_path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The capital of France is\n\nThe future of AI is\n", encoding="utf-8")
    arguments = ["generate", str(small_checkpoint), "--prompt", "Hello, my name is",
                 "--prompt-file", str(file), "--max_tokens", "4"]  # fmt: skip
    results = [dsd(*arguments, command=FAKE_DSD, TMPDIR=str(tmp_path)) for _ in range(2)]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert results[0].stdout == results[1].stdout
    matches = [LINE.match(line) for line in results[0].stdout.splitlines()]
    assert [match.group(1) for match in matches if match] == [
        "'Hello, my name is'", "'The capital of France is'", "'The future of AI is'",
    ]  # fmt: skip
    assert "Traceback" not in results[0].stderr
    assert list(tmp_path.iterdir()) == [file], "generate leaves nothing behind"


@pytest.mark.slow
def test_generate_agrees_with_the_daemon(daemon, small_checkpoint) -> None:
    arguments = ["--prompt", "Where is New York?", "--max-tokens", "6", "--dtype", "float32"]
    result = dsd("generate", str(small_checkpoint), *arguments)
    body = {"model": "Tiny-V3", "prompt": "Where is New York?", "max_tokens": 6, "temperature": 0}
    served = httpx.post(f"{daemon.url}/v1/completions", json=body).json()["choices"][0]["text"]
    match = LINE.match(result.stdout.rstrip("\n"))
    assert match, result.stderr
    assert match.group(2) == repr(served)


@pytest.mark.parametrize(
    ("arguments", "status", "piece"),
    [
        ([], 2, "no prompt was given"),
        (["--prompt-file", "/no/such"], 2, "/no/such cannot be read"),
        (["--prompt", ""], 1, "no tokens"),
        (["--prompt", "a b c " * 4000], 1, "max_seq_len"),
        (["--prompt", "Hi", "--temperature", "-1"], 2, "temperature"),
        (["--prompt", "Hi", "--max-tokens", "-1"], 2, "max-tokens"),
        (["--prompt", "Hi", "--top-p", "0"], 2, "top-p"),
    ],
    ids=["none", "no file", "empty", "too long", "temperature", "max_tokens", "top_p"],
)
def test_generate_refuses_in_one_sentence(small_checkpoint, arguments, status, piece) -> None:
    result = dsd("generate", str(small_checkpoint), *arguments, command=FAKE_DSD)
    assert result.returncode == status, result.stderr
    assert piece in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


# ---- checkpoints with faults, through the whole daemon ------------------------------------------


@pytest.fixture
def copy(small_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(small_checkpoint, tmp_path / "Broken-V3"))


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate(directory: Path) -> None:
    shard = directory / "model-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)


def drop_key(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))


FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing shard": (
        lambda d: (d / "model-00001.safetensors").unlink(),
        ["model-00001.safetensors"],
    ),
    "truncated shard": (truncate, ["model-00001.safetensors"]),
    "missing key": (drop_key, ["model.norm.weight"]),
    "wrong shape": (
        lambda d: edit_json(d / "config.json", moe_intermediate_size=256),
        ["mlp.experts", "shape"],
    ),
    "unknown model_type": (lambda d: edit_json(d / "config.json", model_type="llama"), ["llama"]),
    "wrong type": (
        lambda d: edit_json(d / "config.json", hidden_size="256"),
        ["config.json", "hidden_size"],
    ),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "broken tokenizer": (
        lambda d: (d / "tokenizer.json").write_text("{"),
        ["tokenizer.json"],
    ),
    "broken template": (
        lambda d: edit_json(d / "tokenizer_config.json", chat_template="{% if %}"),
        ["template"],
    ),
    "max_seq_len": (lambda d: None, ["max_seq_len 5000", "4096"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_checkpoint_fault_ends_serve_with_one_sentence(copy, tmp_path, name) -> None:
    spoil, pieces = FAULTS[name]
    spoil(copy)
    extra = ["--max-seq-len", "5000"] if name == "max_seq_len" else []
    runtime_dir = tmp_path / "run"
    result = dsd(
        "serve", str(copy), "--port", "0", "--runtime-dir", str(runtime_dir), "--log-level",
        "warning", *extra,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("dsd: ")
    assert all(piece in sentence for piece in pieces), sentence
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stdout == ""
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.slow
def test_checkpoint_without_tokenizer_serves_token_ids(copy, start_daemon) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    daemon = start_daemon(str(copy))
    body = {"model": "Broken-V3", "prompt": [5, 6, 7], "max_tokens": 3, "return_token_ids": True,
            "logprobs": 1}  # fmt: skip
    choice = httpx.post(f"{daemon.url}/v1/completions", json=body, timeout=30).json()["choices"][0]
    assert len(choice["token_ids"]) == 3
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    for path, fields in (
        ("/v1/completions", {"prompt": "text"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/tokenize", {"prompt": "text"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        answer = httpx.post(f"{daemon.url}{path}", json={"model": "Broken-V3", **fields})
        assert answer.status_code == 400, path
        assert "no tokenizer" in answer.text or "no chat template" in answer.text
    assert daemon.stop() == 0
