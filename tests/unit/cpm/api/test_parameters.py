"""Parameters of paths and queries: accepted and refused texts."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.api.parameters import Address, Flag, Moment, Parameter, WholeNumber
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.walltime import WallTime

COUNT = WholeNumber("limit", "", 1, 100, default=10)
OPTIONAL = WholeNumber("after", "", 0, 100)
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
