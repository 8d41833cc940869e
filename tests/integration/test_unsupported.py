"""A system that nsfs cannot work on gets one sentence that says what to do, and nothing is left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, NSFS

SYSTEMS = {
    "no root": (
        "exec setpriv --reuid=65534 --regid=65534 --clear-groups",
        "only root can mount: run it with sudo",
    ),
    "no /dev/fuse": (
        # A module that is there already cannot be loaded so that its device comes.
        "mount -t tmpfs none /dev; exec",
        "there is no /dev/fuse: load the module fuse, or use a kernel that has it",
    ),
    "no cgroup2": (
        "awk '$3 == \"cgroup2\" {print $2}' /proc/mounts | xargs -n 1 umount -l; exec",
        "no cgroup2 hierarchy is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup",
    ),
    "no namespaces of a kind": (
        'mount --bind "$EMPTY" /proc/$$/ns; exec',
        "this kernel has no cgroup namespaces: use Linux 5.14 or later",
    ),
    "no FUSE in the kernel": (
        # Of /dev/null mount(2) says what it says of a kernel without the filesystem.
        "mount --bind /dev/null /dev/fuse; exec",
        "cannot be served: the reason stands above (is there FUSE in this kernel?)",
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_sentence_and_nothing_left(system: str, tmp_path: Path) -> None:
    script, message = SYSTEMS[system]
    (tmp_path / "tree").mkdir()
    (tmp_path / "empty").mkdir()
    os.chmod(tmp_path, 0o755)
    options = ["mount", tmp_path / "tree", "--run-dir", tmp_path / "run"]
    words = [*NSFS, *options, "--cgroup", f"nsfs-test-{os.getpid()}-unsupported"]
    before = Path("/proc/self/mountinfo").read_text()
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", f'{script} "$@"', "sh", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * DEADLINE_S,
        env={**os.environ, "EMPTY": str(tmp_path / "empty")},
    )
    assert done.returncode == 1, done.stderr
    lines = [x for x in done.stderr.splitlines() if x.startswith("nsfs: ")]
    assert len(lines) == 1, done.stderr
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert Path("/proc/self/mountinfo").read_text() == before
    assert not os.listdir(tmp_path / "tree")
