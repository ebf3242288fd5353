"""The readers of files, below a root of the test's own, and of certificates."""

from __future__ import annotations

import datetime
import errno
import gzip
import os
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest
import trustme

import natctl.settings
from cpm.api.client import Client
from cpm.install import sources
from cpm.install.hook_bytecode import MARK
from cpm.install.plan import HOOK
from machine_doctor.facts import FileFacts, ManagerFacts, RemoteManager, Setup, Unread, known
from machine_doctor.readers import files, hook, journal, machine, manager, setup, tls
from natctl.model.entries import Settings
from tests.unit.machine_doctor import healthy

RELEASE = os.uname().release


def write(root: Path, name: str, text: str = "", mode: int = 0o644) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


# -- kernel


def test_options_come_from_proc_or_boot(tmp_path: Path) -> None:
    assert isinstance(machine.kernel(tmp_path).options, Unread)
    write(tmp_path, f"boot/config-{RELEASE}", "CONFIG_NF_TABLES=m\n# CONFIG_TUN is not set\nCONFIG_HZ=250\n")
    assert machine.kernel(tmp_path).options == {"NF_TABLES": "m"}
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/config.gz").write_bytes(gzip.compress(b"CONFIG_TUN=y\n"))
    assert machine.kernel(tmp_path).options == {"TUN": "y"}
    (tmp_path / "proc/config.gz").write_bytes(b"\x1f\x8bcut off")
    assert machine.kernel(tmp_path).options == {"NF_TABLES": "m"}


def test_modules_on_disk_and_loaded(tmp_path: Path) -> None:
    write(
        tmp_path, f"lib/modules/{RELEASE}/modules.dep", "kernel/net/netfilter/nft_ct.ko.xz: kernel/x.ko\na/nf-nat.ko:\n"
    )
    (tmp_path / "sys/module/tun").mkdir(parents=True)
    found = machine.kernel(tmp_path)
    assert (found.modules, found.loaded) == (frozenset({"nft_ct", "nf_nat"}), frozenset({"tun"}))


def test_after_an_upgrade_no_module_of_the_running_kernel_is_there(tmp_path: Path) -> None:
    assert machine.kernel(tmp_path).modules == frozenset()


# -- settings


def test_the_last_assignment_of_a_key_counts(tmp_path: Path) -> None:
    write(tmp_path, "usr/lib/sysctl.d/50-default.conf", "net.ipv4.conf.all.rp_filter = 2\nnet.ipv4.ip_forward=1\n")
    write(tmp_path, "usr/lib/sysctl.d/99-z.conf", "net.ipv4.ip_forward=0")
    write(
        tmp_path,
        "etc/sysctl.d/99-z.conf",
        "# hides the other\n; x = 1\n-net/ipv4/conf/all/rp_filter=1\nno assignment\n",
    )
    found = {line.key: (line.file, line.value) for line in machine.sysctl_files(tmp_path)}
    assert found == {
        "net.ipv4.conf.all.rp_filter": ("/etc/sysctl.d/99-z.conf", "1"),
        "net.ipv4.ip_forward": ("/usr/lib/sysctl.d/50-default.conf", "1"),
    }
    write(tmp_path, "etc/sysctl.conf", "net.ipv4.ip_forward = 0\n")
    assert ("/etc/sysctl.conf", "net.ipv4.ip_forward", "0") in machine.sysctl_files(tmp_path)


def test_values_of_interfaces_with_dots(tmp_path: Path) -> None:
    write(tmp_path, "proc/sys/net/ipv4/conf/eth0.7/rp_filter", "1\n")
    assert machine.sysctl(tmp_path, ["eth0.7"]) == {"net.ipv4.conf.eth0.7.rp_filter": "1"}


def test_networkd_keeps_what_its_files_say(tmp_path: Path) -> None:
    assert machine.networkd(tmp_path) == (False, False, False)
    write(tmp_path, "sys/fs/cgroup/system.slice/systemd-networkd.service/cgroup.procs", "77\n")
    write(
        tmp_path,
        "etc/systemd/networkd.conf",
        "[Network]\nManageForeignRoutes=no\n#ManageForeignRoutingPolicyRules=no\n",
    )
    assert machine.networkd(tmp_path) == (True, False, True)
    write(tmp_path, "usr/lib/systemd/networkd.conf.d/x.conf", "[Network]\nManageForeignRoutingPolicyRules=false\n")
    assert machine.networkd(tmp_path) == (True, True, True)
    write(tmp_path, "etc/systemd/networkd.conf.d/x.conf", "[Network]\nManageForeignRoutingPolicyRules=yes\n")
    assert machine.networkd(tmp_path) == (True, False, True)


# -- daemons


def test_units_only_where_systemd_runs(tmp_path: Path) -> None:
    assert machine.units(tmp_path) == ()
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    unit = write(tmp_path, "etc/systemd/system/natd.service")
    write(tmp_path, "sys/fs/cgroup/system.slice/natd.service/cgroup.procs", "12\n13\n")
    write(tmp_path, "usr/lib/systemd/system/libvirtd.service")
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "natd.service").symlink_to(unit)
    found = {each.name: each[1:] for each in machine.units(tmp_path)}
    assert found["natd.service"] == (True, True, True)
    assert found["libvirtd.service"] == (True, False, False)
    assert found["cpmd.service"] == (False, False, False)


def test_a_daemon_elsewhere_is_known_by_its_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "natd.sock")
    assert machine.processes({"natd": path}) == machine.processes({})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        assert ("natd", 0) not in [each[:2] for each in machine.processes({"natd": path})]
        listener.listen()
        assert ("natd", 0, None) in [each[:3] for each in machine.processes({"natd": path})]


def test_the_clock_is_the_kernels() -> None:
    found = machine.clock()
    assert not isinstance(found, Unread)
    assert 0 <= found.maximum_error_s < 1000


def test_room_of_folders_that_exist(tmp_path: Path) -> None:
    (found,) = machine.disks([str(tmp_path), str(tmp_path / "missing")])
    assert 0 < found.free_bytes <= found.total_bytes


# -- files


def test_what_does_not_exist_is_no_file(tmp_path: Path) -> None:
    assert files.look_at(tmp_path / "x") is None
    assert files.look_at_all([tmp_path / "x", None]) == ((), ())
    (found,), _ = files.look_at_all([write(tmp_path, "key", mode=0o640)])
    assert (found.mode & 0o777, found.uid) == (0o640, os.geteuid())


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert files.text(tmp_path) == Unread(f"cannot read {tmp_path}: {os.strerror(errno.EISDIR)}")


# -- the hook


def test_the_hook_is_looked_at_and_executed(tmp_path: Path) -> None:
    path = "etc/libvirt/hooks/qemu.d/virt-ports"
    nothing = known(hook.hook(tmp_path, ()))
    assert (nothing.file, nothing.fails) == (None, "")
    write(tmp_path, path, "#!/bin/sh\nexit 3\n", 0o755)
    write(tmp_path, "etc/libvirt/hooks/qemu.d/other", "", 0o755)
    write(tmp_path, "etc/libvirt/hooks/qemu", "", 0o755)
    write(tmp_path, "etc/apparmor.d/usr.sbin.libvirtd", "profile")
    found = known(hook.hook(tmp_path, ()))
    assert found.is_ours is False
    assert [Path(each.path).name for each in found.others] == ["qemu", "other"]
    assert found.apparmor_profiles == {"/etc/apparmor.d/usr.sbin.libvirtd": "profile"}
    if os.geteuid() == 0:
        assert known(found.fails).startswith("it ends with status 3")
        (tmp_path / "etc/libvirt/hooks").chmod(0o777)
        assert isinstance(known(hook.hook(tmp_path, ())).fails, Unread)


def test_our_hook_runs_and_is_known_as_ours(tmp_path: Path) -> None:
    write(tmp_path, "etc/libvirt/hooks/qemu.d/virt-ports", sources.hook_file(str(HOOK)), 0o755)
    found = known(hook.hook(tmp_path, ()))
    assert (found.is_ours, found.fails if os.geteuid() == 0 else "") == (True, "")


def test_which_hooks_are_the_same() -> None:
    expected = sources.hook_file(str(HOOK))
    text, mark, code = expected.rpartition(MARK)
    stamp, _, bytecode = code.partition("\n")
    assert hook.is_same(text, expected)
    assert hook.is_same(f"{text}{mark}{'0' * len(stamp)}\n# 00\n", expected)  # of another Python: it is not run
    assert not hook.is_same(f"{text}{mark}{stamp}\n# 00\n", expected)  # would be run instead of the text
    assert not hook.is_same(f"{text}#\n{mark}{stamp}\n{bytecode}", expected)
    assert not hook.is_same("", expected)


# As /sys/fs/selinux is on Fedora and RHEL, with targeted policy; the kernel's files end in no newline.
SELINUX = {
    "enforce": "1", "mls": "1", "policyvers": "33", "status": "\0" * 20, "checkreqprot": "0", "deny_unknown": "0",
    "booleans/virt_use_nfs": "0 0", "class/file/index": "7", "class/file/perms/execute": "15",
}  # fmt: skip


@pytest.mark.parametrize(("tree", "enforces"), [
    ({}, False),  # no SELinux in the kernel: there is no folder
    ({"": ""}, False),  # switched off: the folder is there, and empty
    (SELINUX, True),
    ({**SELINUX, "enforce": "0"}, False),  # permissive
    ({**SELINUX, "enforce": "1\n"}, True),
])  # fmt: skip
def test_whether_selinux_enforces(tmp_path: Path, tree: dict[str, str], enforces: bool) -> None:
    write(tmp_path, "etc/libvirt/hooks/qemu.d/virt-ports", "#!/bin/sh\n", 0o755)
    for name, text in tree.items():
        if name:
            write(tmp_path, f"sys/fs/selinux/{name}", text)
        else:
            (tmp_path / "sys/fs/selinux").mkdir(parents=True)
    assert known(hook.hook(tmp_path, ())).selinux_enforces is enforces


def test_selinux_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/selinux/enforce").mkdir(parents=True)  # root reads every file; nobody reads a folder
    found = known(hook.hook(tmp_path, ())).selinux_enforces
    assert isinstance(found, Unread)
    assert "sys/fs/selinux/enforce" in found.why


@pytest.mark.parametrize("label", [
    "system_u:object_r:virt_etc_t:s0", "unconfined_u:object_r:user_home_t:s0", "system_u:object_r:bin_t:s0:c1,c2",
])  # fmt: skip
def test_the_label_of_a_file_is_read_as_the_kernel_keeps_it(tmp_path: Path, label: str) -> None:
    path = write(tmp_path, "hook", "", 0o755)
    try:
        os.setxattr(path, "security.selinux", label.encode() + b"\0")
    except OSError as error:
        pytest.skip(f"this file system keeps no labels: {error}")
    assert isinstance(found := files.look_at(path), FileFacts)
    assert found.label == label


# -- certificates


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def issue(folder: Path, authority: trustme.CA, name: str, **options: object) -> tuple[str, str, str]:
    made = authority.issue_cert(name, **options)  # type: ignore[arg-type]
    made.cert_chain_pems[0].write_to_path(str(folder / f"{name}.crt"))
    made.private_key_pem.write_to_path(str(folder / f"{name}.key"))
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))
    return str(folder / f"{name}.crt"), str(folder / f"{name}.key"), str(folder / "ca.crt")


@pytest.mark.parametrize("kind", ["node", "manager"])
def test_a_good_certificate(tmp_path: Path, authority: trustme.CA, kind: str) -> None:
    found = tls.examine(kind, *issue(tmp_path, authority, "host1"))
    assert (found.names, found.wrong) == (("host1",), "")
    assert found.ends is not None
    assert found.ca_ends is not None
    assert found.ends > time.time()


@pytest.mark.parametrize("kind", ["node", "manager"])
def test_certificates_that_a_peer_refuses(tmp_path: Path, authority: trustme.CA, kind: str) -> None:
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    expired = issue(tmp_path, authority, "old", not_before=past, not_after=past + datetime.timedelta(1))
    assert tls.examine(kind, *expired).wrong == "certificate has expired"
    good, other = issue(tmp_path, authority, "a"), issue(tmp_path, authority, "b")
    assert tls.examine(kind, good[0], other[1], good[2]).wrong == "the key is not that of the certificate"
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    foreign = issue(stranger, trustme.CA(), "c")
    assert "unable to get local issuer" in tls.examine(kind, *foreign[:2], good[2]).wrong
    assert tls.examine(kind, "/missing.crt", *good[1:]).wrong.startswith("cannot read /missing.crt")
    (tmp_path / "text").write_text("no certificate")
    assert tls.examine(kind, str(tmp_path / "text"), *good[1:]).wrong


def test_the_manager_is_asked_for_its_time(tmp_path: Path, authority: trustme.CA) -> None:
    node = issue(tmp_path, authority, "host1")
    server = issue(tmp_path, authority, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*server[:2])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0] as raw, context.wrap_socket(raw, server_side=True) as stream:
                stream.recv(4096)
                date = "Sun, 23 Nov 2025 06:38:00 GMT"
                stream.sendall(f"HTTP/1.1 404 Not Found\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        found = tls.remote_manager(of(url, *node), lambda: 1763879880.0 - 100)
        thread.join()
    assert isinstance(found, RemoteManager)
    assert (found.url, found.wrong, found.offset_s) == (url, "", 100.5)
    refused = tls.remote_manager(of(url, *node), lambda: 0.0)
    assert isinstance(refused, RemoteManager)
    assert (refused.wrong, refused.offset_s) == ("Connection refused", None)


def of(url: str, certificate: str, key: str, authority: str) -> Setup:
    manager_ = natctl.settings.ManagerSettings(url, certificate, key, authority)
    return healthy.setup(healthy.natd(manager=manager_))


def test_a_manager_on_this_machine_is_not_asked_by_tls() -> None:
    assert tls.remote_manager(healthy.FACTS.setup, lambda: 0.0) is None
    assert tls.certificates(healthy.FACTS.setup) == ()


# -- configuration, manager, journal


def test_without_a_configuration_the_commonest_machine_is_assumed(tmp_path: Path) -> None:
    found = setup.setup(tmp_path / "natd.toml", tmp_path / "cpmd.toml")
    assert (found.is_installed, found.is_host, found.is_edge, found.is_manager) == (False, True, True, True)


def test_a_wrong_file_is_named_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    natd = write(tmp_path, "natd.toml", "underlay_address = 7\n")
    cpmd = write(tmp_path, "cpmd.toml", "[pool]\ninitial = 512\n")
    found = setup.setup(natd, cpmd)
    assert found.cpmd is not None
    assert (found.natd, found.kernel, found.is_manager, len(found.wrong)) == (None, Settings(), True, 1)
    assert "natd.toml" in found.wrong[0]


def test_a_folder_that_may_not_be_looked_into_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    assert not files.is_there(tmp_path / "x")
    assert not files.is_there(write(tmp_path, "file") / "x")
    monkeypatch.setattr(Path, "stat", denied)
    assert files.is_there(tmp_path / "x")
    assert isinstance(files.look_at(tmp_path / "x"), Unread)


def test_a_node_without_a_manager(tmp_path: Path) -> None:
    host = 'roles = ["host"]\n[host]\nuplinks = ["eth1"]\nbridges = ["br0"]\n'
    text = f'name = "h"\nunderlay_address = "172.30.0.11"\n{host}'
    found = setup.setup(write(tmp_path, "natd.toml", text), tmp_path / "cpmd.toml")
    assert (found.name, found.is_manager, found.is_edge, found.bridges) == ("h", False, False, frozenset({"br0"}))


def test_a_manager_that_does_not_answer(tmp_path: Path) -> None:
    found = manager.manager(Client(str(tmp_path / "none.sock")))
    assert isinstance(found, Unread)
    assert not isinstance(found, ManagerFacts)
    assert "no such socket" in found.why


def test_a_journal_that_is_not_there_is_empty() -> None:
    assert journal.newest([["_SYSTEMD_UNIT=no-such-unit-of-ours.service"]], 5) == []
    assert journal.last_reload("no-such-unit-of-ours") is None
