"""
A program for guests: long-lived TCP connections that say something all the time and must hear it back.

``echo_client.py ADDRESS PORT N SECONDS`` opens N connections to an echo server that greets with one line, prints
``open`` and goes on until SIGTERM: on every connection a numbered line, its echo, and after some seconds the next one,
six times at least, however soon the signal comes.
Its last line is JSON: ``connections``, ``broken`` (why, for each that ended or stayed silent for 15 s),
``least_rounds`` and ``ports`` (source ports as the server sees them). Standard library only.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys

SILENCE_S = 15.0
LEAST_ROUNDS = 6


class Client:
    """All connections of one run."""

    def __init__(self, address: str, port: int, period_s: float) -> None:
        self._address = address
        self._port = port
        self._period_s = period_s
        self._stopping = asyncio.Event()
        self.rounds: list[int] = []
        self.ports: list[int] = []
        self.broken: list[str] = []

    async def run(self, count: int) -> None:
        """Hold the connections until told to stop."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopping.set)
        streams = [await asyncio.open_connection(self._address, self._port) for _ in range(count)]
        for reader, _ in streams:
            self.ports.append(int((await reader.readline()).split()[1]))
        self.rounds = [0] * count
        print("open", flush=True)
        await asyncio.gather(*(self._talk(number, *stream) for number, stream in enumerate(streams)))

    async def _talk(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not self._stopping.is_set() or self.rounds[number] < LEAST_ROUNDS:
                line = f"{number} {self.rounds[number]}\n".encode()
                writer.write(line)
                heard = await asyncio.wait_for(reader.readline(), SILENCE_S)
                if heard != line:
                    raise ConnectionError(f"said {line!r}, heard {heard!r}")
                self.rounds[number] += 1
                await asyncio.sleep(self._period_s)
        except (OSError, TimeoutError) as error:
            self.broken.append(f"port {self.ports[number]}: {type(error).__name__} {error}")


def main() -> None:
    """Run, and say how it went."""
    client = Client(sys.argv[1], int(sys.argv[2]), float(sys.argv[4]))
    asyncio.run(client.run(int(sys.argv[3])))
    result = {
        "connections": len(client.rounds),
        "broken": client.broken,
        "least_rounds": min(client.rounds),
        "ports": client.ports,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
