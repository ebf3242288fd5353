"""`virt-ports uninstall`, the files: exactly what was installed goes."""

from __future__ import annotations

import contextlib
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


CPMD = """
[listen]
socket = "/srv/run/cpmd.sock"
[ledger]
path = "/srv/db/ports.db"
[events]
file = "/srv/log/events.jsonl"
"""
NATD = """
state = "/srv/natd"
[listen]
socket = "/srv/run/natd.sock"
"""
OF_LEDGER = (
    "db/ports.db", "db/ports.db-wal", "db/ports.db-shm", "db/ports.db.lock", "db/ports.db.before-restore-1",
    "db/events/file.position", "db/journal/journal-1-9.jsonl.gz",
)  # fmt: skip
OF_NATD = (
    "natd/follows.json", "natd/grants", "natd/.follows.json.abcdefgh", "run/natd.sock", "run/settings-before.json",
    "run/cpmd.sock",
)  # fmt: skip
OF_OTHERS = ("db/others.db", "natd/theirs", "run/other.sock", "log/events.jsonl", "db/journal-1-9.jsonl.gz")


@pytest.fixture
def elsewhere(image: Path) -> Path:
    """An image whose settings have the daemons write where other software writes, too."""
    install(image)
    put(image, "etc/virt-ports/cpmd.toml", CPMD)
    put(image, "etc/virt-ports/natd.toml", NATD)
    for path in (*OF_LEDGER, *OF_NATD, *OF_OTHERS):
        put(image, f"srv/{path}")
    return image


def of_srv(image: Path) -> set[str]:
    return {path.removeprefix("srv/") for path in tree(image) if path.startswith("srv/")}


def test_what_the_settings_have_elsewhere_goes_and_nothing_beside_it(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert uninstall(elsewhere, "--edited", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "would remove /srv/db/ports.db\n" in said
    assert "would keep /srv/log/events.jsonl: you have had it written" in said
    assert of_srv(elsewhere) == {*OF_LEDGER, *OF_NATD, *OF_OTHERS}
    assert uninstall(elsewhere, "--edited") == 0
    assert of_srv(elsewhere) == set(OF_OTHERS)
    assert not (elsewhere / "srv/db/events").exists()
    assert not (elsewhere / "srv/db/journal").exists()
    assert not (elsewhere / "etc/virt-ports").exists()


def test_a_ledger_elsewhere_can_stay(elsewhere: Path) -> None:
    assert uninstall(elsewhere, "--keep-ledger") == 0
    assert of_srv(elsewhere) == {*OF_LEDGER, *OF_OTHERS}


def test_a_folder_for_the_journal_that_the_operator_chose_stays(elsewhere: Path) -> None:
    put(elsewhere, "etc/virt-ports/cpmd.toml", CPMD + '[journal]\nexport = "/srv/archive"\n')
    put(elsewhere, "srv/archive/journal-1-9.jsonl.gz")
    assert uninstall(elsewhere) == 0
    assert of_srv(elsewhere) == {*OF_OTHERS, "archive/journal-1-9.jsonl.gz"}


def test_what_an_uninstall_that_was_killed_has_left_is_still_found(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are the only ones to know where it is."""
    unlink, left = Path.unlink, len(tree(elsewhere))
    for dies_at in range(left):
        seen = 0

        def unlink_or_die(self: Path, missing_ok: bool = False, dies_at: int = dies_at) -> None:
            nonlocal seen
            seen += 1
            if seen > dies_at:
                raise KeyboardInterrupt
            unlink(self, missing_ok=missing_ok)

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(Path, "unlink", unlink_or_die)
            uninstall(elsewhere, "--edited")
    assert uninstall(elsewhere, "--edited") == 0
    assert of_srv(elsewhere) == set(OF_OTHERS)


@pytest.mark.parametrize("name", ["cpmd", "natd"])
def test_settings_that_cannot_be_read_are_no_reason_to_forget_what_they_name(
    elsewhere: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(elsewhere, f"etc/virt-ports/{name}.toml", "[ledger\n")
    before = tree(elsewhere)
    assert uninstall(elsewhere, "--edited") == ExitCode.REFUSED
    assert tree(elsewhere) == before
    assert f"{name}.toml" in capsys.readouterr().err


def test_the_key_of_the_authority_stays(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image)
    put(image, "etc/virt-ports/pki/ca.key")
    assert uninstall(image, "--edited") == 0
    assert tree(image) == {**THEIRS, "etc/virt-ports/pki/ca.key": b"state\n"}
    assert "kept /etc/virt-ports/pki: the certificate authority" in capsys.readouterr().out


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
