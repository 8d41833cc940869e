"""The command nsfs(8): mount, umount, status, log."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nsfs import config, graft
from nsfs.cgroup import Hierarchies
from nsfs.instance import Instance

ASK_S = 10.0
"""How long a daemon may take to answer."""
START_S = 10.0
"""How long one may take to be started again."""
END_S = 60.0
"""How long an instance may take to end."""
RUN_DIR = "/run/nsfs"
CGROUP = "nsfs"
LIBEXEC = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libexec")


class Refused(Exception):
    """What nsfs cannot do here, in one sentence that says what to do."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="nsfs", description="Containers as directories; see nsfs(8) and nsfs(5)."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    mount = commands.add_parser("mount", help="serve a tree")
    mount.add_argument("dir", nargs="?", metavar="DIR", help="default: /sys/namespaces")
    mount.add_argument("--run-dir", metavar="DIR", help=f"state; default: {RUN_DIR}")
    mount.add_argument("--cgroup", metavar="NAME", help=f"default: {CGROUP}")
    mount.add_argument("--config", metavar="FILE", help=f"default: {config.PATH}")
    mount.add_argument("--no-graft", action="store_true", help="leave /sys alone")
    mount.add_argument("--foreground", action="store_true", help="do not go to the background")
    mount.set_defaults(run=do_mount)
    umount = commands.add_parser("umount", help="end an instance")
    umount.add_argument("dir", nargs="?", metavar="DIR")
    umount.add_argument("--kill", action="store_true", help="kill the containers that there are")
    umount.set_defaults(run=do_umount)
    status = commands.add_parser("status", help="what is served where, and with what")
    status.add_argument("dir", nargs="?", metavar="DIR")
    status.add_argument("--json", action="store_true")
    status.set_defaults(run=do_status)
    log = commands.add_parser("log", help="what the supervisor and the daemon have logged")
    log.add_argument("dir", nargs="?", metavar="DIR")
    log.set_defaults(run=do_log)
    # They parse the rest themselves: what is behind `--` is nobody's but the command's.
    commands.add_parser("enter", add_help=False, help="a session in a container")
    commands.add_parser("run", add_help=False, help="make a container, run a command, remove it")
    return top


def check_system() -> None:
    """Refuse what cannot work, before anything is changed."""
    if os.geteuid() != 0:
        raise Refused("only root can mount: run it with sudo")
    if not os.path.exists("/dev/fuse"):
        with contextlib.suppress(OSError):
            subprocess.run(["modprobe", "fuse"], check=False, stderr=subprocess.DEVNULL)
        if not os.path.exists("/dev/fuse"):
            raise Refused(
                "there is no /dev/fuse: load the module fuse, or use a kernel that has it"
            )
    try:
        hierarchies = Hierarchies.detect()
    except FileNotFoundError as error:
        raise Refused(str(error.strerror)) from None
    # The root group has no cgroup.kill of its own; any other would, so ask for a kernel that has
    # groups' events.
    if not os.path.exists(f"{hierarchies.v2}/cgroup.procs"):
        raise Refused(f"{hierarchies.v2} is no usable cgroup2 mount: mount it anew")
    for kind in ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"):
        if not os.path.exists(f"/proc/self/ns/{kind}"):
            raise Refused(f"this kernel has no {kind} namespaces: use Linux 5.14 or later")
    for name in (
        "nsfs-supervisor",
        "nsfs-spawner",
        "nsfs-init",
        "nsfs-enter",
        "nsfs-interposer.so",
    ):
        if not os.path.exists(f"{LIBEXEC}/{name}"):
            raise Refused(f"{name} was not built: run scripts/setup")


def do_mount(args: argparse.Namespace) -> int:
    """Serve a tree; returns when it is served (or, in the foreground, when it ends)."""
    check_system()
    settings = config.load(Path(args.config) if args.config else None)
    run_dir = os.path.abspath(args.run_dir or RUN_DIR)
    directory = os.path.abspath(args.dir or str(settings.mount.dir))
    if directory == "/sys/namespaces" and (args.no_graft or not settings.mount.graft):
        directory = f"{run_dir}/tree"
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    os.chmod(run_dir, 0o700)
    lock_fd = os.open(f"{run_dir}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"another instance is using {run_dir}: choose another --run-dir") from None
    known = Instance(run_dir)
    adopted = 0
    if graft.served(directory) == run_dir and not known.supervisor():
        # Killed: a daemon that goes on serving is taken over, without one all is mounted anew.
        adopted = known.daemon()
        if not adopted:
            known.take_down(directory)
    if graft.served(directory) is not None and not adopted:
        raise Refused(f"a tree is served at {directory} already: nsfs status tells more")
    if known.supervisor():
        raise Refused(
            f"another instance is using {run_dir}, elsewhere or in another mount namespace: "
            "choose another --run-dir"
        )
    unmount: list[str] = []
    if adopted:
        command = known.adopting(foreground=args.foreground)
    else:
        if graft.needed(directory):
            unmount = graft.graft(directory, run_dir)
        elif directory.startswith(run_dir):
            os.makedirs(directory, exist_ok=True)
        command = _supervisor(args, directory, run_dir, unmount)
        known.record(command)
    # The supervisor takes it itself, for as long as it lives.
    os.close(lock_fd)
    if args.foreground:
        os.execv(command[0], command)
    result = subprocess.run(command, check=False)
    if result.returncode:
        graft.undo(unmount)
        raise Refused(f"{directory} cannot be served: {last_words(run_dir)}")
    return 0


def _supervisor(
    args: argparse.Namespace, directory: str, run_dir: str, unmount: list[str]
) -> list[str]:
    """The command of a supervisor."""
    command = [f"{LIBEXEC}/nsfs-supervisor", "--dir", directory, "--run-dir", run_dir]
    for path in unmount:
        command += ["--unmount", path]
    if args.foreground:
        command.append("--foreground")
    command += ["--", sys.executable, "-P", "-m", "nsfs.daemon"]
    command += ["--dir", directory, "--run-dir", run_dir, "--cgroup", args.cgroup or CGROUP]
    if args.config:
        command += ["--config", os.path.abspath(args.config)]
    return command


def last_words(run_dir: str) -> str:
    """The last line of an instance's log."""
    try:
        with open(f"{run_dir}/log", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return "the reason stands above (is there FUSE in this kernel?)"
    errors = [line for line in lines if " ERROR " in line]
    return (errors or lines or ["the log is empty"])[-1]


def instance(directory: str | None) -> tuple[str, str]:
    """The mount point and run directory of the instance meant; Refused when there is none."""
    wanted = os.path.abspath(directory) if directory else None
    candidates = [wanted] if wanted else [str(config.load(None).mount.dir), f"{RUN_DIR}/tree"]
    for each in candidates:
        run_dir = graft.served(each)
        if run_dir:
            return each, run_dir
    raise Refused(f"no tree is served at {candidates[0]}: nsfs mount serves one")


def ask(run_dir: str, question: dict[str, Any]) -> dict[str, Any]:
    """Ask a daemon; it may just be being started again, so wait a little for it.  TimeoutError for
    one that is there and does not answer."""
    end_s = time.monotonic() + START_S
    while True:
        try:
            return _ask_now(run_dir, question)
        except TimeoutError:
            raise
        except (OSError, ValueError):
            if time.monotonic() > end_s or not Instance(run_dir).lives():
                raise
            time.sleep(0.02)


def _ask_now(run_dir: str, question: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(ASK_S)
        connection.connect(f"{run_dir}/control")
        connection.send(json.dumps(question).encode())
        # Empty, and so no JSON, when the daemon died over it.
        answer: dict[str, Any] = json.loads(connection.recv(1 << 20))
        return answer


def do_umount(args: argparse.Namespace) -> int:
    """End an instance; refused while there are containers, unless told to kill them."""
    directory, run_dir = instance(args.dir)
    known = Instance(run_dir)
    question = {"do": "umount", "kill": args.kill}
    if not known.lives():
        return _umount_dead(known, directory, kill=args.kill)
    try:
        answer = ask(run_dir, question)
    except (OSError, ValueError):
        # It hangs, or cannot even start.  The next one has all that it had.
        known.kill_daemon()
        try:
            answer = ask(run_dir, question)
        except (OSError, ValueError):
            if not known.lives():
                return _umount_dead(known, directory, kill=args.kill)
            raise Refused(
                f"no daemon of {directory} answers; {last_words(run_dir)}; "
                f"kill -9 {known.supervisor()} {known.daemon()} makes nsfs umount do without"
            ) from None
    if answer.get("error") == "busy":
        count = answer["containers"]
        noun = "container" if count == 1 else "containers"
        raise Refused(f"{directory} has {count} {noun}: remove them, or use --kill")
    end_s = time.monotonic() + END_S
    while known.lives():
        if time.monotonic() > end_s:
            raise Refused(f"{directory} does not end: see {run_dir}/log")
        time.sleep(0.01)
    return 0


def _umount_dead(known: Instance, directory: str, *, kill: bool) -> int:
    count = known.containers()
    if count and not kill:
        noun = "container" if count == 1 else "containers"
        raise Refused(
            f"nobody serves {directory} any more, and there are records of {count} {noun}: "
            "nsfs mount takes them up again, --kill kills them"
        )
    known.clear(directory)
    return 0


def end_with_reader() -> None:
    """From here on SIGPIPE ends us, as any program whose output nobody reads any more."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def do_status(args: argparse.Namespace) -> int:
    """Print what is served where."""
    directory, run_dir = instance(args.dir)
    known = Instance(run_dir)
    facts: dict[str, Any] = {
        "dir": directory,
        "run_dir": run_dir,
        "supervisor": known.supervisor(),
        "daemon": known.daemon(),
    }
    try:
        facts.update(ask(run_dir, {"do": "status"}))
        answers = True
    except (OSError, ValueError):
        answers = False
    end_with_reader()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    if not answers:
        what = "the daemon does not answer" if known.lives() else "nobody serves it any more"
        raise Refused(f"{directory}: {what}: nsfs log may tell why")
    return 0


def _print(facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        if isinstance(value, dict):
            for name, one in value.items():
                text = " ".join(one) or "-" if isinstance(one, list) else _word(one)
                print(f"{key}.{name} {text}")
        else:
            print(f"{key} {value}")


def do_log(args: argparse.Namespace) -> int:
    """Print the log of an instance."""
    _, run_dir = instance(args.dir)
    end_with_reader()
    with open(f"{run_dir}/log", encoding="utf-8", errors="replace") as file:
        for line in file:
            sys.stdout.write(line)
    return 0


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def main(argv: list[str] | None = None) -> int:
    """The program."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in ("enter", "run"):
        from nsfs import run

        return run.run(words[1:]) if words[0] == "run" else run.enter(words[1:])
    args = parser().parse_args(words)
    try:
        code: int = args.run(args)
        return code
    except Refused as error:
        print(f"nsfs: {error}", file=sys.stderr)
    except config.ConfigError as error:
        print(f"nsfs: {error}", file=sys.stderr)
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        print(f"nsfs: {about}{error.strerror or error}", file=sys.stderr)
        if error.errno == errno.EPERM:
            print("nsfs: is this a container without CAP_SYS_ADMIN?", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
