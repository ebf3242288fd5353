"""
``virt-ports report``: an archive with what a bug report needs, and no secret.

Configuration is not copied but read: comments are left out, and values of keys that may be secret are masked. Nothing
of a private key, of the ledger or of other software's configuration is in it. Tested in
``tests/unit/machine_doctor/test_bundle.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import socket
import tarfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from cpm.api import operations
from cpm.api.client import Client
from cpm.protocol import codec
from cpm.protocol.errors import KernelError, VirtPortsError
from cpm.service.config import MAX_LENGTH
from machine_doctor import examination
from machine_doctor.anonymous import Names
from machine_doctor.examination import Sources
from machine_doctor.facts import Facts, Unread
from machine_doctor.readers import files, journal
from natctl.netlink import routes
from natctl.netlink.nftables import read
from natctl.netlink.socket import NETFILTER, ROUTE, Socket
from natctl.ruleset.readback import kernel_state

_HOOK_CONF: Final = Path("/etc/virt-ports/hook.conf")
_MASKED: Final = "(masked)"
_SECRET: Final = re.compile(r"secret|token|passw|credential|auth|(?:^|_)key|webhook|cookie", re.I)
_IN_URL: Final = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s@]*@")
_QUERY: Final = re.compile(r"(?P<url>\bhttps?://[^\s?\"']+)\?[^\s\"']+")
_KEY_BLOCK: Final = re.compile(
    r"-----BEGIN [^-]*PRIVATE KEY[^-]*-----.*?(?:-----END [^-]*PRIVATE KEY[^-]*-----|\Z)", re.S
)
_SAID: Final = re.compile(
    r"(?P<name>\b[\w-]*(?:authorization|passw(?:or)?d|token|secret|credential|api[_-]?key|cookie)[\w-]*[\"']?\s*[:=]\s*)"
    r"(?:(?:bearer|basic|digest)\s+)?(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;\"']+)",
    re.I,
)
"""What a log says of a secret: ``password=…``, ``Authorization: Bearer …``."""
_BEARER: Final = re.compile(r"(?P<name>\bbearer\s+)[\w.~+/=-]{8,}", re.I)
_PACKAGES: Final = re.compile(r"^(?:libvirt|qemu|nftables|iptables|docker|firewalld|ufw|linux-image|systemd$|python3$)")
_UNITS: Final = ("natd", "cpmd", "libvirtd", "virtqemud")
_SHORTEST: Final = 6
"""Characters of a value that is looked for in journals: shorter ones are in every text."""
_MOST_TOKEN: Final = 4096
_ENTRIES: Final = 2000
_EVENTS: Final = 1000
_MODE: Final = 0o600


class Member(NamedTuple):
    """A file of the archive."""

    name: str
    content: str


def collect(sources: Sources, say: Callable[[str], None], *, is_anonymous: bool = False) -> Iterator[Member]:
    """
    Yield the files of the archive. Changes nothing.

    :param say: Called with what is done next.
    :param is_anonymous: Whether VMs, nodes and addresses get other names; journals are left out then.
    """
    say("checks")
    facts = examination.gather(sources)
    found = examination.examine(facts, examination.selected(()))
    client = Client(_socket(facts, sources))
    say("manager")
    answers = dict(_answers(client))
    say("kernel")
    ours, vms = _ours(facts)
    configuration = _configuration(sources)
    names = _names(facts, answers, vms, configuration) if is_anonymous else None
    documents: dict[str, Any] = {"doctor.json": _plain(found), "machine.json": _machine(facts)}
    documents |= {f"manager/{name}.json": answer for name, answer in answers.items()}
    documents |= configuration
    documents |= {"kernel/ours.json": ours, "kernel/others.json": _others(facts)}
    known = _secrets(sources)
    for name, document in documents.items():
        document = document if names is None else names.value(document)
        yield Member(name, _clean(json.dumps(document, indent=2, ensure_ascii=False) + "\n", known))
    # A journal may name VMs that nobody knows any more.
    for unit in _UNITS if names is None else ():
        say(f"journal of {unit}")
        text = "".join(f"{entry.at:.3f} {entry.message}\n" for entry in _journal(unit))
        if text:
            yield Member(f"journal/{unit}.txt", _clean(_SAID.sub(_masked_value, text), known))


def write(members: Iterator[Member], file: io.BufferedIOBase | Any, at: float, folder: str) -> int:
    """
    Write the archive (tar, gzip).

    :param at: Time of the files in it, UTC seconds.
    :param folder: All files are in it.
    :return: How many files there are.
    """
    count = 0
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for member in members:
            content = member.content.encode("utf-8", "replace")
            entry = tarfile.TarInfo(f"{folder}/{member.name}")
            entry.size, entry.mtime, entry.mode = len(content), int(at), 0o644
            archive.addfile(entry, io.BytesIO(content))
            count += 1
    return count


def create(path: Path) -> io.BufferedWriter:
    """
    Create a file that only its owner can read.

    :raise OSError: When it exists, or cannot be created.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE), "wb")


def _masked_value(found: re.Match[str]) -> str:
    return f"{found['name']}{_MASKED}"


def _clean(text: str, secrets: Iterable[str]) -> str:
    """
    Return a text without anything that looks like a private key, and URLs without passwords and queries.

    :param secrets: What is known to be secret, wherever it is.
    """
    text = _KEY_BLOCK.sub(_MASKED, text)
    for secret in secrets:
        text = text.replace(secret, _MASKED)
    text = _BEARER.sub(_masked_value, text)
    return _QUERY.sub(rf"\g<url>?{_MASKED}", _IN_URL.sub(rf"\g<scheme>{_MASKED}@", text))


def _socket(facts: Facts, sources: Sources) -> str:
    import cpm.settings

    cpmd = facts.setup.cpmd
    return sources.socket or (cpmd.listen if cpmd is not None else cpm.settings.ListenSettings()).socket


def _plain(value: object) -> Any:
    return json.loads(codec.encode(value))


def _answers(client: Client) -> Iterator[tuple[str, Any]]:
    calls: dict[str, Callable[[], Any]] = {
        "status": lambda: client.call(operations.STATUS),
        "vms": lambda: client.call(operations.LIST_VMS, all=True),
        "nodes": lambda: client.call(operations.LIST_NODES),
        "pool": lambda: client.call(operations.LIST_POOL),
        "node-events": lambda: client.call(operations.NODE_EVENTS, limit=_EVENTS),
        "events": lambda: list(client.stream(operations.EVENTS, limit=_EVENTS)),
    }
    for name, call in calls.items():
        try:
            yield name, _plain(call())
        except VirtPortsError as error:
            yield name, {"error": str(error)}
            return


def _names(facts: Facts, answers: dict[str, Any], vms: set[str], configuration: dict[str, Any]) -> Names:
    machines = {facts.setup.name, socket.gethostname(), platform.node().partition(".")[0]}
    # As it is written, since natd may refuse the file.
    natd = configuration["configuration/natd.json"] or {}
    machines.add(str(natd.get("name", "")))
    if facts.setup.natd is not None:
        machines.add(urlsplit(facts.setup.natd.manager.url).hostname or "")
    if not isinstance(facts.certificates, Unread):
        machines |= {name for each in facts.certificates for name in each.names}
    for name, answer in answers.items():
        rows = [row for row in answer if isinstance(row, dict)] if isinstance(answer, list) else []
        machines |= {str(row[key]) for row in rows for key in ("node",) if row.get(key)}
        kind = machines if name == "nodes" else vms
        kind |= {str(row["name"]) for row in rows if row.get("name")}
    return Names(machines, vms)


def _machine(facts: Facts) -> dict[str, Any]:
    release = files.text(Path("/etc/os-release"))
    return {
        "virt-ports": facts.version,
        "python": platform.python_version(),
        "kernel": facts.kernel.release,
        "architecture": platform.machine(),
        "os-release": release if isinstance(release, str) else release.why,
        "packages": dict(_packages()),
        "processors": os.cpu_count(),
        "uptime_s": files.line(Path("/proc/uptime")),
        "memory": (files.line(Path("/proc/meminfo")) or "").splitlines()[:3],
        "as_root": facts.is_root,
    }


def _packages(status: Path = Path("/var/lib/dpkg/status")) -> Iterator[tuple[str, str]]:
    """Yield the versions of packages that matter, of Debian's list; nothing elsewhere."""
    try:
        text = status.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for block in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)$", block, re.M)
        version = re.search(r"^Version: (\S+)$", block, re.M)
        if name and version and _PACKAGES.match(name[1]) and "\nStatus: install ok installed" in block:
            yield name[1], version[1]


def _configuration(sources: Sources) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, path in (("natd", sources.natd), ("cpmd", sources.cpmd)):
        text = files.text(path)
        if isinstance(text, Unread):
            found[f"configuration/{name}.json"] = {"error": text.why} if files.is_there(path) else None
            continue
        try:
            found[f"configuration/{name}.json"] = _masked(tomllib.loads(text[:MAX_LENGTH]))
        except (tomllib.TOMLDecodeError, ValueError, RecursionError):
            found[f"configuration/{name}.json"] = {"error": f"{path} is not TOML"}
    hook = files.text(_HOOK_CONF)
    lines = [line.partition("=") for line in hook.splitlines()] if isinstance(hook, str) else []
    pairs = {key.strip(): value.strip() for key, sign, value in lines if sign and not key.lstrip().startswith("#")}
    found["configuration/hook.json"] = _masked(pairs)
    return found


def _secrets(sources: Sources) -> list[str]:
    """
    Return the values that the configuration masks, and what is in files that it names as secret, the longest first.

    They may be in journals: a program that cannot reach a URL says which.
    """
    found: set[str] = set()
    for path in (sources.natd, sources.cpmd):
        text = files.text(path)
        with contextlib.suppress(tomllib.TOMLDecodeError, ValueError, RecursionError):
            found |= set(_secret_values(tomllib.loads(text[:MAX_LENGTH]))) if isinstance(text, str) else set()
    values = {text for value in found for text in _with_content(value)}
    values |= {json.dumps(text, ensure_ascii=False)[1:-1] for text in values}
    return sorted((text for text in values if len(text) >= _SHORTEST), key=len, reverse=True)


def _secret_values(value: Any, *, is_secret: bool = False) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _secret_values(each, is_secret=is_secret or _SECRET.search(name) is not None)
    elif isinstance(value, list):
        for each in value:
            yield from _secret_values(each, is_secret=is_secret)
    elif is_secret and isinstance(value, str):
        yield value


def _with_content(value: str) -> Iterator[str]:
    """Yield a secret, and of a URL its parts; of the path of a file, which is none, each line of the file."""
    if not value.startswith("/"):
        yield value
        with contextlib.suppress(ValueError):
            url = urlsplit(value)
            yield from filter(None, (url.path.strip("/"), url.query, url.username, url.password))
        return
    text = files.text(Path(value))
    if isinstance(text, str):
        lines = map(str.strip, text[:_MOST_TOKEN].splitlines())
        yield from (line for line in lines if not line.startswith("-----"))


def _masked(value: Any, key: str = "") -> Any:
    """Return a configuration with the values of keys that may be secret masked, whatever they are."""
    if isinstance(value, dict):
        return {name: _MASKED if _SECRET.search(name) else _masked(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [_masked(each, key) for each in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def _ours(facts: Facts) -> tuple[dict[str, Any], set[str]]:
    """Return our tables, routes and rule as natd reads them, and the names of VMs in them."""
    try:
        with Socket(NETFILTER, "read our tables") as nft, Socket(ROUTE, "read our routes") as rtnl:
            reading, routing = read.read_tables(nft, lambda: None), routes.read(rtnl)
    except KernelError as error:
        return {"error": str(error)}, set()
    state = kernel_state(facts.setup.kernel, reading, routing)
    holdings = reading.holdings
    vms = {entry.intent.name for entry in state.host.values()} | {entry.name for entry in state.edge.values()}
    return {
        "generation": reading.generation,
        "chains": {f"{family} {name}": len(chain.rules) for (family, name), chain in sorted(holdings.chains.items())},
        "sets": {f"{family} {name}": len(elements) for (family, name), elements in sorted(holdings.elements.items())},
        "dropped": dict(state.drops),
        "hosts_vms": {str(domain): str(entry) for domain, entry in state.host.items()},
        "edges_vms": {str(domain): str(entry) for domain, entry in state.edge.items()},
        "path": str(state.path),
        "rule": str(routing.rule),
        "way": str(routing.way),
        "barrier": routing.barrier,
        "pool": f"{routing.pool} in table {routing.pool_table}",
        "routes": {str(IPv4Address(to)): str(IPv4Address(via)) for to, via in routing.internals.items()},
    }, vms


def _others(facts: Facts) -> dict[str, Any]:
    network, filters = facts.network, facts.filters
    return {
        "interfaces": network.why
        if isinstance(network, Unread)
        else [str(each) for each in network.interfaces.values()],
        "rules": network.why if isinstance(network, Unread) else [str(each) for each in network.rules],
        "ways": network.why if isinstance(network, Unread) else [str(each) for each in network.ways],
        "dropping_chains": filters.why if isinstance(filters, Unread) else [str(each) for each in filters.chains],
        "settings": dict(facts.sysctl),
        "settings_at_boot": [str(each) for each in facts.sysctl_files],
        "processes": [str(each) for each in facts.processes],
    }


def _journal(unit: str) -> list[journal.Entry]:
    return journal.newest([[f"_SYSTEMD_UNIT={unit}.service"], [f"UNIT={unit}.service"]], _ENTRIES)
