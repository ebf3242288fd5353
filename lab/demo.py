"""
``make demo``: one real VM from its start to its last freed port, in a lab of its own.

Every step prints what it will do, does it, and compares the output of virt-ports with independent tools: ``nft`` for
the kernels' tables, ``conntrack`` for connection tracking, ``virsh`` for libvirt, and ``ss`` for the server at the far
end. The first step with another result ends the demo with the reason; the lab is removed in any case.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from lab import net, traffic, witness
from lab.daemons import DaemonSettings
from lab.errors import CommandFailed, LabError
from lab.lab import Lab
from lab.net import Site
from lab.own_traffic import SSH, OwnTraffic
from lab.shell import require_root
from lab.vm import RealGuest
from lab.witness import Ports

NAME = "demo"
VM = "web"
INITIAL = 128
CONNECTIONS = 600
NEIGHBOUR = "mail"
OWN_CONNECTIONS = 50
OWN_TRIES = 500
BLOCK, CAP = 64, 32768
RATE = 200
HOLD_DOWN_S = 5.0
SHRINK_COOL_DOWN_S = 4.0

SETTINGS = DaemonSettings(
    cpmd={
        "pool": {"initial": INITIAL, "floor": INITIAL, "hold_down_s": HOLD_DOWN_S},
        "scaling.guards": {"shrink_cool_down_s": SHRINK_COOL_DOWN_S, "shrink_after_samples": 3},
    },
    natd={},
)
"""Shorter times than the defaults, and sizes that one small guest can fill."""

_LOCK = Path("/run/lock/virt-ports-demo.lock")
_POLL_S = 0.25
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_T = TypeVar("_T")


class Failed(LabError):
    """A step did not have the result it announces."""


def demo(site: Site) -> None:
    """
    Run the demo at a site.

    :raise LabError: When a step fails, or another demo runs; nothing of this one is left.
    :raise KeyboardInterrupt: When it was interrupted, by SIGTERM and SIGHUP too; nothing is left then either.
    """
    require_root()
    with _exclusive_run(), _interruptible():
        lab = Lab(NAME, site=site, settings=SETTINGS)
        run = Demo(lab)
        lab.down()
        try:
            run.all()
        except LabError as error:
            run.tell_logs()
            raise Failed(f"the demo failed at `{run.step}`: {error}") from error
        finally:
            with _ignoring_signals():
                run.clean_up()
        run.done()


class Demo:
    """One run, from its first line to its last."""

    def __init__(self, lab: Lab) -> None:
        self.step = ""
        self._lab = lab
        self._host = lab.site.hosts[0]
        self._begin = time.monotonic()
        self._vm: RealGuest
        self._ports: Ports
        self._sizes: list[int] = []
        self._seen: tuple[IPv4Address, int]
        self._seen_at = ""

    def all(self) -> None:
        """Run every step. :raise LabError: When one does not have the result it announces."""
        self._bring_up()
        with contextlib.ExitStack() as stack:
            for machine in self._lab.site.sharers:
                stack.enter_context(self._keep_own_connections(OwnTraffic(self._lab, machine)))
            self._run_vm()
            self._reclaim()

    def _run_vm(self) -> None:
        self._start_vm()
        self._boot()
        with traffic.sink(self._lab):
            self._grow()
            self._whois()
            self._stop_traffic()
        self._shrink()
        for machine in self._lab.site.sharers:
            self._crowd(OwnTraffic(self._lab, machine))
        self._shut_down()

    def clean_up(self) -> None:
        """Remove the lab."""
        self._step("Clean up")
        self._lab.down()
        left = net.existing_namespaces([self._lab.namespace(node) for node in self._lab.site.namespaces])
        self._check(not left and not self._lab.state.exists(), f"namespaces are left: {left}", "nothing is left")

    def tell_logs(self) -> None:
        """Print the daemons' last warnings and errors: their logs are removed with the lab."""
        for log in sorted(self._lab.state.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            for line in [line for line in lines if " WARNING " in line or " ERROR " in line][-5:]:
                self._say(f"{log.name}: {line}")

    def done(self) -> None:
        """Print that every step succeeded."""
        self._step("Done: every step succeeded")

    # Steps

    def _bring_up(self) -> None:
        self._step(f"Bring up a site in network namespaces: {self._lab.site.summary}")
        self._lab.up(lambda step, seconds: self._say(f"{step}: {seconds:.1f} s"))
        self._await(
            "all nodes to confirm what the manager sent",
            lambda: all(node["connected"] and node["synced"] for node in self._json("node", "list")),
        )
        self._show("node", "list")

    @contextlib.contextmanager
    def _keep_own_connections(self, own: OwnTraffic) -> Iterator[None]:
        """Open connections of the machine's own, and see at the end that all of them are alive."""
        self._step(f"On {own.machine} itself, whose address {own.address} VMs will share: connections that stay open")
        with own.served(), own.held(OWN_CONNECTIONS) as held:
            self._say(f"{OWN_CONNECTIONS} to the internet, {OWN_CONNECTIONS} from there to its port {SSH}")
            yield
            self._step(f"On {own.machine} itself: send a byte through each of these connections and back")
            alive = [each.finish().alive for each in held]
            self._check(
                alive == [OWN_CONNECTIONS] * len(alive),
                f"of {OWN_CONNECTIONS} each, {alive[0]} to the internet and {alive[1]} from there are alive",
                f"all {sum(alive)} connections are alive",
            )

    def _crowd(self, own: OwnTraffic) -> None:
        """Have another VM hold most other ports, and see that everything of the machine's own still succeeds."""
        self._step(f"Another guest takes most of the ports that are left, and {own.machine} itself notices nothing")
        self._lab.add_guest(NEIGHBOUR, self._host)
        # Not all: the manager keeps some ports for VMs that start.
        size = min(CAP, int(self._json("pool", "list")[0]["longest_free"] * 0.9) // BLOCK * BLOCK)
        self._lab.operate("set", NEIGHBOUR, f"floor={size}", f"cap={size}")
        self._await(f"{NEIGHBOUR} to have {size} ports", functools.partial(self._has, NEIGHBOUR, size))
        self._show("list")
        self._show("pool", "list")
        for tries in own.tries(OWN_TRIES):
            self._check(not tries.failed, f"on {own.machine} itself, {tries}", f"on {own.machine} itself, {tries}")
        self._lab.remove_guest(NEIGHBOUR)

    def _has(self, name: str, size: int) -> bool:
        (vm,) = (vm for vm in self._json("list") if vm["name"] == name)
        return vm["first_port"] is not None and vm["last_port"] - vm["first_port"] + 1 >= size

    def _start_vm(self) -> None:
        self._step(f"virsh start {VM} --paused: the hook asks for ports before the guest executes an instruction")
        self._vm = self._lab.add_vm(VM, self._host, paused=True)
        self._check(self._vm.state == "paused", f"libvirt says {self._vm.state}", "libvirt: started, not yet running")
        self._show("list")
        self._ports = self._active_range()
        self._check(self._ports.size == INITIAL, f"{VM} got {self._ports.size} ports", f"{INITIAL} ports are allocated")
        self._compare_kernels()

    def _compare_kernels(self) -> None:
        """Compare the kernels' tables with the output of virt-ports."""
        internal = IPv4Address(self._detail()["internal_address"])
        ports = self._compare_host(internal)
        for edge in self._lab.site.edges:
            inward, outward = (
                look(self._lab, edge).get(VM, ()) for look in (witness.inbound_ranges, witness.outbound_ranges)
            )
            said = f"nft on {edge}: {', '.join(map(str, inward))} <-> {internal}"
            fine = inward == outward and any(one.holds(ports.address, ports.last) for one in inward)
            self._check(fine, f"{said}; out: {', '.join(map(str, outward))}; {ports} is not there", said)

    def _compare_host(self, internal: IPv4Address) -> Ports:
        """Return the external ports that the host hands out; repeat the look, as a resize may come in between."""

        def agreed() -> list[Ports]:
            ports = self._active_range()
            seen = witness.host_ranges(self._lab, self._host).get(VM)
            return [ports] if seen == Ports(internal, ports.first, ports.last) else []

        (ports,) = self._await(f"nft on {self._host} to hand out the ports that virt-ports list shows for {VM}", agreed)
        self._say(f"nft on {self._host}: snat to {Ports(internal, ports.first, ports.last)}")
        return ports

    def _boot(self) -> None:
        self._step(f"virsh resume {VM}: the guest boots (QEMU without hardware virtualization)")
        self._vm.host.virsh("resume", VM)
        self._vm.wait_ready()
        address = self._vm.shell("ip -4 -o addr show dev eth0").split()[3]
        others = ", as any guest of the other host may have too" if len(self._lab.site.hosts) > 1 else ""
        self._say(f"the guest agent answers; the guest has {address}{others}")
        self._show("show", VM)

    def _grow(self) -> None:
        self._step(f"In the guest: open {CONNECTIONS} TCP connections to {net.INTERNET_ADDRESS} and keep them open")
        self._sizes = [self._ports.size]
        load = f"conngen -r {RATE} -T 30 -t -1 -R -k {net.INTERNET_ADDRESS} {traffic.PORT} {CONNECTIONS}"
        self._vm.shell(f"{load} >/tmp/load 2>&1 </dev/null & echo $! >/tmp/load.pid")
        self._await(
            f"all {CONNECTIONS} connections to be established at the server",
            lambda: self._follow() and len(witness.peers(self._lab, traffic.PORT)) == CONNECTIONS,
            60.0,
        )
        self._await(f"{VM} to hold more than twice {INITIAL} ports", lambda: self._follow() > 2 * INITIAL)
        self._show("list")
        self._compare_kernels()
        peers = witness.peers(self._lab, traffic.PORT)
        held = self._ranges()
        strangers = [peer for peer in peers if not any(ports.holds(*peer) for ports in held)]
        self._check(
            not strangers and len(set(peers)) == CONNECTIONS,
            f"the server saw ports that are not {VM}'s: {strangers[:5]}",
            f"the server sees {len(peers)} connections from {peers[0][0]}, all from ports of {VM}",
        )
        self._check_edges_keep_no_state()

    def _check_edges_keep_no_state(self) -> None:
        """Only hosts track connections; an edge that is a host too has those of its VMs."""
        edges = [edge for edge in self._lab.site.edges if edge not in self._lab.site.hosts]
        kept = {edge: witness.connection_count(self._lab, edge, net.INTERNET_ADDRESS) for edge in edges}
        wrong = f"the edges keep state: {kept}"
        if edges:
            self._check(not any(kept.values()), wrong, f"conntrack on {' and '.join(edges)}: no state of any")

    def _whois(self) -> None:
        address, port = self._seen = witness.peers(self._lab, traffic.PORT)[CONNECTIONS // 2]
        self._step(f"The server saw {address} port {port}: which VM is that?")
        self._show("whois", str(address), str(port))
        found = self._json("whois", str(address), str(port))
        self._seen_at = datetime.fromtimestamp(found["at"], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._check(found["uuid"] == self._vm.uuid, f"whois says {found['name']}", f"whois says {VM}")
        source = witness.original_source(self._lab, self._host, port)
        guest = IPv4Address(self._vm.shell("ip -4 -o addr show dev eth0").split()[3].partition("/")[0])
        self._check(
            source == guest,
            f"conntrack on {self._host} says {source}, not {guest}",
            f"conntrack on {self._host}: {port} is {guest}",
        )

    def _stop_traffic(self) -> None:
        self._step("In the guest: send a byte through every connection and back, then close them")
        self._vm.shell('kill "$(cat /tmp/load.pid)"')
        output = self._await("the generator to end", self._load_output)
        tally = traffic.Tally.parse(output)
        self._check(
            tally.ok == tally.alive == CONNECTIONS,
            f"of {CONNECTIONS} connections {tally.fail} failed and {tally.dead} were cut: {output.strip()}",
            f"{tally.alive} of {CONNECTIONS} connections are alive after {len(self._sizes) - 1} resizes",
        )

    def _load_output(self) -> str:
        return self._vm.shell('[ -e "/proc/$(cat /tmp/load.pid)" ] || cat /tmp/load')

    def _shrink(self) -> None:
        self._step(f"The load is gone: the range shrinks (here after {SHRINK_COOL_DOWN_S:g} s of rest, by default 30)")
        self._await(f"{VM} to shrink to {INITIAL} ports", lambda: self._follow() == INITIAL, 90.0)
        self._show("list")

    def _shut_down(self) -> None:
        self._step(f"virsh shutdown {VM}")
        self._ports = self._active_range()
        self._vm.shut_down()
        self._say(f"libvirt: {self._vm.state}")
        handed_out = self._await_gone(self._host, lambda: witness.host_ranges(self._lab, self._host))
        self._say(f"nft on {self._host}: no ports for {VM} ({len(handed_out)} VMs left)")

    def _reclaim(self) -> None:
        self._step(f"Its ports are held for {HOLD_DOWN_S:g} s (by default 120, RFC 6888), then they are free")
        self._show("list", "--all")
        self._await("all ports to be free", self._all_free, 60.0)
        for edge in self._lab.site.edges:
            for look in (witness.inbound_ranges, witness.outbound_ranges):
                self._await_gone(edge, functools.partial(look, self._lab, edge))
        self._say(f"nft on {' and '.join(self._lab.site.edges)}: nothing left of it")
        self._show("pool", "list")
        self._check(self._json("list", "--all") == [], f"{VM} is still listed", f"virt-ports list --all: {VM} is gone")
        address, port = map(str, self._seen)
        with contextlib.suppress(CommandFailed):
            raise Failed(f"{address} port {port} should be nobody's: {self._lab.operate('whois', address, port)}")
        then = self._json("whois", address, port, "--at", self._seen_at)
        self._check(
            then["uuid"] == self._vm.uuid,
            f"whois --at says {then['name']}",
            f"{address} port {port} is nobody's now; whois --at {self._seen_at} still says {VM}",
        )

    # Queries

    def _json(self, *arguments: str) -> Any:
        return json.loads(self._lab.operate(*arguments, "-o", "json"))

    def _show(self, *arguments: str) -> None:
        print(f"\n  $ virt-ports {' '.join(arguments)}")
        for line in self._lab.operate(*arguments).rstrip().splitlines():
            print(f"  {line}".rstrip())
        print(flush=True)

    def _detail(self) -> Any:
        return self._json("show", VM)

    def _active_range(self) -> Ports:
        found = [vm for vm in self._json("list") if vm["name"] == VM]
        if not found or found[0]["first_port"] is None:
            raise Failed(f"virt-ports list shows no ports for {VM}")
        return Ports(IPv4Address(found[0]["external_address"]), found[0]["first_port"], found[0]["last_port"])

    def _ranges(self) -> list[Ports]:
        return [
            Ports(IPv4Address(one["external_address"]), one["first_port"], one["last_port"])
            for one in self._detail()["allocations"]
        ]

    def _follow(self) -> int:
        """Return the size of the VM's range, and say when it has changed."""
        (vm,) = (vm for vm in self._json("list") if vm["name"] == VM)
        ports = Ports(IPv4Address(vm["external_address"]), vm["first_port"], vm["last_port"])
        if ports != self._ports:
            self._say(f"{self._ports.size} -> {ports.size} ports: {ports}, {vm['ports_in_use']} in use")
            self._ports = ports
            self._sizes.append(ports.size)
        return ports.size

    def _all_free(self) -> bool:
        return all(not one["ports_allocated"] and not one["ports_leaving"] for one in self._json("pool", "list"))

    # Output

    def _step(self, text: str) -> None:
        self.step = text
        print(f"\n[{time.monotonic() - self._begin:5.1f} s] {text}", flush=True)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.1f} s]   {text}", flush=True)

    def _check(self, fine: bool, wrong: str, right: str) -> None:  # noqa: FBT001 - the question comes first
        if not fine:
            raise Failed(wrong)
        self._say(right)

    def _await(self, what: str, look: Callable[[], _T], timeout_s: float = 30.0) -> _T:
        deadline = time.monotonic() + timeout_s
        while not (found := look()):
            if time.monotonic() > deadline:
                raise Failed(f"not within {timeout_s:g} s: {what}")
            time.sleep(_POLL_S)
        return found

    def _await_gone(self, node: str, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self._await(f"{node} to forget {VM}", lambda: VM not in look())
        return look()


@contextlib.contextmanager
def _exclusive_run() -> Iterator[None]:
    """Allow one demo at a time; the lock ends with the process."""
    _LOCK.parent.mkdir(parents=True, exist_ok=True)
    with _LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failed("another demo runs on this machine; wait for its end") from None
        yield


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that the lab is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell starts its background jobs with it ignored.
    former = {number: signal.signal(number, interrupt) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ignoring_signals() -> Iterator[None]:
    """Ignore these signals while the lab is removed."""
    former = {number: signal.signal(number, signal.SIG_IGN) for number in _ENDS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
