"""The model that comes with dsd: a small random checkpoint, made once and kept in the cache."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from . import config as configuration
from .config import Config

NAME = "dsd-random-tiny"
VERSION = "1"
"""Raised when the generator changes what it writes."""


def ensure(say: Callable[[str], None]) -> Path:
    """Its directory; made if it is not there. Raises CalledProcessError if that fails."""
    directory = configuration.cache_dir() / f"v{VERSION}" / NAME
    stamp = directory / ".complete"
    if not stamp.exists():
        say(f"making a small random DeepSeek-V3 checkpoint in {directory} ...")
        maker = (sys.executable, "-P", "-m", "dsd.tools.make_checkpoint", str(directory))
        subprocess.run(maker, check=True, stdout=subprocess.DEVNULL)
        stamp.touch()
    return directory


def replace_model_dir(config: Config, directory: Path) -> Config:
    model = msgspec.structs.replace(config.model, model_dir=str(directory))
    return msgspec.structs.replace(config, model=model)
