"""`virt-ports install`, from the command line to the files of an image."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path, PurePosixPath

import msgspec
import pytest

from cpm import settings as cpmd_settings
from cpm.cli import main
from cpm.install import apply, choices, configs, hook_check, machine, plan, sources, steps
from cpm.install.choices import EDGE, HOST, MANAGER
from cpm.install.plan import Action, Target
from cpm.protocol.errors import ConfigError, ExitCode, InvalidRequest
from cpm.protocol.model import Role
from cpm.protocol.overlaps import Use
from libvirt_hooks import qemu
from natctl import settings as natd_settings

HERE = machine.MachineFacts(
    "node1", "eth0", {"eth0": IPv4Address("198.51.100.11"), "eth1": IPv4Address("172.30.0.11")}
)  # fmt: skip
NOWHERE = machine.MachineFacts("node1", None, {})
REMOTE = "https://172.30.0.2:7414"
FILES = {
    "etc/libvirt/hooks/qemu.d/virt-ports", "etc/systemd/system/cpmd.service", "etc/systemd/system/natd.service",
    "etc/sysusers.d/virt-ports.conf", "etc/tmpfiles.d/virt-ports.conf", "etc/virt-ports/cpmd.toml",
    "etc/virt-ports/hook.conf", "etc/virt-ports/install.json", "etc/virt-ports/natd.toml",
}  # fmt: skip


def install(root: Path, *arguments: str, roles: str = "host,edge,manager") -> int:
    return main.execute(["install", "--role", roles, "--root", str(root), *arguments], now=0.0)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class TestFiles:
    def test_everything_on_one_machine(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert install(tmp_path) == 0
        assert set(tree(tmp_path)) == FILES
        output = capsys.readouterr().out
        for path in FILES - {"etc/virt-ports/install.json"}:
            assert f"created /{path}\n" in output
        assert "systemctl daemon-reload && systemctl enable --now cpmd natd" in output
        assert "try-reload-or-restart libvirtd" in output

    @pytest.mark.parametrize(
        ("roles", "missing"),
        [
            ("host", {"cpmd.service", "cpmd.toml"}),
            ("edge", {"cpmd.service", "cpmd.toml", "hook.conf", "virt-ports"}),
            ("manager", {"natd.service", "natd.toml", "hook.conf", "virt-ports"}),
        ],
    )
    def test_each_role_gets_its_files_only(self, tmp_path: Path, roles: str, missing: set[str]) -> None:
        assert install(tmp_path, "--manager", REMOTE, roles=roles) == 0
        assert {Path(path).name for path in FILES - set(tree(tmp_path))} == missing

    def test_the_hook_is_the_source_file_and_executable(self, tmp_path: Path) -> None:
        install(tmp_path)
        hook = tmp_path / "etc/libvirt/hooks/qemu.d/virt-ports"
        assert hook.read_text() == sources.hook_file(f"/{HOOK}")
        assert hook.read_text().startswith(Path(qemu.__file__).read_text())
        assert stat.S_IMODE(hook.stat().st_mode) == 0o755

    def test_the_manifest_lists_every_file(self, tmp_path: Path) -> None:
        install(tmp_path)
        files = tree(tmp_path)
        manifest = json.loads(files.pop("etc/virt-ports/install.json"))
        assert manifest["roles"] == ["edge", "host", "manager"]
        assert manifest["files"] == {f"/{path}": plan.digest(content) for path, content in files.items()}

    def test_installing_again_changes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        install(tmp_path)
        before = tree(tmp_path)
        capsys.readouterr()
        assert install(tmp_path) == 0
        assert tree(tmp_path) == before
        output = capsys.readouterr().out
        assert output.count("unchanged /") == len(FILES) - 1
        assert "libvirtd" not in output

    def test_a_dry_run_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert install(tmp_path, "--dry-run") == 0
        assert tree(tmp_path) == {}
        assert "would create /etc/systemd/system/natd.service\n" in capsys.readouterr().out

    def test_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert install(tmp_path, "-o", "json") == 0
        document = json.loads(capsys.readouterr().out)
        assert {"path": "/etc/virt-ports/natd.toml", "action": "create", "why": ""} in document["files"]
        assert document["remaining"]


class TestEdited:
    def test_an_edited_file_is_kept_and_the_new_text_is_put_beside_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(tmp_path)
        edited = [tmp_path / path for path in ("etc/systemd/system/natd.service", "etc/virt-ports/natd.toml")]
        originals = [path.read_bytes() for path in edited]
        for path in edited:
            path.write_text("# mine\n")
        capsys.readouterr()
        assert install(tmp_path) == 0
        assert [path.read_text() for path in edited] == ["# mine\n"] * 2
        assert [path.with_name(f"{path.name}.new").read_bytes() for path in edited] == originals
        assert "kept /etc/systemd/system/natd.service (put the new text beside it" in capsys.readouterr().out

    def test_the_new_text_is_removed_once_the_file_is_equal_to_it(self, tmp_path: Path) -> None:
        install(tmp_path)
        config = tmp_path / "etc/virt-ports/natd.toml"
        original = config.read_bytes()
        config.write_text("# mine\n")
        install(tmp_path)
        config.write_bytes(original)
        install(tmp_path)
        assert set(tree(tmp_path)) == FILES

    def test_adding_a_role_later_leaves_the_configuration(self, tmp_path: Path) -> None:
        install(tmp_path, "--manager", REMOTE, roles="host")
        before = (tmp_path / "etc/virt-ports/natd.toml").read_bytes()
        install(tmp_path, roles="host,edge,manager")
        assert (tmp_path / "etc/virt-ports/natd.toml").read_bytes() == before
        assert b"[edge]" in (tmp_path / "etc/virt-ports/natd.toml.new").read_bytes()

    def test_a_masked_unit_stays_masked(self, tmp_path: Path) -> None:
        unit = tmp_path / "etc/systemd/system/natd.service"
        unit.parent.mkdir(parents=True)
        unit.symlink_to("/dev/null")
        install(tmp_path)
        assert unit.readlink() == Path("/dev/null")

    @pytest.mark.parametrize(
        ("is_config", "found", "written", "action"),
        [
            (False, None, None, Action.CREATE),
            (False, None, "an old digest", Action.CREATE),
            (False, b"new", None, Action.LEAVE),
            (False, b"old", plan.digest(b"old"), Action.UPDATE),
            (False, b"old", None, Action.KEEP),
            (False, b"edited", plan.digest(b"old"), Action.KEEP),
            (True, b"old", plan.digest(b"old"), Action.KEEP),
            (True, b"new", None, Action.LEAVE),
            (True, None, None, Action.CREATE),
        ],
    )
    def test_the_action_for_a_file(
        self, *, is_config: bool, found: bytes | None, written: str | None, action: Action
    ) -> None:
        assert plan.decide(Target(PurePosixPath("/f"), "new", is_config=is_config), found, written) is action


PACKAGED = {
    "etc/systemd/system/cpmd.service": "usr/lib/systemd/system/cpmd.service",
    "etc/systemd/system/natd.service": "usr/lib/systemd/system/natd.service",
    "etc/sysusers.d/virt-ports.conf": "usr/lib/sysusers.d/virt-ports.conf",
    "etc/tmpfiles.d/virt-ports.conf": "usr/lib/tmpfiles.d/virt-ports.conf",
}


def unpack(root: Path, files: dict[str, bytes]) -> None:
    """Put the files of a package where it has them; both roads have the same programs here."""
    for path, packaged in PACKAGED.items():
        (root / packaged).parent.mkdir(parents=True, exist_ok=True)
        (root / packaged).write_bytes(files[path])


class TestPackaged:
    """A Debian package has brought the units, the user and the directories."""

    def test_both_roads_end_in_the_same_state(self, tmp_path: Path) -> None:
        by_pip, by_deb = tmp_path / "pip", tmp_path / "deb"
        by_pip.mkdir()
        install(by_pip)
        unpack(by_deb, tree(by_pip))
        assert install(by_deb) == 0
        wanted = {PACKAGED.get(path, path): content for path, content in tree(by_pip).items()}
        found = tree(by_deb)
        listed = [json.loads(files.pop("etc/virt-ports/install.json"))["files"] for files in (wanted, found)]
        assert found == wanted
        assert {PACKAGED.get(path[1:], path[1:]) for path in listed[0]} == set(found)
        assert {path[1:] for path in listed[1]} == set(found) - set(PACKAGED.values())

    def test_what_the_package_has_done_is_not_asked_for(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(tmp_path)
        unpack(tmp_path, tree(tmp_path))
        for path in PACKAGED:
            (tmp_path / path).unlink()
        capsys.readouterr()
        install(tmp_path)
        said = capsys.readouterr().out
        assert "not needed /etc/systemd/system/natd.service: the package has brought /usr/lib/systemd/system/" in said
        assert "systemd-sysusers" not in said
        assert "  1. systemctl enable --now cpmd natd\n" in said

    def test_a_copy_in_etc_would_hide_the_next_version(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(tmp_path)
        unpack(tmp_path, tree(tmp_path))
        capsys.readouterr()
        install(tmp_path)
        assert not set(PACKAGED) & set(tree(tmp_path))
        assert "systemctl daemon-reload && systemctl enable" in capsys.readouterr().out
        before = tree(tmp_path)
        install(tmp_path)
        assert tree(tmp_path) == before

    def test_an_edited_copy_in_etc_stays(self, tmp_path: Path) -> None:
        install(tmp_path)
        unpack(tmp_path, tree(tmp_path))
        (tmp_path / "etc/systemd/system/natd.service").write_text("# mine\n")
        install(tmp_path)
        assert (tmp_path / "etc/systemd/system/natd.service").read_text() == "# mine\n"

    def test_the_package_of_other_programs_is_not_ours(self, tmp_path: Path) -> None:
        """As when pip's programs are installed beside the package: the units of /etc say which run."""
        install(tmp_path)
        files = {path: content.replace(b"/bin/natd", b"/elsewhere/natd") for path, content in tree(tmp_path).items()}
        unpack(tmp_path, files)
        install(tmp_path)
        assert "etc/systemd/system/natd.service" in tree(tmp_path)


class TestRefresh:
    def refresh(self, root: Path) -> int:
        return main.execute(["install", "--refresh", "--root", str(root)], now=0.0)

    def test_hook_and_units_of_an_earlier_version_are_replaced(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(tmp_path)
        new = tree(tmp_path)
        paths = [HOOK, "etc/systemd/system/natd.service"]
        manifest = json.loads(new["etc/virt-ports/install.json"])
        for path in paths:
            (tmp_path / path).write_text("#!/bin/sh\n# an earlier version\n")
            manifest["files"][f"/{path}"] = plan.digest((tmp_path / path).read_bytes())
        (tmp_path / "etc/virt-ports/install.json").write_text(json.dumps(manifest))
        (tmp_path / "etc/virt-ports/natd.toml").unlink()
        capsys.readouterr()
        assert self.refresh(tmp_path) == 0
        assert tree(tmp_path) == {path: new[path] for path in new if path != "etc/virt-ports/natd.toml"}
        assert "systemctl daemon-reload && systemctl try-restart natd\n" in capsys.readouterr().out

    def test_what_is_not_there_is_not_made(self, tmp_path: Path) -> None:
        install(tmp_path, "--manager", REMOTE, roles="edge")
        (tmp_path / "etc/systemd/system/natd.service").unlink()
        before = tree(tmp_path)
        assert self.refresh(tmp_path) == 0
        assert tree(tmp_path) == before

    def test_nothing_is_done_where_nothing_was_installed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.refresh(tmp_path) == 0
        assert tree(tmp_path) == {}
        assert "Left to do" not in capsys.readouterr().out

    def test_what_was_edited_is_kept(self, tmp_path: Path) -> None:
        install(tmp_path)
        (tmp_path / HOOK).write_text("#!/bin/sh\n# mine\n")
        assert self.refresh(tmp_path) == 0
        assert (tmp_path / HOOK).read_text() == "#!/bin/sh\n# mine\n"


class TestRefused:
    @pytest.mark.parametrize("roles", ["", "hosts", "host,", "host;edge", "Host"])
    def test_invalid_roles_are_refused(self, tmp_path: Path, roles: str) -> None:
        ok = roles == "host,"  # a trailing comma is accepted
        assert install(tmp_path, "--manager", REMOTE, roles=roles) == (0 if ok else ExitCode.USAGE)

    def test_a_node_without_a_manager_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert install(tmp_path, roles="host") == ExitCode.USAGE
        assert "--manager https://ADDRESS:PORT" in capsys.readouterr().err
        assert tree(tmp_path) == {}

    def test_only_root_can_install_on_this_machine(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert install(Path("/")) == ExitCode.USAGE
        assert "only root" in capsys.readouterr().err

    @pytest.mark.parametrize("directory", ["/root/.local/bin", "/home/me/bin", "bin", "/opt/my programs", "/opt/%h"])
    def test_a_directory_that_services_cannot_use_is_refused(self, tmp_path: Path, directory: str) -> None:
        assert install(tmp_path, "--bindir", directory) == ExitCode.USAGE

    def test_a_link_that_leads_out_of_the_image_is_refused(self, tmp_path: Path) -> None:
        outside, root = tmp_path / "outside", tmp_path / "root"
        outside.mkdir()
        root.mkdir()
        (root / "etc").symlink_to(outside)
        assert install(root) == ExitCode.REFUSED
        assert tree(outside) == {}

    def test_an_invalid_manifest_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        install(tmp_path)
        (tmp_path / "etc/virt-ports/install.json").write_text("[]")
        assert install(tmp_path) == ExitCode.REFUSED
        assert "install.json: not a manifest" in capsys.readouterr().err

    def test_a_failed_write_leaves_no_partial_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left"):
            apply.Installer(tmp_path).install([Target(PurePosixPath("/etc/f"), "text")], ["host"])
        assert tree(tmp_path) == {}


HOOK = "etc/libvirt/hooks/qemu.d/virt-ports"


def hook_target(text: str = "#!/bin/sh\n") -> Target:
    (hook,) = [target for target in plan.targets(
        choices.complete(HERE, frozenset({HOST, MANAGER})), PurePosixPath("/usr/bin")
    ) if target.path == plan.HOOK]  # fmt: skip
    return dataclasses.replace(hook, text=text)


class TestHookFolder:
    """libvirt executes every file in it."""

    def test_nothing_lies_there_while_the_hook_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = (tmp_path / HOOK).parent
        seen: list[set[str]] = []
        fsync = os.fsync

        def look(fd: int) -> None:
            seen.append({path.name for path in folder.iterdir()} if folder.is_dir() else set())
            fsync(fd)

        apply.Installer(tmp_path).install([hook_target()], [HOST])
        monkeypatch.setattr(os, "fsync", look)
        apply.Installer(tmp_path).install([hook_target("#!/bin/sh\n# new\n")], [HOST])
        assert seen
        assert set().union(*seen) == {"virt-ports"}
        assert (tmp_path / HOOK).read_text() == "#!/bin/sh\n# new\n"

    def test_the_new_text_of_an_edited_hook_lies_elsewhere(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / HOOK).parent.mkdir(parents=True)
        (tmp_path / HOOK).write_text("#!/bin/sh\n# mine\n")
        install(tmp_path)
        assert [path.name for path in (tmp_path / HOOK).parent.iterdir()] == ["virt-ports"]
        assert (tmp_path / "etc/libvirt/hooks/virt-ports.new").read_text() == sources.hook_file(f"/{HOOK}")
        assert "beside it, /etc/libvirt/hooks/virt-ports.new" in capsys.readouterr().out

    def test_what_earlier_installs_left_there_goes(self, tmp_path: Path) -> None:
        folder = (tmp_path / HOOK).parent
        folder.mkdir(parents=True)
        others = {"50-theirs", ".virt-ports.conf.swp.x"}
        for name in (".virt-ports.a8_xkq2z", "virt-ports.new", *others):
            (folder / name).write_text("")
        install(tmp_path)
        assert {path.name for path in folder.iterdir()} == {"virt-ports", *others}

    def test_another_file_system_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rename = Path.replace

        def refuse(self: Path, target: Path) -> Path:
            if target == tmp_path / HOOK:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(ConfigError, match=r"not on the file system of .*hooks; mount both together"):
            apply.Installer(tmp_path).install([hook_target()], [HOST])
        assert set(tree(tmp_path)) == {"etc/virt-ports/install.json"}


class TestHookIsShownToRun:
    def install(
        self, root: Path, text: str, reason_not_to_run: Callable[[Path], str] = hook_check.reason_not_to_run
    ) -> plan.FileOutcome:
        (done,) = apply.Installer(root, reason_not_to_run=reason_not_to_run).install([hook_target(text)], [HOST])
        return done

    def test_ours_runs_where_it_is(self, tmp_path: Path) -> None:
        assert self.install(tmp_path, sources.hook_file()).action is Action.CREATE
        assert hook_check.reason_not_to_run(tmp_path / HOOK) == ""

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("#!/no/such/interpreter\n", "/bin/sh cannot be executed"),
            ("no script\0\1", "cannot be executed"),
            ("#!/bin/sh\nexit 3\n", "ends with status 3"),
            ("#!/bin/sh\n/usr/bin/no-python\nexit 0\n", "status 0 .*no-python.*needs /bin/sh and /usr/bin/python3"),
        ],
    )
    def test_one_that_does_not_run_never_reaches_the_folder(self, tmp_path: Path, text: str, why: str) -> None:
        done = self.install(tmp_path, text)
        assert done.action is Action.TAKE_AWAY
        assert re.search(why, done.why)
        assert not (tmp_path / HOOK).exists()
        assert list((tmp_path / "etc/libvirt/hooks").rglob("*")) == [(tmp_path / HOOK).parent]
        assert f"/{HOOK}" not in json.loads((tmp_path / "etc/virt-ports/install.json").read_text())["files"]

    def test_one_that_runs_only_elsewhere_is_taken_away(self, tmp_path: Path) -> None:
        def check(hook: Path) -> str:
            return "forbidden" if hook == tmp_path / HOOK else ""

        assert self.install(tmp_path, "#!/bin/sh\n", reason_not_to_run=check).why == "forbidden"
        assert not (tmp_path / HOOK).exists()

    def test_one_of_an_earlier_install_that_runs_no_more_is_taken_away(self, tmp_path: Path) -> None:
        self.install(tmp_path, sources.hook_file())
        done = self.install(tmp_path, sources.hook_file(), reason_not_to_run=lambda _: "no interpreter")
        assert done.action is Action.TAKE_AWAY
        assert not (tmp_path / HOOK).exists()
        assert self.install(tmp_path, sources.hook_file()).action is Action.CREATE

    def test_somebody_elses_is_not_executed(self, tmp_path: Path) -> None:
        (tmp_path / HOOK).parent.mkdir(parents=True)
        (tmp_path / HOOK).write_text("theirs")
        asked: list[Path] = []

        def check(hook: Path) -> str:
            asked.append(hook)
            return "executed"

        done = self.install(tmp_path, "#!/bin/sh\n", reason_not_to_run=check)
        assert (done.action, asked) == (Action.KEEP, [])
        assert (tmp_path / HOOK).read_text() == "theirs"

    def test_one_that_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hook_check, "_TIMEOUT_S", 0.2)
        assert "does not end within" in self.install(tmp_path, "#!/bin/sh\nexec sleep 10\n").why

    def test_the_operator_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        outcome = plan.FileOutcome(plan.HOOK, Action.TAKE_AWAY, why="no interpreter; install it")
        monkeypatch.setattr(apply.Installer, "install", lambda *_: [outcome])
        assert install(tmp_path) == ExitCode.REFUSED
        said = capsys.readouterr().out
        assert f"NOT installed {plan.HOOK}: no interpreter; install it; then run this again" in said
        assert install(tmp_path, "-o", "json") == ExitCode.REFUSED
        files = json.loads(capsys.readouterr().out)["files"]
        assert files == [{"path": str(plan.HOOK), "action": "take away", "why": outcome.why}]


class TestConfigurations:
    """The daemons accept the generated configuration."""

    @pytest.mark.parametrize("roles", [{HOST, EDGE, MANAGER}, {HOST, EDGE}, {HOST}, {EDGE}, {EDGE, MANAGER}])
    @pytest.mark.parametrize("underlay", [None, "eth1"])
    def test_natd_accepts_its_generated_configuration(
        self, tmp_path: Path, roles: set[str], underlay: str | None
    ) -> None:
        wanted = choices.complete(
            HERE, frozenset(roles), manager=None if MANAGER in roles else REMOTE, underlay=underlay
        )
        path = tmp_path / "natd.toml"
        path.write_text(configs.natd_toml(wanted))
        settings = natd_settings.load(path)
        assert settings.name == "node1"
        assert settings.roles == {Role(role) for role in roles - {MANAGER}}
        assert str(settings.underlay_address) == ("172.30.0.11" if underlay else "198.51.100.11")
        assert settings.manager.url == wanted.manager_url
        assert (settings.manager.certificate is None) == (MANAGER in roles)

    def test_one_machine_is_its_own_edge(self, tmp_path: Path) -> None:
        path = tmp_path / "natd.toml"
        path.write_text(configs.natd_toml(choices.complete(HERE, frozenset({HOST, EDGE, MANAGER}))))
        settings = natd_settings.load(path)
        assert settings.host is not None
        assert settings.edge is not None
        assert settings.host.uplinks == settings.edge.uplinks == {"eth0"}
        assert not settings.edge.underlay

    @pytest.mark.parametrize("forward", ["all", "vms"])
    def test_an_edge_forwards_what_was_chosen(self, tmp_path: Path, forward: str) -> None:
        address = ("--underlay", "eth1", "--underlay-address", "172.30.0.21")
        install(tmp_path, "--manager", REMOTE, "--uplink", "eth0", *address, "--forward", forward, roles="edge")
        settings = natd_settings.load(tmp_path / "etc/virt-ports/natd.toml")
        assert settings.edge is not None
        assert settings.edge.forward.value == forward

    def test_a_host_without_the_edge_role_sends_to_the_underlay(self, tmp_path: Path) -> None:
        path = tmp_path / "natd.toml"
        path.write_text(configs.natd_toml(choices.complete(HERE, frozenset({HOST}), manager=REMOTE, underlay="eth1")))
        settings = natd_settings.load(path)
        assert settings.host is not None
        assert settings.host.uplinks == {"eth1"}

    def test_any_name_is_quoted(self, tmp_path: Path) -> None:
        path = tmp_path / "natd.toml"
        name = 'a"b\\c\nü'
        path.write_text(configs.natd_toml(choices.complete(HERE, frozenset({HOST, MANAGER}), name=name)))
        assert natd_settings.load(path).name == name

    def test_cpmd_accepts_its_generated_configuration(self, tmp_path: Path) -> None:
        path = tmp_path / "cpmd.toml"
        path.write_text(configs.cpmd_toml())
        assert cpmd_settings.load(path) == cpmd_settings.Settings()

    def test_the_hook_accepts_its_generated_configuration(self, tmp_path: Path) -> None:
        path = tmp_path / "hook.conf"
        path.write_text(configs.hook_conf())
        config, complaints = qemu.read_config(os.fsencode(path))
        assert complaints == []
        assert vars(config) == {}

    def test_commented_settings_are_the_defaults(self, tmp_path: Path) -> None:
        """So that taking a `#` away changes nothing, and no comment names a setting that is gone."""
        path = tmp_path / "all.toml"
        path.write_text(_uncommented(configs.cpmd_toml()))
        cpmd, default = cpmd_settings.load(path), cpmd_settings.Settings()
        pool = msgspec.structs.replace(cpmd.pool, timeouts=default.pool.timeouts)
        assert (pool, cpmd.ledger, cpmd.scaling) == (default.pool, default.ledger, default.scaling)
        assert cpmd.timeouts() == default.timeouts()
        assert cpmd.listen.socket == default.listen.socket
        plain = configs.natd_toml(choices.complete(HERE, frozenset({HOST, EDGE, MANAGER})))
        path.write_text(plain)
        as_written = natd_settings.load(path)
        path.write_text(_uncommented(plain))
        assert natd_settings.load(path) == as_written
        path.write_text(_uncommented(configs.hook_conf()))
        config, complaints = qemu.read_config(os.fsencode(path))
        assert complaints == []
        assert (config.socket, config.deadline, config.refuse) == (
            qemu.Config.socket, qemu.Config.deadline, qemu.Config.refuse
        )  # fmt: skip

    def test_a_missing_setting_is_a_remaining_step_and_refused_by_natd(self, tmp_path: Path) -> None:
        wanted = choices.complete(NOWHERE, frozenset({EDGE}), manager=REMOTE)
        left = steps.after_install(wanted, [])
        for setting in ("underlay_address", "edge.uplinks", "edge.underlay"):
            assert any(setting in step for step in left)
        path = tmp_path / "natd.toml"
        path.write_text(configs.natd_toml(wanted))
        with pytest.raises(ConfigError):
            natd_settings.load(path)


PROVIDER = machine.MachineFacts(
    "node1", "eth0", {"eth0": IPv4Address("100.72.0.10")},
    frozenset({Use.of(IPv4Address("100.72.0.10"), "address of eth0"),
               Use(IPv4Network("100.64.0.0/16"), "route through eth0")}),
)  # fmt: skip


class TestInternalPool:
    """A machine of a provider, cloud or VPN that uses 100.64.0.0/10 itself."""

    def test_one_that_fits_is_chosen(self, tmp_path: Path) -> None:
        wanted = choices.complete(PROVIDER, frozenset({HOST, EDGE, MANAGER}))
        assert wanted.internal_pool == IPv4Network("100.65.0.0/16")
        path = tmp_path / "cpmd.toml"
        path.write_text(configs.cpmd_toml(wanted.internal_pool))
        assert cpmd_settings.load(path).pool.internal == wanted.internal_pool
        (step,) = [step for step in steps.after_install(wanted, []) if "100.65.0.0/16" in step]
        assert "100.72.0.10 (address of eth0)" in step

    def test_it_is_asked_for_when_none_fits(self) -> None:
        everything = frozenset(
            Use(IPv4Network(network), "route through eth0")
            for network in ("100.64.0.0/10", "10.0.0.0/8", "172.16.0.0/12")
        )
        wanted = choices.complete(dataclasses.replace(PROVIDER, uses=everything), frozenset({HOST, EDGE, MANAGER}))
        assert wanted.internal_pool is None
        assert configs.cpmd_toml(None) == configs.cpmd_toml()
        first, *_ = steps.after_install(wanted, [])
        assert "edit /etc/virt-ports/cpmd.toml, [pool] internal" in first

    def test_elsewhere_the_manager_has_to_know(self) -> None:
        wanted = choices.complete(PROVIDER, frozenset({HOST}), manager=REMOTE)
        first, *_ = steps.after_install(wanted, [])
        assert "the manager's cpmd.toml is not the default 100.64.0.0/10" in first
        assert "100.64.0.0/16 (route through eth0)" in first

    def test_nothing_is_said_where_all_is_well(self) -> None:
        wanted = choices.complete(HERE, frozenset({HOST, EDGE, MANAGER}))
        assert not any("pool] internal" in step for step in steps.after_install(wanted, []))


class TestMachine:
    def test_the_default_route_with_the_lowest_metric_is_found(self) -> None:
        routes = (
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
            "eth2\t00000000\t010010AC\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
            "eth0\t00000000\t010010AC\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
            "eth1\t000010AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
        )
        assert machine.default_interface(routes) == "eth0"

    def test_routes_and_neighbours_are_uses(self) -> None:
        routes = (
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
            "eth0\t00000000\t01004864\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
            "eth0\t00004864\t00000000\t0001\t0\t0\t0\t00FCFFFF\t0\t0\t0\n"
            "*\t00004064\t00000000\t0200\t0\t0\t-2\t0000C0FF\t0\t0\t0\n"
            "eth1\t01004064\t0B001EAC\t0007\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"
        )
        assert set(machine.route_uses(routes)) == {
            Use(IPv4Network("0.0.0.0/0"), "route through eth0"),
            Use.of(IPv4Address("100.72.0.1"), "gateway"),
            Use(IPv4Network("100.72.0.0/22"), "route through eth0"),
        }, "without natd's own: the unreachable pool, and a VM on another host"
        neighbours = "IP address       HW type     Flags\n100.80.0.67      0x1         0x2\n"
        assert list(machine.neighbour_uses(neighbours)) == [Use.of(IPv4Address("100.80.0.67"), "neighbour")]

    @pytest.mark.parametrize("routes", ["", "Iface\tDestination\n", "Iface\neth0 00000000\n"])
    def test_without_a_default_route_there_is_no_interface(self, routes: str) -> None:
        assert machine.default_interface(routes) is None

    def test_facts_about_this_machine_are_detected(self) -> None:
        here = machine.detect()
        assert here.hostname
        assert here.addresses["lo"] in IPv4Network("127.0.0.0/8")
        assert not any(use.network.is_loopback for use in here.uses)


class TestSources:
    def test_every_file_that_is_installed_is_in_the_package(self) -> None:
        here = Path(sources.__file__).parent / "systemd"
        assert {path.name for path in here.iterdir()} == {
            "cpmd.service", "natd.service", "virt-ports.sysusers", "virt-ports.tmpfiles"
        }  # fmt: skip
        for path in here.iterdir():
            assert sources.system_file(path.name) == path.read_text()

    def test_the_error_for_a_missing_file_has_a_remedy(self) -> None:
        with pytest.raises(ConfigError, match="is missing; install virt-ports again"):
            sources.system_file("no-such.service")


def test_only_https_and_unix_urls_of_a_manager_are_accepted() -> None:
    with pytest.raises(InvalidRequest, match="not a manager"):
        choices.complete(HERE, frozenset({HOST}), manager="172.30.0.2:7414")


def _uncommented(text: str) -> str:
    return re.sub(r"^# (?=[a-z_-]+ ?= ?\S)", "", text, flags=re.MULTILINE)
