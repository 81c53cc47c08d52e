"""Every setting, read once from ``REGTUNE_*`` environment variables and passed in from there."""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from regtune.spec import MAX_BODY_BYTES


class Settings(BaseSettings):
    """Settings of the service, the worker and the command line."""

    model_config = SettingsConfigDict(
        env_prefix="REGTUNE_", frozen=True, extra="ignore", allow_inf_nan=False
    )

    database_url: str | None = Field(
        None, description="PostgreSQL, as postgresql://user:password@host:port/database."
    )
    direct_database_url: str | None = Field(
        None,
        description="Address around a proxy that pools transactions, where REGTUNE_DATABASE_URL "
        "is one.",
    )
    url: str = Field("http://127.0.0.1:8700", description="Where the client finds the service.")
    host: str = Field("127.0.0.1", description="Address that the service listens on.")
    hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names by which clients may call the service, with commas between: its own, "
        "or those of a proxy in front of it. On its own machine it is localhost besides. Default: "
        "any, if it listens for other machines; else none.",
    )
    port: int = Field(8700, ge=0, le=65_535, description="Port that the service listens on.")
    home: Path = Field(Path(".regtune"), description="Folder of the embedded database and logs.")
    data_dir: Path = Field(
        Path.home() / ".cache" / "regtune", description="Where data sets are kept and downloaded."
    )
    data_roots: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Folders and addresses, with commas between, under which a study may name "
        "files for a worker to read; the data folder is always one.",
    )
    data_on_device: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether a worker keeps all rows on its device: auto, if they take no more "
        "than half of what is free there. Else they stay on the host, and batches are streamed.",
    )
    tasks: Annotated[Mapping[str, str], NoDecode] = Field(
        {},
        description="Tasks of one's own that are not installed by an entry point, as "
        "name=package.module:Class, with commas between.",
    )
    pool_size: int = Field(
        5,
        ge=1,
        le=1000,
        description="Most connections of a pool. A service has two pools, for requests and for the "
        "dashboard, and three connections beside them; a worker has one, of two connections at the "
        "most, and one connection beside it.",
    )
    lease_seconds: float = Field(30.0, gt=0, description="How long a lease lasts unrenewed.")
    flush_seconds: float = Field(0.5, ge=0, description="Epochs are recorded at most this often.")
    poll_seconds: float = Field(2.0, gt=0, description="Slow poll behind the notifications.")
    stay_seconds: float = Field(
        10.0,
        ge=0,
        description="A worker changes studies when its own has had so many seconds of it more than "
        "its due.",
    )
    lanes: int | None = Field(None, ge=1, le=4096, description="Lanes of a worker; else measured.")
    checkpoints: str | None = Field(
        None,
        description="Where workers keep checkpoints: a folder, or an address of fsspec such as "
        "s3://bucket/folder; by default the folder `checkpoints` in the data folder.",
    )
    checkpoint_seconds: float = Field(30.0, gt=0, description="How often trials are checkpointed.")
    sweep_seconds: float = Field(
        600.0,
        gt=0,
        description="How often a worker, between two stacks, removes checkpoints nobody needs.",
    )
    hung_seconds: float = Field(
        120.0, gt=0, description="A worker that takes no step for so long ends, for a new one."
    )
    build_seconds: float = Field(
        3600.0,
        gt=0,
        description="A worker that loads a study's data and builds its model for so long ends, for "
        "a new one.",
    )
    max_attempts: int = Field(3, ge=1, description="A trial that has lost so many leases fails.")
    max_consecutive_failures: int = Field(
        10, ge=1, description="A study with so many failed trials in a row fails."
    )
    max_body_bytes: int = Field(MAX_BODY_BYTES, ge=1024, description="Largest request body.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="The least that is logged, to standard error: debug, info, warning or error.",
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="How: console, for people, or json, an object a line."
    )

    @property
    def proxied(self) -> bool:
        """Whether REGTUNE_DATABASE_URL is a proxy's, see ``database.connect``."""
        return self.direct_database_url is not None

    @property
    def suspect_from(self) -> int:
        """How many lost leases make a trial a suspect, which trains alone, and so fails alone.

        One whose next lost lease would be its last.
        """
        return max(1, self.max_attempts - 1)

    @field_validator("data_roots", "hosts", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return _parts(value)

    @field_validator("hosts")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_host_name, names))

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_names_from_classes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in _parts(value)]
        for name, _, where in pairs:
            if not name.strip() or not re.fullmatch(_CLASS, where.strip()):
                raise ValueError(
                    f"{name!r} is not given as name=package.module:Class, but as {where!r}"
                )
        return {name.strip(): where.strip() for name, _, where in pairs}


_CLASS = r"\w+(\.\w+)*:\w+(\.\w+)*"


def _host_name(text: str) -> str:
    """Return a machine's name or address as it is compared."""
    name = text.lower().removeprefix("[").removesuffix("]").rstrip(".")
    try:
        return str(ip_address(name))
    except ValueError:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
            raise ValueError(
                f"{text!r} is no name of a machine: give it without scheme, port and path, as in "
                "tuner.example"
            ) from None
        return name


def _parts(text: str) -> tuple[str, ...]:
    """Return what stands between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
