"""The paged latent KV cache: one entry of kv_lora_rank + qk_rope_head_dim per token and layer."""

import psutil
import torch
from torch import Tensor

from .config import ModelConfig

CPU_SHARE = 0.25
"""Of the available memory, where nobody named a size."""


class KVCache:
    """`layers[i]`: [num_blocks, block_size, latent_dim]. Block 0 is the null block: padding is
    written there and nothing is read from it."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, config.latent_dim)
        self.layers: list[Tensor] = [
            torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.num_blocks = num_blocks
        self.block_size = block_size


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return config.num_hidden_layers * block_size * config.latent_dim * dtype.itemsize


def choose_num_blocks(
    config: ModelConfig,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_batch_size: int,
    max_seq_len: int,
    kv_cache_gb: float,
    free_fraction: float,
) -> int:
    """How many blocks to hold, the null block included: what the named size or the free memory
    gives, but no more than a full batch of full sequences needs."""
    per_block = block_bytes(config, block_size, dtype)
    if kv_cache_gb > 0:
        budget = kv_cache_gb * 1e9
    elif device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] * free_fraction
    else:
        budget = psutil.virtual_memory().available * CPU_SHARE
    useful = 1 + max_batch_size * -(-max_seq_len // block_size)
    return max(2, min(int(budget // per_block), useful))
