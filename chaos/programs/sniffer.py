"""
Two witnesses that read packets (AF_PACKET) and ask nobody.

``sniffer.py LOG owners INTERFACE=NETWORK,NETWORK``, the external network first, on the server's side: who sent from
which port of it, by the destination port, or by the marks of hostile senders (``owner``: the time from the first to
the last packet of one sender on a port, until another one sends from it); and packets with sources of none of the
networks (``leak``).

``sniffer.py LOG sources INTERFACE=NETWORK,NETWORK …`` in the switch: packets that came in through an interface with a
source in none of its networks (``leak``).

On SIGTERM the rest is written, and ``seen``: packets read and packets that this process was too slow for.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import struct
import sys
import time
from ipaddress import IPv4Network
from typing import Any, TextIO

FIRST = 9000
SENDERS = 1000
HOSTILE = 0x88
"""
Type of service of hostile senders' packets, whose identification is the sender. With identification 0 a kernel sent
the packet, and nothing in it says whose: a reset or an acknowledgment for no socket takes the type of service of the
segment that it answers (``ip_send_unicast_reply`` in net/ipv4/ip_output.c). A guest's kernel resets what the
server's kernel acknowledged in answer to a forged segment.
"""
ETH_P_IP = 0x0800
ETH_P_ALL = 3
"""At a bridge's port the bridge takes packets before those who asked for one protocol."""
SOL_PACKET = 263
PACKET_STATISTICS = 6
SO_RCVBUFFORCE = 33
PACKET_OUTGOING = 4
ICMP, TCP, UDP = 1, 6, 17
NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp"}


class Witness:
    """What both have in common."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._leaks: dict[tuple[str, str, str, str], list[float]] = {}
        self._is_stopping = False
        self.read = 0

    def write(self, kind: str, **facts: Any) -> None:
        """Append one object to the log."""
        self._log.write(json.dumps({"kind": kind, **facts}) + "\n")
        self._log.flush()

    def leak(self, where: str, packet: bytes, at: float) -> None:
        """Count a packet that should not be here; a pause of a second begins another entry."""
        source, destination = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
        key = (where, source, destination, NAMES.get(packet[9], str(packet[9])))
        known = self._leaks.get(key)
        if known is not None and at - known[1] < 1.0:
            known[1:] = [at, known[2] + 1]
            return
        if known is not None:
            self._write_leak(key, known)
        self._leaks[key] = [at, at, 1]

    def _write_leak(self, key: tuple[str, str, str, str], known: list[float]) -> None:
        where, source, destination, protocol = key
        self.write(
            "leak",
            where=where,
            source=source,
            destination=destination,
            protocol=protocol,
            begin=known[0],
            end=known[1],
            packets=int(known[2]),
        )

    def packet(self, interface: str, packet: bytes, at: float) -> None:
        """Look at one packet."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what is not yet written."""
        for key, known in self._leaks.items():
            self._write_leak(key, known)

    def run(self, interfaces: list[str]) -> None:
        """Read until SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        sockets = [_open(interface) for interface in interfaces]
        print("ready", flush=True)
        while not self._is_stopping:
            for ready in select.select(sockets, [], [], 0.2)[0]:
                self._drain(ready)
        self.finish()
        missed = sum(struct.unpack("II", one.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1] for one in sockets)
        self.write("seen", packets=self.read, missed=missed)

    def _drain(self, sock: socket.socket) -> None:
        for _ in range(256):
            try:
                packet, address = sock.recvfrom(256)
            except BlockingIOError:
                return
            except OSError:
                # ENETDOWN, once: the interface was switched off; what comes when it is on again is read.
                continue
            if address[1] == ETH_P_IP and address[2] != PACKET_OUTGOING and len(packet) >= 24:
                self.read += 1
                self.packet(address[0], packet, time.monotonic())

    def _stop(self, *_: object) -> None:
        self._is_stopping = True


class Owners(Witness):
    """Who sends from which external port."""

    def __init__(self, log: TextIO, networks: list[IPv4Network]) -> None:
        super().__init__(log)
        self._external, *self._routers = map(_bits, networks)
        self._owners: dict[tuple[bytes, int], list[Any]] = {}

    def packet(self, interface: str, packet: bytes, at: float) -> None:
        """See the class."""
        network, mask = self._external
        source = int.from_bytes(packet[12:16], "big")
        if source & mask != network:
            if all(source & mask != network for network, mask in self._routers):
                self.leak("internet", packet, at)
            return
        if packet[6] & 0x1F or packet[7]:
            return  # a later fragment has no ports
        protocol, start = packet[9], (packet[0] & 15) * 4
        if protocol == ICMP:
            if packet[start] != 8:
                return
            port = int.from_bytes(packet[start + 4 : start + 6], "big")
            word = packet[start + 12 :].split(b" ", 1)[0]
            sender = int(word) if word.isdigit() else -1
        elif protocol in (TCP, UDP):
            port, to = struct.unpack_from("!HH", packet, start)
            sender = to - FIRST
        else:
            return
        if packet[1] == HOSTILE:
            sender = int.from_bytes(packet[4:6], "big") or -1
        if 0 <= sender < SENDERS:
            self._own(packet[12:16], port, sender, NAMES[protocol], at)

    def _own(self, address: bytes, port: int, sender: int, protocol: str, at: float) -> None:
        known = self._owners.get((address, port))
        if known is not None and known[0] == sender:
            known[2], known[3] = at, protocol
            return
        if known is not None:
            self._write_owner(address, port, known)
        self._owners[address, port] = [sender, at, at, protocol]

    def _write_owner(self, address: bytes, port: int, known: list[Any]) -> None:
        sender, begin, end, protocol = known
        self.write(
            "owner",
            address=socket.inet_ntoa(address),
            port=port,
            sender=sender,
            begin=begin,
            end=end,
            protocol=protocol,
        )

    def finish(self) -> None:
        """See the class."""
        super().finish()
        for (address, port), known in self._owners.items():
            self._write_owner(address, port, known)


class Sources(Witness):
    """Sources that must not come in through an interface."""

    def __init__(self, log: TextIO, allowed: dict[str, list[IPv4Network]]) -> None:
        super().__init__(log)
        self._allowed = {interface: [_bits(network) for network in networks] for interface, networks in allowed.items()}

    def packet(self, interface: str, packet: bytes, at: float) -> None:
        """See the class."""
        source = int.from_bytes(packet[12:16], "big")
        for network, mask in self._allowed[interface]:
            if source & mask == network:
                return
        self.leak(interface, packet, at)


def _bits(network: IPv4Network) -> tuple[int, int]:
    return int(network.network_address), int(network.netmask)


def _open(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    sock.setblocking(False)  # noqa: FBT003
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    sock.bind((interface, ETH_P_ALL))
    return sock


def main() -> None:
    """Run."""
    _, path, mode, *words = sys.argv
    with open(path, "a") as log:  # noqa: PTH123 - a program of its own
        pairs = (word.split("=") for word in words)
        allowed = {interface: [IPv4Network(one) for one in networks.split(",")] for interface, networks in pairs}
        witness = Sources(log, allowed) if mode == "sources" else Owners(log, *allowed.values())
        witness.run(list(allowed))


if __name__ == "__main__":
    main()
