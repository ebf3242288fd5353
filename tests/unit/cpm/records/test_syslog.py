from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.journal import JournalEvent
from cpm.records import syslog
from tests.unit.cpm.records.entries import WEB, entry

MESSAGE = re.compile(
    rb"<(\d{1,3})>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ([\x21-\x7e]{1,255}) ([\x21-\x7e]{1,48}) "
    rb"([\x21-\x7e]{1,128}) ([\x21-\x7e]{1,32}) \[virt-ports@32473((?: [a-z_]+=\"(?:[^\"\\\]]|\\[\"\\\]])*\")+)\] (.+)",
    re.S,
)
"""The grammar of RFC 5424 section 6, as far as we use it."""


def test_an_entry_is_a_message_of_rfc_5424() -> None:
    found = MESSAGE.fullmatch(syslog.message(entry(), "manager"))
    assert found is not None
    assert found[1] == b"30", "daemon.info"
    assert found[2] == b"2025-11-23T06:38:00.250000Z"
    assert found.group(3, 4, 5, 6) == (b"manager", b"cpmd", b"-", b"reserved")
    assert f'uuid="{WEB}"'.encode() in found[7]
    assert found[8] == b"VM web1 on host1: 203.0.113.1 1024-1279 reserved"


def test_what_is_wrong_is_a_warning_and_a_bug_an_error() -> None:
    assert syslog.message(entry(JournalEvent.EXHAUSTED), "m").startswith(b"<28>")
    assert syslog.message(entry(JournalEvent.VIOLATION), "m").startswith(b"<27>")
    assert b" within-limits [" in syslog.message(entry(JournalEvent.WITHIN_LIMITS), "m")


@given(st.text(max_size=60), st.text(max_size=300))
def test_no_name_breaks_a_message_or_begins_another(name: str, host: str) -> None:
    message = syslog.message(entry(name=name), host)
    assert MESSAGE.fullmatch(message)
    assert b"\n" not in message


def test_over_tcp_the_length_comes_first() -> None:
    assert syslog.counted("€".encode()) == b"3 \xe2\x82\xac"
