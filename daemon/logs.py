"""Logging: structlog, readable on a terminal and JSON lines elsewhere, on standard error."""

import logging
import sys
from typing import Any

import structlog

from .config import LogConfig

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(config: LogConfig) -> None:
    """Sets up structlog, and lets other libraries speak from warnings on."""
    console = config.format == "console" or (config.format == "auto" and sys.stderr.isatty())
    last: Any = structlog.processors.JSONRenderer()
    if console:
        last = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")


def get(name: str) -> Any:
    """A logger that adds `component`."""
    return structlog.get_logger(component=name)
