"""May this study be run here? What only a running service can check of a spec."""

from collections.abc import Iterator
from importlib.util import find_spec

from sqlalchemy.orm import Session

from regtune import studies, workers
from regtune.errors import FieldError, InvalidSpec, NotFound
from regtune.spec import Requires, StudySpec, TaskSpec
from regtune.task import Offer
from regtune.workers import Worker

_SAMPLERS_NEED = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",), "qmc": ("scipy",)}


def check(session: Session, spec: StudySpec, installed: Offer, alive_seconds: float) -> None:
    """Raise InvalidSpec if nobody knows the study's task, or its sampler cannot run here.

    A study that was admitted once is not judged again.
    """
    try:
        studies.find(session, spec.name)
    except NotFound:
        offered = workers.offered(session, alive_seconds)
        errors = (*_unknown(spec.task, installed, offered), *_missing(spec))
        if errors:
            raise InvalidSpec(errors) from None


def warning(session: Session, spec: StudySpec, alive_seconds: float) -> str | None:
    """Say why nobody would train this study now; None if somebody would."""
    living = [worker for worker in workers.everyone(session, alive_seconds) if worker.alive]
    offering = [worker for worker in living if _offers(worker, spec.task)]
    if any(_meets(worker, spec.requires) for worker in offering):
        return None
    if not living:
        return "no worker is alive; the study waits for one (start it with `regtune worker`)"
    if offering:
        return (
            f"none of the {len(offering)} living workers that offer its task has "
            f"{_in_words(spec.requires)}; the study waits for one that does"
        )
    task = spec.task
    return (
        f"none of the {len(living)} living workers offers the data set {task.dataset!r} with the "
        f"model {task.model!r}; the study waits for one that does"
    )


def _unknown(task: TaskSpec, installed: Offer, offered: Offer) -> Iterator[FieldError]:
    datasets = installed.datasets | offered.datasets
    models = installed.models | offered.models
    if task.dataset not in datasets:
        yield FieldError("task.dataset", _not_known("data set", task.dataset, datasets))
    if task.model not in models:
        yield FieldError("task.model", _not_known("model", task.model, models))


def _not_known(what: str, name: str, known: frozenset[str]) -> str:
    return f"there is no {what} {name!r}; known: {', '.join(sorted(known)) or 'none'}"


def _missing(spec: StudySpec) -> Iterator[FieldError]:
    needed = _SAMPLERS_NEED.get(spec.sampler.name, ())
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        yield FieldError(
            "sampler.name",
            f"the sampler {spec.sampler.name} needs {' and '.join(missing)}, which this service "
            "is installed without; take another sampler",
        )


def _offers(worker: Worker, task: TaskSpec) -> bool:
    return task.dataset in worker.datasets and task.model in worker.models


def _meets(worker: Worker, requires: Requires) -> bool:
    """Say the same as ``regtune.shares.SUITS`` does of a worker's device."""
    return requires.device in (None, worker.device_kind) and requires.min_memory_gb * 1e9 <= (
        worker.memory_bytes or 0
    )


def _in_words(requires: Requires) -> str:
    device = f"a {requires.device} device" if requires.device else "a device"
    memory = f" with at least {requires.min_memory_gb:g} GB" if requires.min_memory_gb else ""
    return device + memory
