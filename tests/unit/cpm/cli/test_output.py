"""What every verb prints with ``-o json``, beside a real cpmd, is what docs/reference/output.schema.json says."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cpm.api.client import Client
from cpm.api.operations import SHOW_VM
from cpm.cli import main, output_reference
from cpm.cli.output_reference import PRINTED
from cpm.cli.parser import build
from cpm.ledger import SqliteLedger
from cpm.protocol.errors import ExitCode
from cpm.protocol.messages import Attach, Measured, Report
from tests.fakes.cpmd import Node
from tests.unit.cpm.cli.conftest import DB, WEB
from tests.unit.cpm.cli.test_with_cpmd import Manager, connected, cpmd

__all__ = ["cpmd"]  # a fixture

REFERENCE = Path(__file__).parents[4] / "docs/reference"

CALLS = {
    "list": "list --all",
    "top": "top -n 2 -d 1",
    "show": "show web1",
    "explain": "explain web1",
    "set": "set web1 floor=128 weight=200",
    "resize": "resize web1 512",
    "relocate": "relocate db",
    "forward add": "forward add web1 22 --port 22222",
    "forward list": "forward list",
    "forward remove": "forward remove web1 22222",
    "whois": "whois 203.0.113.1 1024",
    "history": "history web1",
    "pool list": "pool list",
    "pool show": "pool show 203.0.113.1",
    "pool remove": "pool remove 203.0.113.3",
    "node list": "node list",
    "node show": "node show host1",
    "node approve": "node approve host9 --role host --underlay 172.30.0.19",
    "node fence": "node fence host9",
    "node unfence": "node unfence host9",
    "node revoke": "node revoke host9",
    "node remove": "node remove host9",
    "node events": "node events",
    "audit": "audit",
    "events": "events",
    "export": "export",
    "record": "record {folder}/load.csv --for 1",
    "status": "status",
    "simulate": "simulate --generate steady --vms 2 --seconds 20 --policy static:64 --policy predictive",
    "config diff": "config diff",
    "config reload": "config reload --yes",
    "config check": "config check {cpmd}/cpmd.toml {folder}/cpmd.toml",
    "backup": "backup {folder}/monday.db --config {cpmd}/cpmd.toml",
    "restore": "restore {folder}/monday.db --config {folder}/cpmd.toml",
    "install": "install --role host,edge,manager --root {folder}/image",
    "uninstall": "uninstall --yes --root {folder}/image",
    "doctor": "doctor --natd-config {folder}/none --cpmd-config {folder}/none",
    "doctor --list": "doctor --list",
    "pki init": "pki init --folder {folder}/pki",
    "pki issue": "pki issue host1 172.30.0.2 --folder {folder}/pki",
    "pki renew": "pki renew host1 --folder {folder}/pki",
    "pki list": "pki list --folder {folder}/pki",
    "report": "report --file {folder}/report.tar.gz --natd-config {folder}/none --cpmd-config {folder}/none",
}
"""In this order; the others are called by the test itself."""


def complaints(words: str, document: object) -> list[str]:
    """Return what is wrong with a document; keys that the schema does not name are wrong, too."""
    schema = output_reference.schema_of(words)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator = jsonschema.Draft202012Validator(closed(schema), format_checker=checker)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def closed(schema: Any) -> Any:
    """Return a schema that takes no other keys than those that it names."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **made} if "properties" in made else made


def documents(words: str, text: str) -> list[object]:
    return [json.loads(line) for line in text.splitlines()] if PRINTED[words].is_lines else [json.loads(text)]


def run(manager: Manager, command: str) -> str:
    """Return what a command prints; it runs in this process."""
    words = [*shlex.split(command), "-o", "json", "--socket", manager.socket_path]
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.execute(words, now=time.time())
    # What a doctor or a check finds decides their exit code.
    assert code == ExitCode.DONE or words[0] in ("doctor", "config"), err.getvalue()
    out.seek(0)
    return out.read()


@contextlib.asynccontextmanager
async def reporting(node: Node) -> AsyncIterator[None]:
    """Have a host report, over and over."""

    async def report() -> None:
        while True:
            measured = (Measured(WEB, 500.0, 10.0, 17, 3.5), Measured(DB, 1.0, 0.0, None))
            await node.say(Report(node.generation, 1.0, measured))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(report())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def followed(manager: Manager) -> str:
    """Return the first lines of ``events --follow``."""
    argv = [sys.executable, "-m", "cpm.cli.main", "events", "--follow", "-o", "json", "--socket", manager.socket_path]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            return b"".join([await process.stdout.readline() for _ in range(3)]).decode()
    finally:
        process.kill()
        await process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="doctor and report look into the kernel")
async def test_every_verb_prints_what_is_described(cpmd: Manager, tmp_path: Path) -> None:
    SqliteLedger(tmp_path / "ledger.db").close()
    (tmp_path / "cpmd.toml").write_text(f'[ledger]\npath = "{tmp_path}/ledger.db"\n')
    (tmp_path / "image").mkdir()
    printed = {"pool add": await asyncio.to_thread(run, cpmd, "pool add 203.0.113.1-203.0.113.3 --reserved 5060")}
    async with connected(cpmd, "host1") as node:
        await node.say(Attach(WEB, "web1"))
        await node.say(Attach(DB, "db"))
        while not all([await asyncio.to_thread(_is_active, cpmd, name) for name in ("web1", "db")]):
            await asyncio.sleep(0.02)
        async with reporting(node):
            with (Path(cpmd.socket_path).parent / "cpmd.toml").open("a") as config:
                config.write("[pool]\ninitial = 512\nblock = 128\n")
            for words, command in CALLS.items():
                full = command.format(folder=tmp_path, cpmd=Path(cpmd.socket_path).parent)
                printed[words] = await asyncio.to_thread(run, cpmd, full)
            printed["events --follow"] = await followed(cpmd)
    assert printed.keys() == PRINTED.keys()
    found = {
        words: [line for document in documents(words, text) for line in complaints(words, document)]
        for words, text in printed.items()
    }
    assert {words: lines for words, lines in found.items() if lines} == {}
    empty = {words for words, text in printed.items() if not any(documents(words, text))}
    assert empty == set(), "nothing was validated"


def _is_active(manager: Manager, name: str) -> bool:
    with contextlib.suppress(Exception):
        return Client(manager.socket_path).call(SHOW_VM, name=name).domain.state == "active"
    return False


def test_no_verb_and_no_action_is_left_out() -> None:
    parser = build()
    assert output_reference.undocumented(parser) == set(), "say in output_reference.PRINTED what it prints"


def test_a_verb_of_which_nothing_is_said_is_found() -> None:
    parser = build(["list"])
    [verbs] = [each for each in parser._actions if hasattr(each, "add_parser")]
    verbs.add_parser("shout").add_subparsers().add_parser("loudly")
    assert output_reference.undocumented(parser) == {"shout loudly"}


@pytest.mark.parametrize(
    ("words", "document"),
    [
        ("list", {}),
        ("list", [{"name": 1}]),
        ("backup", {"file": "x", "bytes": 1}),
        ("backup", {"file": "x", "bytes": 1, "ledger": "y", "more": 1}),
        ("restore", {"ledger": "y", "former": 1}),
        ("error", {"code": "x"}),
    ],
)
def test_what_is_wrong_is_noticed(words: str, document: object) -> None:
    assert complaints(words, document)


def test_errors_are_as_described(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["list"], ["show"], ["config", "check", "/nowhere/x.toml"], ["backup", "/x", "--config", "/nowhere"]):
        assert main.execute([*words, "-o", "json", "--socket", "/nonexistent"], now=0.0) != 0
        assert complaints("error", json.loads(capsys.readouterr().err)) == []


@pytest.mark.parametrize(("name", "text"), list(output_reference.files()))
def test_the_pages_are_generated(name: str, text: str) -> None:
    assert (REFERENCE / name).read_text() == text, "run make manuals"


def test_the_schema_is_one() -> None:
    document = json.loads((REFERENCE / "output.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    assert set(map(output_reference._key, PRINTED)) < document["$defs"].keys()
