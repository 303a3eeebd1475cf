"""`dsd generate`: prompts in, texts out, over the engine and a worker but without HTTP."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..ipc.messages import Sampling
from .config import Config
from .detokenizer import Detokenizer
from .engine import Unavailable
from .generation import Choice, Generation
from .node import Node
from .request import FinishReason, Refused, Request
from .supervisor import WorkerFailed


class PromptError(Exception):
    """The prompts cannot be read; one sentence."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate."""

    prompts: list[str]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


def read_prompts(given: tuple[str, ...], path: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file, one a line. Raises PromptError."""
    prompts = list(given)
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise PromptError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise PromptError(f"{path} is not UTF-8") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise PromptError("no prompt was given; use --prompt or --prompt-file")
    return prompts


async def generate(config: Config, job: Job, say: Callable[[str], None]) -> None:
    """Loads the model, generates for all prompts at once, and prints them in their order."""
    with tempfile.TemporaryDirectory(prefix="dsd-") as directory:
        queue = max(config.server.max_queued_requests, len(job.prompts))
        server = msgspec.structs.replace(
            config.server, runtime_dir=directory, max_queued_requests=queue
        )
        node = Node(msgspec.structs.replace(config, server=server))
        async with node.model_only():
            tokenizer = node.info.tokenizer
            if tokenizer is None:
                raise WorkerFailed(f"{node.info.model_dir} has no tokenizer to read prompts with")
            prompts = [await tokenizer.encode_async(text, True) for text in job.prompts]
            texts = await _run(node, job, prompts)
        for prompt, text in zip(job.prompts, texts, strict=True):
            say(f"Prompt: {prompt!r}, Generated text: {text!r}")


async def _run(node: Node, job: Job, prompts: list[list[int]]) -> list[str]:
    """One generation for each prompt, all in one stream."""
    info = node.info
    assert info.tokenizer is not None
    choices = []
    for index, prompt_ids in enumerate(prompts):
        sampling = Sampling(
            temperature=job.temperature, top_p=job.top_p, seed=(job.seed + index) % 2**64
        )
        request = Request(
            f"prompt-{index}", prompt_ids, sampling, job.max_tokens, info.eos_token_ids
        )
        tokenizer = info.tokenizer
        detokenizer = Detokenizer(tokenizer.token_bytes, tokenizer.special_ids, True)
        choices.append(Choice(index, request, detokenizer, None))
    generation = Generation(node.engine, choices)
    try:
        await generation.start()
    except (Refused, Unavailable) as error:
        raise WorkerFailed(str(error)) from error
    texts = [""] * len(prompts)
    with _progress_bar() as bar:
        task = bar.add_task("Processed requests", total=len(prompts))
        async for delta in generation.deltas():
            texts[delta.index] += delta.content
            if delta.finish is not None:
                bar.advance(task)
            if delta.finish in (FinishReason.ERROR, FinishReason.ABORT):
                raise WorkerFailed(delta.message)
    return texts


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}:"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
