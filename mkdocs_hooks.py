"""Hooks of MkDocs: decisions in `docs/design` are in the navigation by their own titles, without a list to keep."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

DECISIONS = "Design decisions"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the decisions to the navigation's last kind, in the order of their numbers."""
    docs = Path(config.docs_dir)
    pages = sorted((docs / "design").glob("*.md"))
    entries = [{page.read_text().splitlines()[0].removeprefix("# "): str(page.relative_to(docs))} for page in pages]
    assert config.nav is not None
    config.nav[-1]["Explanation"].append({DECISIONS: entries})
    return config
