import json
from typing import Any

import pytest
from pydantic import BaseModel, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from regtune.settings import Settings
from regtune.task import TASKS, find_task, installed, make_task, points


class Modelled(BaseModel):
    widths: list[int] = Field(default_factory=lambda: [8, 4])
    depth: int = 2


@pydantic_dataclass
class Checked:
    widths: list[int] = Field(default_factory=lambda: [8, 4])
    depth: int = 2


@pytest.mark.parametrize("factory", [Modelled, Checked])
def test_a_task_may_be_a_pydantic_model_whose_defaults_are_made(factory: Any) -> None:
    made, again = make_task(factory, {}), make_task(factory, {"depth": 3})
    assert (made.widths, made.depth, again.depth) == ([8, 4], 2, 3)
    assert made.widths is not again.widths


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
