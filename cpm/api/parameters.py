"""
The kinds of parameters in the path or query of a request, and how their text is parsed: one class per kind of value.

A parameter is declared once (:mod:`cpm.api.operations`); the server parses requests with it, and the reference
describes it.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from msgspec import Struct

from cpm.protocol.bounds import MAX_NAME, short, whole_number
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.walltime import WallTime


class Parameter(Struct, frozen=True):
    """
    Text, unchanged.

    :param name: Its name in the path or query; the handler has an argument of the same name.
    :param meaning: A phrase for the reference.
    """

    name: str
    meaning: str

    def read(self, text: str | None) -> Any:
        """
        Return the value.

        :param text: None: the parameter is missing from the request.
        :raise InvalidRequest: When the text is not of this kind, or is missing and there is no default.
        """
        if text is not None and len(text) > MAX_NAME:
            raise InvalidRequest(f"{self.name} is longer than {MAX_NAME} characters; use a name or UUID that exists")
        return text

    @property
    def takes(self) -> str:
        """The values that are accepted, in words."""
        return f"text of up to {MAX_NAME} characters"


class Flag(Parameter, frozen=True):
    """Yes or no; no when it is missing."""

    def read(self, text: str | None) -> bool:  # noqa: D102 - as the parent's
        return text not in (None, "", "0", "false")

    @property
    def takes(self) -> str:  # noqa: D102
        return "`1` or `0`; default `0`"


class WholeNumber(Parameter, frozen=True):
    """
    A whole number within bounds.

    :param least: The smallest allowed number.
    :param most: The largest allowed number.
    :param default: The value when it is missing; None: the handler gets None.
    :param required: It must not be missing.
    """

    least: int
    most: int
    default: int | None = None
    required: bool = False

    def read(self, text: str | None) -> int | None:  # noqa: D102
        if text is None and not self.required:
            return self.default
        number = whole_number(text or "", self.most)
        if number is None or number < self.least:
            raise InvalidRequest(f"{self.name} is {short(text)}; use a whole number from {self.least} to {self.most}")
        return number

    @property
    def takes(self) -> str:  # noqa: D102
        default = "required" if self.required else f"default {self.default}" if self.default is not None else "optional"
        return f"whole number from {self.least} to {self.most}; {default}"


class Moment(Parameter, frozen=True):
    """A moment in UTC seconds; the handler gets None when it is missing or empty."""

    def read(self, text: str | None) -> WallTime | None:  # noqa: D102
        try:
            return WallTime.parse(text) if text else None
        except ValueError:
            raise InvalidRequest(f"{self.name} is {short(text)}; use seconds since 1970 in UTC") from None

    @property
    def takes(self) -> str:  # noqa: D102
        return "seconds since 1970 in UTC; default now"


class Address(Parameter, frozen=True):
    """An IPv4 address, required."""

    def read(self, text: str | None) -> IPv4Address:  # noqa: D102
        try:
            return IPv4Address(text or "")
        except ValueError:
            raise InvalidRequest(f"{short(text or '')} is not an IPv4 address; write it like 203.0.113.1") from None

    @property
    def takes(self) -> str:  # noqa: D102
        return "IPv4 address; required"
