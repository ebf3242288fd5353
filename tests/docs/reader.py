"""A reader inside :mod:`tests.docs.machine`, with the site around that machine."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from cpm.protocol.model import PortRange, Role
from cpm.protocol.own_ports import OwnAddress, OwnRange, OwnUse
from tests.docs.elsewhere import CHANGED, answers_to, is_endless
from tests.docs.machine import REPOSITORY, Done
from tests.docs.nodes import DB, GAME1, WEB1, WEB2, Machine
from tests.docs.transcript import Step

BIN: Final = Path("/usr/local/sbin")
IN_A_CLONE: Final = frozenset({"README.md", "prove.md", "chaos.md", "benchmarks.md"})
"""Pages whose commands are typed in a clone of this repository."""
LIMIT_S: Final = 200.0
LOOKS: Final = 10
"""How often a reader asks again, a second later, when something else is printed than the page has."""
A_LOOK_S: Final = 2.0
"""How long a reader looks at what does not end."""

_DOMAIN = """<node><cpu><mhz>1000</mhz><model>x</model><active>1</active><nodes>1</nodes><sockets>1</sockets>
<cores>1</cores><threads>1</threads></cpu><memory>1000000</memory>
<domain type='test'><name>web1</name><uuid>{uuid}</uuid><memory>1000</memory><os><type>hvm</type></os>
<metadata><vp:ports xmlns:vp='urn:virt-ports:1' floor='64'/></metadata></domain></node>"""


class Reader:
    """What the reader has: a shell, and around the machine a site."""

    def __init__(self, page: str) -> None:
        self.directory = str(REPOSITORY if page in IN_A_CLONE else Path.home())
        host, edge = frozenset({Role.HOST}), frozenset({Role.EDGE})
        own = (OwnAddress(IPv4Address("203.0.113.10"), (OwnRange(PortRange(32768, 60999), OwnUse.EPHEMERAL),)),)
        self.machines = {
            "edge1": Machine("edge1", edge, "172.30.0.21", (), own),
            "edge2": Machine("edge2", edge, "172.30.0.22"),
            "host1": Machine(
                "host1", host, "172.30.0.11", ((WEB1, "web1"), (DB, "db"), (GAME1, "game1"), (WEB2, "web2"))
            ),
            "host2": Machine("host2", host, "172.30.0.12"),
            "host3": Machine("host3", host, "172.30.0.13"),
            "srv1": Machine("srv1", frozenset(Role), "172.30.0.2"),
        }

    async def run(self, command: str, answers: str = "") -> Done:
        """Type a command, and wait for its end."""
        place, said = Path("/run/place"), Path("/run/said")
        script = f"set -o pipefail\ncd {shlex.quote(self.directory)}\n{command}\nstatus=$?\npwd >{place}\nexit $status"
        # Output goes to a file: what a command leaves behind in the background may keep it open.
        with said.open("wb") as output:
            shell = await asyncio.create_subprocess_exec(
                "bash", "-c", script, stdin=asyncio.subprocess.PIPE, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        try:
            await asyncio.wait_for(shell.communicate(answers.encode()), LIMIT_S)
        except TimeoutError:
            os.killpg(shell.pid, signal.SIGKILL)
            await shell.wait()
        self.directory = place.read_text().strip() if place.exists() else self.directory
        assert shell.returncode is not None
        return Done(command, shell.returncode, said.read_text(errors="replace").replace("\r", ""))

    async def need(self, *commands: str) -> None:
        """Run commands that are on no page, and that what follows needs."""
        for command in commands:
            done = await self.run(command)
            assert done.status == 0, f"{command}: {done.output}"

    async def until(self, command: str) -> None:
        """Wait until a shell says that something is so."""
        for _ in range(300):
            if (done := await self.run(command)).status == 0:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never: {command}: {done.output}")

    async def equip(self) -> None:
        """Give the machine what every machine has, and this one lacks."""
        program = f'#!/bin/sh\nexec {sys.executable} -m tests.docs.systemctl "$@"\n'
        for name, text in (("systemctl", program), ("sudo", '#!/bin/sh\nexec "$@"\n')):
            (BIN / name).write_text(text)
            (BIN / name).chmod(0o755)
        Path("/reader.xml").write_text(_DOMAIN.format(uuid=WEB1))
        os.environ.update(
            PATH=f"{Path(sys.executable).parent}:{BIN}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root",
            LC_ALL="C.UTF-8", NO_COLOR="1", LIBVIRT_DEFAULT_URI="test:///reader.xml", SYSTEMD_LOG_LEVEL="err",
        )  # fmt: skip

    async def make_site(self) -> None:
        """Make this machine the manager of a site that has run since 2026-11-23, with VMs."""
        await self.need(
            "virt-ports install --role manager",
            "systemd-sysusers virt-ports.conf",
            "mkdir -p /var/lib/virt-ports /run/virt-ports",
            "sed -i 's/^ExecStart=.*/ExecStart=%s -m tests.docs.past/' /etc/systemd/system/cpmd.service".replace(
                "%s", sys.executable.replace("/", r"\/")),
            "systemctl start cpmd",
            "virt-ports pool add 203.0.113.1 --reserved 1024-2221,2223-7999,8011-20735",
            "virt-ports pool add 203.0.113.2",
        )  # fmt: skip
        await self.join("edge1", "edge2", "host1")
        await self.until("virt-ports list --address 203.0.113.1 | grep -q web1.*active")
        await self.need("systemctl stop cpmd", "virt-ports install --role manager", "systemctl start cpmd")
        await self.until("! virt-ports node list | grep -v -e yes -e '^---' -e Name -e '^$'")

    async def join(self, *names: str) -> None:
        """Approve nodes, switch them on, and wait until they have all that they should."""
        for name in names:
            hello = self.machines[name].hello
            roles = " ".join(f"--role {role}" for role in sorted(hello.roles))
            await self.need(f"virt-ports node approve {name} {roles} --underlay {hello.underlay}")
            self.machines[name].switch_on()
        for name in names:
            await self.until(f"virt-ports node list --state connected | grep -q '{name} .*yes'")

    async def type(self, step: Step) -> Done:
        """Type a command of a page."""
        command = CHANGED.get(step.command, (step.command, ""))[0]
        if is_endless(step.command):
            command = f"timeout --preserve-status -s INT {A_LOOK_S} {on_a_terminal(command)}"
        elif (answers := answers_to(step.command)) is not None:
            done = await self.run(on_a_terminal(command), answers)
            return dataclasses.replace(done, command=step.command)
        done = await self.run(command)
        for _ in range(LOOKS if done.status == 0 else 0):
            if step.is_printed_by(done.output):
                break
            await asyncio.sleep(1)
            done = await self.run(command)
        return dataclasses.replace(done, command=step.command)


def on_a_terminal(command: str) -> str:
    """Return the command that runs another one on a terminal."""
    return f"script -qec {shlex.quote(command)} /dev/null"


Preparation = Callable[[Reader], Awaitable[None]]
