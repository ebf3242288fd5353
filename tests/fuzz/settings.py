"""TOML of both daemons."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from msgspec import structs

import cpm.settings
import natctl.settings
from cpm.install.configs import cpmd_toml
from cpm.protocol.errors import ConfigError
from natctl.ruleset.marks import Marks
from tests.fuzz.mutation import Material

_TOKENS: Final = (
    *rb"""[ ] [[ ]] [[[[ { } = . , # " ' \ \u0000 \U00110000""".split(),
    *b"true inf -nan 1e400 -0.0 0x 0x7fffffffffffffffffff 1_0".split(),
    *b"1979-05-27T07:32:00Z 07:32:00.9999999 pool timeouts host a.a.a.a. [pool.timeouts] [host.timeouts]".split(),
    *b"""["0.0.0.0/0"] "::1" udp_s= hold_down_s= period_s= mark_mask= {a=[[1]]}""".split(),
    b"\n",
    b'"""',
    b"'''",
    b"[a]\n",
)

CPMD: Final = Material(
    [
        "\n".join(line for line in cpmd_toml().splitlines() if not line.startswith("#")).encode(),
        b"""log_level = "debug"
[listen]
socket = "/run/x.sock"
address = "172.30.0.2:7414"
certificate = "/c"
key = "/k"
ca = "/a"
[pool]
block = 64
initial = 256
floor = 64
cap = 32768
weight = 100
start_reserve = 0.03
hold_down_s = 120.0
drain_limit_s = 3600
internal = "100.64.0.0/10"
pairing = "strict"
[pool.timeouts]
udp_s = 300
dns_s = 30
""",
        b"""[scaling]
policy = "occupancy"
literal = false
[scaling.guards]
floor = true
headroom_share = 0.25
exhausted_factor = 2.0
grow_cool_down_s = 5
shrink_after_samples = 10
[nodes]
edge_grace_s = 10.0
edge_wait_s = 5.0
confirm_s = 10.0
""",
    ],
    _TOKENS,
)

NATD: Final = Material(
    [
        b"""underlay_address = "172.30.0.11"
roles = ["host", "edge"]
name = "host1"
[host]
uplinks = ["eth0"]
bridges = ["br0"]
mark_mask = 0x7fff0000
exempt = ["10.0.0.0/8", "127.0.0.0/8"]
log_group = 7414
[host.timeouts]
udp_s = 300
tcp_time_wait_s = 30
[edge]
uplinks = ["eth1"]
underlay = ["eth0"]
""",
        b"""underlay_address = "172.30.0.11"
roles = ["host"]
[manager]
url = "https://172.30.0.2:7414"
certificate = "/c"
key = "/k"
ca = "/a"
[host]
uplinks = ["eth0"]
[monitor]
period_s = 1.0
ensure_s = 5
source = "psutil"
guest_period_s = 0
arrivals = false
[guests]
agent_sockets = "/run/{uuid}.sock"
agent_timeout_s = 3
""",
    ],
    _TOKENS,
)


class _File:
    """A file that is read as :class:`pathlib.Path` reads it, without a disk."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __str__(self) -> str:
        return "/etc/virt-ports/x.toml"

    def read_text(self, encoding: str) -> str:
        return self._data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def understands_cpmd(data: bytes) -> bool:
    """Load cpmd.toml."""
    loaded = _load(cpm.settings.load, data)
    if loaded is None:
        return False
    loaded.rules()
    return True


def understands_natd(data: bytes) -> bool:
    """Load natd.toml."""
    loaded = _load(natctl.settings.load, data)
    if loaded is None:
        return False
    host = loaded.kernel().host
    if host is not None:
        Marks.of_mask(host.mark_mask)
    return True


def _load(load: Callable[[Path], Any], data: bytes) -> Any:
    try:
        loaded = load(cast("Path", _File(data)))
    except ConfigError as error:
        _check_words(error)
        return None
    _check_numbers(loaded)
    return loaded


def _check_words(error: ConfigError) -> None:
    assert error.remedy
    str(error).encode()


def _check_numbers(settings: Any) -> None:
    """Assert that every number is one that can be waited for and counted with."""
    for value in structs.asdict(settings).values():
        if isinstance(value, float):
            assert math.isfinite(value), "a number that is none"
        elif hasattr(value, "__struct_fields__"):
            _check_numbers(value)
