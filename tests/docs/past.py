"""``python -m tests.docs.past``: cpmd as it ran on 2026-11-23 before 06:30 UTC, in an earlier life of the machine."""

from __future__ import annotations

import sys
from typing import Final

from cpm import daemon
from cpm.protocol.walltime import UtcSeconds, WallTime
from cpm.service import clock

BEGAN: Final = UtcSeconds(1795412400.0)  # 2026-11-23T05:40:00Z

if __name__ == "__main__":
    then = clock.now()
    clock.wall = lambda: WallTime(UtcSeconds(BEGAN + clock.now() - then))
    clock.boot = lambda: "the former boot"
    sys.exit(daemon.main([]))
