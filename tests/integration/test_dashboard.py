import re
from typing import Any

import httpx
import optuna
import pytest
from optuna_dashboard import wsgi
from sqlalchemy import Engine, text

from regtune import studies
from regtune.database import transaction
from tests import builders
from tests.audit import audit

NOTES = {
    ("PUT", "/api/studies/<study_id:int>/note"),
    ("PUT", "/api/studies/<study_id:int>/<trial_id:int>/note"),
}


def routes() -> list[tuple[str, str]]:
    """Every route of the dashboard that is installed, with its method."""
    app: Any = wsgi(optuna.storages.InMemoryStorage())
    return [(route.method, route.rule) for route in app.routes]


def filled_in(rule: str, study_id: int, trial_id: int) -> str:
    """A path that a rule of the dashboard's matches."""
    path = rule.replace("<study_id:int>", str(study_id)).replace("<trial_id:int>", str(trial_id))
    return re.sub(r"<artifact_id[^>]*>", "ab-12", path).replace("<history_id>", "h")


@pytest.fixture
def study(engine: Engine) -> studies.Study:
    """A study with one trial complete, one running and one waiting."""
    study = builders.create(engine)
    builders.append(engine, study, 3)
    builders.complete(engine, builders.lease(engine, study))
    builders.lease(engine, study)
    return study


def contents(engine: Engine) -> list[tuple[object, ...]]:
    """Every row of every table that holds a study or a part of one."""
    with engine.connect() as connection:
        names = connection.execute(
            text(
                "SELECT table_schema || '.' || table_name FROM information_schema.tables"
                " WHERE table_schema IN ('public', 'regtune') AND table_type = 'BASE TABLE'"
                " ORDER BY 1"
            )
        ).scalars()
        return [
            (name, *row)
            for name in names
            for row in connection.execute(text(f"SELECT t::text FROM {name} t ORDER BY 1"))
        ]


def test_whatever_writes_is_refused_but_notes(
    client: httpx.Client, engine: Engine, study: studies.Study
) -> None:
    before = contents(engine)
    refused = [
        route for route in routes() if route[0] not in ("GET", "HEAD") and route not in NOTES
    ]
    assert len(refused) >= 10
    for method, rule in refused:
        for suffix in ("", "/"):
            path = filled_in(rule, study.study_id, 1) + suffix
            body = {"study_name": "x", "directions": ["minimize"], "state": "Fail", "user_attrs": 1}
            response = client.request(method, path, json=body)
            assert response.status_code == (403 if path.startswith("/api") else 404), path
            assert response.headers["content-type"] == "application/problem+json"
    assert contents(engine) == before


def test_a_refusal_names_the_call_to_use_instead(client: httpx.Client) -> None:
    for method, path, instead in (
        ("POST", "/api/studies", "POST /v1/studies"),
        ("POST", "/api/studies/1/rename", "POST /v1/studies"),
        ("DELETE", "/api/studies/1", "DELETE /v1/studies/{name}"),
        ("POST", "/api/trials/1/tell", "POST /v1/studies/{name}/stop"),
        ("POST", "/api/trials/1/user-attrs", "/docs"),
        ("PATCH", "/api/anything", "/docs"),
    ):
        problem = client.request(method, path, json={}).json()
        assert problem["type"] == "urn:regtune:problem:dashboard-looks-on"
        assert instead in problem["detail"]
        # Its own pages show this member.
        assert problem["reason"] == problem["detail"]


def test_notes_can_be_written_on_live_and_ended_studies_and_their_trials(
    client: httpx.Client, engine: Engine, study: studies.Study
) -> None:
    with engine.connect() as connection:
        trial_ids = connection.execute(text("SELECT trial_id FROM public.trials")).scalars().all()
    paths = ["/note", *(f"/{trial_id}/note" for trial_id in trial_ids)]

    def write(version: int) -> None:
        for path in paths:
            note = {"version": version, "body": f"note {version} at {path}"}
            response = client.put(f"/api/studies/{study.study_id}{path}", json=note)
            assert response.status_code == 204

    write(1)
    with transaction(engine) as session:
        studies.act(session, study.name, "cancel", "test")
    write(2)
    detail = client.get(f"/api/studies/{study.study_id}").json()
    assert detail["note"]["body"] == "note 2 at /note"
    assert audit(engine) == {}
    assert client.delete(f"/v1/studies/{study.name}").status_code == 204


def test_a_note_that_is_too_long_is_refused(client: httpx.Client, study: studies.Study) -> None:
    note = {"version": 1, "body": "x" * 300_000}
    response = client.put(f"/api/studies/{study.study_id}/note", json=note)
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"


def test_the_dashboard_shows_trials_as_they_end(
    client: httpx.Client, engine: Engine, study: studies.Study
) -> None:
    def shown() -> list[str]:
        detail = client.get(f"/api/studies/{study.study_id}").json()
        return [trial["state"] for trial in detail["trials"]]

    assert shown() == ["Complete", "Running", "Waiting"]
    (summary,) = client.get("/api/studies").json()["study_summaries"]
    assert (summary["study_name"], summary["directions"]) == ("study", ["minimize"])


def test_a_deleted_study_is_gone_from_the_dashboard_and_its_name_is_free(
    client: httpx.Client, engine: Engine, study: studies.Study
) -> None:
    reads = [f"/api/studies/{study.study_id}", f"/csv/{study.study_id}"]
    for path in reads:
        assert client.get(path).is_success
    client.post(f"/v1/studies/{study.name}/cancel")
    assert client.delete(f"/v1/studies/{study.name}").status_code == 204
    assert client.get("/api/studies").json() == {"study_summaries": []}
    for path in reads:
        assert client.get(path).status_code == 404, path
    again = builders.create(engine)
    builders.append(engine, again, 1)
    detail = client.get(f"/api/studies/{again.study_id}").json()
    assert [trial["state"] for trial in detail["trials"]] == ["Waiting"]


def test_the_root_leads_to_the_dashboard(client: httpx.Client) -> None:
    assert client.get("/").headers["location"].endswith("/dashboard")
    for path in ("/dashboard", "/dashboard/studies/1"):
        page = client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        script = re.search(r'src="(/static/[^"]+\.js)"', page.text)
        assert script is not None
        assert client.get(script[1]).is_success
