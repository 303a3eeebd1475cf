"""Shares of a checkpoint: put together they are the whole, and no rank reads another's bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsd.model import checkpoint, loader
from dsd.model.config import CheckpointError, ModelConfig
from dsd.model.parallel import WHOLE, Layout
from dsd.tools.make_checkpoint import SMALL, V3

CPU = torch.device("cpu")
Weights = dict[str, Tensor]
FP8_FIELDS: dict[str, Any] = {
    **SMALL,
    "vocab_size": 44,
    "hidden_size": 64,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 128,
    "v_head_dim": 128,
}
"""Four heads; hidden size and ranks are no multiples of a scale block, what is cut is."""
PLAIN_FIELDS = {
    **FP8_FIELDS,
    "quantization_config": None,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
FIELDS = {
    "fp8": FP8_FIELDS,
    "plain": PLAIN_FIELDS,
    "no_q_lora": {**FP8_FIELDS, "q_lora_rank": None},
}
SIZES: list[dict[str, Any]] = [
    {"tp_size": 2},
    {"tp_size": 4},
    {"tp_size": 2, "ep_size": 2},
    {"tp_size": 4, "ep_size": 4},
    {"tp_size": 4, "ep_size": 2},
    {"pp_size": 2},
    {"tp_size": 2, "ep_size": 2, "pp_size": 3},
    {"tp_size": 2, "attention_dp": True},
    {"tp_size": 4, "ep_size": 2, "attention_dp": True},
    {"tp_size": 4, "ep_size": 4, "pp_size": 2, "attention_dp": True},
]
QUICK = [{"tp_size": 4, "ep_size": 2}]
QUICK_AND_SLOW = [
    pytest.param(
        sizes,
        id=",".join(f"{name}={size}" for name, size in sizes.items()),
        marks=[] if sizes in QUICK else [pytest.mark.slow],
    )
    for sizes in SIZES
]


def make_config(directory: Path, fields: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(fields))
    return ModelConfig.load(directory)


def write_tensors(config: ModelConfig, directory: Path) -> None:
    torch.manual_seed(0)
    tensors = {}
    for spec in checkpoint.tensors(config):
        value = torch.randn(spec.shape)
        is_fp8 = config.fp8 and spec.kind == "linear"
        tensors[spec.name] = value.to(torch.float8_e4m3fn) if is_fp8 else value
    save_file(tensors, directory / "model.safetensors")


def load(config: ModelConfig, directory: Path, layout: Layout = WHOLE) -> Weights:
    return loader.load(config, directory, torch.float32, CPU, lambda _done, _total: None, layout)


# ---- the shares put together, by hand -----------------------------------------------------------


def join(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat([part.float() for part in parts], dim)


def join_gate_up(parts: list[Tensor], dim: int) -> Tensor:
    """Each part holds its gate rows and then its up rows."""
    halves = [part.float().chunk(2, dim) for part in parts]
    return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], dim)


def join_experts(name: str, parts: list[Tensor], ep_size: int) -> Tensor:
    """Rank r holds group r % ep_size, slice r // ep_size."""
    groups = [parts[group::ep_size] for group in range(ep_size)]
    if ".gate_up" in name:
        return join([join_gate_up(group, 1) for group in groups], 0)
    return join([join(group, 2) for group in groups], 0)


def join_ranks(name: str, parts: list[Tensor], sizes: dict[str, Any]) -> Tensor:
    """One target of one stage, of all its ranks in order."""
    kind = name.split(".", 2)[-1].removesuffix(".scale")
    if kind.startswith("experts."):
        return join_experts(name, parts, sizes.get("ep_size", 1))
    if not sizes.get("attention_dp"):
        if kind in ("mlp.gate_up", "shared.gate_up"):
            return join_gate_up(parts, 0)
        if kind in ("mlp.down", "shared.down", "attn.o"):
            return join(parts, 1)
        if kind in ("attn.q", "attn.kv_b", "embed", "lm_head"):
            return join(parts, 0)
    assert all(torch.equal(part.float(), parts[0].float()) for part in parts), name
    return parts[0].float()


@pytest.mark.parametrize("sizes", QUICK_AND_SLOW)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_shares_put_together_are_the_whole_bit_for_bit(
    tmp_path: Path, fields: dict[str, Any], sizes: dict[str, Any]
) -> None:
    config = make_config(tmp_path, fields)
    write_tensors(config, tmp_path)
    joined: Weights = {}
    for pp_rank in range(sizes.get("pp_size", 1)):
        places = [
            Layout(**sizes, tp_rank=tp_rank, pp_rank=pp_rank)
            for tp_rank in range(sizes.get("tp_size", 1))
        ]
        shares = [load(config, tmp_path, place) for place in places]
        assert all(share.keys() == shares[0].keys() for share in shares)
        assert not joined.keys() & shares[0].keys()
        for name in shares[0]:
            joined[name] = join_ranks(name, [share[name] for share in shares], sizes)
    whole = load(config, tmp_path)
    assert joined.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(joined[name], tensor.float()), name


# ---- what is read -------------------------------------------------------------------------------


class CountingView:
    """safetensors' view of a tensor that adds up the bytes that it is asked for."""

    def __init__(self, view: Any, count: Callable[[int], None]) -> None:
        self._view = view
        self._count = count

    def get_shape(self) -> Any:
        return self._view.get_shape()

    def get_dtype(self) -> Any:
        return self._view.get_dtype()

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self._view[index]
        self._count(found.nbytes)
        return found


@pytest.mark.parametrize(
    "staging_bytes", [loader.STAGING_BYTES, pytest.param(600, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("sizes", QUICK_AND_SLOW)
def test_rank_reads_the_bytes_that_it_holds_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], staging_bytes: int
) -> None:
    config = make_config(tmp_path, {**FP8_FIELDS, "num_hidden_layers": 3})
    write_tensors(config, tmp_path)
    read: list[int] = []
    original = loader.Index.slice
    monkeypatch.setattr(
        loader.Index,
        "slice",
        lambda index, name: CountingView(original(index, name), read.append),
    )
    monkeypatch.setattr(loader, "STAGING_BYTES", staging_bytes)
    whole = sum(weight.nbytes for weight in load(config, tmp_path).values())
    assert sum(read) == whole
    for tp_rank in range(sizes.get("tp_size", 1)):
        read.clear()
        weights = load(config, tmp_path, Layout(**sizes, tp_rank=tp_rank))
        held = sum(weight.nbytes for weight in weights.values())
        assert sum(read) == held < whole


def test_report_ends_with_the_bytes_of_the_share(tmp_path: Path) -> None:
    config = make_config(tmp_path, FP8_FIELDS)
    write_tensors(config, tmp_path)
    seen: list[tuple[int, int]] = []
    weights = loader.load(
        config,
        tmp_path,
        torch.float32,
        CPU,
        lambda *pair: seen.append(pair),
        Layout(tp_size=4, tp_rank=3),
    )
    total = sum(weight.nbytes for weight in weights.values())
    assert seen[-1] == (total, total)


def test_rank_refuses_a_checkpoint_that_lacks_what_another_rank_holds(tmp_path: Path) -> None:
    config = make_config(tmp_path, PLAIN_FIELDS)
    write_tensors(config, tmp_path)
    more = make_config(tmp_path, {**PLAIN_FIELDS, "num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.3"):
        load(more, tmp_path, Layout(pp_size=2, pp_rank=0))


# ---- sizes --------------------------------------------------------------------------------------


def test_v3_at_tp_8_has_the_shapes_of_a_rank(tmp_path: Path) -> None:
    config = make_config(tmp_path, {**V3, "num_hidden_layers": 4})
    layout = Layout(tp_size=8, tp_rank=5)
    assert layout.heads(config) == range(80, 96)
    assert layout.vocabulary(config) == range(80800, 96960)
    shapes = {name: spec.shape for name, spec in checkpoint.targets(config, layout).items()}
    assert shapes["embed"] == shapes["lm_head"] == (16160, 7168)
    assert shapes["layers.0.attn.q_a"] == (1536, 7168)
    assert shapes["layers.0.attn.q"] == (3072, 1536)
    assert shapes["layers.0.attn.kv_a"] == (576, 7168)
    assert shapes["layers.0.attn.kv_b"] == (4096, 512)
    assert shapes["layers.0.attn.o"] == (7168, 2048)
    assert shapes["layers.0.attn.o.scale"] == (56, 16)
    assert shapes["layers.2.mlp.gate_up"] == (4608, 7168)
    assert shapes["layers.2.mlp.down"] == (7168, 2304)
    assert shapes["layers.3.experts.gate_up"] == (256, 512, 7168)
    assert shapes["layers.3.experts.gate_up.scale"] == (256, 4, 56)
    assert shapes["layers.3.experts.down"] == (256, 7168, 256)
    assert shapes["layers.3.shared.gate_up"] == (512, 7168)
    assert shapes["layers.3.gate"] == (256, 7168)


def test_v3_with_attention_dp_and_ep_8_cuts_the_experts_only(tmp_path: Path) -> None:
    config = make_config(tmp_path, {**V3, "num_hidden_layers": 4})
    layout = Layout(tp_size=8, tp_rank=5, ep_size=8, attention_dp=True)
    assert layout.experts(config) == range(160, 192)
    whole = checkpoint.targets(config)
    for name, spec in checkpoint.targets(config, layout).items():
        if ".experts." in name:
            assert spec.shape == (32, *whole[name].shape[1:])
        else:
            assert spec == whole[name], name


def test_stages_cover_the_layers_in_order_and_the_first_have_more(tmp_path: Path) -> None:
    config = make_config(tmp_path, V3)
    stages = [Layout(pp_size=4, pp_rank=rank).layers(config) for rank in range(4)]
    assert [len(stage) for stage in stages] == [16, 15, 15, 15]
    assert [layer for stage in stages for layer in stage] == list(range(61))
    config = make_config(tmp_path, {**PLAIN_FIELDS, "num_hidden_layers": 7})
    first = checkpoint.targets(config, Layout(pp_size=4, pp_rank=0))
    last = checkpoint.targets(config, Layout(pp_size=4, pp_rank=3))
    assert ("embed" in first, "norm" in first, "lm_head" in first) == (True, False, False)
    assert ("embed" in last, "norm" in last, "lm_head" in last) == (False, True, True)
    assert "layers.6.attn.o" in last and "layers.5.attn.o" not in last


def test_tied_head_is_on_both_ends(tmp_path: Path) -> None:
    config = make_config(tmp_path, {**PLAIN_FIELDS, "tie_word_embeddings": True})
    stages = [checkpoint.targets(config, Layout(pp_size=3, pp_rank=rank)) for rank in range(3)]
    held = [{name for name in stage if "." not in name} for stage in stages]
    assert held == [{"embed"}, set(), {"embed", "norm"}]


def test_shared_expert_too_narrow_to_cut_is_whole_on_rank_0_alone(tmp_path: Path) -> None:
    """The small model that comes with dsd, whose shared expert is one scale block wide."""
    config = make_config(tmp_path, SMALL)
    shares = [
        checkpoint.targets(config, Layout(tp_size=2, tp_rank=rank, ep_size=2)) for rank in range(2)
    ]
    name = "layers.1.shared.gate_up"
    assert shares[0][name] == checkpoint.targets(config)[name]
    assert not [name for name in shares[1] if ".shared." in name]
    with_dp = Layout(tp_size=2, tp_rank=1, ep_size=2, attention_dp=True)
    assert checkpoint.targets(config, with_dp)[name] == checkpoint.targets(config)[name]


REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (V3, {"tp_size": 3}, ["vocab_size 129280", "tp_size 3"]),
    (V3, {"tp_size": 256}, ["num_attention_heads 128", "tp_size 256"]),
    (V3, {"tp_size": 128, "ep_size": 8}, ["1 heads of q_proj", "192", "128"]),
    (V3, {"tp_size": 32}, ["intermediate_size", "576"]),
    (V3, {"tp_size": 16, "ep_size": 3}, ["tp_size 16", "ep_size 3"]),
    (V3, {"pp_size": 62}, ["num_hidden_layers 61", "pp_size 62"]),
    (SMALL, {"tp_size": 2}, ["moe_intermediate_size", "tp_size 2 / ep_size 1", "64"]),
    (SMALL, {"tp_size": 4, "ep_size": 4}, ["1 heads of o_proj", "64"]),
    ({**SMALL, "num_attention_heads": 3}, {"tp_size": 2}, ["num_attention_heads 3"]),
    (PLAIN_FIELDS, {"tp_size": 8, "attention_dp": True}, ["moe_intermediate_size 12", "tp_size 8"]),
    (
        {**PLAIN_FIELDS, "n_routed_experts": 12, "topk_group": 4},
        {"tp_size": 8, "ep_size": 8, "attention_dp": True},
        ["n_routed_experts 12", "ep_size 8"],
    ),
    ({**PLAIN_FIELDS, "intermediate_size": 21}, {"tp_size": 2}, ["intermediate_size 21"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "sizes", "words"), REFUSED, ids=lambda value: str(value)[-60:])
def test_layout_that_the_sizes_do_not_allow_names_the_number(
    tmp_path: Path, fields: dict[str, Any], sizes: dict[str, Any], words: list[str]
) -> None:
    config = make_config(tmp_path, fields)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.targets(config, Layout(**sizes))
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


@pytest.mark.parametrize("place", [{"tp_rank": 1}, {"tp_size": 2, "tp_rank": -1}, {"pp_rank": 1}])
def test_layout_rank_outside_its_group_is_refused(place: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="is not one of"):
        Layout(**place)
