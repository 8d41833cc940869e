"""`ln procs/self C/procs/`: an ln(1) becomes the user's shell in the container."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC
from tests.programs import program

from .conftest import SLOWNESS, Container, session, wait_until
from .terminal import terminal

DEADLINE_S = 20.0 * SLOWNESS
LNS = ("ln", "busybox ln", "toybox ln")
ENTER = str(LIBEXEC / "nsfs-enter")


def link(
    tree: Path, container: Container, text: str, ln: str = "ln", name: str = "", **options: object
) -> subprocess.CompletedProcess[str]:
    """Run a script by the ln session."""
    program(ln.split()[0])
    return subprocess.run(
        [*ln.split(), str(tree / "procs/self"), f"{container.path}/procs/{name}"],
        input=text,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("ln", [*LNS, "coreutils ln"])
def test_a_session_without_a_terminal(tree: Path, web: Container, ln: str) -> None:
    done = link(tree, web, "hostname; id -u; seq 1 50000; echo error >&2; exit 33\n", ln)
    assert done.returncode == 33
    assert done.stderr == "error\n"
    assert done.stdout == "web\n0\n" + "".join(f"{n}\n" for n in range(1, 50001))


def test_a_program_called_otherwise_is_recognised_by_its_file(
    tree: Path, web: Container, tmp_path: Path
) -> None:
    shutil.copy("/usr/bin/ln", tmp_path / "gln")
    assert link(tree, web, "exit 3", str(tmp_path / "gln")).returncode == 3
    os.symlink(program("busybox"), tmp_path / "ln")
    assert link(tree, web, "exit 4", str(tmp_path / "ln")).returncode == 4
    # A copy by another name is no ln: it is moved in place, which is refused.
    shutil.copy("/usr/bin/ln", tmp_path / "other")
    assert "not permitted" in link(tree, web, "", str(tmp_path / "other")).stderr


MULTI_CALL = """
#include <stdio.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    if (link(argv[argc - 2], argv[argc - 1]))
        perror(argv[0]);
    return 1;
}
"""
"""What no program of Debian's does: it takes whatever comes before its last two arguments."""


def test_a_program_of_many_names_is_an_ln_as_which_it_was_started(
    tree: Path, web: Container, tmp_path: Path
) -> None:
    (tmp_path / "coreutils.c").write_text(MULTI_CALL)
    for name in ("coreutils", "coreutils-9.5", "busybox.static", "coreutilsx", "mycoreutils"):
        command = ["gcc", "-o", str(tmp_path / name), str(tmp_path / "coreutils.c")]
        if name == "coreutils":
            subprocess.run(command, check=True)
        else:
            os.link(tmp_path / "coreutils", tmp_path / name)

    def enters(name: str, argv: list[str]) -> bool:
        done = subprocess.run(
            [*argv, str(tree / "procs/self"), f"{web.path}/procs/self"],
            executable=tmp_path / name,
            env={**os.environ, "SHELL": "/bin/sh"},
            input="exit 33\n",
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert (done.returncode == 33) != ("not permitted" in done.stderr), done
        return done.returncode == 33

    for argv in (
        ["ln"],
        ["/usr/bin/ln", "-v"],
        ["coreutils", "ln"],
        ["/usr/bin/coreutils", "--coreutils-prog=ln"],
        ["coreutils-9.5", "ln", "-f"],
    ):
        for name in ("coreutils", "coreutils-9.5", "busybox.static"):
            assert enters(name, argv), (name, argv)
        for name in ("coreutilsx", "mycoreutils"):
            assert not enters(name, argv), (name, argv)
    for argv in (
        ["coreutils", "cp", "ln"],
        ["cp", "ln"],
        ["coreutils", "--coreutils-prog=cp"],
        ["coreutils"],
        ["other", "--coreutils-prog=ln"],
    ):
        assert not enters("coreutils", argv), argv
    # GNU's as it is installed with --enable-single-binary=shebangs: its name (comm) is the script's.
    script = tmp_path / "ln"
    script.write_text(f"#!{tmp_path}/coreutils --coreutils-prog-shebang=ln\n")
    script.chmod(0o755)
    assert link(tree, web, "exit 5", str(script), "self").returncode == 5


@pytest.mark.parametrize("shell", ["bash --norc --noprofile", "dash", "busybox sh", "zsh -f"])
@pytest.mark.parametrize("ln", LNS)
def test_a_session_on_a_terminal(tree: Path, web: Container, ln: str, shell: str) -> None:
    env = {"SHELL": "/bin/sh", "ENV": ""}
    with terminal(*shell.split(), env=env) as outer:
        outer.expect("ready> ")
        time.sleep(0.2)
        outer.run(f"{ln} {tree}/procs/self {web.path}/procs/", "# ")
        outer.run("hostname; tty", r"web\r\n/dev/pts/0\r\n")
        outer.expect("# ")
        outer.run("echo sle''eping; sleep 1000", "sleeping")
        wait_until(lambda: web.runs("sleep"), "it sleeps")
        outer.send("\x03")
        outer.expect("# ")
        outer.run("echo al''ive", "alive")
        outer.expect("# ")
        outer.run("exit 33", "ready> ")
        time.sleep(0.2)
        outer.run("echo code=$?", "code=33")


def test_nothing_of_the_host_gets_in(tree: Path, web: Container) -> None:
    with open("/etc/shadow") as secret:
        os.set_inheritable(secret.fileno(), True)
        done = link(
            tree,
            web,
            "ls /proc/self/fd | tr '\\n' ' '; env; tail -n1 /proc/self/cgroup;"
            "readlink /proc/$$/exe",
            env={"PATH": os.environ["PATH"], "SECRET": "x", "SHELL": "/bin/sh"},
            pass_fds=[secret.fileno()],
        )
    assert done.stdout.startswith("0 1 2 3 ")
    assert "SECRET" not in done.stdout
    assert "0::/\n" in done.stdout
    assert "memfd" not in done.stdout


def test_the_program_is_sealed(tree: Path, web: Container) -> None:
    with subprocess.Popen(
        ["ln", str(tree / "procs/self"), f"{web.path}/procs/"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("echo ready\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        assert "memfd:nsfs-enter" in os.readlink(f"/proc/{process.pid}/exe")
        with pytest.raises(OSError, match=r"(?i)busy|permitted"):
            os.write(os.open(f"/proc/{process.pid}/exe", os.O_WRONLY), b"x")
        fds = [
            os.readlink(f"/proc/{process.pid}/fd/{n}")
            for n in os.listdir(f"/proc/{process.pid}/fd")
        ]
        assert not [fd for fd in fds if "memfd" in fd]
        process.stdin.write("exit 6\n")
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 6


def test_one_that_cannot_become_a_session_is_an_ln(tree: Path, web: Container) -> None:
    """It goes on as an ln whose link(2) has failed; if its shell has begun, that finds its input
    ended, and nobody to hear it."""
    web.run(
        "printf '#!/bin/sh\\ntouch /run/begun; cat; exec cat /proc/self/status' > /run/shell;"
        "chmod 755 /run/shell"
    )
    # It needs two descriptors more.
    limits = f"ulimit -n 4; exec ln {tree}/procs/self {web.path}/procs/"
    for _ in range(5):
        done = subprocess.run(
            ["sh", "-c", limits], input="", capture_output=True, text=True,
            env={**os.environ, "SHELL": "/run/shell"}, timeout=DEADLINE_S,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert "Too many open files" in done.stderr
    wait_until(lambda: web.state()["procs"] == "0", "it has ended")
    assert link(tree, web, "exit 3").returncode == 3


def test_in_part(tree: Path, web: Container) -> None:
    script = (
        "readlink /proc/self/ns/net /proc/self/ns/uts; ls /sys/class/net; echo $SECRET; exit 5\n"
    )
    done = link(tree, web, script, name="self:net", env={**os.environ, "SECRET": "mine"})
    assert done.returncode == 5, done
    net, uts, *rest = done.stdout.split()
    assert net == os.readlink(f"/proc/{web.init}/ns/net")
    assert uts == os.readlink("/proc/self/ns/uts")
    # It is the user's own process, with his environment; but /sys is that of the namespace.
    assert rest == ["lo", "mine"]
    wait_until(lambda: web.state()["procs"] == "0", "it has ended")


def test_in_part_it_has_all_but_descriptors(tree: Path, web: Container, tmp_path: Path) -> None:
    script = (
        "ls /proc/self/fd | tr '\\n' ' '; pwd -P; umask; id -u; for n in net uts ipc user mnt; do "
        "readlink /proc/self/ns/$n; done\n"
    )
    with open("/etc/shadow") as secret:
        os.set_inheritable(secret.fileno(), True)
        done = link(
            tree, web, script, name="self:uts,ipc", pass_fds=[secret.fileno()], cwd=tmp_path,
            umask=0o027,
        )  # fmt: skip
    fds, *rest = done.stdout.split("/", 1)
    assert fds.split() == ["0", "1", "2", "3"]
    lines = f"/{rest[0]}".splitlines()
    assert lines[:3] == [str(tmp_path), "0027", "0"]
    pids = {"net": "self", "uts": web.init, "ipc": web.init, "user": "self", "mnt": "self"}
    assert lines[3:] == [os.readlink(f"/proc/{pid}/ns/{kind}") for kind, pid in pids.items()]


def test_in_part_it_is_listed_counted_and_killed(tree: Path, web: Container) -> None:
    with session(web, "--only", "net,uts") as process:
        # The shell, and in a moment what it executes.
        wait_until(lambda: len(os.listdir(web / "procs")) == 2, "it sleeps")
        names = os.listdir(web / "procs")
        assert all(name.endswith(":net,uts") for name in names)
        assert web.state()["procs"] == "2"
        assert all(name.split(":")[0] in os.listdir(tree / "procs") for name in names)
        subprocess.run(["rm", "-rf", str(web.path)], check=True)
        assert process.wait(DEADLINE_S) == 137


def test_part_of_a_user_namespace_needs_its_mounts(tree: Path, web: Container) -> None:
    assert link(tree, web, "", name="self:user,net").returncode == 1
    done = link(
        tree,
        web,
        "id -u; echo $SECRET\n",
        name="self:user,mnt,pid,net,ipc,uts",
        env={**os.environ, "SECRET": "x"},
    )
    assert done.stdout == "0\n\n", done


def test_what_cannot_be_linked(tree: Path, web: Container) -> None:
    assert "exist" in link(tree, Container(tree), "").stderr
    assert "Invalid" in link(tree, web, "", name="self:nets").stderr
    assert "Invalid" in link(tree, web, "", name="other").stderr
    done = subprocess.run(
        ["ln", str(tree / "state"), str(web / "procs/")], capture_output=True, text=True
    )
    assert "not permitted" in done.stderr
    web.write("freeze", "1")
    assert "busy" in link(tree, web, "").stderr
    web.write("freeze", "0")


# --- as another user ---

BECOME = {
    "sudo": "sudo -n SHELL=/bin/sh {}",
    "sudo -u nobody": "sudo -n -u nobody SHELL=/bin/sh {}",
    "su": "su root -c '{}'",
    "su nobody": "su nobody -s /bin/sh -c '{}'",
}
WAYS = ("ln {tree}/procs/self {tree}/{name}/procs/", ENTER + " {tree}/{name}")


@pytest.fixture
def everybodys(tree: Path, web: Container) -> Iterator[Path]:
    """The tree, in which root has the container `web`, and nobody one called `mine`."""
    tree.chmod(0o777)
    user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    subprocess.run([*user, "mkdir", str(tree / "mine")], check=True)
    tree.chmod(0o755)
    yield tree
    wait_until(lambda: Container(tree / "mine").state()["procs"] == "0", "nobody is in it")


def line_of(how: str, way: str, tree: Path) -> tuple[str, str]:
    """What is typed, and the hostname to be found."""
    name = "mine" if "nobody" in how else "web"
    return BECOME[how].format(way.format(tree=tree, name=name)), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", BECOME)
def test_under_sudo_and_su(everybodys: Path, how: str, way: str) -> None:
    line, name = line_of(how, way, everybodys)
    done = subprocess.run(
        ["sh", "-c", line],
        input="hostname; id -u; echo error >&2; exit 33\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (33, f"{name}\n0\n"), done
    # Or with what these two have to say besides.
    assert "error\n" in done.stderr


@pytest.mark.parametrize("shell", ["bash --norc --noprofile", "dash", "busybox sh", "zsh -f"])
@pytest.mark.parametrize("how", BECOME)
def test_on_a_terminal_under_sudo_and_su(everybodys: Path, how: str, shell: str) -> None:
    line, name = line_of(how, WAYS[0], everybodys)
    with terminal(*shell.split(), env={"SHELL": "/bin/sh", "ENV": ""}) as outer:
        outer.expect("ready> ")
        before = outer.mode()
        outer.run(line, "# ")
        outer.run("hostname; tty", rf"{name}\r\n/dev/pts/0\r\n")
        outer.expect("# ")
        outer.run("echo sle''eping; sleep 1000", "sleeping")
        wait_until(lambda: Container(everybodys / name).runs("sleep"), "it sleeps")
        outer.send("\x03")
        outer.expect("# ")
        outer.run("echo al''ive", "alive")
        outer.expect("# ")
        outer.run("exit 33", "ready> ")
        outer.run("echo code=$?", "code=33")
        if "zsh" not in shell:  # which edits its lines in a mode of its own
            wait_until(lambda: outer.mode() == before, "the terminal is as it was")


@pytest.mark.parametrize("shell", ["bash --norc --noprofile", "dash", "busybox sh", "zsh -f"])
def test_from_a_script_of_each_shell(tree: Path, web: Container, shell: str) -> None:
    text = f"echo 'hostname; exit 5' | ln {tree}/procs/self {web.path}/procs/; echo $?"
    done = subprocess.run(
        [*shell.split(), "-c", text],
        env={**os.environ, "SHELL": "/bin/sh"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.stdout, done.stderr) == ("web\n5\n", "")


def test_not_into_anothers(everybodys: Path) -> None:
    for way in WAYS:
        line = BECOME["sudo -u nobody"].format(way.format(tree=everybodys, name="web"))
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
        assert done.returncode in (1, 125)
        assert "denied" in done.stderr


def test_inside_for_a_nested_container(tree: Path, web: Container) -> None:
    text = (
        "mkdir /sys/namespaces/in; cd /sys/namespaces; "
        "echo 'hostname; id -u; exit 7' | SHELL=/bin/sh ln procs/self in/procs/; echo $?"
    )
    assert web.run(text) == "in\n0\n7\n"


# --- jobs by name ---


def test_jobs_by_name(tree: Path, web: Container) -> None:
    other = Container(tree / "other")
    other.path.mkdir()
    # A multi-process job in each, called the same.
    job = (
        "for n in 1 2 3; do sh -c 'trap \"exit 0\" TERM; while :; do sleep 0.05; done' & done; wait"
    )
    for each in (web, other):
        (each / "calculate_pi").mkdir()
        Container(each / "calculate_pi").start("sh", "-c", job)
    jobs = [Container(each / "calculate_pi") for each in (web, other)]
    for each in jobs:
        wait_until(lambda each=each: int(each.state()["procs"]) >= 4, "it runs")
    # By its relative name inside, by its absolute one outside.
    assert "calculate_pi" in web.run("ls /sys/namespaces").split()
    assert os.path.isdir(tree / "web/calculate_pi")
    inside = web.run("ls /sys/namespaces/calculate_pi/procs").split()
    assert len(inside) >= 4
    jobs[0].write("freeze", "1")
    wait_until(lambda: jobs[0].state()["frozen"] == "1", "frozen")
    assert jobs[1].state()["frozen"] == "0"
    assert web.state()["frozen"] == "0"
    jobs[0].write("freeze", "0")
    web.run("echo TERM > /sys/namespaces/calculate_pi/kill")
    wait_until(lambda: jobs[0].state()["procs"] == "0", "it has ended")
    assert int(jobs[1].state()["procs"]) >= 4
    jobs[1].write("kill", "1")
    wait_until(lambda: jobs[1].state()["procs"] == "0", "it is dead")
