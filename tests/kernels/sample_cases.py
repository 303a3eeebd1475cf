"""Rows for the sampler's tests: options in Python, as a state in one poisoned arena, and what may
come out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsd.kernels import reference_sample as reference
from dsd.kernels.sample import SamplingState

POISON = 2147480000
MAX_BIAS, MAX_MASKED = 5, 3
MARGIN = 2e-5
"""Two tokens whose logits + noise differ by less (of 1) may be taken for each other, and so may a
sum of probabilities and a top-p that it nearly meets: the arithmetic is in float32."""
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")
FLOATS += ("repetition_penalty",)
INTS = ("top_k", "num_tokens", "num_bias", "num_masked", "mask_until", "has_bitmask")
SCALARS = FLOATS + INTS


@dataclass(frozen=True)
class Options:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    num_tokens: int = 7
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    masked: tuple[int, ...] = ()
    mask_until: int = 0
    allowed: tuple[int, ...] | None = None

    @property
    def penalises(self) -> bool:
        off = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return off != (0.0, 0.0, 1.0)


def make_state(rows: list[Options], vocab: int, device: str = "cpu") -> SamplingState:
    """All in one int32 arena, a row for each sequence, as a worker has it; what no option needs is
    poison."""
    widths = _widths(vocab)
    arena = torch.full((len(rows), sum(widths.values())), POISON, dtype=torch.int32)
    counts = torch.full((len(rows), vocab), POISON, dtype=torch.int32)
    fields = _views(arena, widths)
    for row, options in enumerate(rows):
        _fill(fields, row, options)
        if options.penalises:
            ids = torch.tensor(options.prompt + options.generated, dtype=torch.int64)
            reference.count_tokens(ids, len(options.prompt), counts[row])
    return SamplingState(counts=counts.to(device), **_views(arena.to(device), widths))


def _widths(vocab: int) -> dict[str, int]:
    """int32 words of each field; the 8 bytes of the seed come first."""
    widths = {"seed": 2, **dict.fromkeys(SCALARS, 1)}
    widths |= {"bias_ids": MAX_BIAS, "bias": MAX_BIAS, "masked_ids": MAX_MASKED}
    widths["bitmask"] = -(-vocab // 32)
    widths["pad"] = sum(widths.values()) % 2
    return widths


def _views(arena: Tensor, widths: dict[str, int]) -> dict[str, Tensor]:
    fields, at = {}, 0
    for name, width in widths.items():
        fields[name], at = arena[:, at : at + width], at + width
        if name in FLOATS or name == "bias":
            fields[name] = fields[name].view(torch.float32)
        if name in SCALARS:
            fields[name] = fields[name][:, 0]
    del fields["pad"]
    return fields | {"seed": arena.view(torch.int64)[:, 0]}


def _fill(fields: dict[str, Tensor], row: int, options: Options) -> None:
    for name in ("seed", "top_k", "num_tokens", "mask_until", *FLOATS):
        fields[name][row] = getattr(options, name)
    fields["num_bias"][row] = len(options.bias)
    fields["num_masked"][row] = len(options.masked)
    fields["has_bitmask"][row] = options.allowed is not None
    for i, (token, bias) in enumerate(options.bias):
        fields["bias_ids"][row, i], fields["bias"][row, i] = token, bias
    for i, token in enumerate(options.masked):
        fields["masked_ids"][row, i] = token
    if options.allowed is not None:
        bits = [0] * fields["bitmask"].shape[1]
        for token in options.allowed:
            bits[token // 32] |= 1 << token % 32
        signed = [word - (1 << 32) if word >> 31 else word for word in bits]
        fields["bitmask"][row] = torch.tensor(signed, dtype=torch.int32)


def mixed_options(vocab: int) -> list[Options]:
    """Everything that a row may ask for, alone and together, in one batch."""
    history = {"prompt": tuple(range(0, 40, 2)), "generated": (1, 2, 3, 3, 3, vocab - 1)}
    some = tuple(range(3, vocab, 7))
    rows = [Options(), Options(temperature=0.0), Options(temperature=1e-9, seed=3)]
    rows += [Options(temperature=0.6, top_p=0.95, seed=i) for i in range(4)]
    rows += [Options(top_k=k, seed=k) for k in (1, 2, 5, 40, 64, 300, vocab - 1, vocab, 10**9)]
    rows += [Options(top_p=p, seed=9) for p in (0.0, 1e-6, 0.1, 0.5, 0.999)]
    rows += [Options(min_p=p, seed=11) for p in (1e-4, 0.05, 0.9, 1.0)]
    rows += [Options(top_k=20, top_p=0.8, seed=5), Options(top_k=50, top_p=0.9, min_p=0.1, seed=6)]
    rows += [Options(temperature=2.0, top_k=200, top_p=0.3, seed=7), Options(top_p=0.9, min_p=0.3)]
    rows += [Options(presence_penalty=1.5, temperature=0.0, **history)]
    rows += [Options(frequency_penalty=-0.7, top_p=0.9, **history)]
    rows += [Options(repetition_penalty=1.3, top_k=10, **history)]
    rows += [Options(1.2, 30, 0.9, 0.02, -1, 9, 0.5, 0.25, 0.8, **history, mask_until=10)]
    rows += [Options(temperature=0.0, bias=((5, 30.0), (5, 0.5), (vocab - 1, 30.25)))]
    rows += [Options(top_p=0.7, bias=((vocab // 2, 9.0),), masked=(0, 4), mask_until=8, seed=-2)]
    rows += [Options(temperature=0.0, masked=(0, 1, 2), mask_until=7)]
    rows += [Options(allowed=some), Options(temperature=0.0, allowed=some)]
    rows += [Options(top_p=0.9, allowed=some, seed=4), Options(top_k=30, allowed=some[:6])]
    rows += [Options(top_k=30, top_p=0.9, allowed=some[:1]), Options(top_p=0.9, allowed=())]
    return [*rows, Options(top_k=3, allowed=(), seed=2), Options(temperature=0.0, allowed=())]


SEEDS = range(4)
WIDE_OPTIONS = [
    *(Options(top_p=p, seed=s) for p in (0.02, 0.5, 0.97) for s in SEEDS),
    *(Options(top_k=k, top_p=p, seed=7) for k in (70, 600, 1500, 8000) for p in (1.0, 0.4)),
    *(Options(min_p=p, seed=s) for p in (0.5, 0.99) for s in SEEDS),
    Options(top_k=3000, min_p=0.5),
    Options(top_k=3000, top_p=0.9, min_p=0.5),
]
"""With flat logits of 9,000 tokens or more these keep more than a kernel's list takes."""


def wrong_lines(chosen: Tensor, logits: Tensor, rows: Tensor, state: SamplingState) -> list[int]:
    """Lines whose token is not the best of what their row's filters keep, margins aside. Computed
    from probabilities in float64, unlike the twin. Of nothing the token is 0. logits: [S, V]; rows:
    [S]."""
    rows = rows.long()
    x = reference.adjust_logits(logits.float(), rows, state).double()
    heat = state.temperature[rows].double()[:, None].clamp(min=1e-6)
    greedy = state.temperature[rows][:, None] == 0
    order = x.sort(dim=-1, descending=True, stable=True)
    noise = reference.gumbel_noise(state.seed[rows], state.num_tokens[rows].long(), x.shape[1])
    noisy = torch.where(greedy, x, x / heat + noise).gather(1, order.indices)
    rank = torch.arange(x.shape[1], device=x.device)[None]
    k = state.top_k[rows][:, None]
    in_k = ((k == 0) | (rank < k)) & order.values.isfinite()
    probs = (order.values / heat).masked_fill(~in_k, float("-inf")).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    p, least = (getattr(state, name)[rows].double()[:, None] for name in ("top_p", "min_p"))
    least = least * probs[:, :1]

    def kept(margin: float) -> Tensor:
        by_p = (before < p + margin) | (p >= 1)
        within = in_k & by_p & (probs >= least * (1 - margin)) & ((p > 0) | (rank == 0))
        return greedy | within | (rank == 0)

    best = noisy.masked_fill(~kept(-MARGIN), float("-inf")).amax(dim=1)
    place = (order.indices == chosen[:, None]).int().argmax(dim=1)[:, None]
    size = 1 + best.abs().nan_to_num(posinf=0.0, neginf=0.0)
    good = noisy.gather(1, place)[:, 0] >= best - MARGIN * size
    good &= kept(MARGIN).gather(1, place)[:, 0]
    good &= order.values[:, 0].isfinite() | (chosen == 0)
    return (~good).nonzero().flatten().tolist()
