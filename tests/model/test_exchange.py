"""The ranks' parts of the experts' sum add up to the whole; dispatched rows give the same sum; a
rank in attention-DP runs alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsd.kernels import moe_dispatch, moe_route
from dsd.kernels.quant import quantize_1x128
from dsd.model import loader
from dsd.model.config import ModelConfig
from dsd.model.layers import Arithmetic, Quantized
from dsd.model.moe import MoE
from dsd.model.parallel import WHOLE, Layout
from dsd.tools.local_engine import LocalEngine
from dsd.tools.make_checkpoint import SMALL, write_checkpoint, write_config

FIELDS: dict[str, Any] = {
    **SMALL,
    "moe_intermediate_size": 512,
    "n_routed_experts": 8,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 128,
}
CPU = torch.device("cpu")


def moe(config: ModelConfig, directory: Path, layout: Layout, fp8: bool) -> MoE:
    """The first MoE layer of a rank."""
    silent = lambda done, total: None  # noqa: E731
    weights = loader.load(config, directory, torch.float32, CPU, silent, layout)
    layer = config.first_k_dense_replace
    arithmetic = Arithmetic(torch.float32, fp8, False)
    return MoE(config, weights, f"layers.{layer}", arithmetic, layout)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("tp_size", "ep_size"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_parts_of_the_ranks_add_up(tmp_path: Path, tp_size: int, ep_size: int, fp8: bool) -> None:
    write_checkpoint(tmp_path, FIELDS)
    config = ModelConfig.load(tmp_path)
    torch.manual_seed(0)
    plain = torch.randn(23, config.hidden_size)
    x: torch.Tensor | Quantized = plain
    if fp8:
        x = Quantized(*quantize_1x128(plain))
    want = moe(config, tmp_path, WHOLE, fp8)(x, plain)
    layouts = [Layout(tp_size=tp_size, tp_rank=i, ep_size=ep_size) for i in range(tp_size)]
    got = sum(moe(config, tmp_path, layout, fp8)(x, plain) for layout in layouts)
    # In fp8 each slice of an expert's width is quantised by itself, as the whole's blocks are.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("layout", [WHOLE, Layout(tp_size=4, tp_rank=2, ep_size=2)], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_dispatched_rows_give_what_a_kernel_for_each_step_gives(
    num_tokens: int, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, FIELDS)
    layer = moe(ModelConfig.load(tmp_path), tmp_path, layout, fp8=True)
    plain = torch.randn(num_tokens, layer.config.hidden_size)
    x = Quantized(*quantize_1x128(plain))
    want = layer(x, plain)
    monkeypatch.setattr(moe_dispatch, "dispatches", lambda *arguments: True)
    monkeypatch.setattr(moe_route, "permute_by_expert", None)  # which nobody calls now
    assert torch.equal(layer(x, plain), want)


@pytest.mark.slow
@pytest.mark.parametrize("num_nextn", [0, 2])
@pytest.mark.parametrize(("tp_size", "ep_size"), [(2, 2), (4, 1), (4, 4)])
def test_share_in_attention_dp_runs_alone(
    tmp_path: Path, tp_size: int, ep_size: int, num_nextn: int
) -> None:
    write_config(tmp_path, {**FIELDS, "num_nextn_predict_layers": 1})
    layout = Layout(tp_size=tp_size, ep_size=ep_size, attention_dp=True)
    engine = LocalEngine(
        tmp_path,
        device="cpu",
        max_batch_size=2,
        load_format="dummy",
        layout=layout,
        num_nextn=num_nextn,
    )
    layer = engine.runner.model.layers[-1].mlp
    assert isinstance(layer, MoE) and len(layer.experts) == 8 // ep_size
    assert len(layer.gate_up.weight) == 8 // ep_size
    (answer,) = engine.generate([[1, 2, 3]], 4, frozenset())
    assert len(answer.token_ids) == 4
