"""The node: start, run, drain, stop. One TaskGroup owns every task of the daemon.

bind sockets -> engine, supervisor, control, HTTP run -> signal -> drain -> stop
`- /livez answers from here on        `- /readyz when the worker and the tokenizer are there
"""

import asyncio
import contextlib
import gc
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from ..ipc.messages import Load, Progress
from . import config as configuration
from . import listen, logs, status
from .api import app
from .api.openai import OpenAI
from .api.protocol import Protocol
from .config import Config, Overrides
from .control import CommandFailed, Control
from .engine import Engine, EngineState
from .metrics import Metrics
from .model_info import ModelInfo
from .notify import Notifier
from .supervisor import WORKER_COMMAND, Supervisor, prepare_runtime_dir
from .template import TemplateRenderer

log = logs.get("node")

KEEP_ALIVE_S = 75
SHUTDOWN_TIMEOUT_S = 1
"""For aborted requests to end, and again for their connections: all of a stop, the worker's end
included, takes at most five seconds more than the drain."""
SWITCH_INTERVAL_S = 0.0005
"""A busy Python thread otherwise holds the loop up for 5 ms at a time."""
GC_THRESHOLDS = (50_000, 20, 50)
"""A large body is many objects at once; the default of 700 looks at them again and again."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: the node owns signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class Node:
    """One daemon, from its sockets to its exit."""

    def __init__(
        self,
        config: Config,
        config_path: Path | None = None,
        overrides: Overrides | None = None,
        worker_command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.config = config
        self.started_at = time.time()
        self._config_path = config_path
        self._overrides = overrides or {}
        self.info = ModelInfo(
            configuration.model_dir(config.model), config.server.served_model_name
        )
        self.progress: Progress | None = None
        self._notifier = Notifier(configuration.notify_socket())
        self._renderer: TemplateRenderer | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._is_up = asyncio.Event()
        self._is_loading = asyncio.Event()
        self._runtime_dir = configuration.runtime_dir(config.server)
        self.port = config.server.port
        """The one that is listened on; known when `run` has bound it."""
        self.supervisor = Supervisor(
            self._load_message, self._runtime_dir, self._on_progress, worker_command
        )
        self.engine = Engine(config.engine, config.server.max_queued_requests, self.supervisor.send)

    # ---- life ----

    async def run(self) -> None:
        """Everything, until a signal ends it. Raises ListenError, TokenizerError, TemplateError,
        WorkerFailed."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        try:
            listeners, control = self._listen()
        except listen.ListenError as error:
            self._notifier.status(str(error))
            raise
        try:
            self._catch_signals()
            server = self._server()
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(server.serve(sockets=listeners))
                tasks = [
                    group.create_task(self.engine.run()),
                    group.create_task(self.supervisor.run(self.engine)),
                    group.create_task(Control(control, self._commands()).run()),
                    group.create_task(self._bring_up()),
                ]
                await self._stop.wait()
                await self._drain(server)
                server.should_exit = True
                await serving
                for task in tasks:
                    task.cancel()
        except ExceptionGroup as group:
            # While systemd waits to start it again, `systemctl status` shows this, and no log.
            self._notifier.status(str(group.exceptions[0]))
            raise
        finally:
            await self._close()

    @contextlib.asynccontextmanager
    async def model_only(self) -> AsyncIterator[None]:
        """Engine and worker without sockets, for as long as the block runs."""
        prepare_runtime_dir(self._runtime_dir)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.engine.run()),
                    group.create_task(self.supervisor.run(self.engine)),
                ]
                await asyncio.to_thread(self.info.read)
                await self.engine.wait_ready()
                yield
                for task in tasks:
                    task.cancel()
        finally:
            self.info.close()

    def stop(self, hurry: bool = False) -> None:
        """Drain and end, as SIGTERM does; with `hurry`, as a second one does."""
        if hurry:
            self._hurry.set()
        self._stop.set()

    async def wait_stop(self) -> None:
        """Until the daemon has been told to end."""
        await self._stop.wait()

    async def wait_ready(self) -> None:
        """Until a request would be served."""
        await self._is_up.wait()

    async def _close(self) -> None:
        if self._renderer is not None:
            await self._renderer.stop()
        self.info.close()
        self._notifier.close()
        log.info("stopped")
        for path in (
            configuration.api_socket(self.config.server),
            configuration.control_socket(self.config.server),
        ):
            path.unlink(missing_ok=True)

    async def _drain(self, server: Server) -> None:
        """Until the last answer is out, the deadline passes, or a second signal comes."""
        deadline = time.monotonic() + self.config.server.drain_timeout_s
        timeout_s = self.config.server.drain_timeout_s
        self.engine.start_drain()
        self._notifier.stopping("draining")
        stats = self.engine.stats()
        live = 0 if stats is None else stats.num_running + stats.num_waiting
        hint = "a second signal stops at once"
        log.info("draining", live_requests=live, timeout_s=timeout_s, hint=hint)
        idle = asyncio.ensure_future(self.engine.wait_idle())
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            await asyncio.wait(
                {idle, hurry}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not idle.done():
                log.warning("not waiting any longer; live requests are aborted")
                self.engine.abort_all("the daemon is stopping")
                await asyncio.wait({idle}, timeout=SHUTDOWN_TIMEOUT_S)
            # The engine is idle before the last answers are written; uvicorn has no event for that.
            while (  # noqa: ASYNC110
                server.server_state.tasks and time.monotonic() < deadline and not hurry.done()
            ):
                await asyncio.sleep(0.02)
        finally:
            for task in (idle, hurry):
                task.cancel()
            await asyncio.gather(idle, hurry, return_exceptions=True)

    def _listen(self) -> tuple[list[socket.socket], socket.socket]:
        server = self.config.server
        try:
            prepare_runtime_dir(self._runtime_dir)
        except OSError as error:
            raise listen.ListenError(
                f"the runtime directory {self._runtime_dir} cannot be used: {error.strerror}"
            ) from error
        tcp = listen.tcp(server.host, server.port)
        self.port = tcp.getsockname()[1]
        control = listen.unix(configuration.control_socket(server), 0o600)
        try:
            api = listen.unix(configuration.api_socket(server), 0o660)
        except listen.ListenError:
            configuration.control_socket(server).unlink()
            raise
        for stale in self._runtime_dir.glob("worker-*.sock"):
            stale.unlink()  # of a daemon that was killed: control.sock is ours, so it is gone
        return [tcp, api], control

    def addresses(self) -> list[str]:
        """Where the HTTP API is."""
        return [self.url, f"unix:{configuration.api_socket(self.config.server)}"]

    @property
    def url(self) -> str:
        host = self.config.server.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("second signal: not waiting for requests", signal=number.name)
            self._hurry.set()
        self._stop.set()

    def _server(self) -> Server:
        openai = OpenAI(
            self.info,
            self.engine,
            lambda: self._renderer,
            metrics := Metrics(
                self.engine, lambda: self.supervisor.rebuilds, lambda: self.health()[0]
            ),
        )
        settings = uvicorn.Config(
            app.build(openai, metrics, self.health),
            http=Protocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=app.MAX_HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        )
        return Server(settings)

    # ---- the model ----

    async def _bring_up(self) -> None:
        """The daemon's own part of loading (tokenizer, chat template), then the worker's; then
        says so again after each rebuild."""
        await asyncio.to_thread(self.info.read)
        tokenizer = self.info.tokenizer
        if tokenizer is not None and tokenizer.chat_template:
            renderer = TemplateRenderer(tokenizer.chat_template, tokenizer.special_tokens)
            self._renderer = renderer  # first, so that it is stopped if this is cancelled
            await renderer.start()
        self.info.is_loaded = True
        await self.engine.wait_ready()
        self._is_up.set()
        if not self._stop.is_set():
            self._announce()
        while True:
            self._say_serving()
            self._is_loading.clear()
            await self._is_loading.wait()
            await self.engine.wait_ready()
            log.info("ready again", epoch=self.engine.ready.epoch if self.engine.ready else None)

    def _load_message(self, epoch: int) -> Load:
        model, engine, parallel = self.config.model, self.config.engine, self.config.parallel
        return Load(
            epoch=epoch,
            model_dir=str(self.info.model_dir),
            device=model.device,
            dtype=model.dtype,
            act_quant=model.act_quant,
            max_batch_size=engine.max_batch_size,
            max_num_tokens=engine.max_num_tokens,
            max_seq_len=model.max_seq_len,
            block_size=engine.block_size,
            kv_cache_gb=engine.kv_cache_gb,
            kv_cache_free_gpu_memory_fraction=engine.kv_cache_free_gpu_memory_fraction,
            load_format=model.load_format,
            use_cuda_graph=engine.use_cuda_graph,
            cuda_graph_batch_sizes=engine.cuda_graph_batch_sizes,
            tp_size=parallel.tp_size,
            ep_size=parallel.ep_size,
            pp_size=parallel.pp_size,
            attention_dp=parallel.enable_attention_dp,
            kv_cache_dtype=engine.kv_cache_dtype,
            check_numerics=engine.check_numerics,
            fp8_gemm=engine.fp8_gemm,
            num_nextn=engine.num_nextn,
            kv_host_cache_gb=engine.kv_host_cache_gb,
            relaxed_topk=engine.relaxed_topk,
            relaxed_delta=engine.relaxed_delta,
        )

    def _on_progress(self, progress: Progress) -> None:
        if status.is_news(self.progress, progress):
            log.info(status.describe_progress(progress))
        self.progress = progress
        self._is_loading.set()
        self._notifier.status(status.describe_progress(progress))
        # The first progress means that the checkpoint's headers have been checked.
        self._notifier.ready()

    def _announce(self) -> None:
        """Says that the daemon serves, where, and what it picked."""
        ready, server = self.engine.ready, self.config.server
        assert ready is not None
        for note in ready.notes:
            log.info(note)
        if ready.num_nextn != (wanted := self.config.engine.num_nextn):
            log.warning("the worker drafts another number of tokens than it was asked to",
                        num_nextn=ready.num_nextn, wanted=wanted)  # fmt: skip
        log.info(
            "ready",
            model=self.info.name,
            url=self.url,
            uds=str(configuration.api_socket(server)),
            device=ready.device,
            dtype=ready.dtype,
            max_batch_size=ready.max_batch_size,
            max_num_tokens=ready.max_num_tokens,
            max_seq_len=ready.max_seq_len,
            kv_cache_tokens=(ready.num_blocks - 1) * ready.block_size,
            kv_host_cache_tokens=ready.num_host_blocks * ready.block_size,
            seconds=round(time.time() - self.started_at, 1),
        )

    def _say_serving(self) -> None:
        """To the service manager, unless there is something else to say."""
        if self.engine.ready is not None and not self._stop.is_set():
            self._notifier.ready()
            self._notifier.status(f"serving {self.info.name} on {self.engine.ready.device}")

    def health(self) -> tuple[bool, str]:
        """Whether a request would be served now, and the state in a word."""
        state = self.engine.state
        if state is EngineState.READY and not self.info.is_loaded:
            return False, EngineState.LOADING.value
        return state is EngineState.READY, state.value

    # ---- what dsctl asks ----

    def _commands(self) -> dict[str, Any]:
        return {
            "status": self._status,
            "drain": self._start_drain,
            "resume": self._resume,
            "reload": self._reload,
        }

    async def _status(self) -> dict[str, Any]:
        return status.report(self)

    async def _start_drain(self) -> dict[str, Any]:
        self.engine.start_drain()
        log.info("draining", by="dsctl")
        return status.report(self)

    async def _resume(self) -> dict[str, Any]:
        if self._stop.is_set():
            raise CommandFailed("the daemon is stopping; it cannot resume")
        self.engine.resume()
        log.info("resumed", by="dsctl")
        return status.report(self)

    async def _reload(self) -> dict[str, Any]:
        """Reads the file again. What cannot change in place is named and stays as it was; a file
        that cannot be used changes nothing."""
        try:
            new = configuration.load(self._config_path, self._overrides)
        except configuration.ConfigError as error:
            raise CommandFailed(f"nothing was changed: {error}") from error
        differing = configuration.changes(self.config, new)
        applied = [key for key in differing if key in configuration.RELOADABLE]
        refused = [key for key in differing if key not in configuration.RELOADABLE]
        for section, key in applied:
            table = msgspec.structs.replace(
                getattr(self.config, section), **{key: getattr(getattr(new, section), key)}
            )
            self.config = msgspec.structs.replace(self.config, **{section: table})
        self._apply()
        result = {
            "applied": [f"{section}.{key}" for section, key in applied],
            "refused": [f"{section}.{key}" for section, key in refused],
        }
        log.info("reloaded", **result)
        return result

    def _apply(self) -> None:
        self.info.rename(self.config.server.served_model_name)
        self.engine.max_queued_requests = self.config.server.max_queued_requests
        self.engine.print_iter_log = self.config.engine.print_iter_log
        self.engine.max_itl_ms = self.config.engine.max_itl_ms
        logs.configure(self.config.log)
        self._say_serving()
