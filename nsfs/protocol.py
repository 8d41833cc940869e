"""What the messages to the spawner and to inits (csrc/protocol.h) have in common."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence

STEPS = (
    "",
    "bad request",
    "out of memory or descriptors",
    "clone: a limit of processes, namespaces or the cgroup",
    "joining the parent's namespaces",
    "the parent's user namespace does not map the owner",
    "writing the ID maps",
    "joining the cgroups",
    "the root filesystem's tree",
    "idmapping the root filesystem",
    "the files of the mount",
    "mounting /proc, /sys, /dev and private directories",
    "binds",
    "pivot_root",
    "becoming root inside",
    "setting the hostname",
    "the network namespace",
    "exec",
    "the deadline",
    "it was killed",
    "no such process",
    "the path",
    "the output file",
    "standard descriptors",
    "the working directory",
    "the terminal",
    "the clocks",
    "the seccomp filter",
    "the path leads somewhere else for whoever wrote it",
)
"""Words for enum step."""


def failure(number: int, step: int) -> OSError:
    """The error of a reply: the negative errno and the step at which it came."""
    words = STEPS[step] if step < len(STEPS) else f"step {step}"
    return OSError(-number, f"{words}: {os.strerror(-number)}")


def rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """Ancillary data for sendmsg(2) that passes descriptors (unix(7))."""
    if not fds:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
