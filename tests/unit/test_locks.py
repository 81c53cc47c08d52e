"""The locks of what is installed: they agree, and each holds what its image needs and no more."""

import re
import tomllib
from pathlib import Path

import pytest


def pins(project: Path, name: str) -> dict[str, str]:
    """Exact versions by package."""
    text = (project / "requirements" / f"{name}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", ["service", "worker"])
def test_an_image_has_the_versions_that_are_tested(project: Path, name: str) -> None:
    assert len(pins(project, name)) > 20
    assert pins(project, name).items() <= pins(project, "all").items()


def test_the_service_has_no_torch_and_the_worker_no_web_framework(project: Path) -> None:
    service, worker = set(pins(project, "service")), set(pins(project, "worker"))
    assert not service & {"torch", "torchvision", "scikit-learn"}
    assert not worker & {"fastapi", "starlette", "uvicorn", "optuna-dashboard"}
    assert "fastapi" in service
    assert "torch" in worker


def test_torch_and_torchvision_are_the_pair_that_is_named(project: Path) -> None:
    extras = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    named = dict(r.split("==") for r in extras["optional-dependencies"]["worker"] if "==" in r)
    locked = pins(project, "worker")
    assert named == {name: locked[name] for name in ("torch", "torchvision")}


@pytest.mark.parametrize("name", ["all", "service", "worker"])
def test_a_lock_holds_no_address_and_a_hash_for_every_file(project: Path, name: str) -> None:
    text = (project / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text
    assert "index-url" not in text
    assert "find-links" not in text
    entries = re.split(r"^(?=[a-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
