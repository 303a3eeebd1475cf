"""Acceptance of drafts beside that of rejection sampling."""

from pathlib import Path

import pytest
import torch

from dsd.kernels.reference_sample import gumbel_noise
from dsd.tools import bench_acceptance, bench_mtp
from dsd.tools.local_engine import LocalEngine
from dsd.tools.tiny import export

TINY = Path(export.__file__).parent / "dsd-tiny"
NUM_DRAWS = 20_000


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_agreement_is_how_often_one_noise_draws_the_same_token(spread: float) -> None:
    logits = torch.randn(2, 12) * spread
    logits[0, 3] = float("-inf")
    p, q = logits.double().softmax(dim=-1)
    noise = gumbel_noise(torch.full((NUM_DRAWS,), 7), torch.arange(NUM_DRAWS), 12)
    both = ((logits[0] + noise).argmax(dim=1) == (logits[1] + noise).argmax(dim=1)).double().mean()
    expected = bench_acceptance.agreement(p, q)
    assert expected == pytest.approx(float(both), abs=4 * 0.5 / NUM_DRAWS**0.5)
    assert expected <= float(torch.minimum(p, q).sum()) + 1e-9
    assert bench_acceptance.agreement(p, p) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_small_models_drafts_are_accepted_as_often_as_by_rejection_sampling() -> None:
    prompts = bench_mtp.questions(TINY, 1)
    engine = LocalEngine(
        TINY, max_batch_size=1, max_num_tokens=max(len(prompt) for prompt in prompts),
        max_seq_len=bench_mtp.MAX_SEQ_LEN, num_nextn=2, dtype="float32", act_quant="none",
    )  # fmt: skip
    places = bench_acceptance.measure(engine.runner, prompts, 1.0, 60)
    assert places[0].num_verified >= places[1].num_verified > 50
    for place in places:
        assert place.expected >= place.by_rejection - 0.03
        assert place.accepted == pytest.approx(place.expected, abs=2 / place.num_verified**0.5)
    assert places[1].by_rejection < 0.9, "the second draft is where the two may differ"
