"""The files in which natd keeps whom it follows."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cpm.protocol.messages import Follows, PathState
from cpm.protocol.model import DomainUUID, NodeName
from natctl.model.remembered import NOTHING, Charge, Remembered
from natctl.remembering import RememberedFiles


def test_what_was_written_is_read(tmp_path: Path) -> None:
    files = RememberedFiles(tmp_path / "state")
    assert files.read() == NOTHING
    first, later = Remembered(7, Follows("abc", "def", 120)), Remembered(7, Follows("abc", "def", 121))
    files.write(first, is_durable=True)
    assert RememberedFiles(tmp_path / "state").read() == first
    files.write(later, is_durable=False)
    assert RememberedFiles(tmp_path / "state").read() == later
    files.close()
    files.close()


def test_another_ledger_has_numbers_of_its_own(tmp_path: Path) -> None:
    files = RememberedFiles(tmp_path)
    files.write(Remembered(7, Follows("abc", "def", 120_000)), is_durable=True)
    files.write(Remembered(1, Follows("other", "x", 0)), is_durable=True)
    files.close()
    assert files.read() == Remembered(1, Follows("other", "x", 0))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[1]", '{"epoch": "x", "ledger": "a", "run": "b"}', "\0" * 50),
        *(
            '{"a":' * 5000,
            '{"epoch": Infinity, "ledger": "a", "run": "b"}',
            r'{"epoch": 1, "ledger": "\ud800", "run": "b"}',
        ),
    ],
    ids=range(8),
)
def test_a_damaged_file_means_that_nothing_was_seen(tmp_path: Path, text: str) -> None:
    (tmp_path / "follows.json").write_text(text)
    assert RememberedFiles(tmp_path).read() == NOTHING


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RememberedFiles(tmp_path / "file" / "state").write(NOTHING, is_durable=True)


def test_which_vms_send_nothing_without_ports_outlives_the_machine(tmp_path: Path) -> None:
    files = RememberedFiles(tmp_path)
    older = frozenset({DomainUUID("11111111-1111-4111-8111-111111111111")})
    now = Remembered(7, Follows("abc", "def", 0), Charge(PathState(IPv4Network("100.64.0.0/10")), older))
    assert now.has_durable_change(Remembered(7, Follows("abc", "def", 0)))
    files.write(now, is_durable=True)
    files.close()
    assert files.read() == now
    text = (tmp_path / "follows.json").read_text()
    (tmp_path / "follows.json").write_text(text.replace("100.64.0.0/10", "nonsense"))
    assert files.read() == Remembered(7, Follows("abc", "def", 0))


def test_the_edges_that_a_manager_has_named_outlive_a_power_failure(tmp_path: Path) -> None:
    before, now = Follows("abc", "def", 1), Follows("abc", "def", 1, (NodeName("edge1"), NodeName("edge2")))
    assert Remembered(7, now).has_durable_change(Remembered(7, before))
    files = RememberedFiles(tmp_path)
    files.write(Remembered(7, now), is_durable=True)
    files.close()
    assert RememberedFiles(tmp_path).read() == Remembered(7, now)
    damaged = (tmp_path / "follows.json").read_text().replace('["edge1","edge2"]', '{"edge1":1}')
    (tmp_path / "follows.json").write_text(damaged)
    assert RememberedFiles(tmp_path).read() == Remembered(7, before)
