"""What the documents name exists: tests, files, and the sections that links lead to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Names of a page's sections, as links spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_sections(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, section = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), target
        assert not section or section in anchors(found), target


def test_tests_that_are_named_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    for page in PAGES:
        named = set(re.findall(r"\btest_\w+\b(?!\.py)", page.read_text(encoding="utf-8")))
        assert named <= defined | {"test_list"}, (page.name, named - defined)


def test_tests_that_are_named_with_a_file_are_in_it() -> None:
    for page in PAGES:
        for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / path).is_file(), (page.name, path)
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"def {name}\b", source), (page.name, f"{path}::{name}")
