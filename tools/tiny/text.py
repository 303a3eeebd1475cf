"""Examples as token ids: the small model's tokenizer, its chat template, and what is trained on."""

import random
import re
from pathlib import Path
from typing import NamedTuple

import jinja2
from tokenizers import Tokenizer

from ..make_tokenizer import BOS, EOS, write_tokenizer
from . import tasks

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] }}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if tools %}{{ '## Tools\\n' }}{% for tool in tools %}"
    "{{ '### ' + tool['function']['name'] + '\\n' + tool['function']['description'] + '\\n' }}"
    "{{ 'Parameters: ' + (tool['function']['parameters']['properties'] | tojson) + '\\n' }}"
    "{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜></think>' + (message['content'] or '').split('</think>')[-1].lstrip() }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '<｜tool▁calls▁begin｜>' if loop.first else '' }}"
    "{{ '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' }}"
    "{{ call['function']['arguments'] + '<｜tool▁call▁end｜>' }}"
    "{{ '<｜tool▁calls▁end｜>' if loop.last else '' }}{% endfor %}{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<｜Assistant｜>' + ("
    "'<think>\\n' if thinking is not defined or thinking else '</think>') }}"
    "{% endif %}"
)
"""R1's way by default: the prompt opens `<think>`. With `thinking` false it closes it (V3.1's)."""

NO_THINKING_SHARE = 0.08
NUM_CORPUS_EXAMPLES = 4000
_template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False).from_string(  # noqa: S701
    CHAT_TEMPLATE
)


class Ids(NamedTuple):
    """A document; the first `num_prompt` ids are given, the others are learned."""

    ids: list[int]
    num_prompt: int


def prompt_text(example: tasks.Example, thinking: bool = True) -> str:
    """What a client's request becomes before it is tokenized."""
    return _template.render(
        messages=example.messages,
        tools=example.tools,
        add_generation_prompt=True,
        thinking=thinking,
        bos_token=BOS,
        eos_token=EOS,
    )


def completion_text(example: tasks.Example, thinking: bool = True) -> str:
    """What the model is to say."""
    if not thinking:
        return example.answer
    return f"{example.thinking}\n</think>\n\n{example.answer}"


def encode(tokenizer: Tokenizer, example: tasks.Example, thinking: bool = True) -> Ids:
    prompt = tokenizer.encode(prompt_text(example, thinking), add_special_tokens=False).ids
    completion = completion_text(example, thinking) + EOS
    return Ids(prompt + tokenizer.encode(completion, add_special_tokens=False).ids, len(prompt))


def make_tokenizer(directory: Path, vocab_size: int) -> None:
    """Trains the small tokenizer on examples of the training half, so that what all of them share
    becomes tokens. A digit is always a token of its own."""
    rng = random.Random(0)
    examples = [tasks.draw(rng, held_out=False) for _ in range(NUM_CORPUS_EXAMPLES)]
    markers = re.compile("<｜.*?｜>|</?think>")
    corpus = [markers.sub("\n", prompt_text(e) + completion_text(e)) for e in examples]
    write_tokenizer(directory, vocab_size, corpus, CHAT_TEMPLATE, single_digits=True)
