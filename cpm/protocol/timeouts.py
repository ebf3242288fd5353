"""
How long the connection of a VM that says nothing more is remembered, and how short the RFCs let it be.

The pool has one set of these for all hosts (``[pool.timeouts]`` of ``cpmd.toml``); what a host's own ``natd.toml`` says
(``[host.timeouts]``) is nearer and wins there, key by key.
"""

from __future__ import annotations

from typing import Final

from msgspec import UNSET, Struct, UnsetType, structs

from cpm.protocol.errors import ConfigError

MINIMUM: Final = {
    "tcp_established_s": (7440, "RFC 5382 REQ-5"),
    "tcp_transitory_s": (240, "RFC 5382 REQ-5"),
    "udp_s": (120, "RFC 4787 REQ-5"),
    "icmp_s": (60, "RFC 5508 REQ-2"),
}
"""The shortest that is allowed, in seconds, and by what; of the other keys one second."""

MAXIMUM_S: Final = 2_147_483
"""The kernel counts up to 2^31 ticks, at most 1,000 a second; what is longer would be over at once."""


class Timeouts(Struct, frozen=True):
    """Seconds for each kind of connection. The defaults are the shortest that the RFCs allow."""

    tcp_established_s: int = MINIMUM["tcp_established_s"][0]
    """Also while something sent is not acknowledged, for which the kernel has shorter ones."""
    tcp_transitory_s: int = MINIMUM["tcp_transitory_s"][0]
    """Opening, or closed by one side only."""
    tcp_time_wait_s: int = 120
    """Closed by both sides; the RFC leaves it open."""
    tcp_reset_s: int = 10
    """Ended by a reset; the RFC leaves it open."""
    udp_s: int = MINIMUM["udp_s"][0]
    """Whether or not there was an answer."""
    icmp_s: int = MINIMUM["icmp_s"][0]
    """Queries."""


class TimeoutsTable(Struct, frozen=True, forbid_unknown_fields=True):
    """What a configuration file says of them; a key that is not there leaves it to the next who has a say."""

    tcp_established_s: int | UnsetType = UNSET
    """At least 7,440 (RFC 5382 REQ-5)."""
    tcp_transitory_s: int | UnsetType = UNSET
    """At least 240 (RFC 5382 REQ-5): opening, or closed by one side only."""
    tcp_time_wait_s: int | UnsetType = UNSET
    """Closed by both sides. Shorter gives ports back earlier; a late packet of the old connection may then meet the
    next one at its port."""
    tcp_reset_s: int | UnsetType = UNSET
    """Ended by a reset."""
    udp_s: int | UnsetType = UNSET
    """At least 120 (RFC 4787 REQ-5)."""
    icmp_s: int | UnsetType = UNSET
    """At least 60 (RFC 5508 REQ-2)."""

    def override(self, base: Timeouts) -> Timeouts:
        """Return what is said here and, where nothing is, what others say."""
        return structs.replace(base, **self._said())

    def check(self, file: str, table: str) -> None:
        """
        Make sure that the RFCs and the kernel allow what is said.

        :param file: Path of the file that says it.
        :param table: Dotted name of the table.
        :raise ConfigError: When something is too short or too long.
        """
        for key, seconds in self._said().items():
            least, source = MINIMUM.get(key, (1, ""))
            if seconds < least:
                reason = f"{seconds} s is below the {least:,} s of {source}; " if source else ""
                raise ConfigError(file, f"{table}.{key}", f"{reason}use {least} or more, or remove the line")
            if seconds > MAXIMUM_S:
                raise ConfigError(
                    file, f"{table}.{key}", f"the kernel cannot wait for {seconds} s; use {MAXIMUM_S} or less"
                )

    def _said(self) -> dict[str, int]:
        return {key: seconds for key, seconds in structs.asdict(self).items() if seconds is not UNSET}
