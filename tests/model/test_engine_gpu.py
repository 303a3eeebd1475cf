"""The engine on a GPU: graphs against eager steps, and against the CPU, on the embedded model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsd.ipc.messages import Copies, Sampling
from dsd.tools.local_engine import Answer, LocalEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TINY = Path(__file__).resolve().parents[2] / "tools/tiny/dsd-tiny"
NUM_PROMPTS, MAX_TOKENS = 12, 40
SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, num_logprobs=3),
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=0.8, top_p=0.9, seed=6, num_logprobs=0),
    Sampling(temperature=1.2, top_k=7, min_p=0.05, seed=7),
    Sampling(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5),
    Sampling(temperature=0.7, repetition_penalty=1.3, seed=8, logit_bias=((70, 3.0), (71, -50.0))),
    Sampling(temperature=0.0, min_tokens=10, masked_token_ids=(1, 2, 3)),
]

Generate = Callable[..., list[list[Answer]]]


def prompt(i: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(i)
    return torch.randint(3, vocab_size, (5 + 31 * i,), generator=generator).tolist()


@pytest.fixture(scope="module")
def generate() -> Generate:
    """Answers to the same prompts with each of SAMPLINGS, by an engine made with `options`."""
    made: dict[Any, list[list[Answer]]] = {}

    def answers(**options: Any) -> list[list[Answer]]:
        key = tuple(sorted(options.items()))
        if key not in made:
            engine = LocalEngine(TINY, max_batch_size=NUM_PROMPTS, max_num_tokens=128, **options)
            prompts = [prompt(i, engine.ready.vocab_size) for i in range(NUM_PROMPTS)]
            made[key] = [engine.generate(prompts, MAX_TOKENS, frozenset(), s) for s in SAMPLINGS]
        return made[key]

    return answers


EXACT = {"dtype": "float32", "act_quant": "none"}


@pytest.mark.parametrize("options", [EXACT, {}], ids=["float32", "fp8"])
def test_graphs_give_the_tokens_of_eager_steps(generate: Generate, options: dict[str, Any]) -> None:
    sizes = tuple(range(1, NUM_PROMPTS + 1))
    graphs = generate(device="cuda", cuda_graph_batch_sizes=sizes, **options)
    assert graphs == generate(device="cuda", use_cuda_graph=False, **options)


def test_graphs_with_padding_give_the_tokens_of_the_cpu(generate: Generate) -> None:
    cpu = generate(device="cpu", **EXACT)
    gpu = generate(device="cuda", cuda_graph_batch_sizes=(4, 8, 16), **EXACT)
    for sampling, want, got in zip(SAMPLINGS, cpu, gpu, strict=True):
        same = sum(a.token_ids == b.token_ids for a, b in zip(want, got, strict=True))
        assert same == NUM_PROMPTS, sampling


def test_answers_do_not_depend_on_the_batch(generate: Generate) -> None:
    """Alone, a row has other neighbours, other padding and another place."""
    together = generate(device="cuda", cuda_graph_batch_sizes=(4, 8, 16), **EXACT)
    engine = LocalEngine(TINY, device="cuda", max_batch_size=2, max_num_tokens=64, **EXACT)
    for i in range(NUM_PROMPTS):
        own = prompt(i, engine.ready.vocab_size)
        for sampling, answers in zip(SAMPLINGS, together, strict=True):
            (alone,) = engine.generate([own], MAX_TOKENS, frozenset(), sampling)
            assert alone.token_ids == answers[i].token_ids, (i, sampling)


def test_prefixes_from_host_memory_give_the_tokens_of_a_large_cache() -> None:
    """Every prompt comes twice, and between the two so many others that its blocks are evicted."""
    options = {"device": "cuda", "max_batch_size": 2, "max_num_tokens": 128, **EXACT}
    large = LocalEngine(TINY, **options)
    block_gb = sum(layer[0].nbytes for layer in large.runner.cache.layers) / 1e9
    small = LocalEngine(TINY, kv_cache_gb=17.5 * block_gb, kv_host_cache_gb=0.1, **options)
    assert small.ready.num_blocks == 17
    host = small.runner.host
    assert host is not None
    num_restored = 0

    def copy(offloads: Copies, restores: Copies) -> None:
        nonlocal num_restored
        num_restored += len(restores)
        host.copy(offloads, restores)

    small.runner.host = SimpleNamespace(copy=copy, before_writes=host.before_writes)
    prompts = 2 * [prompt(i, large.ready.vocab_size) for i in range(NUM_PROMPTS)]
    answers = small.generate(prompts, MAX_TOKENS, frozenset())
    assert answers == large.generate(prompts, MAX_TOKENS, frozenset())
    assert num_restored > 20


@pytest.mark.parametrize("num_nextn", [1, 3])
def test_drafts_change_no_token(generate: Generate, num_nextn: int) -> None:
    """In graphs with padding and eagerly."""
    plain = generate(device="cuda", cuda_graph_batch_sizes=(4, 8, 16), **EXACT)
    for options in ({"cuda_graph_batch_sizes": (4, 8, 16)}, {"use_cuda_graph": False}):
        drafted = generate(device="cuda", num_nextn=num_nextn, **options, **EXACT)
        for sampling, want, got in zip(SAMPLINGS, plain, drafted, strict=True):
            same = sum(a.token_ids == b.token_ids for a, b in zip(want, got, strict=True))
            assert same == NUM_PROMPTS, (sampling, options)
