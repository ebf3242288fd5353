"""
Compares policies on recorded and generated loads, replayed in virtual time. Pure.

``virt-ports simulate`` and the density figures of the benchmark use it. The services do not.
"""

from cpm.simulation.compare import Contender, Result, compete, contender, contenders
from cpm.simulation.dice import Dice
from cpm.simulation.generate import KINDS, generate
from cpm.simulation.picture import draw
from cpm.simulation.recording import Recorder, Sample
from cpm.simulation.replay import Conditions, Outcome, Point, Replay
from cpm.simulation.trace import Line, Trace, head, read, row, trace_lines

__all__ = [
    "KINDS",
    "Conditions",
    "Contender",
    "Dice",
    "Line",
    "Outcome",
    "Point",
    "Recorder",
    "Replay",
    "Result",
    "Sample",
    "Trace",
    "compete",
    "contender",
    "contenders",
    "draw",
    "generate",
    "head",
    "read",
    "row",
    "trace_lines",
]
