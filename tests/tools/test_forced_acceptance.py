"""Acceptance as somebody says, for measurements."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsd.model.config import ModelConfig
from dsd.model.parallel import WHOLE, Layout
from dsd.model.plan import floor_bytes, mtp_bytes, weight_bytes
from dsd.tools.forced_acceptance import chance_of, force, forced, share_experts
from dsd.tools.hand_driver import HandDriver
from dsd.tools.local_engine import GREEDY, LocalEngine
from dsd.tools.make_checkpoint import SMALL, write_config

FIELDS = {**SMALL, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}


@pytest.mark.parametrize(("length", "num_nextn"), [(1.0, 3), (2.82, 3), (4.0, 3), (1.7, 1), (3, 5)])
def test_mean_length_is_what_was_said(length: float, num_nextn: int) -> None:
    chance = chance_of(length, num_nextn)
    assert sum(chance**i for i in range(num_nextn + 1)) == pytest.approx(length)
    accepts, row = forced(length, num_nextn), torch.arange(64, dtype=torch.int32)
    start, steps = torch.arange(64) % 7 + 1000, 300
    known = start.clone()
    for _ in range(steps):
        still, advance = torch.ones(64, dtype=torch.bool), torch.ones(64, dtype=torch.long)
        for place in range(num_nextn):
            tokens = SimpleNamespace(num_tokens=(known + place + 1).int())
            still &= accepts(SimpleNamespace(tokens=tokens), row, place)
            advance += still
        known += advance
    assert ((known - start) / steps).mean().item() == pytest.approx(length, abs=0.03)


def test_random_weights_advance_as_forced(tmp_path: Path) -> None:
    write_config(tmp_path, FIELDS)
    engine = LocalEngine(
        tmp_path, device="cpu", max_batch_size=2, max_num_tokens=32, max_seq_len=200,
        load_format="dummy", num_nextn=2,
    )  # fmt: skip
    force(engine.runner, 3.0)
    driver = HandDriver(engine.runner)
    for i in range(2):
        driver.add([1, 2, 3 + i], 31, GREEDY)
    driver.run(2)
    assert [row.accepted for row in driver.rows] == [[3] * 10] * 2


@pytest.mark.parametrize("layout", [WHOLE, Layout(tp_size=2)])
def test_floor_with_drafts_reads_layer_and_head_once_for_each(tmp_path: Path, layout) -> None:
    """With every expert touched, and no context."""
    every = {"num_experts_per_tok": 16, "topk_group": 4, "moe_intermediate_size": 256}
    config: ModelConfig = write_config(tmp_path, {**FIELDS, **every})
    assert config.n_routed_experts == 16
    model, mtp = weight_bytes(config, layout), mtp_bytes(config, layout)
    head = 2 * config.vocab_size * config.hidden_size // layout.tp_size
    assert mtp.routed == model.routed, "each has one MoE layer"
    for num_drafts in (0, 1, 3):
        want = sum(model) + num_drafts * (sum(mtp) + head)
        assert floor_bytes(config, layout, 4, 0, num_drafts=num_drafts) == pytest.approx(want)


def test_all_tokens_share_experts(tmp_path: Path) -> None:
    write_config(tmp_path, FIELDS)
    engine = LocalEngine(
        tmp_path, device="cpu", max_batch_size=2, max_num_tokens=32, max_seq_len=200,
        load_format="dummy", num_nextn=1,
    )  # fmt: skip
    share_experts(engine.runner)
    drafter, config = engine.runner.drafter, engine.runner.model.config
    assert drafter is not None
    layers = [engine.runner.model.layers[-1], drafter.mtp.layer]
    for moe in (layer.mlp for layer in layers):
        x = torch.randn(9, config.hidden_size, dtype=engine.runner.model.dtype)
        ids = moe.route(x)[0].sort(dim=1).values
        assert (ids == ids[0]).all() and len(set(ids[0].tolist())) == config.num_experts_per_tok
    floor = floor_bytes(config, WHOLE, 8, 0.0, same_experts=True)
    assert floor == floor_bytes(config, WHOLE, 1, 0.0) < floor_bytes(config, WHOLE, 8, 0.0)
