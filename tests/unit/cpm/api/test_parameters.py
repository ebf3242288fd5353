"""Parameters of paths and queries: accepted and refused texts."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.api.parameters import (
    MOST_PATTERNS,
    Address,
    Choice,
    Choices,
    Flag,
    Match,
    Moment,
    NameCursor,
    Parameter,
    Patterns,
    WholeNumber,
)
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.walltime import WallTime

COUNT = WholeNumber("limit", "", 1, 100, default=10)
OPTIONAL = WholeNumber("after", "", 0, 100)
SORT = Choice("sort", "", ("name", "ports"))
STATES = Choices("state", "", ("gone", "away"))
WEB = "6695eb01-f6a4-8304-79aa-97f2502e193f"
PORT = WholeNumber("port", "", 0, 65535, required=True)


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        (Parameter("name", ""), "a/b", "a/b"),
        (Parameter("name", ""), None, None),
        (Flag("all", ""), None, False),
        (Flag("all", ""), "", False),
        (Flag("all", ""), "0", False),
        (Flag("all", ""), "false", False),
        (Flag("all", ""), "1", True),
        (Flag("all", ""), "yes", True),
        (COUNT, None, 10),
        (COUNT, "1", 1),
        (COUNT, "100", 100),
        (OPTIONAL, None, None),
        (OPTIONAL, "0", 0),
        (PORT, "0", 0),
        (Moment("at", ""), None, None),
        (Moment("at", ""), "", None),
        (Moment("at", ""), "1763879880.5", WallTime.of(1763879880.5)),
        (Address("address", ""), "203.0.113.1", IPv4Address("203.0.113.1")),
        (Address("address", "", required=False), None, None),
        (SORT, None, "name"),
        (SORT, "ports", "ports"),
        (STATES, None, frozenset()),
        (STATES, "gone", frozenset({"gone"})),
        (NameCursor("after", ""), None, None),
        (NameCursor("after", ""), "web:1\n", ("web:1\n", "~")),
        (NameCursor("after", ""), f"a:{WEB}:{WEB}", (f"a:{WEB}", WEB)),
        (Match("match", ""), None, Patterns()),
        (Match("match", ""), "web*", Patterns(["web*"])),
    ],
)
def test_a_valid_text_is_parsed(parameter: Parameter, text: str | None, value: object) -> None:
    assert parameter.read(text) == value


@pytest.mark.parametrize(
    ("parameter", "text", "message"),
    [
        (COUNT, "0", "limit is '0'; use a whole number from 1 to 100"),
        (COUNT, "101", "limit is '101'; use"),
        (COUNT, "", "limit is ''; use"),
        (COUNT, "-1", "limit is '-1'; use"),
        (COUNT, "1.5", "limit is '1.5'; use"),
        (COUNT, "١", "limit is '١'; use"),
        (COUNT, "9" * 100_000, "use a whole number from 1 to 100"),
        (PORT, None, "port is missing; use"),
        (SORT, "", "sort is ''; use name, ports"),
        (STATES, "lost", "state is 'lost'; use gone, away"),
        (Match("match", ""), "x" * 4097, "match is longer than 4096 characters; use"),
        (NameCursor("after", ""), "x" * 4134, "after is longer than a name can be; use"),
        (Address("address", "", required=False), "", "'' is not an IPv4 address"),
        (Parameter("name", ""), "x" * 4097, "name is longer than 4096 characters; use"),
        (Moment("at", ""), "nan", "at is 'nan'; use seconds since 1970"),
        (Moment("at", ""), "inf", "at is 'inf'; use seconds since 1970"),
        (Moment("at", ""), "-1", "at is '-1'; use seconds since 1970"),
        (Moment("at", ""), "1" * 5000, "use seconds since 1970 in UTC"),
        (Moment("at", ""), "noon", "at is 'noon'; use seconds since 1970 in UTC"),
        (Address("address", ""), None, "'' is not an IPv4 address; write it like 203.0.113.1"),
        (Address("address", ""), "::1", "'::1' is not an IPv4 address"),
    ],
)
def test_an_invalid_text_is_refused_with_the_accepted_form(
    parameter: Parameter, text: str | None, message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parameter.read(text)
    assert message in str(refused.value)


def test_what_may_be_repeated_is_read_as_often_as_it_is_there() -> None:
    assert STATES.read_all(["gone", "away", "gone"]) == {"gone", "away"}
    assert Match("match", "").read_all(["a", "b"]) == Patterns(["b", "a"])
    assert COUNT.read_all(["3", "4"]) == 3
    with pytest.raises(InvalidRequest, match=f"at most {MOST_PATTERNS} patterns"):
        Match("match", "").read_all(["a"] * (MOST_PATTERNS + 1))


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("web*", "web1", True),
        ("web*", "aweb1", False),
        ("web?", "web12", False),
        ("web[12]", "web2", True),
        ("web[12]", "web[12]", True),
        ("WEB1", "web1", False),
        ("*\n", "a\n", True),
        ("[", "[", True),
        ("*" * 4000 + "b", "a" * 4096, False),
        ("*a" * 2000, "a" * 1999, False),
    ],
)
def test_patterns_are_those_of_a_shell_and_read_in_bounded_time(pattern: str, text: str, fits: bool) -> None:
    assert Patterns([pattern]).fit(text) is fits
    assert Patterns(["other", pattern]).fit("x", text) is fits
    assert Patterns().fit(text)
