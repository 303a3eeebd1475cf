"""The tokenizer against transformers, against a BPE by rank, and against the event loop's clock."""

import asyncio
import base64
import itertools
import json
import sys
import time
import warnings
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dsd.daemon import tiktoken_model
from dsd.daemon.tokenizer import MAX_PIECE_CHARS, PIECE_CHARS, Tokenizer, TokenizerError

PUBLISHED = Path(__file__).parents[3] / "shared" / "deepseek-v3"
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "tokenizer.json").exists(), reason=f"{PUBLISHED} is absent"
)

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SENTENCES = [
    "The cat sat on the mat.",
    "def f(x): return 123",
    "你好，世界。",
    "naïve café 🙂 and on",
]
TEXTS = [
    "",
    " ",
    "Hello  world 12345\n\n\t 你好 <think>x</think>",
    f"{BOS}hi{EOS}",
    "<｜User｜>a<｜Assistant｜>",
    "don't DON'T I'll — “quotes” … ½ ²",
    "カタカナ漢字 한국어 русский العربية हिन्दी é́",
    "👩‍👩‍👧‍👦🏳️‍🌈\x00\x01\x7f\u200b\ufeff",
    "a" * 1000 + " " * 1000 + "7" * 100,
]


def train_bpe() -> tokenizers.Tokenizer:
    """A small tokenizer of DeepSeek's kind."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?[\p{L}\p{M}]+|\s?[\p{P}\p{S}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 10, trainer)
    bpe.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    return bpe


def write_tokenizer(folder: Path, **config: Any) -> Path:
    train_bpe().save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": {"content": EOS}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("small")))
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def published() -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(PUBLISHED)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="module")
def theirs() -> Any:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("HF_HUB_OFFLINE", "1")
        warnings.simplefilter("ignore")  # transformers' own, while it is imported
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(PUBLISHED)


# ---- ids ----


@needs_published
@pytest.mark.parametrize("text", TEXTS)
def test_encode_gives_the_ids_of_transformers(published: Tokenizer, theirs: Any, text: str) -> None:
    assert published.encode(text, True) == theirs(text).input_ids
    assert published.encode(text, False) == theirs(text, add_special_tokens=False).input_ids


@needs_published
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_of_transformers(
    published: Tokenizer, theirs: Any, text: str, skip: bool
) -> None:
    ids = theirs(text).input_ids
    assert published.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@needs_published
def test_published_vocabulary(published: Tokenizer) -> None:
    assert published.vocab_size == 128815
    assert (published.bos_token, published.eos_token) == (BOS, EOS)
    assert (published.bos_token_id, published.eos_token_id) == (0, 1)
    assert published.token_to_id("<think>") == 128798
    assert 128798 not in published.special_ids  # the client gets to see it
    assert published.special_ids >= {0, 1, 2}
    assert published.token_bytes[128803] == "<｜User｜>".encode()


@settings(deadline=None)
@given(text=st.text())
def test_decode_of_encode_is_the_text(small: Tokenizer, text: str) -> None:
    ids = small.encode(text, add_special_tokens=False)
    assert small.decode(ids, skip_special_tokens=False) == text
    assert b"".join(small.token_bytes[i] for i in ids) == text.encode()


def test_encode_half_a_surrogate_pair_becomes_a_replacement_character(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud800b", False)) == "a\ufffdb"


def test_decode_skips_special_tokens_and_ids_without_a_token(small: Tokenizer) -> None:
    ids = small.encode(f"{BOS}<think>cat{EOS}", False)
    assert small.decode([*ids, 99999]) == "<think>cat"
    assert small.decode(ids, skip_special_tokens=False) == f"{BOS}<think>cat{EOS}"


@pytest.mark.parametrize("in_template", [False, True])
@pytest.mark.parametrize("add_bos_token", [None, False, True])
def test_bos_is_added_once_if_either_file_asks(
    tmp_path: Path, in_template: bool, add_bos_token: bool | None
) -> None:
    write_tokenizer(tmp_path, **({} if add_bos_token is None else {"add_bos_token": add_bos_token}))
    if in_template:
        bpe = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
        )
        bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("cat", add_special_tokens=True)
    assert ids.count(0) == int(in_template or add_bos_token is True)
    assert 0 not in tokenizer.encode("cat", add_special_tokens=False)
    tokenizer.close()


# ---- long texts ----

LONG_TEXTS = {
    "prose": "The quick brown fox, 12345 lazy dogs — naïve café 你好，世界. f(x)\n" * 4000,
    "tags": "</think><think>" * 20_000,
    "spaced tags": "word </think> word" * 12_000,
    "one word in tags": "<think>" + "a" * (MAX_PIECE_CHARS // 2) + "</think> b" * 8000,
}


@pytest.mark.slow
@needs_published
@pytest.mark.parametrize("name", LONG_TEXTS)
def test_encode_in_pieces_gives_the_ids_of_the_whole(published: Tokenizer, name: str) -> None:
    text = LONG_TEXTS[name]
    assert len(text) > 2 * PIECE_CHARS
    whole = tokenizers.Tokenizer.from_file(str(PUBLISHED / "tokenizer.json"))
    assert published.encode(text, False) == whole.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_encode_in_pieces_keeps_added_tokens_whole(small: Tokenizer, name: str) -> None:
    text = LONG_TEXTS[name]
    ids = small.encode(text, False)
    for tag in ("<think>", "</think>"):
        assert ids.count(small.token_to_id(tag) or -1) == text.count(tag)
    assert small.decode(ids) == text


def test_encode_an_unbroken_word_is_cut_and_loses_nothing(small: Tokenizer) -> None:
    text = "<think>" * (3 * MAX_PIECE_CHARS // len("<think>"))
    assert set(small.encode(text, False)) == {small.token_to_id("<think>")}
    text = "🙂" * (MAX_PIECE_CHARS + PIECE_CHARS)
    assert small.decode(small.encode(text, False)) == text


def test_encode_a_tokenizer_that_adds_blanks_is_not_cut(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    bpe = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    text = LONG_TEXTS["prose"]
    assert tokenizer.encode(text, False) == bpe.encode(text, add_special_tokens=False).ids
    tokenizer.close()


async def measure_lag_s(work: Awaitable[Any]) -> float:
    """The longest time for which the loop did not run while `work` went on."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            last, previous = time.perf_counter(), last
            worst = max(worst, last - previous - 0.001)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    await work
    await asyncio.sleep(0.01)
    ticker.cancel()
    return worst


@pytest.fixture
def short_switch_interval() -> Iterator[None]:
    """As the daemon sets it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    yield
    sys.setswitchinterval(before)


@needs_published
@pytest.mark.slow
@pytest.mark.usefixtures("short_switch_interval")
@pytest.mark.parametrize("unit", ["The lazy dog, 123 — 你好，世界.\n", "𓀀", "7", "\x01"])
def test_encode_async_of_4_mib_never_blocks_the_loop(published: Tokenizer, unit: str) -> None:
    text = unit * (4 * 1024 * 1024 // len(unit.encode()))

    async def best_lag_s() -> float:
        # What blocks the loop blocks it each time; what else runs on this machine does not.
        return min([await measure_lag_s(published.encode_async(text, False)) for _ in range(2)])

    assert asyncio.run(best_lag_s()) <= 0.050


# ---- files ----


@pytest.mark.parametrize(
    ("token", "content"), [(BOS, BOS), ({"content": BOS, "lstrip": False}, BOS), (None, "")]
)
def test_load_special_tokens_in_every_form(tmp_path: Path, token: Any, content: str) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, bos_token=token))
    assert tokenizer.bos_token == content
    assert tokenizer.bos_token_id == (0 if content else None)
    assert tokenizer.special_tokens.get("bos_token", "") == content
    tokenizer.close()


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}], "b"),
        (None, ""),
    ],
)
def test_load_chat_template_in_every_form(tmp_path: Path, template: Any, found: str) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template == found
    tokenizer.close()


def test_load_chat_template_file_wins(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="one")
    (tmp_path / "chat_template.jinja").write_text("{{ 'two' }}\n")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template == "{{ 'two' }}\n"
    tokenizer.close()


def test_load_nothing_there_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tiktoken\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not a valid JSON object"),
        ("tokenizer.json", "[]", "tokenizer.json is not a valid JSON object"),
        ("tokenizer.json", '{"decoder": {"type": "Metaspace"}}', "decoder Metaspace; only Byte"),
        ("tokenizer.json", '{"decoder": null}', "decoder None; only ByteLevel"),
        ("tokenizer.json", '{"decoder": {"type": "ByteLevel"}}', "json is not a tokenizer"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json is not a valid JSON object"),
    ],
)
def test_load_broken_file_is_named(tmp_path: Path, file: str, content: str, sentence: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=sentence):
        Tokenizer.load(tmp_path)


# ---- tiktoken.model ----

WORDS = [b"th", b"he", b"the", b" c", b"at", b" cat", b"in", b"ing", b"aa", b"aaa", b"an", b"ana",
         "你".encode()[:2], "你".encode(), b"12", b"123", b"\n\n", b"he c"]  # fmt: skip
RANKS = {token: rank for rank, token in enumerate([*(bytes([i]) for i in range(256)), *WORDS])}
NAMED = {
    "274": {"content": "[BOS]", "special": True},
    "275": {"content": "[EOS]", "special": True},
    "280": {"content": "<think>", "special": False},
}


def bpe_by_rank(word: bytes) -> list[int]:
    """What tiktoken does: join the neighbours of the lowest rank, the leftmost first."""
    if word in RANKS:
        return [RANKS[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        joined = [RANKS.get(left + right, 10**9) for left, right in itertools.pairwise(parts)]
        if not joined or min(joined) == 10**9:
            return [RANKS[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def write_tiktoken(folder: Path, data: bytes | None = None) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items()]
    (folder / "tiktoken.model").write_bytes(b"".join(lines) if data is None else data)
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": NAMED}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(write_tiktoken(tmp_path_factory.mktemp("kimi")))
    yield tokenizer
    tokenizer.close()


def has_no_tag(text: str) -> bool:
    """Named tokens stand for themselves; hypothesis knows them from the sources."""
    return not any(token["content"] in text for token in NAMED.values())


@settings(deadline=None)
@given(text=st.text(st.sampled_from("thecaing 你n1\n23")) | st.text().filter(has_no_tag))
def test_tiktoken_gives_the_ids_of_bpe_by_rank(kimi: Tokenizer, text: str) -> None:
    split = pre_tokenizers.Split(Regex(tiktoken_model.KIMI_PATTERN), "isolated")
    words = [word for word, _ in split.pre_tokenize_str(text)]
    expected = [token_id for word in words for token_id in bpe_by_rank(word.encode())]
    assert kimi.encode(text, True) == expected
    assert kimi.decode(expected) == text


def test_tiktoken_pattern_splits_as_kimi_does() -> None:
    split = pre_tokenizers.Split(Regex(tiktoken_model.KIMI_PATTERN), "isolated")
    words = [word for word, _ in split.pre_tokenize_str("中文English混合 don't a.b 12345?!\n\n  x")]
    assert words == [
        "中文", "English", "混合", " don't", " a", ".b", " ", "123", "45", "?!\n\n", " ", " x",
    ]  # fmt: skip


def test_tiktoken_special_tokens_have_their_ids(kimi: Tokenizer) -> None:
    assert kimi.encode("[BOS]<think>the[EOS]", False) == [274, 280, RANKS[b"the"], 275]
    assert kimi.vocab_size == len(RANKS) + tiktoken_model.NUM_RESERVED_IDS
    assert kimi.token_bytes[276] == b"<|reserved_token_276|>"
    assert kimi.decode([274, 280, RANKS[b"the"], 275]) == "<think>the"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"YQ== 0\nnonsense\n", "tiktoken.model .* line 2 is not a base64 token and a rank"),
        (b"YQ== 1\n", "tiktoken.model .* the 1 ranks are not 0..0"),
    ],
)
def test_tiktoken_broken_file_is_named(tmp_path: Path, data: bytes, sentence: str) -> None:
    with pytest.raises(TokenizerError, match=sentence):
        Tokenizer.load(write_tiktoken(tmp_path, data))
