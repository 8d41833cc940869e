"""How many FUSE requests something takes, counted exactly.

Every read(2) of the device that returns is one request (the kernel gives no two at once), and its
first bytes are struct fuse_in_header of linux/fuse.h: the length, then the opcode.  strace(1) shows
them; it slows the daemon down, so nothing is timed meanwhile.
"""

from __future__ import annotations

import collections
import contextlib
import re
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator

from measure import WAIT_S, read, wait_until

# enum fuse_opcode of linux/fuse.h
OPCODES = {
    1: "LOOKUP", 2: "FORGET", 3: "GETATTR", 4: "SETATTR", 5: "READLINK", 6: "SYMLINK", 8: "MKNOD",
    9: "MKDIR", 10: "UNLINK", 11: "RMDIR", 12: "RENAME", 13: "LINK", 14: "OPEN", 15: "READ",
    16: "WRITE", 17: "STATFS", 18: "RELEASE", 20: "FSYNC", 21: "SETXATTR", 22: "GETXATTR",
    23: "LISTXATTR", 24: "REMOVEXATTR", 25: "FLUSH", 26: "INIT", 27: "OPENDIR", 28: "READDIR",
    29: "RELEASEDIR", 30: "FSYNCDIR", 34: "ACCESS", 35: "CREATE", 36: "INTERRUPT", 40: "POLL",
    42: "BATCH_FORGET", 44: "READDIRPLUS", 45: "RENAME2", 46: "LSEEK",
}  # fmt: skip
NO_REPLY = ("FORGET", "BATCH_FORGET")
"""What nobody waits for."""

DEVICE = "/dev/fuse"
READ = re.compile(r'read(?: resumed>|\(\d+, )"((?:\\x[0-9a-f]{2}){16})"(?:\.\.\.)?, \d+\) += (\d+)')
SETTLE_S = 0.2
"""The kernel sends RELEASE and FORGET after the system call that caused them has returned."""


class Count(collections.Counter[str]):
    """Requests by opcode."""

    @property
    def waited_for(self) -> int:
        """Those that somebody waits for."""
        return sum(count for name, count in self.items() if name not in NO_REPLY)


@contextlib.contextmanager
def counting(daemon: int) -> Iterator[Count]:
    """Count the requests that a daemon is given meanwhile; complete when the block has ended."""
    found = Count()
    with tempfile.NamedTemporaryFile(prefix="nsfs-bench-strace-") as log:
        words = ["strace", "-f", "-xx", "-s", "16", "-e", "trace=read", "-P", DEVICE]
        process = subprocess.Popen(
            [*words, "-o", log.name, "-p", str(daemon)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: _traced(daemon), "strace attaches")
            time.sleep(SETTLE_S)
            yield found
            time.sleep(SETTLE_S)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        for line in read(log.name).splitlines():
            if match := READ.search(line):
                header = bytes.fromhex(match[1].replace("\\x", ""))
                length, opcode = struct.unpack_from("=II", header)
                if length != int(match[2]):
                    raise RuntimeError(f"not one request: {line}")
                found[OPCODES.get(opcode, str(opcode))] += 1


def _traced(pid: int) -> bool:
    return any(
        line.startswith("TracerPid:") and line.split()[1] != "0"
        for line in read(f"/proc/{pid}/status").splitlines()
    )
