"""Scheduler and runner in one process, without a daemon: for evaluations and tests of a model."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..daemon.request import Request
from ..daemon.scheduler import Scheduler
from ..ipc.messages import Load, LogprobEntry, Sampling
from ..model.build import build
from ..model.parallel import WHOLE, Layout
from ..model.runner import InFlight

GREEDY = Sampling(temperature=0.0)


class Answer(NamedTuple):
    token_ids: list[int]
    """The end token included."""
    logprobs: list[LogprobEntry]
    """One for each token, if the sampling asks."""


class LocalEngine:
    """A loaded model that turns lists of prompts into lists of answers."""

    def __init__(
        self,
        model_dir: Path,
        device: str = "auto",
        dtype: str = "auto",
        act_quant: str = "auto",
        max_batch_size: int = 64,
        max_num_tokens: int = 1024,
        max_seq_len: int = 0,
        kv_cache_gb: float = 0.5,
        load_format: str = "auto",
        use_cuda_graph: bool = True,
        cuda_graph_batch_sizes: tuple[int, ...] = (),
        kv_cache_dtype: str = "auto",
        layout: Layout = WHOLE,
        kv_host_cache_gb: float = 0.0,
        num_nextn: int = 0,
        relaxed_topk: int = 0,
        relaxed_delta: float = 0.6,
    ) -> None:
        load = Load(
            epoch=0,
            model_dir=str(model_dir),
            device=device,
            dtype=dtype,
            act_quant=act_quant,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_seq_len=max_seq_len,
            block_size=64,
            kv_cache_gb=kv_cache_gb,
            kv_cache_free_gpu_memory_fraction=0.9,
            load_format=load_format,
            use_cuda_graph=use_cuda_graph,
            cuda_graph_batch_sizes=cuda_graph_batch_sizes,
            tp_size=layout.tp_size,
            ep_size=layout.ep_size,
            pp_size=layout.pp_size,
            tp_rank=layout.tp_rank,
            pp_rank=layout.pp_rank,
            attention_dp=layout.attention_dp,
            kv_cache_dtype=kv_cache_dtype,
            kv_host_cache_gb=kv_host_cache_gb,
            num_nextn=num_nextn,
            relaxed_topk=relaxed_topk,
            relaxed_delta=relaxed_delta,
        )
        self.runner, self.ready = build(load, lambda stage, done, total: None)
        self.num_steps = 0

    def scheduler(self) -> Scheduler:
        """A scheduler for the runner, with two steps in flight."""
        ready = self.ready
        return Scheduler(
            max_batch_size=ready.max_batch_size,
            max_num_tokens=ready.max_num_tokens,
            max_seq_len=ready.max_seq_len,
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            pipeline_depth=2,
            graph_batch_sizes=ready.graph_batch_sizes,
            num_host_blocks=ready.num_host_blocks,
            num_nextn=ready.num_nextn,
        )

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        stop_token_ids: frozenset[int],
        sampling: Sampling = GREEDY,
        progress: Callable[[int], None] = lambda finished: None,
    ) -> list[Answer]:
        """One answer for each prompt."""
        scheduler = self.scheduler()
        requests = [
            Request(str(i), ids, sampling, max_tokens, stop_token_ids)
            for i, ids in enumerate(prompts)
        ]
        logprobs: dict[str, list[LogprobEntry]] = {}
        for request in requests:
            scheduler.add(request)
            logprobs[request.request_id] = []
        in_flight: deque[InFlight] = deque()
        while scheduler.has_work:
            while (step := scheduler.schedule()) is not None:
                in_flight.append(self.runner.launch(step))
            events = scheduler.update(self.runner.collect(in_flight.popleft()))
            self.num_steps += 1
            for event in events:
                if event.logprob is not None:
                    logprobs[event.request.request_id].append(event.logprob)
            if finished := sum(event.finish is not None for event in events):
                progress(finished)
        return [Answer(request.output_ids, logprobs[request.request_id]) for request in requests]
