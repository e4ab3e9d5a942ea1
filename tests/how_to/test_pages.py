"""Every page of docs/how-to is followed to the letter, and says what comes of it."""

import re
from pathlib import Path

import pytest

from tests.how_to.page import ROOT, blocks, environment, follow, shows

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
QUICK = {"muonclip-in-own-loop"}  # some seconds
CHECKOUT = ("LICENSE", "configs", "docs", "k2train", "launch", "optim", "tests")


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else pytest.mark.full) for p in PAGES]
)
def test_page(page, home, tmp_path):
    for name in CHECKOUT:
        (tmp_path / name).symlink_to(ROOT / name)
    follow(page.read_text(encoding="utf-8"), tmp_path, environment(home))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_shows_what_comes_and_links_lead_from_it_and_to_it(page):
    text = page.read_text(encoding="utf-8")
    found = blocks(text)
    assert {"sh", "text"} <= {block.language for block in found}
    assert text.count("```") == 2 * len(found)  # none is overlooked
    assert len(text.splitlines()) <= 100
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert f"(docs/how-to/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


FILE = "Save this as `two.py`:\n\n```python\nprint(1 + 1)\n```\n\n"


@pytest.mark.parametrize(
    "page",
    [
        FILE + "```sh\npython two.py\n```\n\n```text\n2\n```\n",
        "```sh\necho done\n```\n\nNot without:\n\n```sh fails\necho no\nfalse\n```\n\nwhich says\n\n```text\nno\n```\n",
        "```console\nsbatch job\n```\n",
    ],
)
def test_what_a_page_says_is_done(page, tmp_path):
    follow(page, tmp_path, environment(tmp_path))


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (FILE + "```sh\npython two.py\n```\n\n```text\n3\n```\n", "line 11: the page shows"),
        ("```sh\nfalse\ntrue\n```\n", "line 1: exit status 1"),
        ("```sh fails\ntrue\n```\n", "line 1: exit status 0"),
        ("```\necho\n```\n", "must say what it is"),
        ("```text\nout\n```\n", "no commands stand before"),
        ("Here:\n\n```python\n1\n```\n", "name of the file"),
    ],
)
def test_what_is_wrong_with_a_page_is_told(page, why, tmp_path):
    with pytest.raises(AssertionError, match=why):
        follow(page, tmp_path, environment(tmp_path))


@pytest.mark.parametrize(
    ("page", "came"),
    [
        ("step 10 | loss 4.40 | 2.1k tokens/s", "step 10 | loss 4.41 | 11k tokens/s"),
        ("trained in 1m10s, a step 0.3 s; 2.1 ± 0.3", "trained in 8.5s, a step 12 s; 2.2 ± 0.6"),
        ("785k parameters, lr 2.0e-04", "  791k  parameters, lr 2.1e-04"),
        ("differ by 4.8e-07", "differ by 1.2e-07"),
        ("first\n...\nlast", "first\nlast"),
        ("first\n...\nstep 2\n...", "first\nstep 1\nstep 2\nlast"),
        ("folder-...: 3 files", "folder-8af1: 3 files"),
    ],
)
def test_what_may_differ(page, came):
    assert shows(page, came)


@pytest.mark.parametrize(
    ("page", "came"),
    [
        ("step 10 | loss 4.40", "step 11 | loss 4.40"),
        ("step 10 | loss 4.40", "step 10 | loss 5.10"),
        ("785k parameters", "785M parameters"),
        ("the same to the last bit", "the same to rounding"),
        ("first\nlast", "first\nbetween\nlast"),
        ("first\n...\nlast", "first\nlast\nmore"),
        ("first\n...\nstep 2", "first\nstep 1"),
    ],
)
def test_what_may_not(page, came):
    assert not shows(page, came)
