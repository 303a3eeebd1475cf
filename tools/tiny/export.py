"""The trained network as a Hugging Face-style checkpoint, and back.

    python -m dsd.tools.tiny.export BF16_DIR FP8_DIR             quantise
    python -m dsd.tools.tiny.export FP8_DIR BF16_DIR --to-bf16   and back, for other readers

Names, MTP layer included, are those of the published checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import click
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.quant import dequantize_128x128, quantize_128x128
from ...model.config import ModelConfig
from .configuration import CONFIG, FP8
from .network import Network
from .text import make_tokenizer

SHARD_BYTES = 12_000_000
EXPERTS = ("gate_proj", "up_proj", "down_proj")
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
}


def published(network: Network) -> dict[str, Tensor]:
    """The network's tensors by their published names, bf16 (the gate's bias float32)."""
    tensors: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        value = value.detach().cpu()
        stem, _, last = name.rpartition(".")
        if stem.endswith("mlp.experts") and last in EXPERTS:
            for expert, weight in enumerate(value):
                tensors[f"{stem}.{expert}.{last}.weight"] = weight.bfloat16().contiguous()
        elif last == "e_score_correction_bias":
            tensors[name] = value.float()
        else:
            tensors[name] = value.bfloat16()
    mtp = f"model.layers.{network.config.num_hidden_layers}"
    tensors[f"{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{mtp}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def is_quantised(name: str, tensor: Tensor) -> bool:
    """Linear layers of attention and experts; the gate, eh_proj, embeddings and heads stay bf16."""
    kept = ("embed_tokens", "lm_head", "mlp.gate.", "eh_proj", "shared_head")
    return tensor.dim() == 2 and not any(part in name for part in kept)


def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Block-fp8, as published."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_quantised(name, tensor):
            result[name], result[f"{name}_scale_inv"] = quantize_128x128(tensor)
        else:
            result[name] = tensor
    return result


def dequantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block-fp8 export as bf16, for what reads no fp8."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        scale = tensors.get(f"{name}_scale_inv")
        plain = tensor if scale is None else dequantize_128x128(tensor, scale, torch.bfloat16)
        result[name] = plain
    return result


def write(directory: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """Shards, index, config, generation config and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in sorted(tensors.items()):
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", fields)
    _write_json(directory / "generation_config.json", GENERATION)
    make_tokenizer(directory, fields["vocab_size"])


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n")


def write_bf16(directory: Path, network: Network) -> None:
    write(directory, published(network), CONFIG)


def write_fp8(directory: Path, tensors: dict[str, Tensor]) -> None:
    write(directory, quantise(tensors), {**CONFIG, "quantization_config": FP8})


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of an export."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def read_state(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A bf16 export as the network's state."""
    tensors = read(directory)
    state = {}
    for name in Network(config).state_dict():
        stem, _, last = name.rpartition(".")
        if stem.endswith("mlp.experts") and last in EXPERTS:
            experts = range(config.n_routed_experts)
            state[name] = torch.stack(
                [tensors[f"{stem}.{i}.{last}.weight"] for i in experts]
            ).float()
        else:
            state[name] = tensors[name].float()
    return state


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to-bf16", is_flag=True, help="SOURCE is fp8; write bf16.")
def main(source: Path, target: Path, to_bf16: bool) -> None:
    """Write the export SOURCE as TARGET, in the other format."""
    if to_bf16:
        write(target, dequantise(read(source)), CONFIG)
    else:
        write_fp8(target, read(source))
    size = sum(file.stat().st_size for file in target.iterdir())
    click.echo(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
