"""A bounded log of plain bytes in shared memory: what the commands of `exec` print.

The buffer is a header of two 8-byte numbers (how many bytes were ever written; when, in ns since
the Epoch) and a ring. Bytes are stored before the count that makes them visible, so a writer killed
at any instruction leaves a log that its successor can go on with.  Pure: no I/O.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<QQ")


class ByteLog:
    """The log over a writable buffer of more than 16 bytes, all zero when new."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        self.size = len(buffer) - _HEADER.size

    @property
    def end(self) -> int:
        """How many bytes were ever written: the position after the newest."""
        return int(_HEADER.unpack_from(self._buffer)[0])

    @property
    def start(self) -> int:
        """The position of the oldest byte that is kept."""
        return max(0, self.end - self.size)

    @property
    def mtime_ns(self) -> int:
        """When it was last written to; 0 for never."""
        return int(_HEADER.unpack_from(self._buffer)[1])

    def write(self, data: bytes, now_ns: int) -> None:
        """Append; of more than fits, the end is kept."""
        end = self.end + len(data)
        kept = data[-self.size :]
        at = (end - len(kept)) % self.size
        first = min(len(kept), self.size - at)
        base = _HEADER.size
        self._buffer[base + at : base + at + first] = kept[:first]
        self._buffer[base : base + len(kept) - first] = kept[first:]
        _HEADER.pack_into(self._buffer, 0, end, now_ns)

    def read(self, position: int, size: int) -> tuple[int, bytes]:
        """Up to `size` bytes from a position, or from the oldest when that is newer: (position,
        bytes)."""
        position = max(position, self.start)
        count = max(0, min(size, self.end - position))
        at = position % self.size
        first = min(count, self.size - at)
        base = _HEADER.size
        data = bytes(self._buffer[base + at : base + at + first])
        return position, data + bytes(self._buffer[base : base + count - first])
