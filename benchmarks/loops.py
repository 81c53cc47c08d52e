"""What it saves to take compiled steps by a loop in C++, instead of each by Python.

    python benchmarks/loops.py --data-dir ~/data --json loops.json

Perceptrons on MNIST, whole or the middle of each image, with as many lanes as a worker would train.
Two engines of each take turns in one process, an epoch each, after all that they use has been
compiled: one with the loop, and one that calls the same programs by TorchInductor's own wrapper.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from numpy.typing import NDArray

from benchmarks.chunks import perceptron
from benchmarks.peers import CLASSES, shortened
from benchmarks.problems import Problem, Setting, build_engine
from benchmarks.turns import in_turns, warm_up
from regtune.task import Data, Storage
from worker.tasks.images import mnist
from worker.training import compiling
from worker.training.engine import Engine
from worker.training.repeating import Repeatable

SIDE = 28
TEST_ROWS = 1000
NETWORKS = ("8:32", "8:64", "8:64,64", "28:16", "28:128")


def main() -> None:
    """Print, and write if asked to, how long epochs take with the loop and without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument(
        "--networks", nargs="+", default=NETWORKS, help="side of the images: widths of the layers"
    )
    parser.add_argument("--rows", type=int, default=19_200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    asked = parser.parse_args()
    compiling.CALLS_BEFORE_RECORDING, compiling.SECONDS_BEFORE_COMPILING = 0, 0.0
    torch.set_flush_denormal(True)
    data = shortened(mnist(Storage(asked.data_dir)), asked.rows, TEST_ROWS)
    figures = []
    for network in asked.networks:
        side, _, widths = network.partition(":")
        hidden = list(map(int, widths.split(",")))
        figures.append(race(int(side), hidden, data, asked))
        if asked.json:
            asked.json.write_text(json.dumps(figures, indent=2) + "\n")


def race(side: int, hidden: Sequence[int], data: Data, asked: argparse.Namespace) -> object:
    """Return, and print, the seconds of epochs with the loop and without."""
    name = "-".join(map(str, [side**2, *hidden, CLASSES]))
    build = partial(perceptron, hidden, pixels=side**2)
    setting = Setting(
        problem=Problem("perceptron", build, asked.rows, ()),
        data=replace(data, train_x=middle(data.train_x, side), test_x=middle(data.test_x, side)),
        data_dir=asked.data_dir,
        device=torch.device("cpu"),
        threads=asked.threads,
        rounds=asked.rounds,
        lanes=(),
        quick=False,
        peak=0.0,
    )
    chunk = build_engine(setting, 1, compiles=False).chunk
    lanes = chunk * asked.threads
    engines = {
        "loop": build_engine(setting, lanes, compiles=True),
        "wrapper": without_loop(setting, lanes),
    }
    seconds = in_turns(engines, lanes, asked.rounds, setting.device)
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["wrapper"], strict=True)]
    low, half, high = quantiles(ratios, n=4)
    per_step = {who: 1e6 * median(each) / setting.steps for who, each in seconds.items()}
    print(
        f"{name}, {lanes} lanes, {asked.threads} threads: {per_step['loop']:.0f} µs a step instead "
        f"of {per_step['wrapper']:.0f}, {half:.3f} × (quartiles {low:.3f} to {high:.3f})",
        flush=True,
    )
    whole = {"network": name, "lanes": lanes, "threads": asked.threads, "steps": setting.steps}
    return {**whole, "seconds": seconds}


def middle(images: NDArray[Any], side: int) -> NDArray[Any]:
    """Return so many rows and columns of each image, those in its middle."""
    first = (SIDE - side) // 2
    return images[..., first : first + side, first : first + side].copy()


def without_loop(setting: Setting, lanes: int) -> Engine:
    """Return an engine that calls what has been compiled as TorchInductor wraps it."""
    engine = build_engine(setting, lanes, compiles=True)
    warm_up(engine, lanes)
    engine.train_epoch()
    for program in engine.programs:
        if isinstance(program._form, Repeatable):
            program._form = program._form.wrapper
    engine.leave(engine.lanes)
    return engine


if __name__ == "__main__":
    main()
