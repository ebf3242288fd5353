"""
Connection timeouts: after how many idle seconds a VM's connection is forgotten, and the minimum of each.

The pool has one set for all hosts (``[pool.timeouts]`` in ``cpmd.toml``). On a host, the keys of ``[host.timeouts]`` in
its own ``natd.toml`` take precedence, each by itself.
"""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import UNSET, Meta, Struct, UnsetType, structs

from cpm.protocol.errors import ConfigError

MINIMUM: Final = {
    "tcp_established_s": (7440, "RFC 5382 REQ-5"),
    "tcp_transitory_s": (240, "RFC 5382 REQ-5"),
    "udp_s": (120, "RFC 4787 REQ-5"),
    "icmp_s": (60, "RFC 5508 REQ-2"),
    "dns_s": (30, "the longest wait of a resolver, resolv.conf(5)"),
}
"""The minimum in seconds, and its source. The minimum of the other keys is one second."""

MAXIMUM_S: Final = 2_147_483
"""The kernel counts up to 2^31 ticks, at most 1,000 a second; a longer timeout would expire at once."""


TimeoutSeconds = Annotated[int, Meta(ge=1, le=MAXIMUM_S)]


class Timeouts(Struct, frozen=True):
    """Idle timeout in seconds for each kind of connection. The defaults are the minimum where an RFC sets one."""

    tcp_established_s: TimeoutSeconds = MINIMUM["tcp_established_s"][0]
    """Also while sent data is not acknowledged, for which the kernel has a shorter timeout."""
    tcp_transitory_s: TimeoutSeconds = MINIMUM["tcp_transitory_s"][0]
    """Opening, or closed by one side only."""
    tcp_time_wait_s: TimeoutSeconds = 120
    """Closed by both sides; the RFC sets no minimum."""
    tcp_reset_s: TimeoutSeconds = 10
    """Ended by a reset; the RFC sets no minimum."""
    udp_s: TimeoutSeconds = MINIMUM["udp_s"][0]
    """Answered or not; to all ports but 53."""
    icmp_s: TimeoutSeconds = MINIMUM["icmp_s"][0]
    """Queries."""
    dns_s: TimeoutSeconds = MINIMUM["dns_s"][0]
    """UDP to port 53, answered or not: RFC 4787 REQ-5 allows shorter ones for well-known ports."""


class TimeoutsTable(Struct, frozen=True, forbid_unknown_fields=True):
    """Idle seconds after which a connection is forgotten; a key that is missing leaves the timeout as it is."""

    tcp_established_s: int | UnsetType = UNSET
    """At least 7,440, the default (RFC 5382 REQ-5)."""
    tcp_transitory_s: int | UnsetType = UNSET
    """At least 240, the default (RFC 5382 REQ-5): opening, or closed by one side only."""
    tcp_time_wait_s: int | UnsetType = UNSET
    """120 by default: closed by both sides. A shorter timeout frees ports earlier; a late packet of the old connection
    may then reach the next connection on the same port."""
    tcp_reset_s: int | UnsetType = UNSET
    """10 by default, as Linux has it: ended by a reset."""
    udp_s: int | UnsetType = UNSET
    """At least 120, the default (RFC 4787 REQ-5)."""
    icmp_s: int | UnsetType = UNSET
    """At least 60, the default (RFC 5508 REQ-2)."""
    dns_s: int | UnsetType = UNSET
    """At least 30, the default, for which a resolver may wait (resolv.conf(5)): UDP to port 53."""

    def override(self, base: Timeouts) -> Timeouts:
        """Return ``base`` with the keys of this table in place of its own."""
        return structs.replace(base, **self._set_keys())

    @property
    def ended_s(self) -> int | None:
        """After how many seconds at least a TCP connection that has ended is forgotten; None: as the pool says."""
        set_here = [each for each in (self.tcp_time_wait_s, self.tcp_reset_s) if each is not UNSET]
        return min(set_here, default=None)

    def check(self, file: str, table: str) -> None:
        """
        Check every key against its minimum and the maximum of the kernel.

        :param file: Path of the configuration file.
        :param table: Dotted name of the table.
        :raise ConfigError: When a timeout is too short or too long.
        """
        for key, seconds in self._set_keys().items():
            least, source = MINIMUM.get(key, (1, ""))
            if seconds < least:
                reason = f"{seconds} s is below the {least:,} s of {source}; " if source else ""
                raise ConfigError(file, f"{table}.{key}", f"{reason}use {least} or more, or remove the line")
            if seconds > MAXIMUM_S:
                raise ConfigError(
                    file, f"{table}.{key}", f"the kernel cannot wait for {seconds} s; use {MAXIMUM_S} or less"
                )

    def _set_keys(self) -> dict[str, int]:
        return {key: seconds for key, seconds in structs.asdict(self).items() if seconds is not UNSET}
