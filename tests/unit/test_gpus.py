"""Counting GPUs, with a program in the place of ``nvidia-smi`` that lists what is wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from regtune import gpus


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    lines = "".join(f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\n  MIG 1g Device 0\n" for i in range(4))
    program.write_text(f"#!{sys.executable}\nprint({lines!r}, end='')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("four_gpus")
def test_the_driver_is_asked() -> None:
    assert gpus.count() == 4


def test_without_a_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.count() == 0


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("0", 1), ("2, 3", 2), ("0,-1,1", 1), ("GPU-1,GPU-2", 2)]
)
def test_what_cuda_is_told_not_to_see_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.count() == count


CLAIM = "import sys; from pathlib import Path; from regtune import gpus; \
print(gpus.claim(Path(sys.argv[1])), flush=True); input()"


@pytest.mark.usefixtures("four_gpus")
def test_each_process_claims_the_gpu_that_the_fewest_have_until_it_ends(tmp_path: Path) -> None:
    claims = [_claim(tmp_path) for _ in range(6)]
    assert [gpu for _, gpu in claims] == ["0", "1", "2", "3", "0", "1"]
    claims[2][0].communicate("")
    assert _claim(tmp_path)[1] == "2"


def _claim(folder: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()
