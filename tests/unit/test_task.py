import json

import pytest
from pydantic import ValidationError

from regtune.settings import Settings
from regtune.task import TASKS, find_task, installed, points


def test_what_the_configuration_names_is_offered_without_being_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REGTUNE_TASKS", "waves = no.such:Class, decoder=json:JSONDecoder,")
    tasks = Settings().tasks
    assert tasks == {"waves": "no.such:Class", "decoder": "json:JSONDecoder"}
    assert installed(tasks).tasks == {"waves", "decoder"}
    assert points(TASKS, tasks)["waves"].value == "no.such:Class"
    assert find_task("decoder", tasks) is json.JSONDecoder
    with pytest.raises(ModuleNotFoundError):
        find_task("waves", tasks)


@pytest.mark.parametrize("text", ["waves", "=a:B", "waves=a.b", "waves=a:b:c", "waves=../a:B"])
def test_a_configuration_that_names_no_class_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("REGTUNE_TASKS", text)
    with pytest.raises(ValidationError, match=r"name=package\.module:Class"):
        Settings()
