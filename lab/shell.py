"""Commands that run to their end: here, in a network namespace, or as a batch of ``ip``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from lab.errors import CommandFailed, LabError

CLEAN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}
"""What a service gets from systemd, roughly. Daemons and hooks start with this, not with the caller's shell."""


def run(
    *argv: str | Path,
    stdin: str = "",
    environment: Mapping[str, str] = CLEAN_ENVIRONMENT,
    timeout_s: float = 120.0,
) -> str:
    """
    Run a command to its end.

    :param stdin: Text given on standard input.
    :return: Standard output.
    :raise CommandFailed: When it ends with a status other than 0.
    :raise LabError: When the command does not exist, or runs for longer than ``timeout_s`` (it is killed then).
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, env=dict(environment), timeout=timeout_s, check=False
        )
    except FileNotFoundError as error:
        raise LabError(f"cannot run {words[0]}: it is not installed; run `make setup`") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(words)}` did not end within {timeout_s:g} s; look at what it waits for") from error
    if done.returncode:
        raise CommandFailed(words, done.returncode, done.stderr or done.stdout)
    return done.stdout


def namespace_path(namespace: str) -> Path:
    """Return where ``ip netns`` keeps a namespace."""
    return Path("/run/netns") / namespace


def inside(namespace: str) -> list[str]:
    """Return the command prefix that runs a command in a network namespace, in the root directory."""
    return ["nsenter", f"--net={namespace_path(namespace)}", "--wd=/", "--"]


def ip_batch(lines: Iterable[str], namespace: str | None = None) -> None:
    """
    Run many ``ip`` commands in one process.

    :param lines: Commands without the word ``ip``.
    :param namespace: Where they run; ``None`` for the namespace of the caller.
    :raise CommandFailed: At the first that fails; the ones before it stay done.
    """
    where = [] if namespace is None else ["-n", namespace]
    run("ip", *where, "-batch", "-", stdin="".join(f"{line}\n" for line in lines))


def sysctl(namespace: str, settings: Mapping[str, int | str]) -> None:
    """
    Set kernel parameters of a network namespace.

    :raise CommandFailed: When the kernel knows no such parameter or refuses the value.
    """
    run(*inside(namespace), "sysctl", "-qp", "-", stdin="".join(f"{key}={value}\n" for key, value in settings.items()))


def require_root() -> None:
    """:raise LabError: When the caller is not root."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces and needs root: run it with sudo")
