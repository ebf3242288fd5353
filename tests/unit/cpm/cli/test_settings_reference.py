"""Every setting of both daemons is on the page of the reference and in the man pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpm.cli import manual, settings_reference
from cpm.cli.settings_reference import DAEMONS, tables

PAGE = Path(__file__).parents[4] / "docs/reference/configuration.md"


def test_the_page_is_generated_from_the_settings() -> None:
    assert PAGE.read_text() == settings_reference.markdown(), "run make manuals"


@pytest.mark.parametrize("daemon", DAEMONS)
def test_every_table_and_key_is_in_the_man_page(daemon: str) -> None:
    page = manual.page(f"{daemon}.toml.5")
    for table in tables(daemon):
        assert f"[{table.path}]" in page or not table.path
        for key in table.keys:
            assert f'.TP\n.B "{key.name}"\n' in page, f"{table.path}.{key.name}"


def test_tables_that_may_be_left_out_are_tables() -> None:
    natd = {table.path: {key.name for key in table.keys} for table in tables("natd")}
    assert "uplinks" in natd["host"]
    assert "forward" in natd["edge"]
    assert "udp_s" in natd["host.timeouts"]
    cpmd = {table.path: {key.name: key for key in table.keys} for table in tables("cpmd")}
    assert cpmd["pool"]["floor"].default == "default 64"
    assert cpmd["metrics"]["address"].meaning.startswith("`IP:PORT`"), "an inherited key says what it means"


@pytest.mark.parametrize("daemon", DAEMONS)
def test_a_setting_says_what_it_is(daemon: str) -> None:
    for table in tables(daemon):
        for key in table.keys:
            assert key.meaning, f"{table.path}.{key.name}"
            assert "](#" not in key.kind, f"{table.path}.{key.name} is of a type without a name in words"
