"""
Types of numbers and texts with their bounds (:mod:`cpm.protocol.bounds`), for the fields of messages and requests.

``tests/unit/cpm/protocol/test_bounds.py`` refuses a field without.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cpm.protocol.bounds import (
    MAX_CONNECTIONS,
    MAX_COUNT,
    MAX_GENERATION,
    MAX_MAPPING_S,
    MAX_NAME,
    MAX_RATE,
    MAX_SECONDS,
    MAX_SENTENCE,
    MAX_UTC,
    MAX_WISHED,
    MAX_WORD,
)

Word = Annotated[str, Meta(max_length=MAX_WORD)]
Name = Annotated[str, Meta(max_length=MAX_NAME)]
Sentence = Annotated[str, Meta(max_length=MAX_SENTENCE)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Generation = Annotated[int, Meta(ge=0, le=MAX_GENERATION)]
Connections = Annotated[int, Meta(ge=0, le=MAX_CONNECTIONS)]
PortCount = Annotated[int, Meta(ge=0, le=65_536)]
Port = Annotated[int, Meta(ge=0, le=65_535)]
WishedNumber = Annotated[int, Meta(ge=0, le=MAX_WISHED)]
Rate = Annotated[float, Meta(ge=0, le=MAX_RATE)]
Duration = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
MappingSeconds = Annotated[int, Meta(ge=1, le=MAX_MAPPING_S)]
Moment = Annotated[float, Meta(ge=0, le=MAX_UTC)]
"""UTC seconds."""
