"""Arrival budgets, refusals in words and timeouts, on the real kernel; nft, conntrack and raw sockets are witnesses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import re
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.errors import KernelError
from cpm.protocol.model import PortRange
from cpm.protocol.timeouts import MAXIMUM_S, Timeouts, TimeoutsTable
from natctl.model.entries import Change, Destination, HostEntry, Path
from natctl.netlink.conntrack import dump_full_destinations
from natctl.netlink.nflog import BudgetUsedUp, SignalsLost, watch_budgets
from natctl.netlink.nfqueue import Deferred, PacketQueue
from natctl.ruleset.marks import Marks
from tests.fakes.intents import with_intent
from tests.netns.topology import EXTERNAL, INTERNET, PATIENCE, POOL, VM, KernelIn, Node, Site, program

pytestmark = pytest.mark.netns

SMALL = PortRange(20000, 20015)
MARKS = Marks.of_mask(0x7FFF0000)
HTTP = (INTERNET, 8080)
ANSWERED = PATIENCE / 5
"""Seconds within which what is refused is known to be; a SYN that nobody answers is sent again after one."""


class Ear:
    """Listens to an NFLOG group in a node's namespace and remembers whom it heard of."""

    def __init__(self, node: Node, group: int = 7414) -> None:
        self._node = node
        self._group = group
        self._words: asyncio.Queue[BudgetUsedUp | SignalsLost] = asyncio.Queue()
        node.kernel.run(self._start())

    async def _start(self) -> None:
        ready = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._listen(ready))
        await ready.wait()

    async def _listen(self, ready: asyncio.Event) -> None:
        async with contextlib.aclosing(watch_budgets(self._group)) as words:
            # The first step opens the socket and then waits: by the next turn of the loop it listens.
            asyncio.get_running_loop().call_soon(ready.set)
            async for word in words:
                self._words.put_nowait(word)

    def next(self) -> BudgetUsedUp | SignalsLost:
        return self._node.kernel.run(asyncio.wait_for(self._words.get(), PATIENCE))

    def heard(self) -> int:
        """Return how many there are to be had, without waiting."""
        return self._words.qsize()

    def close(self) -> None:
        async def stop() -> None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

        self._node.kernel.run(stop())


class Door:
    """natd's end of the queue in which connections wait."""

    def __init__(self, node: Node) -> None:
        async def made() -> PacketQueue:
            return PacketQueue(7414)

        self._run = node.kernel.run
        self._queue: PacketQueue = self._run(made())

    def next(self) -> list[Deferred]:
        return self._run(asyncio.wait_for(self._queue.next(), PATIENCE))

    def release(self, *waiting: Deferred) -> None:
        self._queue.release([deferred.packet for deferred in waiting])

    def close(self) -> None:
        self._queue.close()


@dataclasses.dataclass
class Scene:
    """One VM behind a host and an edge."""

    site: Site
    host: Node
    edge: Node
    vm: VM

    def tell(self, **changes: object) -> HostEntry:
        """Say to the host what is to be about the VM now."""
        entry = with_intent(self.vm.on_host(), **changes)
        self.host.kernel.change(Change(host={self.vm.domain: entry}))
        return entry

    def give(self, timeouts: Timeouts | None) -> None:
        """Say to the host, as a manager's snapshot does, how long connections live from now on."""
        path = Path(POOL, frozenset({self.edge.underlay}), timeouts=timeouts)
        kernel = self.host.kernel
        kernel.replace({self.vm.domain: self.vm.on_host()}, {}, path)

    def send(self, count: int, port: int = 9000) -> None:
        """Begin UDP flows to one destination, each from a port of its own."""
        for _ in range(count):
            with self.vm.guest.namespace.udp() as client:
                client.sendto(b"x", (INTERNET, port))

    def connections(self, *arguments: str) -> list[str]:
        return self.host.namespace.run("conntrack", "-L", *arguments).splitlines()


@pytest.fixture
def scene(site: Site) -> Scene:
    host, edge = site.host(21), site.edge(11)
    site.spread(edge)
    vm = VM.of(1, site.guest(host), SMALL)
    program([host, edge], [vm], {0: (edge,)})
    return Scene(site, host, edge, vm)


@pytest.fixture
def ear(scene: Scene) -> Iterator[Ear]:
    made = Ear(scene.host)
    yield made
    made.close()


@pytest.fixture
def door(scene: Scene) -> Iterator[Door]:
    made = Door(scene.host)
    yield made
    made.close()


def test_the_connection_beyond_the_budget_is_announced_and_none_before(scene: Scene, ear: Ear) -> None:
    scene.tell(budget=5)
    scene.send(5)
    assert ear.heard() == 0
    scene.send(1)
    word = ear.next()
    assert isinstance(word, BudgetUsedUp)
    assert MARKS.index_in(word.mark) == 1
    # It went its way all the same, like those before it.
    assert len(scene.connections("-p", "udp")) == 6


def test_with_no_budget_at_all_the_next_one_is_announced(scene: Scene, ear: Ear) -> None:
    scene.tell(budget=0)
    scene.send(1)
    assert isinstance(ear.next(), BudgetUsedUp)


def test_packets_of_a_connection_that_is_known_cost_nothing(scene: Scene, ear: Ear) -> None:
    scene.tell(budget=1)
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        for _ in range(20):
            client.sendto(b"x", (INTERNET, 9000))
            server.recv(10)
    assert ear.heard() == 0


def test_a_crowd_of_connections_gives_fewer_signals_than_connections(scene: Scene, ear: Ear) -> None:
    scene.tell(budget=2, ports=PortRange(20000, 21023))
    scene.edge.kernel.ensure()
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(scene.vm.guest.namespace.udp()).sendto(b"x", (INTERNET, 9000))
    ear.next()
    assert ear.heard() < 250


def test_other_listeners_are_not_disturbed(scene: Scene) -> None:
    foreign = Ear(scene.host, 5)
    try:
        scene.host.namespace.nft(
            "add table ip other; add chain ip other c { type filter hook forward priority 0; };"
            "add rule ip other c log group 5"
        )
        scene.tell(budget=0)
        mine = Ear(scene.host)
        try:
            scene.send(1)
            assert isinstance(mine.next(), BudgetUsedUp)
            assert isinstance(foreign.next(), BudgetUsedUp)
            assert (mine.heard(), foreign.heard()) == (0, 0)
            with pytest.raises(KernelError) as caught:
                scene.host.namespace.inside(lambda: asyncio.run(_first(7414)))
            assert (caught.value.action, caught.value.errno) == ("listen to NFLOG group 7414", errno.EPERM)
        finally:
            mine.close()
    finally:
        foreign.close()


async def _first(group: int) -> None:
    async with contextlib.aclosing(watch_budgets(group)) as words:
        await anext(words)


def test_a_budget_that_is_partly_used_stays_as_it_is(scene: Scene, ear: Ear) -> None:
    kernel = scene.host.kernel
    entry = scene.tell(budget=5)
    scene.send(4)
    # Somebody has a transaction, so everything is compared; and the VM is told what it was told.
    scene.host.namespace.nft("add table ip other")
    assert kernel.ensure() == ()
    kernel.change(Change(host={entry.intent.domain: entry}))
    assert kernel.observe().host == {entry.intent.domain: entry}
    scene.send(1)
    assert ear.heard() == 0
    scene.send(1)
    assert isinstance(ear.next(), BudgetUsedUp)


def test_a_new_budget_counts_from_the_beginning(scene: Scene, ear: Ear) -> None:
    scene.tell(budget=5)
    scene.send(5)
    scene.tell(budget=4)
    scene.send(4)
    assert ear.heard() == 0
    scene.send(1)
    assert isinstance(ear.next(), BudgetUsedUp)


def test_connections_wait_for_more_ports_and_go_on_with_them(scene: Scene, door: Door) -> None:
    larger = PortRange(20016, 20031)
    both = dataclasses.replace(scene.vm, ranges=((EXTERNAL, SMALL), (EXTERNAL, larger)))
    scene.edge.kernel.change(Change(edge={both.domain: both.at(scene.edge)}))
    scene.tell(defer_after=3)
    with scene.site.internet.udp(INTERNET, 9000) as server:
        scene.send(3)
        seen = [server.recvfrom(10)[1][1] for _ in range(3)]
        scene.send(2)
        waiting = door.next()
        while len(waiting) < 2:
            waiting += door.next()
        assert [MARKS.index_in(deferred.mark) for deferred in waiting] == [1, 1]
        assert all(port in SMALL for port in seen)
        assert len(scene.connections("-p", "udp")) == 3
        scene.tell(ports=larger, defer_after=10)
        door.release(*waiting)
        assert {server.recvfrom(10)[1][1] in larger for _ in range(2)} == {True}


def test_a_connection_that_has_its_port_never_waits(scene: Scene, door: Door) -> None:
    scene.tell(defer_after=1)
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        # Never answered, so that it stays new to connection tracking.
        for number in range(5):
            client.sendto(bytes((number,)), (INTERNET, 9000))
            assert server.recv(10) == bytes((number,))
        scene.send(1)
        assert len(door.next()) == 1


def test_only_the_vm_that_has_no_ports_left_waits(scene: Scene, door: Door) -> None:
    other = VM.of(2, scene.site.guest(scene.host, "10.10.0.6"), PortRange(21000, 21015))
    for node, change in (
        (scene.edge, Change(edge={other.domain: other.at(scene.edge)})),
        (scene.host, Change(host={other.domain: other.on_host()})),
    ):
        node.kernel.change(change)
    scene.tell(defer_after=1)
    scene.send(2)
    with scene.site.internet.udp(INTERNET, 9000) as server, other.guest.namespace.udp() as client:
        client.sendto(b"x", (INTERNET, 9000))
        assert server.recvfrom(10)[1][1] in other.ranges[0][1]
    assert [MARKS.index_in(deferred.mark) for deferred in door.next()] == [1]


def test_nobody_waits_for_a_natd_that_is_not_there(scene: Scene) -> None:
    scene.tell(defer_after=1)
    with scene.site.internet.udp(INTERNET, 9000) as server:
        scene.send(3)
        assert [server.recv(10) for _ in range(3)] == [b"x"] * 3
        gone = Door(scene.host)
        scene.send(1)
        gone.next()
        gone.close()
        scene.send(1)
        assert server.recv(10) == b"x"


def test_a_queue_has_one_reader(scene: Scene, door: Door) -> None:
    with pytest.raises(KernelError) as caught:
        Door(scene.host)
    assert "NFQUEUE 7414" in caught.value.action
    assert caught.value.errno == errno.EPERM


def test_a_deferral_that_is_partly_used_stays_as_it_is(scene: Scene, door: Door) -> None:
    kernel = scene.host.kernel
    entry = scene.tell(budget=5, defer_after=3)
    scene.send(2)
    scene.host.namespace.nft("add table ip other")
    assert kernel.ensure() == ()
    assert kernel.observe().host == {entry.intent.domain: entry}
    scene.send(4)
    assert door.next()
    assert len(scene.connections("-p", "udp")) == 3


def _policies(scene: Scene, state: str) -> list[int]:
    """Return the seconds that each of our timeout objects gives to a state; nft prints them one way or another."""
    objects = [item["ct timeout"] for item in scene.host.namespace.ruleset() if "ct timeout" in item]
    # Where all is as the system has it there is no policy.
    return [policy[state] for one in objects if state in (policy := one["policy"] or {})]


def test_nft_shows_budgets_and_timeouts_in_words(scene: Scene) -> None:
    scene.tell(budget=64, at_cap=True, defer_after=192)
    listed = scene.host.namespace.run("nft", "list", "ruleset")
    for words in (
        "elements = { 0x40010000 limit rate over 1/day burst 64 packets limit rate 50/second burst 1 packets",
        'elements = { 0x40010000 counter packets 0 bytes 0 comment "web 1" }',
        "elements = { 0x40010000 limit rate over 1/day burst 192 packets comment",
        "meta mark & 0x7fff0000 == @budgets log group 7414 queue-threshold 1",
        "meta mark & 0x7fff0000 . ip daddr @refused-queries",
    ):
        assert words in listed
    # The second is what nft makes of xtables' target, which does it where the kernel lacks nftables' own expression.
    queue = re.search(r"meta mark & 0x7fff0000 == @deferred queue ([a-z0-9 ]+?) comment", listed)
    assert queue is not None
    assert queue[1] in {"flags bypass to 7414", "num 7414 bypass"}
    assert 7440 in _policies(scene, "established")


def test_counters_are_read_alone(scene: Scene) -> None:
    kernel = scene.host.kernel
    scene.send(3)
    assert kernel.counters().connections == {scene.vm.domain: 3}


# Refusing


def _outcome(scene: Scene, to: tuple[str, int]) -> int:
    """Try to connect once; 0, or what the guest is told within the time."""
    with scene.vm.guest.namespace.socket(socket.SOCK_STREAM) as client:
        client.settimeout(ANSWERED)
        try:
            client.connect(to)
        except TimeoutError:
            return errno.ETIMEDOUT
        except OSError as error:
            return error.errno or -1
        return 0


def _full_destinations(scene: Scene) -> Callable[[], frozenset[Destination]]:
    return lambda: scene.host.namespace.inside(lambda: dump_full_destinations(scene.vm.internal, SMALL))


def test_only_a_full_vm_at_its_cap_is_refused_in_words(scene: Scene) -> None:
    kernel, full_destinations = scene.host.kernel, _full_destinations(scene)
    full = Destination(6, IPv4Address(INTERNET), 8080)
    with (
        scene.site.internet.listener(INTERNET, 8080) as listener,
        scene.site.internet.listener(INTERNET, 8081),
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(scene.vm.guest.namespace.tcp(HTTP)) for _ in range(SMALL.size - 1)]
        servers = [stack.enter_context(listener.accept()[0]) for _ in clients]
        assert full_destinations() == frozenset()
        clients.append(stack.enter_context(scene.vm.guest.namespace.tcp(HTTP)))
        servers.append(stack.enter_context(listener.accept()[0]))
        assert full_destinations() == {full}

        # Silence, as long as nobody says otherwise; and words for a VM at its cap only.
        assert _outcome(scene, HTTP) == errno.ETIMEDOUT
        kernel.refuse_connections({scene.vm.domain: full_destinations()}, 60)
        assert _outcome(scene, HTTP) == errno.ETIMEDOUT
        scene.tell(at_cap=True)
        with scene.vm.guest.namespace.icmp() as witness:
            assert _outcome(scene, HTTP) == errno.EHOSTUNREACH
            assert witness.recv(100)[20:22] == bytes((3, 13))
        assert kernel.counters().refused == {scene.vm.domain: 1}

        # The same ports serve other destinations, and connections that there are go on.
        assert _outcome(scene, (INTERNET, 8081)) == 0
        for client, server in zip(clients, servers, strict=True):
            client.sendall(b"alive")
            server.settimeout(PATIENCE)
        assert kernel.ensure() == ()
        assert len({server.getpeername()[1] for server in servers}) == SMALL.size

        # A connection that is closing counts no more: the kernel may give its port to the next one.
        clients[0].close()
        servers[0].close()
        assert full_destinations() == frozenset()
        kernel.refuse_connections({scene.vm.domain: full_destinations()}, 60)
        assert _outcome(scene, HTTP) != errno.EHOSTUNREACH


def test_refused_destinations_expire(scene: Scene) -> None:
    kernel = scene.host.kernel
    scene.tell(at_cap=True)
    with scene.site.internet.listener(INTERNET, 8080):
        everything = [Destination(6, IPv4Address(INTERNET), 8080)]
        kernel.refuse_connections({scene.vm.domain: everything}, 0.5)
        assert _outcome(scene, HTTP) == errno.EHOSTUNREACH
        with scene.vm.guest.namespace.socket(socket.SOCK_STREAM) as client:
            while client.connect_ex(HTTP):
                pass


def test_icmp_queries_are_refused_too(scene: Scene) -> None:
    kernel = scene.host.kernel
    scene.tell(at_cap=True)
    destination = Destination(1, IPv4Address(INTERNET), 0)
    kernel.refuse_connections({scene.vm.domain: [destination]}, 60)
    done = scene.vm.guest.namespace.run("sh", "-c", f"ping -c 1 -W 2 {INTERNET} || true")
    assert "Packet filtered" in done or "Prohibited" in done


# Timeouts


def _seconds(scene: Scene, *filter_: str) -> list[int]:
    """Return how many seconds conntrack gives each connection that matches."""
    return [int(line.split()[2]) for line in scene.connections(*filter_)]


def test_managed_flows_have_the_rfcs_timeouts_and_others_the_systems(scene: Scene) -> None:
    scene.send(1)
    scene.vm.guest.namespace.run("ping", "-c", "1", INTERNET)
    with scene.site.internet.listener(INTERNET, 8080), scene.vm.guest.namespace.tcp(HTTP):
        (udp,) = _seconds(scene, "-p", "udp", "--reply-dst", str(scene.vm.internal))
        (icmp,) = _seconds(scene, "-p", "icmp", "--reply-dst", str(scene.vm.internal))
        (tcp,) = _seconds(scene, "-p", "tcp", "--reply-dst", str(scene.vm.internal))
    # What is left of them after a moment.
    assert 110 <= udp <= 120
    assert 50 <= icmp <= 60
    assert 7400 <= tcp <= 7440
    with scene.host.namespace.udp() as own:
        own.sendto(b"x", (str(scene.edge.underlay), 9))
    (own_udp,) = _seconds(scene, "-p", "udp", "--orig-src", str(scene.host.underlay))
    assert own_udp <= 30


def test_a_query_for_a_name_is_forgotten_sooner_whether_answered_or_not(scene: Scene) -> None:
    scene.send(1, port=53)
    assert 25 <= _lives(scene, "udp", 53) <= 30
    with contextlib.ExitStack() as stack:
        client, server = _udp(scene, stack, 53)
        _alive(client, server)
        assert all(20 <= seconds <= 30 for seconds in _seconds(scene, "-p", "udp", "--orig-port-dst", "53"))
        for port in (443, 853, 5353):
            scene.send(1, port=port)
            assert 110 <= _lives(scene, "udp", port) <= 120
        _alive(*_tcp(scene, stack, 53))
        assert 7400 <= _lives(scene, "tcp", 53) <= 7440


def test_the_timeout_of_dns_is_listed_in_words_that_nft_loads_again(scene: Scene) -> None:
    run = scene.host.namespace.run
    rule = 'udp dport 53 ct timeout set "managed-dns-30"'
    assert rule in run("nft", "list", "chain", "ip", "virtports", "begun")
    listed = run("nft", "list", "ct", "timeout", "ip", "virtports", "managed-dns-30")
    run("nft", "-c", "-f", "-", stdin=f"flush ruleset\n{listed}\ntable ip virtports {{ chain begun {{ {rule}; }}; }}")


def test_timeouts_are_as_set(site: Site) -> None:
    host, edge = site.host(21, timeouts=TimeoutsTable(udp_s=300, tcp_transitory_s=250, dns_s=40)), site.edge(11)
    site.spread(edge)
    vm = VM.of(1, site.guest(host), SMALL)
    program([host, edge], [vm], {0: (edge,)})
    scene = Scene(site, host, edge, vm)
    scene.send(1)
    (udp,) = _seconds(scene, "-p", "udp")
    assert 290 <= udp <= 300
    scene.send(1, port=53)
    assert 35 <= _lives(scene, "udp", 53) <= 40
    scene.site.router.ip("route add blackhole 192.0.2.200/32")
    assert _outcome(scene, ("192.0.2.200", 80)) == errno.ETIMEDOUT
    (tcp,) = _seconds(scene, "-p", "tcp")
    assert 240 <= tcp <= 250


def _alive(client: socket.socket, server: socket.socket) -> None:
    """Have a connection used in both directions."""
    for sender, receiver in ((client, server), (server, client)):
        sender.send(b"alive")
        receiver.settimeout(PATIENCE)
        assert receiver.recv(10) == b"alive"


def _udp(scene: Scene, stack: contextlib.ExitStack, port: int) -> tuple[socket.socket, socket.socket]:
    """Return a UDP flow of the VM: its socket and the server's."""
    server = stack.enter_context(scene.site.internet.udp(INTERNET, port))
    client = stack.enter_context(scene.vm.guest.namespace.udp())
    client.connect((INTERNET, port))
    client.send(b"hello")
    server.connect(server.recvfrom(10)[1])
    return client, server


def _tcp(scene: Scene, stack: contextlib.ExitStack, port: int) -> tuple[socket.socket, socket.socket]:
    listener = stack.enter_context(scene.site.internet.listener(INTERNET, port))
    client = stack.enter_context(scene.vm.guest.namespace.tcp((INTERNET, port)))
    return client, stack.enter_context(listener.accept()[0])


def _lives(scene: Scene, protocol: str, port: int) -> int:
    (seconds,) = _seconds(scene, "-p", protocol, "--orig-port-dst", str(port))
    return seconds


def test_the_managers_timeouts_are_for_new_flows_of_vms_and_former_flows_keep_theirs(scene: Scene) -> None:
    kernel = scene.host.kernel
    scene.give(Timeouts(udp_s=300, tcp_established_s=8000))
    with contextlib.ExitStack() as stack:
        former = {"udp": _udp(scene, stack, 9001), "tcp": _tcp(scene, stack, 8001)}
        for pair in former.values():
            _alive(*pair)
        assert 290 <= _lives(scene, "udp", 9001) <= 300
        assert 7900 <= _lives(scene, "tcp", 8001) <= 8000

        scene.give(Timeouts(udp_s=600, tcp_established_s=9000))
        now = {"udp": _udp(scene, stack, 9002), "tcp": _tcp(scene, stack, 8002)}
        for pair in (*former.values(), *now.values()):
            _alive(*pair)
        assert 590 <= _lives(scene, "udp", 9002) <= 600
        assert 8900 <= _lives(scene, "tcp", 8002) <= 9000
        assert 290 <= _lives(scene, "udp", 9001) <= 300
        assert 7900 <= _lives(scene, "tcp", 8001) <= 8000
        # The table is the same one: nothing that it counted is lost.
        assert kernel.counters().connections == {scene.vm.domain: 4}

    listed = scene.host.namespace.run("nft", "list", "chain", "ip", "virtports", "begun")
    assert 'ct timeout set "managed-udp-600-icmp-60"' in listed
    assert "managed-udp-300" not in listed
    assert 9000 in _policies(scene, "established")
    assert 600 in _policies(scene, "replied")
    assert kernel.ensure() == ()

    with scene.host.namespace.udp() as own:
        own.sendto(b"x", (str(scene.edge.underlay), 9))
    (own_udp,) = _seconds(scene, "-p", "udp", "--orig-src", str(scene.host.underlay))
    assert own_udp <= 30


def test_a_restarted_natd_keeps_what_the_kernel_gives_until_the_manager_speaks(scene: Scene) -> None:
    given = Timeouts(udp_s=300, tcp_time_wait_s=30)
    scene.give(given)
    before = scene.host.namespace.run("nft", "list", "chain", "ip", "virtports", "begun")
    successor = KernelIn(scene.host.namespace, scene.host.kernel.settings)
    try:
        found = successor.observe().path
        assert found is not None
        assert found.timeouts == given
        entry = dataclasses.replace(scene.vm.on_host(), budget=7)
        successor.change(Change(host={entry.intent.domain: entry}))
        assert scene.host.namespace.run("nft", "list", "chain", "ip", "virtports", "begun") == before
        assert successor.replace({entry.intent.domain: entry}, {}, found) == ()
    finally:
        successor.close()


def test_the_kernel_accepts_the_longest_timeout(scene: Scene) -> None:
    scene.give(Timeouts(udp_s=MAXIMUM_S))
    scene.send(1)
    (udp,) = _seconds(scene, "-p", "udp")
    assert MAXIMUM_S - 10 <= udp <= MAXIMUM_S


def test_a_changed_timeout_is_put_right(scene: Scene) -> None:
    kernel = scene.host.kernel
    scene.host.namespace.nft("add ct timeout ip virtports mine { protocol udp; l3proto ip; policy = { replied: 10 }; }")
    assert kernel.ensure() == ("ct timeout ip mine is not ours",)
    assert kernel.ensure() == ()


def test_connections_outlive_their_timeouts_object(scene: Scene) -> None:
    """Somebody flushes everything: what there is goes on, with the system's timeout; what is new has ours."""
    kernel = scene.host.kernel
    with scene.site.internet.udp(INTERNET, 9000) as server, scene.vm.guest.namespace.udp() as client:
        client.connect((INTERNET, 9000))
        client.send(b"one")
        server.connect(server.recvfrom(10)[1])
        scene.host.namespace.nft("flush ruleset")
        kernel.ensure()
        client.send(b"two")
        assert server.recv(10) == b"two"
        server.send(b"three")
        assert client.recv(10) == b"three"
        (seconds,) = _seconds(scene, "-p", "udp")
        assert seconds <= 120
        scene.send(1, port=9001)
        assert max(_seconds(scene, "-p", "udp", "--orig-port-dst", "9001")) > 110
