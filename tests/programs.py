"""The programs that tests run beside those of every system."""

from __future__ import annotations

import os
import shutil

import pytest

PACKAGES = {
    "busybox": "busybox-static",
    "coreutils": "rust-coreutils",
    "login": "login",
    "man": "man-db",
    "python3": "python3",
    "sshd": "openssh-server",
    # By what it depends on.
    "systemd-analyze": "systemd-container",
    "toybox": "toybox",
}
"""Which of Debian's packages has them; scripts/setup --test installs it."""


def program(name: str) -> str:
    """The path of a program; the test fails where there is none."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        pytest.fail(
            f"no {name} here: scripts/setup --test installs {PACKAGES.get(name, name)}",
            pytrace=False,
        )
    return path
