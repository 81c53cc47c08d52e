"""A study as a whole: task, training, search, and how far."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic import field_validator as validate_field
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from regtune.space import Fixed, Optimizer, Options, Range
from regtune.spec.datasets import DATASET_SETTINGS, REGRESSION_DATASETS, TABULAR
from regtune.spec.models import MODEL_SETTINGS
from regtune.spec.parts import PartlyUsed, SpecModel, in_plain_words, with_computed_defaults
from regtune.spec.preset import PresetName, preset_search
from regtune.spec.search import SETTING_PATTERN, Search, default_search, grid_values
from regtune.spec.shape import MODEL_PREFIX, read_shape, shaped, value_at, write_shape
from regtune.spec.task import (
    CLASSIFICATION_SCORES,
    NO_SETTINGS,
    REGRESSION_SCORES,
    AnyTask,
    TaskSpec,
    from_name,
)
from regtune.spec.training import AUGMENTATIONS, Training

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MOST_TRIALS = 100_000
"""A study's trials, where nobody has asked for fewer."""

REFERENCE_TRIALS = 2
"""Every study first trains two reference points: everything off, and a common default."""
MAX_MEMBERS = 256
"""Most trainings that one trial may stand for."""
MAX_GRID_POINTS = 2**63 - 1
"""Most points that can be shuffled by number."""

FAULTS = "faults"
"""The kind of a validation error that stands for several, whose messages are in its context."""

SamplerName = Literal["tpe", "random", "grid", "qmc", "cmaes", "gp"]
PrunerName = Literal["none", "extrapolation", "median", "asha", "hyperband"]
PRUNER_SETTINGS: Mapping[PrunerName, Sequence[str]] = {
    "none": (),
    "extrapolation": ("first_epoch",),
    "median": ("first_epoch", "startup_trials"),
    "asha": ("first_epoch", "reduction_factor"),
    "hyperband": ("first_epoch", "reduction_factor"),
}
"""What may be set of each pruner."""


class Validation(PartlyUsed):
    """Which training rows are held out to choose by, and how often each trial is trained."""

    fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the training rows that is held out, stratified, the same rows for "
        "every trial; unless there are folds.",
        examples=[0.2],
    )
    folds: int | None = Field(
        None,
        ge=2,
        le=100,
        description="Stratified k-fold cross-validation instead of a fraction: a trial is trained "
        "once for each fold, which is held out.",
        examples=[5],
    )
    repeats: int = Field(
        1,
        ge=1,
        le=100,
        description="How often all of that is done, each time with other rows held out and other "
        "noise; folds × repeats is at most 256.",
        examples=[1],
    )

    @validate_model(mode="after")
    def _check_together(self) -> Self:
        if self.folds is not None and "fraction" in self.model_fields_set:
            raise PydanticCustomError(
                "validation", "fraction and folds exclude each other; name one of them"
            )
        if self.members > MAX_MEMBERS:
            raise PydanticCustomError(
                "validation",
                "folds × repeats must be at most {most}, but {folds} × {repeats} is given",
                {"most": MAX_MEMBERS, "folds": self.folds, "repeats": self.repeats},
            )
        return self

    @property
    def members(self) -> int:
        """How many trainings, side by side, one trial stands for."""
        return (self.folds or 1) * self.repeats

    def _unused(self) -> tuple[str, ...]:
        return () if self.folds is None else ("fraction",)


class Budget(SpecModel):
    """When the study is done; whichever comes first."""

    model_config = ConfigDict(json_schema_extra=with_computed_defaults("trials"))

    trials: int = Field(
        MOST_TRIALS,
        ge=1,
        le=MOST_TRIALS,
        description="How many trials, exactly; the two reference points count. Default: as many "
        "as the seconds or trial_epochs allow.",
        examples=[40],
    )
    seconds: float | None = Field(
        None,
        gt=0,
        le=366 * 86_400,
        description="Wall-clock seconds from the first lease; then no trial starts any more.",
        examples=[600.0],
    )
    trial_epochs: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="Epochs that all trials train together, never more: a trial is added only "
        "while all of its max_epochs would fit. An epoch that is trained again after a lost lease "
        "counts once.",
        examples=[1500],
    )

    @validate_model(mode="after")
    def _check_given(self) -> Self:
        others = (self.seconds, self.trial_epochs)
        if "trials" not in self.model_fields_set and others == (None, None):
            raise PydanticCustomError("budget", "name trials, seconds, trial_epochs, or several")
        return self


class Sampler(SpecModel):
    """Who suggests what to try next."""

    name: SamplerName = Field(
        "tpe",
        description="Which algorithm; grid needs a list or whole numbers everywhere.",
        examples=["tpe"],
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the suggestions.", examples=[0])


class Pruner(PartlyUsed):
    """Who stops trials early that look bad."""

    name: PrunerName = Field(
        "extrapolation",
        description="extrapolation: our own, which stops a trial that is not going to catch up "
        "with the best; median, asha and hyperband: Optuna's.",
        examples=["extrapolation"],
    )
    first_epoch: int | None = Field(
        None,
        ge=1,
        description="No trial is pruned before it, because strong regularization looks worse "
        "early and wins late. Default: a fifth of max_epochs for extrapolation, which does not "
        "compare early losses, and a third for the others.",
        examples=[16],
    )
    startup_trials: int = Field(
        5, ge=0, description="median: prunes none before so many have completed.", examples=[5]
    )
    reduction_factor: int = Field(
        3,
        ge=2,
        le=100,
        description="asha and hyperband: one in so many goes on at each rung.",
        examples=[3],
    )

    @validate_field("first_epoch", "startup_trials", "reduction_factor")
    @classmethod
    def _check_pruner_has_it(cls, value: int | None, info: ValidationInfo) -> int | None:
        name, pruner = str(info.field_name), info.data.get("name")
        if pruner is None or name in PRUNER_SETTINGS[pruner]:
            return value
        # A default says nothing, and what older versions have shown is posted again.
        if value != cls.model_fields[name].default:
            raise PydanticCustomError(
                "pruner", "is no setting of the pruner {pruner}; leave it out", {"pruner": pruner}
            )
        return value

    def _unused(self) -> tuple[str, ...]:
        used = ("name", *PRUNER_SETTINGS[self.name])
        return tuple(name for name in type(self).model_fields if name not in used)


class Requires(SpecModel):
    """What a worker must have to train the study."""

    device: Literal["cpu", "cuda", "mps", "xpu"] | None = Field(
        None, description="Kind of device, in PyTorch's words. Default: any.", examples=["cuda"]
    )
    min_memory_gb: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Least memory of the device, in 10^9 bytes, as its driver counts them; of the "
        "machine where the device is a CPU.",
        examples=[15],
    )


class StudySpec(SpecModel):
    """A study: what is trained, what is searched, and how far."""

    model_config = ConfigDict(json_schema_extra=with_computed_defaults("search"))

    name: str = Field(pattern=NAME_PATTERN, description="Unique name.", examples=["digits"])
    task: AnyTask = Field(
        description="What is trained: a data set, a model, and the model's own settings; or a task "
        "that has both, by its name, and its settings. A task's name alone will do.",
        examples=[{"dataset": "digits", "model": "mlp", "hidden": [128], "norm": "batch"}],
    )
    training: Training = Field(
        default_factory=Training,
        description="How each trial is trained.",
        examples=[{"optimizer": "adamw", "max_epochs": 50}],
    )
    preset: PresetName | None = Field(
        None,
        description="What is searched by default, after the usual advice for such a problem, see "
        "docs/studies.md; what search names wins. Default: the ranges for any problem.",
        examples=["small_data"],
    )
    search: Search = Field(
        description="What is searched. Default: sensible ranges of weight_decay, dropout, "
        "l1_lambda and patience.",
        examples=[{"dropout": {"low": 0.0, "high": 0.5}, "l1_lambda": 0.0}],
    )
    validation: Validation = Field(
        default_factory=Validation,
        description="Which rows are held out to choose by.",
        examples=[{"fraction": 0.2}],
    )
    budget: Budget = Field(description="When the study is done.", examples=[{"trials": 40}])
    sampler: Sampler = Field(
        default_factory=Sampler,
        description="Who suggests; a name alone will do.",
        examples=[{"name": "tpe"}],
    )
    pruner: Pruner = Field(
        default_factory=Pruner,
        description="Who stops trials early; a name alone will do.",
        examples=[{"name": "extrapolation"}],
    )
    priority: int = Field(
        1,
        ge=1,
        le=1000,
        description="Weight by which studies share the workers.",
        examples=[1],
    )

    requires: Requires = Field(
        default_factory=Requires,
        description="What a worker must have to train it.",
        examples=[{"device": "cuda", "min_memory_gb": 15}],
    )

    @validate_field("sampler", "pruner", mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @validate_model(mode="before")
    @classmethod
    def _fill_in_search(cls, data: Any) -> Any:
        """Give each strength that is not named its default range, which depends on training.

        What is searched and makes shapes begins at its first choice where nothing else is named.
        """
        if not isinstance(data, Mapping) or data.get("search") == {}:
            return data
        search = data.get("search", {})
        if not isinstance(search, Mapping):
            return data
        data = _begin_at_first_choices(data, search)
        try:
            training = Training.model_validate(data.get("training", {}))
        except ValidationError:
            # The person is told of the training alone: its errors come up again by themselves.
            training = Training()
        optimizers = _known_optimizers(search)
        defaults = default_search(training, optimizers)
        preset = data.get("preset")
        if isinstance(preset, str) and preset in get_args(PresetName):
            has_labels = _has_labels(data.get("task"))
            defaults |= preset_search(preset, training, optimizers, has_labels=has_labels)
        return {**data, "search": defaults | dict(search)}

    @validate_field("search", mode="before")
    @classmethod
    def _check_search_given(cls, value: Any) -> Any:
        if value == {}:
            raise PydanticCustomError(
                "empty",
                "names no parameter; leave search out for the default ranges, or name one of "
                "{known}",
                {"known": ", ".join(Search.model_fields)},
            )
        return value

    @validate_model(mode="after")
    def _check_together(self) -> Self:
        """Check what concerns several fields; whatever is wrong is told at once.

        A check that takes another one for granted is left out where that finds a fault.
        """
        checks: tuple[tuple[Callable[[], None], Callable[[], None] | None], ...] = (
            (self._check_augmentation, None),
            (self._agree_on_decay, None),
            (self._check_settings, None),
            (self._check_sampler_knows_conditions, None),
            (self._check_grid, None),
            (self._check_pruner_may_act, None),
            (self._check_reference_points_fit, None),
            (self._check_reference_shape, self._check_settings),
            (self._agree_on_learning_rate, self._check_reference_shape),
        )
        faults: list[str] = []
        passed: list[Callable[[], None]] = []
        for check, granted in checks:
            if granted is not None and granted not in passed:
                continue
            try:
                check()
            except PydanticCustomError as error:
                faults.append(error.message())
            else:
                passed.append(check)
        if faults:
            raise PydanticCustomError(
                FAULTS, "{told}", {"told": "; ".join(faults), "faults": faults}
            )
        return self

    def _check_augmentation(self) -> None:
        if any(self.search.augment_strength.numbers()) and not self.training.augment:
            raise PydanticCustomError(
                "augment",
                "search.augment_strength says how far training.augment goes, which names nothing; "
                "name some of {known} there",
                {"known": ", ".join(AUGMENTATIONS)},
            )
        if (
            self.training.augment
            and isinstance(self.task, TaskSpec)
            and self.task.dataset in TABULAR
        ):
            raise PydanticCustomError(
                "augment",
                "training.augment changes images, but the rows of {dataset} are none; leave it "
                "out, or search mixup or input_noise",
                {"dataset": self.task.dataset},
            )

    def _agree_on_decay(self) -> None:
        """Let each optimizer that is searched decay in its own form, unless one is named."""
        if self.search.optimizer is None:
            return
        optimizers = self.search.optimizer.root
        if "adamw" in optimizers and self.training.decay_of("adamw") == "coupled":
            raise PydanticCustomError(
                "decay",
                "training.decay is coupled, but search.optimizer has adamw, whose decay is "
                "decoupled; leave training.decay out, so that each optimizer has its own, or "
                "search adam instead",
            )
        self.__dict__["training"] = self.training.with_searched_optimizer()

    def _check_settings(self) -> None:
        """Check the choices of settings, one by one and then together."""
        choices = {name: options.root for name, options in self.search.model.items()}
        for name in choices:
            self._check_is_setting(name)
        alone = [{name: value} for name, values in choices.items() for value in values]
        together = product(*choices.values()) if len(choices) > 1 else ()
        for settings in [*alone, *(dict(zip(choices, values, strict=True)) for values in together)]:
            try:
                self.task.with_settings(settings)
            except ValidationError as error:
                raise self._unfit(settings, error) from None

    def _check_is_setting(self, name: str) -> None:
        if name in NO_SETTINGS:
            raise PydanticCustomError(
                "setting",
                "search.model.{name} is no setting, but another field of task, which cannot be "
                "searched",
                {"name": name},
            )
        schema = self.task.schema_of_settings
        if schema is not None and name not in schema.model_fields:
            raise PydanticCustomError(
                "setting",
                "search.model.{name} is no setting of {task}; known: {known}",
                {
                    "name": name,
                    "task": str(self.task),
                    "known": ", ".join(schema.model_fields) or "none",
                },
            )

    def _unfit(self, settings: Mapping[str, Any], error: ValidationError) -> PydanticCustomError:
        (name, value), *others = (
            (name, self.search.model[name].label(value)) for name, value in settings.items()
        )
        return PydanticCustomError(
            "setting",
            "search.model.{name} cannot be {value}{beside}: {why}",
            {
                "name": name,
                "value": value,
                "beside": "".join(f" beside {other} {label}" for other, label in others),
                "why": in_plain_words(error.errors()[0]),
            },
        )

    def _check_reference_shape(self) -> None:
        """Let the reference points, which keep to task and training, be of a searched shape."""
        for name, options in self.search.shaping().items():
            own = value_at(name, self.task, self.training)
            if own not in options.root:
                place = name.removeprefix(MODEL_PREFIX)
                raise PydanticCustomError(
                    "shape",
                    "search.{name} must have {own} among its choices, because {where} is that and "
                    "the reference points keep to it",
                    {
                        "name": name,
                        "own": str(own),
                        "where": f"task.{place}" if place != name else f"training.{name}",
                    },
                )

    def _agree_on_learning_rate(self) -> None:
        """Let a learning rate that is not searched be one value, wherever it was named."""
        fixed = self.search.under(self.training.optimizer)["learning_rate"]
        if not isinstance(fixed, Fixed) or fixed.root == self.training.learning_rate:
            return
        if "learning_rate" in self.training.model_fields_set:
            raise PydanticCustomError(
                "learning_rate",
                "search.learning_rate is fixed at {fixed}, but training.learning_rate is {named}; "
                "name one of them",
                {"fixed": fixed.root, "named": self.training.learning_rate},
            )
        self.__dict__["training"] = self.training.model_copy(update={"learning_rate": fixed.root})

    def _check_sampler_knows_conditions(self) -> None:
        conditional = self.search.conditional
        if conditional and self.sampler.name in ("cmaes", "gp"):
            raise PydanticCustomError(
                "condition",
                "search.{name} differs by optimizer, and the sampler {sampler} would draw it "
                "at random; take tpe, random, qmc or grid, or give it one range",
                {"name": conditional[0], "sampler": self.sampler.name},
            )

    def _check_grid(self) -> None:
        if self.sampler.name != "grid":
            return
        for dimension in self.search.dimensions():
            parameter = dimension.parameter
            if isinstance(parameter, Range) and not isinstance(parameter.low, int):
                raise PydanticCustomError(
                    "grid",
                    "the sampler grid needs a list of choices for every searched parameter, but "
                    "search.{name} is a range",
                    {"name": dimension.name},
                )
        size = sum(math.prod(map(len, axes.values())) for axes in self.grids())
        if size > MAX_GRID_POINTS:
            raise PydanticCustomError(
                "grid", "the grid has {size} points, more than can be numbered", {"size": size}
            )
        points = REFERENCE_TRIALS + size
        if "trials" not in self.budget.model_fields_set:
            self.__dict__["budget"] = self.budget.model_copy(update={"trials": points})
        if self.budget.trials > points:
            raise PydanticCustomError(
                "grid",
                "the grid has {size} points; with the two reference points ask for at most "
                "{points} trials",
                {"size": size, "points": points},
            )

    def _check_pruner_may_act(self) -> None:
        first, epochs = self.pruner.first_epoch, self.training.max_epochs
        if first is not None and first >= epochs:
            raise PydanticCustomError(
                "pruner",
                "pruner.first_epoch must be smaller than training.max_epochs, which is {epochs}, "
                "but {first} is given; take pruner: none to prune no trial",
                {"epochs": epochs, "first": first},
            )

    def _check_reference_points_fit(self) -> None:
        least = min(REFERENCE_TRIALS, self.budget.trials) * self.training.max_epochs
        if self.budget.trial_epochs is not None and self.budget.trial_epochs < least:
            raise PydanticCustomError(
                "budget",
                "budget.trial_epochs must be at least {least}, so that the reference points can "
                "train for max_epochs, but {given} is given",
                {"least": least, "given": self.budget.trial_epochs},
            )

    @property
    def first_prunable_epoch(self) -> int:
        """No pruner acts before this epoch, counted from 1."""
        share = 5 if self.pruner.name == "extrapolation" else 3
        return self.pruner.first_epoch or max(1, self.training.max_epochs // share)

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers that its trials use."""
        return self.search.optimizer.root if self.search.optimizer else (self.training.optimizer,)

    def grids(self) -> list[dict[str, Sequence[Any]]]:
        """The points of each parameter on a grid, by Optuna's names; one grid for each optimizer.

        One for all of them where no strength differs by optimizer.
        """
        dimensions = self.search.dimensions()
        if not self.search.conditional:
            return [{d.label: grid_values(d.parameter) for d in dimensions}]
        return [
            {
                d.label: (optimizer,) if d.name == "optimizer" else grid_values(d.parameter)
                for d in dimensions
                if d.belongs_to(optimizer)
            }
            for optimizer in self.optimizers
        ]

    def shape_of(self, params: Mapping[str, Any]) -> str:
        """Return the shape of a trial with these values."""
        return write_shape({name: params[name] for name in self.search.shaping()})

    def shapes_with_every_option(self) -> list[str]:
        """Return the reference points' shape, and those that differ from it in one option."""
        shaping = self.search.shaping()
        own = {name: value_at(name, self.task, self.training) for name in shaping}
        others = [
            {**own, name: option}
            for name, options in shaping.items()
            for option in options.root
            if option != own[name]
        ]
        return [write_shape(values) for values in (own, *others)]

    def at(self, shape: str) -> "StudySpec":
        """Return the study as the trials of a shape see it."""
        values = read_shape(shape)
        if not values:
            return self
        task, training = shaped(values, self.task, self.training)
        strengths = self.search.under(training.optimizer)
        search = self.search.model_copy(
            update={**strengths, "optimizer": None, "batch_size": None, "model": {}}
        )
        return self.model_copy(update={"task": task, "training": training, "search": search})

    def canonical(self) -> dict[str, Any]:
        """The spec as JSON data, every default filled in: two equal studies give equal data."""
        return self.model_dump(mode="json")


def _begin_at_first_choices(
    data: Mapping[str, Any], search: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Let task and training say what the reference points have of what makes shapes."""
    model = search.get("model")
    if "task" in data:
        data = {**data, "task": from_name(data["task"])}
    training, task = data.get("training", {}), data.get("task")
    trained = {name: search.get(name) for name in ("optimizer", "batch_size")}
    firsts = {
        "training": _fitting(_firsts(trained), training, Training),
        "task": _fitting(_firsts(_known_settings(model, task)), task, _schema_of_settings(task)),
    }
    filled = {
        part: {**values, **data.get(part, {})}
        for part, values in firsts.items()
        if values and isinstance(data.get(part, {}), Mapping)
    }
    return {**data, **filled}


def _fitting(
    firsts: Mapping[str, Any], posted: Any, schema: type[BaseModel] | None
) -> Mapping[str, Any]:
    """Return the first choices that are no mistake beside what was posted.

    A mistake is told of where it was made, under search, and nowhere else.
    """
    if schema is None or not isinstance(posted, Mapping):
        return firsts
    values = {**firsts, **posted}
    try:
        schema.model_validate({n: values[n] for n in values if n in schema.model_fields})
    except ValidationError as error:
        own = firsts.keys() - posted.keys()
        at_fault = {detail["loc"][:1] for detail in error.errors()}
        unfit = own if () in at_fault else {name for name in own if (name,) in at_fault}
        if unfit:
            return _fitting({n: firsts[n] for n in firsts if n not in unfit}, posted, schema)
    return firsts


def _has_labels(task: Any) -> bool:
    """Return whether a class is predicted, as far as a task says.

    A task by its name may have a loss of its own, so it must say so by its score.
    """
    task = from_name(task)
    if not isinstance(task, Mapping):
        return False
    if "name" in task or task.get("score") in REGRESSION_SCORES:
        return task.get("score") in CLASSIFICATION_SCORES
    dataset, data = str(task.get("dataset")), task.get("data")
    kind = data.get("kind") if isinstance(data, Mapping) else None
    schema = DATASET_SETTINGS.get(dataset)
    if kind is None and schema is not None and "kind" in schema.model_fields:
        kind = schema.model_fields["kind"].default
    return kind != "regression" and dataset not in REGRESSION_DATASETS


def _known_settings(choices: Any, task: Any) -> Mapping[str, Any]:
    """Return those choices of settings that the task may have, as far as that is known here."""
    if not isinstance(choices, Mapping) or not isinstance(task, Mapping):
        return {}
    schema = _schema_of_settings(task)
    return {
        name: values
        for name, values in choices.items()
        if (
            re.fullmatch(SETTING_PATTERN, str(name)) and name not in NO_SETTINGS
            if schema is None
            else name in schema.model_fields
        )
    }


def _schema_of_settings(task: Any) -> type[BaseModel] | None:
    """Return what the settings of a posted task may be, as far as that is known here."""
    model = task.get("model") if isinstance(task, Mapping) else None
    return MODEL_SETTINGS.get(model) if isinstance(model, str) else None


def _firsts(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: values[0]
        for name, values in choices.items()
        if isinstance(values, list | tuple) and values
    }


def _known_optimizers(search: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the optimizers that are searched; none if they are not what they should be."""
    try:
        return Options[Optimizer].model_validate(search["optimizer"]).root
    except (KeyError, ValidationError):
        return ()
