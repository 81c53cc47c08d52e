"""Two workers and the service, with a proxy between them and the database."""

import json
from collections import Counter
from contextlib import ExitStack

import pytest
from sqlalchemy import Engine, text

from regtune.client import server_sent_events
from tests.audit import audit
from tests.pooling import SESSIONS, pooling_proxy
from tests.serving import service_process
from tests.working import worker_process

TRIALS = 30
STUDY = {
    "name": "pooled",
    "task": {"dataset": "digits", "model": "mlp", "hidden": [8]},
    "training": {"max_epochs": 20, "batch_size": 256},
    "budget": {"trials": TRIALS},
}
DIRECT = {
    "regtune-scheduler-listen": 1,
    "regtune-scheduler-locks": 1,
    "regtune-worker-listen": 2,
}
"""Sessions around the proxy: the scheduler's and each worker's."""


@pytest.mark.slow
def test_a_study_runs_to_its_end_through_a_proxy_that_pools_transactions(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: Counter[str] = Counter()
    with ExitStack() as stack:
        proxy = stack.enter_context(pooling_proxy(engine.url))
        monkeypatch.setenv("REGTUNE_DIRECT_DATABASE_URL", database_url)
        _, client = stack.enter_context(service_process(proxy))
        for name in ("a", "b"):
            stack.enter_context(worker_process(proxy, name, lanes=4))
        assert client.post("/v1/studies", json=STUDY).status_code == 201
        with client.stream("GET", "/v1/studies/pooled/events") as news:
            told = []
            for _, data in server_sent_events(news.iter_lines()):
                told.append(json.loads(data))
                most |= sessions(engine)
        assert told[-1]["detail"]["state"] == "completed"
        assert client.get("/api/studies").is_success  # the dashboard
    assert 1 <= most.pop("through the proxy") <= SESSIONS
    assert most == DIRECT
    assert audit(engine) == {}


def sessions(engine: Engine) -> Counter[str]:
    """How many sessions the database has for others, by who they are; at least none of each."""
    query = text(
        "SELECT CASE WHEN application_name LIKE '% - 127.0.0.1:%' OR application_name = ''"
        " THEN 'through the proxy' ELSE application_name END, count(*)"
        " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
        " GROUP BY 1"
    )
    with engine.connect() as connection:
        return Counter(dict(tuple(row) for row in connection.execute(query)))
