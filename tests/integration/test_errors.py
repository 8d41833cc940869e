"""Each errno of nsfs(5), ERRORS: which tests provoke it, and those that no other file has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from nsfs.spawner import LIBEXEC

from .conftest import DEADLINE_S, Container, refused, wait_until, write

TESTS = Path(__file__).parents[1]
MANUAL = TESTS.parent / "man/nsfs.5.rst"
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2

PROVOKED = {
    "E2BIG": (
        "integration/test_tree.py::test_values_that_are_refused_change_nothing",
        "integration/test_errors.py::test_a_command_that_is_too_long",
    ),
    "EACCES": (
        "integration/test_matrix.py::test_everybody_against_everything",
        "integration/test_delegation.py::test_descriptors_do_not_outlast_authority",
        "integration/test_tree.py::test_values_that_are_refused_change_nothing",
    ),
    "EAGAIN": (
        "integration/test_errors.py::test_no_more_processes",
        "integration/test_kmsg.py::test_nonblocking_reads_end_with_eagain",
        "integration/test_errors.py::test_more_than_may_wait_for_a_namespace",
    ),
    "EBUSY": (
        "integration/test_tree.py::test_rmdir_of_what_is_idle_busy_or_nested",
        "integration/test_errors.py::test_while_it_is_frozen",
        "integration/test_enter.py::test_what_nsfs_cannot_do_is_125",
        "fault/test_takeover.py::more_readers_than_slots",
    ),
    "EEXIST": (
        "integration/test_tree.py::test_names_that_cannot_be",
        "integration/test_tree.py::test_mv_renames_while_it_runs",
    ),
    "EFBIG": (
        "integration/test_views.py::test_a_table_of_mounts_that_is_too_long",
        "integration/test_views.py::test_more_routes_than_are_shown",
    ),
    "EINTR": ("integration/test_errors.py::test_a_signal_while_it_waits",),
    "EINVAL": (
        "integration/test_tree.py::test_values_that_are_refused_change_nothing",
        "integration/test_tree.py::test_names_that_cannot_be",
        "integration/test_tree.py::test_modes_and_what_they_mean",
        "integration/test_errors.py::test_a_record_that_is_too_long",
        "integration/test_errors.py::test_flags_of_rename",
    ),
    "EIO": (
        "integration/test_errors.py::test_proc_kmsg_cannot_be_written",
        "unit/test_fs.py::test_a_defect_is_eio_and_logged",
    ),
    "EISDIR": ("integration/test_errors.py::test_files_and_directories",),
    "ENOTDIR": ("integration/test_errors.py::test_files_and_directories",),
    "ENAMETOOLONG": (
        "integration/test_tree.py::test_names_that_cannot_be",
        "integration/test_network.py::test_names_that_cannot_be",
    ),
    "ENFILE": (
        "unit/test_fs.py::test_that_the_daemon_may_open_no_more_files_is_not_the_callers_doing",
    ),
    "ENODEV": (
        "integration/test_tree.py::test_a_dead_container_says_enodev_and_can_be_removed",
        "integration/test_errors.py::test_removed_while_it_is_open",
    ),
    "ENOENT": (
        "integration/test_tree.py::test_values_that_are_refused_change_nothing",
        "integration/test_errors.py::test_removed_while_it_is_open",
        "integration/test_construction.py::test_rootfs_errors",
    ),
    "ENOEXEC": ("integration/test_errors.py::test_no_program",),
    "ENOSPC": (
        "integration/test_construction.py::test_failed_makes_leave_nothing",
        "integration/test_delegation.py::test_the_number_of_a_users_containers",
        "integration/test_delegation.py::test_the_number_of_a_users_ranges",
    ),
    "ENOTTY": ("integration/test_console.py::test_what_is_wrong",),
    "ENXIO": ("integration/test_console.py::test_what_is_wrong",),
    "ENOTEMPTY": (
        "integration/test_tree.py::test_rmdir_of_what_is_idle_busy_or_nested",
        "integration/test_remove.py::test_rm_of_a_file_or_of_what_is_in_it_harms_nothing",
    ),
    "EOPNOTSUPP": (
        "integration/test_cgroup.py::test_each_file_is_read_or_no_controller_has_it",
        "integration/test_errors.py::test_extended_attributes",
    ),
    "EPERM": (
        "integration/test_tree.py::test_no_file_can_be_made",
        "integration/test_tree.py::test_mv_renames_while_it_runs",
        "integration/test_construction.py::test_a_map_beyond_the_parents_is_refused",
        "integration/test_construction.py::test_a_tree_that_others_can_reach_is_refused",
        "integration/test_matrix.py::test_everybody_against_everything",
        "integration/test_neighbours.py::"
        "test_a_copy_in_another_mount_namespace_is_not_removed_by_mistake",
        "integration/test_enter.py::test_what_nsfs_cannot_do_is_125",
        "integration/test_delegation.py::test_ids_that_are_not_the_users",
        "integration/test_kmsg.py::test_whose_log_it_is",
    ),
    "EPIPE": ("integration/test_errors.py::test_a_record_that_was_overwritten",),
    "ERANGE": ("integration/test_tree.py::test_values_that_are_refused_change_nothing",),
    "ESTALE": ("integration/test_remove.py::test_gone_from_inside_for_who_is_removing_it_outside",),
    "ETIMEDOUT": ("integration/test_blocked.py::test_mkdir_does_not_wait_for_ever",),
    "EXDEV": ("integration/test_construction.py::test_a_writer_with_mounts_of_its_own",),
}


OF_ENTRIES = {
    "nsproxy/ ENODEV": "test_tree.py::test_a_dead_container_says_enodev_and_can_be_removed",
    "namespaces EPERM": "test_errors.py::test_the_hosts_namespaces_are_not_to_be_shared",
    "init ENODEV": "test_tree.py::test_a_dead_container_says_enodev_and_can_be_removed",
    "exec ENOENT": "test_tree.py::test_values_that_are_refused_change_nothing",
    "exec EACCES": "test_tree.py::test_values_that_are_refused_change_nothing",
    "exec ENOEXEC": "test_errors.py::test_no_program",
    "nsfs.log ERANGE": "test_log_limits.py::test_what_is_wrong",
    "nsfs.log EOPNOTSUPP": "test_log_limits.py::test_one_that_is_shared",
    "nflog EBUSY": "test_errors.py::test_a_group_that_another_program_has",
    "nflog EOPNOTSUPP": "test_errors.py::test_groups_of_a_network_that_is_shared",
    "rootfs EBUSY": "test_errors.py::test_what_is_not_idle_is_not_built_anew",
    "seccomp EPERM": "test_syslog.py::test_the_switch",
    "seccomp EBUSY": "test_syslog.py::test_the_switch",
    "binds EPERM": "test_mounts.py::test_an_idmapped_bind_leaves_no_setuid_programs_for_others",
    "binds EOPNOTSUPP": "test_mounts.py::test_binds_of_a_container_that_shares_its_mounts",
    "mnt/mounts EFBIG": "test_views.py::test_a_table_of_mounts_that_is_too_long",
    "mnt/propagation EBUSY": "test_mounts.py::test_propagation_errors",
    "pid/max EOPNOTSUPP": "test_views.py::test_pid_max",
    "pid/max EPERM": "test_views.py::test_pid_max",
    "time/boottime EBUSY": "test_views.py::test_time_is_set_while_idle_and_as_the_kernel_allows",
    "time/boottime EOPNOTSUPP": "test_views.py::test_time_is_set_while_idle_and_as_the_kernel_allows",
    "time/boottime ERANGE": "test_views.py::test_time_is_set_while_idle_and_as_the_kernel_allows",
    "cgroup/io.max ENODEV": "test_cgroup.py::test_a_limit_of_a_disk",
    "cgroup/memory.max EBUSY": "test_cgroup.py::test_less_memory_than_there_is_in_use",
    "uts/hostname EINVAL": "test_tree.py::test_values_that_are_refused_change_nothing",
    "uts/hostname ERANGE": "test_tree.py::test_values_that_are_refused_change_nothing",
}
"""What CONTROL FILES has below an entry."""


def test_each_errno_of_the_manual_is_provoked_by_a_test() -> None:
    section = MANUAL.read_text().split("\nERRORS\n======\n", 1)[1].split("\nFILES\n", 1)[0]
    heads = [line for line in section.splitlines() if re.fullmatch(r"\*\*E[A-Z0-9]+\*\*.*", line)]
    named = {name for head in heads for name in re.findall(r"\*\*(E[A-Z0-9]+)\*\*", head)}
    assert named == set(PROVOKED)
    for tests in PROVOKED.values():
        for test in tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (TESTS / file).read_text(), test


def test_each_errno_of_an_entry_is_provoked_by_a_test() -> None:
    section = MANUAL.read_text().split("\nCONTROL FILES\n====", 1)[1].split("\nPODS\n====", 1)[0]
    named = [
        f"{name} {errno_}"
        for name, body in re.findall(
            r"^``([a-z/._]+)``.*\n((?:    .*\n|\n)+)", section, re.MULTILINE
        )
        for errno_ in re.findall(r"\*\*(E[A-Z0-9]{3,})\*\*", body)
    ]
    assert sorted(named) == sorted(OF_ENTRIES)
    for test in OF_ENTRIES.values():
        file, _, name = test.partition("::")
        text = (TESTS / "integration" / file).read_text()
        assert f"def {name}(" in text, test


def test_the_hosts_namespaces_are_not_to_be_shared(tree: Path, web: Container) -> None:
    for value in ("net own", "net web"):
        refused(errno.EPERM, write, tree / "namespaces", value)


def test_what_is_not_idle_is_not_built_anew(web: Container, tmp_path: Path) -> None:
    web.start("sleep", "1000")
    before = web.init
    for name, value in (
        ("rootfs", str(tmp_path)),
        ("idmap", "host"),
        ("unshare", "mnt pid user"),
        ("seccomp", "deny"),
        ("network", "veth"),
    ):
        now = web.read(name)
        refused(errno.EBUSY, web.write, name, value)
        assert (web.read(name), web.init) == (now, before)


def test_a_command_that_is_too_long(web: Container) -> None:
    words = [LIBEXEC / "nsfs-enter", web.path, "--", "true", *["x" * 100_000] * 15]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 125
    assert os.strerror(errno.E2BIG) in done.stderr


def test_no_more_processes(web: Container) -> None:
    os.mkdir(web / "db")
    db = Container(web / "db")
    # The init's two are all.
    db.write("cgroup/pids.max", "2")
    refused(errno.EAGAIN, db.write, "exec", "true")
    refused(errno.EAGAIN, os.mkdir, db / "nested")
    assert not (db / "nested").exists()
    db.write("cgroup/pids.max", "max")
    assert db.run("echo works") == "works\n"


def test_while_it_is_frozen(web: Container) -> None:
    web.write("freeze", "1")
    refused(errno.EBUSY, web.write, "exec", "true")
    refused(errno.EBUSY, os.mkdir, web / "db")
    refused(errno.EBUSY, web.write, "unshare", "mnt pid user")
    refused(errno.EBUSY, web.write, "idmap", "host")
    web.write("freeze", "0")
    os.mkdir(web / "db")


def test_a_signal_while_it_waits(web: Container) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(8192)
    fd = os.open(f"/proc/{web.init}/root/dev/kmsg", os.O_RDONLY)
    # Without SA_RESTART, as Python installs handlers.
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        assert libc.read(fd, buffer, 8192) == -1
        assert ctypes.get_errno() == errno.EINTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(fd)


def test_a_record_that_is_too_long(web: Container) -> None:
    for path in (web / "kmsg", Path(f"/proc/{web.init}/root/dev/kmsg")):
        fd = os.open(path, os.O_WRONLY)
        try:
            refused(errno.EINVAL, os.write, fd, b"x" * 1025)
            assert os.write(fd, b"x" * 1024) == 1024
        finally:
            os.close(fd)
    assert web.read("kmsg").count("\n") == 2


def test_flags_of_rename(tree: Path, web: Container) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def renameat2(source: Path, target: Path, flags: int) -> int:
        done = libc.renameat2(-100, os.fsencode(source), -100, os.fsencode(target), flags)
        return ctypes.get_errno() if done else 0

    os.mkdir(tree / "other")
    assert renameat2(web.path, tree / "other", RENAME_EXCHANGE) == errno.EINVAL
    assert renameat2(web.path, tree / "other", RENAME_NOREPLACE) == errno.EEXIST
    assert renameat2(web.path, tree / "shop", RENAME_NOREPLACE) == 0
    assert {"shop", "other"} <= set(os.listdir(tree))


def test_proc_kmsg_cannot_be_written(web: Container) -> None:
    fd = os.open(f"/proc/{web.init}/root/proc/kmsg", os.O_WRONLY)
    try:
        refused(errno.EIO, os.write, fd, b"x")
    finally:
        os.close(fd)


def test_files_and_directories(web: Container) -> None:
    refused(errno.EISDIR, os.open, web.path, os.O_WRONLY)
    refused(errno.EISDIR, os.open, web / "procs", os.O_RDWR)
    refused(errno.EISDIR, os.unlink, web.path)
    refused(errno.ENOTDIR, os.open, web / "state" / "x", os.O_RDONLY)
    refused(errno.ENOTDIR, os.rmdir, web / "state")
    refused(errno.ENOTDIR, os.mkdir, web / "state" / "x")


def test_removed_while_it_is_open(web: Container) -> None:
    directory = os.open(web.path, os.O_RDONLY | os.O_DIRECTORY)
    files = [os.open(web / name, os.O_RDONLY) for name in ("init", "rootfs", "cgroup/cpu.stat")]
    freeze = os.open(web / "freeze", os.O_WRONLY)
    try:
        os.rmdir(web.path)
        for fd in files:
            refused(errno.ENODEV, os.read, fd, 4096)
        refused(errno.ENODEV, os.write, freeze, b"1\n")
        refused(errno.ENOENT, lambda: os.mkdir("db", dir_fd=directory))
        refused(errno.ENOENT, os.mkdir, web / "db")
    finally:
        for fd in (directory, freeze, *files):
            os.close(fd)


def test_no_program(web: Container) -> None:
    web.run(r"printf '\1\2\3\4' > /tmp/garbage; : > /tmp/empty; chmod 755 /tmp/*")
    for name in ("garbage", "empty"):
        refused(errno.ENOEXEC, web.write, "exec", f"/tmp/{name}")
    assert web.state()["reason"].startswith("exec: ")


def test_extended_attributes(web: Container) -> None:
    for path in (web.path, web / "state"):
        refused(errno.EOPNOTSUPP, os.getxattr, path, "user.x")
        refused(errno.EOPNOTSUPP, os.setxattr, path, "user.x", b"1")


def test_a_record_that_was_overwritten(web: Container) -> None:
    web.write("nsfs.log", "bytes 4096\nrate max\nburst max")
    write(web / "kmsg", "first")
    fd = os.open(f"/proc/{web.init}/root/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert b";first" in os.read(fd, 8192)
        for number in range(200):
            write(web / "kmsg", f"number {number} of those that take the place of what was there")
        refused(errno.EPIPE, os.read, fd, 8192)
        # Then the oldest that there is.
        assert b";number " in os.read(fd, 8192)
    finally:
        os.close(fd)


def test_what_could_not_be_done_is_told(web: Container) -> None:
    refused(errno.ENOENT, web.write, "exec", "nowhere")
    assert "No such file" in web.state()["reason"]
    web.write("exec", "true")
    wait_until(lambda: web.state()["populated"] == "0", "it ended")
    assert web.state()["reason"] == "-"


STOPPER = """
import os, signal
known = set(os.listdir("/proc"))
os.write(1, b"ready\\n")
while True:
    for pid in set(os.listdir("/proc")) - known:
        try:
            os.kill(int(pid), signal.SIGSTOP)
        except (ProcessLookupError, ValueError):
            pass
"""


def test_more_than_may_wait_for_a_namespace(tree: Path, web: Container, tmp_path: Path) -> None:
    """Its root stops the processes that look into it."""
    web.start("python3", "-c", STOPPER)
    wait_until(lambda: web.read("output") == "ready\n", "it is ready")
    os.mkdir(tree / "other")
    script = 'while cat "$0" > /dev/null 2> "$1"; do :; done'
    errors = [tmp_path / str(number) for number in range(5)]
    shells = [
        subprocess.Popen(["sh", "-c", script, web / "pid/max", each], start_new_session=True)
        for each in errors
    ]
    try:
        wait_until(lambda: any(each.poll() is not None for each in shells), "one is refused")
        (said,) = filter(None, (each.read_text() for each in errors))
        assert os.strerror(errno.EAGAIN) in said
        assert int((tree / "other/pid/max").read_text()) > 0
    finally:
        for each in shells:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()


TAKES_A_GROUP = """
import socket, sys
from nsfs import nflog
taken = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)  # NETLINK_NETFILTER
for message in nflog.bind_messages(5):
    taken.send(message)
    assert not any(answer for answer in nflog.parse(taken.recv(65536)))
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_group_that_another_program_has(web: Container) -> None:
    web.write("nflog", "6")
    words = ["nsenter", f"--net=/proc/{web.init}/ns/net", sys.executable, "-c", TAKES_A_GROUP]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        refused(errno.EBUSY, web.write, "nflog", "5 6")
        assert web.read("nflog") == "6\n"
        in_net = ["nsenter", f"--net=/proc/{web.init}/ns/net"]
        rule = [
            "OUTPUT",
            "-p",
            "udp",
            "-j",
            "NFLOG",
            "--nflog-group",
            "6",
            "--nflog-prefix",
            "six ",
        ]
        subprocess.run([*in_net, "iptables", "-A", *rule], check=True)
        web.run('python3 -c \'import socket; socket.socket(2, 2).sendto(b"x", ("127.0.0.1", 9))\'')
        # What was subscribed before still is.
        wait_until(lambda: ";six " in web.read("kmsg"), "the packet is logged")
        other.communicate()
    web.write("nflog", "5 6")
    assert web.read("nflog") == "5 6\n"


def test_groups_of_a_network_that_is_shared(web: Container) -> None:
    web.write("unshare", "cgroup ipc mnt pid syslog time user uts")
    refused(errno.EOPNOTSUPP, web.write, "nflog", "5")
    assert web.read("nflog") == ""
