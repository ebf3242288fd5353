"""`virt-ports install`, from the command line to the files of an image."""

from __future__ import annotations

import json
import os
import re
import stat
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path, PurePosixPath

import msgspec
import pytest

from cpm import settings as cpmd_settings
from cpm.cli import main
from cpm.install import apply, choices, configs, machine, plan, sources
from cpm.install.choices import EDGE, HOST, MANAGER
from cpm.install.plan import Action, Target
from cpm.protocol.errors import ConfigError, ExitCode, InvalidRequest
from cpm.protocol.model import Role
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
        assert "reload libvirtd" in output

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
        assert hook.read_bytes() == Path(qemu.__file__).read_bytes()
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
        assert "reload libvirtd" not in output

    def test_a_dry_run_writes_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert install(tmp_path, "--dry-run") == 0
        assert tree(tmp_path) == {}
        assert "would create /etc/systemd/system/natd.service\n" in capsys.readouterr().out

    def test_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert install(tmp_path, "-o", "json") == 0
        document = json.loads(capsys.readouterr().out)
        assert {"path": "/etc/virt-ports/natd.toml", "action": "create"} in document["files"]
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
        steps = plan.remaining_steps(wanted, hook_is_new=False)
        for setting in ("underlay_address", "edge.uplinks", "edge.underlay"):
            assert any(setting in step for step in steps)
        path = tmp_path / "natd.toml"
        path.write_text(configs.natd_toml(wanted))
        with pytest.raises(ConfigError):
            natd_settings.load(path)


class TestMachine:
    def test_the_default_route_with_the_lowest_metric_is_found(self) -> None:
        routes = (
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
            "eth2\t00000000\t010010AC\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
            "eth0\t00000000\t010010AC\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
            "eth1\t000010AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
        )
        assert machine.default_interface(routes) == "eth0"

    @pytest.mark.parametrize("routes", ["", "Iface\tDestination\n", "Iface\neth0 00000000\n"])
    def test_without_a_default_route_there_is_no_interface(self, routes: str) -> None:
        assert machine.default_interface(routes) is None

    def test_facts_about_this_machine_are_detected(self) -> None:
        here = machine.detect()
        assert here.hostname
        assert here.addresses["lo"] in IPv4Network("127.0.0.0/8")


class TestSources:
    def test_every_file_is_in_the_source_tree_and_in_the_wheel(self) -> None:
        tree_files = Path(sources.__file__).parents[2]
        listed = re.findall(r"^    systemd/(\S+)$", (tree_files / "setup.cfg").read_text(), re.MULTILINE)
        assert sorted(listed) == sorted(path.name for path in (tree_files / "systemd").iterdir())
        for name in listed:
            assert sources.system_file(name)

    def test_the_error_for_a_missing_file_has_a_remedy(self) -> None:
        with pytest.raises(ConfigError, match="is missing; install virt-ports again"):
            sources.system_file("no-such.service")


def test_only_https_and_unix_urls_of_a_manager_are_accepted() -> None:
    with pytest.raises(InvalidRequest, match="not a manager"):
        choices.complete(HERE, frozenset({HOST}), manager="172.30.0.2:7414")


def _uncommented(text: str) -> str:
    return re.sub(r"^# (?=[a-z_-]+ ?= ?\S)", "", text, flags=re.MULTILINE)
