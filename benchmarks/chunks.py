"""How many lanes a core of a CPU should compute together: perceptrons of several widths.

    python benchmarks/chunks.py --data-dir ~/data --json chunks.json

Eight lanes of each train in chunks of four, two and one, in turns in one process, an epoch each,
after all that they use has been compiled. The seconds of each epoch are compared with those of
chunks of four in the same round.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.peers import CLASSES, shortened
from benchmarks.problems import Problem, Setting, build_engine
from benchmarks.turns import in_turns
from regtune.task import Data, Storage
from worker.tasks.images import mnist
from worker.training import compiling
from worker.training import engine as engine_module
from worker.training.cores import CPU_CHUNK, cache_bytes, chunk_for
from worker.training.engine import Engine

LANES = 8
CHUNKS = (4, 2, 1)
PIXELS = 784
TEST_ROWS = 1000


def main() -> None:
    """Print, and write if asked to, how long epochs take in chunks of each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument(
        "--hidden", nargs="+", default=["32", "64", "128", "256", "512,512"], help="layers' widths"
    )
    parser.add_argument("--rows", type=int, default=9_600)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    asked = parser.parse_args()
    compiling.CALLS_BEFORE_RECORDING, compiling.SECONDS_BEFORE_COMPILING = 0, 0.0
    torch.set_flush_denormal(True)
    data = shortened(mnist(Storage(asked.data_dir)), asked.rows, TEST_ROWS)
    cache = cache_bytes()
    print(f"second-level cache of a core: {cache / 2**20:.2f} MiB; times those of chunks of four:")
    figures = []
    for widths in asked.hidden:
        found = race(list(map(int, widths.split(","))), data, asked.data_dir, asked.rounds)
        figures.append({"hidden": widths, **found})
        if asked.json:
            whole = {"cache_bytes": cache, "lanes": LANES, "networks": figures}
            asked.json.write_text(json.dumps(whole, indent=2) + "\n")


def race(hidden: Sequence[int], data: Data, data_dir: Path, rounds: int) -> dict[str, object]:
    """Return the seconds of epochs in chunks of each size, and which size the engine would take."""
    setting = Setting(
        problem=Problem("perceptron", partial(perceptron, hidden), len(data.train_y), (LANES,)),
        data=data,
        data_dir=data_dir,
        device=torch.device("cpu"),
        threads=LANES // max(CHUNKS),  # so that chunks of all sizes are full
        rounds=rounds,
        lanes=(LANES,),
        quick=False,
        peak=0.0,
    )
    engines = {chunk: in_chunks_of(chunk, setting) for chunk in CHUNKS}
    weight_bytes = 4 * engines[CPU_CHUNK].parameters
    seconds = in_turns(engines, LANES, rounds, setting.device)
    print(f"784-{'-'.join(map(str, hidden))}-10, {weight_bytes / 2**20:.2f} MiB of weights a lane:")
    for chunk in CHUNKS:
        ratios = [a / b for a, b in zip(seconds[chunk], seconds[CPU_CHUNK], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        per_step = 1000 * median(seconds[chunk]) / LANES / setting.steps
        taken = "  as the engine does" if chunk == chunk_for(weight_bytes) else ""
        print(
            f"  chunks of {chunk}: {per_step:.3f} ms a lane and step, {middle:.3f} × "
            f"(quartiles {low:.3f} to {high:.3f}){taken}",
            flush=True,
        )
    return {
        "weight_bytes": weight_bytes,
        "chosen": chunk_for(weight_bytes),
        "steps": setting.steps,
        "seconds": seconds,
    }


def perceptron(hidden: Sequence[int], dropout: float, pixels: int = PIXELS) -> nn.Module:
    """Build a perceptron with batch norm and dropout."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in zip([pixels, *hidden], hidden, strict=False):
        layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], CLASSES))


def in_chunks_of(chunk: int, setting: Setting) -> Engine:
    """Return an engine that cuts its lanes into chunks of this size."""
    with patch.object(engine_module, "chunk_for", lambda weight_bytes: chunk):
        return build_engine(setting, LANES, compiles=True)


if __name__ == "__main__":
    main()
