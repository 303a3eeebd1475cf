"""From logits to tokens: penalties, filters, the noise field, log-probabilities."""

from torch import Tensor, float32

from . import reference_sample as reference


def gumbel_noise(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """seed, position: [B] int64 -> [B, vocab_size] float32, the same for a (seed, position, token)
    whatever the batch."""
    assert seed.shape == position.shape, (seed.shape, position.shape)
    return reference.gumbel_noise(seed, position, vocab_size)


def apply_penalties(
    logits: Tensor,
    token_ids: Tensor,
    num_prompt_tokens: int,
    presence_penalty: float,
    frequency_penalty: float,
    repetition_penalty: float,
) -> Tensor:
    """logits: [V] float32 and token_ids: [prompt + generated] int64 of one row -> [V] float32."""
    assert logits.dtype == float32 and logits.dim() == 1, (logits.dtype, logits.shape)
    return reference.apply_penalties(
        logits,
        token_ids,
        num_prompt_tokens,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
    )


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """logits: [B, V] float32 after the temperature; top_k [B] int64, top_p and min_p [B]
    float32."""
    assert logits.dtype == float32 and logits.dim() == 2, (logits.dtype, logits.shape)
    return reference.filter_logits(logits, top_k, top_p, min_p)


def top_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits: [B, V], chosen: [B] int64 -> chosen_logprob [B], top_logprob and top_ids
    [B, num_top]."""
    assert chosen.shape == logits.shape[:1], (chosen.shape, logits.shape)
    return reference.top_logprobs(logits, chosen, num_top)
