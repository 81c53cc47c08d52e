from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from regtune.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def row(name: str, field: FieldInfo) -> str:
    """What the page says of a setting."""
    return f"| `REGTUNE_{name.upper()}` | {shown(field.default)} | {field.description} |"


def shown(default: Any) -> str:
    """A default as a person would write it."""
    if default is None or default in ((), {}):
        return "–"
    if isinstance(default, Path):
        return f"`{str(default).replace(str(Path.home()), '~')}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_the_page_says_of_every_setting_what_the_code_does() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    settings = Settings.model_fields
    assert sorted(rows) == sorted(row(name, field) for name, field in settings.items())


def test_names_of_the_service_are_given_with_commas_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("REGTUNE_HOSTS", "Tuner.example., tuner,[fd00::5], 10.0.0.7")
    assert Settings().hosts == ("tuner.example", "tuner", "fd00::5", "10.0.0.7")


@pytest.mark.parametrize("name", ["tuner:8700", "https://tuner", "*.example", "tuner/", "[]"])
def test_what_no_request_can_name_is_no_name_of_the_service(name: str) -> None:
    with pytest.raises(ValidationError, match="is no name of a machine"):
        Settings(hosts=(name,))


@pytest.mark.parametrize("value", ["inf", "nan", "0"])
def test_a_time_that_never_ends_is_no_setting(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("REGTUNE_LEASE_SECONDS", value)
    with pytest.raises(ValidationError, match="lease_seconds"):
        Settings()
