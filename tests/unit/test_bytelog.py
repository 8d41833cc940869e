"""The bounded log of output."""

from hypothesis import given
from hypothesis import strategies as st

from nsfs.bytelog import ByteLog

SIZE = 16 + 20


@given(st.lists(st.binary(max_size=50)))
def test_the_newest_bytes_are_kept_and_the_next_daemon_finds_them(pieces: list[bytes]) -> None:
    buffer = bytearray(SIZE)
    for now, piece in enumerate(pieces, 1):
        ByteLog(memoryview(buffer)).write(piece, now)
    whole = b"".join(pieces)
    log = ByteLog(memoryview(buffer))
    assert log.end == len(whole)
    start, data = log.read(0, 1000)
    assert start == max(0, len(whole) - 20)
    assert data == whole[start:]
    assert log.mtime_ns == len(pieces)


@given(st.binary(max_size=60), st.integers(0, 70), st.integers(0, 30))
def test_a_read_anywhere(data: bytes, position: int, size: int) -> None:
    log = ByteLog(memoryview(bytearray(SIZE)))
    log.write(data, 1)
    found, got = log.read(position, size)
    assert found == max(position, log.start)
    assert got == data[found : found + size]
