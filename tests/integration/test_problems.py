import base64
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from structlog.testing import capture_logs

from regtune import errors
from service import problems
from tests import builders
from tests.outage import out_of_service
from tests.serving import app, serving

SPEC = {
    "name": "study",
    "task": {"dataset": "digits", "model": "mlp"},
    "budget": {"trials": 5},
}
JSON = {"Content-Type": "application/json"}
YAML = {"Content-Type": "application/yaml"}
MAX_BODY = 256 * 1024


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of a response that is a good one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = json.loads(response.content.decode("ascii"))
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["type"] == "about:blank" or document["type"].startswith("urn:regtune:problem:")
    if status == 422:
        assert document["errors"]
    for leak in ("Traceback", "SELECT", 'File "', "sqlalchemy", "psycopg"):
        assert leak not in response.text
    return document


def post(client: httpx.Client, body: bytes | str, headers: dict[str, str] = JSON) -> httpx.Response:
    return client.post("/v1/studies", content=body, headers=headers)


def with_settings(settings: str) -> str:
    """The spec as JSON, with more settings of a model; of which there is no schema to check."""
    task = '"dataset": "digits", "model": "own"'
    return json.dumps(SPEC | {"task": "TASK"}).replace('"TASK"', f"{{{task}, {settings}}}")


def test_broken_json_is_refused_with_its_place(client: httpx.Client) -> None:
    broken: list[tuple[bytes | str, str]] = [
        ('{"name": "x",}', "line 1, column"),
        ('{"name":\n "x" "y"}', "line 2, column 6"),
        ("", "line 1, column 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        ("9" * 5000, "too many digits"),
        (b'{"name": "\xff"}', "not valid UTF-8 at byte 10"),
        ('{"name": "a", "name": "b"}', "more than once"),
        ("[]", "must be a mapping"),
        ("null", "must be a mapping"),
        ('"study"', "must be a mapping"),
    ]
    for body, where in broken:
        assert where in problem(post(client, body), 422)["detail"]


def test_broken_yaml_is_refused_with_its_place(client: httpx.Client) -> None:
    for body, where in (
        ("name: [1", "line 1, column 9"),
        ("name: a\nname: b", "given twice"),
        ("[" * 10_000, "recursion"),
        ("a: &a [1]\nb: *a", "aliases"),
        ("!!python/object/apply:os.system [ls]", "tag"),
        ('!!int ""', "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("- name", "must be a mapping"),
        ("[" + "1," * 20_000 + "1]", "more than 10000 values"),
    ):
        assert where in problem(post(client, body, YAML), 422)["detail"]


def test_what_a_database_cannot_hold_is_refused_by_name(client: httpx.Client) -> None:
    for settings, field, message in (
        (r'"a": "\u0000"', "task.a", "U+0000"),
        (r'"a\u0000": 1', "task", "not plain text"),
        (r'"a": ["\ud800"]', "task.a.0", "surrogate"),
        (r'"\udfff": 1', "task", "not plain text"),
        ('"a": 1e999', "task.a", "finite"),
        ('"a": NaN', "task.a", "finite"),
        ('"a": {"b": -Infinity}', "task.a.b", "finite"),
        ('"a": 123456789012345678901234567890', "task.a", "2^53"),
        ('"a": ' + "[" * 30 + "]" * 30, "task.a" + ".0" * 19, "levels deep"),
    ):
        (error,) = problem(post(client, with_settings(settings)), 422)["errors"]
        assert error["field"] == field
        assert message in error["message"]


def test_what_only_yaml_can_say_is_refused_by_name(client: httpx.Client) -> None:
    for setting, field in (
        ("a: !!binary aGk=", "task.a"),
        ("a: !!set {b, c}", "task.a"),
        ("1: b", "task"),
        ("? null\n : b", "task"),
        ("a: .nan", "task.a"),
        ('a: "\\0"', "task.a"),
        ('a: "\\ud800"', "task.a"),
    ):
        body = f"name: study\nbudget: {{trials: 5}}\ntask: {{dataset: d, model: m, {setting}}}"
        (error,) = problem(post(client, body, YAML), 422)["errors"]
        assert error["field"] == field, setting


def test_of_very_many_wrong_fields_the_first_are_named(client: httpx.Client) -> None:
    body = json.dumps(SPEC | {f"field{number}": 1 for number in range(5000)})
    document = problem(post(client, body), 422)
    assert document["detail"] == "5000 fields are wrong, the first 100 are listed"
    assert len(document["errors"]) == 100


def test_a_lone_surrogate_in_a_message_does_not_break_the_answer(client: httpx.Client) -> None:
    body = json.dumps(SPEC).replace('"name"', r'"\ud800": 1, "\ud800": 2, "name"')
    problem(post(client, body), 422)


def test_a_body_comes_with_a_type_that_is_known(client: httpx.Client) -> None:
    for content_type in ("text/plain", "application/xml", "", "json", "application/json x"):
        response = post(client, json.dumps(SPEC), {"Content-Type": content_type})
        assert "application/json" in problem(response, 415)["detail"]
    twice = [("Content-Type", "application/json"), ("Content-Type", "text/plain")]
    assert client.post("/v1/studies", content=json.dumps(SPEC), headers=twice).is_success


def padded(size: int) -> bytes:
    body = json.dumps(SPEC).encode()
    return body + b" " * (size - len(body))


def test_a_body_is_read_up_to_its_limit_and_no_further(client: httpx.Client) -> None:
    def in_chunks(body: bytes) -> Iterator[bytes]:
        yield from (body[start : start + 10_000] for start in range(0, len(body), 10_000))

    assert post(client, padded(MAX_BODY)).status_code == 201
    too_long = padded(MAX_BODY + 1)
    assert "262144 bytes" in problem(post(client, too_long), 422)["detail"]
    chunked = client.post("/v1/studies", content=in_chunks(too_long), headers=JSON)
    problem(chunked, 422)
    fitting = client.post("/v1/studies", content=in_chunks(padded(MAX_BODY)), headers=JSON)
    assert fitting.status_code == 200


@pytest.mark.parametrize("path", ["/v1/studies", "/api/studies/1/note"])
def test_an_endless_body_is_cut_off(client: httpx.Client, path: str) -> None:
    method = "POST" if path.startswith("/v1") else "PUT"
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 30) as raw:
        raw.sendall(head.encode())
        answer = threading.Event()
        sent = 0
        reader = threading.Thread(target=lambda: raw.recv(100) and answer.set())
        reader.start()
        while not answer.is_set():
            try:
                raw.sendall(chunk)
            except OSError:
                break
            sent += len(chunk)
            assert sent < 100 * MAX_BODY, "the service went on reading"
        reader.join()
        assert answer.is_set()


def test_a_huge_body_that_announces_itself_is_not_even_read(client: httpx.Client) -> None:
    head = (
        "POST /v1/studies HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000000000000\r\n\r\n"
    )
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), 30) as raw:
        raw.sendall(head.encode())
        assert b" 422 " in raw.recv(100)


def test_a_sender_who_hangs_up_is_no_internal_error(client: httpx.Client) -> None:
    head = (
        "POST /v1/studies HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000\r\n\r\n"
    )
    with capture_logs() as logs:
        for _ in range(5):
            with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
                raw.sendall(head.encode() + b"{")
        for _ in range(5):
            assert client.get("/healthz").is_success
    assert logs == []


def _cursor(*parts: str) -> str:
    return base64.urlsafe_b64encode("\n".join(parts).encode()).decode().rstrip("=")


DIGITS = "9" * 4400
"""More than Python turns into a number."""

WRONG_PARAMETERS = [
    ("/v1/studies?limit=-1", "limit"),
    ("/v1/studies?limit=0", "limit"),
    ("/v1/studies?limit=501", "limit"),
    ("/v1/studies?limit=1e9", "limit"),
    ("/v1/studies?limit=%00", "limit"),
    ("/v1/studies?state=dancing", "state"),
    ("/v1/studies?cursor=garbage", "cursor"),
    ("/v1/studies?cursor=", "cursor"),
    ("/v1/studies?cursor=%00%ff", "cursor"),
    ("/v1/studies?cursor=LTE", "cursor"),  # -1
    ("/v1/studies?cursor=OTk5OTk5OTk5OTk", "cursor"),  # 99999999999
    ("/v1/studies?cursor=2ak", "cursor"),  # a digit, but an Arabic one
    (f"/v1/studies?cursor={_cursor(DIGITS)}", "cursor"),
    (f"/v1/studies/study/history?cursor={_cursor('asc', DIGITS)}", "cursor"),
    (f"/v1/studies/study/history?cursor={_cursor('asc', str(2**63))}", "cursor"),
    (f"/v1/studies/study/trials?cursor={_cursor('number', 'asc', '', DIGITS)}", "cursor"),
    ("/v1/studies?colour=red", "colour"),
    ("/v1/studies/study/trials?order_by=test_score", "order_by"),
    ("/v1/studies/study/trials?direction=up", "direction"),
    ("/v1/studies/study/trials?limit=1001", "limit"),
    ("/v1/studies/study/trials?cursor=bnVtYmVyCmFzYwoKeA", "cursor"),  # …number x
    ("/v1/studies/study/trials?cursor=bnVtYmVyCmFzYwoKLTE", "cursor"),  # …number -1
    ("/v1/studies/study/trials/0?attempt=0", "attempt"),
    ("/v1/workers?alive=perhaps", "alive"),
]


def test_a_wrong_parameter_is_refused_by_name(client: httpx.Client, engine: Engine) -> None:
    builders.create(engine)
    for path, field in WRONG_PARAMETERS:
        (error,) = problem(client.get(path), 422)["errors"]
        assert error["field"] == field, path


def test_an_unknown_path_is_a_problem_document_wherever_it_lies(
    client: httpx.Client,
) -> None:
    for path in ("/v1", "/v1/", "/v1/nope", "/v2/studies", "/nope", "/v1/studies/study/nope"):
        problem(client.get(path), 404)
        problem(client.post(path), 404)
    problem(client.get("/v1/%00%ff"), 404)


def test_a_wrong_method_is_a_problem_document_that_names_the_right_ones(
    client: httpx.Client,
) -> None:
    for method, path, allowed in (
        ("PUT", "/v1/studies", "GET, POST"),
        ("POST", "/v1/workers", "GET"),
        ("DELETE", "/healthz", "GET"),
        ("PUT", "/v1/studies/study", "GET, PATCH, DELETE"),
        ("GET", "/v1/studies/study/pause", "POST"),
    ):
        response = client.request(method, path)
        problem(response, 405)
        assert response.headers["allow"] == allowed


def test_an_internal_error_has_an_id_and_nothing_else(client: httpx.Client, engine: Engine) -> None:
    builders.create(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE regtune.studies RENAME COLUMN reason TO secret"))
    with capture_logs() as logs:
        document = problem(client.get("/v1/studies/study"), 500)
    assert "secret" not in json.dumps(document)
    (entry,) = [entry for entry in logs if entry["event"] == "internal_error"]
    assert entry["id"] == document["instance"]
    assert "reason" in str(entry["exc_info"])


def test_without_its_database_the_service_lives_but_is_not_ready(
    database_url: str, engine: Engine
) -> None:
    builders.create(engine)
    with serving(app(database_url)) as client:
        assert client.get("/readyz").json() == {"status": "ok"}
        with out_of_service(engine):
            assert client.get("/healthz").json() == {"status": "ok"}
            for path in (
                "/readyz",
                "/v1/studies",
                "/v1/workers",
                "/v1/studies/study/events",
                "/dashboard",
            ):
                response = client.get(path)
                problem(response, 503)
                assert "socket" not in response.text  # where the database is, nobody need know
                assert response.headers["retry-after"] == "2"
        assert client.get("/readyz").is_success
        assert client.get("/v1/studies/study").is_success
        assert client.get("/api/studies").is_success


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE regtune.alembic_version SET version_num = 'future'", "future"),
        ("UPDATE public.version_info SET schema_version = 99", "99"),
        ("DROP TABLE public.version_info", "not there"),
    ],
)
def test_a_schema_that_is_not_known_is_not_ready(
    client: httpx.Client, engine: Engine, statement: str, what: str
) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))
    assert what in problem(client.get("/readyz"), 503)["detail"]


def test_when_all_connections_are_in_use_the_answer_is_503(
    database_url: str, engine: Engine
) -> None:
    served = app(database_url, pool_size=1)
    pool: Any = served.state.context.engine.pool
    pool._timeout = 0.1
    with serving(served) as client, served.state.context.engine.connect():
        assert "in use" in problem(client.get("/v1/studies"), 503)["detail"]


def test_a_crowd_waits_its_turn_and_is_answered(database_url: str, engine: Engine) -> None:
    """More requests than there are threads, and far more than connections."""
    builders.create(engine)
    with serving(app(database_url, pool_size=2)) as client, ThreadPoolExecutor(120) as pool:
        paths = ["/v1/studies", "/v1/studies/study", "/readyz", "/v1/workers"] * 30
        answers = list(pool.map(lambda path: client.get(path, timeout=60), paths))
    assert {answer.status_code for answer in answers} == {200}


def test_two_who_act_on_one_study_at_once_never_break_each_other(
    client: httpx.Client, engine: Engine
) -> None:
    builders.create(engine)
    verbs = ["pause", "resume", "stop", "cancel", "pause", "resume"] * 5

    def act(verb: str) -> int:
        return client.post(f"/v1/studies/study/{verb}").status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = set(pool.map(act, verbs))
    assert statuses <= {200, 409}


@pytest.mark.parametrize("origin", ["https://elsewhere.example", "http://127.0.0.1:1", "null"])
def test_a_page_of_another_site_may_only_look(
    client: httpx.Client, engine: Engine, origin: str
) -> None:
    study = builders.create(engine)
    foreign = {"Origin": origin}
    detail = problem(client.post("/v1/studies/study/cancel", headers=foreign), 403)["detail"]
    assert repr(origin) in detail
    problem(client.delete("/v1/studies/study", headers=foreign), 403)
    assert client.get("/v1/studies/study", headers=foreign).status_code == 200
    assert builders.study_state(engine, study) == "active"
    own = {"Origin": str(client.base_url).rstrip("/")}
    assert client.post("/v1/studies/study/cancel", headers=own).status_code == 200


def test_a_name_that_leads_to_the_own_machine_by_trickery_is_not_answered(
    client: httpx.Client, engine: Engine
) -> None:
    builders.create(engine)
    port = client.base_url.port
    for host in ("elsewhere.example", f"Elsewhere.example:{port}", f"0.0.0.0:{port}", "[::1"):
        answer = client.get("/v1/studies/study", headers={"Host": host})
        name = host.lower().removesuffix(f":{port}")
        assert repr(name) in problem(answer, 421)["detail"]
        assert client.get("/readyz", headers={"Host": host}).is_success
    for host in (f"localhost:{port}", "LOCALHOST", "a.localhost.", f"[::1]:{port}", "127.0.0.2"):
        assert client.get("/v1/studies/study", headers={"Host": host}).is_success


@pytest.mark.parametrize(
    ("settings", "statuses"),
    [
        ({}, (421, 421)),
        ({"hosts": ("Tuner.example.",)}, (200, 421)),
        ({"host": "0.0.0.0"}, (200, 200)),
        ({"host": "0.0.0.0", "hosts": ("tuner.example",)}, (200, 421)),
    ],
)
def test_a_service_has_the_names_that_it_is_given_and_any_where_others_reach_it(
    database_url: str, settings: dict[str, Any], statuses: tuple[int, int]
) -> None:
    with serving(app(database_url, **settings)) as client:
        answers = [
            client.get("/v1/studies", headers={"Host": host})
            for host in ("tuner.example:8700", "elsewhere.example")
        ]
    assert tuple(answer.status_code for answer in answers) == statuses


@pytest.mark.parametrize("error", errors.RegtuneError.__subclasses__())
def test_every_domain_error_has_a_status_of_its_own(error: type[errors.RegtuneError]) -> None:
    never_answered = errors.AddressTaken, errors.FolderUnusable, errors.InvalidData
    if error.__module__ == errors.__name__ and error not in never_answered:
        assert error in problems._STATUS


class Schemas:
    """Walks the schemas of an OpenAPI document that are reached from its operations."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._components = document["components"]["schemas"]
        self.seen: set[str] = set()
        self.faults: list[str] = []
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                self._operation(f"{method} {path}", operation)

    def _operation(self, where: str, operation: dict[str, Any]) -> None:
        self._need(where, operation, "description")
        for parameter in operation.get("parameters", ()):
            self._need(f"{where} ?{parameter['name']}", parameter, "description")
            if parameter["name"] != "last-event-id":
                self._need_example(f"{where} ?{parameter['name']}", parameter)
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for body in bodies:
            for media in body.get("content", {}).values():
                self._schema(media.get("schema", {}), where)

    def _schema(self, schema: dict[str, Any], where: str) -> None:
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/components/schemas/")
            if name not in self.seen:
                self.seen.add(name)
                self._component(name, self._components[name])
        for key in ("anyOf", "oneOf", "allOf"):
            for option in schema.get(key, ()):
                self._schema(option, where)
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                self._schema(schema[key], where)

    def _component(self, name: str, schema: dict[str, Any]) -> None:
        for field, properties in schema.get("properties", {}).items():
            self._need(f"{name}.{field}", properties, "description")
            self._need_example(f"{name}.{field}", properties)
            self._schema(properties, f"{name}.{field}")
        self._schema({key: schema[key] for key in schema if key != "properties"}, name)

    def _need(self, where: str, thing: dict[str, Any], key: str) -> None:
        if not thing.get(key):
            self.faults.append(f"{where} has no {key}")

    def _need_example(self, where: str, thing: dict[str, Any]) -> None:
        """A field that is a document itself, or a list of them, has its fields' examples."""
        options = [thing, thing.get("items", {}), *thing.get("anyOf", ())]
        if any("$ref" in option for option in options):
            return
        if not thing.get("examples") and not thing.get("schema", {}).get("examples"):
            self.faults.append(f"{where} has no example")


def test_openapi_describes_every_field_and_gives_an_example(client: httpx.Client) -> None:
    schemas = Schemas(client.get("/openapi.json").json())
    assert schemas.faults == []
    assert {"StudySpec", "Search", "Pruner", "StudyDetail", "Best", "Problem"} <= schemas.seen


def test_openapi_names_no_error_that_is_not_a_problem_document(
    client: httpx.Client,
) -> None:
    document = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for operations in document["paths"].values():
        for operation in operations.values():
            assert list(operation["responses"]["default"]["content"]) == [
                "application/problem+json"
            ]


def test_openapi_asks_for_no_field_that_may_be_left_out(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert sorted(schemas["StudySpec"]["required"]) == ["budget", "name", "task"]
    assert schemas["Search"]["required"] == []
    assert "default" not in schemas["Budget"]["properties"]["trials"]
    assert {"momentum", "nesterov"} <= schemas["Training"]["properties"].keys()
    assert "fraction" in schemas["Validation"]["properties"]
    for name in ("Training", "Validation"):
        assert "required" not in schemas[name] or schemas[name]["required"] == []


def test_the_pages_of_the_api_are_there(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.is_success
    assert "/openapi.json" in page.text
