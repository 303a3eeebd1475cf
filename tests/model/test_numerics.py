"""The NaN guard names what went wrong first."""

import pytest
import torch

from dsd.ipc.messages import Sampling
from dsd.model.numerics import Numerics, NumericsError

GREEDY = Sampling(temperature=0.0)


def test_finish_names_the_first_bad_tensor_and_forgets_it() -> None:
    numerics = Numerics()
    x = torch.ones(3, 4)
    numerics.check("embed", x)
    x[1, 2] = float("nan")
    numerics.check("layers.0.self_attn", x)
    x[0, 0] = float("-inf")
    numerics.check("layers.0.mlp", x)
    with pytest.raises(NumericsError, match=r"layers\.0\.self_attn \[3, 4\]: 1 values"):
        numerics.finish()
    numerics.check("embed", torch.ones(1, 1))
    numerics.finish()


@pytest.mark.parametrize(
    ("place", "name"),
    [("attn.o", "layers.1.self_attn"), ("mlp.down", "layers.0.mlp"), ("attn.kv_b", "self_attn")],
)
def test_model_with_a_bad_weight_says_in_which_layer(
    make_checkpoint, make_case, open_runner, row_of, prompt_of, place: str, name: str
) -> None:
    runner = open_runner(make_checkpoint(make_case("v3_plain")).directory)
    runner.model.numerics = Numerics()
    row = row_of(runner)
    row.prefill(prompt_of(9), [9], GREEDY)  # all is well
    layer = runner.model.layers["layers.1" in name]
    part, linear = place.split(".")
    getattr(getattr(layer, part), linear).weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=name):
        row.prefill(prompt_of(9), [9], GREEDY)
