"""Stages of a pipeline: handing on what they compute, they are the whole model; each runs alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsd.ipc.messages import Load, Sampling, StepOutput, unpack_int32
from dsd.model.build import build
from dsd.model.config import CheckpointError
from dsd.model.parallel import Layout
from dsd.model.runner import Runner
from dsd.tools.hand_driver import HandDriver
from dsd.tools.local_engine import LocalEngine
from dsd.tools.make_checkpoint import SMALL, write_checkpoint, write_config

FIELDS = {**SMALL, "num_hidden_layers": 5}
MAX_TOKENS = 12


class Chain:
    """Stands in for a stage's neighbours: what a stage sends, the next one receives."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.token_ids: Tensor | None = None

    def receive(self, num_tokens: int) -> Tensor:
        assert self.hidden is not None and len(self.hidden) == num_tokens
        return self.hidden

    def send(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden.clone()
        return hidden

    def receive_tokens(self, lines: Tensor) -> Tensor:
        assert self.token_ids is not None and len(self.token_ids) == len(lines)
        return self.token_ids


def stage(directory: Path, pp_size: int, pp_rank: int, **options) -> Runner:
    layout = Layout(pp_size=pp_size, pp_rank=pp_rank)
    engine = LocalEngine(
        directory, device="cpu", dtype="float32", act_quant="none", max_batch_size=4,
        max_num_tokens=64, max_seq_len=64, kv_cache_gb=0.01, layout=layout, **options,
    )  # fmt: skip
    return engine.runner


@pytest.mark.parametrize("pp_size", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_stages_in_a_row_are_the_whole_model(tmp_path: Path, pp_size: int) -> None:
    """Step by step: all stages but the last compute a step before it, and are told its tokens."""
    write_checkpoint(tmp_path, FIELDS)
    whole = HandDriver(stage(tmp_path, 1, 0))
    runners = [stage(tmp_path, pp_size, rank) for rank in range(pp_size)]
    assert sum(len(runner.cache.layers) for runner in runners) == FIELDS["num_hidden_layers"]
    chain, last = Chain(), HandDriver(runners[-1])
    for runner in runners:
        runner.model.stages = chain
    run = runners[-1].run

    def run_all(step) -> StepOutput:
        sampled = len(step.decodes) // 4 + sum(chunk.sample for chunk in step.chunks)
        firsts = runners[:-1]
        for runner in firsts:
            chain.token_ids = torch.zeros(sampled, dtype=torch.int64)  # corrected below
            runner.run(step)
        output = run(step)
        tokens = torch.tensor(unpack_int32(output.token_ids).tolist())
        rows = [*unpack_int32(step.decodes), *(c.row for c in step.chunks if c.sample)]
        for runner in firsts:
            state = runner.rows.tokens
            for row, token in zip(rows, tokens, strict=True):
                state.token_ids[row, state.num_tokens[row] - 1] = token
        return output

    runners[-1].run = run_all  # type: ignore[method-assign]
    for driver in (whole, last):
        for i in range(3):
            prompt = [(7 * i + 3 * j) % 200 for j in range(5 + 9 * i)]
            driver.add(prompt, MAX_TOKENS, Sampling(temperature=0.4 * i, seed=i), chunk_size=6)
    assert last.run() == whole.run()
    for runner in runners[:-1]:
        for name in ("num_tokens", "num_computed"):
            own, want = (getattr(r.rows.tokens, name)[:3] for r in (runner, runners[-1]))
            assert torch.equal(own, want), name


@pytest.mark.parametrize("pp_rank", [0, 1, 2])
def test_stage_runs_alone(tmp_path: Path, pp_rank: int) -> None:
    write_config(tmp_path, FIELDS)
    runner = stage(tmp_path, 3, pp_rank, load_format="dummy")
    driver = HandDriver(runner)
    for i in range(2):
        driver.add([1, 2, 3, 4 + i], 6, Sampling(), chunk_size=3)
    outputs = driver.run()
    assert [len(output) for output in outputs] == [6, 6]
    assert runner.model.has_head == (pp_rank == 2)
    if pp_rank < 2:
        assert outputs == [[0] * 6] * 2, "the last stage's tokens are stood in for"
    assert len(runner.cache.layers) == len(runner.model.layers) == (2, 2, 1)[pp_rank]


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        ({"pp_size": 2, "pp_rank": 2}, "pp_rank 2 is not one of pp_size 2"),
        ({"tp_size": 2, "tp_rank": -1}, "tp_rank -1 is not one of tp_size 2"),
        ({"pp_size": 2, "num_nextn": 1}, "drafts in one stage"),
        ({"pp_size": 6}, "num_hidden_layers 5 is less than pp_size 6"),
    ],
)
def test_place_that_there_is_not_is_refused_in_a_sentence(tmp_path, options, piece) -> None:
    write_config(tmp_path, {**FIELDS, "num_nextn_predict_layers": 1})
    load = Load(
        0, str(tmp_path), "cpu", "float32", "none", 2, 32, 64, 16, 0.01, 0.9, "dummy", **options
    )
    with pytest.raises(CheckpointError, match=piece):
        build(load, lambda stage, done, total: None)
