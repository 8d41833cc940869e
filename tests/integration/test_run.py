"""`nsfs enter` and `nsfs run` as commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from .conftest import NSFS, SLOWNESS, Container, wait_until
from .terminal import terminal

DEADLINE_S = 20.0 * SLOWNESS


def nsfs(*args: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run nsfs(8)."""
    return subprocess.run(
        [*NSFS, *args], input=text, capture_output=True, text=True, timeout=DEADLINE_S
    )


def test_enter_is_the_session_program(web: Container) -> None:
    done = nsfs("enter", str(web.path), "--", "sh", "-c", "cat; exit 3", text="word")
    assert (done.returncode, done.stdout) == (3, "word")
    assert nsfs("enter").returncode == 125
    assert nsfs("enter", "--nonsense", str(web.path)).returncode == 125


def test_run_makes_runs_and_removes(tree: Path) -> None:
    path = tree / "job"
    done = nsfs("run", str(path), "--", "sh", "-c", "hostname; cat; exit 33", text="word")
    assert (done.returncode, done.stdout) == (33, "job\nword"), done
    assert not path.exists()
    assert nsfs("run", str(path), "--", "no-such-program").returncode == 127
    assert nsfs("run", str(path), "--", "/etc/passwd").returncode == 126
    assert not path.exists()


def test_the_command_needs_no_dashes(tree: Path, web: Container) -> None:
    """As with env(1); what looks like an option of ours behind the container is the command's."""
    say = ("sh", "-c", 'echo "$@"', "sh")
    for words in (("enter", str(web.path)), ("run", str(tree / "job"))):
        for command in (("--", *say, "--keep", "--", "x"), (*say, "--keep", "--", "x")):
            done = nsfs(*words, *command)
            assert (done.returncode, done.stdout) == (0, "--keep -- x\n"), done
        done = nsfs(*words, "--keep", "--", "true")
        assert done.returncode == 125
        assert "--keep: options come before the container\n" in done.stderr
    assert not (tree / "job").exists()
    assert nsfs("enter", str(web.path), text="exit 7").returncode == 7


def test_nobody_enters_the_root_container(tree: Path) -> None:
    for name in (str(tree), f"{tree}/."):
        done = nsfs("enter", name, "--", "true")
        message = f"nsfs: {name}: everybody is in the root container already\n"
        assert (done.returncode, done.stderr) == (125, message)


@pytest.mark.parametrize("command", ["status", "log"])
def test_a_reader_that_has_had_enough(tree: Path, command: str) -> None:
    """SIGPIPE, and not a word."""
    script = f"exec {' '.join(NSFS)} {command} {tree}"
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with open(write_fd, "wb") as pipe:
        done = subprocess.run(
            ["sh", "-c", script], stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_run_keeps_what_it_is_told_to(tree: Path) -> None:
    path = tree / "job"
    assert nsfs("run", "--keep", str(path), "--", "true").returncode == 0
    assert path.exists()
    done = nsfs("run", str(path), "--", "true")
    assert done.returncode == 125
    assert "exists" in done.stderr
    assert path.exists()
    path.rmdir()


def test_run_with_binds_and_a_root(tree: Path, tmp_path: Path) -> None:
    path = tree / "job"
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/file").write_text("content")
    done = nsfs(
        "run", "--bind", f"{tmp_path}/a b:/mnt:ro", str(path), "--", "sh", "-c",
        "cat /mnt/file; touch /mnt/x",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "content"), done
    assert nsfs("run", "--rootfs", "/no/such", str(path), "--", "true").returncode == 125
    assert not path.exists()
    assert nsfs("run", "--bind", "a:b:c:d", str(path), "--", "true").returncode == 125
    assert not path.exists()


def test_run_says_what_cannot_be_bound_before_it_makes_anything(tree: Path, tmp_path: Path) -> None:
    path = tree / "job"
    (tmp_path / "file").write_text("x")
    directory, file = f"{tmp_path}", f"{tmp_path}/file"
    for bind, words in {
        f"{directory}:/data": "--bind {}: there is no /data, and it cannot be made",
        f"{file}:/etc/no/file": "--bind {}: there is no /etc/no/file, and it cannot be made",
        "/no/such:/mnt": "--bind {}: there is no /no/such",
        f"{directory}:mnt": "--bind {}: the target is an absolute path",
        f"{directory}:/mnt/../x": "--bind {}: the target is an absolute path",
        f"{directory}:": "--bind {}: SOURCE[:TARGET",
    }.items():
        # With one that is there already: had it tried to make it, it would say that.
        path.mkdir()
        done = nsfs("run", "--bind", bind, str(path), "--", "true")
        assert done.returncode == 125
        assert done.stderr.startswith(f"nsfs: {path}: {words.format(bind)}"), done
        path.rmdir()
    # What the daemon says is told, with the file that it is about.
    done = nsfs("run", "--bind", f"{file}:/etc", str(path), "--", "true")
    assert (done.returncode, done.stderr) == (125, f"nsfs: {path}: binds: Invalid argument\n")
    assert not path.exists()


def test_run_makes_mount_points_in_what_is_the_containers_own(tree: Path, tmp_path: Path) -> None:
    path = tree / "job"
    tmp_path.chmod(0o755)
    (tmp_path / "file").write_text("content")
    for target in ("/mnt/a/b", "/srv/x", "/run/y", "/opt", "/tmp/z"):
        done = nsfs(
            "run", "--bind", f"{tmp_path}:{target}", str(path), "--", "cat", f"{target}/file"
        )
        assert (done.returncode, done.stdout) == (0, "content"), done
    # In a root of its own, where one can be made.
    root = tmp_path / "trees/root"
    (root / "bin").mkdir(parents=True)
    root.parent.chmod(0o700)
    shutil.copy("/bin/busybox", root / "bin/cat")
    done = nsfs(
        "run", "--rootfs", str(root), "--bind", f"{tmp_path}:/data",
        str(path), "--", "cat", "/data/file",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "content"), done


def test_run_passes_signals_on(tree: Path) -> None:
    path = tree / "job"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        text = f"trap 'exit 7' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
        with subprocess.Popen(
            [*NSFS, "run", str(path), "--", "sh", "-c", text], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.wait(DEADLINE_S) == 7
        assert not path.exists()


def test_run_on_a_terminal(tree: Path) -> None:
    path = tree / "job"
    command = " ".join([*NSFS, "run", str(path), "--", "bash", "--norc"])
    with terminal("bash", "--norc", "--noprofile") as outer:
        outer.expect("ready> ")
        outer.run(command, r"bash-[0-9.]+# ")
        outer.run("tty", "/dev/pts/0")
        outer.expect(r"bash-[0-9.]+# ")
        outer.run("echo sle''eping; sleep 1000", "sleeping")
        wait_until(lambda: Container(path).runs("sleep"), "it sleeps")
        outer.send("\x03")
        outer.expect(r"bash-[0-9.]+# ")
        outer.run("echo code-$?", "code-130")
        outer.expect(r"bash-[0-9.]+# ")
        outer.run("exit 4", "ready> ")
        outer.run("echo code=$?", "code=4")
    wait_until(lambda: not path.exists(), "removed")


def test_the_command_of_run_is_killed_with_its_container(tree: Path) -> None:
    path = tree / "job"
    with subprocess.Popen([*NSFS, "run", str(path), "--", "sleep", "1000"]) as process:
        wait_until(lambda: path.exists() and "procs 1" in (path / "state").read_text(), "runs")
        os.write(fd := os.open(path / "kill", os.O_WRONLY), b"TERM\n")
        os.close(fd)
        assert process.wait(DEADLINE_S) == 143
    assert not path.exists()
