import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsd.model.config import CheckpointError, ModelConfig, RopeConfig

PUBLISHED = Path(__file__).parents[3] / "shared/deepseek-v3/config.json"

SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "max_position_embeddings": 512,
    "first_k_dense_replace": 1,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def load(directory: Path, **changes: Any) -> ModelConfig:
    fields = {**SMALL, **changes}
    (directory / "config.json").write_text(json.dumps(fields))
    return ModelConfig.load(directory)


def refusal(directory: Path) -> str:
    """The one sentence, which names the file."""
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.load(directory)
    message = str(caught.value)
    assert str(directory / "config.json") in message
    assert "\n" not in message and len(message) < 400
    return message


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLISHED.exists(), reason="shared/deepseek-v3/config.json is not here")
def test_load_published_config_has_the_published_sizes() -> None:
    config = ModelConfig.load(PUBLISHED.parent)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (7168, 61, 129280)
    assert (config.n_routed_experts, config.n_group, config.topk_group) == (256, 8, 4)
    assert (config.n_shared_experts, config.num_experts_per_tok) == (1, 8)
    assert (config.qk_head_dim, config.latent_dim, config.v_head_dim) == (192, 576, 128)
    assert config.num_nextn_predict_layers == 1 and config.max_position_embeddings == 163840
    assert (config.dtype, config.fp8, config.ue8m0) == ("bfloat16", True, False)
    assert [config.is_moe(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]
    assert config.rope == RopeConfig(
        factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )
    mscale = 0.1 * math.log(40) + 1
    assert config.softmax_scale == pytest.approx(192**-0.5 * mscale**2)


def test_load_small_config_fills_in_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.rope == RopeConfig() and config.dtype == "bfloat16"
    assert (config.n_shared_experts, config.num_nextn_predict_layers) == (0, 0)
    assert not (config.fp8 or config.ue8m0 or config.kv_cache_fp8 or config.tie_word_embeddings)
    assert config.softmax_scale == pytest.approx(40**-0.5)


def test_load_absent_gate_fields_are_those_of_the_published_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in SMALL.items() if k not in ("n_group", "topk_group")})
    )
    config = ModelConfig.load(tmp_path)
    assert (config.n_group, config.topk_group) == (8, 4)
    assert config.routed_scaling_factor == 2.5 and config.norm_topk_prob


def test_load_null_means_absent(tmp_path: Path) -> None:
    names = "q_lora_rank n_shared_experts n_group topk_group num_nextn_predict_layers rope_scaling"
    config = load(tmp_path, **dict.fromkeys(names.split()), quantization_config=None)
    assert config.q_lora_rank is None
    assert (config.n_group, config.topk_group, config.n_shared_experts) == (1, 1, 0)


@pytest.mark.parametrize("eos", [0, 1, [0, 1], None])
def test_load_any_eos_token_id_is_accepted(tmp_path: Path, eos: object) -> None:
    load(tmp_path, eos_token_id=eos)


def test_load_unknown_fields_are_ignored(tmp_path: Path) -> None:
    assert load(tmp_path, auto_map={"AutoModel": "x.Y"}, ep_size=1) == load(tmp_path)


def test_load_kimi_k2_is_of_the_family(tmp_path: Path) -> None:
    config = load(tmp_path, model_type="kimi_k2", n_group=1, topk_group=1, n_routed_experts=384)
    assert config.model_type == "kimi_k2"


def test_load_rope_parameters_equal_rope_scaling(tmp_path: Path) -> None:
    more = {"beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.1}
    published = load(tmp_path, rope_theta=50000, rope_scaling={**YARN, **more})
    five = {**YARN, **more, "rope_type": "yarn", "rope_theta": 50000.0}
    del five["type"]
    assert load(tmp_path, rope_parameters=five) == published
    assert published.rope == RopeConfig(theta=50000.0, **{k: v for k, v in five.items() if k in
        RopeConfig.__struct_fields__})  # fmt: skip
    plain = load(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    assert plain == load(tmp_path, rope_theta=50000)


def test_load_dtype_of_either_spelling(tmp_path: Path) -> None:
    assert load(tmp_path, dtype="float32").dtype == "float32"
    assert load(tmp_path, torch_dtype="float16").dtype == "float16"


def test_load_fp8_and_ue8m0(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 256, "moe_intermediate_size": 128}
    config = load(tmp_path, quantization_config=FP8, **sizes)
    assert config.fp8 and not config.ue8m0
    assert load(tmp_path, quantization_config={**FP8, "scale_fmt": "ue8m0"}, **sizes).ue8m0


@pytest.mark.parametrize(("text", "want"), [
    ('{"quantization": {"kv_cache_quant_algo": "FP8"}}', True),
    ('{"quantization": {"kv_cache_quant_algo": null}}', False),
    ('{"quantization": null}', False),
    ("{}", False),
])  # fmt: skip
def test_load_hf_quant_config_sets_the_kv_dtype(tmp_path: Path, text: str, want: bool) -> None:
    (tmp_path / "hf_quant_config.json").write_text(text)
    assert load(tmp_path).kv_cache_fp8 is want


def test_load_broken_hf_quant_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json is not valid JSON"):
        load(tmp_path)


# ---- what is refused ----------------------------------------------------------------------------

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": ["deepseek_v3"]}, "model_type"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 64.5}, "hidden_size"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"hidden_size": 2**70}, "hidden_size"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"q_lora_rank": 0}, "q_lora_rank is 0"),
    ({"q_lora_rank": -24}, "q_lora_rank is -24"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
    ({"n_shared_experts": -1}, "n_shared_experts is -1"),
    ({"topk_group": 0}, "topk_group is 0"),
    ({"n_group": 3}, "n_group 3"),
    ({"topk_group": 5}, "topk_group 5"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
    ({"qk_rope_head_dim": 15}, "qk_rope_head_dim is 15"),
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ({"rope_interleave": False}, "rope_interleave is False"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"routed_scaling_factor": -2.5}, "routed_scaling_factor"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": -10000.0}, "rope_theta"),
    ({"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has type 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "theta"),
    ({"rope_scaling": {"type": "yarn"}}, "factor"),
    ({"rope_scaling": {**YARN, "factor": "four"}}, "factor"),
    ({"rope_scaling": {**YARN, "factor": 0}}, "factor"),
    ({"rope_scaling": {**YARN, "factor": -4.0}}, "factor"),
    ({"rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast"),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position"),
    ({"quantization_config": {}}, "quant_method None"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    ({"quantization_config": {**FP8, "quant_method": "awq"}}, "quant_method 'awq'"),
    ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, "weight_block_size [64, 64]"),
    ({"quantization_config": FP8}, "intermediate_size is 96"),
    ({"quantization_config": FP8, "intermediate_size": 128}, "moe_intermediate_size is 32"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "names"), BAD_FIELDS, ids=[f"{json.dumps(c)[:60]}" for c, _ in BAD_FIELDS]
)
def test_load_bad_field_is_one_sentence_that_names_it(
    tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **changes}))
    assert names in refusal(tmp_path)


OPTIONAL = {"q_lora_rank", "n_group", "topk_group", "first_k_dense_replace", "model_type"}


@pytest.mark.parametrize("name", sorted(SMALL.keys() - OPTIONAL))
def test_load_missing_field_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in SMALL.items() if key != name})
    )
    assert name in refusal(tmp_path)


def test_load_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("is missing")
    assert refusal(tmp_path / "nowhere").endswith("is missing")


def test_load_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe{}", b'{"model_type": "deepseek_v3",}', b"[" * 5000, b"\0" * 64],
    ids=["empty", "cut", "not_utf8", "comma", "deep", "zeros"],
)
def test_load_invalid_json_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    assert "is not valid JSON" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '"deepseek_v3"', "3"])
def test_load_json_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "holds no JSON object" in refusal(tmp_path)
