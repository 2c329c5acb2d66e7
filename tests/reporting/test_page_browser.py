"""report.html in headless Chromium: no error, no request, lists of errors that filter, search, sort and turn pages."""

from collections.abc import Iterator
from typing import Any

import pytest
from page_folders import DETAILS, HOSTILE, page_run
from run_folders import no_warning, runs_of

from extensions.reporting.comparison_page import write_pages
from extensions.reporting.page import write_page


class Opened:
    """A page in the browser, and what went wrong in it."""

    def __init__(self, context: Any, file: Any) -> None:
        self.problems: list[str] = []
        self.page = context.new_page()
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self._check(request.url, file.as_uri()))
        self.page.goto(file.as_uri())

    def _check(self, url: str, own: str) -> None:
        if url != own:
            self.problems.append(f"request: {url[:100]}")

    def draw_all(self) -> None:
        """Scroll through the page, which draws every chart that is not in a closed part."""
        self.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        for box in self.page.locator(".plot:visible").all():
            box.scroll_into_view_if_needed()
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('.plot')].every((box) => !box.offsetParent || box.dataset.drawn)"
        )

    def shown(self) -> list[str]:
        """Rows of the first list of errors, as it stands."""
        return [
            text.removeprefix("row ")
            for text in self.page.locator(".errors").first.locator(".size small").all_inner_texts()
        ]

    def place(self) -> str:
        return str(self.page.locator(".errors .place").first.inner_text())

    def choose(self, title: str, value: str) -> None:
        self.page.locator(".errors").first.locator("label", has_text=title).locator("select").select_option(value)


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    contexts = []

    def open_page(file: Any, **options: Any) -> Opened:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        return Opened(contexts[-1], file)

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_page(page_run(tmp_path_factory.mktemp("page") / "run", [DETAILS["own"]], texts=HOSTILE, after=0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"color_scheme": "dark"}, {"is_mobile": True, "viewport": {"width": 390, "height": 800}}]
)
def test_a_page_has_no_error_no_request_and_fits(opened, file, options, browser):
    found = opened(file) if "viewport" not in options else Opened(browser.new_context(**options), file)
    found.draw_all()
    assert found.problems == []
    assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert found.page.title() == "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"finished": False, "before": None, "steps": 3},
        {"method": "eval", "probabilities": False, "yardsticks": False},
        {"tasks": ["cola", "stsb"], "method": "sft"},
        {"tasks": [DETAILS["many"]]},
        {"tasks": [DETAILS["multi"]]},
    ],
    ids=["first steps", "eval", "sft", "40 labels", "multi-label"],
)
def test_other_runs_have_no_error_either(opened, tmp_path, keys):
    found = opened(write_page(page_run(tmp_path / "run", **({"tasks": [DETAILS["own"]], "rows": 30} | keys))))
    found.draw_all()
    assert found.problems == []
    assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_texts_stay_texts(opened, file):
    found = opened(file)
    found.page.wait_for_timeout(100)
    assert found.page.title() == "run"  # the texts would change it
    assert found.page.locator("img").count() == 0
    found.page.locator(".errors input").fill("onerror=")
    texts = (
        found.page.locator(".errors .text", has_text="onerror").all_inner_texts()
        + found.page.locator(".history").all_inner_texts()
    )
    assert any(HOSTILE[1] in text for text in texts)


@pytest.mark.slow
def test_errors_filter_search_sort_and_turn_pages(opened, file):
    found = opened(file)
    rows = found.page.evaluate("Object.values(JSON.parse(document.getElementById('data').textContent).errors)[0].rows")
    assert found.shown() == [str(row[0]) for row in rows[:20]] and found.place() == f"1 to 20 of {len(rows)}"
    found.page.get_by_role("button", name="Next").click()
    assert found.shown() == [str(row[0]) for row in rows[20:40]]
    found.choose("sort", "row")
    assert found.shown() == sorted((str(row[0]) for row in rows), key=int)[:20]
    found.choose("sort", "up")
    known = [row for row in rows if row[3] is not None]
    assert found.shown()[0] == str(min(known, key=lambda row: row[3])[0])
    found.choose("sort", "down")
    found.choose("gold", "legal")
    legal = [str(row[0]) for row in rows if row[1] == "legal"]
    assert found.shown() == legal[:20] and found.place().endswith(f"of {len(legal)}")
    found.choose("answer", "technical support")
    assert found.shown() == [str(row[0]) for row in rows if row[1:3] == ["legal", "technical support"]][:20]
    found.choose("gold", "")
    found.choose("answer", "")
    found.choose("before", "right")
    assert found.shown() == [str(row[0]) for row in rows if row[5]][:20]
    found.choose("before", "")
    found.page.locator(".errors input").fill("no such text")
    assert found.shown() == [] and found.place() == "no error matches"
    assert found.problems == []


@pytest.mark.slow
def test_a_cell_of_the_confusion_matrix_shows_its_errors(opened, file):
    found = opened(file)
    found.draw_all()
    found.page.evaluate(
        "document.querySelector('.tab:not([hidden]) .plot').emit('plotly_click',"
        " {points: [{customdata: ['legal', 'account access', '', '']}]})"
    )
    rows = found.page.evaluate("Object.values(JSON.parse(document.getElementById('data').textContent).errors)[0].rows")
    assert found.shown() == [str(row[0]) for row in rows if row[1:3] == ["legal", "account access"]][:20]


@pytest.mark.slow
def test_curves_switch_between_samples_and_minutes(opened, file):
    found = opened(file)
    found.draw_all()
    read = "document.querySelector('#training .plot').data[0].x.at(-1)"
    assert found.page.evaluate(read) == 480
    found.page.get_by_role("button", name="Minutes").click()
    assert found.page.evaluate(read) == 5.5
    assert found.problems == []


@pytest.mark.slow
def test_the_theme_switches_and_paper_is_light(opened, file):
    found = opened(file, color_scheme="dark")
    color = "getComputedStyle(document.querySelector('section')).backgroundColor"
    assert found.page.evaluate(color) == "rgb(25, 28, 33)"
    found.page.locator("#theme").click()
    assert found.page.evaluate(color) == "rgb(255, 255, 255)"
    found.page.locator("#theme").click()
    found.page.emulate_media(media="print")
    assert found.page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert found.page.pdf().startswith(b"%PDF")
    assert found.problems == []


@pytest.mark.slow
def test_five_thousand_errors_are_listed_and_searched(opened, tmp_path):
    texts = [f"number {i} of many" for i in range(8000)]
    found = opened(
        write_page(page_run(tmp_path / "run", [DETAILS["own"]], rows=8000, before=0, after=0.1, texts=texts))
    )
    assert found.place() == "1 to 20 of 5000"
    rows = found.page.evaluate("Object.values(JSON.parse(document.getElementById('data').textContent).errors)[0].rows")
    assert len(rows) == 5000
    found.page.locator(".errors input").fill(f"{rows[-1][6][0]}")
    assert str(rows[-1][0]) in found.shown() and found.page.locator(".error").count() <= 20


@pytest.mark.slow
def test_a_comparison_has_no_error(opened, tmp_path):
    made = {"ppo": 0.8, "sft": 0.6, "eval": 0.2}
    folders = [page_run(tmp_path / n, [DETAILS["own"]], method=n, after=a, rows=40) for n, a in made.items()]
    found = opened(write_pages(runs_of(*folders), tmp_path, no_warning)[0])
    found.draw_all()
    assert found.problems == []
    found.page.get_by_role("link", name="sft", exact=True).click()
    assert found.page.url == (tmp_path / "sft" / "report.html").as_uri()
