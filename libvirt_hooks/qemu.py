#!/bin/sh
""":"
case ${2-} in
    prepare|start|started|stopped|release|reconnect|migrate|restore|attach) ;;
    *) exit 0 ;;
esac
# Not exec: where Python cannot even start (missing, half upgraded, no memory) libvirt would see its exit code, refuse
# the VM and, under reconnect, kill a running one. So 77, which only our own code below gives, is the one that refuses.
/usr/bin/python3 -IS "$0" "$@" >/dev/null
[ $? -eq 77 ] && exit 1
exit 0

The libvirt hook: tells natd what libvirt is about to do with a VM and turns natd's answer into an exit code.

The shell runs the lines above and stops there; Python takes them for the head of this string and starts below it.

libvirt starts this file as ``virt-ports NAME OPERATION SUBOPERATION EXTRA`` with the domain XML on stdin and waits for
it (https://libvirt.org/hooks.html). Hence a deadline over everything it does, and no VM fails unless the operator asked
for that. The file is installed as it is, as /etc/libvirt/hooks/qemu.d/virt-ports. It needs /bin/sh and
/usr/bin/python3 (3.9 or later) and imports only what is compiled into the interpreter: one module read from disk
would cost as much as all it does. What it says to natd is written down in libvirt_hooks/protocol.py.

Settings are in /etc/virt-ports/hook.conf (or the file named in $VIRT_PORTS_HOOK_CONF), one ``key=value`` a line, ``#``
begins a comment; a value that makes no sense is reported and its default used:

- ``socket=/run/virt-ports/natd.sock``: where natd listens.
- ``deadline=2``: seconds for the whole run, above 0 and up to 60.
- ``on-failure=start``: or ``refuse``: what happens to a VM when natd cannot be asked.
"""  # noqa: D213

import _socket
import _struct
import posix
import select
import sys
import time

REFUSED = 77
"""Exit status of the Python part for "libvirt shall refuse this"; the shell part makes it 1."""

OPERATIONS = ("prepare", "start", "started", "stopped", "release", "reconnect", "migrate", "restore", "attach")
REFUSABLE = ("prepare", "start", "started", "migrate")
"""Where a refusal hurts nothing that runs. Under reconnect it would kill the VM."""

MAX_NAME = 4096
MAX_XML = 4 * 1024 * 1024
MAX_ANSWER = 4096
MAX_CONF = 65536

CONF = b"/etc/virt-ports/hook.conf"
SYSLOG = "/dev/log"
ERROR, WARNING = 3, 4
"""Priorities of syslog."""


class Failure(Exception):
    """natd could not be asked, or gave no answer that can be used; the text goes into a sentence."""


class Config:
    """Settings; the class attributes are the defaults."""

    socket = "/run/virt-ports/natd.sock"
    deadline = 2.0
    refuse = False

    def set(self, key: str, value: str) -> str:
        """Take one setting; the answer is what is wrong with it, empty when nothing is."""
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


def _read_start(path: bytes) -> bytes:
    # O_NONBLOCK: a FIFO in the file's place must not hang us.
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    try:
        return posix.read(fd, MAX_CONF)
    finally:
        posix.close(fd)


def read_config(path: bytes) -> tuple[Config, list[str]]:
    """Read the settings and what is wrong with them; no file at all is fine."""
    config = Config()
    try:
        text = _read_start(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return config, []
    except (OSError, ValueError) as error:
        return config, [f"cannot read hook.conf: {error}; using the defaults"]
    complaints = []
    for number, line in enumerate(text.splitlines(), 1):
        setting = line.partition("#")[0].strip()
        if setting:
            key, _, value = setting.partition("=")
            wrong = config.set(key.strip(), value.strip())
            if wrong:
                complaints.append(f"hook.conf line {number} is ignored: {wrong}")
    return config, complaints


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise Failure("the deadline passed")
    return left


def read_stdin(fd: int, end: float) -> bytes:
    """Read all there is; Failure when that takes too long or is too much."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    chunks: list[bytes] = []
    size = 0
    while True:
        if not poll.poll(_left(end) * 1000 + 1):
            raise Failure("the deadline passed before libvirt had sent the domain XML")
        chunk = posix.read(fd, 65536)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_XML:
            raise Failure(f"the domain XML is longer than {MAX_XML} bytes")


def build_request(argv: list[str], xml: bytes) -> bytes:
    """Write the request down as libvirt_hooks/protocol.py says; Failure when an argument is too long."""
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
    # A blocking connect with a time limit in the kernel waits while natd's backlog is full (a hundred VMs starting at
    # once). With Python's own time-out the socket would not block, and the connect fail at once with EAGAIN.
    limit = divmod(int(_left(end) * 1e6) + 1, 1000000)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _struct.pack("ll", *limit))
    sock.connect(path)


def _talk(sock: _socket.socket, request: bytes, end: float) -> bytes:
    sock.settimeout(_left(end))
    try:  # noqa: SIM105 - contextlib is not compiled into the interpreter
        sock.sendall(request)
    except (BrokenPipeError, ConnectionResetError):
        pass  # natd had enough before the end; it may have said why
    answer = b""
    while b"\n" not in answer:
        sock.settimeout(_left(end))
        chunk = sock.recv(MAX_ANSWER)
        if not chunk:
            raise Failure("natd broke off before the end of its answer")
        answer += chunk
        if len(answer) > MAX_ANSWER:
            raise Failure("natd's answer is too long")
    return answer


def ask(path: str, request: bytes, end: float) -> str:
    """Send the request to natd; the answer is its line. Failure or OSError when there is none."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        _connect(sock, path, end)
        answer = _talk(sock, request, end)
    except (BlockingIOError, TimeoutError, _socket.timeout):
        raise Failure("no answer before the deadline") from None
    finally:
        sock.close()
    return answer.partition(b"\n")[0].decode("utf-8", "replace")


def verdict(answer: str) -> str:
    """Read natd's line; the answer is why to refuse, empty when all is well. Failure when it is anything else."""
    kind, _, rest = answer.partition(" ")
    if kind == "ok":
        return ""
    if kind != "error":
        raise Failure("natd's answer makes no sense")
    code, _, text = rest.partition(" ")
    if code != "refuse":
        raise Failure(f"natd answered {code or 'error'}: {text}")
    return text or "natd refuses"


def printable(text: str, limit: int) -> str:
    """Make anything fit for one line of a log."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])


def report(priority: int, sentence: str) -> None:
    """Say it on stderr, which libvirt shows to the user where a start fails, and in the system's log."""
    line = printable(sentence, 800).encode("utf-8", "replace")
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        if poll.poll(0):  # else it is a pipe that nobody reads, and the write would hang
            posix.write(2, b"virt-ports: " + line + b"\n")
    except OSError:
        pass
    log = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    log.settimeout(0)
    try:
        # RFC 3164 without its date, which journald and rsyslog fill in; 24 is the facility "daemon".
        log.sendto(b"<%d>virt-ports-hook[%d]: %s" % (24 + priority, posix.getpid(), line), SYSLOG)
    except OSError:
        pass
    finally:
        log.close()


def run(argv: list[str], config: Config, stdin: int, end: float) -> int:
    """Ask natd and decide; REFUSED or 0."""
    operation = argv[2]
    who = f"VM {printable(argv[1], 64)}, {operation}: "
    refusable = operation in REFUSABLE
    try:
        refusal = verdict(ask(config.socket, build_request(argv, read_stdin(stdin, end)), end))
    except (Failure, OSError) as error:
        why = f"{who}cannot ask natd at {config.socket}: {getattr(error, 'strerror', None) or error}; "
        if config.refuse and refusable:
            report(ERROR, why + "refused, since hook.conf says on-failure=refuse (see systemctl status natd)")
            return REFUSED
        report(WARNING, why + "libvirt goes on, natd mends it later (see systemctl status natd)")
        return 0
    if refusal:
        report(ERROR if refusable else WARNING, who + refusal)
    return REFUSED if refusal and refusable else 0


def main(argv: list[str], environ: dict[bytes, bytes], stdin: int = 0) -> int:
    """
    Do the whole work of one hook call; prints nothing on stdout.

    :param argv: Program, then NAME OPERATION SUBOPERATION EXTRA as libvirt gives them; any garbage.
    :param environ: The environment, in bytes.
    :param stdin: File descriptor of the domain XML.
    :return: :data:`REFUSED` when libvirt shall refuse, otherwise 0. Nothing is raised, whatever comes in.
    """
    if len(argv) < 3 or argv[2] not in OPERATIONS:
        return 0
    try:
        start = time.monotonic()
        config, complaints = read_config(environ.get(b"VIRT_PORTS_HOOK_CONF") or CONF)
        for complaint in complaints:
            report(WARNING, complaint)
        return run(argv, config, stdin, start + config.deadline)
    except Exception as error:  # a mistake of ours must not cost anybody a VM
        report(ERROR, f"a mistake in the hook itself, please report it: {error!r}")
        return 0


if __name__ == "__main__":
    # Not sys.exit: taking the interpreter down in good order costs a millisecond and changes nothing.
    posix._exit(main(sys.argv, posix.environ))  # noqa: SLF001
