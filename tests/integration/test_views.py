"""Tagged views: what they show of a namespace, and what becomes of it when that dies."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.integration.conftest import (
    DEADLINE_S,
    Container,
    Instance,
    fails,
    serving,
    wait_until,
    write,
)


def shell(script: str) -> str:
    done = subprocess.run(
        ["sh", "-ec", script], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_net_is_the_kernels_own_of_that_namespace(web: Container) -> None:
    assert sorted(os.listdir(web / "net")) == ["lo", "routes", "sysctl"]
    inside = web.run("cd /sys/class/net/lo; ls; cat mtu flags address statistics/rx_bytes")
    listed, _, values = inside.rpartition("uevent\n")
    shown = set(os.listdir(web / "net/lo"))
    hidden = set(f"{listed}uevent".split()) - shown
    assert hidden == {"subsystem"}
    assert values.split() == [
        web.read(f"net/lo/{name}").strip()
        for name in ("mtu", "flags", "address", "statistics/rx_bytes")
    ]
    web.write("net/lo/mtu", "1400")
    assert web.run("cat /sys/class/net/lo/mtu") == "1400\n"


def test_the_kernels_own_errors(web: Container) -> None:
    with fails(errno.EINVAL):
        web.write("net/lo/mtu", "nonsense")
    with fails(errno.EINVAL):
        web.read("net/lo/speed")
    # kernfs_fop_open(): root, too, opens nothing for what no store is for.
    with fails(errno.EINVAL):
        os.close(os.open(web / "net/lo/address", os.O_WRONLY))
    with fails(errno.ENOENT):
        web.read("net/eth7/mtu")
    with fails(errno.ENOENT):
        os.listdir(web / "net/lo/subsystem")
    assert (web / "net/lo/mtu").stat().st_mode & 0o777 == 0o644
    assert (web / "net/lo/address").stat().st_mode & 0o777 == 0o444


def test_interfaces_come_and_go_and_are_seen_at_once(web: Container) -> None:
    run = f"nsenter --net={web / 'nsproxy/net'} ip link"
    shell(f"{run} add br0 type bridge; {run} add d0 type veth peer e0; {run} set d0 master br0")
    assert sorted(os.listdir(web / "net")) == ["br0", "d0", "e0", "lo", "routes", "sysctl"]
    assert os.readlink(web / "net/d0/master") == "../br0"
    assert os.readlink(web / "net/br0/lower_d0") == "../d0"
    assert (web / "net/d0/master/bridge/stp_state").read_text() == "0\n"
    shell(f"{run} set d0 name d1")
    with fails(errno.ENOENT):
        os.stat(web / "net/d0")
    assert (web / "net/br0/lower_d1/mtu").read_text() == "1500\n"
    shell(f"{run} del br0")
    assert sorted(os.listdir(web / "net")) == ["d1", "e0", "lo", "routes", "sysctl"]


def test_the_same_from_inside(web: Container) -> None:
    script = "cd {}/net; ls -R lo | sort; cat lo/mtu lo/type; grep . lo/statistics/*"
    assert web.run(script.format("/sys/namespaces")) == shell(script.format(web.path))
    web.run("echo 1300 > /sys/namespaces/net/lo/mtu")
    assert web.read("net/lo/mtu") == "1300\n"


def test_rm_in_a_view_harms_nothing(web: Container) -> None:
    shell(f"nsenter --net={web / 'nsproxy/net'} ip link add d0 type veth peer e0")
    shell(f"rm -rf {web / 'net'} {web / 'uts'}; rm -rf {web / 'net/d0'}; rm {web / 'net/d0/mtu'}")
    assert sorted(os.listdir(web / "net")) == ["d0", "e0", "lo", "routes", "sysctl"]
    assert web.read("net/d0/mtu") == "1500\n"


def test_what_is_shared_is_the_holders(tree: Path, web: Container) -> None:
    write(web / "defaults/unshare", "user pid mnt uts syslog cgroup")
    (web / "db").mkdir()
    db = Container(web / "db")
    web.write("net/lo/mtu", "1234")
    assert db.read("net/lo/mtu") == "1234\n"
    # From outside, root may; from inside, nothing names an ancestor.
    db.write("net/lo/mtu", "1235")
    assert web.read("net/lo/mtu") == "1235\n"
    code, _ = db.run_code("echo 1236 > /sys/namespaces/net/lo/mtu")
    assert code != 0
    assert web.read("net/lo/mtu") == "1235\n"


@pytest.mark.parametrize("name", ["net/lo/mtu", "uts/hostname", "ipc/sysctl/kernel/shmmax"])
def test_when_the_namespace_dies_its_entries_are_gone(web: Container, name: str) -> None:
    fd = os.open(web / name, os.O_RDWR)
    try:
        assert os.read(fd, 100)
        os.kill(web.init, 9)
        wait_until(lambda: not _is_there(web / name), "the entry is gone")
        with fails(errno.ENODEV):
            os.pread(fd, 100, 0)
        with fails(errno.ENODEV):
            os.pwrite(fd, b"1400", 0)
        assert os.listdir((web / name).parents[len(Path(name).parts) - 2]) == []
    finally:
        os.close(fd)


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def test_open_files_and_directories_survive_the_daemon(instance: Instance, web: Container) -> None:
    fd = os.open(web / "net/lo/mtu", os.O_RDWR)
    dir_fd = os.open(web / "net/lo/statistics", os.O_RDONLY | os.O_DIRECTORY)
    number = os.fstat(fd).st_ino
    try:
        web.write("net/lo/mtu", "1400")
        instance.kill_daemon()
        assert os.pread(fd, 100, 0) == b"1400\n"
        os.pwrite(fd, b"1401\n", 0)
        assert web.read("net/lo/mtu") == "1401\n"
        assert "rx_bytes" in os.listdir(dir_fd)
        assert os.stat(web / "net/lo/mtu").st_ino == number
    finally:
        os.close(fd)
        os.close(dir_fd)


def open_views(instance: Instance) -> int:
    """Detached mounts that the daemon holds."""
    folder = f"/proc/{instance.daemon()}/fd"
    found = 0
    for name in os.listdir(folder):
        try:
            found += os.readlink(f"{folder}/{name}") == "/"
        except FileNotFoundError:
            continue
    return found


def test_idle_views_hold_nothing(instance: Instance, web: Container) -> None:
    web.read("net/lo/mtu")
    assert open_views(instance)
    wait_until(lambda: not open_views(instance), "they are closed")
    assert web.read("net/lo/mtu") == "65536\n"
    assert open_views(instance) == 1


def test_a_view_does_not_keep_a_namespace(tree: Path) -> None:
    (tree / "web").mkdir()
    (tree / "web/net/lo/mtu").read_text()
    shell(f"rm -rf {tree / 'web'}")
    assert not (tree / "web").exists()


def test_the_roots_is_the_hosts(tree: Path) -> None:
    assert sorted(os.listdir(tree / "net")) == sorted(
        ["routes", "sysctl"]
        + [name for name in os.listdir("/sys/class/net") if Path("/sys/class/net", name).is_dir()]
    )


def test_the_hosts_names_are_those_of_whoever_shares_them(tree: Path, web: Container) -> None:
    web.write("defaults/unshare", "cgroup ipc mnt net pid syslog time user")
    os.mkdir(web / "db")
    web.run("hostname shop")
    assert Container(web / "db").read("uts/hostname") == "shop\n"
    # Of those that nobody has changed meanwhile, too.
    assert (tree / "uts/hostname").read_text() == f"{socket.gethostname()}\n"
    assert (tree / "uts/domainname").read_text() == Path("/proc/sys/kernel/domainname").read_text()


def test_uts(web: Container) -> None:
    assert web.read("uts/domainname") == "(none)\n"
    web.write("uts/domainname", "shop.example")
    assert web.run("cat /proc/sys/kernel/domainname") == "shop.example\n"
    assert Path("/proc/sys/kernel/domainname").read_text() != "shop.example\n"
    for value in ("", "a b", "x\ty"):
        with fails(errno.EINVAL):
            web.write("uts/domainname", value)
    with fails(errno.ERANGE):
        web.write("uts/hostname", "x" * 65)
    web.run("echo inner > /sys/namespaces/uts/hostname")
    assert web.read("uts/hostname") == "inner\n"


MAKE_IPC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.shmget(4711, 4096, 0o1640) >= 0
assert libc.semget(4712, 3, 0o1600) >= 0
assert libc.msgget(4713, 0o1600) >= 0
assert libc.mq_open(b"/orders", 0o102, 0o600, None) >= 0
print(os.getpid())
"""


def columns(table: str) -> dict[str, str]:
    head, row = table.splitlines()
    return dict(zip(head.split(), row.split(), strict=True))


def test_ipc(web: Container) -> None:
    before = [Path("/proc/sysvipc", name).read_text() for name in ("shm", "sem", "msg")]
    pid = web.run(f"exec python3 -c '{MAKE_IPC}'").strip()
    assert columns(web.read("ipc/shm"))["key"] == "4711"
    assert columns(web.read("ipc/shm"))["size"] == "4096"
    assert columns(web.read("ipc/sem"))["nsems"] == "3"
    assert columns(web.read("ipc/msg"))["key"] == "4713"
    assert os.listdir(web / "ipc/mqueue") == ["orders"]
    assert web.read("ipc/mqueue/orders").startswith("QSIZE:0 ")
    inside = web.run("cat /sys/namespaces/ipc/shm")
    assert columns(inside)["uid"] == "0"
    # The process has ended: nobody has a number for it any more.
    assert columns(inside)["cpid"] in ("0", pid)
    assert int(columns(web.read("ipc/shm"))["uid"]) >= 0x70000000
    assert [Path("/proc/sysvipc", name).read_text() for name in ("shm", "sem", "msg")] == before


def test_ipc_sysctls(web: Container) -> None:
    here = Path("/proc/sys/kernel/msgmni").read_text()
    web.write("ipc/sysctl/kernel/msgmni", "77")
    assert web.run("cat /proc/sys/kernel/msgmni") == "77\n"
    assert Path("/proc/sys/kernel/msgmni").read_text() == here
    with fails(errno.EINVAL):
        web.write("ipc/sysctl/kernel/msgmni", "many")
    assert "msg_max" in os.listdir(web / "ipc/sysctl/fs/mqueue")
    # What is the whole host's is not shown.
    with fails(errno.ENOENT):
        web.read("ipc/sysctl/kernel/panic")
    assert sorted(os.listdir(web / "ipc/sysctl")) == ["fs", "kernel"]


def test_net_sysctls(web: Container) -> None:
    assert web.read("net/sysctl/ipv4/ip_forward") == "0\n"
    here = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    web.write("net/sysctl/ipv4/ip_forward", "1")
    assert web.run("cat /proc/sys/net/ipv4/ip_forward") == "1\n"
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == here
    assert "lo" in os.listdir(web / "net/sysctl/ipv4/conf")
    assert sorted(os.listdir(web / "net/sysctl")) == web.run("ls /proc/sys/net").split()


def test_user(web: Container) -> None:
    inside, outside, count = web.read("user/uid_map").split()
    assert (inside, int(outside) >= 0x70000000, count) == ("0", True, str(16 * 65536))
    assert web.run("cat /sys/namespaces/user/uid_map") == web.run("cat /proc/self/uid_map")
    assert web.read("user/owner") == "0\n"
    (web / "db").mkdir()
    db = Container(web / "db")
    # Each sees its own numbers of the same.
    nested = db.read("user/uid_map").split()
    assert int(nested[1]) == int(outside) + 65536
    assert web.run("cat /sys/namespaces/db/user/uid_map").split() == ["0", "65536", "65536"]
    assert db.run("cat /sys/namespaces/user/uid_map").split() == ["0", "65536", "65536"]


def test_users(web: Container) -> None:
    assert os.listdir(web / "user/uids") == ["0"]
    web.start("setpriv", "--reuid=1000", "--clear-groups", "sleep", "1000")
    web.start("setpriv", "--reuid=1000", "--clear-groups", "sh", "-c", "while :; do :; done")
    wait_until(lambda: set(os.listdir(web / "user/uids")) == {"0", "1000"}, "they run")
    wait_until(lambda: web.read("user/uids/1000/procs") == "2\n", "both")
    wait_until(lambda: int(web.read("user/uids/1000/cpu")) > 0, "one computes")
    assert web.run("cat /sys/namespaces/user/uids/1000/procs") == "2\n"
    for name in ("01000", "-1", "x", "4294967296"):
        with fails(errno.ENOENT):
            os.listdir(web / f"user/uids/{name}")
    web.write("kill", "1")
    wait_until(lambda: os.listdir(web / "user/uids") == ["0"], "they are gone")


def test_pid(tree: Path, web: Container) -> None:
    web.start("sh", "-c", "sleep 1000; :")
    wait_until(lambda: web.read("pid/tree").count("sleep") == 1, "it runs")
    rows = web.read("pid/tree").splitlines()
    assert [row.split()[1] for row in rows] == ["nsfs-init", "sh", "sleep"]
    assert [len(row) - len(row.lstrip()) for row in rows] == [0, 2, 4]
    assert rows[0].split()[0] == str(web.init)
    inside = web.run("cat /sys/namespaces/pid/tree").splitlines()
    assert inside[0] == "1 nsfs-init"
    last = int(web.read("pid/last"))
    assert 1 < last < 1000
    web.run("true")
    assert int(web.read("pid/last")) > last
    assert web.run("cat /sys/namespaces/pid/last") != (tree / "pid/last").read_text()


def test_pid_max(tree: Path, web: Container) -> None:
    host = Path("/proc/sys/kernel/pid_max").read_text()
    with fails(errno.EINVAL):
        web.write("pid/max", "many")
    with fails(errno.ERANGE):
        web.write("pid/max", "0")
    with fails(errno.EPERM):
        write(tree / "pid/max", "400000")
    try:
        web.write("pid/max", "400000")
    except OSError as error:
        # Before Linux 6.14.
        assert error.errno == errno.EOPNOTSUPP
        assert web.read("pid/max") == host
    else:
        assert web.read("pid/max") == web.run("cat /proc/sys/kernel/pid_max") == "400000\n"
    assert Path("/proc/sys/kernel/pid_max").read_text() == host


def test_mnt(web: Container) -> None:
    mounts = web.read("mnt/mounts")
    assert mounts == web.run("cat /proc/1/mounts") == web.run("cat /sys/namespaces/mnt/mounts")
    assert "fuse.namespaces" in mounts
    (root,) = (web / "mnt/root").parent.glob("root")
    assert sorted(os.listdir(root)) == web.run("ls -A /").split()
    web.run("mkdir /tmp/x")
    assert (root / "tmp/x").is_dir()
    assert web.run("readlink /sys/namespaces/mnt/root") == "/\n"


SINCE_BOOT = "python3 -c 'import time; print(time.clock_gettime(time.CLOCK_BOOTTIME))'"


def test_time(tree: Path, web: Container) -> None:
    assert (tree / "time/boottime").read_text() == web.read("time/boottime") == "0 0\n"
    before = float(shell(SINCE_BOOT))
    try:
        web.write("time/boottime", "864000 500000000")
    except OSError as error:
        # Before Linux 6.2 or so no process joins a time namespace by exec.
        assert error.errno == errno.EOPNOTSUPP
        assert tuple(map(int, os.uname().release.split(".")[:2])) < (6, 4)
        assert web.run("true") == ""
        assert web.read("time/boottime") == "0 0\n"
        return
    assert web.read("time/boottime") == "864000 500000000\n"
    assert web.read("time/monotonic") == "0 0\n"
    assert 864000 <= float(web.run(SINCE_BOOT)) - before < 864000 + DEADLINE_S
    web.write("time/monotonic", "7")
    assert web.read("time/monotonic") == "7 0\n"
    assert web.read("time/boottime") == "864000 500000000\n"
    # Nested ones begin with the same.
    (web / "db").mkdir()
    assert Container(web / "db").read("time/boottime") == "864000 500000000\n"
    assert web.run("cat /sys/namespaces/time/boottime") == "864000 500000000\n"


def test_time_is_set_while_idle_and_as_the_kernel_allows(tree: Path, web: Container) -> None:
    for value, number in (
        ("", errno.EINVAL),
        ("soon", errno.EINVAL),
        ("1 2 3", errno.EINVAL),
        ("0 1000000000", errno.ERANGE),
        ("9223372036", errno.ERANGE),
        ("-9000000000", errno.ERANGE),
    ):
        with fails(number):
            web.write("time/monotonic", value)
    assert web.read("time/monotonic") == "0 0\n"
    assert web.run("true") == ""
    with fails(errno.EOPNOTSUPP):
        write(tree / "time/monotonic", "1")
    code, _ = web.run_code("echo 1 > /sys/namespaces/time/monotonic")
    assert code
    web.start("sleep", "1000")
    wait_until(lambda: web.state()["populated"] == "1", "it runs")
    with fails(errno.EBUSY):
        web.write("time/monotonic", "1")


def example() -> str:
    """The program in the manual."""
    page = (Path(__file__).parents[2] / "man/nsfs.5.rst").read_text()
    section = page.split("A VIEW OF YOUR OWN\n---", 1)[1]
    block = section.split("::\n\n", 1)[1].split("\nThe module ", 1)[0]
    return textwrap.dedent(block)


def with_views(base: Path, *programs: str) -> list[str]:
    """The options for an instance with further views."""
    for number, text in enumerate(programs):
        (base / f"v{number}.py").write_text(text)
    rows = "".join(f"    {base}/v{number}.py\n" for number in range(len(programs)))
    (base / "nsfs.conf").write_text(f"[views]\nmodules =\n{rows}")
    return ["--config", str(base / "nsfs.conf")]


def test_the_manuals_example_adds_a_view(tmp_path: Path) -> None:
    assert len(example().splitlines()) < 40
    with serving(tmp_path, with_views(tmp_path, example())) as instance:
        os.mkdir(instance.tree / "web")
        web = Container(instance.tree / "web")
        assert os.listdir(web / "fds") == []
        web.start("sh", "-c", "exec 7</dev/null; exec sleep 1000")
        (pid,) = wait_until(lambda: os.listdir(web / "fds"), "it is shown")
        wait_until(lambda: web.read(f"fds/{pid}") == "4\n", "the shell has become sleep")
        assert web.read("user/uid_map")
        fd = os.open(web / f"fds/{pid}", os.O_RDONLY)
        try:
            os.kill(web.init, 9)
            wait_until(lambda: not _is_there(web / f"fds/{pid}"), "the entry is gone")
            with fails(errno.ENODEV):
                os.pread(fd, 100, 0)
        finally:
            os.close(fd)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("FILES = (", "SyntaxError"),
        ("", "FILES"),
        ("raise OSError(5, 'broken')", "broken"),
        ("from nsfs.view import TagType\nFILES = (TagType('net'),)", "not a view of a new name"),
        ("from nsfs.view import Attribute\nFILES = (Attribute('x'),)", "not a view of a new name"),
    ],
)
def test_a_file_that_is_no_view_is_an_error_of_mount(
    tmp_path: Path, program: str, reason: str
) -> None:
    instance = Instance(tmp_path, with_views(tmp_path, program))
    instance.tree.mkdir()
    options = ["--run-dir", str(instance.run_dir), "--cgroup", instance.group, *instance.options]
    done = instance.command("mount", str(instance.tree), *options, check=False)
    assert done.returncode != 0
    assert reason in done.stderr
    assert f"{tmp_path}/v0.py" in done.stderr


# --- what a container can make long ---


def memory(pid: int) -> int:
    """Resident, in MiB."""
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:", 1)[1].split()
    return int(fields[0]) >> 10


def test_a_long_chain_of_processes_is_no_long_text(web: Container) -> None:
    program = (
        "import os, time\nfor _ in range(200):\n    if os.fork():\n        break\ntime.sleep(1000)"
    )
    web.start("python3", "-c", program)
    wait_until(lambda: web.read("pid/tree").count("python3") == 201, "they run")
    indents = [len(r) - len(r.lstrip()) for r in web.read("pid/tree").splitlines() if "pyth" in r]
    assert max(indents) == 2 * 64
    assert sorted(indents)[:3] == [2, 4, 6]


def test_open_files_keep_no_more_than_the_daemon_can_afford(
    instance: Instance, web: Container
) -> None:
    # A line of 12 KiB for each mount: what is no word is shown as four bytes.
    web.start(
        "python3",
        "-c",
        "import ctypes, os, time\n"
        "libc = ctypes.CDLL(None)\n"
        "os.chdir('/tmp')\n"
        "for _ in range(13):\n"
        "    os.mkdir(' ' * 250)\n"
        "    os.chdir(' ' * 250)\n"
        "for _ in range(600):\n"
        "    assert not libc.mount(b'x', b'.', b'tmpfs', 0, None)\n"
        "print('mounted', flush=True)\n"
        "time.sleep(1000)\n",
    )
    wait_until(lambda: "mounted" in web.read("output"), "all is mounted")
    before = memory(instance.daemon())
    fds = [os.open(web / "mnt/mounts", os.O_RDONLY) for _ in range(40)]
    try:
        assert all(len(os.read(fd, 4096)) == 4096 for fd in fds)
        assert memory(instance.daemon()) - before < 200
        # One that was dropped goes on with what is there now.
        os.lseek(fds[0], 0, os.SEEK_SET)
        text = b"".join(iter(lambda: os.read(fds[0], 1 << 17), b""))
        assert text == Path(f"/proc/{web.init}/mounts").read_bytes()
        assert len(text) > 600 * 12_000
    finally:
        for fd in fds:
            os.close(fd)


def test_a_table_of_mounts_that_is_too_long(web: Container) -> None:
    web.start(
        "python3",
        "-c",
        "import ctypes, os, time\n"
        "libc = ctypes.CDLL(None)\n"
        "os.chdir('/tmp')\n"
        "for _ in range(15):\n"
        "    os.mkdir(' ' * 255)\n"
        "    os.chdir(' ' * 255)\n"
        "for _ in range(1200):\n"
        "    assert not libc.mount(b'x', b'.', b'tmpfs', 0, None)\n"
        "print('mounted', flush=True)\n"
        "time.sleep(1000)\n",
    )
    wait_until(lambda: "mounted" in web.read("output"), "all is mounted")
    with fails(errno.EFBIG):
        web.read("mnt/mounts")


def test_more_routes_than_are_shown(web: Container) -> None:
    batch = web.path.parent.parent / "routes"
    with open(batch, "w") as file:
        for number in range(1 << 16):
            file.write(f"route add blackhole 10.{number >> 8}.{number & 255}.0/24\n")
        file.write("route add blackhole 11.0.0.0/24\n")
    shell(f"nsenter --net={web / 'nsproxy/net'} ip -batch {batch}")
    with fails(errno.EFBIG):
        web.read("net/routes")
    shell(f"nsenter --net={web / 'nsproxy/net'} ip route flush type blackhole")
    assert "blackhole" not in web.read("net/routes")
