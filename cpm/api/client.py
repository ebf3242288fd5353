"""
A blocking client of the API, for the command line, tests and scripts. Standard library and msgspec only.

natd has a websocket session instead (:mod:`cpm.api.session`).
"""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Iterator
from typing import TypeVar

from cpm.api.operations import Argument, Operation
from cpm.api.views import ErrorView
from cpm.protocol import codec
from cpm.protocol.error_codes import CODES
from cpm.protocol.errors import ExitCode, InvalidRequest, Unreachable, VirtPortsError

_A = TypeVar("_A")

_CHECK = "is cpmd running? see `systemctl status cpmd`, or name its socket with --socket or VIRT_PORTS_SOCKET"
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
        if (body is None) != (operation.body is None):
            raise TypeError(f"{operation} takes {operation.body} as body, not {type(body)}")
        data = None if body is None else codec.encode(body)
        with _unreachable_on_failure(self.socket_path, is_change=operation.method != "GET"):
            connection = self._connect()
            try:
                answer = self._response(connection, operation.method, operation.target(arguments), data).read()
            finally:
                connection.close()
        return _decode(operation.answer, answer)

    def stream(self, operation: Operation[_A], *, follow: bool = False, **arguments: Argument) -> Iterator[_A]:
        """
        Yield the lines of a streamed answer as they come.

        :param follow: Wait for more, without limit. The iterator then never ends by itself.
        :raise Unreachable: Also when the manager ends a followed stream.
        :raise TypeError: When the arguments do not fit the declaration of the operation.
        """
        with _unreachable_on_failure(self.socket_path):
            connection = self._connect()
            try:
                connection.connect()
                reads = connection.sock  # http.client drops it when the answer has Connection: close
                follows = {"follow": follow} if "follow" in operation.arguments else {}
                target = operation.target({**arguments, **follows})
                response = self._response(connection, operation.method, target, None)
                reads.settimeout(None if follow else self.timeout_s)
                while line := response.readline():
                    if line.strip():
                        yield _decode(operation.answer, line)
            finally:
                connection.close()
        if follow:
            raise Unreachable(self.socket_path, "the manager ended the stream", _JOURNAL)

    def _connect(self) -> http.client.HTTPConnection:
        return _UnixConnection(self.socket_path, self.timeout_s)

    @staticmethod
    def _response(
        connection: http.client.HTTPConnection, method: str, target: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        if not 200 <= response.status < 300:
            raise _refusal(response.status, response.reason, response.read())
        return response


def _decode(kind: type[_A], data: bytes) -> _A:
    try:
        return codec.decode(kind, data)
    except InvalidRequest as error:
        raise RemoteError("internal", f"the manager's answer: {error}") from error


def _refusal(status: int, reason: str, body: bytes) -> RemoteError:
    try:
        view = codec.decode(ErrorView, body)
    except InvalidRequest:
        message = f"the manager answered {status} {reason} without an explanation; {_JOURNAL}, and compare the versions"
        return RemoteError("internal", message)
    return RemoteError(view.code, view.message)


def _exit_code(code: str) -> ExitCode:
    if code == "internal":
        return ExitCode.INTERNAL
    kind = CODES.get(code)
    # A newer manager may have codes that this version does not know.
    return ExitCode.REFUSED if kind is None else kind.exit_code


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@contextlib.contextmanager
def _unreachable_on_failure(path: str, *, is_change: bool = False) -> Iterator[None]:
    """
    Raise :class:`Unreachable` with a fitting remedy instead of the errors of sockets and HTTP.

    :param is_change: What was asked for changes something, and may be done although no answer came.
    """
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        detail, remedy = _diagnosis(error)
        doubt = _DOUBT if is_change and remedy == _JOURNAL else ""
        raise Unreachable(path, detail, doubt + remedy.format(path=path)) from error


def _diagnosis(error: OSError | http.client.HTTPException) -> tuple[str, str]:
    if isinstance(error, TimeoutError):
        return "no answer in time", _JOURNAL
    if isinstance(error, ConnectionRefusedError):
        return "no process listens there", _CHECK
    if isinstance(error, FileNotFoundError):
        return "no such socket", _CHECK
    if isinstance(error, PermissionError):
        return "permission denied", _ALLOW
    if isinstance(error, (ConnectionError, http.client.IncompleteRead)):
        return "the manager closed the connection", _JOURNAL
    if isinstance(error, http.client.HTTPException):
        return "the peer does not speak HTTP", _CHECK
    return error.strerror or str(error), _CHECK
