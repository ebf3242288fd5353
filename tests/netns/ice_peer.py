"""
One end of an ICE connection (RFC 8445), by aioice: ``python -m tests.netns.ice_peer ROLE STUN-SERVER``.

Both ends are to reach each other through their NATs only. So it tells the other end, through stdin and stdout, nothing
but the address that the STUN server saw. It then sends a line there, and prints the one that it gets.
"""

from __future__ import annotations

import asyncio
import json
import sys

import aioice

_PATIENCE_S = 60.0


async def connect(role: str, server: str) -> None:
    """Connect to the peer, and exchange a line."""
    peer = aioice.Connection(ice_controlling=role == "controlling", stun_server=(server, 3478), use_ipv6=False)
    await peer.gather_candidates()
    seen = [each.to_sdp() for each in peer.local_candidates if each.type == "srflx"]
    tell({"seen": seen, "user": peer.local_username, "password": peer.local_password})
    other = json.loads(await asyncio.to_thread(sys.stdin.readline))
    peer.remote_username, peer.remote_password = other["user"], other["password"]
    for text in other["seen"]:
        await peer.add_remote_candidate(aioice.Candidate.from_sdp(text))
    await peer.add_remote_candidate(None)
    await peer.connect()
    await peer.send(f"from {role}".encode())
    tell({"got": (await peer.recv()).decode()})
    await asyncio.to_thread(sys.stdin.readline)
    await peer.close()


def tell(what: dict[str, object]) -> None:
    """Print one line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(connect(*sys.argv[1:]), _PATIENCE_S))
