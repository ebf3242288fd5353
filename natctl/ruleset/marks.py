"""
The packet mark: which of its bits are ours, and the VM that they name.

Tested by ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_HIGHEST_ZONE: Final = 0xFFFF


class Marks(NamedTuple):
    """
    How a packet mark tells the VM: the highest bit of the mask says that there is one, the other bits are its index.

    :raise ValueError: By :meth:`of_mask`, when the bits are not contiguous or fewer than 4.
    """

    mask: int
    flag: int
    shift: int

    @classmethod
    def of_mask(cls, mask: int) -> Marks:
        """Read the settings' mask."""
        shift = max(0, (mask & -mask).bit_length() - 1)
        bits = (mask >> shift).bit_length()
        if not 0 < mask <= 0xFFFFFFFF or mask >> shift != (1 << bits) - 1 or bits < 4:
            raise ValueError(f"not a mark mask: {mask:#x}; use at least 4 bits side by side, for example 0x7fff0000")
        return cls(mask, 1 << (shift + bits - 1), shift)

    @property
    def highest_index(self) -> int:
        """The largest index that fits; a conntrack zone, which an index is too, has 16 bits."""
        return min((self.mask ^ self.flag) >> self.shift, _HIGHEST_ZONE)

    def of(self, index: int) -> int:
        """
        Return the mark, within the mask, of the VM with that index.

        :raise ValueError: When the index does not fit.
        """
        if not 1 <= index <= self.highest_index:
            raise ValueError(f"index {index} does not fit the mark mask {self.mask:#x}; widen host.mark_mask")
        return self.flag | index << self.shift

    def index_in(self, mark: int) -> int:
        """Return the index that the mark carries."""
        return (mark & self.mask ^ self.flag) >> self.shift
