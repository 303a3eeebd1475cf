"""The `dsctl` command: asks a running daemon over its control socket."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from .. import __version__
from . import config as configuration
from . import options
from .config import ServerConfig

TIMEOUT_S = 10.0
SETTINGS = {
    "token_normalize_func": options.normalise,
    "help_option_names": ["-h", "--help"],
}


class Unreachable(click.ClickException):
    exit_code = 3

    def show(self, file: Any = None) -> None:
        click.echo(f"dsctl: {self.message}", file=file or sys.stderr)


def ask(path: Path, command: str) -> dict[str, Any]:
    """One command, its answer. Raises Unreachable, or ClickException with the daemon's sentence."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(path))
            connection.sendall(json.dumps({"command": command}).encode() + b"\n")
            data = b"".join(iter(lambda: connection.recv(65536), b""))
    except TimeoutError as error:
        raise Unreachable(f"the daemon on {path} does not answer") from error
    except OSError as error:
        raise Unreachable(
            f"no daemon answers on {path}: {error.strerror or error}; "
            "a daemon that was started with --runtime-dir needs the same one here"
        ) from error
    if not data:
        raise Unreachable(f"the daemon on {path} closed the connection")
    reply: dict[str, Any] = json.loads(data)
    if not reply.pop("ok"):
        raise click.ClickException(reply["error"])
    return reply


@click.group(context_settings=SETTINGS)
@click.option("--runtime-dir", default="", help="Directory of the daemon's sockets.")
@click.version_option(__version__, prog_name="dsctl")
@click.pass_context
def main(context: click.Context, runtime_dir: str) -> None:
    """Control a running dsd."""
    context.obj = _control_socket(runtime_dir)


def _control_socket(runtime_dir: str) -> Path:
    return configuration.control_socket(ServerConfig(runtime_dir=runtime_dir))


def _take_runtime_dir(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.obj = _control_socket(value)


runtime_dir_too = click.option(
    "--runtime-dir", expose_value=False, callback=_take_runtime_dir, help="As before the command."
)
"""The option after the command as well, where people look for it."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
@runtime_dir_too
@click.pass_obj
def status(path: Path, as_json: bool) -> None:
    """Show model, state, ranks, requests, KV use and speed."""
    reply = ask(path, "status")
    if as_json:
        click.echo(json.dumps(reply, indent=2))
    else:
        show(reply, Console())


@main.command()
@runtime_dir_too
@click.pass_obj
def drain(path: Path) -> None:
    """Take no new requests; finish those at hand."""
    reply = ask(path, "drain")
    live = reply["requests"]["running"] + reply["requests"]["waiting"]
    click.echo(f"draining: {live} requests are left")


@main.command()
@runtime_dir_too
@click.pass_obj
def resume(path: Path) -> None:
    """Take requests again after a drain."""
    click.echo(f"state: {ask(path, 'resume')['state']}")


@main.command()
@runtime_dir_too
@click.pass_obj
def reload(path: Path) -> None:
    """Read the configuration file again, and apply what can change while the daemon runs."""
    reply = ask(path, "reload")
    click.echo("applied: " + (", ".join(reply["applied"]) or "nothing has changed"))
    if reply["refused"]:
        message = f"these need a restart and were left alone: {', '.join(reply['refused'])}"
        raise click.ClickException(message)


def show(reply: dict[str, Any], console: Console) -> None:
    """The status as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    requests, kv = reply["requests"], reply.get("kv_cache")
    state = reply["state"] + (f" ({reply['progress']})" if "progress" in reply else "")
    table.add_row("model", f"{reply['model']}  ({reply['model_dir']})")
    table.add_row("state", f"{state}, up {_duration(reply['uptime_s'])}")
    table.add_row("listening", "  ".join(reply["listening"]))
    for rank in reply["ranks"]:
        words = [str(rank[key]) for key in ("state", "device", "dtype") if key in rank]
        if "num_parameters" in rank:
            words.append(f"{rank['num_parameters'] / 1e6:,.1f} M parameters")
            words.append(f"{rank['weight_bytes'] / 1e9:,.3f} GB")
        table.add_row(f"rank {rank['rank']}", ", ".join(words) + f"  (pid {rank['pid']})")
    table.add_row("requests", f"{requests['running']} running, {requests['waiting']} waiting, "
                  f"{requests['accepted']} accepted, {requests['refused']} refused")  # fmt: skip
    if kv is not None:
        table.add_row("KV cache", f"{kv['usage']:.1%} of {kv['num_blocks']} blocks held, "
                      f"{kv['cached']} cached for reuse")  # fmt: skip
    if (mtp := reply.get("mtp")) is not None:
        shares = ", ".join(f"{share:.0%}" for share in mtp["acceptance"])
        table.add_row("MTP", f"{mtp['draft_length']} of {mtp['num_nextn']} drafts ({mtp['why']}), "
                      f"{mtp['mean_accepted_length']:.2f} tokens a step; "
                      f"accepted by position: {shares}")  # fmt: skip
    table.add_row("speed", f"{reply['tokens_per_s']} tokens/s over the last 10 s")
    console.print(table)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


if __name__ == "__main__":
    main()
