"""The site that `make docs` builds: navigation, links and anchors hold, and nothing is loaded from elsewhere."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config

REPOSITORY = Path(__file__).parents[3]
DOCS = REPOSITORY / "docs"
KINDS = ["Tutorial", "How-to", "Reference", "Explanation"]
BLOCKS = ["h1", "h2", "h3", "li", "pre", "tr"]
LOADED = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "audio": "src",
    "video": "src",
}


class Tags(HTMLParser):
    """What a page loads, and how many blocks of each kind its text has."""

    def __init__(self, *, within_text: bool) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.blocks = dict.fromkeys(BLOCKS, 0)
        self._depth = 0 if within_text else 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in LOADED and (source := values.get(LOADED[tag])):
            self.loads.append(source)
        if tag == "div":
            self._depth += 1 if self._depth or values.get("itemprop") == "articleBody" else 0
        elif self._depth and tag in self.blocks:
            self.blocks[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self._depth -= 1 if tag == "div" and self._depth else 0


class Warnings(logging.Handler):
    """What `mkdocs build --strict` would refuse."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, which has to go without a warning."""
    directory = tmp_path_factory.mktemp("site")
    warnings = Warnings(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(warnings)
    try:
        build(load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(directory)))
    finally:
        logging.getLogger("mkdocs").removeHandler(warnings)
    assert warnings.said == []
    return directory


def in_navigation(entries: list[object]) -> Iterator[str]:
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from in_navigation(value) if isinstance(value, list) else [str(value)]


@pytest.fixture(scope="module")
def nav() -> Any:
    """The navigation as MkDocs has it after our hook."""
    config = load_config(str(REPOSITORY / "mkdocs.yml"))
    return config.plugins.on_config(config)["nav"]


def test_every_page_is_in_the_navigation_once(nav: Any) -> None:
    assert sorted(in_navigation(nav)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_navigation_has_the_four_kinds_and_each_page_is_of_its_kind(nav: Any) -> None:
    assert [next(iter(entry)) for entry in nav[1:]] == KINDS
    folders = [{page.split("/")[0] for page in in_navigation([entry])} for entry in nav[1:]]
    assert folders == [{"tutorial"}, {"how-to"}, {"reference"}, {"explanation", "design", "architecture.md"}]


@pytest.mark.parametrize("page", sorted((DOCS / "design").glob("*.md")), ids=lambda page: page.name)
def test_a_decision_has_its_number_in_its_title(page: Path) -> None:
    assert page.read_text().startswith(f"# {page.name[:4]}: ")


def test_all_pages_are_built_without_a_warning(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").exists()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        tags = Tags(within_text=False)
        tags.feed(page.read_text())
        assert [source for source in tags.loads if re.match(r"(\w+:)?//", source)] == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]+", sheet.read_text()) == [], sheet


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_has_the_same_blocks_here_and_on_a_forge(page: Path, site: Path) -> None:
    """The site's reader of Markdown is older than CommonMark: it reads some lists and nested blocks as text."""
    here, there = Tags(within_text=True), Tags(within_text=False)
    here.feed((site / page.relative_to(DOCS)).with_suffix(".html").read_text())
    there.feed(MarkdownIt("commonmark").enable("table").render(page.read_text()))
    assert here.blocks == there.blocks
