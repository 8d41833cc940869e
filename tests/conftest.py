"""What every test is held to: it runs, it logs nothing unexpected, it leaves nothing behind."""

import logging
import os
import re
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no reason to fail.
settings.register_profile("nsfs", deadline=None)
settings.load_profile("nsfs")
MUST_RUN = os.environ.get("NSFS_MUST_RUN") == "1"
# In the environment of every process that the tests start, to tell them from another run's.
RUN_VARIABLE = "NSFS_TEST_RUN"
# What is on its way out when the last test ends: killed processes, lazily detached mounts.
LEAVE_S = 25.0 if os.environ.get("NSFS_VM") == "1" else 5.0

UNIT = Path(__file__).parent / "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests mount and make namespaces, but for those of units."""
    if os.geteuid() != 0 and any(UNIT not in item.path.parents for item in items):
        raise pytest.UsageError("all tests but those of tests/unit need root: sudo scripts/test")


# --- a skipped test has failed, where NSFS_MUST_RUN says so ---


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure has the outcome "skipped" as well, but it did run.
    if MUST_RUN and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, but NSFS_MUST_RUN=1: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


# --- a log line at warning or above that the test did not expect fails it ---


class _Lines(logging.Handler):
    """The lines at warning or above of one test, and the expressions that allow some of them."""

    def __init__(self, expected: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.expected = expected
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def check(self) -> None:
        lines, self.lines = self.lines, []
        unexpected = [x for x in lines if not any(re.search(e, x) for e in self.expected)]
        if unexpected:
            pytest.fail("unexpected log lines:\n" + "\n".join(unexpected), pytrace=False)


LINES = pytest.StashKey[_Lines]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    expected = [str(mark.args[0]) for mark in item.iter_markers("expected_log")]
    lines = item.stash[LINES] = _Lines(expected)
    logging.getLogger().addHandler(lines)
    try:
        return (yield)
    finally:
        logging.getLogger().removeHandler(lines)


def _check_lines(item: pytest.Item) -> Generator[None, object, object]:
    # Not after a phase that failed: its own reason is the one to be shown.
    result = yield
    item.stash[LINES].check()
    return result


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_check_lines)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_check_lines)
pytest_runtest_teardown = pytest.hookimpl(wrapper=True)(_check_lines)


@pytest.fixture
def expected_log(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Call it with a regular expression: log lines that match it are part of the test."""
    lines: _Lines = request.node.stash[LINES]
    return lines.expected.append


# --- nothing is left behind ---


def _mounts() -> set[str]:
    """The mounts of type fuse.namespaces that this process sees."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        if after.split()[0] == "fuse.namespaces":
            fields = before.split()
            found.add(f"mount {fields[0]} at {fields[4]}")
    return found


def _is_living_runs(group: str) -> bool:
    """Whether a group is called after the PID of another run (nsfs-test-PID-N) that goes on."""
    pids = (pid for pid in re.findall(r"\d+", group) if int(pid) != os.getpid())
    return any(Path(f"/proc/{pid}").exists() for pid in pids)


def _groups() -> set[str]:
    """The groups of the unified hierarchy with a name that begins with nsfs, other runs' aside."""
    found = set()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, directory, kind, _ = line.split(" ", 3)
        if kind == "cgroup2":
            for path, names, _ in os.walk(directory):
                ours = {name for name in names if name.startswith("nsfs")}
                found |= {f"cgroup {path}/{name}" for name in ours if not _is_living_runs(name)}
                # What is below is not another thing left behind.
                names[:] = set(names) - ours
    return found


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _is_ours(pid: int) -> bool:
    """Whether a process, or one that it descends from, was started by this run of the tests.

    A container's init whose spawner has ended does not show it, but its cgroup is found.
    """
    mark = f"{RUN_VARIABLE}={os.environ[RUN_VARIABLE]}".encode()
    while pid > 1:
        if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return True
        pid = int(_status(pid)["PPid"])
    return False


def _processes() -> set[str]:
    """The processes of this run with a name that begins with nsfs-."""
    found = set()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            name = _status(int(directory.name))["Name"]
            if name.startswith("nsfs-") and _is_ours(int(directory.name)):
                found.add(f"process {directory.name} ({name})")
        except (FileNotFoundError, ProcessLookupError):
            pass  # It has just ended.
    return found


def _all() -> set[str]:
    return _mounts() | _groups() | _processes()


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail the session when a mount, process or cgroup of nsfs is there that was not before."""
    os.environ[RUN_VARIABLE] = f"{os.getpid()}-{time.time_ns()}"
    before = _all()
    yield
    deadline_s = time.monotonic() + LEAVE_S
    while left := sorted(_all() - before):
        if time.monotonic() > deadline_s:
            pytest.fail("the tests left behind:\n" + "\n".join(left), pytrace=False)
        time.sleep(0.05)
