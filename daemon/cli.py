"""The `dsd` command: serve, generate, demo."""

import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click
import uvloop

from .. import __version__
from . import config as configuration
from . import logs, options
from .config import Config, ConfigError, Overrides
from .listen import ListenError
from .supervisor import WorkerFailed
from .template import TemplateError
from .tokenizer import TokenizerError

SETTINGS = {
    "token_normalize_func": options.normalise,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
FAULTS = (ListenError, TokenizerError, TemplateError, WorkerFailed)
"""What the world did; one sentence each, exit status 1."""


INTERRUPTED = 130
"""Exit status of what Ctrl-C ended."""


class Fault(click.ClickException):
    """Ends the command with one sentence and exit status 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"dsd: {self.message}", file=file or sys.stderr)


class UsageFault(Fault):
    """The command line or the configuration is at fault."""

    exit_code = 2


def run(work: Coroutine[Any, Any, None]) -> None:
    """Runs the daemon's loop; turns what went wrong into one sentence and an exit status."""
    try:
        uvloop.run(work)
    except* FAULTS as group:
        raise Fault(str(_first(group))) from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def configure(
    model: str | None, config_path: Path | None, values: dict[str, Any]
) -> tuple[Config, Overrides]:
    """The command line as a checked Config. Raises UsageFault."""
    try:
        flags = options.overrides(values)
        names = values.get("served_model_name") or ()
        if names:
            flags.setdefault("server", {})["served_model_name"] = names
        _name_model(model, values.get("model_path"), flags)
        config = configuration.load(config_path, flags)
    except ConfigError as error:
        raise UsageFault(str(error)) from error
    logs.configure(config.log)
    return config, flags


def _name_model(model: str | None, model_path: str | None, flags: Overrides) -> None:
    """`dsd serve DIR`, or the guide's `NAME --model_path DIR`."""
    directory = model_path or model
    if model_path is not None and model is not None:
        flags.setdefault("server", {}).setdefault("served_model_name", (model,))
    if directory is None:
        return
    if not Path(directory).is_dir():
        hint = "" if model_path else "; dsd does not download: name a directory, or --model-path"
        raise ConfigError(f"the model directory {directory} does not exist{hint}")
    flags.setdefault("model", {})["model_dir"] = directory


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="dsd")
def main() -> None:
    """Serve DeepSeek-V3 and DeepSeek-R1 on this machine."""


@main.command()
@click.argument("model", required=False)
@click.option("--model-path", "--model-dir", "model_path", help="Checkpoint directory.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="TOML file.")
@click.option("--served-model-name", multiple=True, help="Name for requests; may be repeated.")
@options.engine_options
def serve(model: str | None, config_path: Path | None, **values: Any) -> None:
    """Run the daemon: the OpenAI HTTP API on TCP and on a Unix socket.

    MODEL is a checkpoint directory; without it, the model that comes with dsd is served.
    """
    from .node import Node

    config, flags = configure(model, config_path, values)

    async def work() -> None:
        await Node(config, config_path, flags).run()

    run(work())


@main.command()
@click.argument("model", required=False)
@click.option("--model-path", "--model-dir", "model_path", help="Checkpoint directory.")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="TOML file.")
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be repeated.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="One prompt a line.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@options.engine_options
def generate(model: str | None, config_path: Path | None, **values: Any) -> None:
    """Generate text for prompts, without a server; prints each prompt and its text."""
    from . import offline

    values["level"] = values["level"] or "warning"
    try:
        prompts = offline.read_prompts(values["prompts"], values["prompt_file"])
    except offline.PromptError as error:
        raise UsageFault(str(error)) from error
    config, _ = configure(model, config_path, values)
    job = offline.Job(
        prompts=prompts,
        max_tokens=values["max_tokens"],
        temperature=values["temperature"],
        top_p=values["top_p"],
        seed=values["seed"],
    )
    run(offline.generate(config, job, click.echo))


@main.command()
@click.option("--port", default=0, help="TCP port; 0 takes any free one.")
def demo(port: int) -> None:
    """Serve the model that comes with dsd, ask it a few questions over HTTP, and show its thoughts
    and answers."""
    from . import demo as demonstration

    config, _ = configure(None, None, {"port": port, "level": "warning"})
    try:
        run(demonstration.show(config, click.echo))
    except demonstration.Interrupted:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
