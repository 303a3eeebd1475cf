"""Computes: configuration, loading, layers, MLA, MoE, KV cache, runner, worker process."""
