"""The small model: its data, its network against `model/`, its export, and what it can do."""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from dsd.ipc.messages import Chunk, Join, Sampling, Step, pack_int32
from dsd.model.config import ModelConfig
from dsd.tools.local_engine import LocalEngine
from dsd.tools.tiny import batches, evaluate, export, tasks, text, words
from dsd.tools.tiny.configuration import CONFIG
from dsd.tools.tiny.network import Network, Packed


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Network]:
    """A bf16 export of a network with random weights, and the network rounded to it."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    config = ModelConfig.load(directory)
    torch.manual_seed(3)
    network = Network(config)
    for gate in network.gates():
        gate.e_score_correction_bias.normal_(std=0.05)
    export.write_bf16(directory, network)
    network.load_state_dict(export.read_state(directory, config))
    return directory, network.eval()


def _alone(ids: list[int]) -> Packed:
    """One document as a batch."""
    count = len(ids)
    mask = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
    return Packed(torch.tensor([ids]), torch.arange(count)[None], mask)


def test_network_equals_the_engine_on_its_export(untrained) -> None:
    directory, network = untrained
    ids = torch.randint(3, CONFIG["vocab_size"], (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, _ = network(_alone(ids.tolist()))
    expected = logits[0].log_softmax(-1)
    wanted = expected[range(len(ids) - 1), ids[1:]].tolist()
    assert _logprobs(directory, ids.tolist()) == pytest.approx(wanted, abs=2e-4)


def test_export_names_and_mtp_layer_as_published(untrained) -> None:
    directory, _ = untrained
    names = set(export.read(directory))
    mtp = f"model.layers.{CONFIG['num_hidden_layers']}"
    for name in (
        "enorm",
        "hnorm",
        "eh_proj",
        "embed_tokens",
        "shared_head.norm",
        "shared_head.head",
    ):
        assert f"{mtp}.{name}.weight" in names
    assert "model.layers.1.mlp.experts.15.down_proj.weight" in names
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in names


def test_export_fp8_keeps_gate_heads_and_embeddings_bf16(untrained, tmp_path: Path) -> None:
    directory, _ = untrained
    export.write_fp8(tmp_path, export.read(directory))
    tensors = export.read(tmp_path)
    assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert "model.layers.0.self_attn.o_proj.weight_scale_inv" in tensors
    for name in ("lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"):
        assert tensors[f"{name}.weight"].dtype == torch.bfloat16
    LocalEngine(tmp_path, device="cpu")


def test_packed_documents_do_not_see_each_other(untrained) -> None:
    directory, network = untrained
    rows = batches.make_rows(5, 12, directory, held_out=False)
    batch = batches.to_batch(rows, [0], torch.device("cpu"))  # type: ignore[arg-type]
    with torch.no_grad():
        packed_logits, _ = network(batch.packed)
        second = torch.from_numpy(rows.docs[0] == 2)
        ids = batch.packed.input_ids[0][second]
        alone, _ = network(_alone(ids.tolist()))
    torch.testing.assert_close(packed_logits[0][second], alone[0], atol=1e-4, rtol=1e-4)
    assert batch.packed.positions[0][second].tolist() == list(range(len(ids)))


@pytest.mark.parametrize("kind", [kind for kind in tasks.TASKS if kind != "talk"])
def test_task_halves_do_not_overlap(kind: str) -> None:
    maker = tasks.TASKS[kind][0]
    rng = random.Random(4)
    trained = {_core(maker(rng, False)) for _ in range(400)}
    held_out = {_core(maker(rng, True)) for _ in range(400)}
    assert not trained & held_out


def _core(example: tasks.Example) -> str:
    """The question with its answer: the same in two phrasings of one pair."""
    return example.messages[0]["content"] + example.answer


def test_workings_compute_what_they_say() -> None:
    rng = random.Random(9)
    for _ in range(300):
        a, b = rng.randrange(1000), rng.randrange(1000)
        digits = [line.split("write ")[1][0] for line in tasks.add_working(a, b).splitlines()]
        assert int("".join(reversed(digits))) == a + b
        big, small = max(a, b), min(a, b)
        lines = tasks.subtract_working(big, small).splitlines()
        digits = [line.split("write ")[1][0] for line in lines]
        assert int("".join(reversed(digits))) == big - small


def test_held_out_is_a_fixed_eighth() -> None:
    share = sum(words.is_held_out("word", word) for word in words.COMMON) / len(words.COMMON)
    assert 0.08 < share < 0.18


def test_prompt_equals_what_the_daemon_renders(untrained) -> None:
    from dsd.daemon.template_process import compile_template, render

    rng = random.Random(2)
    template = compile_template(text.CHAT_TEMPLATE)
    for kind in ("add", "tool", "json"):
        example = tasks.TASKS[kind][0](rng, True)
        variables = {
            "messages": example.messages,
            "tools": example.tools or None,
            "add_generation_prompt": True,
            "bos_token": text.BOS,
            "eos_token": text.EOS,
        }
        assert render(template, variables) == text.prompt_text(example)


SHIPPED = Path(evaluate.__file__).parent / "dsd-tiny"


@pytest.fixture(scope="module")
def shipped_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shipped") / "bf16"
    export.write(directory, export.dequantise(export.read(SHIPPED)), CONFIG)
    return directory


def _logprobs(directory: Path, ids: list[int]) -> list[float]:
    """Of each id but the first, by dsd's engine."""
    engine = LocalEngine(directory, device="cpu", dtype="float32", max_batch_size=1)
    sampling = Sampling(temperature=0.0, num_prompt_logprobs=0)
    join = Join(0, pack_int32(ids), len(ids), 0, (1,), sampling)
    step = Step(0, 1, "prefill", 0, (join,), (), b"", (Chunk(0, 0, len(ids), True),))
    return [entry.logprob for entry in engine.runner.run(step).prompt_logprobs[0]]


def _example_ids() -> list[int]:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    return text.encode(tokenizer, tasks.addition(random.Random(1), True)).ids[:64]


def test_shipped_model_same_logits_in_transformers(shipped_bf16: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers imports
        from transformers import DeepseekV3ForCausalLM

    ids = _example_ids()
    model = DeepseekV3ForCausalLM.from_pretrained(shipped_bf16, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logits[range(len(ids) - 1), ids[1:]].tolist()
    assert _logprobs(shipped_bf16, ids) == pytest.approx(expected, abs=2e-4)
    assert _logprobs(SHIPPED, ids) == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
def test_shipped_model_mtp_and_every_expert(shipped_bf16: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "MTP_EXAMPLES", 60)
    figures = evaluate.network_figures(shipped_bf16)
    assert figures["mtp_accepted"] >= 0.7
    assert min(figures["least_load"]) >= 0.25


@pytest.mark.slow
def test_shipped_model_right_on_a_sample_of_the_held_out_half() -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    engine = LocalEngine(SHIPPED, device="cpu", dtype="float32")
    asked = evaluate.examples(list(tasks.TASKS), 12, seed=77)
    scores = evaluate.score(engine, tokenizer, asked)
    wrong = {kind: entry.wrong for kind, entry in scores.items() if entry.wrong}
    assert (scores["add"].accuracy + scores["subtract"].accuracy) / 2 >= 0.95, wrong
    assert evaluate.overall(scores) >= 0.9, wrong


def test_shipped_model_is_small_enough() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12e6
