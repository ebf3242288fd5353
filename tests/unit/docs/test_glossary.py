"""The glossary: numbered without gaps, one sentence a term, and every term is one that the project uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("cpm", "natctl", "qga_agent", "libvirt_hooks", "machine_doctor")
GLOSSARY = REPOSITORY / "docs/reference/glossary.md"
ENTRY = re.compile(r"^(\d+)\. \*\*(.+?)\*\*: (.+?)(?=^\d+\. |^## |\Z)", re.M | re.S)
ENTRIES = [(int(number), term, " ".join(text.split())) for number, term, text in ENTRY.findall(GLOSSARY.read_text())]


def words_of(text: str) -> str:
    """Return the words of a text, with those of names (``hold_down_s``, ``Notice``) taken apart."""
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower())


@pytest.fixture(scope="module")
def used() -> str:
    code = [path for name in PACKAGES for path in REPOSITORY.glob(f"{name}/**/*.py")]
    pages = [path for path in REPOSITORY.glob("docs/**/*.md") if path != GLOSSARY]
    return words_of("\n".join(path.read_text() for path in [*code, *pages, REPOSITORY / "README.md"]))


def test_numbers_are_consecutive() -> None:
    assert [number for number, _, _ in ENTRIES] == list(range(1, len(ENTRIES) + 1))
    assert len(ENTRIES) == len(re.findall(r"^\d+\.", GLOSSARY.read_text(), re.M))


def test_no_term_is_defined_twice() -> None:
    terms = [term.lower() for _, term, _ in ENTRIES]
    assert sorted(set(terms)) == sorted(terms)


@pytest.mark.parametrize(("term", "text"), [(term, text) for _, term, text in ENTRIES], ids=lambda value: value[:20])
def test_a_definition_is_one_sentence_and_then_its_source(term: str, text: str) -> None:
    assert re.fullmatch(r"[A-Zl][^.]*(?:\.\w[^.]*)*\.(?: \*(?:Source[\w ]*|Compare): .+\.\*)?", text), text


@pytest.mark.parametrize("term", [term for _, term, _ in ENTRIES])
def test_every_term_is_used_in_code_or_documentation(term: str, used: str) -> None:
    assert re.search(rf"\b{words_of(term).strip()}s?\b", used), term
