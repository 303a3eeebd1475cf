"""Against transformers' DeepseekV3ForCausalLM with the same random weights, on the CPU.

Logits are compared token by token: |a - b| / |b|. One forward pass of the oracle is the reference
for every way to compute the same tokens here: one prefill, chunks, decode.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsd.ipc.messages import Sampling
from dsd.kernels.quant import dequantize_128x128, quantize_128x128
from dsd.model import checkpoint as tables
from dsd.model.config import ModelConfig
from dsd.model.layers import Arithmetic, Linear

GREEDY = Sampling(temperature=0.0)
TOLERANCE = {
    "float32": 1e-4,
    "fp8 against its dequantised twin": 1e-5,
    "act_quant, one linear map": 1e-3,
    "act_quant, whole model": 3e-2,
}
"""The third differs by order of summation only. In the fourth, a float32 rounding error now and
then moves an activation to the neighbouring e4m3 value, 6 % away."""
LENGTHS = [1, 2, 15, 16, 17, 64, 129, 300]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The worst token's."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    norms = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(norms.max())


def assert_near(actual: Tensor, expected: Tensor, kind: str = "float32") -> None:
    error = relative_error(actual, expected)
    assert error <= TOLERANCE[kind], f"{error=} > {TOLERANCE[kind]=}"


def random_chunks(length: int, generator: torch.Generator) -> list[int]:
    chunks: list[int] = []
    while (rest := length - sum(chunks)) > 0:
        largest = int(torch.randint(1, rest + 1, (1,), generator=generator))
        chunks.append(int(torch.randint(1, largest + 1, (1,), generator=generator)))
    return chunks


# ---- transformers -------------------------------------------------------------------------------


def test_prefill_logits_equal_transformers(
    checkpoint, open_runner, row_of, watch_logits, prompt_of
) -> None:
    runner = open_runner(checkpoint.directory)
    seen = watch_logits(runner)
    for length in LENGTHS:
        ids = prompt_of(length)
        row_of(runner).prefill(ids, [length], GREEDY)
        assert_near(seen.pop(), checkpoint.logits(ids))


def test_prefill_in_any_chunks_equals_transformers(
    checkpoint, open_runner, row_of, watch_logits, prompt_of, monkeypatch
) -> None:
    """The context in slices of 50 too, so that several are merged."""
    monkeypatch.setattr("dsd.model.chunks.CONTEXT_TOKENS", 50)
    runner = open_runner(checkpoint.directory)
    seen = watch_logits(runner)
    generator = torch.Generator().manual_seed(1)
    for length, chunks in (
        [(300, random_chunks(300, generator)) for _ in range(3)]
        + [(n, random_chunks(n, generator)) for n in (2, 17, 130)]
        + [(40, [1] * 40), (129, [128, 1]), (161, [1, 15, 16, 17, 112])]
    ):
        ids = prompt_of(length)
        row_of(runner).prefill(ids, chunks, GREEDY)
        assert_near(torch.cat(seen), checkpoint.logits(ids))
        seen.clear()


@pytest.mark.parametrize("length", [1, 31, 203])
def test_greedy_64_tokens_equal_transformers_generate(
    checkpoint, open_runner, row_of, prompt_of, length: int
) -> None:
    row = row_of(open_runner(checkpoint.directory))
    ids = prompt_of(length, seed=2)
    (output,) = row.prefill(ids, [length], GREEDY)
    tokens = [int.from_bytes(output.token_ids, "little")]
    tokens += [row.decode() for _ in range(63)]
    assert tokens == checkpoint.generate(ids, 64)
    assert len(set(tokens)) > 8, "a loop would prove little"


def test_decode_logits_equal_prefill_logits(
    checkpoint, open_runner, row_of, watch_logits, prompt_of
) -> None:
    """Absorbed against plain: two implementations that prove each other."""
    runner = open_runner(checkpoint.directory)
    seen = watch_logits(runner)
    ids = prompt_of(90, seed=3)
    row = row_of(runner)
    (output,) = row.prefill(ids, [90], GREEDY)
    tokens = [int.from_bytes(output.token_ids, "little")]
    tokens += [row.decode() for _ in range(40)]
    absorbed = torch.cat(seen[1:])
    seen.clear()
    row_of(runner).prefill([*ids, *tokens[:-1]], [130], GREEDY)
    assert_near(absorbed, seen[0][90:])


def test_no_shared_experts_equals_transformers(
    make_checkpoint, make_case, open_runner, row_of, watch_logits, prompt_of
) -> None:
    checkpoint = make_checkpoint(make_case("no_shared", n_shared_experts=0))
    runner = open_runner(checkpoint.directory)
    seen = watch_logits(runner)
    ids = prompt_of(70)
    row_of(runner).prefill(ids, [50, 20], GREEDY)
    assert_near(torch.cat(seen), checkpoint.logits(ids))


def test_prompt_logprobs_in_chunks_equal_transformers(
    make_checkpoint, make_case, open_runner, row_of, prompt_of, monkeypatch
) -> None:
    checkpoint = make_checkpoint(make_case("v3_plain"))
    monkeypatch.setattr("dsd.model.sampler.PROMPT_LOGITS_SLICE", 7)
    ids = prompt_of(61)
    want = checkpoint.logits(ids).log_softmax(-1)
    runner = open_runner(checkpoint.directory)
    sampling = Sampling(temperature=0.0, num_prompt_logprobs=3, num_logprobs=2)
    for chunks in ([61], [1, 29, 30, 1], [60, 1], [14, 47]):
        outputs = row_of(runner).prefill(ids, chunks, sampling)
        found = [entry for output in outputs for entry in output.prompt_logprobs[0]]
        assert [entry.token_id for entry in found] == ids[1:]
        for i, entry in enumerate(found):
            assert entry.logprob == pytest.approx(want[i, ids[i + 1]].item(), abs=1e-3)
            assert [token for token, _ in entry.top] == want[i].topk(3).indices.tolist()
        last = outputs[-1].logprobs[0]
        assert last.token_id == want[-1].argmax().item() == last.top[0][0]
        assert last.logprob == pytest.approx(want[-1].max().item(), abs=1e-3)


def test_kimi_k2_config_of_the_same_weights_gives_the_same_logits(
    make_checkpoint, make_case, open_runner, row_of, watch_logits, prompt_of, tmp_path: Path
) -> None:
    changes = {"n_group": 1, "topk_group": 1, "rope_theta": 50000.0, "q_lora_rank": None}
    checkpoint = make_checkpoint(make_case("kimi", **changes))
    shutil.copytree(checkpoint.directory, tmp_path / "kimi")
    path = tmp_path / "kimi/config.json"
    fields = json.loads(path.read_text()) | {"model_type": "kimi_k2", "rope_theta": 50000.0}
    fields["architectures"] = ["DeepseekV3ForCausalLM"]
    fields["rope_scaling"] = fields.pop("rope_parameters")
    path.write_text(json.dumps(fields))
    runner = open_runner(tmp_path / "kimi")
    seen = watch_logits(runner)
    ids = prompt_of(50)
    row_of(runner).prefill(ids, [50], GREEDY)
    assert_near(seen[0], checkpoint.logits(ids))


def test_absent_fields_mean_what_transformers_says(tmp_path: Path) -> None:
    """A wrong guess at one of these would be served without complaint."""
    from transformers import DeepseekV3Config

    names = "n_group topk_group norm_topk_prob routed_scaling_factor rms_norm_eps rope_theta"
    fields = {k: v for k, v in FP8_FIELDS.items() if k not in names.split()}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = ModelConfig.load(tmp_path), DeepseekV3Config(**fields)
    for name in names.split()[:-1]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.slow
def test_bfloat16_is_reported(checkpoint, open_runner, row_of, watch_logits, prompt_of) -> None:
    runner = open_runner(checkpoint.directory, dtype="bfloat16")
    seen = watch_logits(runner)
    ids = prompt_of(120)
    row_of(runner).prefill(ids, [70, 50], GREEDY)
    logits, want = torch.cat(seen), checkpoint.logits(ids)
    error = (logits - want).norm(dim=-1) / want.norm(dim=-1)
    same = (logits.argmax(-1) == want.argmax(-1)).float().mean()
    print(f"bfloat16: error mean {error.mean():.4f} max {error.max():.4f}, best equal {same:.2f}")
    assert torch.isfinite(logits).all()


# ---- fp8 ----------------------------------------------------------------------------------------

FP8_FIELDS: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 300,
    "hidden_size": 200,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 136,
    "kv_lora_rank": 144,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 28,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
"""Widths that are no multiples of 128 wherever that is allowed."""
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


class Fp8Twins:
    """The same weights as an fp8 checkpoint and, dequantised, as a float32 one."""

    def __init__(self, directory: Path, scale_fmt: str | None) -> None:
        self.fp8, self.float32 = directory / "fp8", directory / "float32"
        self.fp8.mkdir()
        self.float32.mkdir()
        quantization = FP8 | ({"scale_fmt": scale_fmt} if scale_fmt else {})
        (self.float32 / "config.json").write_text(json.dumps(FP8_FIELDS))
        (self.fp8 / "config.json").write_text(
            json.dumps({**FP8_FIELDS, "quantization_config": quantization})
        )
        quantised, plain = self._tensors(ModelConfig.load(self.fp8))
        save_file(quantised, self.fp8 / "model.safetensors", metadata={"format": "pt"})
        save_file(plain, self.float32 / "model.safetensors", metadata={"format": "pt"})

    @staticmethod
    def _tensors(config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        quantised, plain = {}, {}
        for spec in tables.tensors(config):
            if spec.kind == "scale":
                continue
            value = torch.randn(spec.shape)
            if spec.kind == "linear":
                # Magnitudes differ between blocks, so that a scale in the wrong place shows.
                value *= (
                    0.3
                    + torch.rand(-(-spec.shape[0] // 64), 1).repeat_interleave(64, 0)[
                        : spec.shape[0]
                    ]
                )
                q, scale = quantize_128x128(value * spec.shape[1] ** -0.5)
                quantised |= {spec.name: q, f"{spec.name}_scale_inv": scale}
                plain[spec.name] = dequantize_128x128(q, scale, torch.float32)
                continue
            if spec.kind == "float32":
                value *= 0.1
            elif len(spec.shape) == 1:
                value = 1 + value * 0.1
            elif spec.target != "embed":
                value *= spec.shape[1] ** -0.5
            quantised[spec.name] = plain[spec.name] = value
        return quantised, plain


@pytest.fixture(scope="module", params=[None, "ue8m0"], ids=["float_scales", "ue8m0"])
def twins(request, tmp_path_factory: pytest.TempPathFactory) -> Fp8Twins:
    return Fp8Twins(tmp_path_factory.mktemp("fp8"), request.param)


Logits = Callable[..., Tensor]


@pytest.fixture
def logits_of(open_runner, row_of, watch_logits) -> Logits:
    """Logits of a prompt in two chunks, then of 8 decoded tokens."""

    def compute(directory: Path, ids: list[int], act_quant: str = "none") -> Tensor:
        runner = open_runner(directory, act_quant=act_quant)
        seen = watch_logits(runner)
        row = row_of(runner)
        row.prefill(ids, [len(ids) // 3, len(ids) - len(ids) // 3], GREEDY)
        for _ in range(8):
            row.decode()
        return torch.cat(seen)

    return compute


def test_fp8_weight_only_equals_its_dequantised_twin(twins, logits_of, prompt_of) -> None:
    ids = prompt_of(100)
    assert_near(
        logits_of(twins.fp8, ids),
        logits_of(twins.float32, ids),
        "fp8 against its dequantised twin",
    )


def fake_quantise(x: Tensor, ue8m0: bool) -> Tensor:
    """1x128 e4m3 and back, element by element and without the kernels: q * scale."""
    out = torch.empty_like(x)
    for start in range(0, x.shape[-1], 128):
        part = x[..., start : start + 128]
        scale = part.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        if ue8m0:
            scale = torch.tensor([2.0 ** math.ceil(math.log2(s)) for s in scale.flatten()]).view(
                scale.shape
            )
        out[..., start : start + 128] = (part / scale).to(torch.float8_e4m3fn).float() * scale
    return out


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("n", "k"), [(200, 136), (128, 256), (300, 1000)])
def test_act_quant_linear_equals_explicit_dequantised_arithmetic(
    n: int, k: int, ue8m0: bool
) -> None:
    torch.manual_seed(0)
    q, scale = quantize_128x128(torch.randn(n, k))
    x = torch.randn(33, k) * torch.logspace(-1, 1, k)
    linear = Linear(q, scale, Arithmetic(torch.float32, fp8=True, ue8m0=ue8m0))
    want = fake_quantise(x, ue8m0) @ dequantize_128x128(q, scale, torch.float32).t()
    assert_near(linear(x), want, "act_quant, one linear map")
    assert relative_error(linear(x), x @ dequantize_128x128(q, scale, torch.float32).t()) > 5e-3


def transformers_with_quantised_activations(
    directory: Path, ids: list[int], ue8m0: bool, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """transformers' model, with a `linear` that quantises what goes into every fp8 weight."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    oracle = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    oracle.set_experts_implementation("eager")
    gates = [layer.mlp.gate for layer in oracle.model.layers if hasattr(layer.mlp, "gate")]
    exact = {oracle.lm_head.weight.data_ptr(), *(gate.weight.data_ptr() for gate in gates)}
    linear = torch.nn.functional.linear
    calls = []

    def quantising(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() not in exact:
            calls.append(weight.shape)
            x = fake_quantise(x, ue8m0)
        return linear(x, weight, bias)

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.nn.functional, "linear", quantising)
        logits = oracle(torch.tensor([ids])).logits[0]
    assert len(calls) > 3 * 5 + 2 * 2, "the experts too"
    return logits


def test_act_quant_model_equals_transformers_with_quantised_activations(
    twins, open_runner, row_of, watch_logits, prompt_of, monkeypatch
) -> None:
    ids = prompt_of(80)
    runner = open_runner(twins.fp8, act_quant="fp8")
    seen = watch_logits(runner)
    row_of(runner).prefill(ids, [80], GREEDY)
    ue8m0 = runner.model.config.ue8m0
    want = transformers_with_quantised_activations(twins.float32, ids, ue8m0, monkeypatch)
    error = (seen[0] - want).norm(dim=-1) / want.norm(dim=-1)
    limit = TOLERANCE["act_quant, whole model"]
    print(f"act_quant against transformers: median {error.median():.4f} max {error.max():.4f}")
    # A token whose experts change hands because of one of these is rare, but far off.
    assert error.median() < limit / 2 and error.quantile(0.9) < limit


def test_act_quant_differs_from_weight_only_by_a_bounded_amount(
    twins, open_runner, row_of, watch_logits, prompt_of
) -> None:
    ids, logits = prompt_of(80), []
    for act_quant in ("none", "fp8"):
        runner = open_runner(twins.fp8, act_quant=act_quant)
        seen = watch_logits(runner)
        row_of(runner).prefill(ids, [80], GREEDY)
        logits += seen
    error = (logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)
    print(f"act_quant against weight-only: mean {error.mean():.3f} max {error.max():.3f}")
    assert 1e-3 < error.mean() < 0.15


def test_act_quant_decode_is_near_prefill(
    twins, open_runner, row_of, watch_logits, prompt_of
) -> None:
    """Decode multiplies by W_UK and W_UV unquantised, prefill through kv_b in fp8."""
    runner = open_runner(twins.fp8, act_quant="fp8")
    seen = watch_logits(runner)
    row = row_of(runner)
    ids = prompt_of(40)
    (output,) = row.prefill(ids, [40], GREEDY)
    tokens = [int.from_bytes(output.token_ids, "little"), *(row.decode() for _ in range(20))]
    absorbed = torch.cat(seen[1:])
    seen.clear()
    row_of(runner).prefill([*ids, *tokens[:-1]], [60], GREEDY)
    error = (absorbed - seen[0][40:]).norm(dim=-1) / seen[0][40:].norm(dim=-1)
    assert error.mean() < 0.1
