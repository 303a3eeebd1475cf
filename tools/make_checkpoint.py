"""Makes a random checkpoint of the true architecture: small, or of DeepSeek-V3's real width.

    python -m dsd.tools.make_checkpoint DIR                      small, with a tokenizer of its own
    python -m dsd.tools.make_checkpoint DIR --wide --tokenizer DIR_OF_PUBLISHED_TOKENIZER
    python -m dsd.tools.make_checkpoint DIR --config config.json
    python -m dsd.tools.make_checkpoint DIR --v3 --layers 6 --config-only

The last one is for measurements with `--load-format dummy`: DeepSeek-V3's own configuration, cut to
three dense and three MoE layers, and no weights.

Weights are normal with variance 1 / fan-in, so that activations keep their size through the layers
and a random model still prefers some tokens over others. Linear layers are block-fp8, as published.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.quant import quantize_128x128
from ..model import checkpoint
from ..model.checkpoint import TensorSpec
from ..model.config import FP8_BLOCK, ModelConfig
from .make_tokenizer import write_tokenizer
from .tiny.configuration import CONFIG, FP8

SHARD_BYTES = 1 << 30
SLAB_ROWS = 8 * FP8_BLOCK
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SMALL: dict[str, Any] = {**CONFIG, "quantization_config": FP8, "num_nextn_predict_layers": 0}
"""The sizes of the model that comes with dsd: every mechanism is there, every size is small."""

V3: dict[str, Any] = {
    **SMALL,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "rope_scaling": {
        **CONFIG["rope_scaling"],
        "factor": 40,
        "original_max_position_embeddings": 4096,
    },
}
"""DeepSeek-V3 as published."""

WIDE: dict[str, Any] = {
    **V3,
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": SMALL["n_group"],
    "topk_group": SMALL["topk_group"],
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
"""DeepSeek-V3's real width with two layers and eight experts."""


def random_tensor(spec: TensorSpec, fp8: bool, generator: torch.Generator) -> dict[str, Tensor]:
    """One random weight, with its scales if it is a linear layer of an fp8 checkpoint."""
    if len(spec.shape) == 1:
        centre = 0.0 if spec.kind == "float32" else 1.0
        values = torch.randn(spec.shape, generator=generator) * 0.02 + centre
        return {spec.name: values if spec.kind == "float32" else values.bfloat16()}
    std = 1.0 if spec.target == "embed" else spec.shape[-1] ** -0.5
    rows, width = spec.shape
    quantised = spec.kind == "linear" and fp8
    weight = torch.empty(spec.shape, dtype=torch.float8_e4m3fn if quantised else torch.bfloat16)
    scale = torch.empty(checkpoint.scale_shape(spec.shape))
    for start in range(0, rows, SLAB_ROWS):  # float32 copies of a whole weight are large
        slab = torch.randn(min(SLAB_ROWS, rows - start), width, generator=generator) * std
        if quantised:
            slab, slab_scale = quantize_128x128(slab)
            scale[start // FP8_BLOCK :][: len(slab_scale)] = slab_scale
        weight[start : start + SLAB_ROWS] = slab
    if quantised:
        return {spec.name: weight, f"{spec.name}_scale_inv": scale}
    return {spec.name: weight}


def shards(config: ModelConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's tensors in groups of about SHARD_BYTES."""
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Tensor] = {}
    for spec in checkpoint.tensors(config, mtp=config.num_nextn_predict_layers > 0):
        if spec.kind == "scale":
            continue  # made with its weight
        shard.update(random_tensor(spec, config.fp8, generator))
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_config(directory: Path, fields: dict[str, Any]) -> ModelConfig:
    """config.json alone, which is all that dummy weights need. `directory` is made."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return ModelConfig.load(directory)


def write_checkpoint(directory: Path, fields: dict[str, Any], seed: int = 0) -> None:
    """config.json, the shards and their index. `directory` is made; existing files are replaced."""
    config = write_config(directory, fields)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards(config, seed), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        (directory / name).chmod(0o644)
        weight_map.update(dict.fromkeys(shard, name))
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--wide", is_flag=True, help="DeepSeek-V3's real width: two layers, eight experts.")
@click.option("--v3", is_flag=True, help="DeepSeek-V3 as published, all of it.")
@click.option("--config", "config_file", type=click.Path(path_type=Path, exists=True))
@click.option("--layers", type=click.IntRange(min=1), help="Only the first so many layers.")
@click.option("--config-only", is_flag=True, help="No weights: for `--load-format dummy`.")
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace what is in DIRECTORY.")
def main(
    directory: Path,
    wide: bool,
    v3: bool,
    config_file: Path | None,
    layers: int | None,
    config_only: bool,
    tokenizer: Path | None,
    seed: int,
    force: bool,
) -> None:
    """Write a random checkpoint to DIRECTORY."""
    if directory.exists() and any(directory.iterdir()) and not force:
        raise click.ClickException(f"{directory} is not empty; --force replaces what is in it")
    fields = V3 if v3 else WIDE if wide else SMALL
    if config_file is not None:
        fields = json.loads(config_file.read_text())
    if layers is not None:
        fields = {**fields, "num_hidden_layers": layers}
    if config_only:
        write_config(directory, fields)
    else:
        write_checkpoint(directory, fields, seed)
    if tokenizer is None:
        write_tokenizer(directory, fields["vocab_size"])
    else:
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, directory / name)
    size = sum(file.stat().st_size for file in directory.iterdir())
    click.echo(f"{directory}: {size / 1e6:,.2f} MB")


if __name__ == "__main__":
    main()
