"""How fast lanes train, against one model at a time, and how much memory they take.

Two problems on MNIST, in batches of 64: ``mlp`` (784-128-10, batch norm) and ``cnn`` (two
convolutions with batch norm). Contenders take turns in one process, an epoch each and then a
validation, all with dropout, AdamW and proximal L1:

- tutorial: a ``DataLoader`` over torchvision's data set with its transforms, default optimizer;
- hand-tuned: rows in memory as tensors, batches by index, fused optimizer, no synchronization; of
  some settings (threads, memory format) the one that is fastest here;
- hand-tuned, CUDA graph: the same with a step as one graph, on CUDA;
- lanes: the engine at several numbers of lanes, after all that it uses has been compiled;
- lanes, not compiled: the best of those again, recorded only;
- lanes, bf16 (and tf32 on CUDA): the same with that ``training.precision``.

    python benchmarks/engine.py --data-dir ~/data --quick                     # under a minute
    python benchmarks/engine.py --data-dir ~/data --problem mlp --json mlp.json
    python benchmarks/engine.py --data-dir ~/data --device cuda --json cuda.json
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import structlog
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contest import EVENTS, Contender, Contest, Deadline, tried
from benchmarks.memory import lanes_to_compare
from benchmarks.peers import shortened
from benchmarks.problems import PROBLEMS, STRENGTHS, Problem, Setting, sample_batch
from regtune.task import Data, Storage
from worker.tasks.images import mnist
from worker.training import compiling

ROWS = 60_000
TEST_ROWS = 1000
ROWS_STEP = 80
"""Multiples of this many rows, less the fifth that validates, make full batches."""

CPU_LANES = (1, 4, 16)
"""On a CPU more lanes are only more chunks like these."""

CUDA_LANES = (1, 4, 16, 64, 256)
CUDA_MINUTES = 7.0

PEAK_SIZES: Mapping[str, Sequence[int]] = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}
"""Sides of the square matrices whose products tell a device's arithmetic peak."""


def main() -> None:
    """Measure the problems one after the other; print and write what came out."""
    arguments = parse_arguments()
    structlog.configure(processors=[EVENTS])
    # A program is worth recording and compiling after some time. What comes after is measured here.
    compiling.CALLS_BEFORE_RECORDING, compiling.SECONDS_BEFORE_COMPILING = 0, 0.0
    torch.set_flush_denormal(True)
    data = mnist(Storage(arguments.data_dir))
    device = torch.device(arguments.device)
    figures: dict[str, Any] = {
        "device": describe(device),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "peak_flops": arithmetic_peak(device, arguments.threads),
        "problems": {},
    }
    problems = [PROBLEMS[name] for name in PROBLEMS if arguments.problem in (name, "all")]
    ends = perf_counter() + 60 * arguments.minutes
    for left, problem in zip(range(len(problems), 0, -1), problems, strict=True):
        setting = settle_on(problem, arguments, data, device, figures["peak_flops"])
        contest = Contest(setting, Deadline((ends - perf_counter()) / left))
        contest.run()
        print_table(setting, contest)
        figures["problems"][problem.name] = as_figures(setting, contest)
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        contest.close()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path(".regtune/data"))
    parser.add_argument("--problem", choices=[*PROBLEMS, "all"], default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--lanes", type=int, nargs="+", help="default: 1 4 16, on CUDA also 64 and 256"
    )
    parser.add_argument(
        "--rows", type=row_count, help="take only the first training rows, a multiple of 80"
    )
    parser.add_argument("--rounds", type=int, help="epochs that count; default: 3, or 2 if quick")
    parser.add_argument(
        "--minutes",
        type=float,
        help="start nothing more after that; default: 7 on CUDA, else no limit",
    )
    parser.add_argument("--quick", action="store_true", help="few rows and lanes, no memory")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 3)
    if arguments.minutes is None:
        arguments.minutes = CUDA_MINUTES if arguments.device.startswith("cuda") else math.inf
    return arguments


def row_count(text: str) -> int:
    """Read a number of rows of which all batches are full."""
    rows = int(text)
    if not 0 < rows <= ROWS or rows % ROWS_STEP:
        raise argparse.ArgumentTypeError(f"a multiple of {ROWS_STEP}, at most {ROWS}")
    return rows


def settle_on(
    problem: Problem, arguments: argparse.Namespace, data: Data, device: torch.device, peak: float
) -> Setting:
    """Return the setting of one problem."""
    rows = arguments.rows or (problem.quick_rows if arguments.quick else ROWS)
    usual = CUDA_LANES if device.type == "cuda" else CPU_LANES
    return Setting(
        problem=problem,
        data=shortened(data, rows, TEST_ROWS),
        data_dir=arguments.data_dir,
        device=device,
        threads=arguments.threads,
        rounds=arguments.rounds,
        lanes=arguments.lanes or (problem.quick_lanes if arguments.quick else usual),
        quick=arguments.quick,
        peak=peak,
    )


def step_flops(problem: Problem) -> int:
    """Return the floating-point operations of one forward and backward pass of one batch."""
    model = problem.network(STRENGTHS.dropout).train()
    x, y = sample_batch()
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(model(x), y).backward()
    return counter.get_total_flops()


def arithmetic_peak(device: torch.device, threads: int) -> float:
    """Return the operations a second of the fastest of several products of square matrices."""
    torch.set_num_threads(threads)
    rates = []
    for side in PEAK_SIZES[device.type]:
        a, b = (torch.randn(side, side, device=device) for _ in range(2))
        rates.append(2 * side**3 / tried(partial(torch.matmul, a, b), device))
    return max(rates)


def print_table(setting: Setting, contest: Contest) -> None:
    """Print what came out, and how it is to be read."""
    print(
        f"\n{setting.problem.name} on {describe(setting.device)}, {setting.threads} threads,",
        end="",
    )
    print(f" torch {torch.__version__}; {setting.rows - setting.validation_rows} rows an epoch,")
    print(f"{setting.validation_rows} to validate; medians of {setting.rounds} rounds\n")
    heads = (
        "trial-epochs/s",
        "ms/lane-step",
        "x hand-tuned",
        "MB/lane",
        "predicted",
        "off",
        "of peak",
    )
    print(f"{'':26}" + "".join(f"{head:>15}" for head in heads))
    for c in in_order(contest):
        cells = (
            f"{c.rate:.3f}",
            f"{1000 / c.rate / setting.steps:.4f}",
            f"{c.rate / contest.peer.rate:.2f}",
            shown(c.measured_bytes, 1e-6, ".2f"),
            shown(c.predicted_bytes, 1e-6, ".2f"),
            shown(c.deviation, 100, "+.0f", " %"),
            shown(share_of_peak(setting, c), 100, ".2f", " %"),
        )
        note = f"  {c.form}" if c.form and c.form != "compiled" else ""
        print(f"{c.name:26}" + "".join(f"{cell:>15}" for cell in cells) + note)
    print("\n" + caption(setting, contest))


def caption(setting: Setting, contest: Contest) -> str:
    """Say how the table is to be read."""
    tunings = ", ".join(f"{name} {s:.2f} s" for name, s in contest.tunings.items())
    lines = [
        f"hand-tuned: the fastest of {tunings}",
        f"of peak: the operations of the training steps (FlopCounterMode) against "
        f"{setting.peak / 1e9:.0f} GFLOP/s, the fastest",
        f"  product of square float32 matrices measured on this device ({sides(setting.device)})",
        "predicted: weights, best copy, moments, buffers, and the most that a step or an "
        "evaluation holds",
    ]
    if setting.device.type == "cpu":
        fewer = lanes_to_compare(max(setting.lanes), setting.threads)
        lines += [
            "  of the lanes at work; MB/lane: peak resident set of a process that trains the most "
            "lanes,",
            f"  less that of one that trains {fewer}, for each lane more (malloc gives back "
            "at once)",
        ]
    else:
        lines.append("MB/lane: most bytes allocated in a training step, a lane")
        beyond = [
            f"{c.name} {c.validation_bytes / 1e6:.1f}"
            for c in in_order(contest)
            if c.validation_bytes
        ]
        lines.append(f"  and in the validation: {', '.join(beyond)}")
    lines += [f"left out: {name} ({reason})" for name, reason in contest.left_out.items()]
    return "\n".join(lines)


def sides(device: torch.device) -> str:
    """Return the sizes of the matrices."""
    return ", ".join(str(side) for side in PEAK_SIZES[device.type])


def in_order(contest: Contest) -> list[Contender]:
    """Return the peers, the slowest first, then the lanes by their number."""
    peers = sorted((c for c in contest.contenders if not c.form), key=lambda c: c.rate)
    lanes = sorted((c for c in contest.contenders if c.form), key=lambda c: c.trials)
    return peers + lanes


def share_of_peak(setting: Setting, contender: Contender) -> float:
    """Return which share of the device's arithmetic peak the training steps make use of."""
    return step_flops(setting.problem) * setting.steps * contender.rate / setting.peak


def shown(value: float | None, scale: float, form: str, unit: str = "") -> str:
    """Return a figure for a cell of the table, or a dash where there is none."""
    return "–" if value is None else f"{value * scale:{form}}{unit}"


def as_figures(setting: Setting, contest: Contest) -> dict[str, Any]:
    """Return all that was measured, for a file."""
    return {
        "rows": setting.rows,
        "validation_rows": setting.validation_rows,
        "steps": setting.steps,
        "rounds": setting.rounds,
        "step_flops": step_flops(setting.problem),
        "predicted_lane_bytes": asdict(contest.footprint) if contest.footprint else None,
        "hand_tuned_seconds": contest.tunings,
        "contenders": [
            {
                "name": c.name,
                "trials": c.trials,
                "form": c.form or None,
                "reason": c.reason,
                "seconds": c.seconds,
                "seconds_alone": c.alone,
                "trial_epochs_per_second": c.rate,
                "ms_per_lane_step": 1000 / c.rate / setting.steps,
                "ratio_to_hand_tuned": c.rate / contest.peer.rate,
                "bytes_per_lane": c.measured_bytes,
                "predicted_bytes_per_lane": c.predicted_bytes,
                "deviation": c.deviation,
                "validation_bytes_per_lane": c.validation_bytes,
                "share_of_peak": share_of_peak(setting, c),
            }
            for c in in_order(contest)
        ],
        "left_out": contest.left_out,
    }


def describe(device: torch.device) -> str:
    """Return the name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # A thread may still be compiling: the interpreter's own end would cut it off in C++, and crash.
    os._exit(0)
