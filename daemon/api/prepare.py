"""From a decoded body to a Generation: prompt to tokens, fields to Sampling, both checked."""

import secrets
from collections.abc import Sequence

from ...ipc.messages import Ready, Sampling
from ..detokenizer import Detokenizer
from ..engine import Engine, EngineState, why_unavailable
from ..generation import Choice, Generation
from ..model_info import Defaults, ModelInfo
from ..request import Request
from ..thinking import ThinkingSplitter
from .errors import ApiError, invalid, retry_later
from .openai_types import MAX_PROMPTS, MAX_STOP_BYTES, Common, CompletionRequest

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, for /v1/completions."""
SEED_MASK = 2**64 - 1
MAX_ID_DIGITS = 10


def require_loaded(info: ModelInfo) -> None:
    """Raises ApiError 503 while the tokenizer is being read."""
    if not info.is_loaded:
        raise retry_later("the model is being loaded")


def require_ready(engine: Engine, info: ModelInfo) -> Ready:
    """The worker's description. Raises ApiError 503 while requests cannot be served."""
    require_loaded(info)
    if engine.ready is None or engine.state is not EngineState.READY:
        raise retry_later(why_unavailable(engine.state))
    return engine.ready


def check_model(info: ModelInfo, name: str) -> None:
    """Raises ApiError 404 that lists the known names."""
    if not info.knows(name):
        known = ", ".join(info.names)
        raise ApiError(404, f"the model {name!r} is not served here; served: {known}", "model",
                       "model_not_found")  # fmt: skip


def check_common(body: Common) -> None:
    """What types cannot say. Raises ApiError."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is allowed only with stream", "stream_options")
    if body.max_tokens is not None and body.min_tokens > body.max_tokens:
        raise invalid(f"min_tokens {body.min_tokens} is more than max_tokens", "min_tokens")
    for text in stop_strings(body):
        if len(text.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES:
            raise invalid(f"a stop string has more than {MAX_STOP_BYTES} bytes", "stop")


def stop_strings(body: Common) -> Sequence[str]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else body.stop


async def completion_prompts(
    body: CompletionRequest, info: ModelInfo, ready: Ready
) -> list[list[int]]:
    """Token ids of each prompt: text, ids, or a list of either. Raises ApiError."""
    prompt = body.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], int) and len(prompt) > MAX_PROMPTS:
        check_length(len(prompt), ready)  # before millions of ids are looked at
    if isinstance(prompt, list) and all(isinstance(item, int) for item in prompt):
        return [_check_ids(prompt, ready)]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if len(prompts) > MAX_PROMPTS:
        raise invalid(f"{len(prompts)} prompts; the limit is {MAX_PROMPTS}", "prompt")
    found = []
    for item in prompts:
        if isinstance(item, int):
            raise invalid("a list of prompts mixes token ids with texts or lists", "prompt")
        if isinstance(item, str):
            found.append(await encode(item, info, add_special_tokens=True))
        else:
            found.append(_check_ids(item, ready))
    return found


async def encode(text: str, info: ModelInfo, add_special_tokens: bool) -> list[int]:
    """Raises ApiError if the checkpoint has no tokenizer."""
    if info.tokenizer is None:
        raise invalid("this checkpoint has no tokenizer; send the prompt as token ids", "prompt")
    return await info.tokenizer.encode_async(text, add_special_tokens)


def _check_ids(ids: Sequence[object], ready: Ready) -> list[int]:
    check_length(len(ids), ready)
    for token_id in ids:
        if not isinstance(token_id, int) or not 0 <= token_id < ready.vocab_size:
            raise invalid(
                f"token id {token_id} is outside the vocabulary of {ready.vocab_size}", "prompt"
            )
    return list(ids)  # type: ignore[arg-type]


def sampling(
    body: Common,
    defaults: Defaults,
    eos_token_ids: frozenset[int],
    ready: Ready,
    num_logprobs: int,
    num_prompt_logprobs: int,
) -> Sampling:
    """The wire's Sampling; its seed is that of choice 0. Raises ApiError."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    top_k = defaults.top_k if body.top_k is None else body.top_k
    return Sampling(
        temperature=given(body.temperature, defaults.temperature),
        top_p=given(body.top_p, defaults.top_p),
        top_k=max(0, top_k),
        min_p=given(body.min_p, defaults.min_p),
        presence_penalty=given(body.presence_penalty, 0.0),
        frequency_penalty=given(body.frequency_penalty, 0.0),
        repetition_penalty=given(body.repetition_penalty, defaults.repetition_penalty),
        seed=secrets.randbits(64) if body.seed is None else body.seed & SEED_MASK,
        logit_bias=_logit_bias(body, ready.vocab_size),
        min_tokens=body.min_tokens,
        masked_token_ids=_masked(body, eos_token_ids, ready.vocab_size),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def _masked(body: Common, eos_token_ids: frozenset[int], vocab_size: int) -> tuple[int, ...]:
    if not body.min_tokens:
        return ()
    ids = eos_token_ids | set(body.stop_token_ids)
    return tuple(sorted(token_id for token_id in ids if token_id < vocab_size))


def _logit_bias(body: Common, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, bias in (body.logit_bias or {}).items():
        is_id = key.isascii() and key.isdecimal() and len(key) <= MAX_ID_DIGITS
        if not is_id or int(key) >= vocab_size:
            raise invalid(f"the vocabulary of {vocab_size} has no token {key[:32]!r}", "logit_bias")
        pairs.append((int(key), bias))
    return tuple(pairs)


def make_generation(
    request_id: str,
    prompts: Sequence[list[int]],
    body: Common,
    sample: Sampling,
    max_tokens: int,
    info: ModelInfo,
    engine: Engine,
    starts_inside: bool | None = None,
) -> Generation:
    """One Choice for each prompt and each of `n`, each with a seed of its own; where the client
    gave one, choice i of every prompt has seed + i. `starts_inside` is None where thinking is not
    split off. Raises ApiError for a prompt that does not fit."""
    ready = require_ready(engine, info)
    ends = frozenset() if body.ignore_eos else info.eos_token_ids
    stop_token_ids = frozenset(ends | set(body.stop_token_ids))
    choices: list[Choice] = []
    num_choices = body.n or 1
    if (wanted := len(prompts) * num_choices) > engine.max_queued_requests:
        limit = engine.max_queued_requests
        raise invalid(f"{wanted} sequences; at most {limit} may wait", "n")
    for prompt_ids in prompts:
        check_length(len(prompt_ids), ready)
        for copy in range(num_choices):
            index = len(choices)
            request = Request(
                f"{request_id}-{index}",
                prompt_ids,
                _with_seed(sample, index if body.seed is None else copy),
                max_tokens,
                stop_token_ids,
                body.priority,
            )
            splitter = None if starts_inside is None else ThinkingSplitter(starts_inside)
            choices.append(Choice(index, request, _detokenizer(body, info), splitter))
    return Generation(engine, choices)


def check_length(num_prompt_tokens: int, ready: Ready) -> None:
    """Raises ApiError for a prompt that leaves no room for a token."""
    if num_prompt_tokens == 0:
        raise invalid("the prompt has no tokens", "prompt")
    limit = min(ready.max_seq_len, (ready.num_blocks - 1) * ready.block_size)
    if num_prompt_tokens >= limit:
        raise ApiError(
            400,
            f"the prompt has {num_prompt_tokens} tokens; at most {limit - 1} fit, of a context of "
            f"{limit}",
            "prompt",
            "context_length_exceeded",
        )


def _detokenizer(body: Common, info: ModelInfo) -> Detokenizer | None:
    if info.tokenizer is None:
        return None
    return Detokenizer(
        info.tokenizer.token_bytes,
        info.tokenizer.special_ids,
        body.skip_special_tokens,
        stop_strings(body),
        body.include_stop_str_in_output,
    )


def _with_seed(sample: Sampling, copy: int) -> Sampling:
    if copy == 0:
        return sample
    fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
    return Sampling(**{**fields, "seed": (sample.seed + copy) & SEED_MASK})
