"""Options of nsfs(8), on a machine of one's own: /run and /sys as after booting."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, NSFS, Instance

BEGIN = """
set -e
mount -t tmpfs -o mode=755 none /run
while mountpoint -q /sys/namespaces; do umount -l /sys/namespaces; done
before=$(cat /proc/self/mountinfo)
"""


def on_a_host(directory: Path, script: str) -> str:
    """Run a shell script, for which `nsfs mount` takes a cgroup of its own; what it prints."""
    group = f"nsfs-test-{os.getpid()}-commands"
    function = f"""
    nsfs() {{
        name=$1; shift
        [ $name != mount ] || set -- --cgroup {group} "$@"
        {shlex.join(NSFS)} $name "$@"
    }}
    """
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", function + BEGIN + script],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["--no-graft", "--config off.conf", "--config graft.conf"])
def test_where_the_tree_is_served(how: str, tmp_path: Path) -> None:
    """Without the graft nothing of /sys changes, and all commands find the tree all the same."""
    (tmp_path / "off.conf").write_text("[mount]\ngraft = off\n")
    (tmp_path / "graft.conf").write_text("[log]\nbytes = 8K\n")
    out = on_a_host(
        tmp_path,
        f"""
        nsfs mount {how}
        tree=$(nsfs status | sed -n 's/^dir //p')
        echo $tree
        stat -fc %T /sys
        echo "$before" | diff - /proc/self/mountinfo | grep -c ' /sys' || :
        mkdir $tree/web
        head -n 1 $tree/web/nsfs.log
        nsfs log | grep -o 'serves .*'
        nsfs umount --kill
        echo "$before" | diff - /proc/self/mountinfo && echo as before
        """,
    )
    grafted = how == "--config graft.conf"
    directory = "/sys/namespaces" if grafted else "/run/nsfs/tree"
    lines = out.splitlines()
    assert lines[0] == directory
    assert lines[1] == ("tmpfs" if grafted else "sysfs")
    assert (int(lines[2]) > 0) == grafted
    assert lines[3:] == [
        "bytes 8192" if grafted else "bytes 262144",
        f"serves {directory}",
        "as before",
    ]


def test_a_configuration_that_is_wrong(instance: Instance, tmp_path: Path) -> None:
    """Every error is told, with file, line and key, and nothing is mounted."""
    file = tmp_path / "wrong.conf"
    file.write_text("[log]\nbytes = 1\ncolour = red\n[nothing]\n")
    (tmp_path / "tree").mkdir()
    options = ["--run-dir", str(tmp_path / "run"), "--cgroup", f"{instance.group}-wrong"]
    done = instance.command(
        "mount", *options, "--config", str(file), str(tmp_path / "tree"), check=False
    )
    assert done.returncode == 1
    for line, word in ((2, "bytes"), (3, "colour"), (4, "nothing")):
        assert any(f"{file}:{line}:" in x and word in x for x in done.stderr.splitlines()), done
    assert not os.path.ismount(tmp_path / "tree")
    done = instance.command(
        "mount", *options, "--config", str(tmp_path / "none"), str(tmp_path / "tree"), check=False
    )
    assert done.returncode == 1
    assert "No such file" in done.stderr


def test_log(instance: Instance, tmp_path: Path) -> None:
    assert instance.command("log", str(instance.tree)).stdout == instance.log()
    done = instance.command("log", str(tmp_path), check=False)
    message = f"nsfs: no tree is served at {tmp_path}: nsfs mount serves one\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
