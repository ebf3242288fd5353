"""
Executes the installed hook once, as libvirtd would, to see that it runs.

A hook that cannot be executed refuses every VM's start, and kills the running ones when libvirtd starts. This is the
one place of the product that starts a process, and the process is our own hook.

Tested in ``tests/unit/cpm/install/test_install.py`` and, with a real libvirtd, ``tests/e2e/test_hook.py``.
"""

from __future__ import annotations

import errno
import os
import subprocess  # noqa: TID251 - the one exception: libvirt executes the hook, so only executing it shows that it runs
from pathlib import Path
from typing import Final

ANSWER: Final = b"virt-ports: the hook runs"
"""Line that the hook writes to stderr for the operation ``check``, which libvirt does not have."""

_ARGUMENTS: Final = ("virt-ports-check", "check", "begin", "-")
_DOMAIN: Final = b"<domain type='qemu'><name>virt-ports-check</name></domain>\n"
_ENVIRONMENT: Final = {"LC_ALL": "C", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
"""What libvirtd passes on to hooks (virCommandAddEnvPassCommon) when systemd started it."""
_TIMEOUT_S: Final = 10.0


def reason_not_to_run(hook: Path) -> str:
    """
    Execute the hook with an operation that does nothing.

    :param hook: The complete file; nobody may have it open for writing.
    :return: Why it does not run, and a remedy; an empty string when it runs.
    """
    try:
        done = subprocess.run(
            [str(hook), *_ARGUMENTS],
            input=_DOMAIN,
            capture_output=True,
            cwd="/",
            env=_ENVIRONMENT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {_TIMEOUT_S:.0f} s; find out what /bin/sh or /usr/bin/python3 waits for"
    except OSError as error:
        return _why_not_executed(hook, error)
    if done.returncode == 0 and ANSWER in done.stderr.splitlines():
        return ""
    said = " ".join(done.stderr.decode("utf-8", "replace").split())[:300] or "it says nothing"
    return f"it ends with status {done.returncode} ({said}); it needs /bin/sh and /usr/bin/python3 (3.9 or later)"


def _why_not_executed(hook: Path, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOEXEC):
        return f"its interpreter /bin/sh cannot be executed ({error.strerror}); install it"
    if error.errno in (errno.EACCES, errno.EPERM):
        if os.statvfs(hook).f_flag & os.ST_NOEXEC:
            return f"{hook.parent} is on a file system that is mounted noexec; mount it with exec"
        return (
            f"the system forbids to execute it ({error.strerror}); with SELinux run `restorecon -v {hook.parent}`, "
            "with AppArmor allow it in the profile"
        )
    return f"it cannot be executed: {error.strerror}"
