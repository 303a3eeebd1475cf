"""The floor of a decode step, against figures that others worked out, and against arithmetic."""

from pathlib import Path
from typing import Any

import pytest

from dsd.model.config import ModelConfig
from dsd.model.parallel import WHOLE, Layout
from dsd.model.plan import expected_experts, floor_bytes, weight_bytes
from dsd.tools.make_checkpoint import SMALL, V3, write_config

ISL, OSL = 1024, 128


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """DeepSeek-V3's width, three dense and three MoE layers."""
    return write_config(tmp_path_factory.mktemp("v3"), {**V3, "num_hidden_layers": 6})


ANCHORS = [
    (1, ISL, 5.47),
    (16, ISL, 17.94),
    (64, ISL, 34.23),
    (128, ISL, 38.61),
    (256, ISL, 40.14),
    (64, 8192, 37.40),
]
"""Batch, prompt, GB: the floors beside which vLLM was measured, 128 tokens generated. Their number
of experts was simulated: 101.5 at batch 16 where the mean is 102.0."""


@pytest.mark.parametrize(("batch", "prompt", "gigabytes"), ANCHORS)
def test_floor_of_six_layers_is_that_of_the_anchors(
    six_layers: ModelConfig, batch: int, prompt: int, gigabytes: float
) -> None:
    floor = floor_bytes(six_layers, WHOLE, batch, prompt + OSL / 2) / 1e9
    assert floor == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize(
    ("batch", "milliseconds"), [(1, 0.25), (16, 0.79), (64, 1.56), (128, 1.88), (256, 2.21)]
)
def test_floor_of_a_tp_8_share_is_that_of_the_anchors(
    six_layers: ModelConfig, batch: int, milliseconds: float
) -> None:
    floor = floor_bytes(six_layers, Layout(tp_size=8), batch, ISL + OSL / 2)
    assert floor / 3.07e12 * 1e3 == pytest.approx(milliseconds, rel=0.02)


@pytest.mark.parametrize(
    ("batch", "count"), [(1, 8.0), (16, 101.5), (64, 222.1), (128, 251.6), (256, 255.9)]
)
def test_expected_experts_is_near_the_simulated_number(
    six_layers: ModelConfig, batch: int, count: float
) -> None:
    assert expected_experts(six_layers, WHOLE, batch) == pytest.approx(count, abs=0.5)


def test_expected_experts_of_all_groups_are_those_of_one(six_layers: ModelConfig) -> None:
    groups = [Layout(tp_size=8, tp_rank=rank, ep_size=8) for rank in range(8)]
    total = sum(expected_experts(six_layers, group, 24) for group in groups)
    assert total == pytest.approx(expected_experts(six_layers, WHOLE, 24))


def test_expected_experts_with_attention_dp_counts_the_other_ranks_tokens(
    six_layers: ModelConfig,
) -> None:
    layout = Layout(tp_size=8, ep_size=8, attention_dp=True)
    assert expected_experts(six_layers, layout, 3) == pytest.approx(
        expected_experts(six_layers, WHOLE, 24) / 8
    )


def test_routed_bytes_of_the_ranks_add_up(six_layers: ModelConfig) -> None:
    whole = weight_bytes(six_layers, WHOLE)
    for sizes in ({"tp_size": 8}, {"tp_size": 8, "ep_size": 4}):
        shares = [weight_bytes(six_layers, Layout(**sizes, tp_rank=rank)) for rank in range(8)]
        assert sum(share.routed for share in shares) == whole.routed
        # Norms, gates, q_a and kv_a are on every rank.
        assert 1.0 < sum(share.every_step for share in shares) / whole.every_step < 1.5


CHANGES: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({}, {"entry_bytes": 100}, 100),
    ({}, {}, 2 * (256 + 64)),
    ({"quantization_config": None}, {"itemsize": 4}, 4 * (256 + 64)),
]


@pytest.mark.parametrize(("fields", "options", "entry"), CHANGES)
def test_a_token_of_context_costs_an_entry_in_each_layer(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, int], entry: int
) -> None:
    config = write_config(tmp_path, {**SMALL, **fields})
    near, far = (floor_bytes(config, WHOLE, 5, context, **options) for context in (100, 101))
    assert far - near == pytest.approx(5 * 4 * entry)
    last = Layout(pp_size=4, pp_rank=3)
    near, far = (floor_bytes(config, last, 5, context, **options) for context in (100, 101))
    assert far - near == pytest.approx(5 * entry)


def test_every_step_of_a_plain_dense_model_is_its_parameters_but_the_embedding(
    tmp_path: Path,
) -> None:
    """Counted by hand for the small sizes."""
    fields = {**SMALL, "quantization_config": None, "num_hidden_layers": 1}
    config = write_config(tmp_path, fields)
    attention = 128 * 256 + 128 + 4 * 128 * 128 + 320 * 256 + 256 + 4 * 128 * 256 + 256 * 256
    layer = attention + 3 * 512 * 256 + 2 * 256
    head = 512 * 256 + 256
    assert weight_bytes(config, WHOLE) == (2 * (layer + head), 0)
    tied = write_config(tmp_path, {**fields, "tie_word_embeddings": True})
    assert weight_bytes(tied, WHOLE) == weight_bytes(config, WHOLE)
