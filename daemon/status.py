"""What `dsctl status` shows."""

import time
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..ipc.messages import Progress
from .drafting import DraftStats

if TYPE_CHECKING:
    from .node import Node


def describe_progress(progress: Progress) -> str:
    """One line for a person, and for systemd's STATUS."""
    if not progress.total:
        return f"{progress.stage} the model"
    if progress.stage == "loading":
        percent = 100 * progress.done // progress.total
        return f"loading weights: {percent} % of {progress.total / 1e9:.2f} GB"
    if progress.stage == "pinning":
        return f"pinning host memory: {progress.done / 1e9:.0f} of {progress.total / 1e9:.0f} GB"
    what = {"compiling": "kernels, pass", "capturing": "CUDA graphs,"}[progress.stage]
    return f"{progress.stage} {what} {progress.done} of {progress.total}"


def is_news(old: Progress | None, new: Progress) -> bool:
    """Whether a log should have a line for it: a new stage, or another quarter of it."""
    if old is None or old.stage != new.stage or not new.total:
        return True
    return 4 * old.done // new.total != 4 * new.done // new.total


def report(node: "Node") -> dict[str, Any]:
    """Model, state, ranks, requests, KV use, tokens/s."""
    engine, ready = node.engine, node.engine.ready
    _, state = node.health()
    fields: dict[str, Any] = {
        "version": __version__,
        "model": node.info.name,
        "model_dir": str(node.info.model_dir),
        "names": list(node.info.names),
        "state": state,
        "uptime_s": round(time.time() - node.started_at, 1),
        "listening": node.addresses(),
        "rebuilds": node.supervisor.rebuilds,
        "requests": _requests(node),
        "tokens_per_s": round(engine.tokens_per_s(), 1),
    }
    if ready is None and node.progress is not None:
        fields["progress"] = describe_progress(node.progress)
    rank: dict[str, Any] = {"rank": 0, "pid": node.supervisor.worker_pid, "state": "loading"}
    if ready is not None:
        rank |= {
            "state": "ready",
            "device": ready.device,
            "dtype": ready.dtype,
            "epoch": ready.epoch,
            "num_parameters": ready.num_parameters,
            "weight_bytes": ready.weight_bytes,
        }
        fields["limits"] = {
            "max_batch_size": ready.max_batch_size,
            "max_num_tokens": ready.max_num_tokens,
            "max_seq_len": ready.max_seq_len,
            "max_itl_ms": engine.max_itl_ms,
        }
    fields["ranks"] = [rank]
    if (stats := engine.stats()) is not None:
        fields["kv_cache"] = {
            "num_blocks": stats.num_blocks,
            "held": stats.num_held_blocks,
            "cached": stats.num_cached_blocks,
            "free": stats.num_free_blocks,
            "usage": round(stats.num_held_blocks / stats.num_blocks, 4),
        }
    if stats is not None and (host := stats.host) is not None:
        fields["kv_host_cache"] = {
            "num_blocks": host.num_blocks,
            "used": host.num_used_blocks,
            "offloaded": host.num_offloaded_blocks,
            "restored": host.num_restored_blocks,
            "restored_tokens": host.num_restored_tokens,
        }
    if stats is not None and stats.drafts is not None:
        fields["mtp"] = _drafts(stats.drafts)
    return fields


def _drafts(drafts: DraftStats) -> dict[str, Any]:
    counts = zip(drafts.num_accepted, drafts.num_verified, strict=True)
    return {
        "num_nextn": drafts.num_nextn,
        "draft_length": drafts.length,
        "why": str(drafts.why),
        "acceptance": [round(accepted / max(verified, 1), 4) for accepted, verified in counts],
        "mean_accepted_length": round(drafts.mean_accepted_length, 3),
    }


def _requests(node: "Node") -> dict[str, Any]:
    stats, counters = node.engine.stats(), node.engine.counters
    return {
        "running": 0 if stats is None else stats.num_running,
        "waiting": 0 if stats is None else stats.num_waiting,
        "accepted": counters.requests,
        "refused": counters.refused,
        "finished": dict(counters.finished),
        "preemptions": 0 if stats is None else stats.num_preemptions,
    }
