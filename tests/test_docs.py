"""Links of the documentation: what they point to is there, and other projects are cited at a commit."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "optim").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_our_own_files_and_headings(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_comparison_cites_each_project_at_the_commit_of_its_table():
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    table, _, rest = text.partition("## Side by side")
    listed = dict(re.findall(r"https://github\.com/([\w.-]+/[\w.-]+)/tree/([0-9a-f]{40})\)", table))
    cited = re.findall(r"https://github\.com/([\w.-]+/[\w.-]+)(?:/(?:blob|tree)/([0-9a-f]{40})/)?", rest)
    assert len(listed) == 7
    assert {name for name, _ in cited} == {*listed, "pytorch/pytorch"}
    assert all(commit == listed.get(name, commit) and commit for name, commit in cited)
