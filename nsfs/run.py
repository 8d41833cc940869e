"""`nsfs enter` and `nsfs run`: sessions from the command line.

Exit status: the command's; 128+n when signal n ended it; 125 nsfs failed, 126 the command cannot be
executed, 127 it was not found.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from nsfs.attribute import one_line
from nsfs.cgroup import Hierarchies
from nsfs.config import BIND_MODES
from nsfs.limits import Limits, find, key, merged, parse

LIBEXEC = Path(__file__).parent / "libexec"
TREE = "/sys/namespaces"
FAILED = 125
PRIVATE = ("/dev", "/home", "/mnt", "/root", "/run", "/srv", "/tmp", "/var")
"""Where a container that shows the host's root filesystem has directories of its own."""
PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Parser(argparse.ArgumentParser):
    """A wrong command line is a failure of nsfs, not of a command: 125."""

    def error(self, message: str) -> NoReturn:
        """As argparse does it, but for the code."""
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"{self.prog}: {message}\n")

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Options, then a container, and the command: what is after `--`, or after the container
        as with env(1) and nsenter(1)."""
        self.add_argument("container", metavar="C")
        self.add_argument("command", nargs=argparse.REMAINDER, metavar="[--] COMMAND")
        at = argv.index("--") if "--" in argv else len(argv)
        args = self.parse_args(argv[:at])
        if args.command and args.command[0].startswith("-"):
            self.error(f"{args.command[0]}: options come before the container")
        return args, [*args.command, *argv[at:]] if args.command else argv[at + 1 :]


def path_of(container: str) -> str:
    """The directory of a container: below /sys/namespaces unless it is a path by its beginning."""
    if container.startswith(("/", "./", "../")):
        return container
    return f"{TREE}/{container}"


def program(container: str, only: str | None, command: list[str], ssh: bool = False) -> list[str]:
    """The session program and its arguments."""
    words = [str(LIBEXEC / "nsfs-enter"), *(["--only", only] if only else [])]
    words += [*(["--ssh"] if ssh else []), container]
    return [*words, "--", *command] if command else words


def enter(argv: list[str]) -> NoReturn:
    """`nsfs enter`: becomes the session program."""
    parser = Parser(prog="nsfs enter", description="A session in a container.")
    parser.add_argument("--only", metavar="LIST", help="only these namespaces, as net,uts")
    parser.add_argument("--ssh", action="store_true", help="run $SSH_ORIGINAL_COMMAND")
    args, command = parser.parse(argv)
    directory = path_of(args.container)
    if os.path.exists(f"{directory}/procs") and not os.path.exists(f"{directory}/exec"):
        parser.exit(FAILED, f"nsfs: {args.container}: everybody is in the root container already\n")
    words = program(args.container, args.only, command, args.ssh)
    os.execv(words[0], words)


class Bind(NamedTuple):
    """SOURCE[:TARGET[:ro|rw[,idmap]]] of a command line."""

    text: str
    source: str
    target: str
    mode: str

    @classmethod
    def parse(cls, text: str) -> Bind:
        """ValueError for what is none."""
        words = text.split(":")
        mode = words.pop() if words[-1] in BIND_MODES else "rw"
        if not 1 <= len(words) <= 2 or not all(words):
            raise ValueError(f"--bind {text}: SOURCE[:TARGET[:ro|rw[,idmap]]]")
        source = os.path.abspath(words[0])
        target = words[-1] if len(words) == 2 else source
        if not target.startswith("/") or ".." in target.split("/"):
            raise ValueError(f"--bind {text}: the target is an absolute path without `..`")
        return cls(text, source, target, mode)

    def line(self) -> str:
        """A line of `binds`."""
        return f"{one_line(self.target)} {one_line(self.source)} {self.mode}"


def check_binds(directory: str, rootfs: str | None, binds: list[Bind]) -> None:
    """ValueError for what could not be bound, before anything is made.

    The host's root filesystem is read-only in a container, so no mount point can be made in it but
    in what is the container's own.
    """
    for bind in binds:
        if not os.path.lexists(bind.source):
            raise ValueError(f"--bind {bind.text}: there is no {bind.source}")
    if rootfs is None:
        with contextlib.suppress(OSError):
            rootfs = (Path(directory).parent / "defaults/rootfs").read_text().rstrip("\n")
    if rootfs != "host":
        return
    for bind in binds:
        places = (*PRIVATE, *(each.target for each in binds if each is not bind))
        path = Path(bind.target)
        if not os.path.lexists(path) and not any(path.is_relative_to(each) for each in places):
            raise ValueError(
                f"--bind {bind.text}: there is no {bind.target}, and it cannot be made in the"
                f" host's root filesystem, which is read-only in a container: take one below /mnt"
            )


def write(path: str, value: str) -> None:
    """One value to a control file; the error names that."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, os.fsencode(value) + b"\n")
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, f"{os.path.basename(path)}: {error.strerror}") from error


def build(directory: str, args: argparse.Namespace, binds: list[Bind]) -> None:
    """What the options say of the new container."""
    if args.rootfs:
        write(f"{directory}/rootfs", os.path.abspath(args.rootfs))
    if binds:
        write(f"{directory}/binds", "\n".join(each.line() for each in binds))
    for name, value in args.limits:
        try:
            write(f"{directory}/cgroup/{name}", value)
        except OSError as error:
            text = os.strerror(error.errno or 0)
            raise ValueError(f"--limit {name}={value}: {text}") from None


def parse_limits(texts: list[str]) -> Limits:
    """NAME=VALUE each; ValueError, in one sentence, for what cannot be."""
    found: Limits = ()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--limit {text}: not NAME=VALUE")
        try:
            chosen = parse(name, value)
        except OSError as error:
            raise ValueError(f"--limit {text}: {error.strerror}") from None
        # Not where no hierarchy is to be seen, as inside: there the write tells.
        with contextlib.suppress(OSError):
            if not Hierarchies.detect().has(name):
                raise ValueError(f"--limit {text}: no controller of this host has it")
        if find(found, *key(name, chosen)):
            raise ValueError(f"--limit {text}: a second {name}")
        found = merged(found, name, chosen)
    return found


def wait_for(words: list[str]) -> int:
    """Run a program in our place: signals are its; returns its exit code, as a shell has it."""
    pid = 0

    def pass_on(number: int, frame: object) -> None:
        if pid:
            os.kill(pid, number)

    # Blocked until there is somebody to pass them on to.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    for each in PASSED_ON:
        signal.signal(each, pass_on)
    # What a terminal sends, it sends to the session program as well.
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda number, frame: None)
    pid = os.posix_spawn(words[0], words, os.environ, setsigmask=[], setsigdef=PASSED_ON)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        status = os.waitpid(pid, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            # The job is the two of us: stop with it, and go on with it.
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(pid, signal.SIGCONT)
            continue
        pid = 0
        code = os.waitstatus_to_exitcode(status)
        return 128 - code if code < 0 else code


def run(argv: list[str]) -> int:
    """`nsfs run`: make a container, run a command in it, remove it."""
    parser = Parser(
        prog="nsfs run", description="Make a container, run a command in it, remove it."
    )
    parser.add_argument("--rootfs", metavar="DIR", help="its root filesystem")
    parser.add_argument("--bind", metavar="SOURCE[:TARGET[:ro]]", action="append", default=[])
    parser.add_argument("--limit", metavar="NAME=VALUE", action="append", default=[])
    parser.add_argument("--keep", action="store_true", help="do not remove it")
    args, command = parser.parse(argv)
    directory = path_of(args.container)
    code = FAILED
    try:
        args.limits = parse_limits(args.limit)
        binds = [Bind.parse(each) for each in args.bind]
        check_binds(directory, args.rootfs, binds)
        os.mkdir(directory)
        try:
            build(directory, args, binds)
            code = wait_for(program(directory, None, command))
        finally:
            if not args.keep:
                shutil.rmtree(directory)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        print(f"nsfs: {args.container}: {text}", file=sys.stderr)
        return FAILED
    return code
