"""What can go wrong, as one small tree; a class's docstring is its message.

HTTP status codes are the service's business: see ``service/problems.py``.
"""

from dataclasses import dataclass


def storable(text: str) -> str:
    """Return a text as PostgreSQL can keep it: it knows neither NUL nor half a surrogate pair.

    What a user's code raises may hold both, as a word from a field of fixed width does, or a file's
    name that is not UTF-8.
    """
    return text.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


class RegtuneError(Exception):
    """Something that regtune refuses to do."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").splitlines()[0])


@dataclass(frozen=True)
class FieldError:
    """One field that is wrong, and what would be right."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidSpec(RegtuneError):
    """The study cannot be run as it is written."""

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = errors


class NotFound(RegtuneError):
    """There is nothing under that name."""


class NoBestYet(NotFound):
    """No trial of this study has completed yet, so there is no best one."""


class StudyDiffers(RegtuneError):
    """A study of this name exists already, with another spec."""


class StudyActive(RegtuneError):
    """The study is still active; stop or cancel it first."""


class StudyOver(RegtuneError):
    """The study has ended; what is over cannot be changed."""


class BudgetSpent(RegtuneError):
    """The budget cannot be less than what is used up or promised already."""


class StaleView(RegtuneError):
    """Another scheduler has appended trials to this study in the meantime."""


class UnknownSchema(RegtuneError):
    """The database's schema is not the one that this version knows."""


class StudyUnreadable(RegtuneError):
    """Another version of regtune has written this study, and this one cannot read it."""

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        known = "; ".join(str(error) for error in errors)
        super().__init__(f"another version of regtune has written this study: {known}")


class DatabaseUnavailable(RegtuneError):
    """The database cannot be reached."""


class RightsMissing(RegtuneError):
    """The database's role lacks a right that regtune needs."""


class InvalidData(RegtuneError):
    """The study's data set cannot be trained on as it is; a task may raise it, too."""


class DataMissing(InvalidData):
    """The study's data set is not where this worker could read it; another one may have it."""


class FolderUnusable(RegtuneError):
    """A folder of this machine cannot be written to."""


class AddressTaken(RegtuneError):
    """The service cannot listen on its address."""
