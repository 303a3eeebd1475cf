"""The configurations of random checkpoints, and what the command writes."""

import math
from pathlib import Path

from click.testing import CliRunner

from dsd.model import checkpoint
from dsd.model.config import ModelConfig
from dsd.tools.make_checkpoint import V3, main, write_config


def test_v3_has_the_published_number_of_parameters(tmp_path: Path) -> None:
    config = write_config(tmp_path, V3)
    specs = checkpoint.targets(config).values()
    total = sum(math.prod(spec.shape) for spec in specs if spec.kind != "scale")
    assert round(total / 1e9) == 671


def test_config_only_and_layers_write_a_cut_configuration_and_a_tokenizer(tmp_path: Path) -> None:
    directory = tmp_path / "v3-6"
    arguments = [str(directory), "--v3", "--layers", "6", "--config-only"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    names = {path.name for path in directory.iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    config = ModelConfig.load(directory)
    kinds = [config.is_moe(layer) for layer in range(config.num_hidden_layers)]
    assert kinds == [False, False, False, True, True, True]
    assert (config.hidden_size, config.n_routed_experts, config.fp8) == (7168, 256, True)


def test_layers_cut_the_weights_too(tmp_path: Path) -> None:
    directory = tmp_path / "small-1"
    result = CliRunner().invoke(main, [str(directory), "--layers", "1"])
    assert result.exit_code == 0, result.output
    index = (directory / "model.safetensors.index.json").read_text()
    assert "model.layers.0." in index and "model.layers.1." not in index
