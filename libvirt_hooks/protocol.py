r"""
The protocol between the hook and natd: its format, and natd's side of it without I/O.

The hook connects to natd's unix stream socket, sends one request and reads one answer; then both close. A request is a
header line and three byte strings whose lengths the header gives, so nothing inside them needs escaping::

    qemu 1 OPERATION SUBOPERATION NAME_LENGTH EXTRA_LENGTH XML_LENGTH\n
    NAME EXTRA XML                                  (no separators, nothing after)

- ``qemu`` is the kind of libvirt hook and ``1`` the version of the format.
- OPERATION is one of :class:`HookOperation`; SUBOPERATION 1 to 16 letters, or ``-`` when libvirt's was anything else.
- NAME is the VM's name, at most 4,096 bytes; so is EXTRA, libvirt's fourth argument: ``-``, or at ``release``, from
  libvirt 10.5 on, why the VM stopped. Both may hold any bytes.
- XML is the domain XML as libvirt passed it, at most 4 MiB.

The answer is one line of UTF-8, at most 4,096 bytes including its newline::

    ok TEXT\n
    error CODE TEXT\n

CODE is ``refuse`` when libvirt shall refuse the VM because the operator configured that, otherwise it names the error;
TEXT is for people and may be empty. The hook ignores whatever follows the line. natd may answer before it has read the
whole request.

Used by natd. The hook itself (:mod:`libvirt_hooks.qemu`) implements its side without importing this module.
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
"""Bytes of the header line including its newline; the longest valid one is shorter."""
MAX_ANSWER = 4096
"""Bytes of the answer including its newline."""
MAX_REQUEST = MAX_HEADER + 2 * MAX_NAME + MAX_XML
"""Upper bound for the bytes of a request."""

_HEADER = re.compile(
    rb"qemu (?P<version>[1-9][0-9]{0,5}) (?P<operation>[a-z]{1,16}) (?P<suboperation>[A-Za-z]{1,16}|-)"
    rb" (?P<name>0|[1-9][0-9]{0,7}) (?P<extra>0|[1-9][0-9]{0,7}) (?P<xml>0|[1-9][0-9]{0,7})"
)


class HookOperation(enum.StrEnum):
    """libvirt's operations (https://libvirt.org/hooks.html), in the order of a VM's life."""

    MIGRATE = "migrate"
    """A VM is about to arrive from another host."""
    RESTORE = "restore"
    """A saved VM is about to be restored."""
    PREPARE = "prepare"
    """A VM is about to start; it has no taps yet."""
    START = "start"
    """Its taps exist; QEMU does not."""
    STARTED = "started"
    """QEMU exists; the guest has not executed anything."""
    ATTACH = "attach"
    """libvirt took over a QEMU process that it had not started."""
    RECONNECT = "reconnect"
    """libvirtd was restarted and found the VM running."""
    STOPPED = "stopped"
    """QEMU has exited, the taps are about to go. Also after a failed start, and at the source of a migration."""
    RELEASE = "release"
    """Everything of the VM is removed. Follows each STOPPED."""


class HookProtocolError(ValueError):
    """The data is not a request; the text says why. Nothing after it can be parsed."""


@dataclasses.dataclass(frozen=True, slots=True)
class HookRequest:
    """One call of the hook."""

    operation: HookOperation
    suboperation: str
    """``begin`` or ``end``; ``-`` when libvirt passed anything else."""
    name: str
    """The VM's name; bytes that are not UTF-8 are kept as surrogates (PEP 383)."""
    extra: str
    """libvirt's fourth argument, decoded likewise."""
    xml: bytes
    """The domain XML, unparsed; see :func:`libvirt_hooks.domain_xml.parse`."""


class RequestParser:
    """
    Parses one request that arrives in pieces; buffers at most :data:`MAX_REQUEST` bytes and one piece.

    After :meth:`feed` raised, answer with :func:`error_answer` and close the connection.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._header: _Header | None = None

    def feed(self, data: bytes) -> HookRequest | None:
        """
        Parse the next bytes.

        :return: The request once it is complete, or None when more bytes are needed.
        :raise HookProtocolError: When the bytes so far cannot become a request, or continue after its end.
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
    """Return the answer to a request that succeeded; line breaks in the text become spaces, and it is cut to fit."""
    return _line(f"ok {text}")


def error_answer(code: str, text: str) -> bytes:
    """
    Return the answer to a request that failed.

    :param code: One word for programs; ``refuse`` makes libvirt refuse the VM at the operations where that is harmless.
    :param text: A sentence for people; line breaks become spaces, and it is cut to fit.
    :raise ValueError: When the code is not a single word.
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
