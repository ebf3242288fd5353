"""
The kinds of parameters in the path or query of a request, and how their text is parsed: one class per kind of value.

A parameter is declared once (:mod:`cpm.api.operations`); the server parses requests with it, and the reference
describes it. Clients need its name only, so what parsing takes is imported by the methods that parse.
"""

from __future__ import annotations

from cpm.protocol.bounds import MAX_NAME, short, whole_number
from cpm.protocol.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Sequence
    from ipaddress import IPv4Address
    from typing import Any

    from cpm.protocol.walltime import WallTime

MOST_PATTERNS = 64
"""Patterns in one request."""

_ANY_UUID = ":00000000-0000-0000-0000-000000000000"
_NAME_AND_UUID = r"(?s)(.*):([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_AFTER_ALL_UUIDS = "~"
"""Greater than the text of any UUID."""


class Parameter:
    """
    Text, unchanged.

    :param name: Its name in the path or query; the handler has an argument of the same name.
    :param meaning: A phrase for the reference.
    """

    def __init__(self, name: str, meaning: str) -> None:
        self.name = name
        self.meaning = meaning

    def read(self, text: str | None) -> Any:
        """
        Return the value.

        :param text: None: the parameter is missing from the request.
        :raise InvalidRequest: When the text is not of this kind, or is missing and there is no default.
        """
        if text is not None and len(text) > MAX_NAME:
            raise InvalidRequest(f"{self.name} is longer than {MAX_NAME} characters; use a name or UUID that exists")
        return text

    def read_all(self, texts: Sequence[str]) -> Any:
        """
        Return the value, from all texts that a request has for this parameter.

        :raise InvalidRequest: As :meth:`read`.
        """
        return self.read(texts[0] if texts else None)

    @property
    def takes(self) -> str:
        """The values that are accepted, in words."""
        return f"text of up to {MAX_NAME} characters"

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the text."""
        return {"type": "string", "maxLength": MAX_NAME}


class Flag(Parameter):
    """Yes or no; no when it is missing."""

    def read(self, text: str | None) -> bool:  # noqa: D102 - as the parent's
        return text not in (None, "", "0", "false")

    @property
    def takes(self) -> str:  # noqa: D102
        return "`1` or `0`; default `0`"

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        return {"type": "string", "enum": ["1", "0"], "default": "0"}


class WholeNumber(Parameter):
    """
    A whole number within bounds.

    :param least: The smallest allowed number.
    :param most: The largest allowed number.
    :param default: The value when it is missing; None: the handler gets None.
    :param required: It must not be missing.
    """

    def __init__(
        self, name: str, meaning: str, least: int, most: int, default: int | None = None, *, required: bool = False
    ) -> None:
        super().__init__(name, meaning)
        self.least = least
        self.most = most
        self.default = default
        self.required = required

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

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        default = {"default": self.default} if self.default is not None else {}
        return {"type": "integer", "minimum": self.least, "maximum": self.most, **default}


class Moment(Parameter):
    """
    A moment in UTC seconds; the handler gets None when it is missing or empty.

    :param default: What None means, for the reference.
    """

    def __init__(self, name: str, meaning: str, default: str = "now") -> None:
        super().__init__(name, meaning)
        self.default = default

    def read(self, text: str | None) -> WallTime | None:  # noqa: D102
        from cpm.protocol.walltime import WallTime

        try:
            return WallTime.parse(text) if text else None
        except ValueError:
            raise InvalidRequest(f"{self.name} is {short(text)}; use seconds since 1970 in UTC") from None

    @property
    def takes(self) -> str:  # noqa: D102
        return f"seconds since 1970 in UTC; default {self.default}"

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        return {"type": "number", "minimum": 0}


class Address(Parameter):
    """
    An IPv4 address.

    :param required: It must not be missing; otherwise the handler gets None when it is.
    """

    def __init__(self, name: str, meaning: str, *, required: bool = True) -> None:
        super().__init__(name, meaning)
        self.required = required

    def read(self, text: str | None) -> IPv4Address | None:  # noqa: D102
        from ipaddress import IPv4Address

        if text is None and not self.required:
            return None
        try:
            return IPv4Address(text or "")
        except ValueError:
            raise InvalidRequest(f"{short(text or '')} is not an IPv4 address; write it like 203.0.113.1") from None

    @property
    def takes(self) -> str:  # noqa: D102
        return f"IPv4 address; {'required' if self.required else 'optional'}"

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        return {"type": "string", "format": "ipv4"}


class Choice(Parameter):
    """One word of several; the handler gets the first one when it is missing."""

    def __init__(self, name: str, meaning: str, words: tuple[str, ...]) -> None:
        super().__init__(name, meaning)
        self.words = words

    def read(self, text: str | None) -> str:  # noqa: D102
        if text is None:
            return self.words[0]
        if text not in self.words:
            raise InvalidRequest(f"{self.name} is {short(text)}; use {', '.join(self.words)}")
        return text

    @property
    def takes(self) -> str:  # noqa: D102
        return f"{', '.join(f'`{word}`' for word in self.words)}; default `{self.words[0]}`"

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        return {"type": "string", "enum": list(self.words), "default": self.words[0]}


class Choices(Parameter):
    """Any of several words, the parameter once for each; the handler gets a set, empty when it is missing."""

    def __init__(self, name: str, meaning: str, words: tuple[str, ...]) -> None:
        super().__init__(name, meaning)
        self.words = words

    def read(self, text: str | None) -> frozenset[str]:  # noqa: D102
        return self.read_all(() if text is None else (text,))

    def read_all(self, texts: Sequence[str]) -> frozenset[str]:  # noqa: D102
        for text in texts:
            if text not in self.words:
                raise InvalidRequest(f"{self.name} is {short(text)}; use {', '.join(self.words)}")
        return frozenset(texts)

    @property
    def takes(self) -> str:  # noqa: D102
        return f"{', '.join(f'`{word}`' for word in self.words)}; may be repeated"

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        return {"type": "array", "items": {"type": "string", "enum": list(self.words)}}


class Patterns:
    """
    Texts that are looked for, each a pattern as a shell's: ``*``, ``?``, ``[abc]``.

    :param words: None of them: everything fits.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        self._exact = frozenset(words)
        self._patterns = [_compiled(word) for word in self._exact if set(word) & set("*?[")]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self._exact == other._exact

    def __hash__(self) -> int:
        return hash(self._exact)

    def fit(self, *texts: str) -> bool:
        """Return whether one of the texts fits one of the patterns, or is one of them to the letter."""
        if not self._exact:
            return True
        return not self._exact.isdisjoint(texts) or self._match(texts)

    def _match(self, texts: Iterable[str]) -> bool:
        return any(pattern.match(text) is not None for text in texts for pattern in self._patterns)


EVERYTHING = Patterns()


def _compiled(word: str) -> re.Pattern[str]:
    import fnmatch
    import re

    return re.compile(fnmatch.translate(word))


class Match(Parameter):
    """What is looked for, the parameter once for each pattern; the handler gets :class:`Patterns`."""

    def read(self, text: str | None) -> Patterns:  # noqa: D102
        return self.read_all(() if text is None else (text,))

    def read_all(self, texts: Sequence[str]) -> Patterns:  # noqa: D102
        if len(texts) > MOST_PATTERNS:
            raise InvalidRequest(f"{self.name} is there {len(texts)} times; use at most {MOST_PATTERNS} patterns")
        for text in texts:
            super().read(text)
        return Patterns(texts)

    @property
    def takes(self) -> str:  # noqa: D102
        return f"text, or a pattern with `*`, `?` and `[abc]`; may be repeated, up to {MOST_PATTERNS} times"

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        items = {"type": "string", "maxLength": MAX_NAME}
        return {"type": "array", "items": items, "maxItems": MOST_PATTERNS}


class NameCursor(Parameter):
    """
    A place in a list in order of name: ``NAME``, or ``NAME:UUID`` where several have that name.

    The handler gets name and UUID, which compare greater than those of every entry up to that place; None when it is
    missing.
    """

    def read(self, text: str | None) -> tuple[str, str] | None:  # noqa: D102
        if text is None:
            return None
        if len(text) > MAX_NAME + len(_ANY_UUID):
            raise InvalidRequest(f"{self.name} is longer than a name can be; use the last name of the page before")
        import re

        found = re.fullmatch(_NAME_AND_UUID, text)
        return (found[1], found[2]) if found else (text, _AFTER_ALL_UUIDS)

    @property
    def takes(self) -> str:  # noqa: D102
        return "a name, or a name, a colon and a UUID; optional"

    @property
    def schema(self) -> dict[str, Any]:  # noqa: D102
        return {"type": "string", "maxLength": MAX_NAME + len(_ANY_UUID)}
