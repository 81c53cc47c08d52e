import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from sqlalchemy import Engine, text

from tests import builders
from tests.serving import app, service_process, serving
from tests.waiting import wait_until

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a real browser, in which every answer that is an error counts as a fault."""
    if not CHROMIUM.exists():
        reason = f"no {CHROMIUM}; install Debian's package chromium"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1600})
        faults: list[str] = []
        page.on("response", lambda r: faults.append(r.url) if r.status >= 400 else None)
        yield page
        assert faults == []
        browser.close()


@pytest.mark.slow
def test_the_dashboard_shows_a_study_its_history_and_its_best_parameters(
    page: Page, database_url: str, engine: Engine, project: Path
) -> None:
    study = builders.create(engine, "digits-in-the-browser", budget={"trials": 8})
    builders.append(engine, study, 8)
    for loss in (0.9, 0.5, 0.7, 0.3125, 0.4, 0.6):
        builders.complete(engine, builders.lease(engine, study), loss)
    builders.lease(engine, study)
    with service_process(database_url) as (_, client):
        page.goto(str(client.base_url))
        page.get_by_text(study.name).click()

        expect(page.get_by_text("Best Trial (number=3)")).to_be_visible(timeout=30_000)
        best = page.get_by_text("Params = [weight_decay: 1.50005, dropout: 0.35")
        expect(best).to_be_visible()
        expect(page.get_by_text("0.3125", exact=True)).to_be_visible()
        history = page.locator("#plot-history .scatterlayer .points path")
        expect(history).to_have_count(6, timeout=30_000)
        page.screenshot(path=project / "test-artifacts" / "dashboard.png")

        page.goto(f"{client.base_url}/dashboard/studies/{study.study_id}/note")
        page.get_by_test_id("EditIcon").click()
        page.locator("main textarea:visible").first.fill("the answer is in trial 3")
        page.get_by_role("button", name="Save").click()
        wait_until(lambda: "the answer is in trial 3" in notes(engine))


def test_the_api_is_described_where_there_is_no_internet(page: Page, database_url: str) -> None:
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
    with serving(app(database_url)) as client:
        page.goto(f"{client.base_url}/docs")
        expect(page.locator("[data-path='/v1/studies']").first).to_be_visible(timeout=30_000)
        assert asked == {client.base_url.netloc.decode()}


def notes(engine: Engine) -> str:
    """All notes that the dashboard has kept."""
    with engine.connect() as connection:
        return "".join(
            connection.execute(
                text(
                    "SELECT value_json FROM public.study_system_attributes"
                    " WHERE key LIKE 'dashboard:note_str%'"
                )
            ).scalars()
        )
