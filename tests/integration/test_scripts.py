"""scripts/setup, scripts/quickstart, scripts/test and .ci/run, as a user and CI run them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import SLOWNESS
from tests.programs import program

TOP = Path(__file__).parents[2]
PROGRAMS = ("nsfs-supervisor", "nsfs-spawner", "nsfs-init", "nsfs-enter", "nsfs-interposer.so")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(
    *command: str | Path, timeout_s: float = 50 * SLOWNESS, **settings: str
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command with `settings` in the environment."""
    ran = subprocess.run(
        command,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return ran.returncode, ran.stdout, ran.stderr


def unshared(script: str, *arguments: str | Path) -> list[str | Path]:
    """A command that runs a shell script in a mount and network namespace of its own."""
    return ["unshare", "-mn", "--propagation", "private", "sh", "-ec", script, "sh", *arguments]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the source tree without what was built, in a path with spaces."""
    copy = tmp_path / "source tree" / "nsfs"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "libexec", "*.so", "*.egg-info", ".*_cache"
    )
    shutil.copytree(TOP, copy, ignore=ignored, symlinks=True)
    return copy


# --- scripts/setup: when there is nothing to do, and what it says when it cannot ---


def test_setup_again_does_nothing() -> None:
    status, out, err = run(TOP / "scripts/setup", "--here")
    assert (status, out, err) == (0, f"==> ready: {TOP}/.venv/bin/nsfs\n", "")


def test_setup_from_elsewhere_and_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "a link"
    link.symlink_to(TOP / "scripts/setup")
    status, out, _ = run("sh", "-c", 'cd / && exec "$0" --here', link)
    assert (status, out) == (0, f"==> ready: {TOP}/.venv/bin/nsfs\n")


def test_setup_as_sudo_runs_it() -> None:
    status, out, err = run("env", "-i", f"PATH={PATH}", TOP / "scripts/setup", "--here")
    assert (status, out, err) == (0, f"==> ready: {TOP}/.venv/bin/nsfs\n", "")


def test_setup_made_the_programs_and_the_pages() -> None:
    for name in PROGRAMS:
        assert os.access(TOP / "nsfs/libexec" / name, os.X_OK), name
    for page in ("man5/nsfs.5", "man8/nsfs.8"):
        assert (TOP / ".venv/share/man" / page).read_text().count(".SH") > 0, page


def one_sentence(err: str) -> str:
    assert re.fullmatch(r"scripts/setup: [^\n]+[.]\n", err), err
    return err


def test_setup_with_an_unknown_argument() -> None:
    status, out, err = run(TOP / "scripts/setup", "--tset")
    assert (status, out) == (1, "")
    assert err.startswith("scripts/setup: unknown argument --tset\nusage: ")


def test_setup_needs_root() -> None:
    # Bound at a place that others can search, which the source tree need not be.
    script = """
        mount --bind "$1" /mnt
        cd /
        exec setpriv --reuid 65534 --clear-groups /mnt/scripts/setup
    """
    status, out, err = run(*unshared(script, TOP))
    assert (status, out) == (1, "")
    assert "not root" in one_sentence(err)
    assert "sudo scripts/setup" in err


def test_setup_needs_the_fuse_device() -> None:
    script = 'mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; exec "$1"'
    status, out, err = run(*unshared(script, TOP / "scripts/setup"))
    assert (status, out) == (1, "")
    assert "no /dev/fuse" in one_sentence(err)
    assert "CONFIG_FUSE_FS" in err


def test_setup_needs_cgroup2() -> None:
    script = """
        for directory in $(awk '$3 == "cgroup2" { print $2 }' /proc/mounts); do
            umount -l "$directory"
        done
        exec "$1"
    """
    status, out, err = run(*unshared(script, TOP / "scripts/setup"))
    assert (status, out) == (1, "")
    assert "no cgroup2 hierarchy is mounted" in one_sentence(err)


def programs_without(directory: Path, *absent: str, **instead: str) -> str:
    """A PATH of one directory: the system's programs but some, and shell scripts for others."""
    directory.mkdir()
    for source in map(Path, PATH.split(":")[2:4]):
        for each in source.iterdir():
            if each.name not in absent and not (directory / each.name).is_symlink():
                (directory / each.name).symlink_to(each)
    for name, script in instead.items():
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    return str(directory)


def test_setup_needs_a_new_python(clone: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" != -V ] || echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    path = programs_without(tmp_path / "bin", "python3", *(f"python3.{x}" for x in range(9, 20)))
    # Wherever else one is: at its place is the old one.
    script = 'mount --bind "$1" "$(readlink -f /usr/bin/python3)"; exec env PATH="$2" "$3"'
    status, out, err = run(*unshared(script, old, path, clone / "scripts/setup"))
    assert (status, out) == (1, "")
    assert "Python 3.11 or newer is needed, and this is Python 3.9.2" in one_sentence(err)
    assert "PYTHON=" in err


def test_setup_without_apt_says_which_packages(tmp_path: Path) -> None:
    path = programs_without(tmp_path / "bin", "apt-get", "dpkg-query", "gcc", "busybox")
    status, out, err = run(TOP / "scripts/setup", "--here", PATH=path)
    assert (status, out) == (1, "")
    assert "there is no apt-get here, and this is missing: gcc, busybox, so" in one_sentence(err)
    assert "libfuse3-dev" in err


def test_setup_without_apt_when_nothing_is_missing(tmp_path: Path) -> None:
    path = programs_without(tmp_path / "bin", "apt-get", "dpkg-query")
    status, out, err = run(TOP / "scripts/setup", "--here", PATH=path)
    assert (status, out, err) == (0, f"==> ready: {TOP}/.venv/bin/nsfs\n", "")


@pytest.mark.parametrize(
    "message",
    [
        "E: Failed to fetch a.deb  Temporary failure resolving 'mirror.invalid'",
        "E: Failed to fetch a.deb  Could not connect to localhost:1 - connection refused",
    ],
)
def test_setup_when_packages_cannot_be_fetched(tmp_path: Path, message: str) -> None:
    path = programs_without(
        tmp_path / "bin",
        **{"apt-get": f'echo "{message}" >&2; exit 100', "dpkg-query": "exit 1"},
    )
    status, out, err = run(TOP / "scripts/setup", "--here", PATH=path)
    assert status == 1
    assert out.startswith("==> installing ")
    assert "the network does not answer, and Debian packages have to be fetched" in one_sentence(
        err
    )


def test_setup_when_packages_cannot_be_installed(tmp_path: Path) -> None:
    path = programs_without(
        tmp_path / "bin",
        **{
            "apt-get": 'echo "E: You do not have enough space" >&2; exit 100',
            "dpkg-query": "exit 1",
        },
    )
    status, _, err = run(TOP / "scripts/setup", "--here", PATH=path)
    assert status == 1
    assert "E: You do not have enough space\n" in err
    assert err.splitlines()[-1].startswith("scripts/setup: Debian packages could not be installed")


def test_setup_installs_while_no_service_may_start(tmp_path: Path) -> None:
    asked = (
        "[ -x /usr/sbin/policy-rc.d ] && /usr/sbin/policy-rc.d x start; echo $? >> '%s'; exit 100"
    )
    path = programs_without(
        tmp_path / "bin",
        **{"apt-get": asked % (tmp_path / "asked"), "dpkg-query": "exit 1"},
    )
    policy = Path("/usr/sbin/policy-rc.d")
    before = policy.read_bytes() if policy.exists() else None
    status, _, _ = run(TOP / "scripts/setup", "--here", PATH=path)
    assert status == 1
    assert (tmp_path / "asked").read_text() == "101\n101\n"
    assert (policy.read_bytes() if policy.exists() else None) == before


@pytest.mark.timeout(120 * SLOWNESS)
def test_setup_without_network(clone: Path) -> None:
    # The packages are there, Python's are not: pip is what notices.
    script = 'exec env PIP_RETRIES=0 PIP_NO_CACHE_DIR=1 "$1" --here'
    status, out, err = run(*unshared(script, clone / "scripts/setup"), timeout_s=100 * SLOWNESS)
    assert status == 1
    assert "==> making .venv" in out
    assert "the network does not answer, and Python packages have to be fetched" in one_sentence(
        err
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_setup_of_a_clone_and_after_a_change(clone: Path) -> None:
    status, out, err = run(clone / "scripts/setup", "--here", timeout_s=500)
    assert (status, err) == (0, "")
    assert out.endswith(f"==> ready: {clone}/.venv/bin/nsfs\n")
    assert run(clone / ".venv/bin/nsfs", "--help")[0] == 0

    ready = f"==> ready: {clone}/.venv/bin/nsfs\n"
    program = clone / "nsfs/libexec/nsfs-init"
    before = program.stat().st_ino
    with (clone / "nsfs/csrc/init.c").open("a") as file:
        file.write("/* A change. */\n")
    assert run(clone / "scripts/setup", "--here") == (0, "==> compiling\n" + ready, "")
    assert program.stat().st_ino != before
    assert run(clone / "scripts/setup", "--here") == (0, ready, "")

    with (clone / "nsfs/csrc/init.c").open("a") as file:
        file.write("{\n")
    for _ in range(2):  # A failure is not taken for done.
        status, _, err = run(clone / "scripts/setup", "--here")
        assert status == 1
        assert "Traceback" not in err
        assert err.endswith("scripts/setup: compiling failed: the reason stands above.\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_programs_and_pages(clone: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env", timeout_s=100 * SLOWNESS)
    pip = tmp_path / "env/bin/pip"
    status, _, err = run(pip, "install", "--no-deps", "-q", clone, timeout_s=400)
    assert status == 0, err
    site = next((tmp_path / "env/lib").glob("python3*/site-packages/nsfs"))
    for name in PROGRAMS:
        assert os.access(site / "libexec" / name, os.X_OK), name
    assert list(site.glob("_syscalls.*.so"))
    for path in (
        "bin/nsfs",
        "share/man/man5/nsfs.5",
        "share/man/man8/nsfs.8",
        "share/doc/nsfs/nsfs.conf.example",
        "lib/systemd/system/nsfs.service",
    ):
        assert (tmp_path / "env" / path).exists(), path


# --- scripts/test and .ci/run ---


def test_test_passes_arguments_and_the_closing_line_on() -> None:
    status, out, _ = run(TOP / "scripts/test", "tests/unit/test_config.py", "-k", "frozen")
    assert status == 0
    assert re.search(r"=+ 1 passed, \d+ deselected in [^\n]* =+\n\Z", out)


PROBES = """
import logging, os, subprocess, pytest
{body}
"""


def run_probe(tmp_path: Path, body: str, must_run: str = "0") -> tuple[int, str]:
    """Run a test of its own, held to the conftest of the tests."""
    shutil.copy(TOP / "tests/conftest.py", tmp_path)
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    (tmp_path / "test_probe.py").write_text(PROBES.format(body=body))
    status, out, err = run(
        *(
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            tmp_path,
            tmp_path,
        ),
        NSFS_MUST_RUN=must_run,
    )
    return status, out + err


def test_skip_fails_where_everything_must_run(tmp_path: Path) -> None:
    body = "def test_it(): pytest.skip('no reason')"
    assert "1 skipped" in run_probe(tmp_path, body)[1]
    status, out = run_probe(tmp_path, body, must_run="1")
    assert status == 1
    assert "skipped, but NSFS_MUST_RUN=1: Skipped: no reason" in out
    status, out = run_probe(tmp_path, "pytest.importorskip('no_such')", must_run="1")
    assert status == 2
    assert "skipped, but NSFS_MUST_RUN=1: " in out


def test_without_root_there_is_one_sentence(tmp_path: Path) -> None:
    status, out = run_probe(tmp_path, "os.geteuid = lambda: 1000\ndef test_it(): pass")
    assert status == 4
    assert "ERROR: all tests but those of tests/unit need root: sudo scripts/test\n" in out
    assert "passed" not in out


def test_log_lines_fail_the_test_unless_expected(tmp_path: Path) -> None:
    body = """
def test_unexpected(): logging.getLogger("x").warning("it %s", "broke")
def test_info(): logging.getLogger("x").info("fine")
@pytest.mark.expected_log("WARNING x: it br.ke")
def test_marked(): logging.getLogger("x").warning("it broke")
def test_asked_for(expected_log):
    expected_log("^ERROR x: ")
    logging.getLogger("x").error("it broke")
"""
    status, out = run_probe(tmp_path, body)
    assert status == 1
    assert "unexpected log lines:\nWARNING x: it broke" in out
    assert re.search(r"^FAILED .*test_probe.py::test_unexpected\b", out, re.MULTILINE)
    assert "1 failed, 3 passed" in out


def test_leftovers_fail_the_session(tmp_path: Path) -> None:
    sleep = tmp_path / "nsfs-left"
    shutil.copy("/bin/sleep", sleep)
    body = f"""
def test_it():
    with open({str(tmp_path / "pid")!r}, "w") as file:
        pid = os.spawnv(os.P_NOWAIT, {str(sleep)!r}, ["sleep", "1000"])
        file.write(str(pid))
    # It is known by the name that it has once it is executed.
    name = ""
    while name != "nsfs-left\\n":
        with open(f"/proc/{{pid}}/comm") as file:
            name = file.read()
"""
    try:
        status, out = run_probe(tmp_path, body)
    finally:
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
    assert status == 1
    assert "1 passed, 1 error" in out
    assert f"process {pid} (nsfs-left)" in out.partition("the tests left behind:\n")[2]


def test_ci_run_passes_the_exit_status_on(clone: Path) -> None:
    """Of the tests here, then of those on another kernel; only that these take too long is no
    failure."""
    (clone / "scripts/vm").write_text("#!/bin/sh\nexit 0\n")
    for here, there, expected in ((0, 0, 0), (3, 0, 3), (0, 1, 1), (0, 124, 0), (0, 125, 125)):
        (clone / "scripts/test").write_text(
            '#!/bin/sh\necho "$CI $NSFS_MUST_RUN $1"; cat; '
            f'[ "$1" = --vm ] && exit {there}; exit {here}\n'
        )
        status, out, err = run("bash", clone / ".ci/run")
        assert status == expected
        attempts = 0 if here else 2 if expected else 1
        assert out == "true 1 \n" + "true 1 --vm\n" * attempts
        assert ("too slow" in err) == (there == 124)


# --- the rest ---


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    command = tmp_path / "nsfs"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    unit = (TOP / "systemd/nsfs.service").read_text()
    (tmp_path / "nsfs.service").write_text(unit.replace("=/usr/local/bin/nsfs ", f"={command} "))
    _, out, err = run(program("systemd-analyze"), "verify", "--man=no", tmp_path / "nsfs.service")
    assert "nsfs.service" not in out + err


def test_quickstart_twice(tmp_path: Path) -> None:
    # A /run of its own is another daemon's: the host's, if it has one, is not met.
    script = """
        mount -t tmpfs none /run
        "$1" --here
        "$1" --here
        "$2" umount --kill
    """
    status, out, err = run(*unshared(script, TOP / "scripts/quickstart", TOP / ".venv/bin/nsfs"))
    assert status == 0, out + err
    assert out.count(";hello from web\n") == 2
    assert out.count("\n$ rm -rf quickstart-shop\n") == 2
    assert "is served already." in out
