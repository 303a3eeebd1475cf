"""Reads a safetensors checkpoint into memory, checked before a byte of it is taken.

Three passes: `Index.read` maps names to files; `check` compares names, shapes and dtypes with
`checkpoint.tensors`; `load` allocates the targets and fills them from several threads. `dummy`
makes the same targets of random numbers, without any file.
"""

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import checkpoint
from .checkpoint import TargetSpec, TensorSpec
from .config import CheckpointError, ModelConfig
from .parallel import WHOLE, Layout

NUM_THREADS = 4
STAGING_BYTES = 256 * 1024 * 1024
"""Each thread reads at most so much of a tensor at once."""
FLOATS = {"F32", "BF16", "F16"}
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""config.json's name of a dtype -> safetensors'."""
DUMMY_SLAB = 1 << 24
"""Random float32 numbers that exist at once beside the weights that they become."""
SAFETENSORS_INDEX = "model.safetensors.index.json"

Progress = Callable[[int, int], None]
"""Bytes done, bytes in all."""


class Index:
    """Where each tensor of a checkpoint lies, and its shape and dtype as its file says."""

    def __init__(self, source: Path, files: dict[str, Path], stack: ExitStack) -> None:
        self.source = source
        """What said so: the index file, or the one model.safetensors."""
        self.files = files
        """Tensor name -> file."""
        self._handles: dict[Path, Any] = {}
        for path in sorted(set(files.values())):
            self._handles[path] = stack.enter_context(_open(path))

    @classmethod
    def read(cls, model_dir: Path, stack: ExitStack) -> "Index":
        """From the index file, or from the one model.safetensors. Raises CheckpointError."""
        path = model_dir / SAFETENSORS_INDEX
        if path.exists():
            return cls(path, _weight_map(path), stack)
        single = model_dir / "model.safetensors"
        if not single.exists():
            raise CheckpointError(
                f"{model_dir} holds neither {SAFETENSORS_INDEX} nor model.safetensors"
            )
        with _open(single) as handle:
            return cls(single, dict.fromkeys(handle.keys(), single), stack)

    def slice(self, name: str) -> Any:
        """safetensors' lazy view of one tensor. Raises CheckpointError."""
        path = self.files[name]
        try:
            return self._handles[path].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} does not hold {name}, which the index names") from error

    def strays(self) -> list[tuple[str, Path]]:
        """Tensors in the files that the index does not name."""
        return [
            (name, path)
            for path, handle in self._handles.items()
            for name in handle.keys()  # noqa: SIM118 -- not a dict
            if name not in self.files
        ]


def load(
    config: ModelConfig,
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    report: Progress,
    layout: Layout = WHOLE,
    mtp: bool = False,
) -> dict[str, Tensor]:
    """The rank's part of the weights of `model_dir`, by the target names of `checkpoint.targets`;
    `mtp`: those of the MTP layer too.

    fp8 weights stay e4m3 with float32 scales. Others keep their dtype, except that float32 ones are
    rounded to `dtype` if that is narrower. Raises CheckpointError before memory is taken for
    anything missing, left over, truncated or mis-shaped.
    """
    with ExitStack() as stack:
        index = Index.read(model_dir, stack)
        specs = list(checkpoint.tensors(config, layout, mtp))
        check(config, index, specs, mtp)
        wanted = checkpoint.targets(config, layout, mtp)
        weights = _allocate(wanted, index, specs, dtype, device)
        total = sum(weight.nbytes for weight in weights.values())
        done, lock = [0], threading.Lock()

        def fill(spec: TensorSpec) -> None:
            _fill(index, spec, weights[spec.target])
            with lock:
                done[0] += _place(spec, weights[spec.target]).nbytes
                report(done[0], total)

        with ThreadPoolExecutor(NUM_THREADS, "load") as pool:
            for _ in pool.map(fill, specs):
                pass
    return weights


def check(config: ModelConfig, index: Index, specs: list[TensorSpec], mtp: bool) -> None:
    """Compares what the files hold with what the model needs: names of the whole model, shapes and
    dtypes of `specs`. Raises CheckpointError."""
    names = [spec.name for spec in checkpoint.tensors(config, mtp=mtp)]
    expected = set(names)
    missing = [name for name in names if name not in index.files]
    if missing:
        raise CheckpointError(f"{index.source} lacks {missing[0]}{_and_others(missing)}")
    left_over = [
        (name, path)
        for name, path in [*index.files.items(), *index.strays()]
        if name not in expected and not checkpoint.is_ignored(config, name)
    ]
    if left_over:
        name, path = left_over[0]
        raise CheckpointError(f"{path}: {name} is left over{_and_others(left_over)}")
    for spec in specs:
        _check_tensor(index, spec, config.fp8)


def _check_tensor(index: Index, spec: TensorSpec, fp8: bool) -> None:
    view = index.slice(spec.name)
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    path = index.files[spec.name]
    if shape != spec.shape:
        raise CheckpointError(
            f"{path}: {spec.name} has shape {list(shape)}; config.json asks for {list(spec.shape)}"
        )
    wanted = {"F8_E4M3"} if fp8 and spec.kind == "linear" else FLOATS
    if dtype not in wanted:
        raise CheckpointError(f"{path}: {spec.name} is {dtype}, not {' or '.join(sorted(wanted))}")


def _allocate(
    wanted: dict[str, TargetSpec],
    index: Index,
    specs: list[TensorSpec],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    first = {spec.target: spec for spec in reversed(specs)}
    weights = {}
    for target, spec in wanted.items():
        stored = index.slice(first[target].name).get_dtype()
        weights[target] = _empty(spec, stored, dtype, device)
    return weights


def _empty(spec: TargetSpec, stored: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a target whose parts are `stored` in this safetensors dtype."""
    # float16 is served in bfloat16, but float32 activations get all of its bits.
    half = torch.float16 if dtype == torch.float32 else torch.bfloat16
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": half}
    if spec.kind in ("scale", "float32"):
        held = torch.float32
    elif stored == "F8_E4M3":
        held = torch.float8_e4m3fn
    else:
        held = dtype if names[stored].itemsize > dtype.itemsize else names[stored]
    return torch.empty(spec.shape, dtype=held, device=device)


def _place(spec: TensorSpec, target: Tensor) -> Tensor:
    place = target if spec.expert is None else target[spec.expert]
    return place[spec.row : spec.row + len(spec.part[0])]


def _fill(index: Index, spec: TensorSpec, target: Tensor) -> None:
    """Copies the rank's part of one tensor in slices of rows, so that staging memory stays
    bounded."""
    view, place = index.slice(spec.name), _place(spec, target)
    held, *others = spec.part
    columns = tuple(slice(other.start, other.stop) for other in others)
    row_bytes = max(1, place[:1].nbytes)
    rows = max(1, STAGING_BYTES // row_bytes)
    for start in range(0, len(held), rows):
        wanted = held[start : start + rows]
        place[start : start + rows].copy_(view[(slice(wanted.start, wanted.stop), *columns)])


def dummy(
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    mtp: bool = False,
) -> dict[str, Tensor]:
    """What `load` gives, of random numbers made on the device; for measurements.

    Activations keep their size, and the gate spreads tokens over all experts: e4m3 weights are
    N(0, 1) with scales 1 / sqrt(K), others N(0, 1 / K), the embedding N(0, 1), norms 1, the gate's
    bias 0. Values follow from the seed and from what is held, so on one kind of GPU all ranks have
    the same of what each of them holds.
    """
    generator = torch.Generator(device)
    specs = list(checkpoint.tensors(config, layout, mtp))
    first = {spec.target: spec for spec in reversed(specs)}
    weights = {}
    for target, spec in checkpoint.targets(config, layout, mtp).items():
        is_fp8 = config.fp8 and spec.kind == "linear"
        weight = _empty(spec, "F8_E4M3" if is_fp8 else STORED[config.dtype], dtype, device)
        source = first[target.removesuffix(".scale")]
        shrink = source.shape[-1] ** -0.5
        if spec.kind == "float32":
            weight.zero_()
        elif spec.kind == "scale":
            weight.fill_(shrink)
        elif len(spec.shape) == 1:
            weight.fill_(1.0)
        else:
            generator.manual_seed(_dummy_seed(seed, source))
            _fill_normal(weight, 1.0 if is_fp8 or target == "embed" else shrink, generator)
        weights[target] = weight
    return weights


def _dummy_seed(seed: int, source: TensorSpec) -> int:
    text = f"{seed} {source.name} {[held.start for held in source.part]}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _fill_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    flat = weight.view(-1)
    size = min(DUMMY_SLAB, flat.numel())
    noise = torch.empty(size, dtype=torch.float32, device=weight.device)
    for part in flat.split(size):
        part.copy_(noise[: part.numel()].normal_(0.0, std, generator=generator))


def _weight_map(path: Path) -> dict[str, Path]:
    try:
        fields = msgspec.json.decode(path.read_bytes())
        names = msgspec.convert(fields["weight_map"], dict[str, str])
    except (msgspec.MsgspecError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no weight_map of names to files: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    for file in set(names.values()):
        if Path(file).name != file or file in ("", "..") or "\0" in file:
            raise CheckpointError(f"{path} names the file {file!r} outside its own directory")
        if not os.path.exists(path.parent / file):  # unlike Path's, False for a name too long
            raise CheckpointError(f"{path.parent / file} is missing; {path.name} names it")
    return {name: path.parent / file for name, file in names.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _and_others(names: list[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
