"""What it costs that data do not fit: streamed epochs against resident ones, and decoded images.

    python -m benchmarks.streaming epochs --data-dir ~/data [--device cuda] [--rows 60000]
    python -m benchmarks.streaming images [--count 20000]

``epochs`` trains eight lanes of each problem of ``benchmarks/engine.py`` with MNIST's rows on the
device and with the same rows streamed, in turns in one process, an epoch each, after all that they
use has been compiled. ``images`` writes JPEG files of 500 × 375 pixels in ten folders, and loads
them at 64 × 64: into memory by one thread and by all, into a file, and from that file again, each
in a process of its own.
"""

import argparse
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import shortened
from benchmarks.problems import PROBLEMS, Problem, Setting, build_engine
from benchmarks.turns import in_turns
from regtune import programs
from regtune.task import Data, Storage
from worker.tasks import decoding
from worker.tasks.image_folder import image_folder
from worker.tasks.images import mnist
from worker.training import compiling
from worker.training.engine import Engine
from worker.training.residence import OnDevice

LANES = 8
WISHES: tuple[OnDevice, ...] = ("always", "never")
TEST_ROWS = 1000
WIDTH, HEIGHT = 500, 375
CLASSES = 10


def epochs(asked: argparse.Namespace) -> None:
    """Print how long an epoch takes either way."""
    compiling.CALLS_BEFORE_RECORDING, compiling.SECONDS_BEFORE_COMPILING = 0, 0.0
    torch.set_flush_denormal(True)
    data = shortened(mnist(Storage(asked.data_dir)), asked.rows, TEST_ROWS)
    print(f"{LANES} lanes, {asked.rows} rows, {asked.device}")
    for problem in (PROBLEMS[name] for name in asked.problems):
        setting = as_setting(problem, data, asked)
        engines: dict[OnDevice, Engine] = {
            wish: build_engine(setting, LANES, compiles=True, data_on_device=wish)
            for wish in WISHES
        }
        seconds = in_turns(engines, LANES, asked.rounds, setting.device)
        resident, streamed = (median(seconds[wish]) for wish in WISHES)
        print(
            f"{problem.name}: an epoch takes {resident:.2f} s resident, {streamed:.2f} s streamed, "
            f"{streamed / resident:.2f} times as long",
            flush=True,
        )


def as_setting(problem: Problem, data: Data, asked: argparse.Namespace) -> Setting:
    """Return the setting of a problem."""
    return Setting(
        problem=problem,
        data=data,
        data_dir=asked.data_dir,
        device=torch.device(asked.device),
        threads=torch.get_num_threads(),
        rounds=asked.rounds,
        lanes=(LANES,),
        quick=False,
        peak=0.0,
    )


def images(asked: argparse.Namespace) -> None:
    """Print how long images take to load, and how much memory."""
    with tempfile.TemporaryDirectory() as name:
        apart(write, Path(name), asked.count)
        gigabytes = asked.count * 3 * asked.size**2 / 1e9
        print(f"{asked.count} JPEG files, {gigabytes:.2f} GB decoded", flush=True)
        cores = programs.cores()
        for what, limit, threads in (
            ("in memory, one thread", 2**62, 1),
            ("in memory", 2**62, cores),
            ("into a file", 0, cores),
            ("file found again", 0, cores),
        ):
            apart(load, Path(name), asked.size, what, limit, threads)


def write(folder: Path, count: int) -> None:
    """Write photographs of nothing: smooth noise, as large when compressed as pictures are."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (HEIGHT // 5, WIDTH // 5, 3), dtype=np.uint8)
        path = folder / "all" / str(number % CLASSES) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(path, quality=85)


def load(folder: Path, size: int, what: str, limit: int, threads: int) -> None:
    """Load the images, and print what that took."""
    decoding.MAPPED_BYTES = limit
    before, own = peak(), resident("RssAnon:")
    started = perf_counter()
    with patch.object(decoding, "cores", lambda: threads):
        data = image_folder(Storage(folder), path="all", size=size, test_fraction=0.1)
    seconds = perf_counter() - started
    print(
        f"{what:21} {seconds:6.1f} s; above the program's own: peak resident set "
        f"{peak() - before:5.2f} GB, held in memory {resident('RssAnon:') - own:5.2f} GB "
        f"for {len(data.train_y) + len(data.test_y)} rows",
        flush=True,
    )


def peak() -> float:
    """Return the largest resident set of this process so far, in gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def resident(what: str) -> float:
    """Return a line of this process's status in gigabytes (Linux)."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) * 1024 / 1e9 for words in lines if words[0] == what)


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Call in a new process."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measured = parser.add_subparsers(required=True)
    of_epochs = measured.add_parser("epochs")
    of_epochs.set_defaults(measure=epochs)
    of_epochs.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    of_epochs.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    of_epochs.add_argument("--rows", type=int, default=60_000)
    of_epochs.add_argument("--problems", nargs="+", choices=[*PROBLEMS], default=[*PROBLEMS])
    of_epochs.add_argument("--rounds", type=int, default=5)
    of_images = measured.add_parser("images")
    of_images.set_defaults(measure=images)
    of_images.add_argument("--count", type=int, default=20_000)
    of_images.add_argument("--size", type=int, default=64)
    asked = parser.parse_args()
    asked.measure(asked)


if __name__ == "__main__":
    main()
