import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsd.model import checkpoint, loader
from dsd.model.config import CheckpointError, ModelConfig

FIELDS: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 1,
    "torch_dtype": "float32",
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
KEY = "model.layers.1.mlp.experts.1.up_proj.weight"
FLOAT32 = torch.float32
CPU = torch.device("cpu")


def make_config(directory: Path, **changes: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps({**FIELDS, **changes}))
    return ModelConfig.load(directory)


def make_tensors(config: ModelConfig, dtype: torch.dtype = FLOAT32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {}
    for spec in checkpoint.tensors(config):
        value = torch.randn(spec.shape)
        if config.fp8 and spec.kind == "linear":
            made[spec.name] = value.to(torch.float8_e4m3fn)
        else:
            made[spec.name] = value if spec.kind in ("scale", "float32") else value.to(dtype)
    return made


def write_single(directory: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, directory / SINGLE)
    return directory / SINGLE


def write_sharded(directory: Path, tensors: dict[str, Tensor], count: int = 3) -> dict[str, str]:
    """Shards in turn, so that the parts of one target lie in different files."""
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        names = list(tensors)[i::count]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(config: ModelConfig, directory: Path, dtype: torch.dtype = FLOAT32) -> dict[str, Tensor]:
    return loader.load(config, directory, dtype, CPU, lambda _done, _total: None)


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return make_config(tmp_path)


@pytest.fixture
def tensors(config: ModelConfig) -> dict[str, Tensor]:
    return make_tensors(config)


Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Refusal]:
    """Loads; expects one sentence that holds all of `names`, and no memory taken."""

    def no_memory(*_: Any) -> None:
        pytest.fail("memory was taken before the check")

    monkeypatch.setattr(loader, "_allocate", no_memory)

    def check(config: ModelConfig, *names: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            load(config, tmp_path)
        message = str(caught.value)
        assert [name for name in names if name not in message] == [], message
        assert "\n" not in message
        return message

    return check


# ---- what is loaded -----------------------------------------------------------------------------


def expected(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The targets, put together by hand for these sizes."""
    want = {"embed": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    if not config.tie_word_embeddings:
        want["lm_head"] = tensors["lm_head.weight"]
    suffixes = {"weight": ""} | ({"weight_scale_inv": ".scale"} if config.fp8 else {})
    for layer in range(config.num_hidden_layers):
        source, target = f"model.layers.{layer}", f"layers.{layer}"
        attn = f"{source}.self_attn"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            want[f"{target}.{norm}"] = tensors[f"{source}.{norm}.weight"]
        for name in ("q_a", "kv_a"):
            want[f"{target}.attn.{name}_norm"] = tensors[f"{attn}.{name}_layernorm.weight"]
        for weight, scale in suffixes.items():

            def mlp(name: str, weight: str = weight, source: str = source) -> tuple[Tensor, Tensor]:
                gate, up, down = (
                    tensors[f"{source}.mlp.{name}{part}_proj.{weight}"].float()
                    for part in ("gate", "up", "down")
                )
                return torch.cat((gate, up)), down

            names = {"q_a": "q_a_proj", "q": "q_b_proj", "kv_a": "kv_a_proj_with_mqa"}
            names |= {"kv_b": "kv_b_proj", "o": "o_proj"}
            for name, stored in names.items():
                want[f"{target}.attn.{name}{scale}"] = tensors[f"{attn}.{stored}.{weight}"]
            if not config.is_moe(layer):
                parts = {"mlp": mlp("")}
            else:
                experts = [mlp(f"experts.{e}.") for e in range(config.n_routed_experts)]
                parts = {
                    "shared": mlp("shared_experts."),
                    "experts": tuple(torch.stack(part) for part in zip(*experts, strict=True)),
                }
            for name, (gate_up, down) in parts.items():
                want[f"{target}.{name}.gate_up{scale}"] = gate_up
                want[f"{target}.{name}.down{scale}"] = down
        if config.is_moe(layer):
            want[f"{target}.gate"] = tensors[f"{source}.mlp.gate.weight"]
            want[f"{target}.gate_bias"] = tensors[f"{source}.mlp.gate.e_score_correction_bias"]
    return want


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].float(), tensor.float()), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_load_puts_every_tensor_in_its_place(tmp_path: Path, fp8: bool, sharded: bool) -> None:
    config = make_config(tmp_path, quantization_config=FP8 if fp8 else None)
    tensors = make_tensors(config)
    (write_sharded if sharded else write_single)(tmp_path, tensors)
    weights = load(config, tmp_path)
    assert_equal(weights, expected(config, tensors))
    assert {w.dtype for w in weights.values()} == (
        {FLOAT32, torch.float8_e4m3fn} if fp8 else {FLOAT32}
    )


def test_load_in_slices_of_few_rows_gives_the_same(
    tmp_path: Path, config: ModelConfig, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_single(tmp_path, tensors)
    monkeypatch.setattr(loader, "STAGING_BYTES", 3 * 32 * 4)
    assert_equal(load(config, tmp_path), expected(config, tensors))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_load_keeps_what_the_activations_can_hold(
    tmp_path: Path, config: ModelConfig, stored: torch.dtype, dtype: torch.dtype
) -> None:
    tensors = make_tensors(config, stored)
    write_single(tmp_path, tensors)
    weights = load(config, tmp_path, dtype)
    assert torch.equal(weights["embed"].to(dtype), tensors["model.embed_tokens.weight"].to(dtype))
    assert weights["embed"].dtype.itemsize <= dtype.itemsize
    assert weights["layers.1.gate_bias"].dtype == FLOAT32


def test_load_reports_bytes_up_to_the_total(
    tmp_path: Path, config: ModelConfig, tensors: dict[str, Tensor]
) -> None:
    write_sharded(tmp_path, tensors)
    seen: list[tuple[int, int]] = []
    weights = loader.load(config, tmp_path, FLOAT32, CPU, lambda *pair: seen.append(pair))
    total = sum(weight.nbytes for weight in weights.values())
    assert seen[-1] == (total, total) and seen == sorted(seen)


@pytest.mark.parametrize("sharded", [False, True])
def test_load_mtp_layers_are_ignored(tmp_path: Path, sharded: bool) -> None:
    config = make_config(tmp_path, num_nextn_predict_layers=1)
    tensors = make_tensors(config)
    extra = {
        "model.layers.2.eh_proj.weight": torch.zeros(3, 3),
        "model.layers.2.embed_tokens.weight": torch.zeros(3),
        "model.layers.2.shared_head.head.weight": torch.zeros(2),
    }
    (write_sharded if sharded else write_single)(tmp_path, {**tensors, **extra})
    assert_equal(load(config, tmp_path), expected(config, tensors))


def test_load_mtp_layers_may_be_absent(tmp_path: Path) -> None:
    config = make_config(tmp_path, num_nextn_predict_layers=1)
    write_single(tmp_path, make_tensors(config))
    load(config, tmp_path)


@pytest.mark.parametrize("with_head", [False, True])
def test_load_tied_head_may_be_stored_or_not(tmp_path: Path, with_head: bool) -> None:
    config = make_config(tmp_path, tie_word_embeddings=True)
    tensors = make_tensors(config)
    assert "lm_head.weight" not in tensors
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if with_head else {}
    write_single(tmp_path, {**tensors, **head})
    assert_equal(load(config, tmp_path), expected(config, tensors))


def test_load_shards_may_be_symlinks(
    tmp_path: Path, config: ModelConfig, tensors: dict[str, Tensor]
) -> None:
    """As in the Hugging Face cache."""
    (tmp_path / "blobs").mkdir()
    path = write_single(tmp_path, tensors)
    path.rename(tmp_path / "blobs/abc")
    path.symlink_to(tmp_path / "blobs/abc")
    assert_equal(load(config, tmp_path), expected(config, tensors))


# ---- what is refused: names ---------------------------------------------------------------------


def test_load_empty_directory(config: ModelConfig, refusal: Refusal, tmp_path: Path) -> None:
    refusal(config, str(tmp_path), INDEX, SINGLE)


def test_load_missing_shard(config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path):
    file = write_sharded(tmp_path, tensors)[KEY]
    (tmp_path / file).unlink()
    refusal(config, str(tmp_path / file), "missing")


def test_load_missing_key(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    del tensors[KEY]
    write_single(tmp_path, tensors)
    refusal(config, str(tmp_path), KEY)


def test_load_missing_key_of_a_sharded_checkpoint(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    weight_map = write_sharded(tmp_path, tensors)
    del weight_map[KEY]
    write_index(tmp_path, weight_map)
    refusal(config, str(tmp_path), KEY)


def test_load_left_over_key_in_the_index(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(128, 32)
    weight_map = write_sharded(tmp_path, tensors)
    stray = "model.layers.1.mlp.experts.3.up_proj.weight"
    refusal(config, str(tmp_path / weight_map[stray]), stray, "left over")


def test_load_left_over_key_in_a_file_only(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    weight_map = write_sharded(tmp_path, tensors)
    path = tmp_path / weight_map[KEY]
    save_file({**load_file(path), "model.stray": torch.zeros(2)}, path)
    refusal(config, str(path), "model.stray", "left over")


def test_load_left_over_key_in_a_single_file(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    path = write_single(tmp_path, {**tensors, "model.layers.1.self_attn.q.bias": torch.zeros(2)})
    refusal(config, str(path), "model.layers.1.self_attn.q.bias", "left over")


@pytest.mark.parametrize("layer", [2, 3, 99])
def test_load_layer_past_the_last_is_left_over(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path, layer: int
) -> None:
    name = f"model.layers.{layer}.input_layernorm.weight"
    path = write_single(tmp_path, {**tensors, name: torch.zeros(32)})
    refusal(config, str(path), name, "left over")


def test_load_scale_without_fp8_is_left_over(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    name = f"{KEY}_scale_inv"
    path = write_single(tmp_path, {**tensors, name: torch.zeros(1, 1)})
    refusal(config, str(path), name, "left over")


def test_load_fp8_without_a_scale(refusal: Refusal, tmp_path: Path) -> None:
    config = make_config(tmp_path, quantization_config=FP8)
    tensors = make_tensors(config)
    del tensors[f"{KEY}_scale_inv"]
    write_single(tmp_path, tensors)
    refusal(config, str(tmp_path), f"{KEY}_scale_inv")


# ---- what is refused: shapes and dtypes ---------------------------------------------------------

SHAPES = {
    "transposed": lambda t: t.t().contiguous(),
    "row_less": lambda t: t[:-1].contiguous(),
    "row_more": lambda t: torch.cat((t, t[:1])),
    "flat": lambda t: t.flatten(),
    "extra_dimension": lambda t: t[None],
    "scalar": lambda t: t[0, 0].clone(),
    "empty": lambda t: t[:0].contiguous(),
}


@pytest.mark.parametrize("change", SHAPES.values(), ids=SHAPES.keys())
def test_load_wrong_shape(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path, change: Any
) -> None:
    tensors[KEY] = change(tensors[KEY])
    path = write_single(tmp_path, tensors)
    shape = str(list(tensors[KEY].shape))
    refusal(config, str(path), KEY, shape, "[128, 32]")


def test_load_wrong_scale_shape(refusal: Refusal, tmp_path: Path) -> None:
    config = make_config(tmp_path, quantization_config=FP8)
    tensors = make_tensors(config)
    tensors[f"{KEY}_scale_inv"] = torch.ones(128, 1)
    path = write_single(tmp_path, tensors)
    refusal(config, str(path), f"{KEY}_scale_inv", "[128, 1]", "[1, 1]")


@pytest.mark.parametrize(("dtype", "name"), [
    (torch.int8, "I8"),
    (torch.int64, "I64"),
    (torch.float64, "F64"),
    (torch.bool, "BOOL"),
    (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.float8_e5m2, "F8_E5M2"),
])  # fmt: skip
def test_load_wrong_dtype(
    config: ModelConfig,
    tensors: Any,
    refusal: Refusal,
    tmp_path: Path,
    dtype: torch.dtype,
    name: str,
) -> None:
    tensors[KEY] = tensors[KEY].to(dtype)
    path = write_single(tmp_path, tensors)
    refusal(config, str(path), KEY, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2], ids=str)
def test_load_fp8_with_a_weight_that_is_not(
    refusal: Refusal, tmp_path: Path, dtype: torch.dtype
) -> None:
    config = make_config(tmp_path, quantization_config=FP8)
    tensors = make_tensors(config)
    tensors[KEY] = tensors[KEY].float().to(dtype)
    path = write_single(tmp_path, tensors)
    refusal(config, str(path), KEY, "F8_E4M3")


# ---- what is refused: the index -----------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b"]
)
def test_load_index_naming_a_file_outside(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path, file: str
) -> None:
    weight_map = write_sharded(tmp_path, tensors)
    save_file(tensors, tmp_path.parent / "other.safetensors")
    (tmp_path / "sub").mkdir()
    save_file(tensors, tmp_path / "sub/x.safetensors")
    write_index(tmp_path, {**weight_map, KEY: file})
    refusal(config, INDEX, repr(file))


def test_load_index_naming_an_endless_file_name(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    write_index(tmp_path, {**write_sharded(tmp_path, tensors), KEY: "x" * 5000})
    refusal(config, INDEX)


def test_load_index_naming_a_key_that_its_file_lacks(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path
) -> None:
    weight_map = write_sharded(tmp_path, tensors)
    other = next(file for file in weight_map.values() if file != weight_map[KEY])
    write_index(tmp_path, {**weight_map, KEY: other})
    refusal(config, str(tmp_path / other), KEY)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}',
    '{"weight_map": null}', "[" * 5000,
], ids=lambda text: repr(text[:30]))  # fmt: skip
def test_load_index_that_is_none(
    config: ModelConfig, tensors: Any, refusal: Refusal, tmp_path: Path, text: str
) -> None:
    write_sharded(tmp_path, tensors)
    (tmp_path / INDEX).write_text(text)
    refusal(config, str(tmp_path / INDEX))


def test_load_index_of_nothing_lacks_everything(
    config: ModelConfig, refusal: Refusal, tmp_path: Path
) -> None:
    write_index(tmp_path, {})
    refusal(config, str(tmp_path), "model.embed_tokens.weight")


def test_load_index_that_is_a_directory(
    config: ModelConfig, refusal: Refusal, tmp_path: Path
) -> None:
    (tmp_path / INDEX).mkdir()
    refusal(config, str(tmp_path / INDEX))


# ---- what is refused: the files' bytes ----------------------------------------------------------


def header_of(data: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    return header


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def overlapping(data: bytes) -> bytes:
    header = header_of(data)
    name = next(n for n in header if "up_proj" in n and n != KEY)
    assert header[name]["shape"] == header[KEY]["shape"]
    header[name]["data_offsets"] = header[KEY]["data_offsets"]
    return with_header(data, header)


def shape_against_bytes(data: bytes) -> bytes:
    header = header_of(data)
    header[KEY]["shape"] = [64, 32]
    return with_header(data, header)


def past_the_end(data: bytes) -> bytes:
    header = header_of(data)
    start, end = header[KEY]["data_offsets"]
    header[KEY]["data_offsets"] = [start + 10**9, end + 10**9]
    return with_header(data, header)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "seven_bytes": lambda data: data[:7],
    "header_cut": lambda data: data[:100],
    "data_cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "grown": lambda data: data + b"\0" * 16,
    "garbage": lambda data: bytes(reversed(data)),
    "text": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "zeros": lambda data: b"\0" * len(data),
    "huge_header": lambda data: b"\xff" * 8 + data[8:],
    "overlapping": overlapping,
    "shape_against_bytes": shape_against_bytes,
    "past_the_end": past_the_end,
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_load_damaged_file(
    config: ModelConfig,
    tensors: Any,
    refusal: Refusal,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    sharded: bool,
) -> None:
    if sharded:
        path = tmp_path / write_sharded(tmp_path, tensors)[KEY]
    else:
        path = write_single(tmp_path, tensors)
    path.write_bytes(damage(path.read_bytes()))
    refusal(config, str(path), "damaged")


def test_load_directory_in_place_of_the_file(
    config: ModelConfig, refusal: Refusal, tmp_path: Path
) -> None:
    (tmp_path / SINGLE).mkdir()
    refusal(config, str(tmp_path / SINGLE))
