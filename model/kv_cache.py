"""The paged latent KV cache: one entry of kv_lora_rank + qk_rope_head_dim per token and layer."""

import psutil
import torch
from torch import Tensor

from ..kernels.latent import entry_bytes, latent_cache
from .config import ModelConfig

CPU_SHARE = 0.25
"""Of the available memory, where nobody named a size."""


class KVCache:
    """`layers[i]`: [num_blocks, block_size, ...], as `kernels.latent` lays it out. Block 0 is the
    null block: padding is written there and nothing is read from it."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_layers: int,
    ) -> None:
        """dtype: of the entries; float8_e4m3fn quantises the latents. num_layers: those of the
        rank's stage; the MTP layer's is the last, if there is one."""
        widths = config.kv_lora_rank, config.qk_rope_head_dim
        self.layers: list[Tensor] = [
            latent_cache(num_blocks, block_size, *widths, dtype, device) for _ in range(num_layers)
        ]
        self.num_blocks = num_blocks
        self.block_size = block_size


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, num_layers: int) -> int:
    """Bytes of one block over all layers."""
    entry = entry_bytes(config.kv_lora_rank, config.qk_rope_head_dim, dtype)
    return num_layers * block_size * entry


def cpu_budget() -> int:
    """Bytes of a CPU's memory to hold, where nobody named a size."""
    return int(psutil.virtual_memory().available * CPU_SHARE)


def useful_blocks(max_batch_size: int, max_seq_len: int, block_size: int) -> int:
    """What a full batch of full sequences needs, the null block included."""
    return 1 + max_batch_size * -(-max_seq_len // block_size)
