"""What follows a tensor's bytes in its record and depends on them: checksums. Without torch.

The process that writes files has no torch. What torch writes behind the bytes is the same for all tensors of a type
and shape, but for the CRC-32 of the bytes, in two places, and for the archive's identification, which torch makes from
the CRCs of all entries, with a CRC of its own, again in two places.

The way in which torch mixes CRCs is that of `c10::hash_combine`, in `PyTorchStreamWriter::writeRecord`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

DIGITS = 20
"""Of each of the two numbers in the identification: that of the entries' names comes first."""

_CRC = struct.Struct("<I")
_64_BITS = (1 << 64) - 1
SPOTS = struct.Struct("<QI5H")
"""A `Spots` in bytes."""


class Spots(NamedTuple):
    """Where in a record's tail lies what depends on the tensor's bytes. Places are bytes from its beginning."""

    seed: int
    """The CRCs of the entries before the tensor, mixed."""
    following: int
    """The CRC of the entry after it."""
    crc: int
    crc_in_directory: int
    identification: int
    """The second number of it."""
    identification_crc: int
    identification_crc_in_directory: int

    @property
    def length(self) -> int:
        """Bytes of a tail that holds all of them, at least."""
        crcs = (self.crc, self.crc_in_directory, self.identification_crc, self.identification_crc_in_directory)
        return max(self.identification + DIGITS, max(crcs) + _CRC.size)


def mixed(seed: int, crc: int) -> int:
    """CRCs mixed so far, and another one."""
    return seed ^ ((crc + 0x9E3779B9 + (seed << 6 & _64_BITS) + (seed >> 2)) & _64_BITS)


def complete(memory: memoryview | bytearray, at: int, crc: int, spots: Spots) -> None:
    """Put a CRC, and what follows from it, into a tail.

    Args:
        memory: holds the tail.
        at: where it begins there.
        crc: of the tensor's bytes.
        spots: where things lie in it.
    """
    number = at + spots.identification
    memory[number : number + DIGITS] = b"%020d" % mixed(mixed(spots.seed, crc), spots.following)
    own = crc32(memory[number - DIGITS : number + DIGITS])
    _CRC.pack_into(memory, at + spots.crc, crc)
    _CRC.pack_into(memory, at + spots.crc_in_directory, crc)
    _CRC.pack_into(memory, at + spots.identification_crc, own)
    _CRC.pack_into(memory, at + spots.identification_crc_in_directory, own)
