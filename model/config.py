"""`ModelConfig`: a checkpoint's config.json (and hf_quant_config.json), checked and completed.

Covers `model_type` deepseek_v3 and kimi_k2 of any sizes. Knows nothing of torch: the planner and
the checkpoint tools read sizes here. Errors are `CheckpointError`, one sentence that names file and
field.
"""

import math
from pathlib import Path
from typing import Any

import msgspec

FAMILY = ("deepseek_v3", "kimi_k2")
FP8_BLOCK = 128


class CheckpointError(Exception):
    """The checkpoint cannot be served; one sentence that names file and field or key."""


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding; `factor == 1` without YaRN (arXiv 2309.00071)."""

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


class _RawConfig(msgspec.Struct, kw_only=True):
    """The fields of config.json that matter, as published; others are ignored.

    What no tensor would contradict has the default of the published DeepseekV3Config.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    q_lora_rank: int | None = None
    n_shared_experts: int | None = 0
    n_group: int | None = 8
    topk_group: int | None = 4
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    num_nextn_predict_layers: int | None = 0
    eos_token_id: int | list[int] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    quantization_config: dict[str, Any] | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one checkpoint; names are the published ones."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    num_nextn_predict_layers: int
    dtype: str
    """"bfloat16", "float16" or "float32": of the checkpoint's unquantised weights."""
    fp8: bool
    """Linear layers are e4m3 with 128x128 scales named `weight_scale_inv`."""
    ue8m0: bool
    """Activation scales are rounded up to powers of two."""
    kv_cache_fp8: bool

    @classmethod
    def load(cls, model_dir: Path) -> "ModelConfig":
        """Reads config.json. Raises CheckpointError."""
        path = model_dir / "config.json"
        fields = _read_json(path)
        if fields.get("model_type") not in FAMILY:
            raise CheckpointError(
                f"{path}: model_type is {fields.get('model_type')!r}; "
                f"dsd serves {' and '.join(FAMILY)}"
            )
        try:
            raw = msgspec.convert(fields, _RawConfig)
            config = _complete(raw, _kv_cache_fp8(model_dir))
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return config

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a token's entry in the KV cache."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head dim), times YaRN's mscale_all_dim squared (published model code)."""
        mscale = yarn_mscale(self.rope.factor, self.rope.mscale_all_dim)
        return float(self.qk_head_dim**-0.5 * mscale * mscale)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, arXiv 2309.00071 equation 22; 1 where it is off."""
    if factor <= 1.0 or mscale == 0.0:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return fields


def _kv_cache_fp8(model_dir: Path) -> bool:
    path = model_dir / "hf_quant_config.json"
    if not path.exists():
        return False
    quantization = _read_json(path).get("quantization")
    return isinstance(quantization, dict) and quantization.get("kv_cache_quant_algo") == "FP8"


def _complete(raw: _RawConfig, kv_cache_fp8: bool) -> ModelConfig:
    fp8, ue8m0 = _quantization(raw.quantization_config)
    _check(raw, fp8)
    shared = {
        name: getattr(raw, name)
        for name in ModelConfig.__struct_fields__
        if name in _RawConfig.__struct_fields__ and name != "dtype"
    }
    shared.update(
        n_shared_experts=raw.n_shared_experts or 0,
        n_group=raw.n_group or 1,
        topk_group=raw.topk_group or 1,
        num_nextn_predict_layers=raw.num_nextn_predict_layers or 0,
    )
    return ModelConfig(
        **shared,
        rope=_rope(raw),
        dtype=raw.torch_dtype or raw.dtype or "bfloat16",
        fp8=fp8,
        ue8m0=ue8m0,
        kv_cache_fp8=kv_cache_fp8,
    )


def _check(raw: _RawConfig, fp8: bool) -> None:
    expected = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
        "rope_interleave": True,
    }
    for name, value in expected.items():
        if getattr(raw, name) != value:
            raise ValueError(f"{name} is {getattr(raw, name)!r}; dsd supports {value!r}")
    _check_positive(
        msgspec.structs.asdict(raw),
        {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers", "n_group"},
    )
    _check_experts(raw)
    if raw.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim is {raw.qk_rope_head_dim}; it must be even")
    if (raw.torch_dtype or raw.dtype or "bfloat16") not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"torch_dtype is {raw.torch_dtype or raw.dtype!r}")
    for name in ("intermediate_size", "moe_intermediate_size") if fp8 else ():
        # gate and up are stored as one weight, whose scale blocks must not straddle the two.
        if getattr(raw, name) % FP8_BLOCK:
            raise ValueError(f"{name} is {getattr(raw, name)}; in fp8 a multiple of {FP8_BLOCK}")


def _check_positive(fields: dict[str, Any], may_be_zero: set[str], where: str = "") -> None:
    for name, value in fields.items():
        if type(value) not in (int, float) or name == "eos_token_id":
            continue
        if value < 0 or (value == 0 and name not in may_be_zero):
            raise ValueError(f"{where}{name} is {value}; it must be positive")
        if value >= 1 << 31:
            raise ValueError(f"{where}{name} is {value}; that is too large")


def _check_experts(raw: _RawConfig) -> None:
    groups, kept = raw.n_group or 1, raw.topk_group or 1
    if raw.n_routed_experts % groups or kept > groups:
        raise ValueError(
            f"n_routed_experts {raw.n_routed_experts}, n_group {groups} and topk_group {kept} "
            "do not fit together"
        )
    if raw.num_experts_per_tok > raw.n_routed_experts // groups * kept:
        raise ValueError(
            f"num_experts_per_tok {raw.num_experts_per_tok} is more than the experts of "
            f"{kept} of {groups} groups"
        )


def _quantization(fields: dict[str, Any] | None) -> tuple[bool, bool]:
    if fields is None:
        return False, False
    method, block = fields.get("quant_method"), fields.get("weight_block_size")
    if method != "fp8" or block != [FP8_BLOCK, FP8_BLOCK]:
        raise ValueError(
            f"quantization_config has quant_method {method!r} and weight_block_size {block!r}; "
            "dsd serves fp8 with [128, 128]"
        )
    return True, fields.get("scale_fmt") == "ue8m0"


def _rope(raw: _RawConfig) -> RopeConfig:
    fields = raw.rope_scaling or raw.rope_parameters or {}
    kind = fields.get("type") or fields.get("rope_type") or "default"
    known: dict[str, Any] = {"theta": fields.get("rope_theta", raw.rope_theta)}
    if kind == "yarn":
        known |= _yarn(fields, raw.max_position_embeddings)
    elif kind != "default":
        raise ValueError(f"rope_scaling has type {kind!r}; dsd supports yarn")
    rope = msgspec.convert(known, RopeConfig, strict=False)
    if rope.theta <= 1.0:
        raise ValueError(f"rope_theta is {rope.theta}; it must be more than 1")
    _check_positive(msgspec.structs.asdict(rope), {"mscale", "mscale_all_dim"}, "rope_scaling: ")
    return rope


def _yarn(fields: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    known = {
        name: fields[name]
        for name in RopeConfig.__struct_fields__
        if name != "theta" and fields.get(name) is not None
    }
    if "factor" not in known:
        raise ValueError("rope_scaling has no factor")
    known.setdefault("original_max_position_embeddings", max_position_embeddings)
    return known
