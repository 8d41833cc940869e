#!/usr/bin/env python3
"""What this kernel has of what nsfs needs or can use, found out by trying it. Needs root.

Prints a line `NAME yes|no DETAIL` for each fact. Exit status 1 if one fails that nsfs cannot do
without. It changes nothing outside namespaces and cgroups of its own, but is meant for the machine
of scripts/vm: `scripts/vm run tests/vm/facts.py`.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# System call numbers are those of x86-64; from 424 on they are the same on all architectures.
SYS_BPF = 321
SYS_SECCOMP = 317
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_FSOPEN = 430
SYS_FSCONFIG = 431
SYS_FSMOUNT = 432
SYS_CLONE3 = 435
SYS_MOUNT_SETATTR = 442
SYS_STATMOUNT = 457

MS_REC = 0x4000
MS_PRIVATE = 0x40000
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_BENEATH = 0x200
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_IDMAP = 0x100000
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
CLONE_PIDFD = 0x1000
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x80
CLONE_INTO_CGROUP = 0x200000000

CGROUP = Path("/sys/fs/cgroup")
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library; its errno as an OSError that names it."""
    result = int(getattr(libc, name)(*arguments))
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
    return result


def syscall(number: int, *arguments: object) -> int:
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return call("syscall", ctypes.c_long(number), *longs)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(errno.EIO, (done.stdout + done.stderr).strip() or f"exit {done.returncode}")
    return done.stdout.strip()


@contextlib.contextmanager
def cgroup() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="nsfs-facts.", dir=CGROUP))
    try:
        yield path
    finally:
        (path / "cgroup.kill").write_text("1")
        events = path / "cgroup.events"
        with events.open() as file:
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            while "populated 1" in events.read_text():
                poll.poll(100)
        path.rmdir()


@contextlib.contextmanager
def user_namespace(uid_map: str) -> Iterator[int]:
    """A descriptor of a new user namespace that has this map for users and groups."""
    ready_r, ready_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ready_r)
        with contextlib.suppress(OSError):
            call("unshare", CLONE_NEWUSER)
            os.write(ready_w, b".")
        signal.pause()
        os._exit(1)
    try:
        os.close(ready_w)
        if not os.read(ready_r, 1):
            raise OSError(errno.EIO, "no user namespace")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(uid_map)
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        os.close(ready_r)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def idmapped(path: str, uid_map: str, attributes: int = 0) -> int:
    """A detached, idmapped copy of the mount at `path`."""
    tree_fd = syscall(SYS_OPEN_TREE, AT_FDCWD, path.encode(), OPEN_TREE_CLONE | os.O_CLOEXEC)
    with user_namespace(uid_map) as user_fd:
        attr = struct.pack("<QQQQ", MOUNT_ATTR_IDMAP | attributes, 0, 0, user_fd)
        syscall(SYS_MOUNT_SETATTR, tree_fd, b"", AT_EMPTY_PATH, attr, len(attr))
    return tree_fd


def in_child(function: Callable[[], None]) -> None:
    """Runs `function` in a process of its own; an OSError there is raised here."""
    result_r, result_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except OSError as error:
            os.write(result_w, f"{error.errno or 5} {error.strerror}: {error.filename}".encode())
        finally:
            os._exit(0)
    os.close(result_w)
    with open(result_r) as file:
        text = file.read()
    os.waitpid(pid, 0)
    if text:
        number, message = text.split(" ", 1)
        raise OSError(int(number), message)


def private_mounts() -> None:
    call("unshare", CLONE_NEWNS)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)


def expect(error: int, function: Callable[[], object]) -> None:
    try:
        function()
    except OSError as raised:
        if raised.errno == error:
            return
        raise
    raise OSError(errno.EIO, f"no {errno.errorcode[error]}")


# ---- facts: each returns the detail to print, or raises OSError ----


def import_time() -> str:
    started = time.monotonic()
    run(sys.executable, "-c", "import cffi, pyfuse3, trio")
    return f"{time.monotonic() - started:.2f} s"


HELLO = """
import os, pyfuse3, stat, sys, trio
class Hello(pyfuse3.Operations):
    async def getattr(self, inode, ctx=None):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755 if root else stat.S_IFREG | 0o644
        entry.st_size = 4096
        return entry
    async def lookup(self, parent, name, ctx=None):
        if name != b"hello":
            raise pyfuse3.FUSEError(2)
        return await self.getattr(2)
    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, direct_io=True)
    async def read(self, fh, offset, size):
        return b"hello\\n"[offset : offset + size]
pyfuse3.init(Hello(), sys.argv[1], {"fsname=nsfs-facts", *pyfuse3.default_options})
trio.run(pyfuse3.main)
pyfuse3.close()
"""


@contextlib.contextmanager
def hello_filesystem() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        daemon = subprocess.Popen([sys.executable, "-c", HELLO, directory])
        try:
            deadline = time.monotonic() + 20
            while not os.path.ismount(directory):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise OSError(errno.EIO, "the daemon did not mount")
                time.sleep(0.02)
            yield Path(directory)
        finally:
            with contextlib.suppress(OSError):
                run("umount", directory)
            daemon.wait(20)


def fuse() -> str:
    with hello_filesystem() as directory:
        started = time.monotonic()
        count = 200
        for _ in range(count):
            text = (directory / "hello").read_text()
        us = (time.monotonic() - started) / count * 1e6
    if text != "hello\n":
        raise OSError(errno.EIO, repr(text))
    return f"open+read+close {us:.0f} us"


def fuse_open_tree() -> str:
    """A clone of a place in a FUSE mount, moved elsewhere; then one made from a detached clone."""
    with hello_filesystem() as directory, tempfile.TemporaryDirectory() as target:
        fd = syscall(SYS_OPEN_TREE, AT_FDCWD, bytes(directory), OPEN_TREE_CLONE | os.O_CLOEXEC)

        def move() -> None:
            private_mounts()
            syscall(SYS_MOVE_MOUNT, fd, b"", AT_FDCWD, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)
            if Path(target, "hello").read_text() != "hello\n":
                raise OSError(errno.EIO, "not the same file")

        try:
            in_child(move)
        finally:
            os.close(fd)
    return ""


def clone_of_detached() -> str:
    fd = syscall(SYS_OPEN_TREE, AT_FDCWD, b"/", OPEN_TREE_CLONE | os.O_CLOEXEC)
    try:
        flags = OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH
        os.close(syscall(SYS_OPEN_TREE, fd, b"", flags))
    finally:
        os.close(fd)
    return ""


def fuse_resend() -> str:
    """FUSE_NOTIFY_RESEND came with protocol 7.40 (include/uapi/linux/fuse.h)."""
    fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    with tempfile.TemporaryDirectory() as target:
        options = f"fd={fuse_fd},rootmode=40000,user_id=0,group_id=0"
        minor = 0

        def mount() -> None:
            private_mounts()
            call("mount", b"nsfs-facts", target.encode(), b"fuse", 0, options.encode())
            request = os.read(fuse_fd, 1 << 17)
            _, minor = struct.unpack_from("<II", request, 40)
            if minor < 40:
                raise OSError(errno.EOPNOTSUPP, f"protocol 7.{minor}")

        try:
            in_child(mount)
        finally:
            os.close(fuse_fd)
    return f"protocol 7.{minor}" if minor else "protocol 7.40 or newer"


def nested_proc() -> str:
    run("unshare", "-Urmpf", "--mount-proc", "true")
    return ""


def nested_sysfs() -> str:
    run("unshare", "-Urmn", "mount", "-t", "sysfs", "sysfs", "/mnt")
    return ""


def cgroup_kill() -> str:
    with cgroup() as path:
        sleeper = subprocess.Popen(["sleep", "60"])
        (path / "cgroup.procs").write_text(str(sleeper.pid))
        (path / "cgroup.kill").write_text("1")
        if sleeper.wait(10) != -signal.SIGKILL:
            raise OSError(errno.EIO, "not killed")
    return ""


def clone_into_cgroup() -> str:
    with cgroup() as path:
        cgroup_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        pidfd = array.array("i", [-1])
        flags = CLONE_INTO_CGROUP | CLONE_PIDFD | CLONE_NEWCGROUP | CLONE_NEWUSER | CLONE_NEWPID
        flags |= CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWTIME
        # struct clone_args, clone3(2)
        clone_args = array.array("Q", [0] * 11)
        clone_args[0] = flags
        clone_args[1] = pidfd.buffer_info()[0]
        clone_args[4] = signal.SIGCHLD
        clone_args[10] = cgroup_fd
        started = time.monotonic()
        try:
            pid = syscall(SYS_CLONE3, ctypes.c_void_p(clone_args.buffer_info()[0]), 88)
            if pid == 0:
                signal.pause()
                os._exit(0)
            ms = (time.monotonic() - started) * 1e3
            members = (path / "cgroup.procs").read_text().split()
            (path / "cgroup.kill").write_text("1")
            os.waitpid(pid, 0)
            os.close(pidfd[0])
        finally:
            os.close(cgroup_fd)
        if members != [str(pid)]:
            raise OSError(errno.EIO, f"members {members}")
    return f"all eight CLONE_NEW* and CLONE_PIDFD with it: {ms:.1f} ms"


def idmap_root() -> str:
    with tempfile.NamedTemporaryFile() as file:
        tree_fd = idmapped("/", "0 100000 65536")
        uid = os.stat(file.name.lstrip("/"), dir_fd=tree_fd).st_uid
        os.close(tree_fd)
    if uid != 100000:
        raise OSError(errno.EIO, f"uid {uid}")
    return run("stat", "-f", "-c", "%T", "/")


def idmap_to_nothing() -> str:
    """A read-only copy of the root filesystem by a map that has none of its IDs.

    Through it nothing is written, no socket connected to, and everybody is `other`.
    """
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = Path(directory, "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen(1)
        secret = Path(directory, "secret")
        secret.write_text("secret")
        secret.chmod(0o600)
        tree_fd = idmapped("/", "4000000000 4000000000 1", MOUNT_ATTR_RDONLY)
        below = f"/proc/self/fd/{tree_fd}"
        owner = os.stat(f"{below}{secret}").st_uid

        def connect() -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{below}{path}")

        def read() -> None:
            # CAP_DAC_OVERRIDE needs mapped IDs (capable_wrt_inode_uidgid), so even root is `other`.
            Path(f"{below}{secret}").read_text()

        expect(errno.EACCES, connect)
        expect(errno.EACCES, read)
        os.close(tree_fd)
        listener.close()
    return f"owner {owner}; connect, read of mode 0600: EACCES"


def idmap_tmpfs() -> str:
    with tempfile.TemporaryDirectory() as directory:

        def mount() -> None:
            private_mounts()
            call("mount", b"none", directory.encode(), b"tmpfs", 0, None)
            os.close(idmapped(directory, "0 100000 65536"))

        in_child(mount)
    return ""


def overlay_in_user_namespace() -> str:
    run("modprobe", "overlay")
    script = "mount -t tmpfs none /mnt && cd /mnt && mkdir l u w m && "
    run(
        "unshare",
        "-Urm",
        "sh",
        "-c",
        script + "mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none m",
    )
    return ""


def bubblewrap() -> str:
    options = ["--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    run("bwrap", *options, "true")
    return ""


def sysfs_by_fsopen() -> str:
    """A detached sysfs of another network namespace."""

    def look() -> None:
        call("unshare", CLONE_NEWNET)
        context_fd = syscall(SYS_FSOPEN, b"sysfs", 1)
        syscall(SYS_FSCONFIG, context_fd, FSCONFIG_CMD_CREATE, None, None, 0)
        mount_fd = syscall(SYS_FSMOUNT, context_fd, 1, 0)
        entries = os.listdir(f"/proc/self/fd/{mount_fd}/class/net")
        if entries != ["lo"]:
            raise OSError(errno.EIO, f"class/net: {entries}")

    in_child(look)
    return ""


def proc_pidns_option() -> str:
    context_fd = syscall(SYS_FSOPEN, b"proc", 1)
    try:
        syscall(SYS_FSCONFIG, context_fd, FSCONFIG_SET_STRING, b"pidns", b"/proc/self/ns/pid", 0)
    finally:
        os.close(context_fd)
    return ""


def ns_get_id() -> str:
    with open("/proc/self/ns/net") as file:
        # _IOR(0xb7, 13, __u64), linux/nsfs.h
        fcntl.ioctl(file, 0x8008B70D, bytearray(8))
    return ""


def statmount() -> str:
    try:
        syscall(SYS_STATMOUNT, None, None, 0, 0)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise
    return ""


def mount_beneath() -> str:
    """A wrong descriptor is EBADF, an unknown flag EINVAL before it."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_BENEATH
    expect(errno.EBADF, lambda: syscall(SYS_MOVE_MOUNT, -1, b"", AT_FDCWD, b"/", flags))
    return ""


def wait_killable() -> str:
    """An unknown flag is EINVAL before the null filter is EFAULT."""
    mode, new_listener, wait_killable_recv = 1, 8, 32
    flags = new_listener | wait_killable_recv
    expect(errno.EFAULT, lambda: syscall(SYS_SECCOMP, mode, flags, None))
    return ""


def bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(144, b"\0"))
    return syscall(SYS_BPF, command, buffer, 144)


def bpf_load(program_type: int, attach_type: int) -> int:
    # r0 = 1; exit
    code = ctypes.create_string_buffer(struct.pack("<BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0))
    license_name = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "<IIQQIIQII16sII",
        program_type, 2, ctypes.addressof(code), ctypes.addressof(license_name),
        0, 0, 0, 0, 0, b"nsfs_facts", 0, attach_type,
    )  # fmt: skip
    return bpf(5, attributes)


def bpf_raw_tracepoint() -> str:
    program_fd = bpf_load(17, 0)
    name = ctypes.create_string_buffer(b"console")
    try:
        os.close(bpf(17, struct.pack("<QI", ctypes.addressof(name), program_fd)))
    finally:
        os.close(program_fd)
    return "on console"


def bpf_netfilter() -> str:
    os.close(bpf_load(32, 45))
    return ""


def bpf_btf() -> str:
    return f"{os.stat('/sys/kernel/btf/vmlinux').st_size} bytes"


def printk_trace() -> str:
    instance = Path("/sys/kernel/tracing/instances/nsfs-facts")
    instance.mkdir()
    try:
        (instance / "events/printk/console/enable").write_text("1")
        Path("/dev/kmsg").write_text("nsfs-facts\n")
        with (instance / "trace").open() as file:
            lines = [line for line in file if "nsfs-facts" in line]
        if not lines:
            raise OSError(errno.EIO, "no trace of the line")
    finally:
        instance.rmdir()
    return lines[0].strip()


def printk_caller() -> str:
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    record = os.read(fd, 8192).decode()
    os.close(fd)
    if "caller=" not in record.partition(";")[0]:
        raise OSError(errno.EOPNOTSUPP, record.partition(";")[0])
    return ""


def nf_log_all_netns() -> str:
    run("modprobe", "nf_log_syslog")
    return Path("/proc/sys/net/netfilter/nf_log_all_netns").read_text().strip()


def log_target() -> str:
    command = "iptables -A INPUT -j LOG && iptables -A INPUT -j NFLOG"
    run("unshare", "-n", "sh", "-c", command)
    return run("iptables", "--version")


def nft_log() -> str:
    rules = "add table inet t; add chain inet t c { type filter hook input priority 0; }; "
    run(
        "unshare",
        "-n",
        "nft",
        rules + "add rule inet t c log group 1; add rule inet t c log prefix x",
    )
    return ""


def controllers() -> str:
    return (CGROUP / "cgroup.controllers").read_text().strip()


def cgroup_files() -> str:
    with cgroup() as path:
        return " ".join(sorted(file.name for file in path.iterdir()))


def pure_v2() -> str:
    hierarchies = Path("/proc/self/cgroup").read_text().splitlines()
    if len(hierarchies) != 1:
        raise OSError(errno.EEXIST, f"{len(hierarchies)} hierarchies")
    return hierarchies[0]


def peer_pidfd() -> str:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        # SO_PEERPIDFD; the socket module does not know it yet.
        os.close(left.getsockopt(socket.SOL_SOCKET, 77))
    return ""


def pidfd_namespaces() -> str:
    pidfd = os.pidfd_open(os.getpid())
    try:
        # PIDFD_GET_NET_NAMESPACE: _IO(0xff, 4), linux/pidfd.h
        os.close(fcntl.ioctl(pidfd, 0xFF04))
    finally:
        os.close(pidfd)
    return ""


def user_sysctls() -> str:
    names = (
        "kernel/unprivileged_userns_clone",
        "kernel/unprivileged_bpf_disabled",
        "kernel/dmesg_restrict",
        "kernel/yama/ptrace_scope",
        "user/max_user_namespaces",
        "fs/protected_hardlinks",
    )
    values = []
    for name in names:
        path = Path("/proc/sys", name)
        values.append(f"{name}={path.read_text().strip() if path.exists() else '-'}")
    return " ".join(values)


def time_offsets() -> str:
    run("unshare", "--time", "--boottime", "1000000", "--fork", "true")
    return ""


def checkpoint_restore() -> str:
    return f"ns_last_pid {Path('/proc/sys/kernel/ns_last_pid').read_text().strip()}"


REQUIRED = (
    import_time,
    fuse,
    fuse_open_tree,
    nested_proc,
    nested_sysfs,
    cgroup_kill,
    clone_into_cgroup,
    idmap_root,
    idmap_to_nothing,
    time_offsets,
    sysfs_by_fsopen,
    wait_killable,
    printk_trace,
    user_sysctls,
)
# For these nsfs has another way, or a feature is not offered.
OPTIONAL = (
    pure_v2,
    controllers,
    cgroup_files,
    bubblewrap,
    overlay_in_user_namespace,
    nf_log_all_netns,
    log_target,
    nft_log,
    bpf_raw_tracepoint,
    bpf_btf,
    checkpoint_restore,
    idmap_tmpfs,
    clone_of_detached,
    bpf_netfilter,
    fuse_resend,
    proc_pidns_option,
    ns_get_id,
    statmount,
    mount_beneath,
    peer_pidfd,
    pidfd_namespaces,
    printk_caller,
)


def main() -> int:
    print("kernel", os.uname().release)
    status = 0
    for fact in REQUIRED + OPTIONAL:
        try:
            result = f"yes {fact()}"
        except (OSError, subprocess.SubprocessError) as error:
            result = f"no {error}"
            if fact in REQUIRED:
                status = 1
        print(f"{fact.__name__} {result}".rstrip(), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
