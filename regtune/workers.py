"""The workers: who they are, what they can train, how many lanes they want filled."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from regtune import shares, tables
from regtune.task import Offer

FORGOTTEN_DAYS = 30
"""Spot machines and containers have a new name each time; their rows would pile up for ever."""


@dataclass(frozen=True)
class Worker:
    """A worker as it last said of itself; ``alive`` if that was not long ago.

    ``occupancy`` is the share of its lanes that trained, from 0 to 1, over the epochs of its study
    so far in which trials were waiting. ``capacity`` is how the number of lanes was found.
    """

    name: str
    host: str
    pid: int
    device: str
    device_kind: str
    memory_bytes: int | None
    lanes: int
    wanted_lanes: int
    occupancy: float | None
    capacity: Mapping[str, Any] | None
    datasets: Sequence[str]
    models: Sequence[str]
    tasks: Sequence[str]
    study: str | None
    started_at: datetime
    heartbeat_at: datetime
    alive: bool


def register(
    session: Session,
    *,
    name: str,
    host: str,
    pid: int,
    device: str,
    device_kind: str = "cpu",
    memory_bytes: int | None = None,
    lanes: int,
    offer: Offer,
) -> None:
    """Write a worker's row; one that starts again under its old name gets no rights from it.

    ``device_kind`` is torch's word for it; ``memory_bytes`` is all that the device has, or the
    machine where it is a CPU. Workers not heard of for ``FORGOTTEN_DAYS`` are forgotten.
    """
    session.execute(
        _REGISTER,
        {
            "name": name,
            "host": host,
            "pid": pid,
            "device": device,
            "device_kind": device_kind,
            "memory_bytes": memory_bytes,
            "lanes": lanes,
            "datasets": sorted(offer.datasets),
            "models": sorted(offer.models),
            "tasks": sorted(offer.tasks),
        },
    )
    # Last, and waiting for nobody: two that register at once could else wait for each other.
    session.execute(_FORGET, {"days": FORGOTTEN_DAYS})


def beat(
    session: Session,
    name: str,
    *,
    wanted_lanes: int,
    study_id: int | None,
    lanes: int | None = None,
    occupancy: float | None = None,
    capacity: Mapping[str, Any] | None = None,
) -> bool:
    """Say that a worker lives, how many lanes it wants filled and which live study it trains.

    Return whether it is known; whoever has been forgotten has to register again.

    ``lanes``, ``occupancy`` and ``capacity`` stay as they are where they are None. The fields of
    ``capacity`` are ``lanes``, ``reason`` and, where they are known, ``bytes_per_lane``,
    ``trial_epochs_per_second`` and ``data``.
    """
    found = session.execute(
        _BEAT,
        {
            "name": name,
            "wanted_lanes": wanted_lanes,
            "study_id": study_id,
            "lanes": lanes,
            "occupancy": occupancy,
            "capacity": json.dumps(capacity) if capacity else None,
        },
    )
    return found.first() is not None


def leave(session: Session, name: str, host: str, pid: int) -> None:
    """Say that a worker has stopped, unless another process has its name by now."""
    session.execute(
        text(
            "UPDATE regtune.workers SET stopped_at = now(), wanted_lanes = 0, study_id = NULL"
            " WHERE name = :name AND host = :host AND pid = :pid"
        ),
        {"name": name, "host": host, "pid": pid},
    )


def everyone(
    session: Session, alive_seconds: float, *, alive: bool | None = None
) -> Sequence[Worker]:
    """Return all workers, living ones first; or only those that are ``alive``, or are not."""
    rows = session.execute(_EVERYONE, {"alive_seconds": alive_seconds, "alive": alive})
    return [Worker(**row._mapping) for row in rows]


def offered(session: Session, alive_seconds: float) -> Offer:
    """Return the data sets, models and tasks that at least one living worker has."""
    living = everyone(session, alive_seconds, alive=True)
    return Offer(
        datasets=frozenset(name for worker in living for name in worker.datasets),
        models=frozenset(name for worker in living for name in worker.models),
        tasks=frozenset(name for worker in living for name in worker.tasks),
    )


def refusals(session: Session, study_id: int) -> Mapping[str, str]:
    """Return why workers train no trial of a study now, by their names.

    They have other data than the study began with, until they are restarted; or they lacked what it
    takes, such as room or a file, and have not tried again since.
    """
    rows = session.execute(_REFUSALS, {"study_id": study_id})
    return {row.name: row.reason for row in rows}


def others_may_train(session: Session, study_id: int, worker: str, alive_seconds: float) -> bool:
    """Say whether another living worker could train a study, and has not refused to.

    One that only lacked room may have it later.
    """
    found = session.execute(
        _OTHERS, {"study_id": study_id, "worker": worker, "alive_seconds": alive_seconds}
    )
    return found.first() is not None


_FORGET = text("""
DELETE FROM regtune.workers
WHERE name IN (SELECT name FROM regtune.workers
               WHERE heartbeat_at < now() - make_interval(days => :days)
               FOR UPDATE SKIP LOCKED)
""")

_REGISTER = text("""
INSERT INTO regtune.workers (name, host, pid, device, device_kind, memory_bytes, lanes,
                             wanted_lanes, datasets, models, tasks, started_at,
                             heartbeat_at)
VALUES (:name, :host, :pid, :device, :device_kind, :memory_bytes, :lanes, :lanes,
        to_jsonb(cast(:datasets AS text[])), to_jsonb(cast(:models AS text[])),
        to_jsonb(cast(:tasks AS text[])), now(), now())
ON CONFLICT (name) DO UPDATE
SET host = excluded.host, pid = excluded.pid, device = excluded.device,
    device_kind = excluded.device_kind, memory_bytes = excluded.memory_bytes,
    lanes = excluded.lanes,
    wanted_lanes = excluded.wanted_lanes, datasets = excluded.datasets,
    models = excluded.models, tasks = excluded.tasks, started_at = excluded.started_at,
    heartbeat_at = excluded.heartbeat_at, study_id = NULL, stopped_at = NULL,
    occupancy = NULL, capacity = NULL
""")

_BEAT = text(f"""
UPDATE regtune.workers
SET heartbeat_at = now(), wanted_lanes = :wanted_lanes,
    study_id = (SELECT s.study_id FROM regtune.studies s
                WHERE s.study_id = :study_id AND {tables.IS_LIVE}),
    lanes = coalesce(cast(:lanes AS int), lanes),
    occupancy = coalesce(cast(:occupancy AS double precision), occupancy),
    capacity = coalesce(cast(:capacity AS jsonb), capacity)
WHERE name = :name
RETURNING name
""")

_EVERYONE = text(f"""
SELECT w.name, w.host, w.pid, w.device, w.device_kind, w.memory_bytes, w.lanes,
       w.wanted_lanes, w.occupancy, w.capacity, w.datasets, w.models, w.tasks,
       s.name AS study, w.started_at, w.heartbeat_at, living.alive
FROM regtune.workers w LEFT JOIN regtune.studies s USING (study_id), LATERAL (
    SELECT {shares.ALIVE} AS alive) living
WHERE living.alive = coalesce(cast(:alive AS boolean), living.alive)
ORDER BY living.alive DESC, w.name
""")

_REFUSALS = text("""
SELECT w.name, e.detail ->> 'reason' AS reason
FROM regtune.events e JOIN regtune.workers w ON w.name = e.actor AND e.at >= w.started_at
WHERE e.study_id = :study_id AND e.kind = 'study_refused'
  AND (e.detail ->> 'tries_again_in_seconds' IS NULL OR now() <
       e.at + make_interval(secs => cast(e.detail ->> 'tries_again_in_seconds' AS float)))
ORDER BY e.event_id
""")

_OTHERS = text(f"""
SELECT FROM regtune.workers w JOIN regtune.studies s ON s.study_id = :study_id
WHERE w.name <> :worker AND {shares.ALIVE} AND {shares.SUITS}
  AND NOT EXISTS (SELECT FROM regtune.events e
                  WHERE e.study_id = s.study_id AND e.kind = 'study_refused'
                    AND e.detail ->> 'lacks' <> 'room'
                    AND e.actor = w.name AND e.at >= w.started_at)
LIMIT 1
""")
