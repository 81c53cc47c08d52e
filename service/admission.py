"""May this study be run here? What only a running service can check of a spec."""

from collections.abc import Iterator
from importlib.util import find_spec

from sqlalchemy.orm import Session

from regtune import studies, workers
from regtune.errors import FieldError, InvalidSpec, NotFound
from regtune.spec import (
    AnyTask,
    NamedTask,
    Requires,
    StudyChange,
    StudySpec,
    TableSettings,
    TaskSpec,
)
from regtune.studies import Study
from regtune.task import Offer
from regtune.workers import Worker

_SAMPLERS_NEED = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",), "qmc": ("scipy",)}


MOST_FOR_GP = 1000
"""Of so many trials in four dimensions a Gaussian process takes 4 s on a slow core, and eight times
as long for twice as many. A replica leads no other study meanwhile."""


def check(session: Session, spec: StudySpec, installed: Offer, alive_seconds: float) -> None:
    """Raise InvalidSpec if nobody knows the study's task, or it cannot be run as it is meant.

    A study that was admitted once is not judged again.
    """
    try:
        studies.find(session, spec.name)
    except NotFound:
        offered = workers.offered(session, alive_seconds)
        unknown = _unknown(spec.task, installed, offered)
        too_many = _too_many(spec, spec.budget.trials)
        errors = (*unknown, *_contradictions(spec.task), *_missing(spec), *too_many)
        if errors:
            raise InvalidSpec(errors) from None


def check_change(study: Study, change: StudyChange) -> None:
    """Raise InvalidSpec if a study would become what would not be admitted."""
    asked = change.given.get("budget", {}).get("trials", 0)
    if asked > study.budget_trials and (errors := tuple(_too_many(study.spec, asked))):
        raise InvalidSpec(errors)


def warning(session: Session, study: Study, alive_seconds: float) -> str | None:
    """Say why nobody would train this study now; None if somebody would."""
    spec = study.spec
    living = workers.everyone(session, alive_seconds, alive=True)
    if not living:
        return "no worker is alive; the study waits for one (start it with `regtune worker`)"
    offering = [worker for worker in living if _offers(worker, spec.task)]
    if not offering:
        return (
            f"none of the {len(living)} living workers offers {spec.task}; "
            "the study waits for one that does"
        )
    suited = [worker for worker in offering if _meets(worker, spec.requires)]
    if not suited:
        return (
            f"none of the {len(offering)} living workers that offer its task has "
            f"{_in_words(spec.requires)}; the study waits for one that does"
        )
    refusals = workers.refusals(session, study.study_id)
    if all(worker.name in refusals for worker in suited):
        return (
            f"all of the {len(suited)} living workers that could train it have refused it; the "
            "study waits for another, or for one to try again: once it is restarted, or after some "
            f"minutes where it lacked something. {suited[-1].name}: "
            f"{refusals[suited[-1].name]}"
        )
    return None


def _unknown(task: AnyTask, installed: Offer, offered: Offer) -> Iterator[FieldError]:
    if isinstance(task, NamedTask):
        asked = [("task.name", "task", task.name, installed.tasks | offered.tasks)]
    else:
        asked = [
            ("task.dataset", "data set", task.dataset, installed.datasets | offered.datasets),
            ("task.model", "model", task.model, installed.models | offered.models),
        ]
    for field, what, name, known in asked:
        if name not in known:
            yield FieldError(field, _not_known(what, name, known))


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


def _contradictions(task: AnyTask) -> Iterator[FieldError]:
    """Yield what a table's settings cannot mean; not in reading a spec, since some are stored."""
    if isinstance(task, TaskSpec) and task.dataset == "table":
        for field, fault in TableSettings.model_validate(task.data).contradictions():
            yield FieldError(f"task.data.{field}", fault)


def _too_many(spec: StudySpec, trials: int) -> Iterator[FieldError]:
    if spec.sampler.name == "gp" and trials > MOST_FOR_GP:
        yield FieldError(
            "budget.trials",
            f"name {MOST_FOR_GP} or fewer with the sampler gp: the time that a suggestion takes "
            "grows with the cube of the trials; take tpe for more",
        )


def _offers(worker: Worker, task: AnyTask) -> bool:
    if isinstance(task, NamedTask):
        return task.name in worker.tasks
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
