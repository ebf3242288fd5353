"""`virt-ports uninstall`, the files: exactly what was installed goes."""

from __future__ import annotations

import io
import json
import stat
import sys
from pathlib import Path

import pytest

from cpm.cli import asking, main
from cpm.protocol.errors import ExitCode
from tests.unit.cpm.install.test_install import HOOK, install, tree

THEIRS = {"etc/libvirt/qemu.conf": b"theirs\n", "etc/systemd/system/theirs.service": b"[Unit]\n"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    for path, content in THEIRS.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return tmp_path


def uninstall(root: Path, *arguments: str) -> int:
    return main.execute(["uninstall", "--yes", "--root", str(root), *arguments], now=0.0)


def put(root: Path, path: str, text: str = "state\n") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_exactly_what_was_installed_goes(image: Path) -> None:
    install(image)
    for path in ("var/lib/virt-ports/ledger.db", "var/lib/virt-ports-natd/follows.json", "run/virt-ports-natd/hook-0"):
        put(image, path)
    assert uninstall(image) == 0
    assert tree(image) == THEIRS
    assert not (image / "etc/virt-ports").exists()
    assert not (image / "etc/libvirt/hooks/qemu.d").exists()
    assert uninstall(image) == 0


def test_the_ledger_can_stay(image: Path) -> None:
    install(image)
    put(image, "var/lib/virt-ports/ledger.db")
    assert uninstall(image, "--keep-ledger") == 0
    assert tree(image) == {**THEIRS, "var/lib/virt-ports/ledger.db": b"state\n"}


def test_what_was_edited_stays_but_for_the_hook(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image)
    for path in (HOOK, "etc/virt-ports/natd.toml"):
        put(image, path, "# mine\n")
    install(image)  # puts the new texts beside them
    capsys.readouterr()
    assert uninstall(image) == 0
    assert tree(image) == {
        **THEIRS, "etc/virt-ports/natd.toml": b"# mine\n", "etc/virt-ports/hook.edited": b"# mine\n"
    }  # fmt: skip
    assert not stat.S_IMODE((image / "etc/virt-ports/hook.edited").stat().st_mode) & 0o111
    said = capsys.readouterr().out
    assert "kept /etc/virt-ports/natd.toml: edited\n" in said
    assert f"moved /{HOOK}: edited; it goes to /etc/virt-ports/hook.edited\n" in said


def test_with_edited_nothing_stays(image: Path) -> None:
    install(image)
    put(image, "etc/virt-ports/natd.toml", "# mine\n")
    assert uninstall(image, "--edited") == 0
    assert tree(image) == THEIRS


def test_a_dry_run_changes_nothing_and_says_everything(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image)
    before = tree(image)
    capsys.readouterr()
    assert uninstall(image, "--dry-run", "-o", "json") == 0
    assert tree(image) == before
    document = json.loads(capsys.readouterr().out)
    assert {each["path"][1:] for each in document["files"]} == set(before) - set(THEIRS)
    assert document["files"][0]["path"] == f"/{HOOK}", "libvirt executes it"
    assert document["remaining"]


def test_without_a_terminal_nothing_is_done_unasked(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image)
    before = tree(image)
    assert main.execute(["uninstall", "--root", str(image)], now=0.0) == ExitCode.USAGE
    assert tree(image) == before
    assert "--yes" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("\n", False), ("", False), ("no\n", False)])
def test_it_asks_first(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, *, goes: bool
) -> None:
    install(image)
    before = tree(image)
    capsys.readouterr()
    monkeypatch.setattr(asking, "has_terminal", lambda: True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert (main.execute(["uninstall", "--root", str(image)], now=0.0) == 0) is goes
    assert tree(image) == (THEIRS if goes else before)
    assert f"would remove /{HOOK}\n" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/virt-ports/../passwd", "/var/lib/x", "etc/passwd", "/"])
def test_a_manifest_that_lists_other_files_is_refused(
    image: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    install(image)
    put(image, "etc/passwd", "root\n")
    manifest = image / "etc/virt-ports/install.json"
    manifest.write_text(json.dumps({"format": 1, "roles": [], "files": {path: "0"}}))
    before = tree(image)
    assert uninstall(image, "--edited") == ExitCode.REFUSED
    assert tree(image) == before
    assert "none of our files" in capsys.readouterr().err


def test_where_nothing_is_nothing_is_done(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert uninstall(image) == 0
    assert tree(image) == THEIRS
    assert "nothing of virt-ports is here" in capsys.readouterr().out


def test_what_an_install_that_was_killed_has_written_goes(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook without natd would delay or refuse each start of a VM."""
    rename = Path.replace

    def rename_and_die(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if target == image / HOOK:
            raise KeyboardInterrupt
        return renamed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", rename_and_die)
        with pytest.raises(KeyboardInterrupt):
            install(image)
    assert (image / HOOK).exists()
    assert uninstall(image) == 0
    assert tree(image) == THEIRS


@pytest.mark.parametrize("link", ["var/lib", "run", "etc/virt-ports", "etc/libvirt/hooks"])
def test_an_image_whose_links_lead_out_of_it_changes_nothing_here(image: Path, tmp_path_factory: pytest.TempPathFactory,
                                                                  link: str) -> None:  # fmt: skip
    here = tmp_path_factory.mktemp("here")
    install(image)
    for path in ("var/lib/virt-ports/ledger.db", "run/virt-ports/cpmd.sock"):
        put(image, path)
    (image / link).rename(here / "moved")
    (image / link).symlink_to(here / "moved")
    before = tree(here)
    assert uninstall(image) == ExitCode.REFUSED
    assert tree(here) == before
