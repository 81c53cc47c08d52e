"""How long a table of 100 000 rows and 500 columns takes from its file to the training device.

    python -m benchmarks.large_table [--rows 100000] [--columns 500] [--folds 0]

Nine columns of ten are numbers, one is of ten categories, and a hundredth of all values is missing.
Each step runs in a process of its own, so that its peak of memory is its own.
"""

import argparse
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv, parquet

from regtune.spec import Validation
from regtune.task import Storage
from worker.tasks.preparation import prepare
from worker.tasks.tabular import table

CATEGORIES = np.array([f"category {number}" for number in range(10)])


def write(folder: Path, rows: int, columns: int) -> None:
    """Write the same table as CSV and as Parquet."""
    random = np.random.default_rng(0)
    named = {}
    for number in range(columns):
        missing = random.random(rows) < 0.01
        if number % 10 == 9:
            values = CATEGORIES[random.integers(len(CATEGORIES), size=rows)]
        else:
            values = random.normal(size=rows).round(6)
        named[f"column {number}"] = pa.array(values, mask=missing)
    named["target"] = pa.array(random.normal(size=rows))
    whole = pa.table(named)
    parquet.write_table(whole, folder / "t.parquet")
    csv.write_csv(whole, folder / "t.csv")


def read(folder: Path, name: str, folds: int) -> None:
    """Print how long a file takes, and how much memory."""
    before = _peak()
    started = perf_counter()
    data = table(Storage(folder), path=name, target="target")
    read_in = perf_counter() - started
    data.content_hash()
    hashed_in = perf_counter() - started - read_in
    prepared = prepare(data, Validation(folds=folds or None), 0, torch.float32)
    prepared = prepared.on(torch.device("cpu"))
    prepared_in = perf_counter() - started - read_in - hashed_in
    held = (prepared.rows.x.nbytes + prepared.test.x.nbytes) / 1e9
    print(
        f"{name:10} folds {folds}: read {read_in:5.1f} s, hashed {hashed_in:4.1f} s, prepared "
        f"{prepared_in:5.1f} s, peak {_peak() - before:5.2f} GB above the program's own "
        f"{before:.2f} GB, held for training {held:.2f} GB"
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Call in a new process."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def main() -> None:
    """Write the table, and read it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, default=500)
    parser.add_argument("--folds", type=int, nargs="*", default=[0, 5])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        apart(write, Path(name), asked.rows, asked.columns)
        for file in ("t.csv", "t.parquet"):
            for folds in asked.folds:
                apart(read, Path(name), file, folds)


if __name__ == "__main__":
    main()
