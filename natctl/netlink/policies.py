"""Whether there are policies of IPsec. Format: linux/xfrm.h. Tested in ``tests/netns/test_fast_path.py``."""

from __future__ import annotations

import errno
import struct
from contextlib import closing
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.netlink.message import attribute_map, message, required
from natctl.netlink.socket import Socket

_XFRM: Final = 6  # NETLINK_XFRM
_GET_COUNTS: Final = 0x25  # XFRM_MSG_GETSPDINFO
_COUNTS: Final = 1  # XFRMA_SPD_INFO
_SPDINFO: Final = struct.Struct("=6I")
"""``struct xfrmu_spdinfo``: policies inwards, outwards and forwarded; and those of sockets."""
_FLAGS_BYTES: Final = 4
_MISSING: Final = frozenset({errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT})


def count_policies() -> int:
    """
    Return how many policies there are in the calling thread's namespace; 0 for a kernel that knows none.

    :raise KernelError: When the kernel refuses, or what it sends cannot be read.
    """
    action = "count the policies of IPsec"
    try:
        socket = Socket(_XFRM, action)
    except KernelError as error:
        if error.errno in _MISSING:
            return 0
        raise
    with closing(socket):
        answer = socket.ask(message(_GET_COUNTS, 0, bytes(_FLAGS_BYTES)))
    counts = required(attribute_map(answer, _FLAGS_BYTES), _COUNTS, _SPDINFO.size)
    return sum(_SPDINFO.unpack(counts)[:3])
