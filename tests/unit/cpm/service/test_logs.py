"""Log records as journald takes them (systemd's Native Journal Protocol), and on stderr without it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.service import logs


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket in journald's place."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.settimeout(5)
        made.bind(str(tmp_path / "journal"))
        monkeypatch.setattr(logs, "_JOURNAL", str(tmp_path / "journal"))
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
        yield made


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Put the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


def test_a_record_reaches_journald_with_its_fields(journal: socket.socket) -> None:
    logs.set_up("cpmd", "info")
    logging.getLogger("cpm.daemon").warning("%d VMs", 7)
    fields = dict(line.split(b"=", 1) for line in journal.recv(4096).splitlines())
    assert fields == {
        b"MESSAGE": b"7 VMs",
        b"PRIORITY": b"4",
        b"SYSLOG_IDENTIFIER": b"cpmd",
        b"LOGGER": b"cpm.daemon",
        b"CODE_FUNC": b"test_a_record_reaches_journald_with_its_fields",
    }


def test_a_message_of_several_lines_is_sent_with_its_length(journal: socket.socket) -> None:
    logs.set_up("natd", "info")
    try:
        raise ValueError("a\x1b\u202eb\nc")
    except ValueError:
        logging.getLogger("x").exception("failed")
    record = journal.recv(4096)
    length = int.from_bytes(record[8:16], "little")
    message = record[16 : 16 + length].decode()
    assert record.startswith(b"MESSAGE\n")
    assert record[16 + length :].startswith(b"\nPRIORITY=3\n")
    assert message.startswith("failed\nTraceback (most recent call last):\n")
    assert message.endswith("ValueError: a\\x1b\\u202eb\nc")


NAME = "vm\x1b[2J\nERROR forged\u202e\u2066\x00\x9b\ud800"
ESCAPED = r"vm\x1b[2J\nERROR forged\u202e\u2066\x00\x9b\ud800"


def test_what_others_chose_is_escaped_for_journald(journal: socket.socket) -> None:
    logs.set_up("natd", "info")
    logging.getLogger("x").warning("VM %s is gone", NAME)
    assert journal.recv(4096).startswith(f"MESSAGE=VM {ESCAPED} is gone\n".encode())


def test_what_others_chose_is_escaped_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    logs.set_up("natd", "info")
    logging.getLogger("x").warning("VM %s is gone", NAME)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"WARNING x: VM {ESCAPED} is gone")


def test_records_below_the_level_are_not_sent(journal: socket.socket) -> None:
    logs.set_up("natd", "warning")
    logging.getLogger("x").info("quiet")
    journal.setblocking(False)
    with pytest.raises(BlockingIOError):
        journal.recv(4096)


def test_without_journald_records_go_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    logs.set_up("natd", "info")
    logging.getLogger("x").info("here")
    assert capsys.readouterr().err.endswith("INFO x: here\n")
