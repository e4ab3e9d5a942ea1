"""The report in a real browser: no error, no request, charts with data, links that lead somewhere."""

import shutil

import pytest
from made_runs import long_run

from k2train.report import read_run, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [read_run(long_run(folder / "first")), read_run(long_run(folder / "second", lr=0.02, steps=600))]
    write_page(folder / "one.html", runs[:1])
    write_page(folder / "two.html", runs, x="tokens")
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one.html", "two.html"])
def test_the_page_works(pages, browser, name, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 360, "height": 740}, has_touch=True)
    page, said, requests = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((pages / name).as_uri())

    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # a phone need not scroll sideways
    paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[scheme]

    links = page.locator("nav a")
    for number in range(links.count()):
        links.nth(number).click()
        target = page.url.partition("#")[2]
        assert page.locator(f"section#{target} h2").is_visible()
    assert {"summary", "learning", "incidents", "samples", "settings"} <= {
        link.get_attribute("href")[1:] for link in links.all()
    }

    figures = page.locator("figure")
    assert figures.count() >= 10
    for figure in figures.all():
        drawn = figure.locator("> svg").evaluate(
            "svg => [...svg.querySelectorAll('.line:not(.pale), rect')]"
            ".map(e => e.getBBox().width * getComputedStyle(e).opacity).reduce((a, b) => Math.max(a, b), 0)"
        )
        assert drawn > 5, figure.inner_text()
    loss = figures.first
    loss.locator("> svg").hover()
    assert " 3." in loss.locator("output").inner_text()

    for summary in page.locator("#incidents summary").all():
        summary.click()
    assert page.locator("#incidents").get_by_text("<script>").first.is_visible()  # as text
    assert page.title() == {"one.html": "first", "two.html": "first, second"}[name]
    assert said == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    context.close()
