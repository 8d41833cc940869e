"""Sessions of careless users, in hostile containers, and while things die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC

from .conftest import SLOWNESS, Container, Instance, wait_until
from .terminal import Terminal, terminal

ENTER = str(LIBEXEC / "nsfs-enter")
DEADLINE_S = 30.0 * SLOWNESS
STTY = "[\r\n][0-9a-f:]{40,}\r"
LNS = ("ln", "busybox ln", "toybox ln", "coreutils ln")
WAYS = ("ln {tree}/procs/self {web}/procs/", ENTER + " {web}")


def typed(way: str, web: Container) -> str:
    """The command line of a session."""
    return way.format(tree=web.path.parent, web=web.path)


# --- ln with whatever arguments ---

ENTERS = (
    "procs/self web/procs/",
    "procs/self web/procs",
    "procs/self web/procs/self",
    "-T procs/self web/procs/self",
    "-v procs/self web/procs/",
    "-n procs/self web/procs/",
    "-- procs/self web/procs/",
    "./procs/../procs/self ./web/../web/procs/.",
    # The first makes it a session, which knows of no second.
    "procs/self procs/1 web/procs/",
)
ENTERS_BY = {
    "ln": ("-f {}", "-i {}", "-b {}", "-P {}", "-L {}", "-fv {}"),
    "busybox ln": ("-f {}", "-b {}"),
    "toybox ln": (),
    "coreutils ln": ("-f {}", "-P {}", "-L {}", "-fv {}"),
}
RUST = {"not permitted": "Permission denied", "Invalid argument": "Invalid input"}
"""How that of rust-coreutils says it in places."""
REFUSED = {
    "-s procs/self web/procs/": "not permitted",
    "-sf procs/self web/procs/": "not permitted",
    "procs/self web/": "not permitted",
    "procs/self web/self": "not permitted",
    "web/procs/self web/procs/": "No such file",
    "procs/nope web/procs/": "No such file",
    "procs/self nope/procs/": "No such file",
    "procs/self web/procs/self:": "Invalid argument",
    "procs/self web/procs/self:net,,uts": "Invalid argument",
    "procs/self web/procs/me": "Invalid argument",
}


def ln(tree: Path, program: str, arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program.split(), *arguments.split()],
        cwd=tree,
        env={**os.environ, "SHELL": "/bin/sh"},
        input="hostname; exit 33\n",
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize("program", LNS)
def test_ln_with_whatever_arguments(tree: Path, web: Container, program: str) -> None:
    for arguments in (*ENTERS, *(x.format(ENTERS[0]) for x in ENTERS_BY[program])):
        done = ln(tree, program, arguments)
        assert (done.returncode, done.stdout, done.stderr) == (33, "web\n", ""), (arguments, done)
    for arguments, text in REFUSED.items():
        done = ln(tree, program, arguments)
        assert (done.returncode, done.stdout) == (1, ""), (arguments, done)
        assert RUST.get(text, text) in done.stderr or text in done.stderr, (arguments, done)
    if program == "toybox ln":
        # It links by another name first.
        assert "Invalid argument" in ln(tree, program, "-f procs/self web/procs/").stderr
    assert web.state()["procs"] == "0"
    assert os.listdir(web / "procs") == []


STARTED_BY = (
    "{ln}",
    "nohup {ln}",
    "setsid -w {ln}",
    "env -i SHELL=/bin/sh {ln}",
    "time -p {ln}",
    "timeout 20 {ln}",
    "exec {ln}",
    "ulimit -s 64; {ln}",
    "ulimit -v 20000; {ln}",
    "cat | {ln} | cat; exit ${{PIPESTATUS[1]}}",
    "export LARGE=$(printf %100000s); {ln}",
)
NOT_STARTED_BY = {
    # Two cannot trace it.
    "strace -o /dev/null {ln}": (1, "not permitted"),
    "ulimit -n 4; {ln}": (1, "Too many open files"),
    "ulimit -n 8; {ln}": (125, "nsfs: web: "),
}


def test_ln_however_it_is_started(tree: Path, web: Container) -> None:
    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line.format(ln=typed(WAYS[0], web))],
            env={**os.environ, "SHELL": "/bin/sh"},
            input="hostname; exit 33\n",
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    for line in STARTED_BY:
        done = run(line)
        assert (done.returncode, done.stdout) == (33, "web\n"), (line, done)
    for line, (code, text) in NOT_STARTED_BY.items():
        done = run(line)
        assert (done.returncode, done.stdout) == (code, ""), (line, done)
        assert text in done.stderr, (line, done)
    # End of file is the end.
    for redirect in ("< /dev/null", "<&-", "<&- >&- 2>&-"):
        assert run(f"{{ln}} {redirect}").returncode == 0


# --- the terminal is as it was ---


def child_of(pid: int) -> int:
    """The one child of a process."""

    def look() -> list[int]:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            return [int(x) for x in text.split()]
        return []

    return int(wait_until(lambda: len(found := look()) == 1 and found, "it has one child")[0])


def kill_outer(number: int) -> Callable[[Instance, Container, int], None]:
    def what(instance: Instance, web: Container, session: int) -> None:
        os.kill(session, number)

    return what


def kill_inner_shell(instance: Instance, web: Container, session: int) -> None:
    web.write("kill", "KILL")


def kill_inner_shell_frozen(instance: Instance, web: Container, session: int) -> None:
    web.write("freeze", "1")
    web.write("kill", "1")
    web.write("freeze", "0")


def kill_outer_while_frozen(instance: Instance, web: Container, session: int) -> None:
    web.write("freeze", "1")
    os.kill(session, signal.SIGKILL)
    web.write("freeze", "0")


def kill_init(instance: Instance, web: Container, session: int) -> None:
    os.kill(web.init, signal.SIGKILL)


def remove(instance: Instance, web: Container, session: int) -> None:
    subprocess.run(["rm", "-rf", str(web.path)], check=True)


def kill_daemon_and_shell(instance: Instance, web: Container, session: int) -> None:
    instance.kill_daemon()
    kill_inner_shell(instance, web, session)


def kill_group(instance: Instance, web: Container, session: int) -> None:
    os.killpg(os.getpgid(session), signal.SIGKILL)


MISHAPS = {
    "outer group": (kill_group, 137),
    "outer KILL": (kill_outer(signal.SIGKILL), 137),
    "outer TERM": (kill_outer(signal.SIGTERM), None),
    "outer HUP": (kill_outer(signal.SIGHUP), 129),
    "outer SEGV": (kill_outer(signal.SIGSEGV), 139),
    "inner shell": (kill_inner_shell, 137),
    "inner shell frozen": (kill_inner_shell_frozen, 137),
    "outer while frozen": (kill_outer_while_frozen, 137),
    "init": (kill_init, 137),
    "removed": (remove, 137),
    "daemon and shell": (kill_daemon_and_shell, 137),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mishap", MISHAPS)
def test_the_terminal_is_restored(
    instance: Instance, web: Container, way: str, mishap: str
) -> None:
    what, code = MISHAPS[mishap]
    with terminal("dash", env={"SHELL": "/bin/sh", "ENV": ""}) as outer:
        outer.run("echo out''side", "outside")
        before = outer.mode()
        outer.run(typed(way, web), "# ")
        outer.run("echo in''side", "inside")
        assert outer.mode() != before
        session = child_of(outer.pid)
        what(instance, web, session)
        if code is None:
            # It is passed on, to a shell that does not mind.
            outer.run("echo st''ill; exit 143", "still")
        outer.expect("ready> ")
        wait_until(lambda: outer.mode() == before, "the terminal is as it was")
        outer.run("echo code=$?", f"code={code or 143}")
    if web.path.exists() and mishap != "init":
        wait_until(lambda: web.state()["procs"] == "0", "nobody is in it")


@pytest.mark.parametrize("way", WAYS)
def test_keys_and_the_windows_size(web: Container, way: str) -> None:
    with terminal("bash", "--norc", "--noprofile", env={"SHELL": "/bin/bash"}) as outer:
        outer.expect("ready> ")
        outer.resize(33, 99)
        outer.run(typed(way, web), "# ")
        outer.run("PS1='in''> '; stty size", r"33 99\r\n.*in> ")
        outer.resize(44, 111)
        wait_until(lambda: asked(outer, "stty size", "44 111"), "the new size is known")
        outer.run("sleep 1000", "")
        wait_until(lambda: web.runs("sleep"), "it sleeps")
        outer.send("\x1a")
        outer.expect("Stopped")
        outer.expect("in> ")
        outer.run("jobs; fg", r"Stopped +sleep 1000.*\r\nsleep 1000")
        time.sleep(0.1)
        outer.send("\x1c")
        outer.expect("Quit")
        outer.expect("in> ")
        outer.run("cat", "")
        wait_until(lambda: web.runs("cat"), "it reads")
        outer.send("word\n")
        outer.expect("word\r\nword")
        outer.send("\x04")
        outer.expect("in> ")
        # End of file at the prompt leaves.
        outer.send("\x04")
        outer.expect("ready> ")
        outer.run("echo al''ive", "alive")


def asked(outer: Terminal, command: str, wanted: str) -> bool:
    """Whether a command prints that; at the prompt `in> `."""
    outer.run(f"{command}; echo as''ked", "asked")
    found = wanted in outer.text.rpartition(command)[2]
    outer.expect("in> ")
    return found


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_continued(web: Container, way: str) -> None:
    with terminal("bash", "--norc", "--noprofile", env={"SHELL": "/bin/sh"}) as outer:
        outer.expect("ready> ")
        outer.run("stty -g", STTY)
        before = outer.found
        outer.run(typed(way, web), "# ")
        os.kill(child_of(outer.pid), signal.SIGTSTP)
        outer.expect("Stopped")
        outer.expect("ready> ")
        outer.run("stty -g", STTY)
        assert outer.found[-40:] == before[-40:]
        outer.run("fg", "procs|nsfs-enter")
        outer.run("echo be''yond", "beyond")
        outer.run("exit 12", "ready> ")
        outer.run("echo code=$?; stty -g", "code=12")
        outer.expect(STTY)
        assert outer.found[-40:] == before[-40:]


@pytest.mark.parametrize("shell", ["bash --norc --noprofile", "dash", "busybox sh", "zsh -f"])
def test_begun_in_the_background(web: Container, shell: str) -> None:
    with terminal(*shell.split(), env={"SHELL": "/bin/sh", "ENV": ""}) as outer:
        outer.expect("ready> ")
        outer.run(typed(WAYS[0], web) + " &", "ready> ")
        wait_until(lambda: web.state()["procs"] == "1", "it runs")
        # What is typed is the outer shell's.
        outer.run("echo out''side $(hostname)", f"outside {os.uname().nodename}\r")
        outer.expect("ready> ")
        outer.run("fg", "procs")
        # Not before the shell has put its own mode aside and the session has taken the terminal.
        wait_until(lambda: not outer.mode()[1] & termios.OPOST, "it is the session's terminal")
        outer.run("echo in''side $(hostname)", "inside web\r")
        outer.run("exit 9", "ready> ")
        outer.run("echo code=$?", "code=9")


# --- several at once ---


def test_two_sessions_on_two_terminals(web: Container) -> None:
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(terminal("dash", env={"SHELL": "/bin/sh", "ENV": ""})) for _ in WAYS
        ]
        for outer, way in zip(both, WAYS, strict=True):
            outer.expect("ready> ")
            outer.run(typed(way, web), "# ")
        ttys = []
        for outer in both:
            ttys.append(
                outer.run("tty; echo $$ > /run/$(basename $(tty))", r"/dev/pts/\d+").group()
            )
            outer.expect("# ")
        assert len(set(ttys)) == 2
        # They see each other, as two terminals of one machine do; what one is told the other is not.
        assert int(web.state()["procs"]) == 2
        both[0].run("echo only''here; exit 3", "onlyhere")
        both[0].expect("ready> ")
        both[0].run("echo code=$?", "code=3")
        both[1].run("echo th''ere; exit 4", "there")
        both[1].expect("ready> ")
        both[1].run("echo code=$?", "code=4")
        assert "onlyhere" not in both[1].text


def test_many_at_once(tree: Path, web: Container) -> None:
    processes = [
        subprocess.Popen(
            typed(WAYS[n % 2], web).split(),
            env={**os.environ, "SHELL": "/bin/sh"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(40)
    ]
    for n, process in enumerate(processes):
        output, _ = process.communicate(f"echo {n}; exit {n}\n", DEADLINE_S)
        assert (process.returncode, output) == (n, f"{n}\n")


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_entries_while_daemons_die(
    instance: Instance, tree: Path, web: Container, count: int
) -> None:
    codes = []
    for n in range(count):
        way = WAYS[n % 2]
        with subprocess.Popen(
            typed(way, web).split(),
            env={**os.environ, "SHELL": "/bin/sh"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(n % 12 * 0.0005)
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.kill(instance.daemon(), signal.SIGKILL)
            output, errors = process.communicate("hostname; exit 33\n", DEADLINE_S)
            codes.append(process.returncode)
            # A session or an error, and that is told.
            if process.returncode == 33:
                assert output == "web\n"
            else:
                assert process.returncode in (1, 125), (process.returncode, output, errors)
                assert errors
                assert not output
    assert codes.count(33) > 0
    wait_until(lambda: web.state()["procs"] == "0", "nobody is left in it")
    assert ln(tree, "ln", "procs/self web/procs/").returncode == 33


# --- what the command has of its starter ---


@pytest.mark.parametrize("way", WAYS)
def test_limits_masks_and_dispositions_stay_outside(web: Container, way: str) -> None:
    ask = (
        "umask; ulimit -n; ulimit -c; nice; grep -E 'Sig(Ign|Blk)|Seccomp:|NoNewPrivs|Groups' "
        "/proc/self/status; cat /proc/self/oom_score_adj; grep -c memfd /proc/self/maps; pwd\n"
    )
    plain = subprocess.run(
        ["sh", "-c", typed(way, web)],
        env={"PATH": os.environ["PATH"], "SHELL": "/bin/sh"},
        input=ask,
        capture_output=True,
        text=True,
    )
    odd = (
        "umask 077; ulimit -n 77; ulimit -c 0; echo 500 > /proc/self/oom_score_adj; trap '' USR1 PIPE; "
        f"cd /etc; exec nice -n 7 setpriv --groups 4242 {typed(way, web)}"
    )
    other = subprocess.run(
        ["sh", "-c", odd],
        env={"PATH": os.environ["PATH"], "SHELL": "/bin/sh"},
        input=ask,
        capture_output=True,
        text=True,
    )
    assert plain.stdout
    assert other.stdout == plain.stdout
    assert "/etc" not in other.stdout
    assert "4242" not in other.stdout


# --- containers that mean harm ---

NO_TERMINAL = {
    "a FIFO": "rm /dev/ptmx; mkfifo -m 666 /dev/ptmx",
    "a file": "rm /dev/ptmx; : > /dev/ptmx; chmod 666 /dev/ptmx",
    "nothing": "rm /dev/ptmx",
    "another device": "rm /dev/ptmx; ln -s null /dev/ptmx",
    "itself": "rm /dev/ptmx; ln -s ptmx /dev/ptmx",
    "no devpts": "umount -l /dev/pts; rm /dev/ptmx; mkdir /dev/ptmx",
}


@pytest.mark.parametrize("what", NO_TERMINAL)
def test_a_container_without_terminals(web: Container, what: str) -> None:
    web.run(NO_TERMINAL[what])
    for way, code in zip(WAYS, (125, 125), strict=True):
        with terminal("dash", env={"SHELL": "/bin/sh", "ENV": ""}) as outer:
            outer.run("echo out''side", "outside")
            before = outer.mode()
            outer.run(typed(way, web), "nsfs: ")
            outer.expect("ready> ")
            outer.run("echo code=$?", f"code={code}")
            assert outer.mode() == before
    # Without one nothing is amiss.
    assert ln(web.path.parent, "ln", "procs/self web/procs/").returncode == 33


def test_what_keeps_the_terminal_does_not_keep_the_session(web: Container) -> None:
    for way in WAYS:
        with terminal("dash", env={"SHELL": "/bin/sh", "ENV": ""}) as outer:
            outer.expect("ready> ")
            outer.run(typed(way, web), "# ")
            outer.run("trap '' HUP; sleep 1000 & exit 5", "ready> ")
            outer.run("echo code=$?", "code=5")
        web.write("kill", "1")


def test_a_flood_of_output_can_be_ended(web: Container) -> None:
    for way in WAYS:
        with terminal("dash", env={"SHELL": "/bin/sh", "ENV": ""}) as outer:
            outer.expect("ready> ")
            outer.run(typed(way, web), "# ")
            outer.run("yes fl''ood", "flood")
            outer.send("\x03")
            outer.run("echo en''ded; exit 6", "ended")
            outer.expect("ready> ")
            outer.run("echo code=$?", "code=6")


def test_who_kills_all_kills_himself(web: Container) -> None:
    done = ln(web.path.parent, "ln", "procs/self web/procs/")
    assert done.returncode == 33
    for way in WAYS:
        # All but the sender, as kill(2) has it; then the sender.
        for whom, expected in (("-1", (0, "reached\n")), ("$$", (137, ""))):
            done = subprocess.run(
                typed(way, web).split(),
                env={**os.environ, "SHELL": "/bin/sh"},
                input=f"kill -9 {whom}; echo reached\n",
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
            )
            assert (done.returncode, done.stdout) == expected, done
    assert int(Path(f"/proc/{web.init}/stat").read_text().split()[0]) == web.init


def test_members_cannot_look_at_a_session(web: Container) -> None:
    """What waits outside is not to be seen; what is inside has nothing of outside's."""
    spy = (
        "import os,time\n"
        "end = time.time() + 3\n"
        "print('ready', flush=True)\n"
        "seen = set()\n"
        "while time.time() < end and not os.path.exists('/run/enough'):\n"
        "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        if int(pid) in (1, os.getpid()): continue\n"
        "        for name in ('environ', 'maps', 'cmdline'):\n"
        "            try: data = open(f'/proc/{pid}/{name}', 'rb').read()\n"
        "            except OSError: continue\n"
        "            if b'S3CRET' in data or b'nsfs-enter' in data: seen.add((name, data))\n"
        "        try: fds = os.listdir(f'/proc/{pid}/fd')\n"
        "        except OSError: continue\n"
        "        for fd in fds:\n"
        "            try: target = os.readlink(f'/proc/{pid}/fd/{fd}')\n"
        "            except OSError: continue\n"
        "            if 'nsfs' in target or 'memfd' in target: seen.add(target)\n"
        "print(sorted(map(str, seen)))\n"
    )
    with subprocess.Popen(
        [ENTER, str(web.path), "--", "/usr/bin/python3", "-c", spy],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        env = {**os.environ, "SECRET": "S3CRET", "SHELL": "/bin/true"}
        for n in range(100):
            name = ("", "self:user,mnt,pid,net,ipc,uts")[n % 2]
            subprocess.run(
                ["ln", str(web.path.parent / "procs/self"), f"{web.path}/procs/{name}"],
                env=env,
                stdin=subprocess.DEVNULL,
                check=True,
            )
        web.run(": > /run/enough")
        assert process.stdout.read() == "[]\n"


# --- in place: it dies with either ---


def test_it_dies_with_its_home_as_well(tree: Path, web: Container) -> None:
    db = Container(web / "db")
    db.path.mkdir()
    for doomed in ("home", "other"):
        with subprocess.Popen(
            [ENTER, str(web.path), "--", "sh", "-c", "echo ready; exec sleep 1000"],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            pid = int(wait_until(lambda: os.listdir(web / "procs"), "it is there")[0])
            words = ["ln", str(tree / f"procs/{pid}"), str(db / f"procs/{pid}:uts")]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 0, done
            assert os.listdir(db / "procs") == [f"{pid}:uts"]
            assert str(pid) in os.listdir(web / "procs")
            assert web.state()["procs"] == "1"
            (web if doomed == "home" else db).write("kill", "1")
            assert process.wait(DEADLINE_S) == 137
        wait_until(lambda: web.state()["procs"] == db.state()["procs"] == "0", "it is gone")


# Whoever sends a signal to all does not get it: so the threads go on.
STOPPER = """
import os, signal, threading
def make(number):
    while True:
        try:
            os.mkdir(f"/sys/namespaces/n{number}")
            os.rmdir(f"/sys/namespaces/n{number}")
        except OSError:
            pass
for number in range(8):
    threading.Thread(target=make, args=(number,)).start()
while True:
    try:
        os.kill(-1, signal.SIGSTOP)
    except OSError:
        pass
"""


def test_a_member_that_stops_what_makes_containers(tree: Path, instance: Instance) -> None:
    """Who makes one nested in another is for a moment in the PID namespace of that, whose root may
    send it SIGSTOP.  Nobody else waits for it, nor does who removes all that."""
    for name in ("web", "other"):
        os.mkdir(tree / name)
    web = Container(tree / "web")
    web.start("python3", "-c", STOPPER)

    def stopped() -> bool:
        """Whether something in the groups of those that are being made is."""
        init = Path(f"/proc/{web.init}/cgroup").read_text().split("0::", 1)[1].split("\n")[0]
        return bool(init) and any(
            "\nState:\tT" in text
            for text in statuses(Path(cgroup2() + os.path.dirname(init)) / "sub")
        )

    wait_until(stopped, "one is stopped")
    for number in range(5):
        subprocess.run(["mkdir", tree / "other" / f"n{number}"], check=True, timeout=DEADLINE_S)
        subprocess.run(["mkdir", tree / f"top{number}"], check=True, timeout=DEADLINE_S)
    done = subprocess.run(
        ["rm", "-rf", web.path, *tree.glob("top*"), tree / "other"],
        check=False,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    instance.settled()


def cgroup2() -> str:
    """Where the unified hierarchy is mounted."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next(directory for _, directory, kind, *_ in lines if kind == "cgroup2")


def statuses(group: Path) -> Iterator[str]:
    """/proc/PID/status of all that is in a group, its descendants included."""
    for procs in group.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            for pid in procs.read_text().split():
                yield Path(f"/proc/{pid}/status").read_text()
