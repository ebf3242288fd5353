#!/bin/sh
""":"
case ${2-} in
    prepare|start|started|stopped|release|reconnect|migrate|restore|attach|check) ;;
    *) exit 0 ;;
esac
# Not exec: if Python failed to start (missing, half upgraded, out of memory), libvirt would see its exit status, refuse
# the VM and, under reconnect, kill a running one. So only status 77, which only the code below returns, is a refusal.
/usr/bin/python3 -IS -c '
import posix, sys
del sys.argv[0]
text = posix.read(posix.open(sys.argv[0], posix.O_RDONLY), 1 << 20)
try:
    import _imp, marshal
    from _frozen_importlib_external import MAGIC_NUMBER
    source, _, bytecode = text.rpartition(b"# bytecode ")
    stamp = MAGIC_NUMBER + _imp.source_hash(int.from_bytes(MAGIC_NUMBER, "little"), source)
    is_of_this = bytecode[:24].decode() == stamp.hex()
    program = marshal.loads(bytes.fromhex(bytecode[24:].translate(None, b"#").decode())) if is_of_this else None
except Exception:
    program = None
exec(program or compile(text, sys.argv[0], "exec"))
' "$0" "$@" >/dev/null
[ $? -eq 77 ] && exit 1
exit 0

The libvirt hook: tells natd what libvirt is about to do with a VM and turns natd's answer into an exit status.

This file is both a shell script and a Python program. The shell runs the lines above and exits; to Python they are the
beginning of this string.

libvirt runs this file as ``virt-ports NAME OPERATION SUBOPERATION EXTRA`` with the domain XML on stdin and waits for it
to exit (https://libvirt.org/hooks.html). Hence one deadline covers the whole run, and all runs of one start of a VM: a
natd that hangs costs a start little more than one deadline, see :class:`Budget`. A failure of the hook fails no VM
unless the operator configured that. The file is installed as /etc/libvirt/hooks/qemu.d/virt-ports. It needs /bin/sh and
/usr/bin/python3 (3.9 or later) and imports only modules that are compiled into the interpreter: importing a single
module from disk would cost as much time as all the rest. libvirt_hooks/protocol.py specifies the protocol.

An installed copy has its own bytecode as comments at its end, because to compile the text takes two milliseconds, a
fifth of what libvirt waits. The bytecode runs if this very Python made it from this very text, as the stamp before it
says (the same as in a .pyc file with a hash, PEP 552); else the text is compiled.

Settings are in /etc/virt-ports/hook.conf (or the file named in $VIRT_PORTS_HOOK_CONF), one ``key=value`` a line; ``#``
begins a comment. An invalid value is reported and the default used:

- ``socket=/run/virt-ports-natd/natd.sock``: natd's socket. Only root, or this process's own user, is believed there.
- ``deadline=2``: seconds for all runs of one start of a VM together, or of its end; above 0 and up to 60.
- ``on-failure=start``: or ``refuse``: what happens to a VM when natd does not answer.
"""  # noqa: D213

import _socket
import _struct
import posix
import select
import sys
import time

REFUSED = 77
"""Exit status of the Python part when libvirt shall refuse the VM; the shell part turns it into 1."""

OPERATIONS = ("prepare", "start", "started", "stopped", "release", "reconnect", "migrate", "restore", "attach")
REFUSABLE = ("prepare", "start", "started", "migrate")
"""Operations at which a refusal affects no running VM. Under reconnect it would kill the VM."""

EARLIER = {
    "prepare": ("migrate", "restore"),
    "start": ("migrate", "restore", "prepare"),
    "started": ("migrate", "restore", "prepare", "start"),
    "release": ("stopped",),
}
"""The operations before each in the same start, or the same end, of a VM. All others begin one."""
LAST = ("started", "release")
START_S = 120.0
"""Longest start in seconds: what is known of an earlier one is of no use."""
CHECK = "check"
"""Operation of `virt-ports install`, never of libvirt: answered here, without natd, to show that this file runs."""
CHECK_ANSWER = b"virt-ports: the hook runs\n"

MAX_NAME = 4096
MAX_XML = 4 * 1024 * 1024
MAX_ANSWER = 4096
MAX_CONF = 65536

CONF = b"/etc/virt-ports/hook.conf"
SYSLOG = "/dev/log"
ERROR, WARNING = 3, 4
"""syslog priorities."""


class Failure(Exception):
    """natd gave no usable answer; the text is a clause of the sentence that is logged."""


class Config:
    """The settings; class attributes are the defaults."""

    socket = "/run/virt-ports-natd/natd.sock"
    deadline = 2.0
    refuse = False

    def set(self, key: str, value: str) -> str:
        """Set one setting. :return: Why it is invalid; empty when it is valid."""
        if key == "socket":
            if not value.startswith("/"):
                return "socket must be an absolute path"
            self.socket = value
        elif key == "deadline":
            seconds = _number(value)
            if not 0 < seconds <= 60:
                return "deadline must be seconds above 0, up to 60"
            self.deadline = seconds
        elif key == "on-failure":
            if value not in ("start", "refuse"):
                return "on-failure must be start or refuse"
            self.refuse = value == "refuse"
        else:
            return "there is no setting " + key
        return ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _read_head(path: bytes) -> bytes:
    # O_NONBLOCK: the hook must not hang when the path is a FIFO.
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    try:
        return posix.read(fd, MAX_CONF)
    finally:
        posix.close(fd)


def read_config(path: bytes) -> tuple[Config, list[str]]:
    """Read the settings. :return: Them, and a complaint for each invalid line; no complaint when there is no file."""
    config = Config()
    try:
        text = _read_head(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return config, []
    except (OSError, ValueError) as error:
        return config, [f"cannot read hook.conf: {error}; using the defaults"]
    complaints = []
    for number, line in enumerate(text.splitlines(), 1):
        setting = line.partition("#")[0].strip()
        if setting:
            key, _, value = setting.partition("=")
            problem = config.set(key.strip(), value.strip())
            if problem:
                complaints.append(f"hook.conf line {number} is ignored: {problem}")
    return config, complaints


class Budget:
    """
    The time that all runs of one start, or one end, of a VM have together.

    libvirt runs the hook three times in a start, holding the domain's lock each time. A run that took long leaves a
    file beside natd's socket, in which the next run finds how much is left.
    """

    def __init__(self, config: Config, name: str, operation: str, now: float) -> None:
        raw = name.encode(sys.getfilesystemencoding(), "surrogateescape")
        directory = config.socket.rpartition("/")[0].encode(sys.getfilesystemencoding(), "surrogateescape")
        # Names are of any bytes and length; two with the same long beginning share a budget, which is harmless.
        self._path = directory + b"/hook-" + raw.hex().encode()[:200]
        self._operation = operation
        self._begun = now
        self._least = config.deadline / 4
        self._spent = self._read(now)
        # With nothing left natd is told all the same, though not waited for: only `start` names the interfaces.
        self.end = now + max(config.deadline - self._spent, config.deadline / 20)
        """When this run has to end, on the monotonic clock."""

    def _read(self, now: float) -> float:
        if self._operation not in EARLIER:
            return 0.0
        try:
            operation, spent, at = _read_head(self._path).decode("ascii", "replace").split(" ")
            # From -1: the time was rounded.
            is_of_this_start = operation in EARLIER[self._operation] and -1 < now - float(at) < START_S
            return max(0.0, float(spent)) if is_of_this_start else 0.0
        except (OSError, ValueError):
            return 0.0

    def close(self, now: float) -> None:
        """Leave what the next run has to know."""
        spent = self._spent + now - self._begun
        try:
            if self._operation in LAST:
                if self._spent:
                    posix.unlink(self._path)
            elif spent >= self._least:
                self._write(b"%s %.3f %.3f" % (self._operation.encode(), spent, now))
        except OSError:
            pass  # then each run has the whole time

    def _write(self, text: bytes) -> None:
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC | posix.O_NOFOLLOW
        fd = posix.open(self._path, flags, 0o600)
        try:
            posix.write(fd, text)
        finally:
            posix.close(fd)


def _remaining(end: float) -> float:
    remaining = end - time.monotonic()
    if remaining <= 0:
        raise Failure("the deadline passed")
    return remaining


def read_stdin(fd: int, end: float) -> bytes:
    """Read stdin to its end. :raise Failure: When the deadline passes, or there is more than MAX_XML."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    chunks: list[bytes] = []
    size = 0
    while True:
        if not poll.poll(_remaining(end) * 1000 + 1):
            raise Failure("the deadline passed before libvirt had sent the domain XML")
        chunk = posix.read(fd, 65536)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_XML:
            raise Failure(f"the domain XML is longer than {MAX_XML} bytes")


def build_request(argv: list[str], xml: bytes) -> bytes:
    """Encode the request as libvirt_hooks/protocol.py specifies. :raise Failure: When an argument is too long."""
    name, operation, suboperation, extra = [*argv[1:5], "", ""][:4]
    encoding = sys.getfilesystemencoding()
    raw_name, raw_extra = name.encode(encoding, "surrogateescape"), extra.encode(encoding, "surrogateescape")
    if len(raw_name) > MAX_NAME or len(raw_extra) > MAX_NAME:
        raise Failure(f"an argument is longer than {MAX_NAME} bytes")
    if not (suboperation.isascii() and suboperation.isalpha() and len(suboperation) <= 16):
        suboperation = "-"
    header = f"qemu 1 {operation} {suboperation} {len(raw_name)} {len(raw_extra)} {len(xml)}\n"
    return header.encode() + raw_name + raw_extra + xml


def _connect(sock: _socket.socket, path: str, end: float) -> None:
    # While natd's backlog is full (a hundred VMs starting at once), a blocking connect with SO_SNDTIMEO waits. Python's
    # own timeout makes the socket non-blocking, and connect would fail at once with EAGAIN.
    timeout = divmod(int(_remaining(end) * 1e6) + 1, 1000000)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _struct.pack("ll", *timeout))
    sock.connect(path)
    # Whoever could write to the socket's directory could have been there before natd, and would decide which VMs start.
    _, uid, _ = _struct.unpack("3i", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    if uid not in (0, posix.geteuid()):
        raise Failure(f"the process that listens there runs as user {uid}, not as root, so it is not natd")


def _exchange(sock: _socket.socket, request: bytes, end: float) -> bytes:
    sock.settimeout(_remaining(end))
    try:  # noqa: SIM105 - contextlib is not compiled into the interpreter
        sock.sendall(request)
    except (BrokenPipeError, ConnectionResetError):
        pass  # natd stopped reading early; its answer may say why
    answer = b""
    while b"\n" not in answer:
        sock.settimeout(_remaining(end))
        chunk = sock.recv(MAX_ANSWER)
        if not chunk:
            raise Failure("natd closed the connection before the end of its answer")
        answer += chunk
        if len(answer) > MAX_ANSWER:
            raise Failure("natd's answer is too long")
    return answer


def ask_natd(path: str, request: bytes, end: float) -> str:
    """Send the request to natd. :return: Its answer, one line. :raise Failure, OSError: When there is none."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        _connect(sock, path, end)
        answer = _exchange(sock, request, end)
    except (BlockingIOError, TimeoutError, _socket.timeout):
        raise Failure("no answer before the deadline") from None
    finally:
        sock.close()
    return answer.partition(b"\n")[0].decode("utf-8", "replace")


def refusal_reason(answer: str) -> str:
    """Parse natd's answer. :return: Why to refuse; empty: do not. :raise Failure: When it is any other error."""
    kind, _, rest = answer.partition(" ")
    if kind == "ok":
        return ""
    if kind != "error":
        raise Failure("natd's answer is malformed")
    code, _, text = rest.partition(" ")
    if code != "refuse":
        raise Failure(f"natd answered {code or 'error'}: {text}")
    return text or "natd refuses"


def printable(text: str, limit: int) -> str:
    """Return text cut to ``limit`` characters, with a question mark for each unprintable one."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])


def report(priority: int, sentence: str) -> None:
    """Write a sentence to stderr, which libvirt shows to the user when a start fails, and to syslog."""
    line = printable(sentence, 800).encode("utf-8", "replace")
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        if poll.poll(0):  # else it is a full pipe, and the write would block
            posix.write(2, b"virt-ports: " + line + b"\n")
    except OSError:
        pass
    log = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    log.settimeout(0)
    try:
        # RFC 3164 without the date, which journald and rsyslog add; 24 is the facility "daemon".
        log.sendto(b"<%d>virt-ports-hook[%d]: %s" % (24 + priority, posix.getpid(), line), SYSLOG)
    except OSError:
        pass
    finally:
        log.close()


def run(argv: list[str], config: Config, stdin: int, end: float) -> int:
    """Ask natd. :return: REFUSED or 0."""
    operation = argv[2]
    prefix = f"VM {printable(argv[1], 64)}, {operation}: "
    refusable = operation in REFUSABLE
    try:
        refusal = refusal_reason(ask_natd(config.socket, build_request(argv, read_stdin(stdin, end)), end))
    except (Failure, OSError) as error:
        sentence = f"{prefix}cannot ask natd at {config.socket}: {getattr(error, 'strerror', None) or error}; "
        if config.refuse and refusable:
            report(ERROR, sentence + "refused because of on-failure=refuse in hook.conf (see systemctl status natd)")
            return REFUSED
        report(WARNING, sentence + "libvirt goes on, natd catches up later (see systemctl status natd)")
        return 0
    if refusal:
        report(ERROR if refusable else WARNING, prefix + refusal)
    return REFUSED if refusal and refusable else 0


def main(argv: list[str], environ: dict[bytes, bytes], stdin: int = 0) -> int:
    """
    Handle one call of the hook; prints nothing to stdout and raises nothing, whatever the input.

    :param argv: Program, then NAME OPERATION SUBOPERATION EXTRA as libvirt passes them.
    :param environ: The environment, in bytes.
    :param stdin: File descriptor of the domain XML.
    :return: :data:`REFUSED` when libvirt shall refuse the VM, otherwise 0.
    """
    if argv[2:3] == [CHECK]:
        posix.write(2, CHECK_ANSWER)
        return 0
    if len(argv) < 3 or argv[2] not in OPERATIONS:
        return 0
    try:
        start = time.monotonic()
        config, complaints = read_config(environ.get(b"VIRT_PORTS_HOOK_CONF") or CONF)
        for complaint in complaints:
            report(WARNING, complaint)
        budget = Budget(config, argv[1], argv[2], start)
        try:
            return run(argv, config, stdin, budget.end)
        finally:
            budget.close(time.monotonic())
    except Exception as error:  # a bug in the hook must not fail a VM
        report(ERROR, f"bug in the hook, please report it: {error!r}")
        return 0


if __name__ == "__main__":
    # Not sys.exit: finalizing the interpreter takes a millisecond and has no effect here.
    posix._exit(main(sys.argv, posix.environ))  # noqa: SLF001
