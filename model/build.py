"""Everything between Load and Ready: from a checkpoint to a runner that takes steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from ..ipc.messages import Load, Ready
from ..kernels.compilations import compilations
from ..kernels.mla import MAX_QUERY_LEN
from . import graphs, host_blocks, kv_cache, loader, memory
from .config import CheckpointError, ModelConfig
from .deepseek import DeepseekV3
from .host_blocks import HostBlocks
from .kv_cache import KVCache
from .layers import Arithmetic
from .mtp import MTP
from .numerics import Numerics
from .parallel import Layout
from .rehearsal import Rehearsal
from .relaxed import Relaxed, read_think_ids
from .rows import Rows
from .runner import Runner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.bfloat16}

Report = Callable[[str, int, int], None]
"""Stage, how much of it is done, of how much."""


class Limits(NamedTuple):
    """What steps may ask for."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int


def build(load: Load, report: Report) -> tuple[Runner, Ready]:
    """Loads, measures, takes memory, captures. Raises CheckpointError."""
    layout = _layout(load)
    model_dir = Path(load.model_dir)
    config = ModelConfig.load(model_dir)
    device = _device(load.device)
    dtype = DTYPES[config.dtype if load.dtype == "auto" else load.dtype]
    limits = _limits(load, config, device)
    mtp, relaxed = _drafts(load, config), _relaxed(load)
    act_quant = load.act_quant == "fp8" or (load.act_quant == "auto" and device.type == "cuda")
    if load.load_format == "dummy":
        weights = loader.dummy(config, layout, dtype, device, mtp=mtp)
    else:
        done = lambda done, total: report("loading", done, total)  # noqa: E731
        weights = loader.load(config, model_dir, dtype, device, done, layout, mtp)
    config = layout.local(config)
    report("building", 0, 0)
    numerics = Numerics() if load.check_numerics else None
    arithmetic = Arithmetic(dtype, act_quant and config.fp8, config.ue8m0, load.fp8_gemm == "torch")
    longest = limits.max_seq_len + _room(load)
    model = DeepseekV3(config, weights, arithmetic, longest, numerics, layout)
    drafts = MTP(config, weights, arithmetic, model, layout) if mtp else None
    num_parameters = sum(w.numel() for n, w in weights.items() if not n.endswith(".scale"))
    weight_bytes = sum(weight.nbytes for weight in weights.values())
    del weights  # the model holds what it needs
    rows = Rows(
        limits.max_batch_size, longest, load.block_size, config.vocab_size, device, load.num_nextn,
        relaxed,
    )  # fmt: skip
    notes = _notes(config, load, act_quant, device)
    if device.type == "cuda":
        runner = Runner(model, _blocks(load, model, 2, device), rows, drafts)
        _set_up_on_gpu(runner, load, limits, report, notes)
    else:
        budget = load.kv_cache_gb * 1e9 or kv_cache.cpu_budget()
        runner = Runner(model, _cache(load, model, limits, int(budget), device), rows, drafts)
    if load.kv_host_cache_gb:
        runner.host = _host_blocks(load, runner.cache, report, notes)
    ready = Ready(
        epoch=load.epoch,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        max_seq_len=limits.max_seq_len,
        num_blocks=runner.cache.num_blocks,
        block_size=load.block_size,
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        notes=tuple(notes),
        graph_batch_sizes=runner.graphs.sizes,
        num_nextn=load.num_nextn,
        num_host_blocks=0 if runner.host is None else runner.host.num_slots,
    )
    return runner, ready


def _set_up_on_gpu(
    runner: Runner, load: Load, limits: Limits, report: Report, notes: list[str]
) -> None:
    """Rehearses on the runner's KV cache of two blocks, takes what is left for the real one,
    captures; where that leaves too little, once more with a smaller cache."""
    device, model, started = runner.device, runner.model, time.monotonic()
    runner.share_logits()
    rehearsal = Rehearsal(runner, limits.max_num_tokens, limits.max_seq_len)
    rehearsal.all_sizes(lambda done, total: report("compiling", done, total))
    sizes = _graph_sizes(load, limits.max_batch_size)
    pass_bytes = memory.peak_of(device, rehearsal.largest_passes)
    staging_bytes = _staging_bytes(load, model)
    graph_bytes = memory.peak_of(device, rehearsal.largest_decode) if sizes else 0
    drafts = graphs.drafts_of(load.num_nextn)
    num_graphs = len(sizes) * len(drafts)
    passes = sum(len(model.layers) + num_drafts for _, num_drafts in drafts)
    graph_bytes += len(sizes) * passes * memory.GRAPH_BYTES_PER_LAYER
    budget = int(load.kv_cache_gb * 1e9) or memory.kv_budget(
        device, pass_bytes + staging_bytes + graph_bytes, load.kv_cache_free_gpu_memory_fraction
    )
    warmed = time.monotonic()
    for _ in range(2):
        runner.cache = _cache(load, model, limits, budget, device)
        try:
            runner.graphs.capture(sizes, drafts, lambda *done: report("capturing", *done))
            missing = memory.missing(device, pass_bytes + staging_bytes)
        except torch.OutOfMemoryError:
            missing = pass_bytes + staging_bytes + graph_bytes
        if missing <= 0 or load.kv_cache_gb:
            break
        runner.graphs.drop()
        runner.cache = _blocks(load, model, 2, device)
        budget -= missing + memory.SPARE_BYTES
    if missing > 0:
        raise RuntimeError(
            f"the largest steps need {pass_bytes / 1e9:.1f} GB beside weights and KV cache, "
            f"{missing / 1e9:.1f} GB more than there are"
        )
    runner.largest_step_bytes = pass_bytes + staging_bytes
    captured = time.monotonic()
    compiled, loaded = compilations()
    notes.append(
        f"{compiled} kernels were compiled and {loaded} loaded, and the largest steps seen to take "
        f"{pass_bytes / 1e9:.2f} GB, in {warmed - started:.1f} s; {num_graphs} CUDA graphs were "
        f"captured in {captured - warmed:.1f} s"
    )


def _cache(
    load: Load, model: DeepseekV3, limits: Limits, budget: int, device: torch.device
) -> KVCache:
    """What the budget gives, but no more than a full batch of full sequences needs."""
    per_block = _block_bytes(load, model)
    longest = limits.max_seq_len + _room(load)
    useful = kv_cache.useful_blocks(limits.max_batch_size, longest, load.block_size)
    num_blocks = min(budget // per_block, useful)
    if num_blocks < 2 and not load.kv_cache_gb:
        raise RuntimeError(f"{budget / 1e9:.2f} GB are left for the KV cache")
    return _blocks(load, model, max(2, num_blocks), device)


def _blocks(load: Load, model: DeepseekV3, num_blocks: int, device: torch.device) -> KVCache:
    dtype, num_layers = _kv_dtype(load, model), _num_kv_layers(load, model)
    return KVCache(model.config, num_blocks, load.block_size, dtype, device, num_layers)


def _block_bytes(load: Load, model: DeepseekV3) -> int:
    dtype, num_layers = _kv_dtype(load, model), _num_kv_layers(load, model)
    return kv_cache.block_bytes(model.config, load.block_size, dtype, num_layers)


def _num_kv_layers(load: Load, model: DeepseekV3) -> int:
    return len(model.layers) + (load.num_nextn > 0)


def _kv_dtype(load: Load, model: DeepseekV3) -> torch.dtype:
    fp8 = load.kv_cache_dtype == "fp8" or model.config.kv_cache_fp8
    return torch.float8_e4m3fn if fp8 else model.dtype


def _staging_bytes(load: Load, model: DeepseekV3) -> int:
    """That copies to and from the host take of the device's memory."""
    if not load.kv_host_cache_gb:
        return 0
    return host_blocks.STAGED_BLOCKS * _block_bytes(load, model)


def _host_blocks(load: Load, cache: KVCache, report: Report, notes: list[str]) -> HostBlocks:
    """As many slots as fit the configured size; taken last, because pinning takes long."""
    started = time.monotonic()
    block_bytes = sum(layer[0].nbytes for layer in cache.layers)
    num_slots = int(load.kv_host_cache_gb * 1e9 / block_bytes)
    available = psutil.virtual_memory().available
    if num_slots < 1 or num_slots * block_bytes > available:
        raise RuntimeError(
            f"kv_host_cache_gb is {load.kv_host_cache_gb}, but a KV block has "
            f"{block_bytes / 1e6:.3f} MB, and {available / 1e9:.1f} GB of host memory are free"
        )
    host = HostBlocks(cache.layers, num_slots, lambda done, total: report("pinning", done, total))
    notes.append(
        f"host memory keeps {num_slots} KV blocks that the cache of {cache.num_blocks} has no room "
        f"for; it was taken in {time.monotonic() - started:.1f} s"
    )
    return host


def _graph_sizes(load: Load, max_batch_size: int) -> list[int]:
    if not load.use_cuda_graph or load.check_numerics:
        return []
    named = [size for size in load.cuda_graph_batch_sizes if size <= max_batch_size]
    return sorted(named) or graphs.default_sizes(max_batch_size)


def _layout(load: Load) -> Layout:
    """Of more than one rank, one's share runs alone, without its exchanges: for measurements."""
    if load.num_nextn and load.pp_size > 1:
        raise CheckpointError(
            f"num_nextn {load.num_nextn}, pp_size {load.pp_size}: this version drafts in one stage"
        )
    return Layout(
        tp_size=load.tp_size,
        tp_rank=load.tp_rank,
        ep_size=load.ep_size,
        pp_size=load.pp_size,
        pp_rank=load.pp_rank,
        attention_dp=load.attention_dp,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CheckpointError("device cuda was asked for, but this machine has no usable GPU")
    return torch.device(name)


def _limits(load: Load, config: ModelConfig, device: torch.device) -> Limits:
    """Chosen for the device where nobody named them."""
    max_seq_len = load.max_seq_len or config.max_position_embeddings
    if max_seq_len > config.max_position_embeddings:
        raise CheckpointError(
            f"max_seq_len {max_seq_len} is more than the checkpoint's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    batch_size, num_tokens = (256, 8192) if device.type == "cuda" else (32, 512)
    batch_size = load.max_batch_size or min(batch_size, load.max_num_tokens or batch_size)
    return Limits(batch_size, load.max_num_tokens or max(num_tokens, batch_size), max_seq_len)


def _drafts(load: Load, config: ModelConfig) -> bool:
    """Whether there is drafting. Raises CheckpointError where the model or we cannot."""
    if load.num_nextn and not config.num_nextn_predict_layers:
        raise CheckpointError(
            f"num_nextn {load.num_nextn}: {Path(load.model_dir) / 'config.json'} has "
            f"num_nextn_predict_layers {config.num_nextn_predict_layers}, and so no layer that "
            "drafts"
        )
    if not 0 <= load.num_nextn < MAX_QUERY_LEN:
        raise CheckpointError(
            f"num_nextn {load.num_nextn} is not between 0 and {MAX_QUERY_LEN - 1}"
        )
    return load.num_nextn > 0


def _relaxed(load: Load) -> Relaxed | None:
    """Raises CheckpointError where the tokenizer has no token for <think>."""
    if not (load.relaxed_topk and load.num_nextn):
        return None
    think_ids = read_think_ids(Path(load.model_dir))
    return Relaxed(load.relaxed_topk, load.relaxed_delta, think_ids)


def _room(load: Load) -> int:
    """Positions behind max_seq_len: a row runs over its end by what the steps in flight accept,
    and drafts beyond that."""
    pipeline_depth = load.pp_size + 1
    return (pipeline_depth + 1) * (load.num_nextn + 1) if load.num_nextn else 0


def _notes(config: ModelConfig, load: Load, act_quant: bool, device: torch.device) -> list[str]:
    notes = []
    if load.load_format == "dummy":
        notes.append("load_format is dummy: the weights are random, and so are the answers")
    if load.tp_size * load.pp_size > 1:
        notes.append(
            f"rank {load.tp_rank} of {load.tp_size} in stage {load.pp_rank} of {load.pp_size} runs "
            "alone, its exchanges left out"
        )
    if config.fp8:
        notes.append(
            "activations are quantised 1x128 and multiplied in fp8"
            if act_quant
            else "fp8 weights are dequantised as they are used"
        )
    if load.kv_cache_dtype == "fp8" or config.kv_cache_fp8:
        asks = "" if load.kv_cache_dtype == "fp8" else ", as hf_quant_config.json asks"
        notes.append(f"latents in the KV cache are quantised to fp8, a scale for each token{asks}")
    if load.num_nextn:
        notes.append(f"the MTP layer drafts up to {load.num_nextn} tokens a step")
        if load.relaxed_topk:
            notes.append(
                f"inside <think> drafts among the {load.relaxed_topk} best tokens are accepted, if "
                f"no more than {load.relaxed_delta} less likely than the best: thoughts change"
            )
    elif config.num_nextn_predict_layers:
        notes.append("num_nextn is 0: the MTP layer of the checkpoint is not used")
    if load.check_numerics:
        notes.append("every pass is checked for NaN: steps are eager and wait for the device")
    if device.type == "cpu":
        notes.append(f"the model runs on {torch.get_num_threads()} CPU threads")
    return notes
