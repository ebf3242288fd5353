"""
Programs that chaos runs on the machines of a lab: standard library only, each a single file, started by its path.

Each appends one JSON object a line to the file in its first argument; times are CLOCK_MONOTONIC, the same everywhere
on this machine. Who sends is known by where to: guest N of a run talks to port ``9000 + N`` only, whatever source it
claims.
"""
