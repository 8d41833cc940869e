"""`nsfs enter`: the session program, with a terminal and without."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC

from .conftest import SLOWNESS, Container, Instance, session, wait_until
from .terminal import terminal

ENTER = str(LIBEXEC / "nsfs-enter")
DEADLINE_S = 20.0 * SLOWNESS
STTY = "[\r\n][0-9a-f:]{40,}\r"


def enter(
    container: Container, *words: str, text: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a container; no word: the shell."""
    return subprocess.run(
        [ENTER, str(container.path), *(["--", *words] if words else [])],
        input=text,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=env,
    )


def script(container: Container, text: str) -> str:
    """What a script inside prints; it has to succeed."""
    done = enter(container, "sh", "-ec", text)
    assert done.returncode == 0, done
    return done.stdout


# --- exit codes ---


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("true",), 0),
        (("sh", "-c", "exit 33"), 33),
        (("sh", "-c", "kill -9 $$"), 137),
        (("sh", "-c", "kill -TERM $$"), 143),
        (("no-such-program",), 127),
        (("/no/such/program",), 127),
        (("/etc/passwd",), 126),
        (("/etc",), 126),
    ],
)
def test_the_exit_status_is_the_commands(web: Container, words: tuple[str, ...], code: int) -> None:
    done = enter(web, *words)
    assert done.returncode == code, done
    assert bool(done.stderr) == (code in (126, 127))


def test_what_nsfs_cannot_do_is_125(tree: Path, web: Container) -> None:
    assert enter(Container(tree / "nowhere"), "true").returncode == 125
    assert enter(Container(tree), "true").returncode == 125
    web.write("freeze", "1")
    done = enter(web, "true")
    assert done.returncode == 125
    assert "busy" in done.stderr
    web.write("freeze", "0")
    os.kill(web.init, signal.SIGKILL)
    wait_until(lambda: enter(web, "true").returncode == 125, "dead")
    assert subprocess.run([ENTER], capture_output=True).returncode == 125


# --- without a terminal ---


def test_output_is_captured_whole(web: Container) -> None:
    done = enter(web, "sh", "-c", "seq 1 200000; echo error >&2")
    assert done.stdout == "".join(f"{n}\n" for n in range(1, 200001))
    assert done.stderr == "error\n"


def test_what_is_printed_after_the_end_is_captured_as_well(web: Container) -> None:
    done = enter(web, "sh", "-c", "(sleep 0.3; echo late) & echo early; exit 3")
    assert (done.returncode, done.stdout) == (3, "early\nlate\n")


def test_the_command_ends_before_those_it_leaves_behind(web: Container) -> None:
    with subprocess.Popen(
        [ENTER, str(web.path), "--", "sh", "-c", "sleep 30 & exit 4"], stdout=subprocess.PIPE
    ) as process:
        assert process.wait(5) == 4
        web.write("kill", "1")
        assert process.stdout is not None
        assert process.stdout.read() == b""


def test_input_from_a_pipe(web: Container) -> None:
    text = "".join(f"{n}\n" for n in range(100000))
    assert enter(web, "cat", text=text).stdout == text
    assert enter(web, text="echo $((6 * 7)); exit 9\n").returncode == 9
    assert enter(web, "head", "-n1", text=text).stdout == "0\n"


def test_input_from_a_file_is_left_to_the_next_command(web: Container, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text("".join(f"{n}\n" for n in range(5)))
    loop = f'while read x; do echo "<$x>"; {ENTER} {web.path} -- true; done'
    with lines.open() as file:
        done = subprocess.run(["sh", "-c", loop], stdin=file, capture_output=True, text=True)
    assert done.stdout == "".join(f"<{n}>\n" for n in range(5))
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3_000_000))
    with big.open("rb") as file:
        copied = subprocess.run(
            [ENTER, str(web.path), "--", "cat"], stdin=file, capture_output=True
        ).stdout
    assert copied == big.read_bytes()


def test_a_reader_that_leaves_is_a_broken_pipe_inside(web: Container) -> None:
    line = f"{ENTER} {web.path} -- sh -c 'yes; echo $? >&2' | head -n1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout == "y\n"
    assert done.stderr.split()[-1] == "141"


def test_closed_descriptors(web: Container) -> None:
    line = f"{ENTER} {web.path} -- sh -c 'cat; echo out; exit 5' <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", line + "; echo $?"], capture_output=True, text=True)
    assert done.stdout == "5\n"


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_are_forwarded(web: Container, number: signal.Signals) -> None:
    text = f"trap 'echo got; exit 7' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [ENTER, str(web.path), "--", "sh", "-c", text], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "got\n"
        assert process.wait(DEADLINE_S) == 7


def test_its_death_is_a_hangup_inside(web: Container) -> None:
    with session(web) as process:
        process.kill()
    wait_until(lambda: web.state()["procs"] == "0", "the command is gone")


def test_the_death_of_the_container_is_137(web: Container) -> None:
    with session(web) as process:
        subprocess.run(["rm", "-rf", str(web.path)], check=True)
        assert process.wait(DEADLINE_S) == 137


def test_the_daemons_death_harms_no_session(instance: Instance, web: Container) -> None:
    with subprocess.Popen(
        [ENTER, str(web.path), "--", "sh", "-c", "echo ready; read x; echo $x; exit 6"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        instance.kill_daemon()
        assert process.communicate("word\n", DEADLINE_S)[0] == "word\n"
        assert process.returncode == 6
    wait_until(lambda: enter(web, "true").returncode == 0, "the next daemon")


# --- nothing of the host gets in ---


def test_the_environment_is_a_list(web: Container) -> None:
    secret = {"SECRET": "x", "LC_SECRET": "y", "SSH_AUTH_SOCK": "/z", "HOME": "/host", "PATH": "/p"}
    passed = {"TERM": "vt100", "LANG": "C.UTF-8", "LC_ALL": "C", "TZ": "UTC"}
    done = enter(web, "/usr/bin/env", env={**secret, **passed})
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found == {
        **passed,
        "HOME": "/root",
        "USER": "root",
        "LOGNAME": "root",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "container": "nsfs",
    }


def test_no_descriptor_namespace_or_group_of_the_host(web: Container) -> None:
    with open("/etc/shadow") as secret:
        os.set_inheritable(secret.fileno(), True)
        done = subprocess.run(
            [
                ENTER,
                str(web.path),
                "--",
                "sh",
                "-c",
                "ls -l /proc/self/fd; readlink /proc/self/ns/*",
            ],
            pass_fds=[secret.fileno()],
            capture_output=True,
            text=True,
        )
    lines = done.stdout.splitlines()
    fds = [line.split(" -> ")[1] for line in lines if " -> " in line]
    assert len(fds) == 4, lines
    assert [x.startswith("pipe:") for x in fds[:3]] == [True] * 3
    assert "/proc/" in fds[3]
    inside = {x for x in lines if "[" in x and " -> " not in x}
    ours = {os.readlink(f"/proc/self/ns/{x.split(':')[0]}") for x in inside}
    assert len(inside) == 8
    assert not inside & ours
    assert script(web, "cat /proc/self/cgroup").splitlines()[-1] == "0::/"
    assert script(web, "readlink -f /proc/self/cwd /proc/self/root").split() == ["/", "/"]
    mounts = script(web, "cat /proc/self/mountinfo")
    assert str(web.path.parent) not in mounts


def test_the_command_may_open_its_output_anew(web: Container) -> None:
    assert script(web, "echo x > /dev/stdout; echo y > /proc/self/fd/1") == "x\ny\n"


def by_ln(
    container: Container, shell: str = "/bin/sh", text: str = "", **options: object
) -> subprocess.CompletedProcess[str]:
    """The same by an ln(1): a shell, which reads a script."""
    return subprocess.run(
        ["ln", str(container.path.parent / "procs/self"), f"{container.path}/procs/"],
        input=text,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "SHELL": shell},
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("way", ["enter", "ln"])
def test_proc_self_exe_is_not_the_hosts(web: Container, way: str) -> None:
    # CVE-2019-5736: the program that enters is made to execute itself, then written to.
    text = """
        printf '#!/proc/self/exe\n' > /run/again; chmod +x /run/again
        /run/again >/dev/null 2>&1; echo ran $?
        sleep 0.01 & readlink /proc/$!/exe
        for p in /proc/[0-9]*; do
            case $(readlink $p/exe 2>&1) in *nsfs-*) echo visible $p;; esac
        done
        (: < /proc/1/exe) 2>&1 | grep -c denied
        (: >> /proc/1/exe) 2>&1 | grep -c denied
        """
    done = script(web, text) if way == "enter" else by_ln(web, text=text).stdout
    assert "visible" not in done
    assert done.splitlines()[-2:] == ["1", "1"], done
    again = enter(web, "/run/again") if way == "enter" else by_ln(web, "/run/again")
    assert again.returncode != 0
    assert enter(web, "true").returncode == by_ln(web, "/bin/true").returncode == 0


def test_one_that_becomes_a_session_is_out_of_reach(web: Container) -> None:
    # CVE-2019-5736 the other way: those inside look for the programs of sessions that are about to
    # begin, all the time, to open them.
    look = """
        import glob, os, time
        found = set()
        print("looks", flush=True)
        while not os.path.exists("/run/end"):
            for path in glob.glob("/proc/[0-9]*/exe") + glob.glob("/proc/[0-9]*/fd/*"):
                try:
                    target = os.readlink(path)
                    if "nsfs" in target:
                        found.add(target)
                except OSError:
                    pass
        print("found", *found)
        """
    with subprocess.Popen(
        [ENTER, str(web.path), "--", "python3", "-c", textwrap.dedent(look)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "looks\n"
        for _ in range(30):
            assert by_ln(web, "/bin/true").returncode == 0
        web.run("touch /run/end")
        assert process.stdout.read() == "found\n"


@pytest.mark.parametrize("way", ["enter", "ln"])
def test_no_directory_of_the_host_by_a_descriptor(web: Container, tmp_path: Path, way: str) -> None:
    # CVE-2024-21626: the working directory by way of a descriptor that was left open.
    script(web, "for n in $(seq 0 100); do ln -s /proc/self/fd/$n /run/d$n; done")
    text = (
        "readlink /proc/self/cwd;"
        "for n in $(seq 0 100); do (cd /run/d$n/ && pwd) 2>/dev/null || :; done; echo end"
    )
    directory_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.set_inheritable(directory_fd, True)
        options = {"cwd": tmp_path, "pass_fds": [directory_fd]}
        if way == "enter":
            words = [ENTER, str(web.path), "--", "sh", "-c", text]
            output = subprocess.check_output(words, text=True, **options)  # type: ignore[call-overload]
        else:
            output = by_ln(web, text=text, **options).stdout
    finally:
        os.close(directory_fd)
    assert output == "/\nend\n"


@pytest.mark.parametrize("way", ["enter", "ln"])
def test_no_keystroke_gets_out(web: Container, way: str) -> None:
    # TIOCSTI: what is pushed back goes to the terminal inside.
    push = """#!/usr/bin/python3
import fcntl, termios
try:
    for c in b"echo pushed-$((1+1))\\n": fcntl.ioctl(0, termios.TIOCSTI, bytes([c]))
    print("pushed")
except OSError as e: print("refused", e.errno)
"""
    enter(web, "sh", "-c", "cat > /run/push; chmod 755 /run/push", text=push)
    by = {
        "enter": f"{ENTER} {web.path} -- /run/push",
        "ln": f"ln {web.path.parent}/procs/self {web.path}/procs/",
    }
    env = {"SHELL": "/run/push"}
    with terminal("sh", "-c", f"{by[way]}; echo back; cat", env=env) as outer:
        outer.expect("pushed|refused")
        outer.expect("back")
        time.sleep(0.2)
        outer.send("last\n")
        outer.expect("last")
        assert "pushed-2" not in outer.text
        assert "echo pushed" not in outer.text.split("back")[1]


# --- with a terminal ---


@pytest.mark.parametrize("shell", ["bash --norc --noprofile", "dash", "busybox sh", "zsh -f"])
def test_a_session_on_a_terminal(web: Container, shell: str) -> None:
    with terminal(*shell.split(), env={"SHELL": "/bin/bash", "ENV": ""}) as outer:
        outer.expect("ready> ")
        outer.run("stty rows 33 cols 99; stty -g", STTY)
        before = outer.found
        outer.run(f"{ENTER} {web.path} -- bash --norc", r"bash-[0-9.]+# ")
        outer.run("hostname; tty; stty size", r"web\r\n/dev/pts/0\r\n33 99\r\n")
        outer.expect(r"bash-[0-9.]+# ")
        outer.resize(44, 111)
        outer.run("sleep 0.1; stty size", "44 111")
        outer.expect(r"bash-[0-9.]+# ")
        # Ctrl-C ends the command, not the shell.
        outer.run("echo sle''eping; sleep 1000", "sleeping")
        wait_until(lambda: web.runs("sleep"), "it sleeps")
        outer.send("\x03")
        outer.expect(r"bash-[0-9.]+# ")
        outer.run("echo code-$?", "code-130")
        outer.expect(r"bash-[0-9.]+# ")
        # Ctrl-Z and job control.
        outer.run("echo sle''eping; sleep 1000", "sleeping")
        wait_until(lambda: web.runs("sleep"), "it sleeps")
        outer.send("\x1a")
        outer.expect("Stopped")
        outer.expect(r"bash-[0-9.]+# ")
        outer.run("kill -9 %1; sleep 0.2; echo jo''bs", "jobs")
        outer.expect(r"bash-[0-9.]+# ")
        outer.run("exit 33", "ready> ")
        # busybox asks where the cursor is, and takes no input for an answer only after a while.
        time.sleep(0.2)
        outer.run("echo code=$?", "code=33")
        outer.expect("ready> ")
        outer.run("stty -g", STTY)
        assert outer.found == before


def test_only_what_is_a_terminal_outside_is_one_inside(web: Container, tmp_path: Path) -> None:
    ask = "for n in 0 1 2; do test -t $n && echo $n >> /run/ttys; done; cat /run/ttys > /dev/stderr"
    for redirect, wanted in (("", "0 1 2"), ("2> /dev/null", "0 1"), ("> /dev/null", "")):
        script(web, ": > /run/ttys")
        with terminal(
            "sh", "-c", f"{ENTER} {web.path} -- sh -c '{ask}' {redirect}; echo en''d"
        ) as t:
            t.expect("end")
        assert script(web, "cat /run/ttys").split() == wanted.split()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_terminal_is_restored_whatever_happens(web: Container, number: int) -> None:
    with terminal("dash", env={"ENV": ""}) as outer:
        outer.run("echo out''side", "outside")
        before = outer.mode()
        outer.run(f"{ENTER} {web.path} -- sh -c 'echo in''side; exec sleep 1000'", "inside")
        assert outer.mode() != before
        found = [
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and parent_of(int(p.name)) == outer.pid
        ]
        os.kill(found[0], number)
        wait_until(lambda: outer.mode() == before, "the terminal is restored")
        outer.run("echo still''here", "stillhere")


def parent_of(pid: int) -> int:
    """The parent of a process; 0 when it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def test_a_hangup_ends_the_session(web: Container) -> None:
    with terminal(ENTER, str(web.path), "--", "sh", "-c", "echo in''side; sleep 1000") as outer:
        outer.expect("inside")
    wait_until(lambda: web.state()["procs"] == "0", "the command is gone")


def test_stopped_from_outside_and_resumed(web: Container) -> None:
    with terminal("bash", "--norc", "--noprofile") as outer:
        outer.expect("ready> ")
        outer.run("stty -g", STTY)
        before = outer.found
        outer.run(f"{ENTER} {web.path} -- sh -c 'echo in''side; read x; exit $x'", "inside")
        child = next(
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and parent_of(int(p.name)) == outer.pid
        )
        os.kill(child, signal.SIGTSTP)
        outer.expect("Stopped")
        outer.run("echo st''ill", "still")
        outer.run("fg", ENTER)
        time.sleep(0.2)
        outer.run("12", "ready> ")
        outer.run("echo code=$?; stty -g", "code=12")
        outer.expect(STTY)
        assert outer.found[-40:] == before[-40:]


# --- who may ---


def test_only_who_may_write_to_procs(tree: Path, web: Container) -> None:
    def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", *words],
            # The directories above are closed to others.
            cwd=tree,
            capture_output=True,
            text=True,
        )

    done = as_nobody(ENTER, "./web", "--", "true")
    assert (done.returncode, done.stderr) == (125, "nsfs: ./web: Permission denied\n")
    os.chown(web.path, 1234, 1234)
    done = as_nobody(ENTER, "./web", "--", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "0\n"), done
    os.chmod(tree, 0o777)
    try:
        assert as_nobody("mkdir", "mine").returncode == 0
        done = as_nobody(ENTER, "./mine", "--", "id", "-u")
        assert (done.returncode, done.stdout) == (0, "0\n"), done
    finally:
        os.chmod(tree, 0o755)


# --- as a login shell ---


def test_as_a_login_shell(tree: Path, web: Container) -> None:
    link = f"{web.path}"
    env = {**os.environ, "SSH_ORIGINAL_COMMAND": "hostname; exit 5"}
    done = subprocess.run([ENTER, "--ssh", link], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "web\n")
