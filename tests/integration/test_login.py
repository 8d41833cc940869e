"""Sessions of a login daemon outside that run inside: sshd(8) and login(1).

sshd has a port in a network namespace of its own, and keys, configuration and users of its own in a
mount namespace; the machine's is not touched.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC
from tests.programs import program

from .conftest import SLOWNESS, Container, wait_until
from .terminal import Terminal, terminal

DEADLINE_S = 30.0 * SLOWNESS
PORT = 2222
USERS = """\
root:*:0:0:root:/root:/bin/sh
sshd:*:102:65534::/run/sshd:/usr/sbin/nologin
web:*:0:0::/:{shell}
forced:*:0:0::/:/bin/sh
alice:*:1234:1234::/:{shell}
"""
CONFIGURATION = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
AcceptEnv LC_ALL SECRET
Subsystem sftp /usr/lib/openssh/sftp-server
Match User forced
    ForceCommand {directory}/nsfs enter --ssh web
"""
# What mounts stay in this shell's namespace, which the instance and sshd are in; it ends with us.
BEGIN = """\
set -e
mount -t tmpfs -o mode=755 none /run
mount -t tmpfs none /var/log
mkdir /run/sshd
while mountpoint -q /sys/namespaces; do umount -l /sys/namespaces; done
mount --bind {directory}/passwd /etc/passwd
{directory}/nsfs mount --cgroup {group} --config {directory}/nsfs.conf ||
    {{ cat /run/nsfs/log; exit 1; }}
mkdir /sys/namespaces/web
chmod 777 /sys/namespaces
setpriv --reuid=1234 --regid=1234 --clear-groups mkdir /sys/namespaces/alice
chmod 755 /sys/namespaces
unshare -n sh -c 'ip link set lo up; exec {sshd} -D -e -f {directory}/config' &
echo $!
wait
"""


class Host:
    """A mount namespace with a tree, and an sshd in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.group = f"nsfs-test-{os.getpid()}-login"
        shutil.copy(LIBEXEC / "nsfs-enter", directory / "nsfs-enter")
        nsfs = directory / "nsfs"
        nsfs.write_text(
            f'#!/bin/sh\nexec {shlex.join([sys.executable, "-P", "-m", "nsfs.cli"])} "$@"\n'
        )
        nsfs.chmod(0o755)
        for name in ("host_key", "key"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
            subprocess.run(words, check=True)
        (directory / "passwd").write_text(USERS.format(shell=directory / "nsfs-enter"))
        (directory / "config").write_text(CONFIGURATION.format(port=PORT, directory=directory))
        (directory / "nsfs.conf").write_text("[log]\nfirewall_log = off\n")
        self.log = directory / "log"
        script = BEGIN.format(directory=directory, group=self.group, sshd=program("sshd"))
        with self.log.open("w") as log:
            self.shell = subprocess.Popen(
                ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.shell.stdout is not None
        line = self.shell.stdout.readline().strip()
        assert line.isdigit(), f"{line} {self.log.read_text()}"
        self.sshd = int(line)
        self.web = Container(Path(f"/proc/{self.shell.pid}/root/sys/namespaces/web"))
        self.alice = Container(self.web.path.parent / "alice")

    def inside(self, *words: str) -> list[str]:
        """A command line that runs where sshd does."""
        return ["nsenter", "-t", str(self.sshd), "-m", "-n", "--", *words]

    def ssh(self, user: str, *words: str, program: str = "ssh") -> list[str]:
        """The client's command line; for scp and sftp `user` and host are among the words."""
        options = [
            *("-F", "/dev/null", "-i", str(self.directory / "key")),
            *("-P" if program != "ssh" else "-p", str(PORT)),
        ]
        for each in (
            *("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"),
            *("IdentitiesOnly=yes", "ConnectTimeout=10"),
        ):
            options += ["-o", each]
        to = [f"{user}@127.0.0.1"] if program == "ssh" else []
        return self.inside(program, *options, *to, *words)

    def run(self, user: str, *words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        """Run a command by ssh."""
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            self.ssh(user, *words),
            **{"input": b"", "capture_output": True, "timeout": DEADLINE_S, **options},
        )

    def close(self) -> None:
        """End all of it."""
        words = [str(self.directory / "nsfs"), "umount", "--kill"]
        done = subprocess.run(
            ["nsenter", "-t", str(self.shell.pid), "-m", "--", *words], capture_output=True
        )
        # Its shell waits for sshd, and the mount namespace ends with both.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.sshd, signal.SIGTERM)
        self.shell.communicate(timeout=DEADLINE_S)
        assert done.returncode == 0, done


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A host on which one can log in."""
    # Not below pytest's own, which each run of pytest closes to other users.
    with tempfile.TemporaryDirectory(prefix="nsfs-", dir="/tmp") as base:
        os.chmod(base, 0o755)
        host = Host(Path(base))
        try:
            wait_until(lambda: host.run("web", "true").returncode == 0, "sshd answers")
            yield host
        finally:
            host.close()


def gone(container: Container) -> None:
    """Wait until nobody is in it any more."""
    wait_until(lambda: container.state()["procs"] == "0", "nobody is in it")


USERS_OF_WEB = ("web", "forced")
"""By its login shell, and by ForceCommand."""


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_a_command_its_output_and_its_exit_status(host: Host, user: str) -> None:
    done = host.run(user, "hostname; id -u; echo error >&2; exit 33")
    assert (done.returncode, done.stdout, done.stderr) == (33, b"web\n0\n", b"error\n")
    assert host.run(user, "kill -9 $$").returncode == 137
    assert host.run(user, "no-such-program").returncode == 127
    gone(host.web)


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_a_shell_that_is_fed_its_script(host: Host, user: str) -> None:
    done = host.run(user, input=b"hostname; exit 5\n")
    assert (done.returncode, done.stdout) == (5, b"web\n")


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_bytes_pass_as_they_are(host: Host, user: str) -> None:
    data = bytes(range(256)) * 4 + os.urandom(3_000_000)
    assert host.run(user, "cat", input=data).stdout == data
    done = host.run(user, "wc -c; head -c 2000000 /dev/zero", input=data)
    assert done.stdout == f"{len(data)}\n".encode() + bytes(2_000_000)


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_scp_and_sftp(host: Host, user: str, tmp_path: Path) -> None:
    data = os.urandom(500_000)
    (tmp_path / "there").write_bytes(data)
    remote = f"{user}@127.0.0.1:/tmp/file"
    for protocol in ("-O", "-s"):
        for source, target in ((tmp_path / "there", remote), (remote, tmp_path / "back")):
            words = host.ssh("", "-q", protocol, str(source), str(target), program="scp")
            subprocess.run(words, check=True, timeout=DEADLINE_S)
        assert (tmp_path / "back").read_bytes() == data
        assert host.web.run("wc -c < /tmp/file; rm /tmp/file") == "500000\n"
    assert not Path("/tmp/file").exists()


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_on_a_terminal(host: Host, user: str) -> None:
    with terminal(*host.ssh(user, "-tt")) as outer:
        outer.resize(33, 99)
        outer.expect("# ")
        outer.run("hostname; tty", r"web\r\n/dev/pts/\d+\r\n")
        outer.expect("# ")
        outer.run("stty size", r"33 99\r")
        outer.expect("# ")
        outer.resize(22, 77)
        wait_until(lambda: size_is(outer, "22 77"), "the new size is known inside")
        outer.run("echo sle''eping; sleep 1000", "sleeping")
        time.sleep(0.3)
        outer.send("\x03")
        outer.expect("# ")
        outer.run("echo al''ive", "alive")
        outer.expect("# ")
        outer.run("exit 33", "")
        assert outer.wait() == 33
    gone(host.web)


def size_is(outer: Terminal, size: str) -> bool:
    """Whether the terminal inside has that size."""
    outer.run("stty size; echo as''ked", "asked")
    outer.expect("# ")
    return size in outer.text


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_a_command_on_a_terminal(host: Host, user: str) -> None:
    with terminal(*host.ssh(user, "-tt", "tty; exit 7")) as outer:
        outer.expect("/dev/pts/")
        assert outer.wait() == 7


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_the_connections_end_is_a_hangup(host: Host, user: str) -> None:
    with terminal(*host.ssh(user, "-tt", "echo be''gun; trap '' TERM; sleep 1000")) as outer:
        outer.expect("begun")
        assert host.web.state()["procs"] != "0"
    gone(host.web)
    # Without a terminal it is the end of its input, as outside.
    with subprocess.Popen(
        host.ssh(user, "echo begun; cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.kill()
    gone(host.web)


@pytest.mark.parametrize("user", USERS_OF_WEB)
def test_what_ssh_has_set_stays_outside(host: Host, user: str) -> None:
    done = host.run(
        user, "-o", "SendEnv=SECRET LC_ALL", "env", env={**os.environ, "SECRET": "x", "LC_ALL": "C"}
    )
    found = dict(line.split("=", 1) for line in done.stdout.decode().splitlines() if "=" in line)
    assert found["LC_ALL"] == "C"
    assert not {"SECRET", "SSH_CLIENT", "SSH_CONNECTION", "SSH_ORIGINAL_COMMAND"} & set(found)


def test_a_user_without_privilege(host: Host) -> None:
    done = host.run("alice", "hostname; id -u; exit 4")
    assert (done.returncode, done.stdout) == (4, b"alice\n0\n"), done
    with terminal(*host.ssh("alice", "-tt")) as outer:
        outer.run("hostname", "alice")
        outer.run("exit 5", "")
        assert outer.wait() == 5


def test_the_daemon_may_die_meanwhile(host: Host) -> None:
    with terminal(*host.ssh("web", "-tt")) as outer:
        outer.expect("# ")
        pid = int(Path(f"/proc/{host.shell.pid}/root/run/nsfs/daemon.pid").read_text())
        os.kill(pid, 9)
        outer.run("hostname", r"web\r")
        outer.run("exit 3", "")
        assert outer.wait() == 3


def test_login(host: Host) -> None:
    with terminal(*host.inside("setsid", "-c", "-w", program("login"), "-f", "web")) as outer:
        outer.run("hostname; id -u; tty", r"web\r\n0\r\n/dev/pts/\d+\r")
        # As a login shell: /etc/profile was read.
        outer.run('echo "<$0>"', r"<-?/?(bin/)?sh>")
        outer.run("exit 0", "")
        assert outer.wait() == 0
    gone(host.web)
