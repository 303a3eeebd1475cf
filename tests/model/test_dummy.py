"""Dummy weights: a checkpoint's shapes and dtypes, sizes that last, no file but config.json."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsd.ipc.messages import Chunk, Join, Sampling, Step, pack_int32
from dsd.model import checkpoint, loader
from dsd.model.config import CheckpointError, ModelConfig
from dsd.model.parallel import WHOLE, Layout
from dsd.tools.local_engine import LocalEngine
from dsd.tools.make_checkpoint import SMALL, write_checkpoint, write_config

CPU = torch.device("cpu")
FIELDS: dict[str, Any] = {**SMALL, "num_hidden_layers": 2}
E4M3 = torch.float8_e4m3fn


def make(
    config: ModelConfig, layout: Layout = WHOLE, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Tensor]:
    return loader.dummy(config, layout, dtype, CPU, seed)


@pytest.mark.parametrize("quantization", [SMALL["quantization_config"], None], ids=["fp8", "plain"])
@pytest.mark.parametrize("torch_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dummy_has_the_targets_of_a_checkpoint_with_this_configuration(
    tmp_path: Path, quantization: Any, torch_dtype: str, dtype: torch.dtype
) -> None:
    fields = {**FIELDS, "quantization_config": quantization, "torch_dtype": torch_dtype}
    config = write_config(tmp_path, fields)
    want = {name: (spec.shape, spec.kind) for name, spec in checkpoint.targets(config).items()}
    weights = make(config, dtype=dtype)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        name: shape for name, (shape, _) in want.items()
    }
    for name, (_, kind) in want.items():
        held = weights[name].dtype
        if kind in ("scale", "float32"):
            assert held == torch.float32
        elif kind == "linear" and quantization is not None:
            assert held == E4M3
        else:
            assert held.itemsize == min(dtype.itemsize, getattr(torch, torch_dtype).itemsize), name


def test_dummy_has_the_dtypes_that_load_gives(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FIELDS)
    config = ModelConfig.load(tmp_path)
    loaded = loader.load(config, tmp_path, torch.bfloat16, CPU, lambda _done, _total: None)
    made = make(config)
    assert [*made] == [*loaded]
    for name, weight in loaded.items():
        assert (made[name].shape, made[name].dtype) == (weight.shape, weight.dtype), name


def test_dummy_values_are_spread_as_described(tmp_path: Path) -> None:
    config = write_config(tmp_path, FIELDS)
    weights = {name: weight.float() for name, weight in make(config).items()}
    hidden, width = config.hidden_size, config.moe_intermediate_size
    for name, std in {
        "embed": 1.0,
        "lm_head": hidden**-0.5,
        "layers.1.gate": hidden**-0.5,
        "layers.0.attn.q": 1.0,
        "layers.1.experts.gate_up": 1.0,
        "layers.1.experts.down": 1.0,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.03), name
        assert abs(weights[name].mean().item()) < 4 * std / weights[name].numel() ** 0.5, name
    assert (weights["layers.1.gate_bias"] == 0).all()
    assert (weights["layers.0.input_layernorm"] == 1).all()
    assert (weights["layers.1.experts.gate_up.scale"] == torch.tensor(hidden**-0.5)).all()
    assert (weights["layers.1.experts.down.scale"] == torch.tensor(width**-0.5)).all()
    first, second = weights["layers.1.experts.down"][:2]
    assert not torch.equal(first, second)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.float(), other.float())


def is_random(name: str, weight: Tensor) -> bool:
    return weight.dim() > 1 and not name.endswith(".scale")


def test_dummy_follows_the_seed_and_the_name(tmp_path: Path) -> None:
    config = write_config(tmp_path, FIELDS)
    once, again, other = make(config), make(config), make(config, seed=1)
    assert all(same(weight, again[name]) for name, weight in once.items())
    for name, weight in once.items():
        assert same(weight, other[name]) is not is_random(name, weight), name
    assert not same(once["layers.0.attn.q"], once["layers.1.attn.q"])


def test_dummy_ranks_agree_on_what_both_hold_and_on_nothing_else(tmp_path: Path) -> None:
    config = write_config(tmp_path, FIELDS)
    left, right = (make(config, Layout(tp_size=2, tp_rank=rank, ep_size=2)) for rank in range(2))
    whole = checkpoint.targets(config)
    for name, weight in right.items():
        is_held_by_both = tuple(weight.shape) == whole[name].shape
        assert same(weight, left[name]) is (is_held_by_both or not is_random(name, weight)), name


@pytest.mark.parametrize("act_quant", ["none", "fp8"])
def test_dummy_model_runs_from_a_configuration_alone_and_its_logits_are_near_unit_size(
    tmp_path: Path, act_quant: str
) -> None:
    write_config(tmp_path, SMALL)
    engine = LocalEngine(
        tmp_path, device="cpu", act_quant=act_quant, max_batch_size=2, load_format="dummy"
    )
    assert "random" in engine.ready.notes[0]
    vocab = SMALL["vocab_size"]
    prompt = torch.randint(vocab, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = Sampling(num_prompt_logprobs=0)
    join = Join(0, pack_int32(prompt), len(prompt), 0, (1, 2, 3, 4, 5), sampling)
    step = Step(0, 1, "prefill", 0, (join,), (), b"", (Chunk(0, 0, len(prompt), True),))
    entries = engine.runner.run(step).prompt_logprobs[0]
    mean = sum(entry.logprob for entry in entries) / len(entries)
    # Of a random token, under independent logits ~ N(0, s^2), it is -(log V + s^2 / 2).
    assert mean == pytest.approx(-(math.log(vocab) + 0.5), abs=0.2)


def test_dummy_share_of_a_tp_layout_runs_alone(tmp_path: Path) -> None:
    write_config(tmp_path, {**SMALL, "moe_intermediate_size": 256})
    engine = LocalEngine(
        tmp_path, device="cpu", max_batch_size=2, load_format="dummy", layout=Layout(tp_size=2)
    )
    assert engine.ready.vocab_size == SMALL["vocab_size"] // 2
    (answer,) = engine.generate([[1, 2, 3]], 4, frozenset())
    assert max(answer.token_ids) < SMALL["vocab_size"] // 2


def test_without_dummy_a_configuration_alone_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, SMALL)
    with pytest.raises(CheckpointError, match="neither"):
        LocalEngine(tmp_path, device="cpu")
