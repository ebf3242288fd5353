"""Shared by all verbs: exit codes, errors, help, imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cpm.api.views import StatusView
from cpm.cli import main, parsing, verbs
from cpm.protocol import errors, ledger_errors
from cpm.protocol.error_codes import CODES
from cpm.settings import ListenSettings
from tests.fakes import canned_manager
from tests.fakes.canned_manager import CannedManager, lines, raw, refusal
from tests.unit.cpm.cli.conftest import NOW, Command, domain
from tests.unit.cpm.cli.test_verbs import ADDRESS, DETAIL, EVENTS, EXPLAINED, NODES

REFUSALS = [
    (400, "invalid-request", 2),
    (403, "forbidden", 1),
    (503, "busy", 1),
    (404, "not-found", 1),
    (404, "journal-not-kept", 1),
    (404, "journal-gap", 1),
    (409, "conflict", 1),
    (409, "ambiguous", 1),
    (409, "address-in-use", 1),
    (409, "address-overlaps", 1),
    (409, "ledger-mistrusted", 1),
    (409, "ledger-doubted", 1),
    (409, "ports-in-use", 1),
    (409, "port-held", 1),
    (507, "ports-exhausted", 1),
    (507, "internal-pool-exhausted", 1),
    (403, "not-approved", 1),
    (409, "name-in-use", 1),
    (507, "quota-reached", 1),
    (503, "ledger", 4),
    (507, "ledger-full", 4),
    (503, "ledger-unwritable", 4),
    (503, "schema-too-new", 4),
    (409, "overloading", 4),
    (500, "internal", 4),
    (500, "error", 4),
]


def test_every_error_has_its_http_status() -> None:
    assert {code: kind.http_status for code, kind in CODES.items()} == {
        **{code: status for status, code, _ in REFUSALS if code != "internal"},
        **dict.fromkeys(("config", "illegal-step", "kernel", "unreachable"), 500),
    }


@pytest.mark.parametrize(("status", "code", "exit_code"), REFUSALS)
def test_a_refusal_prints_the_sentence_of_the_manager(
    manager: CannedManager, virt_ports: Command, status: int, code: str, exit_code: int
) -> None:
    manager.on("GET /v1/domains/web1", refusal(status, code, "cannot, because; do this"))
    assert virt_ports("show", "web1") == (exit_code, "", "error: cannot, because; do this\n")
    as_json = virt_ports("show", "web1", "-o", "json")
    assert (as_json.code, as_json.out) == (exit_code, "")
    assert json.loads(as_json.err) == {"code": code, "message": "cannot, because; do this"}


def test_every_error_code_has_the_intended_exit_code() -> None:
    declared = [*vars(errors).values(), *vars(ledger_errors).values()]
    codes = {kind.code for kind in declared if isinstance(kind, type) and hasattr(kind, "code")}
    assert codes == set(CODES)
    ends = dict.fromkeys(codes, 1) | {
        "invalid-request": 2, "unreachable": 3, "error": 4, "kernel": 4, "ledger": 4, "schema-too-new": 4,
        "ledger-full": 4, "ledger-unwritable": 4, "overloading": 4, "illegal-step": 4,
    }  # fmt: skip
    assert {code: int(kind.exit_code) for code, kind in CODES.items()} == ends
    refused = {code for code, end in ends.items() if end == 1}
    assert refused == {"not-found", "ambiguous", "conflict", "address-in-use", "address-overlaps", "ports-exhausted",
                       "internal-pool-exhausted", "config", "not-approved", "name-in-use", "quota-reached", "forbidden",
                       "busy", "journal-not-kept", "ledger-mistrusted", "ledger-doubted", "journal-gap",
                       "ports-in-use", "port-held"}  # fmt: skip


def test_a_code_of_a_newer_manager_is_a_refusal(manager: CannedManager, virt_ports: Command) -> None:
    manager.on("GET /v1/domains/web1", refusal(418, "teapot", "cannot, because; do this"))
    assert virt_ports("show", "web1").code == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (raw(404, b"404: Not Found"), "answered 404 Not Found without an explanation"),
        (raw(200, b"<html>"), "the manager's answer: cannot understand message"),
        (raw(200, b'[{"name": 1}]'), "$[0].name"),
    ],
)
def test_an_answer_that_cannot_be_decoded_is_an_internal_error(
    manager: CannedManager, virt_ports: Command, answer: canned_manager.Answer, message: str
) -> None:
    manager.on("GET /v1/domains", answer)
    result = virt_ports("list")
    assert result.code == 4
    assert message in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB; see `virt-ports --help`"),
        (["lst"], "invalid choice: 'lst' (perhaps 'list'); see `virt-ports --help`"),
        (["node", "aprove"], "invalid choice: 'aprove' (perhaps 'approve'); see `virt-ports node --help`"),
        (["xyzzy"], "invalid choice: 'xyzzy' (choose from '"),
        (["list", "--al"], "unrecognized arguments: --al"),
        (["show"], "the following arguments are required: VM; see `virt-ports show --help`"),
        (["pool"], "the following arguments are required: ACTION; see `virt-ports pool --help`"),
        (["pool", "add"], "the following arguments are required: ADDRESS; see `virt-ports pool add --help`"),
        (["list", "-o", "yaml"], "invalid choice: 'yaml'"),
        (["events", "--limit", "-1"], "not a number: '-1'; use 0 or more"),
        (["events", "--limit", "ten"], "not a number: 'ten'; use 0 or more"),
        (["events", "--limit", "9" * 30], "number out of range: '999999999999999999999999999999'; use 0 or more"),
        (["node", "approve", "h", "--max-vms", "1000001"], "number out of range: '1000001'; use 0 to 1000000"),
        (["node", "approve", "h", "--max-ports", "-1"], "not a number: '-1'; use 0 to 2000000000"),
        (["whois", "203.0.113.1", "1", "--protocol", "gre"], "invalid choice: 'gre'"),
        (["whois", "203.0.113.1", "1", "--at"], "argument --at: expected one argument"),
    ],
)
def test_invalid_arguments_are_usage_errors(virt_ports: Command, words: list[str], message: str) -> None:
    result = virt_ports(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert message in result.err


@pytest.mark.parametrize("words", [["-o", "json", "show"], ["show", "-ojson"], ["--output=json", "show"]])
def test_usage_errors_are_json_when_requested(virt_ports: Command, words: list[str]) -> None:
    result = virt_ports(*words)
    assert result.code == 2
    assert json.loads(result.err)["code"] == "usage"


def test_a_missing_manager_is_reported_with_a_remedy(virt_ports: Command, tmp_path: Path) -> None:
    missing = str(tmp_path / "no.sock")
    result = virt_ports("list", "--socket", missing)
    assert (result.code, result.out) == (3, "")
    assert result.err == (
        f"error: cannot reach {missing}: no such socket; run this on the manager, where `systemctl status cpmd` says "
        "whether cpmd runs; name another socket with --socket or VIRT_PORTS_SOCKET\n"
    )
    assert json.loads(virt_ports("-o", "json", "--socket", missing, "list").err)["code"] == "unreachable"


def test_the_socket_option_takes_precedence_over_the_environment(
    manager: CannedManager, virt_ports: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.on("GET /v1/domains", [domain()])
    monkeypatch.setenv("VIRT_PORTS_SOCKET", "/nonexistent")
    assert virt_ports("list").code == 3
    assert virt_ports("list", "--socket", manager.path).code == 0
    assert virt_ports("--socket", manager.path, "list").code == 0


def test_the_default_socket_is_the_default_of_cpmd() -> None:
    assert ListenSettings().socket == parsing.DEFAULT_SOCKET


def test_the_help_lists_verbs_in_order_of_position(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.execute(["--help"], now=NOW)
    words = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    listed = [word for word in words if word in verbs.names()]
    assert listed == [
        "list", "top", "show", "set", "explain", "resize", "relocate", "forward", "whois", "history", "pool", "audit",
        "node", "events", "export", "record", "simulate", "config", "status", "backup", "restore", "install",
        "uninstall", "doctor", "pki", "report",
    ]  # fmt: skip
    assert sorted(listed) == list(verbs.names())


@pytest.mark.parametrize("verb", verbs.names())
def test_the_help_of_a_verb_has_a_summary_and_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.execute([verb, "--help"], now=NOW)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: virt-ports {verb} ")
    assert f"  virt-ports {verb}" in text.partition("\nexamples:\n")[2]


def test_help_lists_verbs_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.execute(["--help"], now=NOW)
    text = capsys.readouterr().out
    assert all(f"\n    {verb} " in text for verb in verbs.names())
    assert "  3    the manager (cpmd) cannot be reached\n" in text


def test_version_prints_the_installed_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.execute(["--version"], now=NOW)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("virt-ports 0.")


def process(*words: str, socket: str, code: str = "import sys; from cpm.cli.main import main; sys.exit(main())",
            stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=stdout, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "VIRT_PORTS_SOCKET": socket},
    )  # fmt: skip


HEAVY = (
    "msgspec", "http", "ssl", "socket", "asyncio", "cryptography", "aiohttp", "pyroute2", "sqlite_utils", "sqlite3",
    "libvirt", "psutil", "prometheus_client", "argparse", "gettext", "locale", "re", "enum", "typing", "dataclasses",
    "inspect", "json", "ipaddress", "datetime", "pathlib", "logging", "traceback", "subprocess", "threading",
)  # fmt: skip
"""Each takes a millisecond or many to import."""
OURS = 24
"""Modules of ours; each takes a quarter of a millisecond."""
NAMES = "GET /v1/domains?match=w%2A&limit=200"


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["list"], set()),
        (["--socket", "SOCKET", "--color", "never", "list", "web*", "--state", "active", "--limit", "5"], set()),
        (["-o", "json", "list"], {"json", "re", "enum"}),
        (["show", "web1"], {"datetime"}),
        (["explain", "web1"], set()),
        (["node", "list"], set()),
        (["pool", "list"], set()),
        (["status"], {"datetime"}),
        (["events"], {"datetime"}),
        (["__complete", "bash", "vms", "w"], set()),
    ],
)
def test_a_command_imports_only_what_it_needs(manager: CannedManager, words: list[str], needed: set[str]) -> None:
    """An operator waits for every import; in an environment as an operator has it, without a developer's hooks."""
    for key in ("GET /v1/domains", "GET /v1/domains?limit=6&match=web%2A&state=active", NAMES):
        manager.on(key, [domain()])
    manager.on("GET /v1/domains/web1", DETAIL)
    manager.on("GET /v1/domains/web1/explain", EXPLAINED)
    manager.on("GET /v1/nodes", NODES)
    manager.on("GET /v1/pool", [ADDRESS])
    manager.on("GET /v1/events", lines(EVENTS))
    manager.on("GET /v1/status", StatusView("0.1.0", 1, NOW, 1, 2, 2, "ledger.db"))
    code = (
        f"import sys; sys.path.insert(0, {str(Path(main.__file__).parents[2])!r}); before = set(sys.modules); "
        "from cpm.cli.main import main; assert main() == 0; "
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    words = [manager.path if word == "SOCKET" else word for word in words]
    # -S: what site imports is not the command's. Without the libraries: they are not needed.
    done = subprocess.run([sys.executable, "-S", "-c", code, *words], capture_output=True, text=True, check=True,
                          env={"VIRT_PORTS_SOCKET": manager.path}, timeout=60)  # fmt: skip
    assert done.stdout
    imported = done.stderr.split()
    assert {name for name in imported if name.partition(".")[0] in HEAVY} <= {
        name for name in imported if name.partition(".")[0] in needed
    }
    assert sum(name.partition(".")[0] == "cpm" for name in imported) <= OURS


def test_an_interrupt_ends_with_130(manager: CannedManager) -> None:
    release = threading.Event()
    manager.on("GET /v1/events?follow=1", lines(EVENTS, then=lambda: release.wait(60)))
    child = process("events", "--follow", "-o", "json", socket=manager.path)
    assert child.stdout is not None
    assert json.loads(child.stdout.readline())["seq"] == 1041  # arrives although the stream goes on
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    release.set()
    assert (child.returncode, err) == (130, "")


def test_a_closed_pipe_is_no_error(manager: CannedManager) -> None:
    manager.on("GET /v1/domains", [domain()])
    read, write = os.pipe()
    os.close(read)
    child = process("list", socket=manager.path, stdout=write)
    os.close(write)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (141, "")


def test_an_unexpected_error_is_reported_as_a_bug(
    manager: CannedManager, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: canned_manager.Handler) -> None:
        raise AssertionError("never asked")

    def burst(_: object) -> None:
        raise ZeroDivisionError("so what")

    manager.on("GET /v1/domains", broken)
    monkeypatch.setattr(parsing, "reader", burst)
    monkeypatch.setattr(sys, "argv", ["virt-ports", "list"])
    assert main.main() == 4
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith(
        "error: unexpected ZeroDivisionError: so what; please report this as a bug, with the lines above\n"
    )
