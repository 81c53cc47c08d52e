"""The OpenAPI document: FastAPI's own, but errors are problem documents."""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from service.problems import MEDIA_TYPE, Problem

PROBLEM: dict[int | str, dict[str, Any]] = {
    "default": {"model": Problem, "description": "Whatever goes wrong: a problem document."}
}
"""What every operation may answer besides; FastAPI would otherwise list errors of its own."""


def describe(app: FastAPI) -> None:
    """Give problem documents their media type in an app's OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for operation in _operations(document):
            operation["responses"]["default"]["content"] = {
                MEDIA_TYPE: {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}
            }
        return document

    # FastAPI says to replace the method like this.
    app.openapi = openapi  # type: ignore[method-assign]


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document["paths"].values():
        yield from path.values()
