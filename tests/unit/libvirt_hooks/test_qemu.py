"""The hook's exit status, deadline and output, with real processes and a real socket."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpm.install.hook_bytecode import with_bytecode
from libvirt_hooks import protocol, qemu
from tests.fakes.hook_natd import Answer, FakeNatd
from tests.unit.libvirt_hooks import samples
from tests.unit.libvirt_hooks.conftest import HANG_S, HOOK, Hook

NOBODY = 65534
REFUSABLE = {"prepare", "start", "started", "migrate"}


class TestExitCode:
    """Non-zero where the operator configured it and no running VM is affected; zero everywhere else."""

    @pytest.mark.parametrize("on_failure", ["start", "refuse"])
    @pytest.mark.parametrize("operation", samples.OPERATIONS)
    @pytest.mark.parametrize("answer", [*Answer, None])
    def test_every_operation_and_every_answer(
        self, hook: Hook, answer: Answer | None, operation: str, on_failure: str
    ) -> None:
        deadline = 0.3 if answer in (Answer.HANG, Answer.DRIP) else 30
        hook.configure(deadline=deadline, on_failure=on_failure)
        if answer is None:
            outcome = hook.run(["web-1", operation, "begin", "-"], samples.DOMAIN)
        else:
            with FakeNatd(hook.socket, answer):
                outcome = hook.run(["web-1", operation, "begin", "-"], samples.DOMAIN)
        well = answer in (Answer.OK, Answer.PARSE)
        asked_for = answer is Answer.REFUSE or (on_failure == "refuse" and not well)
        assert outcome.code == (1 if asked_for and operation in REFUSABLE else 0)
        assert outcome.stdout == b""
        assert bool(outcome.stderr) == (not well)

    def test_a_refusal_is_reported_to_the_user_in_one_printable_line(self, hook: Hook, natd: FakeNatd) -> None:
        natd.answer = Answer.REFUSE
        outcome = hook.run(["web-1", "prepare", "begin", "-"], samples.DOMAIN)
        assert outcome.stderr == b"virt-ports: VM web-1, prepare: no free ports?[31m for this VM\n"

    @pytest.mark.parametrize("arguments", [[], ["web-1"], ["web-1", ""], ["web-1", "explode", "begin", "-"]])
    def test_an_unknown_operation_is_ignored(self, hook: Hook, arguments: list[str]) -> None:
        hook.configure(on_failure="refuse")
        assert hook.run(arguments, samples.DOMAIN) == (0, b"", b"")

    @pytest.mark.parametrize("python", [None, "#!/bin/sh\nexit 1\n", "#!/bin/sh\nkill -9 $$\n"])
    def test_a_python_that_fails_to_start_refuses_no_vm(self, hook: Hook, tmp_path: Path, python: str | None) -> None:
        broken = tmp_path / "python3"
        if python is not None:
            broken.write_text(python)
            broken.chmod(0o755)
        copy = tmp_path / "hook"
        copy.write_text(HOOK.read_text().replace("/usr/bin/python3 -IS", f"{broken} -IS"))
        copy.chmod(0o755)
        hook.configure(on_failure="refuse")
        assert f"{broken} -IS" in copy.read_text()
        done = subprocess.run([copy, "web-1", "reconnect", "begin", "-"], env=hook.environ, timeout=HANG_S, check=False)
        assert done.returncode == 0


class TestPeer:
    """Only root, and the user of the hook itself, is believed to be natd."""

    @pytest.mark.parametrize("answer", [Answer.OK, Answer.REFUSE])
    @pytest.mark.parametrize("on_failure", ["start", "refuse"])
    def test_what_another_user_answers_is_no_answer(self, hook: Hook, answer: Answer, on_failure: str) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root: another user listens")
        hook.configure(on_failure=on_failure)
        with FakeNatd(hook.socket, answer, uid=NOBODY) as impostor:
            outcome = hook.run(["web-1", "start", "begin", "-"], samples.DOMAIN)
        assert outcome.code == (1 if on_failure == "refuse" else 0)
        assert b"runs as user 65534, not as root, so it is not natd" in outcome.stderr
        assert impostor.requests == []


class TestRequest:
    def test_natd_receives_what_libvirt_passed(self, hook: Hook, natd: FakeNatd) -> None:
        hook.run(["web-1", "release", "end", "migrated"], samples.DOMAIN)
        wanted = protocol.HookRequest(protocol.HookOperation.RELEASE, "end", "web-1", "migrated", samples.DOMAIN)
        assert natd.requests == [wanted]

    def test_names_of_any_bytes_arrive_unchanged(self, hook: Hook, natd: FakeNatd) -> None:
        name = bytes(range(1, 256))
        hook.run([name, "start", "begin", b"\xff"], b"")
        assert natd.requests[0].name.encode("utf-8", "surrogateescape") == name
        assert natd.requests[0].extra.encode("utf-8", "surrogateescape") == b"\xff"

    def test_a_suboperation_that_would_break_the_header_is_left_out(self, hook: Hook, natd: FakeNatd) -> None:
        hook.run(["web-1", "start", "begin 0 0 0\nok", "-"], samples.DOMAIN)
        assert natd.requests[0].suboperation == "-"
        assert natd.requests[0].xml == samples.DOMAIN

    def test_two_equal_calls_send_equal_requests(self, hook: Hook, natd: FakeNatd) -> None:
        outcomes = [hook.run(["web-1", "start", "begin", "-"], samples.DOMAIN) for _ in range(2)]
        assert outcomes[0] == outcomes[1] == (0, b"", b"")
        assert natd.requests[0] == natd.requests[1]

    def test_the_largest_request_passes_and_a_larger_one_is_not_sent(self, hook: Hook, natd: FakeNatd) -> None:
        name = "n" * protocol.MAX_NAME
        assert hook.run([name, "start", "begin", "-"], b"x" * protocol.MAX_XML).stderr == b""
        assert len(natd.requests[0].xml) == protocol.MAX_XML
        assert b"longer than" in hook.run(["web-1", "start", "begin", "-"], b"x" * (protocol.MAX_XML + 1)).stderr
        assert b"longer than" in hook.run([name + "n", "start", "begin", "-"], b"").stderr
        assert (len(natd.requests), natd.errors) == (1, [])


class TestBudget:
    """All runs of one start, or one end, have one deadline together."""

    DEADLINE_S = 0.6

    def took(self, hook: Hook, *operations: str, name: str = "web-1") -> list[float]:
        times = []
        for operation in operations:
            before = time.monotonic()
            hook.main([name, operation, "begin", "-"], samples.DOMAIN)
            times.append(time.monotonic() - before)
        return times

    @pytest.mark.parametrize(
        "operations",
        [("prepare", "start", "started"), ("migrate", "prepare", "start", "started"), ("stopped", "release")],
    )
    def test_a_natd_that_hangs_costs_one_deadline(self, hook: Hook, operations: tuple[str, ...]) -> None:
        hook.configure(deadline=self.DEADLINE_S)
        with FakeNatd(hook.socket, Answer.HANG):
            first, *others = self.took(hook, *operations)
            assert first >= self.DEADLINE_S
            assert sum(others) < self.DEADLINE_S / 2
            # The next start is asked about again, and leaves nothing behind.
            first, *others = self.took(hook, *operations)
            assert first >= self.DEADLINE_S
        assert [path for path in hook.socket.parent.iterdir() if path.name.startswith("hook-")] == []

    def test_natd_is_told_of_every_run_though_no_time_is_left(self, hook: Hook, natd: FakeNatd) -> None:
        hook.configure(deadline=30)
        marker = hook.socket.parent / ("hook-" + b"web-1".hex())
        for operation in ("start", "started"):
            marker.write_text(f"prepare 31 {time.monotonic():.3f}")
            self.took(hook, operation)
        assert [request.operation for request in natd.requests] == ["start", "started"]

    def test_another_vm_has_a_deadline_of_its_own(self, hook: Hook) -> None:
        hook.configure(deadline=self.DEADLINE_S)
        with FakeNatd(hook.socket, Answer.HANG):
            self.took(hook, "prepare")
            assert self.took(hook, "start", name="web-2") >= [self.DEADLINE_S]

    def test_a_natd_that_answers_leaves_no_trace(self, hook: Hook, natd: FakeNatd) -> None:
        self.took(hook, "prepare", "start", "started", "stopped", "release")
        assert len(natd.requests) == 5
        assert not list(hook.socket.parent.glob("hook-*"))

    def test_what_is_left_after_a_slow_answer_is_for_the_next_run(self, hook: Hook) -> None:
        hook.configure(deadline=30)
        marker = hook.socket.parent / ("hook-" + b"web-1".hex())
        marker.write_text(f"prepare 29.7 {time.monotonic():.3f}")
        with FakeNatd(hook.socket, Answer.HANG):
            (took,) = self.took(hook, "start")
            assert 0.2 < took < 10
            # A start that was given up two minutes ago is another one.
            marker.write_text(f"prepare 30 {time.monotonic() - qemu.START_S:.3f}")
            hook.configure(deadline=self.DEADLINE_S)
            assert self.took(hook, "start") >= [self.DEADLINE_S]

    @pytest.mark.parametrize(
        "content", ["", "prepare", "prepare x y", "prepare 1 2 3", "\0" * 99, "prepare nan nan", "prepare nan 1"]
    )
    def test_nonsense_beside_the_socket_is_ignored(self, hook: Hook, natd: FakeNatd, content: str) -> None:
        (hook.socket.parent / ("hook-" + b"web-1".hex())).write_text(content)
        assert hook.main(["web-1", "start", "begin", "-"], samples.DOMAIN) == 0
        assert len(natd.requests) == 1

    def test_a_name_of_any_length_and_bytes_has_one(self, hook: Hook, natd: FakeNatd) -> None:
        hook.configure(deadline=self.DEADLINE_S)
        natd.answer = Answer.HANG
        name = os.fsdecode(b"../\xff" * 300)
        first, second = self.took(hook, "prepare", "start", name=name)
        assert first >= self.DEADLINE_S > second


class TestDeadline:
    """It covers the whole run; the lower bound is exact, the upper one only detects a hang."""

    def test_a_stdin_that_never_ends(self, hook: Hook, natd: FakeNatd) -> None:
        hook.configure(deadline=0.5)
        before = time.monotonic()
        with hook.popen("web-1", "reconnect", "begin", "-") as process:
            assert process.stdin is not None
            assert process.stderr is not None
            process.stdin.write(samples.DOMAIN)
            process.stdin.flush()
            assert process.wait(HANG_S) == 0
            assert b"deadline" in process.stderr.read()
        assert time.monotonic() - before >= 0.5
        assert natd.requests == []

    @pytest.mark.parametrize("answer", [Answer.HANG, Answer.DRIP])
    def test_an_answer_that_never_ends(self, hook: Hook, natd: FakeNatd, answer: Answer) -> None:
        natd.answer = answer
        hook.configure(deadline=0.5)
        before = time.monotonic()
        outcome = hook.run(["web-1", "start", "begin", "-"], samples.DOMAIN)
        assert (outcome.code, b"deadline" in outcome.stderr) == (0, True)
        assert time.monotonic() - before >= 0.5

    def test_a_request_that_natd_does_not_read(self, hook: Hook, natd: FakeNatd) -> None:
        natd.answer = Answer.HANG
        hook.configure(deadline=0.5)
        outcome = hook.run(["web-1", "start", "begin", "-"], b"x" * protocol.MAX_XML)
        assert (outcome.code, b"deadline" in outcome.stderr) == (0, True)

    def test_a_full_backlog_is_waited_for_until_the_deadline(self, hook: Hook) -> None:
        hook.configure(deadline=0.5)
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
            listener.bind(str(hook.socket))
            listener.listen(0)
            first.connect(str(hook.socket))
            before = time.monotonic()
            outcome = hook.run(["web-1", "start", "begin", "-"], samples.DOMAIN)
        assert (outcome.code, b"deadline" in outcome.stderr) == (0, True)
        assert time.monotonic() - before >= 0.5

    def test_a_full_backlog_that_empties_is_no_failure(self, hook: Hook) -> None:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
            listener.bind(str(hook.socket))
            listener.listen(0)
            first.connect(str(hook.socket))
            with hook.popen("web-1", "start", "begin", "-") as process:
                assert process.stdin is not None
                process.stdin.write(samples.DOMAIN)
                process.stdin.close()
                listener.accept()[0].close()
                connection, _ = listener.accept()
                with connection:
                    while not connection.recv(65536).endswith(samples.DOMAIN[-8:]):
                        pass
                    connection.sendall(b"ok\n")
                assert process.wait(HANG_S) == 0
                assert process.stderr is not None
                assert process.stderr.read() == b""

    def test_a_stderr_that_nobody_reads(self, hook: Hook) -> None:
        reader, writer = os.pipe()
        try:
            os.set_blocking(writer, False)
            with contextlib.suppress(BlockingIOError):
                while os.write(writer, b"x" * 4096):
                    pass
            os.set_blocking(writer, True)
            command = [str(HOOK), "web-1", "start", "begin", "-"]
            assert subprocess.run(command, stdin=subprocess.DEVNULL, stderr=writer, env=hook.environ, timeout=HANG_S,
                                  check=False).returncode == 0  # fmt: skip
        finally:
            os.close(reader)
            os.close(writer)


class TestConfiguration:
    def test_no_file_means_the_defaults(self, tmp_path: Path) -> None:
        config, complaints = qemu.read_config(os.fsencode(tmp_path / "none"))
        assert (config.socket, config.deadline, config.refuse) == ("/run/virt-ports-natd/natd.sock", 2.0, False)
        assert complaints == []

    def test_settings_blanks_and_comments(self, tmp_path: Path) -> None:
        path = tmp_path / "hook.conf"
        path.write_text("# a comment\n\n socket = /run/a.sock # another\ndeadline=0.5\non-failure=refuse")
        config, complaints = qemu.read_config(os.fsencode(path))
        assert (config.socket, config.deadline, config.refuse) == ("/run/a.sock", 0.5, True)
        assert complaints == []

    @pytest.mark.parametrize(
        "line",
        ["socket=natd.sock", "socket=", "deadline=0", "deadline=-1", "deadline=nan", "deadline=inf", "deadline=1e9",
         "deadline=two", "on-failure=panic", "on_failure=refuse", "nonsense", "=", "\x00", "deadline"],
    )  # fmt: skip
    def test_a_bad_value_is_named_and_its_default_used(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "hook.conf"
        path.write_text(f"# first\n{line}\n")
        config, complaints = qemu.read_config(os.fsencode(path))
        assert (config.socket, config.deadline, config.refuse) == ("/run/virt-ports-natd/natd.sock", 2.0, False)
        assert len(complaints) == 1
        assert complaints[0].startswith("hook.conf line 2 is ignored: ")

    def test_a_bad_file_never_fails_a_vm(self, hook: Hook, natd: FakeNatd) -> None:
        hook.conf.write_bytes(f"socket={hook.socket}\ndeadline=soon\n".encode() + b"\xff\x00=\x1b[0m\n")
        outcome = hook.run(["web-1", "start", "begin", "-"], samples.DOMAIN)
        assert outcome.code == 0
        assert outcome.stderr.count(b"virt-ports: hook.conf line ") == 2
        assert b"\x1b" not in outcome.stderr
        assert len(natd.requests) == 1

    @pytest.mark.parametrize("kind", ["directory", "fifo", "forbidden path"])
    def test_a_path_that_is_not_a_regular_file(self, hook: Hook, tmp_path: Path, kind: str) -> None:
        odd = tmp_path / "odd"
        if kind == "directory":
            odd.mkdir()
        elif kind == "fifo":
            os.mkfifo(odd)
        hook.environ["VIRT_PORTS_HOOK_CONF"] = str(odd if kind != "forbidden path" else hook.conf / "below-a-file")
        outcome = hook.run(["web-1", "release", "end", "-"], samples.DOMAIN)
        assert (outcome.code, outcome.stdout) == (0, b"")


class TestLog:
    def test_failures_go_to_the_system_log(self, hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.bind(str(tmp_path / "log"))
            log.settimeout(HANG_S)
            monkeypatch.setattr(qemu, "SYSLOG", str(tmp_path / "log"))
            assert hook.main(["web\n-1", "start", "begin", "-"], samples.DOMAIN) == 0
            line = log.recv(4096).decode()
        assert re.fullmatch(r"<28>virt-ports-hook\[\d+\]: VM web\?-1, start: cannot ask natd at .*", line)

    def test_a_log_that_is_full_delays_nothing(
        self, hook: Hook, natd: FakeNatd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        natd.answer = Answer.ERROR
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.bind(str(tmp_path / "log"))
            monkeypatch.setattr(qemu, "SYSLOG", str(tmp_path / "log"))
            results = {hook.main(["web-1", "start", "begin", "-"], samples.DOMAIN) for _ in range(600)}
        assert results == {0}


class TestGarbage:
    """Any input: a clear sentence or no output, never a crash, never a refused VM."""

    def test_ten_thousand_inputs(
        self, hook: Hook, natd: FakeNatd, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(qemu, "SYSLOG", str(hook.socket.with_name("no-log")))
        natd.answer = Answer.PARSE
        rng = random.Random(20260701)
        for number in range(10_000):
            assert hook.main(samples.arguments(rng), samples.stdin(rng)) == 0, f"input {number}"
        out, err = capfd.readouterr()
        assert out == ""
        assert natd.errors == []
        assert len(natd.requests) > 3_000
        for line in err.splitlines():
            assert line.startswith("virt-ports: VM ")
            assert line.isprintable()
            assert "bug in the hook" not in line

    def test_three_hundred_processes(self, hook: Hook, natd: FakeNatd) -> None:
        natd.answer = Answer.PARSE
        rng = random.Random(20260702)
        for number in range(300):
            arguments = [argument.encode("utf-8", "surrogateescape") for argument in samples.arguments(rng)]
            outcome = hook.run(arguments, samples.stdin(rng))
            assert (outcome.code, outcome.stdout) == (0, b""), f"process {number}"
            assert b"Traceback" not in outcome.stderr
            assert b"bug in the hook" not in outcome.stderr
        assert natd.errors == []
        assert len(natd.requests) > 50

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "</"])
    def test_closed_and_odd_file_descriptors(self, hook: Hook, natd: FakeNatd, closed: str) -> None:
        command = f'"$0" web-1 reconnect begin - {closed}'
        done = subprocess.run(["/bin/sh", "-c", command, HOOK], stdin=subprocess.DEVNULL, env=hook.environ,
                              capture_output=True, timeout=HANG_S, check=False)  # fmt: skip
        assert (done.returncode, done.stdout) == (0, b"")
        assert natd.errors == []


class TestStandsAlone:
    def test_only_what_is_compiled_into_the_interpreter_is_imported(self, hook: Hook, natd: FakeNatd) -> None:
        """Both when natd answers ok and when there is an error to report."""
        bare = _imported(["/usr/bin/python3", "-IS", "-X", "importtime", "-c", "pass"], hook.environ)
        telling = HOOK.read_text().replace("/usr/bin/python3 -IS", "/usr/bin/python3 -IS -X importtime")
        hook.install(with_bytecode(telling, str(hook.program)))
        for natd.answer in (Answer.OK, Answer.ERROR):
            ours = _imported([str(hook.program), "web-1", "start", "begin", "-"], hook.environ)
            assert ours - bare <= set(sys.builtin_module_names)
            assert {"_socket", "marshal"} <= ours

    def test_an_installed_copy_needs_nothing_beside_it(self, hook: Hook, natd: FakeNatd, tmp_path: Path) -> None:
        copy = tmp_path / "virt-ports"
        shutil.copy(HOOK, copy)
        done = subprocess.run([copy, "web-1", "start", "begin", "-"], input=samples.DOMAIN, env=hook.environ, cwd="/",
                              capture_output=True, timeout=HANG_S, check=False)  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr, len(natd.requests)) == (0, b"", b"", 1)

    def test_the_check_of_an_install_asks_nobody(self, hook: Hook, natd: FakeNatd) -> None:
        done = hook.run(["vm", qemu.CHECK, "begin", "-"])
        assert done == (0, b"", qemu.CHECK_ANSWER)
        assert natd.requests == []

    def test_the_source_is_executable(self) -> None:
        assert HOOK.stat().st_mode & stat.S_IXUSR


class TestConstantsAgree:
    """The hook imports none of our modules, so its copies of constants are compared with the originals."""

    def test_operations(self) -> None:
        assert set(qemu.OPERATIONS) == set(protocol.HookOperation)
        in_shell = re.search(r"^    ([a-z|]+)\) ;;$", HOOK.read_text(), re.MULTILINE)
        assert in_shell is not None
        assert in_shell[1].split("|") == [*qemu.OPERATIONS, qemu.CHECK]
        assert set(qemu.REFUSABLE) == REFUSABLE

    def test_sizes(self) -> None:
        assert (qemu.MAX_NAME, qemu.MAX_XML, qemu.MAX_ANSWER) == (
            protocol.MAX_NAME,
            protocol.MAX_XML,
            protocol.MAX_ANSWER,
        )

    def test_the_status_that_refuses(self) -> None:
        assert f"[ $? -eq {qemu.REFUSED} ] && exit 1\n" in HOOK.read_text()


def _imported(arguments: list[str], environ: dict[str, str]) -> set[str]:
    done = subprocess.run(arguments, input=b"<domain/>", env=environ, capture_output=True, timeout=HANG_S, check=False)
    lines = done.stderr.decode().splitlines()
    return {line.rsplit("|", 1)[1].strip() for line in lines if line.startswith("import time:")}
