"""How fast lanes train, against one model at a time: MNIST, 784-128-10, batch norm, batch 64.

Contenders, one epoch each in turn, in one process, all with dropout, AdamW and proximal L1, and
with a validation of 12 000 rows after each epoch of 48 000:

- tutorial: a ``DataLoader`` over torchvision's data set with its transforms, default optimizer;
- hand-tuned: rows in memory as tensors, batches by index, fused optimizer, no synchronization;
- lanes: the engine, at several numbers of lanes.

    python benchmarks/lanes.py --data-dir ~/data
    python benchmarks/lanes.py --data-dir ~/data --lanes 1 4 16 --rounds 1   # about half a minute
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import MNIST

from regtune.spec import TaskSpec, Training
from worker.tasks.images import mnist
from worker.tasks.preparation import Prepared, prepare
from worker.training.engine import Engine
from worker.training.lanes import LaneTrial

BATCH_ROWS = 64
LEARNING_RATE = 1e-3
DECAY, DROPOUT, L1 = 0.05, 0.2, 1e-3
VALIDATION_FRACTION = 0.2
SEED = 0


@dataclass
class Contender:
    """Something that trains ``trials`` models for one epoch."""

    name: str
    trials: int
    train_epoch: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Trial-epochs a second, by the median round."""
        return self.trials / median(self.seconds)


def main() -> None:
    """Train, in turn, and print who was how fast."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    device = torch.device(arguments.device)
    contenders = enlist(arguments, device)
    for round_number in range(arguments.rounds + 1):
        for contender in contenders:
            seconds = timed(contender.train_epoch, device)
            if round_number:  # the first round only warms up
                contender.seconds.append(seconds)
    report(contenders, arguments)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-tutorial", action="store_true", help="leave the slowest peer out")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_args()


def enlist(arguments: argparse.Namespace, device: torch.device) -> list[Contender]:
    """Prepare the contenders, the peers first."""
    rows = prepare(mnist(arguments.data_dir), VALIDATION_FRACTION, SEED, device, torch.float32)
    contenders = [Contender("hand-tuned", 1, hand_tuned(rows, device))]
    if not arguments.no_tutorial:
        contenders.insert(0, Contender("tutorial", 1, tutorial(arguments.data_dir, device)))
    engine = build_engine(max(arguments.lanes), arguments.data_dir, device)
    return contenders + [
        Contender(f"{lanes} lanes", lanes, partial(train_lanes, engine, lanes))
        for lanes in arguments.lanes
    ]


def tutorial(data_dir: Path, device: torch.device) -> Callable[[], object]:
    """Train as an introduction to PyTorch would."""
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    data = MNIST(data_dir, train=True, transform=transform)
    training = DataLoader(Subset(data, range(48_000)), batch_size=BATCH_ROWS, shuffle=True)
    validation = DataLoader(Subset(data, range(48_000, 60_000)), batch_size=1000)
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)

    def train_epoch() -> None:
        model.train()
        for x, y in training:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            shrink(model)
        model.eval()
        total = 0.0
        with torch.no_grad():
            for x, y in validation:
                x, y = x.to(device), y.to(device)
                total += nn.functional.cross_entropy(model(x), y, reduction="sum").item()

    return train_epoch


def hand_tuned(rows: Prepared, device: torch.device) -> Callable[[], object]:
    """Train one model as fast as plain PyTorch goes."""
    model = network().to(device)
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        fused=True,
    )

    def train_epoch() -> float:
        model.train()
        order = torch.randperm(len(rows.training), device=device)
        total = torch.zeros((), device=device)
        for index in order.split(BATCH_ROWS):
            x, y = rows.training.x.index_select(0, index), rows.training.y.index_select(0, index)
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            shrink(model)
            total += loss.detach()
        model.eval()
        with torch.no_grad():
            xs, ys = rows.validation.x.split(1000), rows.validation.y.split(1000)
            for x, y in zip(xs, ys, strict=True):
                total += nn.functional.cross_entropy(model(x), y, reduction="sum")
        return total.item()

    return train_epoch


@torch.no_grad()
def shrink(model: nn.Module) -> None:
    """Take the proximal step of L1."""
    threshold = LEARNING_RATE * L1
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.sub_(parameter.clamp(-threshold, threshold))


def network() -> nn.Module:
    """Build the model of the peers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(128, 10),
    )


def build_engine(max_lanes: int, data_dir: Path, device: torch.device) -> Engine:
    """Build one engine for all numbers of lanes."""
    return Engine(
        task=TaskSpec(dataset="mnist", model="mlp"),
        training=Training(batch_size=BATCH_ROWS, learning_rate=LEARNING_RATE),
        validation_fraction=VALIDATION_FRACTION,
        seed=SEED,
        data_dir=data_dir,
        device=device,
        max_lanes=max_lanes,
    )


def train_lanes(engine: Engine, lanes: int) -> None:
    """Train ``lanes`` trials for one epoch, from joining to leaving."""
    engine.join([LaneTrial(key, DECAY, DROPOUT, L1, patience=50) for key in range(lanes)])
    engine.train_epoch()
    engine.leave(engine.lanes)


def timed(train_epoch: Callable[[], object], device: torch.device) -> float:
    """Return how many seconds an epoch takes."""
    started = perf_counter()
    train_epoch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def report(contenders: list[Contender], arguments: argparse.Namespace) -> None:
    """Print the table, and write it where it is wanted."""
    peer = next(c for c in contenders if c.name == "hand-tuned")
    print(f"{arguments.device}, {arguments.threads} threads, torch {torch.__version__}\n")
    print(f"{'':12} {'trial-epochs/s':>15} {'ms/trial-step':>14} {'x hand-tuned':>13}")
    for c in contenders:
        steps = -(-48_000 // BATCH_ROWS)
        milliseconds = 1000 / c.rate / steps
        print(f"{c.name:12} {c.rate:15.2f} {milliseconds:14.3f} {c.rate / peer.rate:13.2f}")
    if arguments.json:
        figures = {
            "device": describe(torch.device(arguments.device)),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "trial_epochs_per_second": {c.name: c.rate for c in contenders},
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def describe(device: torch.device) -> str:
    """Return the name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
