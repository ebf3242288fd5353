"""The identity of a machine: what it is made from, and that it tells nothing else."""

from __future__ import annotations

from pathlib import Path

from natctl.machine_identity import of_this_machine


def test_it_is_that_of_the_first_source_that_can_be_read(tmp_path: Path) -> None:
    firmware, system = tmp_path / "product_uuid", tmp_path / "machine-id"
    system.write_text("b7c1f0a2\n")
    by_system = of_this_machine((firmware, system))
    firmware.write_text("4C4C4544-0044\n")
    by_firmware = of_this_machine((firmware, system))
    assert len({by_system, by_firmware, ""}) == 3
    firmware.write_text("4c4c4544-0044")
    assert of_this_machine((firmware, system)) == by_firmware


def test_the_number_itself_is_not_told(tmp_path: Path) -> None:
    source = tmp_path / "machine-id"
    source.write_text("b7c1f0a2")
    assert "b7c1f0a2" not in of_this_machine((source,))
    assert len(of_this_machine((source,))) == 16


def test_a_machine_of_which_nothing_is_known_has_none(tmp_path: Path) -> None:
    empty = tmp_path / "machine-id"
    empty.write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert of_this_machine((tmp_path / "missing", tmp_path / "binary", empty)) == ""
