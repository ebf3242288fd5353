"""Files that are read again after a crash: whole, on disk, and written in one place only."""

from __future__ import annotations

import ast
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpm.service import files

REPOSITORY = Path(__file__).parents[4]
PRODUCT = ("cpm", "natctl", "qga_agent", "libvirt_hooks", "machine_doctor")

WRITERS = {
    "cpm/service/files.py": "the one function",
    "cpm/ledger/locking.py": "what it writes beside the ledger stays open, and is synced",
    "cpm/ledger/copies.py": "SQLite writes and syncs the copy; a backup must replace nothing",
    "cpm/ledger/export.py": "a file of the journal must replace nothing; it is synced",
    "cpm/serving/event_sinks.py": "appends to the operator's file, and syncs it",
    "natctl/remembering.py": "overwrites a number of fixed length that need not outlive the machine",
    "natctl/kernel/sysctl.py": "/proc/sys",
    "cpm/cli/verbs/export.py": "the operator's output, which it syncs",
    "cpm/cli/verbs/record.py": "the operator's output",
    "cpm/cli/verbs/simulate.py": "the operator's output",
    "machine_doctor/bundle.py": "the operator's output",
    "cpm/cli/main.py": "/dev/null",
    "cpm/cli/manual.py": "written into the source tree by make",
    "cpm/cli/completion.py": "written into the source tree by make",
    "cpm/cli/output_reference.py": "written into the source tree by make",
    "natctl/kernel/reconciling.py": "replaces entries of a table, no file",
    "natctl/kernel/following.py": "replaces entries of a table, no file",
    "natctl/kernel/fast_path.py": "replaces programs, no file",
    "natctl/core/node.py": "replaces an intent, no file",
    "cpm/core/invariants.py": "replaces what is known of kernels, no file",
}
"""Modules that write or rename files in another way, or seem to, and why they may."""

_CALLS = {
    "write_text",
    "write_bytes",
    "mkstemp",
    "NamedTemporaryFile",
    "rename",
    "renames",
    "hardlink_to",
    "fsync",
    "link",
}


def other_ways(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that write or rename a file."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        modes = [each.value for each in (*call.args, *(word.value for word in call.keywords if word.arg == "mode"))
                 if isinstance(each, ast.Constant) and isinstance(each.value, str)]  # fmt: skip
        if name in _CALLS or (name == "replace" and len(call.args) == 1 and not call.keywords):
            yield f"{name} in line {call.lineno}"
        elif name == "open" and any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes):
            yield f"open for writing in line {call.lineno}"
        elif name == "open" and any(
            "O_WRONLY" in ast.unparse(each) or "O_RDWR" in ast.unparse(each) for each in call.args
        ):
            yield f"os.open for writing in line {call.lineno}"


def modules() -> list[Path]:
    return sorted(path for package in PRODUCT for path in (REPOSITORY / package).rglob("*.py"))


def test_nothing_is_written_in_another_way() -> None:
    found = {str(path.relative_to(REPOSITORY)): list(other_ways(ast.parse(path.read_text()))) for path in modules()}
    others = {name: ways for name, ways in found.items() if ways and name not in WRITERS}
    assert others == {}, "use cpm.service.files.replace, or say in WRITERS why not"
    assert [name for name in WRITERS if not found.get(name)] == [], "take them out of WRITERS"


@pytest.mark.parametrize("text", [
    "path.write_text('x')", "part.rename(path)", "Path(a).replace(b)", "path.open('w')", "open(p, 'xb')",
    "os.open(p, os.O_WRONLY)", "tempfile.mkstemp()", "open(p, mode='a')", "os.open(p, os.O_CREAT | os.O_RDWR)",
])  # fmt: skip
def test_another_way_would_be_found(text: str) -> None:
    assert list(other_ways(ast.parse(text)))


@pytest.mark.parametrize("text", ["text.replace('a', 'b')", "replace(x, a=1)", "path.open('rb')", "open(p)"])
def test_what_writes_nothing_is_not_found(text: str) -> None:
    assert not list(other_ways(ast.parse(text)))


class Disk:
    """Notes in which order what is written reaches the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        sync, rename = os.fsync, Path.replace

        def fsync(descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            self.steps.append("folder" if is_folder else f"text {os.fstat(descriptor).st_size}")
            sync(descriptor)

        def replace(part: Path, target: Path) -> Path:
            self.steps.append("name")
            return rename(part, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", replace)


def test_the_text_is_on_disk_before_the_name_and_the_name_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    files.replace(tmp_path / "a", b"12345", 0o640)
    assert disk.steps == ["text 5", "name", "folder"]
    assert (tmp_path / "a").read_bytes() == b"12345"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_what_fails_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    files.replace(tmp_path / "a", b"former", 0o600)

    def refuse(part: Path) -> None:
        assert part.read_bytes() == b"new"
        raise ValueError

    with pytest.raises(ValueError):
        files.replace(tmp_path / "a", b"new", 0o600, check=refuse)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"former"}


def test_the_part_of_a_writer_that_was_killed_goes_and_that_of_another_one_stays(tmp_path: Path) -> None:
    for name in (".a.abcdefgh", ".a.12345678", ".b.abcdefgh", ".a.abc"):
        (tmp_path / name).write_text("half")
    with (tmp_path / ".a.12345678").open("rb") as lives:
        fcntl.flock(lives, fcntl.LOCK_EX)
        files.replace(tmp_path / "a", b"x", 0o600)
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.12345678", ".b.abcdefgh", ".a.abc"}


def test_the_new_file_can_be_made_in_another_folder_and_executed_there(tmp_path: Path) -> None:
    (tmp_path / "executed").mkdir()
    seen: list[int] = []

    def run(part: Path) -> None:
        assert part.parent == tmp_path
        seen.append(os.spawnv(os.P_WAIT, part, ["x"]))

    files.replace(tmp_path / "executed" / "a", b"#!/bin/sh\nexit 3\n", 0o755, folder=tmp_path, check=run)
    assert seen == [3]
    assert [path.name for path in (tmp_path / "executed").iterdir()] == ["a"]
