"""A small byte-level BPE tokenizer with DeepSeek's special tokens and an R1-style chat template."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
VISIBLE = (
    "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
)  # fmt: skip
"""Tokens that the published tokenizers add without marking them special: they stay in the text."""

CORPUS = """\
The node daemon reads a request, turns its text into tokens, and plans the next step. A worker
takes the step, runs the layers, and samples one token for every row. The token becomes text
again and goes back to whoever asked. What is thirty-seven plus eighty-five? It is one hundred
and twenty-two, because thirty and eighty are one hundred and ten, and seven and five are
twelve. Where is New York? It is a city on the east coast of the United States. Hello, my name
is Ada; how are you today? The capital of France is Paris. The future of computing is quiet,
small, and close to the people who use it. First think, then answer: a short chain of reasoning
helps with numbers, with words in order, and with lists to be sorted.
def schedule(self, requests): return [request for request in requests if request.ready]
"""
"""Enough English for common words to become tokens; everything else is spelled in bytes."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\\n\\n' if messages[loop.index]['role'] == 'system' else '' }}"
    "{% endif %}{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def write_tokenizer(
    directory: Path,
    vocab_size: int,
    corpus: Sequence[str] = (),
    chat_template: str = CHAT_TEMPLATE,
    single_digits: bool = False,
) -> None:
    """tokenizer.json and tokenizer_config.json. Ids 0, 1 and 2 are BOS, EOS and padding, as
    published; the visible ones are the last. The default corpus is enough for about 560 tokens."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([digits, byte_level]) if single_digits else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(VISIBLE),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus or CORPUS.splitlines(), trainer)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in VISIBLE])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 4096,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": chat_template,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
