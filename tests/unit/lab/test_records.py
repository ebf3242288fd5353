from __future__ import annotations

from pathlib import Path

import pytest

from lab.errors import LabError
from lab.records import LIGHT, REAL, GuestRecords


def test_a_record_reads_back_until_it_is_removed(tmp_path: Path) -> None:
    records = GuestRecords(tmp_path / "guests")
    added = records.add("a", LIGHT, "host1")
    assert GuestRecords(tmp_path / "guests").get("a") == added
    records.remove("a")
    assert records.all() == []
    with pytest.raises(LabError, match="there are: none"):
        records.get("a")


def test_a_name_is_taken_once_in_the_whole_lab(tmp_path: Path) -> None:
    records = GuestRecords(tmp_path)
    records.add("a", LIGHT, "host1")
    with pytest.raises(LabError, match="choose another name"):
        records.add("a", REAL, "host2")


def test_light_guests_get_the_lowest_free_address_of_their_host(tmp_path: Path) -> None:
    records = GuestRecords(tmp_path)
    names = [records.add(name, LIGHT, host).address for name, host in (("a", "host1"), ("b", "host1"), ("c", "host2"))]
    assert names == ["10.10.0.10", "10.10.0.11", "10.10.0.10"]
    records.remove("a")
    assert records.add("d", LIGHT, "host1").address == "10.10.0.10"
    assert records.add("v", REAL, "host1").address == ""


def test_a_full_host_says_so(tmp_path: Path) -> None:
    records = GuestRecords(tmp_path)
    for number in range(90):
        records.add(f"g{number}", LIGHT, "host1")
    with pytest.raises(LabError, match="remove one"):
        records.add("more", LIGHT, "host1")
    assert len(records.all()) == 90
