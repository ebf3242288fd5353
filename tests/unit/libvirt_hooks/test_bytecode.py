"""The bytecode at the end of an installed hook: used when it fits, and never otherwise."""

from __future__ import annotations

import marshal
import subprocess
import sys
from pathlib import Path

import pytest

from cpm.install import hook_bytecode, sources
from cpm.install.hook_bytecode import MARK, with_bytecode
from libvirt_hooks import qemu
from tests.fakes.hook_natd import Answer, FakeNatd
from tests.unit.libvirt_hooks import samples
from tests.unit.libvirt_hooks.conftest import HANG_S, HOOK, Hook

CHECK = ["vm", qemu.CHECK, "begin", "-"]
ANOTHER_PROGRAM = "import posix\nposix.write(2, b'another program')\nposix._exit(0)\n"
TEXT = HOOK.read_text()
EDITED = TEXT.replace("the hook runs", "an edited hook runs")


@pytest.fixture(autouse=True)
def same_python() -> None:
    system = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, timeout=HANG_S, check=True)
    if system.stdout.split()[1].rpartition(".")[0] != f"{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip("needs the Python of the system")


def installed_with(program: str) -> str:
    """Return a hook whose bytecode, of another program, has the stamp of its own."""
    return with_bytecode(program, "x").replace(program, TEXT).replace(hook_bytecode.stamp(program), stamp())


def stamp() -> str:
    return hook_bytecode.stamp(TEXT)


def test_bytecode_with_the_right_stamp_is_what_runs(hook: Hook) -> None:
    """So the text is not compiled, which would take two milliseconds."""
    hook.install(installed_with(ANOTHER_PROGRAM))
    assert hook.run(CHECK) == (0, b"", b"another program")


def test_a_text_that_was_edited_is_what_runs(hook: Hook) -> None:
    assert EDITED != TEXT
    hook.install(installed_with(ANOTHER_PROGRAM).replace(TEXT, EDITED))
    assert hook.run(CHECK) == (0, b"", b"virt-ports: an edited hook runs\n")


def test_bytecode_of_another_python_does_not_run(hook: Hook) -> None:
    another = f"{int(stamp()[:8], 16) ^ 0x01000000:08x}{stamp()[8:]}"
    hook.install(installed_with(ANOTHER_PROGRAM).replace(stamp(), another))
    assert hook.run(CHECK) == (0, b"", qemu.CHECK_ANSWER)


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: len(text) // 2], lambda text: text[:-100], lambda text: text[:-9] + "not hex", lambda _: "",
     lambda text: text[:26], lambda text: text[:24] + "\n# " + marshal.dumps(0)[:1].hex(), lambda _: "\xff" * 99],
)  # fmt: skip
@pytest.mark.parametrize(("answer", "code"), [(Answer.OK, 0), (Answer.REFUSE, 1)])
def test_damaged_bytecode_does_no_harm(hook: Hook, damage: object, answer: Answer, code: int) -> None:
    assert callable(damage)
    head, mark, bytecode = with_bytecode(TEXT, "x").rpartition(MARK)
    hook.install(head + mark + damage(bytecode))
    with FakeNatd(hook.socket, answer) as natd:
        outcome = hook.run(["web-1", "start", "begin", "-"], samples.DOMAIN)
    assert (outcome.code, len(natd.requests)) == (code, 1)


@pytest.mark.parametrize(("answer", "code"), [(Answer.OK, 0), (Answer.REFUSE, 1), (Answer.ERROR, 0)])
def test_the_text_alone_does_the_same(hook: Hook, answer: Answer, code: int) -> None:
    """As after an upgrade of Python."""
    with FakeNatd(hook.socket, answer) as natd:
        outcomes = []
        for text in (TEXT, sources.hook_file()):
            hook.install(text)
            outcomes.append(hook.run(["web-1", "start", "begin", "-"], samples.DOMAIN))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].code == code
    assert natd.requests[0] == natd.requests[1]


def test_an_install_writes_the_same_each_time() -> None:
    program = "from cpm.install import sources; print(sources.hook_file('hook'), end='')"
    others = [
        subprocess.run([sys.executable, "-c", words + program], capture_output=True, timeout=HANG_S, check=True).stdout
        for words in ("", "import asyncio, socket, select; ")
    ]
    assert others == [sources.hook_file("hook").encode()] * 2


def test_the_text_is_readable_above_its_bytecode(tmp_path: Path) -> None:
    path = tmp_path / "hook"
    path.write_text(sources.hook_file())
    assert path.read_text().startswith(TEXT)
    assert path.read_text().isascii()
