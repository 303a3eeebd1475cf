"""Checkpoints of small random models, as transformers writes them, and the engine in one process.

Every test with an argument `case` runs for each of CASES: differently shaped members of the family.
transformers' own model of the checkpoint is the oracle.
"""

import copy
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsd.daemon.request import FinishReason, Request, TokenEvent
from dsd.daemon.scheduler import Scheduler
from dsd.ipc.messages import (
    Chunk,
    FromWorker,
    Join,
    Load,
    Sampling,
    Step,
    StepOutput,
    ToWorker,
    pack_int32,
)
from dsd.model import kv_cache
from dsd.model.build import build
from dsd.model.config import ModelConfig
from dsd.model.runner import Runner

os.environ["HF_HUB_OFFLINE"] = "1"

VOCAB = 300
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@dataclass(frozen=True)
class Case:
    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        return {**BASE, **copy.deepcopy(self.changes)}


ODD = {
    "kv_lora_rank": 33,
    "qk_nope_head_dim": 21,
    "qk_rope_head_dim": 6,
    "v_head_dim": 13,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "hidden_size": 50,
}
CASES = [
    Case("v3", {"rope_scaling": YARN}),
    Case("moonlight", {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}),
    Case("no_yarn_theta", {"rope_theta": 50000.0, "first_k_dense_replace": 0}),
    Case(
        "mscale_differs",
        {"rope_scaling": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2}},
    ),
    Case("all_dense", {"first_k_dense_replace": 3, "num_hidden_layers": 3}),
    Case("unnormed_gate", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    Case("one_expert_each", {"num_experts_per_tok": 1, "n_group": 2, "topk_group": 1}),
    Case("odd_dims", {**ODD, "rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2}}),
    Case("tied", {"tie_word_embeddings": True, "num_hidden_layers": 2}),
    Case(
        "many_experts",
        {"n_routed_experts": 48, "n_group": 8, "topk_group": 3, "num_experts_per_tok": 8},
    ),
]
QUICK = {"v3"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and "parametrize" not in {
        mark.name for mark in metafunc.definition.iter_markers() if "case" in mark.args[:1]
    }:
        metafunc.parametrize(
            "case",
            [
                pytest.param(c, id=c.name, marks=[] if c.name in QUICK else [pytest.mark.slow])
                for c in CASES
            ],
        )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Several only wait for each other on matrices as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- checkpoints --------------------------------------------------------------------------------


class Checkpoint:
    """A directory with weights, and transformers' model of it."""

    def __init__(self, directory: Path, oracle: Any) -> None:
        self.directory = directory
        self._oracle = oracle

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """[T, V] float32, one forward pass."""
        return self._oracle(torch.tensor([ids])).logits[0]

    @torch.inference_mode()
    def generate(self, ids: list[int], num_tokens: int) -> list[int]:
        """Greedy, by transformers' own loop."""
        inputs = torch.tensor([ids])
        output = self._oracle.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, len(ids) :].tolist()

    def check_greedy(self, prompt: list[int], output: list[int]) -> None:
        """Asserts that `output` is what `generate` says, with one forward pass: by induction each
        token must be the best after those before it."""
        if output:
            logits = self.logits([*prompt, *output[:-1]])[len(prompt) - 1 :]
            assert output == logits.argmax(-1).tolist()


def _build(case: Case, directory: Path) -> Checkpoint:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.manual_seed(0)
        oracle = DeepseekV3ForCausalLM(DeepseekV3Config(**case.fields())).float().eval()
        oracle.set_experts_implementation("eager")
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if weight.dim() == 1:
                weight.normal_(1.0, 0.1)
            elif weight.numel():
                # The embedding's rows are as long as a hidden state is; a tied head is smaller.
                wide = "embed_tokens" in name and not oracle.config.tie_word_embeddings
                weight.normal_(0.0, 1.0 if wide else weight.shape[-1] ** -0.5)
        for name, buffer in oracle.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    oracle.save_pretrained(directory)
    _drop_empty_tensors(directory / "model.safetensors")
    return Checkpoint(directory, oracle)


def _drop_empty_tensors(path: Path) -> None:
    """transformers writes shared experts of width 0 where there are none."""
    tensors = load_file(path)
    full = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if len(full) < len(tensors):
        save_file(full, path)


MakeCheckpoint = Callable[[Case], Checkpoint]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """One checkpoint for each case and session."""
    made: dict[str, Checkpoint] = {}

    def make(case: Case) -> Checkpoint:
        key = json.dumps(case.fields(), sort_keys=True)
        if key not in made:
            made[key] = _build(case, tmp_path_factory.mktemp(case.name))
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """A case of one's own: `make_case("name", field=value)`."""
    return lambda name, **changes: Case(name, changes)


@pytest.fixture
def checkpoint(case: Case, make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return make_checkpoint(case)


@pytest.fixture
def prompt_of() -> Callable[[int, int], list[int]]:
    """`prompt_of(length, seed)`: random token ids."""

    def make(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * seed + length)
        return torch.randint(0, VOCAB, (length,), generator=generator).tolist()

    return make


# ---- the runner ---------------------------------------------------------------------------------

OpenRunner = Callable[..., Runner]


@pytest.fixture
def open_runner() -> OpenRunner:
    """A loaded runner whose unwritten KV is NaN. `num_blocks` includes the null block."""

    def open_(
        directory: Path,
        *,
        dtype: str = "float32",
        act_quant: str = "none",
        num_blocks: int = 0,
        block_size: int = 16,
        max_batch_size: int = 8,
        max_seq_len: int = 0,
        num_host_blocks: int = 0,
        num_nextn: int = 0,
    ) -> Runner:
        config = ModelConfig.load(directory)
        kv_dtype = getattr(torch, config.dtype if dtype == "auto" else dtype)
        num_layers = config.num_hidden_layers + (num_nextn > 0)
        block_gb = kv_cache.block_bytes(config, block_size, kv_dtype, num_layers) / 1e9
        load = Load(
            epoch=0,
            model_dir=str(directory),
            device="cpu",
            dtype=dtype,
            act_quant=act_quant,
            max_batch_size=max_batch_size,
            max_num_tokens=512,
            max_seq_len=max_seq_len,
            block_size=block_size,
            kv_cache_gb=(num_blocks + 0.5) * block_gb if num_blocks else 0.05,
            kv_cache_free_gpu_memory_fraction=0.9,
            kv_host_cache_gb=(num_host_blocks + 0.5) * block_gb if num_host_blocks else 0.0,
            num_nextn=num_nextn,
        )
        runner, ready = build(load, lambda stage, done, total: None)
        assert not num_blocks or ready.num_blocks == num_blocks
        assert ready.num_host_blocks == num_host_blocks
        for layer in runner.cache.layers:
            layer.fill_(float("nan"))
        return runner

    return open_


@dataclass
class Row:
    """One row of a runner, driven by hand: prefill in chunks, then decode."""

    runner: Runner
    seq: int = 0

    def run(self, **parts: Any) -> StepOutput:
        fields = {"joins": (), "grows": (), "decodes": b"", "chunks": (), **parts}
        self.seq += 1
        return self.runner.run(Step(0, self.seq, "mixed", 0, **fields))

    def prefill(
        self, ids: list[int], chunks: list[int], sampling: Sampling, sample: bool = True
    ) -> list[StepOutput]:
        """Row 0 with these tokens, in chunks of these lengths, in blocks in reverse order."""
        assert sum(chunks) == len(ids)
        rows = self.runner.rows
        count = min(rows.tokens.block_table.shape[1], self.runner.cache.num_blocks - 1)
        blocks = tuple(range(count, 0, -1))
        join = Join(0, pack_int32(ids), len(ids), 0, blocks, sampling)
        outputs, start = [], 0
        for length in chunks:
            last = sample and start + length == len(ids)
            chunk = Chunk(0, start, length, last)
            outputs.append(self.run(joins=(join,) if not start else (), chunks=(chunk,)))
            start += length
        return outputs

    def decode(self) -> int:
        output = self.run(decodes=pack_int32([0]))
        return int.from_bytes(output.token_ids, "little")


@pytest.fixture
def row_of() -> Callable[[Runner], Row]:
    return Row


@pytest.fixture
def watch_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Runner], list[Tensor]]:
    """Collects the logits of all tokens of every forward pass of a runner."""

    def watch(runner: Runner) -> list[Tensor]:
        seen: list[Tensor] = []
        forward = runner.model.forward

        def wrapped(*args: Any) -> Tensor:
            hidden = forward(*args)
            seen.append(runner.model.logits(hidden))
            return hidden

        monkeypatch.setattr(runner.model, "forward", wrapped)
        return seen

    return watch


# ---- the engine in one process ------------------------------------------------------------------


class Engine:
    """Scheduler and Runner, with the wire between them and `pipeline_depth` steps in flight."""

    def __init__(self, runner: Runner, max_num_tokens: int, pipeline_depth: int) -> None:
        self.runner = runner
        self.scheduler = Scheduler(
            max_batch_size=runner.rows.null,
            max_num_tokens=max_num_tokens,
            max_seq_len=runner.rows.tokens.token_ids.shape[1] - 1,
            num_blocks=runner.cache.num_blocks,
            block_size=runner.cache.block_size,
            pipeline_depth=pipeline_depth,
            num_host_blocks=0 if runner.host is None else runner.host.num_slots,
        )
        self.max_num_tokens = max_num_tokens
        self.prompts: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[int]] = {}
        self.finishes: dict[str, FinishReason] = {}
        self.events: list[TokenEvent] = []
        self.modes: set[str] = set()
        self.max_decodes = 0
        self._in_flight: deque[Step] = deque()
        self._to_worker = msgspec.msgpack.Decoder(ToWorker)
        self._from_worker = msgspec.msgpack.Decoder(FromWorker)

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        sampling = Sampling(temperature=0.0) if sampling is None else sampling
        request = Request(request_id, prompt, sampling, max_tokens, stop_token_ids)
        self.scheduler.add(request)
        self.prompts[request_id] = prompt
        self.requests[request_id] = request
        self.outputs[request_id] = []

    def abort(self, request_id: str) -> None:
        event = self.scheduler.abort(request_id)
        if event is not None:
            self._take([event])

    def step(self) -> bool:
        """Plans all it may, then one result. False: nothing is left to do."""
        while (step := self.scheduler.schedule()) is not None:
            self._in_flight.append(self._to_worker.decode(msgspec.msgpack.encode(step)))
        if not self._in_flight:
            assert not self.scheduler.has_work, "requests are live, but nothing is planned"
            return False
        step = self._in_flight.popleft()
        num_decodes = len(step.decodes) // 4
        assert num_decodes + sum(c.num_tokens for c in step.chunks) <= self.max_num_tokens
        self.modes.add(step.mode)
        self.max_decodes = max(self.max_decodes, num_decodes)
        output = self._from_worker.decode(msgspec.msgpack.encode(self.runner.run(step)))
        self._take(self.scheduler.update(output))
        self.scheduler.check()
        return True

    def run(self) -> dict[str, list[int]]:
        """Until everything has ended; the tokens of each request."""
        while self.step():
            pass
        assert self.finishes.keys() == self.requests.keys(), "a request without its end"
        stats = self.scheduler.stats()
        assert stats.num_held_blocks == 0, stats
        return self.outputs

    def _take(self, events: list[TokenEvent]) -> None:
        for event in events:
            request_id = event.request.request_id
            assert request_id not in self.finishes, "an event after the last one"
            if event.token_id >= 0:
                self.outputs[request_id].append(event.token_id)
            if event.finish is not None:
                self.finishes[request_id] = event.finish
            self.events.append(event)


OpenEngine = Callable[..., Engine]


@pytest.fixture
def open_engine(open_runner: OpenRunner) -> OpenEngine:
    """`open_engine(directory, max_num_tokens=…, pipeline_depth=…, …)`; the rest is the runner's."""

    def open_(
        directory: Path, *, max_num_tokens: int = 64, pipeline_depth: int = 2, **options: Any
    ) -> Engine:
        return Engine(open_runner(directory, **options), max_num_tokens, pipeline_depth)

    return open_
