r"""
What the hook and natd say to each other; here is the format, and natd's side of it without any I/O.

The hook connects to natd's unix stream socket, sends one request, reads one answer, and both close. A request is a
header line and three runs of raw bytes whose lengths the header gives, so nothing inside them can be misread::

    qemu 1 OPERATION SUBOPERATION NAME_LENGTH EXTRA_LENGTH XML_LENGTH\n
    NAME EXTRA XML                                  (without anything between them or after)

- ``qemu`` is the kind of libvirt hook and ``1`` the version of the format.
- OPERATION is one of :class:`HookOperation`; SUBOPERATION 1 to 16 letters, or ``-`` when libvirt's was anything else.
- NAME is the VM's name, at most 4,096 bytes; EXTRA libvirt's fourth argument, likewise: ``-``, or at ``release``, from
  libvirt 10.5 on, why the VM stopped. Both may hold any bytes.
- XML is the domain XML as libvirt gave it, at most 4 MiB.

The answer is one line of UTF-8, at most 4,096 bytes with its end::

    ok TEXT\n
    error CODE TEXT\n

CODE is ``refuse`` when libvirt shall refuse the VM because the operator wants it so, otherwise what went wrong; TEXT
is for people and may be empty. The hook ignores what follows the line. natd may answer before it has read everything.

Used by natd. The hook itself (:mod:`libvirt_hooks.qemu`) builds and reads these lines without importing this module.
"""

from __future__ import annotations

import dataclasses
import enum
import re

VERSION = 1
MAX_NAME = 4096
"""Bytes of a name, and of the extra argument."""
MAX_XML = 4 * 1024 * 1024
"""Bytes of domain XML."""
MAX_HEADER = 128
"""Bytes of the header line with its end; the longest valid one is shorter."""
MAX_ANSWER = 4096
"""Bytes of the answer with its end."""
MAX_REQUEST = MAX_HEADER + 2 * MAX_NAME + MAX_XML
"""No request is longer, in bytes."""

_HEADER = re.compile(
    rb"qemu (?P<version>[1-9][0-9]{0,5}) (?P<operation>[a-z]{1,16}) (?P<suboperation>[A-Za-z]{1,16}|-)"
    rb" (?P<name>0|[1-9][0-9]{0,7}) (?P<extra>0|[1-9][0-9]{0,7}) (?P<xml>0|[1-9][0-9]{0,7})"
)


class HookOperation(enum.StrEnum):
    """What libvirt is doing (https://libvirt.org/hooks.html), in the order of a VM's life."""

    MIGRATE = "migrate"
    """A VM is about to arrive from another host."""
    RESTORE = "restore"
    """A saved VM is about to come back."""
    PREPARE = "prepare"
    """A VM is about to start; it has no taps yet."""
    START = "start"
    """Its taps exist; QEMU does not."""
    STARTED = "started"
    """QEMU exists; the guest has not executed anything."""
    ATTACH = "attach"
    """libvirt took over a QEMU that somebody else started."""
    RECONNECT = "reconnect"
    """libvirtd came back and found the VM running."""
    STOPPED = "stopped"
    """QEMU is gone; the taps are about to go. Also after a start that failed, and at the source of a migration."""
    RELEASE = "release"
    """Everything of the VM is gone. As often as STOPPED."""


class HookProtocolError(ValueError):
    """What came is no request; the text says what is wrong with it. Nothing after it can be understood."""


@dataclasses.dataclass(frozen=True, slots=True)
class HookRequest:
    """One call of the hook."""

    operation: HookOperation
    suboperation: str
    """``begin`` or ``end``; ``-`` when libvirt gave anything else."""
    name: str
    """The VM's name; bytes that are no UTF-8 are kept as surrogates (PEP 383)."""
    extra: str
    """libvirt's fourth argument, treated likewise."""
    xml: bytes
    """The domain XML as it came: parse it with :func:`libvirt_hooks.domain_xml.parse`."""

    def encode(self) -> bytes:
        """The request on the wire; what comes from :func:`parse_request` encodes to what was parsed."""
        name, extra = _to_bytes(self.name), _to_bytes(self.extra)
        header = f"qemu {VERSION} {self.operation} {self.suboperation} {len(name)} {len(extra)} {len(self.xml)}\n"
        return header.encode() + name + extra + self.xml


def parse_request(data: bytes) -> HookRequest | None:
    """
    Read one request out of all bytes received so far.

    :return: The request, or None when more bytes are needed.
    :raise HookProtocolError: When no further bytes can make it a request, or there are more than its header says.
    """
    parser = RequestParser()
    return parser.feed(data)


class RequestParser:
    """
    Reads one request from the pieces in which it arrives; holds at most :data:`MAX_REQUEST` bytes and one piece.

    After :meth:`feed` raised, the connection is of no use: answer :func:`error_answer` and close it.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._header: _Header | None = None

    def feed(self, data: bytes) -> HookRequest | None:
        """
        Take the next bytes.

        :return: The request as soon as it is complete, or None when more bytes are needed.
        :raise HookProtocolError: When what came so far can never be a request, or goes on after its end.
        """
        self._data += data
        if self._header is None:
            self._header = _parse_header(self._data)
            if self._header is None:
                return None
        missing = self._header.total - len(self._data)
        if missing < 0:
            raise HookProtocolError(f"{-missing} bytes too many after the domain XML")
        return None if missing else self._header.request(bytes(self._data))


def ok_answer(text: str = "") -> bytes:
    """The answer for "all is well"; line breaks in the text become blanks, and it is cut to fit."""
    return _line(f"ok {text}")


def error_answer(code: str, text: str) -> bytes:
    """
    The answer for "that did not work".

    :param code: One word for programs; ``refuse`` makes libvirt refuse the VM where that hurts nothing.
    :param text: A sentence for people; line breaks become blanks, and it is cut to fit.
    :raise ValueError: When the code is no single word.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,63}", code):
        raise ValueError(f"not a code: {code!r}; use lower case letters, digits and dashes")
    return _line(f"error {code} {text}")


@dataclasses.dataclass(frozen=True, slots=True)
class _Header:
    length: int
    operation: HookOperation
    suboperation: str
    name: int
    extra: int
    xml: int

    @property
    def total(self) -> int:
        return self.length + self.name + self.extra + self.xml

    def request(self, data: bytes) -> HookRequest:
        after_name = self.length + self.name
        after_extra = after_name + self.extra
        return HookRequest(
            operation=self.operation,
            suboperation=self.suboperation,
            name=_to_text(data[self.length : after_name]),
            extra=_to_text(data[after_name:after_extra]),
            xml=data[after_extra:],
        )


def _parse_header(data: bytearray) -> _Header | None:
    end = data.find(b"\n", 0, MAX_HEADER)
    if end < 0:
        if len(data) >= MAX_HEADER:
            raise HookProtocolError(f"no header line within {MAX_HEADER} bytes")
        return None
    match = _HEADER.fullmatch(data, 0, end)
    if match is None:
        raise HookProtocolError(f"not a header of a hook's request: {bytes(data[:end])!r}")
    if int(match["version"]) != VERSION:
        raise HookProtocolError(f"format version {int(match['version'])}; this natd knows {VERSION}, install its hook")
    header = _Header(
        length=end + 1,
        operation=_operation(match["operation"].decode()),
        suboperation=match["suboperation"].decode(),
        name=int(match["name"]),
        extra=int(match["extra"]),
        xml=int(match["xml"]),
    )
    if max(header.name, header.extra) > MAX_NAME or header.xml > MAX_XML:
        raise HookProtocolError(f"longer than {MAX_NAME} bytes of name or {MAX_XML} bytes of domain XML")
    return header


def _operation(word: str) -> HookOperation:
    try:
        return HookOperation(word)
    except ValueError:
        raise HookProtocolError(f"no operation of the qemu hook: {word}") from None


def _line(text: str) -> bytes:
    line = " ".join(text.splitlines()).encode("utf-8", "backslashreplace")[: MAX_ANSWER - 1]
    return line.decode("utf-8", "ignore").encode() + b"\n"


def _to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
