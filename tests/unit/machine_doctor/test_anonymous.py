from __future__ import annotations

import pytest

from machine_doctor.anonymous import Names

NAMES = Names(["host1", "edge1"], ["web", "web-db", "a.b"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web and web-db on host1", "vm2 and vm3 on node2"),
        ("webs, xweb, web_1 stay", "webs, xweb, web_1 stay"),
        ("domain a.b.", "domain vm1."),
        ("lg-web and web-1", "lg-vm2 and vm2-1"),
        ("nothing", "nothing"),
    ],
)
def test_names(text: str, expected: str) -> None:
    assert NAMES.text(text) == expected


def test_addresses_keep_what_is_in_one_network() -> None:
    names = Names([], [])
    assert names.text("203.0.113.7 203.0.113.0/24 198.51.100.7:80") == "10.0.0.7 10.0.0.0/24 10.0.1.7:80"
    assert names.text("again 198.51.100.9.") == "again 10.0.1.9."


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1 0.0.0.0 255.255.255.0", "1.2.3", "6.1.0-28-amd64", "1.2.3.4.5", "999.1.2.3", "v1.2.3.4b", "12:34:56",
     "Tue 10:20", "::", "::1", "2026-11-30T03:04:05+01:00", "a::b::c", "cpm::x"]
)  # fmt: skip
def test_what_is_no_address_of_the_site_stays(text: str) -> None:
    assert Names([], []).text(text) == text


def test_other_numbers() -> None:
    names = Names([], [])
    uuid, mac, six = "6695eb01-f6a4-8304-79aa-97f2502e193f", "52:54:00:aB:cd:ef", "fe80::1"
    first = names.text(f"{uuid} {mac} {six}")
    assert first == "00000000-0000-0000-0000-000000000001 02:00:00:00:00:02 2001:db8::3"
    assert names.text(f"{uuid.upper()} {mac.lower()} fe80:0::0:1") == first


def test_values_of_documents() -> None:
    document = {"web": "web", "facts": {"host1": ["203.0.113.1", 7, None, True]}, "name": {"x": "host1"}}
    assert NAMES.value(document) == {
        "web": "vm2",
        "facts": {"node2": ["10.0.0.1", 7, None, True]},
        "name": {"x": "node2"},
    }


def test_keys_that_are_no_fields() -> None:
    document = {"net.lg-web.x": "1", "198.51.100.7": "203.0.113.9", "web": {"web-db": 1}}
    assert Names([], ["web", "web-db"]).value(document) == {
        "net.lg-vm1.x": "1",
        "10.0.0.7": "10.0.1.9",
        "web": {"vm2": 1},
    }


def test_a_name_with_signs_of_patterns() -> None:
    assert Names([], ["a+(b", "[x"]).text("a+(b [x") == "vm2 vm1"
