"""
``systemctl`` of a reader's machine, which has no systemd: it does what the installed unit files say.

``Type=oneshot`` is run to its end, any other service is started and waited for until it says that it is ready. No more
of a unit is obeyed: sandbox, user and dependencies are those of ``tests/machines``.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDERS = (Path("/etc/systemd/system"), Path("/usr/lib/systemd/system"))
RUNNING = Path("/run/started")
READY_S = 60.0


def main(words: Sequence[str]) -> int:
    """Do one command of it."""
    verb, *units = [word for word in words if not word.startswith("-")]
    if verb == "daemon-reload":
        return 0
    now = "--now" in words
    for unit in units:
        was = False
        if verb in ("stop", "restart", "try-restart") or (verb == "disable" and now):
            was = end(unit)
        if verb in ("start", "restart") or (verb == "enable" and now) or (verb == "try-restart" and was):
            start(unit)
        elif verb == "reload" or (verb == "try-reload-or-restart" and _note(unit).exists()):
            os.kill(int(_note(unit).read_text()), signal.SIGHUP)
        elif verb not in ("stop", "try-restart", "try-reload-or-restart", "enable", "disable"):
            sys.exit(f"this systemctl has no {verb}")
        if verb in ("enable", "disable"):
            assert _file(unit).read_text().partition("[Install]")[2].strip(), f"{unit} has no [Install]"
    return 0


def start(unit: str) -> None:
    """Start a service that does not run yet; do nothing for a timer."""
    lines = [line.partition("=")[::2] for line in _file(unit).read_text().splitlines() if not line.startswith("#")]
    settings = dict(lines)
    if unit.endswith(".timer"):
        subprocess.run(["systemd-analyze", "calendar", settings["OnCalendar"]], check=True, capture_output=True)
    elif settings.get("Type") == "oneshot":
        for key, value in lines:
            if key in ("ExecStart", "ExecStartPost"):
                subprocess.run(shlex.split(value.replace("%%", "%")), check=True)
    elif not _note(unit).exists():
        _launch(unit, shlex.split(settings["ExecStart"]))


def _launch(unit: str, command: list[str]) -> None:
    RUNNING.mkdir(exist_ok=True)
    path = RUNNING / f"{unit}.notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, (RUNNING / f"{unit}.log").open("a") as log:
        ready.bind(str(path))
        ready.settimeout(1.0)
        environment = {**os.environ, "NOTIFY_SOCKET": str(path)}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        _note(unit).write_text(str(process.pid))
        end_at = time.monotonic() + READY_S
        while time.monotonic() < end_at:
            try:
                if b"READY=1" in ready.recv(4096):
                    break
            except TimeoutError:
                if process.poll() is not None:
                    break
        else:
            process.kill()
        path.unlink()
    if process.poll() is not None:
        _note(unit).unlink()
        sys.exit(f"{unit} did not start: {(RUNNING / f'{unit}.log').read_text()[-2000:]}")


def end(unit: str) -> bool:
    """End a service and wait for it; return whether it ran."""
    note = _note(unit)
    if not note.exists():
        return False
    number = int(note.read_text())
    os.kill(number, signal.SIGTERM)
    while Path(f"/proc/{number}/exe").exists():
        time.sleep(0.01)
    note.unlink()
    return True


def _file(unit: str) -> Path:
    name = unit if "." in unit else f"{unit}.service"
    for folder in FOLDERS:
        if (folder / name).exists():
            return folder / name
    sys.exit(f"Unit {name} not found.")


def _note(unit: str) -> Path:
    return RUNNING / unit.removesuffix(".service")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
