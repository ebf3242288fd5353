"""
A blocking client of the API, for the command line, tests and scripts. Standard library and msgspec only.

An answer is decoded with msgspec, which checks every field (:class:`Client`), or read as the JSON that it is
(:class:`Reader`), without the 80 ms that importing msgspec and all types of the API takes. natd has a websocket session
instead (:mod:`cpm.api.session`).
"""

from __future__ import annotations

import gc
from _json import make_scanner

from cpm.api.unix_http import Exchange, NotHTTP
from cpm.protocol.errors import ExitCode, InvalidRequest, Unreachable, VirtPortsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, TypeVar

    from cpm.api.operations import Argument, Operation

    _A = TypeVar("_A")

_CHECK = (
    "run this on the manager, where `systemctl status cpmd` says whether cpmd runs; "
    "name another socket with --socket or VIRT_PORTS_SOCKET"
)
_ALLOW = "run this as root or as a member of the socket's group, see `ls -l {path}`"
_JOURNAL = "see `journalctl -u cpmd`"
_DOUBT = "the change may be made all the same, `virt-ports audit` lists it then; "


class RemoteError(VirtPortsError):
    """
    The manager refused or failed. Code and sentence are those of its error, whose attributes are not transferred.

    :param code: One of the codes in :mod:`cpm.protocol.errors`, or ``internal``.
    :param message: The manager's sentence.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.exit_code = _exit_code(code)

    def __str__(self) -> str:
        return self.message


class Client:
    """
    A manager behind a unix socket. Every call is one connection; nothing stays open between calls.

    Every method raises :class:`Unreachable` when the manager does not answer, and :class:`RemoteError` with the
    manager's code when it refuses (``internal`` when its answer cannot be decoded).

    :param socket_path: Path of the socket.
    :param timeout_s: Seconds to wait for each read and write; following events has no limit.
    """

    def __init__(self, socket_path: str, *, timeout_s: float = 30.0) -> None:
        self.socket_path = socket_path
        self.timeout_s = timeout_s

    def call(self, operation: Operation[_A], body: object | None = None, **arguments: Argument) -> _A:
        """
        Request one operation; return its answer.

        :param body: The request's body, for an operation that has one.
        :param arguments: By parameter of the operation.
        :raise TypeError: When body or arguments do not fit the declaration of the operation.
        """
        if (body is None) == operation.has_body:
            raise TypeError(f"{operation} takes {operation.body} as body, not {type(body)}")
        data = None if body is None else _encode(body)
        exchange = Exchange(self.socket_path, self.timeout_s)
        try:
            self._ask(exchange, operation.method, operation.target(arguments), data)
            answer = exchange.read()
        except (OSError, NotHTTP) as error:
            raise self._unreachable(error, is_change=operation.changes) from error
        finally:
            exchange.close()
        return self._understand(operation, answer)

    def stream(self, operation: Operation[_A], *, follow: bool = False, **arguments: Argument) -> Iterator[_A]:
        """
        Yield the lines of a streamed answer as they come.

        :param follow: Wait for more, without limit. The iterator then never ends by itself.
        :raise Unreachable: Also when the manager ends a followed stream.
        :raise TypeError: When the arguments do not fit the declaration of the operation.
        """
        follows = {"follow": follow} if "follow" in operation.arguments else {}
        exchange = Exchange(self.socket_path, self.timeout_s)
        try:
            self._ask(exchange, operation.method, operation.target({**arguments, **follows}), None)
            if follow:
                exchange.wait_for_ever()
            for line in exchange.lines():
                if line.strip():
                    yield self._understand(operation, line)
        except (OSError, NotHTTP) as error:
            raise self._unreachable(error) from error
        finally:
            exchange.close()
        if follow:
            raise Unreachable(self.socket_path, "the manager ended the stream", _JOURNAL)

    @staticmethod
    def _ask(exchange: Exchange, method: str, target: str, data: bytes | None) -> None:
        """:raise RemoteError: When the manager refuses."""
        exchange.request(method, target, data)
        if not 200 <= exchange.status < 300:
            raise _refusal(exchange.status, exchange.reason, exchange.read())

    def _understand(self, operation: Operation[_A], data: bytes) -> _A:
        return _decode(operation.answer, data)

    def _unreachable(self, error: Exception, *, is_change: bool = False) -> Unreachable:
        """
        Return the error for one of sockets or HTTP, with a fitting remedy.

        :param is_change: What was asked for changes something, and may be done although no answer came.
        """
        detail, remedy = _diagnosis(error)
        doubt = _DOUBT if is_change and remedy == _JOURNAL else ""
        return Unreachable(self.socket_path, detail, doubt + remedy.format(path=self.socket_path))


class Reader(Client):
    """
    A client for programs that show what the manager says, and live for a moment: answers are the JSON that was sent.

    They have the attributes of the operation's answer, with the values of JSON: addresses, UUIDs and words of an
    enumeration are texts, and tuples are lists. A key that the manager does not send raises AttributeError, although
    the type may have a default; properties and methods of the type do not exist. Nothing else is checked, so whoever
    fails on an answer calls :meth:`check`.
    """

    _last: tuple[Operation[Any], bytes] | None = None

    def check(self) -> None:
        """
        Check that the last answer is what its operation declares.

        :raise RemoteError: When it is not.
        """
        if self._last is not None:
            super()._understand(*self._last)

    def _understand(self, operation: Operation[_A], data: bytes) -> _A:
        self._last = operation, data
        try:
            answer: _A = _from_json(data.decode())
        except (ValueError, RecursionError) as error:
            self.check()
            raise RemoteError("internal", f"the manager's answer: {error}") from error
        return answer


class Record(dict):  # type: ignore[type-arg]
    """An object of JSON; its keys are attributes."""

    def __init__(self, values: dict[str, object]) -> None:
        super().__init__(values)
        self.__dict__ = self  # a lookup by __getattr__ takes ten times as long

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class _Scanning:
    """What the scanner of :mod:`json` wants to know, as :func:`json.loads` says it."""

    strict = True
    object_hook = Record
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def _from_json(text: str) -> Any:
    """
    Return a JSON document, objects as :class:`Record`.

    :raise ValueError: When it is none.
    """
    # json.loads without what json imports for it: regular expressions, 7 ms. Nothing of a document is garbage yet.
    gc.disable()
    try:
        value, end = make_scanner(_Scanning)(text, 0)  # type: ignore[arg-type]
    except StopIteration as error:
        raise ValueError(f"no value at character {error.value}") from None
    finally:
        gc.enable()
    if text[end:].strip(" \t\n\r"):
        raise ValueError(f"more than one value: character {end}")
    return value


def _encode(body: object) -> bytes:
    from cpm.protocol import codec

    return codec.encode(body)


def _decode(kind: type[_A], data: bytes) -> _A:
    from cpm.protocol import codec

    try:
        return codec.decode(kind, data)
    except InvalidRequest as error:
        raise RemoteError("internal", f"the manager's answer: {error}") from error


def _refusal(status: int, reason: str, body: bytes) -> RemoteError:
    from cpm.api.views import ErrorView
    from cpm.protocol import codec

    try:
        view = codec.decode(ErrorView, body)
    except InvalidRequest:
        message = f"the manager answered {status} {reason} without an explanation; {_JOURNAL}, and compare the versions"
        return RemoteError("internal", message)
    return RemoteError(view.code, view.message)


def _exit_code(code: str) -> int:
    from cpm.protocol.error_codes import CODES

    if code == "internal":
        return ExitCode.INTERNAL
    kind = CODES.get(code)
    # A newer manager may have codes that this version does not know.
    return ExitCode.REFUSED if kind is None else kind.exit_code


def _diagnosis(error: Exception) -> tuple[str, str]:
    if isinstance(error, TimeoutError):
        return "no answer in time", _JOURNAL
    if isinstance(error, ConnectionRefusedError):
        return "no process listens there", _CHECK
    if isinstance(error, FileNotFoundError):
        return "no such socket", _CHECK
    if isinstance(error, PermissionError):
        return "permission denied", _ALLOW
    if isinstance(error, ConnectionError):
        return "the manager closed the connection", _JOURNAL
    if isinstance(error, NotHTTP):
        return "the peer does not speak HTTP", _CHECK
    return getattr(error, "strerror", None) or str(error), _CHECK
