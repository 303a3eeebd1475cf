"""Trains the small model.

    python -m dsd.tools.tiny.train OUT --minutes 9            from nothing
    python -m dsd.tools.tiny.train OUT --minutes 9 --resume   goes on from OUT/state.safetensors
    python -m dsd.tools.tiny.train OUT --minutes 9 --init DIR from the weights of an export

The learning rate follows the clock, not a count of steps: a run of any length ends annealed. Every
minute the whole state is saved. At the end OUT/bf16 is an export; `export.py` makes fp8 of it.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...model.config import ModelConfig
from . import batches, export, text
from .configuration import CONFIG
from .network import Network

ROWS_PER_BATCH = 128
PEAK_LR = 2e-3
WARM_UP = 0.02
WEIGHT_DECAY = 0.1
MTP_LOSS_WEIGHT = 0.3
"""lambda of the report, section 2.2."""
SAVE_EVERY_S = 60.0
LOG_EVERY = 100
EVAL_EXAMPLES = 3000
EVAL_SEED = 1
STATE = "state.safetensors"


def learning_rate(fraction: float) -> float:
    """Linear warm-up, then a cosine down to nothing, over the share of the time that has passed."""
    if fraction < WARM_UP:
        return PEAK_LR * fraction / WARM_UP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))


class Trainer:
    """Network, optimiser, and how much of the planned time has passed."""

    def __init__(self, config: ModelConfig, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(0)
        self.network = Network(config).to(device)
        self.forward: Callable[..., Any] = self.network
        if compiled:
            self.forward = torch.compile(self.network)
        matrices = [p for p in self.network.parameters() if p.dim() > 1]
        vectors = [p for p in self.network.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0},
            ],
            lr=PEAK_LR,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )
        self.device = device
        self.fraction = 0.0
        self.step_count = 0

    def step(self, batch: batches.Batch) -> Tensor:
        """One update; returns the loss of both heads, detached, [2]."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.fraction)
        main, mtp = self.losses(batch)
        (main + MTP_LOSS_WEIGHT * mtp).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for gate in self.network.gates():
            gate.update_bias()
        self.step_count += 1
        return torch.stack((main.detach(), mtp.detach()))

    def losses(self, batch: batches.Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            logits, mtp_logits = self.forward(batch.packed)
        main = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        mtp = F.cross_entropy(mtp_logits.flatten(0, 1).float(), batch.mtp_targets.flatten())
        return main, mtp

    # ---- state ----

    def save(self, path: Path) -> None:
        """Weights, moments and clock, as one safetensors file, replaced in one move."""
        tensors = {f"network.{k}": v.contiguous() for k, v in self.network.state_dict().items()}
        for i, (_, moments) in enumerate(sorted(self.optimizer.state_dict()["state"].items())):
            for name, value in moments.items():
                tensors[f"optimizer.{i}.{name}"] = value.clone()
        metadata = {"clock": json.dumps({"fraction": self.fraction, "steps": self.step_count})}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            clock = json.loads(file.metadata()["clock"])
        network = {k.removeprefix("network."): v for k, v in tensors.items() if k[0] == "n"}
        self.network.load_state_dict(network)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                moments.setdefault(int(i), {})[key] = value
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state, "state": moments})
        self.fraction, self.step_count = clock["fraction"], clock["steps"]


@torch.no_grad()
def evaluate(trainer: Trainer, rows: batches.Rows) -> dict[str, float]:
    """On held-out rows, teacher-forced: the share of documents whose every token is the argmax
    (greedy decoding would then write exactly this), and MTP acceptance."""
    network, exact, documents, accepted, drafted = trainer.network, 0, 0, 0, 0
    network.eval()
    for start in range(0, len(rows.ids), ROWS_PER_BATCH):
        index = range(start, min(start + ROWS_PER_BATCH, len(rows.ids)))
        batch = batches.to_batch(rows, list(index), trainer.device)  # type: ignore[arg-type]
        with torch.autocast(trainer.device.type, dtype=torch.bfloat16):
            logits, mtp_logits = network(batch.packed)
        choice, draft = logits.argmax(-1), mtp_logits.argmax(-1)
        wrong = (choice != batch.targets) & (batch.targets != -100)
        docs = torch.from_numpy(rows.docs[list(index)]).to(trainer.device).long()
        for number in range(1, int(docs.max()) + 1):
            present = (docs == number).any(1)
            documents += int(present.sum())
            exact += int((present & ~(wrong & (docs == number)).any(1)).sum())
        learned = batch.mtp_targets[:, :-1] != -100
        accepted += int(((draft[:, :-1] == choice[:, 1:]) & learned).sum())
        drafted += int(learned.sum())
    network.train()
    return {"exact": exact / documents, "mtp_accepted": accepted / drafted}


def train(trainer: Trainer, out: Path, minutes: float, examples: int) -> None:
    """Until the planned minutes have passed."""
    started = time.monotonic()
    rows = batches.make_many(seed=trainer.step_count + 1, num_examples=examples, tokenizer_dir=out)
    held_out = batches.make_rows(EVAL_SEED, EVAL_EXAMPLES, out, held_out=True)
    click.echo(
        f"{examples:,} examples in {len(rows.ids):,} rows, {time.monotonic() - started:.0f} s"
    )
    begun, last_save, first = time.monotonic(), time.monotonic(), trainer.fraction
    losses = torch.zeros(2, device=trainer.device)
    for index in batches.epochs(rows, ROWS_PER_BATCH, trainer.step_count):
        passed = (time.monotonic() - started) / (minutes * 60)
        trainer.fraction = min(1.0, first + (1 - first) * passed)
        losses += trainer.step(batches.to_batch(rows, index, trainer.device))
        if trainer.step_count % LOG_EVERY == 0:
            main, mtp = (losses / LOG_EVERY).tolist()
            losses.zero_()
            speed = LOG_EVERY * ROWS_PER_BATCH * batches.ROW_TOKENS / (time.monotonic() - begun)
            begun = time.monotonic()
            if trainer.step_count % (5 * LOG_EVERY) == 0:
                click.echo(
                    f"step {trainer.step_count} at {trainer.fraction:.0%}: loss {main:.4f}, "
                    f"mtp {mtp:.4f}, {speed / 1e3:,.0f}k tokens/s, {evaluate(trainer, held_out)}"
                )
        if time.monotonic() - last_save > SAVE_EVERY_S:
            trainer.save(out / STATE)
            last_save = time.monotonic()
        if trainer.fraction >= 1.0:
            break
    click.echo(f"{trainer.step_count} steps; held out: {evaluate(trainer, held_out)}")
    trainer.save(out / STATE)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--minutes", default=9.0, show_default=True, help="Time for all of it.")
@click.option("--examples", default=1_500_000, show_default=True, help="Training examples.")
@click.option("--resume", is_flag=True, help="Go on from OUT/state.safetensors.")
@click.option(
    "--init", type=click.Path(path_type=Path, exists=True), help="An export to start from."
)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
def main(
    out: Path, minutes: float, examples: int, resume: bool, init: Path | None, compiled: bool
) -> None:
    """Train the small model into OUT."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    config = ModelConfig.load(out)
    text.make_tokenizer(out, config.vocab_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(config, device, compiled and device.type == "cuda")
    count = sum(parameter.numel() for parameter in trainer.network.parameters())
    click.echo(f"{count / 1e6:.2f} M parameters on {device}")
    if resume:
        trainer.load(out / STATE)
    elif init is not None:
        trainer.network.load_state_dict(export.read_state(init, config))
    train(trainer, out, minutes, examples)
    export.write_bf16(out / "bf16", trainer.network)


if __name__ == "__main__":
    main()
