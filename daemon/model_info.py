"""What the daemon itself reads of a checkpoint: names, tokenizer, end tokens, defaults."""

from pathlib import Path
from typing import Any

import msgspec

from .tokenizer import Tokenizer, TokenizerError

ORGANISATION = "deepseek-ai"


class Defaults(msgspec.Struct, frozen=True):
    """Sampling where a request says nothing: generation_config.json, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ModelInfo:
    """One served model, as the front sees it."""

    def __init__(self, model_dir: Path, served_names: tuple[str, ...]) -> None:
        self.model_dir = model_dir
        self.names: tuple[str, ...] = ()
        self.rename(served_names)
        self.is_loaded = False
        """`read` has ended."""
        self.tokenizer: Tokenizer | None = None
        """None: the checkpoint has none; prompts are token ids then."""
        self.defaults = Defaults()
        self.eos_token_ids: frozenset[int] = frozenset()

    def rename(self, served_names: tuple[str, ...]) -> None:
        """What requests may call the model; by default its directory's name."""
        self.names = served_names or (self.model_dir.resolve().name,)

    @property
    def name(self) -> str:
        """The one that answers carry."""
        return self.names[0]

    def knows(self, name: str) -> bool:
        """Served names, the directory's name, both with the organisation, and the path itself."""
        base = self.model_dir.resolve().name
        known = {*self.names, base, f"{ORGANISATION}/{base}", str(self.model_dir)}
        return name in known or name in {f"{ORGANISATION}/{served}" for served in self.names}

    def read(self) -> None:
        """Reads the tokenizer and the defaults; takes a second for a large vocabulary. Raises
        TokenizerError."""
        try:
            self._read()
        except OSError as error:
            raise TokenizerError(f"{error.filename} cannot be read: {error.strerror}") from error

    def _read(self) -> None:
        has_tokenizer = any(
            (self.model_dir / name).exists() for name in ("tokenizer.json", "tiktoken.model")
        )
        self.tokenizer = Tokenizer.load(self.model_dir) if has_tokenizer else None
        generation = _read_json(self.model_dir / "generation_config.json")
        self.defaults = _defaults(generation, self.model_dir / "generation_config.json")
        config = _read_json(self.model_dir / "config.json")
        self.eos_token_ids = frozenset(
            _ids(config.get("eos_token_id")) | _ids(generation.get("eos_token_id"))
        )
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            self.eos_token_ids |= {self.tokenizer.eos_token_id}

    def close(self) -> None:
        if self.tokenizer is not None:
            self.tokenizer.close()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        fields = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path} holds no JSON object")
    return fields


def _defaults(generation: dict[str, Any], path: Path) -> Defaults:
    if generation.get("do_sample") is False:
        return Defaults()
    known = {name: generation[name] for name in Defaults.__struct_fields__ if name in generation}
    try:
        return msgspec.convert(known, Defaults)
    except msgspec.ValidationError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {item for item in values if type(item) is int}
