"""
Who may do what on a unix socket: the kernel says which process is at the other end, the settings say what it may do.

Whoever can open the manager's socket may ask. Changes are for root, for the manager's own user and for members of the
administrators' group; sessions of nodes for root and the manager's own user, since a node is as good as root on the
path of packets.

Tested in tests/unit/cpm/api/test_access.py.
"""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
import socket
import struct
from typing import Final, Protocol

from cpm.protocol.errors import ConfigError, Forbidden

_PEER_GROUPS: Final = 59
"""SO_PEERGROUPS of asm-generic/socket.h; Python has no name for it."""
_MOST_GROUPS: Final = 256
"""As many as fit what Python reads of a socket's option."""


class Socket(Protocol):
    """A connected socket."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """Return an option's value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a unix socket, as it was when it connected."""

    pid: int
    uid: int
    groups: frozenset[int]
    """Its group and its supplementary groups; without these when there are more than 256."""

    @classmethod
    def of(cls, connection: Socket) -> Peer:
        """
        Return the process that connected.

        :raise OSError: When this is no unix socket.
        """
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, uid, gid = struct.unpack("3i", credentials)
        try:
            others = connection.getsockopt(socket.SOL_SOCKET, _PEER_GROUPS, 4 * _MOST_GROUPS)
        except OSError:
            others = b""
        return cls(pid, uid, frozenset({gid, *(number for (number,) in struct.iter_unpack("I", others))}))

    @property
    def user(self) -> str:
        """The name of its user; its number where it has none. May ask a directory service, and wait for it."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """
    The rules of a socket.

    :param admin_group: Number of the group whose members may change something, too; None: there is none.
    :param is_read_only: Nobody may change anything, nor be a node.
    """

    admin_group: int | None = None
    is_read_only: bool = False

    def check_change(self, peer: Peer) -> None:
        """
        Check that a process may change something.

        :raise Forbidden: When it may not.
        """
        if self.is_read_only:
            raise Forbidden("this socket answers questions only; use the one in [listen] socket of cpmd.toml")
        if not self._is_trusted(peer) and self.admin_group not in peer.groups:
            raise Forbidden(
                f"user {peer.uid} may ask, but not change anything; run this as root, or as a member of the group in "
                "[listen] admin_group of cpmd.toml"
            )

    def check_node(self, peer: Peer) -> None:
        """
        Check that a process may be a node.

        :raise Forbidden: When it may not.
        """
        if self.is_read_only or not self._is_trusted(peer):
            raise Forbidden(f"user {peer.uid} cannot be a node on this socket; natd runs as root")

    @staticmethod
    def _is_trusted(peer: Peer) -> bool:
        return peer.uid in (0, os.geteuid())


def group_number(file: str, name: str) -> int | None:
    """
    Return the number of the administrators' group; None: no name is set.

    :param file: Path of the configuration file.
    :raise ConfigError: When there is no such group.
    """
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        remedy = f"there is no group {name!r}; create it or name another"
        raise ConfigError(file, "listen.admin_group", remedy) from None
