"""What keeps a worker from training a study; see ``regtune.errors`` for the rest."""

from regtune.errors import RegtuneError


class NoRoom(RegtuneError):
    """There is no room on this machine for what the study trains on; another one may have it."""


class NoRoomForModel(NoRoom):
    """There is no room on this machine for training the study's model."""


class DataDiffer(RegtuneError):
    """The rows of the data set are not those that the study began with."""


class TaskFailed(RegtuneError):
    """The task's own code has raised what would otherwise be taken for an error of regtune's."""
