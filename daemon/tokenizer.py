"""The checkpoint's tokenizer: text to ids, ids to bytes, and its chat template's text.

The only file (with `tiktoken_model.py`) that knows the `tokenizers` library. Byte-level BPE alone
is supported: every token is then a string of bytes, which is what the detokenizer needs.

Two habits of the library would stop the event loop for seconds on a long text. `encode` keeps the
GIL, `encode_batch_fast` does not. And an Encoding's ids become a list, and its tokens are freed, in
one go under the GIL. So a long text is encoded in pieces, cut where every byte-level pre-tokenizer
cuts anyway: after a letter, before a blank, a digit or a mark.
"""

import asyncio
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as BPETokenizer

from . import tiktoken_model

PIECE_CHARS = 32 * 1024
MAX_PIECE_CHARS = 256 * 1024
"""An unbroken word longer than this is cut within: same text, perhaps other ids at the cut."""
MAX_CUTS_TRIED = 64
MAX_THREADS = 4

# Neither an apostrophe (contractions) nor a combining mark may follow the letter.
_CUT = re.compile(r"[^\W\d_](?=[\s0-9!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~，。、；：？！])")
_CUT_PROBE = "The cat, sat\n(on) a1 mat. Naïve\tрусский? 你好，世界。한국어 x=y_z; A/B <b>c d  e"


class TokenizerError(Exception):
    """The tokenizer's files cannot be used; the message names the file."""


class Tokenizer:
    """Encodes and decodes. Safe to use from several threads."""

    def __init__(self, bpe: BPETokenizer, config: dict[str, Any], chat_template: str = "") -> None:
        self._bpe = bpe
        self.chat_template = chat_template
        """Jinja source; empty: the checkpoint has none."""
        self.special_tokens = {
            key: text
            for key in config
            if key.endswith("_token") and (text := _content(config[key]))
        }
        """What a chat template may name: bos_token, eos_token, pad_token, ..."""
        self.bos_token = self.special_tokens.get("bos_token", "")
        self.eos_token = self.special_tokens.get("eos_token", "")
        self.bos_token_id = self.token_to_id(self.bos_token)
        self.eos_token_id = self.token_to_id(self.eos_token)

        added: dict[int, AddedToken] = bpe.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.token_bytes = _token_bytes(bpe.get_vocab(with_added_tokens=True), added)
        """The bytes of every id; b"" for ids without a token."""
        self._added_texts = [token.content for token in added.values()]
        self._max_added_chars = max(map(len, self._added_texts), default=0)

        self._prefix, self._suffix = self._find_affixes(config.get("add_bos_token") is True)
        self._can_cut = self._check_cuts()
        self._threads = ThreadPoolExecutor(
            min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="tokenizer"
        )

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Reads `tokenizer.json` or `tiktoken.model`, and what lies beside it."""
        config = _read_config(model_dir / "tokenizer_config.json")
        if (model_dir / "tokenizer.json").exists():
            bpe = _read_tokenizer_json(model_dir / "tokenizer.json")
        elif (model_dir / "tiktoken.model").exists():
            bpe = _read_tiktoken(model_dir / "tiktoken.model", config)
        else:
            raise TokenizerError(f"{model_dir} has neither tokenizer.json nor tiktoken.model.")
        return cls(bpe, config, _read_chat_template(model_dir, config))

    def close(self) -> None:
        """Ends the threads; encodings that nobody awaits any more are dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. The model's may be larger: its rows are padded."""
        return len(self.token_bytes)

    def token_to_id(self, token: str) -> int | None:
        return self._bpe.token_to_id(token) if token else None

    # ---- text to ids ----

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """A rendered chat has its BOS in the text: encode it without special tokens."""
        ids = list(self._prefix) if add_special_tokens else []
        for piece in self._pieces(text):
            ids += self._encode_whole(piece)
        if add_special_tokens:
            ids += self._suffix
        return ids

    async def encode_async(self, text: str, add_special_tokens: bool) -> list[int]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.encode, text, add_special_tokens)

    def _encode_whole(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which no tokenizer has
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        encodings = self._bpe.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encodings[0].ids

    def _pieces(self, text: str) -> Iterator[str]:
        if len(text) <= 2 * PIECE_CHARS or not self._can_cut:
            yield text
            return
        start = 0
        while start < len(text):
            end = self._find_cut(text, start)
            yield text[start:end]
            start = end

    def _find_cut(self, text: str, start: int) -> int:
        if len(text) - start <= 2 * PIECE_CHARS:
            return len(text)
        candidates = _CUT.finditer(text, start + PIECE_CHARS, start + MAX_PIECE_CHARS)
        for _, match in zip(range(MAX_CUTS_TRIED), candidates, strict=False):
            if not self._splits_added_token(text, match.end()):
                return match.end()
        cut = min(len(text), start + MAX_PIECE_CHARS)
        while self._splits_added_token(text, cut):
            cut -= 1
        return cut

    def _splits_added_token(self, text: str, cut: int) -> bool:
        low = max(0, cut - self._max_added_chars + 1)
        window = text[low : cut + self._max_added_chars - 1]
        return any(
            _covers(window, token, cut - low) for token in self._added_texts if token in window
        )

    def _find_affixes(self, add_bos_token: bool) -> tuple[list[int], list[int]]:
        """What the post-processor puts around every text.

        Transformers 5 goes by tokenizer.json alone, transformers 4 by `add_bos_token`. They agree
        on the published DeepSeek-V3, which adds nothing. Here either one may ask for the BOS.
        """
        bare, whole = self._encode_whole("a"), self._encode_whole("a", add_special_tokens=True)
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        prefix, suffix = whole[:at], whole[at + len(bare) :]
        if add_bos_token and self.bos_token_id is not None and self.bos_token_id not in prefix:
            prefix = [self.bos_token_id, *prefix]
        return prefix, suffix

    def _check_cuts(self) -> bool:
        """Whether pieces give this tokenizer's ids; false if it adds a blank to each text, say."""
        ends = [match.end() for match in _CUT.finditer(_CUT_PROBE)] + [len(_CUT_PROBE)]
        pieces = [_CUT_PROBE[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        in_pieces = [token_id for piece in pieces for token_id in self._encode_whole(piece)]
        return in_pieces == self._encode_whole(_CUT_PROBE)

    # ---- ids to text ----

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a finished sequence; bytes that are not UTF-8 become U+FFFD."""
        table, hidden = self.token_bytes, self.special_ids if skip_special_tokens else frozenset()
        data = b"".join([table[i] for i in ids if i not in hidden and 0 <= i < len(table)])
        return data.decode("utf-8", "replace")


def _covers(window: str, token: str, cut: int) -> bool:
    """Whether an occurrence of `token` begins before `cut` and ends after it."""
    start = window.rfind(token, 0, cut - 1 + len(token))
    return start != -1 and start + len(token) > cut


def _token_bytes(vocab: dict[str, int], added: dict[int, AddedToken]) -> list[bytes]:
    byte_of = {char: byte for byte, char in enumerate(tiktoken_model.byte_alphabet())}
    table = [b""] * (max([*vocab.values(), *added], default=-1) + 1)
    for token, token_id in vocab.items():
        try:
            table[token_id] = bytes([byte_of[char] for char in token])
        except KeyError:  # not spelled in the byte alphabet: it stands for itself
            table[token_id] = token.encode()
    for token_id, added_token in added.items():
        table[token_id] = added_token.content.encode()
    return table


# ---- files ----


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(_read(path), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} is not a valid JSON object: {error}.") from error


def _read_config(path: Path) -> dict[str, Any]:
    """Empty where there is no such file: the tokenizer then has no BOS, EOS or chat template."""
    return _read_json(path) if path.exists() else {}


def _read_tokenizer_json(path: Path) -> BPETokenizer:
    decoder = _read_json(path).get("decoder")
    if not _is_byte_level(decoder):
        found = decoder.get("type") if isinstance(decoder, dict) else decoder
        raise TokenizerError(f"{path} has the decoder {found}; only ByteLevel is supported.")
    try:
        return BPETokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise TokenizerError(f"{path} is not a tokenizer: {error}.") from error


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders")
        return isinstance(parts, list) and len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _read_tiktoken(path: Path, config: dict[str, Any]) -> BPETokenizer:
    try:
        named = {
            int(token_id): AddedToken(
                token["content"], special=token.get("special", True), normalized=False
            )
            for token_id, token in config.get("added_tokens_decoder", {}).items()
        }
        bpe = tiktoken_model.build(_read(path), named)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path} (with tokenizer_config.json) is wrong: {error}.") from error
    for token_id, token in named.items():
        if bpe.token_to_id(token.content) != token_id:
            raise TokenizerError(f"{path} leaves no room for {token.content} at id {token_id}.")
    return bpe


def _read_chat_template(model_dir: Path, config: dict[str, Any]) -> str:
    """`chat_template.jinja` wins; a list of named templates gives its default one."""
    path = model_dir / "chat_template.jinja"
    if path.exists():
        try:
            return _read(path).decode()
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8.") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _content(token: Any) -> str:
    """A special token in tokenizer_config.json: null, a string, or {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
