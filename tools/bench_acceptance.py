"""How many drafts are accepted, beside what rejection sampling would accept of the same drafts.

    python -m dsd.tools.bench_acceptance DIR [--num-nextn 3] [--temperature 1]

dsd draws draft and token with one noise field and accepts where both agree. Rejection sampling
(Leviathan et al., arXiv 2211.17192) accepts a draft with probability sum(min(p, q)), p being what
the model and q what the draft layer makes of that place: no scheme that keeps the model's
distribution accepts more. Both are counted over the same places: those whose drafts before were
right. Questions are those of `bench_mtp`, one at a time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from ..ipc.messages import Sampling
from ..model.runner import Runner
from .bench_mtp import MAX_SEQ_LEN, questions
from .hand_driver import HandDriver
from .local_engine import LocalEngine
from .tiny.evaluate import EOS_ID

NEGLIGIBLE = 1e-7
"""Tokens less likely than that are not asked whether they are drawn twice."""


class Place(NamedTuple):
    """The first draft, the second, ..."""

    num_verified: int
    """With every draft before right."""
    accepted: float
    expected: float
    """What one noise field accepts in the mean, over all noise."""
    by_rejection: float
    """These three: shares of `num_verified`."""


def agreement(p: Tensor, q: Tensor) -> float:
    """How often argmax(log p + noise) is argmax(log q + noise), the noise being the same Gumbel
    field: for token i the terms of the two are exponential clocks of which i rings first in both,
    1 / sum_j max(p_j / p_i, q_j / q_i). p, q: [V] float64, distributions."""
    both = torch.minimum(p, q) > NEGLIGIBLE
    ratios = torch.maximum(p / p[both, None], q / q[both, None])
    return float(ratios.sum(dim=1).reciprocal().sum())


class _Distributions:
    """Keeps what model and draft layer make of each place, a list a step: the model's
    [1 + drafts, V], then [1, V] for each new draft."""

    def __init__(self, runner: Runner, temperature: float) -> None:
        self._logits = runner.model.logits
        self._temperature = temperature
        self.seen: list[Tensor] = []
        runner.model.logits = self._note  # type: ignore[method-assign]

    def _note(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        logits = self._logits(hidden, out)
        self.seen.append((logits.double() / self._temperature).softmax(dim=-1))
        return logits


def measure(
    runner: Runner, prompts: Sequence[list[int]], temperature: float, max_tokens: int, seed: int = 1
) -> list[Place]:
    """temperature: above 0. Each prompt has a seed of its own."""
    num_nextn = runner.rows.num_nextn
    distributions = _Distributions(runner, temperature)
    sums = torch.zeros(num_nextn, 4, dtype=torch.float64)
    for i, prompt in enumerate(prompts):
        driver = HandDriver(runner)
        sampling = Sampling(temperature=temperature, seed=seed + i)
        row = driver.add(prompt, max_tokens, sampling, stop_token_ids=frozenset([EOS_ID]))
        driver.step(0, num_nextn)
        while not row.ended:
            drafted = distributions.seen[1:]
            distributions.seen = []
            driver.step(num_nextn, num_nextn)
            model = distributions.seen[0]
            for place in range(min(row.accepted[-1], num_nextn)):
                p, q = model[place], drafted[place][0]
                right = row.accepted[-1] > place + 1
                of_both = float(torch.minimum(p, q).sum())
                sums[place] += torch.tensor([1, right, agreement(p, q), of_both])
        distributions.seen = []
    counts = sums[:, 0].tolist()
    shares = (sums[:, 1:] / sums[:, :1].clamp(min=1)).tolist()
    return [Place(int(count), *each) for count, each in zip(counts, shares, strict=True)]


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--num-nextn", default=3, show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--examples", default=4, show_default=True, help="Questions of each kind.")
@click.option("--max-tokens", default=120, show_default=True, help="Of an answer.")
@click.option("--seed", default=1, show_default=True)
def main(
    directory: Path, num_nextn: int, temperature: float, examples: int, max_tokens: int, seed: int
) -> None:
    """Measure acceptance of drafts on the model in DIRECTORY."""
    prompts = questions(directory, examples)
    engine = LocalEngine(
        directory,
        max_batch_size=1,
        max_num_tokens=max(len(prompt) for prompt in prompts),
        max_seq_len=MAX_SEQ_LEN,
        num_nextn=num_nextn,
        dtype="float32",
        act_quant="none",
    )
    places = measure(engine.runner, prompts, temperature, max_tokens, seed)
    click.echo(f"{'draft':>6} {'verified':>9} {'accepted':>9} {'expected':>9} {'rejection':>10}")
    for number, (count, *shares) in enumerate(places, start=1):
        accepted, expected, by_rejection = (f"{share:.3f}" for share in shares)
        click.echo(f"{number:6} {count:9} {accepted:>9} {expected:>9} {by_rejection:>10}")


if __name__ == "__main__":
    main()
