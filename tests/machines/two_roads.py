"""
The two roads, package and pipx, end in the same state: compares what each adds to a system, file by file.

Run by package.sh in the system, with Debian's own Python and nothing else:

    two_roads.py snapshot FILE            what the system has
    two_roads.py compare BEFORE DEB PIPX  what each adds to it; fails when a difference has no explanation
    two_roads.py left BEFORE AFTER        what is left; fails when there is something
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import re
import stat
import sys
from pathlib import Path
from typing import Any

SKIPPED = (
    "/proc",
    "/sys",
    "/dev",
    "/tmp",
    "/var/tmp",
    "/var/log",
    "/var/cache",
    "/var/lib/dpkg",
    "/src",
    "/work",
    "/root",
)
LOWER, UPPER = "/run/lower", "/run/upper"
"""Where package.sh has the system below the overlay, and what was written since."""
READ = ("/etc/", "/run/", "/usr/lib/systemd/", "/usr/lib/sysusers.d/", "/usr/lib/tmpfiles.d/", "/var/lib/virt-ports")
KEPT_OF_RUN = ("/run/virt-ports", "/run/virt-ports-natd")

MOVED = {
    "/usr/lib/systemd/system/cpmd.service": "/etc/systemd/system/cpmd.service",
    "/usr/lib/systemd/system/natd.service": "/etc/systemd/system/natd.service",
    "/usr/lib/sysusers.d/virt-ports.conf": "/etc/sysusers.d/virt-ports.conf",
    "/usr/lib/tmpfiles.d/virt-ports.conf": "/etc/tmpfiles.d/virt-ports.conf",
}
"""Files of the package that the other road has where an administrator's files are; systemd reads both."""

PROGRAMS = re.compile(r"/usr/lib/virt-ports/bin|/opt/virt-ports/venvs/virt-ports/bin")

ONLY_THE_PACKAGE = {
    r"/usr/lib/virt-ports(/.*)?": "the programs; pipx has them in /opt/virt-ports",
    r"/usr/bin/virt-ports": "the command; pipx has it in /usr/local/bin",
    r"/usr/share/(man|bash-completion|fish|zsh)(/.*)?": "manuals and completions; pipx leaves them in its folder",
    r"/usr/share/virt-ports(/.*)?": "alert rules and dashboard; pipx leaves them in its folder",
    r"/usr/share/doc/virt-ports(/.*)?|/usr/share/lintian/.*": "what every package of Debian has",
    r"/var/lib/systemd/deb-systemd-helper-.*": "notes of debhelper, for the time after a removal",
}
ONLY_PIPX = {
    r"/etc/(sysusers|tmpfiles)\.d": "folders for the files that the package has in /usr/lib",
    r"/etc/libvirt(/hooks)?": "folders of libvirt's, which `uninstall` leaves; here without libvirt",
}
Entry = tuple[str, int, str, str, str]
"""Kind, mode, owner, group, and digest or target."""


def snapshot() -> dict[str, Entry]:
    """Look at what was written since the overlay was made: everything else is the same in all snapshots."""
    found = {}
    for top in (UPPER, *KEPT_OF_RUN):
        for folder, folders, names in os.walk(top):
            place = folder.removeprefix(UPPER)
            folders[:] = sorted(each for each in folders if not is_skipped(f"{place}/{each}"))
            for path in (f"{place}/{name}" for name in (*folders, *names)):
                # A file of the system that was removed is there as a mark of the overlay; a folder in which something
                # was written is there as a copy.
                if not is_skipped(path) and os.path.lexists(path) and not is_copy(path):
                    found[path] = entry(path)
        if top != UPPER and os.path.lexists(top):
            found[top] = entry(top)
    return found


def is_copy(path: str) -> bool:
    """Say whether a folder is that of the system below the overlay."""
    if not Path(path).is_dir() or not Path(LOWER + path).is_dir():
        return False
    return entry(path) == entry(LOWER + path)


def is_skipped(path: str) -> bool:
    if path.startswith("/run/"):
        return not path.startswith(KEPT_OF_RUN)
    return (
        path in SKIPPED
        or path.endswith(("/__pycache__", "/ld.so.cache", "/etc/.pwd.lock"))
        or bool(re.fullmatch(r"/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?", path))
    )


def entry(path: str) -> Entry:
    status = os.lstat(path)
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = str(Path(path).readlink())
    elif stat.S_ISREG(status.st_mode) and not path.startswith(READ):
        # Neither road shares them with the other one, so whether they are other files is enough.
        content = f"{status.st_size} {status.st_mtime_ns}"
    elif stat.S_ISREG(status.st_mode):
        text = Path(path).read_bytes()
        if path in MOVED or path in MOVED.values():
            text = PROGRAMS.sub("BINDIR", text.decode()).encode()
        content = described(path, text)
    kind = stat.filemode(status.st_mode)[0]
    return kind, stat.S_IMODE(status.st_mode), owner(status.st_uid), group(status.st_gid), content


def described(path: str, text: bytes) -> str:
    if path != "/etc/virt-ports/install.json":
        return hashlib.sha256(text).hexdigest()
    # The list of what was written has the files that the package brings on one road only.
    document = json.loads(text)
    files = {name: value for name, value in document.pop("files").items() if name not in MOVED.values()}
    return json.dumps([document, files], sort_keys=True)


def owner(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def user() -> list[str]:
    """The user's entry without its number, which is the next free one."""
    found = pwd.getpwnam("virt-ports")
    members = sorted(each.gr_name for each in grp.getgrall() if "virt-ports" in each.gr_mem)
    return [found.pw_gecos, found.pw_dir, found.pw_shell, group(found.pw_gid), *members]


def compare(before: dict[str, Any], deb: dict[str, Any], pipx: dict[str, Any]) -> list[str]:
    """Print each difference with its explanation; return those without."""
    of_deb, of_pipx = ({MOVED.get(path, path): value for path, value in after["files"].items()
                        if before["files"].get(path) != value} for after in (deb, pipx))  # fmt: skip
    unexplained = []
    explained: dict[str, int] = {}
    for path in sorted(of_deb.keys() | of_pipx.keys()):
        one, other = of_deb.get(path), of_pipx.get(path)
        if one == other:
            continue
        reasons = ONLY_THE_PACKAGE if other is None else ONLY_PIPX if one is None else {}
        reason = next((text for pattern, text in reasons.items() if re.fullmatch(pattern, path)), None)
        if reason is None:
            unexplained.append(f"{path}: package {one}, pipx {other}")
        else:
            explained[reason] = explained.get(reason, 0) + 1
    if deb["user"] != pipx["user"]:
        unexplained.append(f"the user: package {deb['user']}, pipx {pipx['user']}")
    same = sorted(path for path in of_deb if of_deb[path] == of_pipx.get(path))
    print(f"the same on both roads: {len(same)}: {' '.join(same)}")
    for path, other in MOVED.items():
        print(f"explained: the package has {path}, pipx {other}: same text but for the folder of the programs")
    for reason, count in explained.items():
        print(f"explained: {count} paths of one road only: {reason}")
    if len(same) < len(MOVED) + 5:
        unexplained.append(f"too little is the same: {same}")
    return unexplained


def left(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what is left; an empty folder of systemd's or libvirt's may stay, since it may be somebody else's."""
    one, other = before["files"], after["files"]
    differing = sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))
    return [f"{path}: before {one.get(path)}, after {other.get(path)}" for path in differing
            if path in one or not any(re.fullmatch(pattern, path) for pattern in ONLY_PIPX)]  # fmt: skip


def main() -> int:
    if sys.argv[1] == "snapshot":
        known: dict[str, Any] = {"files": snapshot()}
        try:
            known["user"] = user()
        except KeyError:
            known["user"] = []
        Path(sys.argv[2]).write_text(json.dumps(known))
        return 0
    documents = [json.loads(Path(name).read_text()) for name in sys.argv[2:]]
    found = left(*documents) if sys.argv[1] == "left" else compare(*documents)
    for text in found:
        print(f"NOT EXPLAINED: {text}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
