"""A good neighbour: with the tree in /sys, everybody else's containers work as before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, Container, Instance, wait_until

SHELL = ["sh", "-ec"]


def run(script: str) -> str:
    done = subprocess.run(
        [*SHELL, script], check=False, capture_output=True, text=True, timeout=4 * DEADLINE_S
    )
    assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
    return done.stdout


def sys_mounts() -> list[str]:
    """What is mounted at and below /sys: everything of each line but the mounts' own numbers."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == "/sys" or fields[4].startswith("/sys/"):
            found.append(" ".join(fields[2:]))
    return found


class Grafted(Instance):
    """The default mount point, below /sys."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.tree = Path("/sys/namespaces")

    def mount(self) -> None:
        done = self.command(
            "mount", str(self.tree), "--run-dir", str(self.run_dir), "--cgroup", self.group,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + self.log()


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grafted]:
    before = sys_mounts()
    instance = Grafted(tmp_path_factory.mktemp("graft"))
    instance.mount()
    try:
        yield instance
    finally:
        instance.umount()
    assert sys_mounts() == before
    assert not instance.groups()


@pytest.fixture
def web(grafted: Grafted) -> Iterator[Container]:
    path = grafted.tree / "web"
    path.mkdir()
    yield Container(path)
    subprocess.run(["rm", "-rf", path], check=True, timeout=2 * DEADLINE_S)
    grafted.settled()


def test_sys_is_what_it_was(grafted: Grafted) -> None:
    assert "namespaces" in os.listdir("/sys")
    for path in ("/sys/class/net/lo/mtu", "/sys/kernel/uevent_seqnum", "/sys/fs/cgroup"):
        assert os.path.exists(path), path
    assert os.path.realpath("/sys/class/net/lo") == "/sys/devices/virtual/net/lo"
    assert Path("/sys/class/net/lo/mtu").read_text().strip() == "65536"
    kinds = [line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()]
    assert kinds.count("fuse.namespaces") == 1


def test_a_user_namespace_can_still_mount_sysfs_and_proc(grafted: Grafted) -> None:
    run("unshare -Urnm mount -t sysfs none /sys")
    run("unshare -Urmpf --mount-proc true")


def test_inside_a_container_too(web: Container) -> None:
    web.run("unshare -Urnm mount -t sysfs none /sys && echo ok")
    web.run("unshare -Urmpf --mount-proc true && echo ok")


def in_mount_namespace(propagation: str, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-m", "--propagation", propagation, *SHELL, script],
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )


def test_rbind_of_sys_and_rm_rf_harm_nothing(web: Container, tmp_path: Path) -> None:
    web.start("sleep", "1000")
    os.mkdir(web / "idle")
    mine = next(x for x in Path("/proc/self/mountinfo").read_text().splitlines() if "fuse.n" in x)
    run(f"mount --rbind /sys {tmp_path}")
    try:
        assert "lo" in os.listdir(tmp_path / "class/net")
        # Where the kernel lets it be unbindable without harm to others (see supervisor.c).
        assert not os.listdir(tmp_path / "namespaces") or " unbindable " not in mine
        subprocess.run(["rm", "-rf", tmp_path / "namespaces"], check=False, timeout=2 * DEADLINE_S)
    finally:
        run(f"umount -R {tmp_path}")
    assert "populated 1" in web.read("state")
    assert (web / "idle").is_dir()


def test_a_copy_in_another_mount_namespace_is_not_removed_by_mistake(
    web: Container, tmp_path: Path
) -> None:
    web.start("sleep", "1000")
    os.mkdir(web / "idle")
    copy = tmp_path / "namespaces"
    done = in_mount_namespace("private", f"mount --rbind /sys {tmp_path}; rm -rf {copy}")
    assert "Operation not permitted" in done.stderr
    assert "populated 1" in web.read("state")
    assert (web / "idle").is_dir()
    # Once the copy is gone, the namespace is as good as any other.
    undone = f"mount --rbind /sys {tmp_path}; umount -R {tmp_path}; rmdir {web / 'idle'}"
    assert in_mount_namespace("private", undone).returncode == 0


def test_bubblewrap_runs(grafted: Grafted) -> None:
    out = run(
        "bwrap --unshare-all --ro-bind / / --proc /proc --dev /dev --tmpfs /tmp sh -c 'echo $$ ok'"
    )
    assert out.split()[1] == "ok"


def test_runc_runs(grafted: Grafted, tmp_path: Path) -> None:
    root = tmp_path / "bundle" / "rootfs"
    (root / "bin").mkdir(parents=True)
    run(f"cp $(command -v busybox) {root}/bin/ && ln -s busybox {root}/bin/sh")
    run(f"cd {tmp_path}/bundle && runc spec")
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    config["process"]["terminal"] = False
    config["process"]["args"] = ["sh", "-c", "echo from runc; /bin/busybox ls /sys/class/net"]
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    name = f"nsfstest{os.getpid()}"
    out = run(f"cd {tmp_path}/bundle && runc --root {tmp_path}/runc run {name}")
    assert "from runc" in out
    assert "lo" in out


def test_podman_runs(grafted: Grafted, tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    (root / "bin").mkdir(parents=True)
    for name in ("proc", "sys", "dev", "tmp", "run", "etc"):
        (root / name).mkdir()
    run(f"cp $(command -v busybox) {root}/bin/ && ln -s busybox {root}/bin/sh")
    group = f"nsfstest{os.getpid()}"
    # It wants a short path there.
    runroot = tempfile.mkdtemp(dir="/tmp")
    base = (
        f"podman --root {tmp_path}/storage --runroot {runroot} --cgroup-manager cgroupfs"
        " --events-backend none --storage-driver vfs"
    )
    # Not more than this process may have: podman would raise them.
    limits = "--ulimit nofile=1024:1024 --ulimit nproc=1000:1000"
    out = run(
        f"{base} run --rm --cgroup-parent {group} {limits} --network none --log-driver none"
        f" --rootfs {root} sh -c 'echo from podman'"
    )
    assert "from podman" in out
    shutil.rmtree(runroot)
    # It leaves the group above its own, and for a moment what is in it.
    root = Path("/sys/fs/cgroup")
    for top in (*root.glob(group), *root.glob(f"*/{group}")):
        wait_until(lambda top=top: _removed(top), f"{top} is empty")


def _removed(top: Path) -> bool:
    try:
        for path, _, _ in os.walk(top, topdown=False):
            os.rmdir(path)
    except OSError:
        return False
    return True


def test_lxc_runs(grafted: Grafted, tmp_path: Path) -> None:
    root = tmp_path / "rootfs"
    for name in ("bin", "proc", "sys", "dev", "tmp", "run", "etc", "sbin"):
        (root / name).mkdir(parents=True)
    run(f"cp $(command -v busybox) {root}/bin/ && ln -s busybox {root}/bin/sh")
    (tmp_path / "lxc" / "c").mkdir(parents=True)
    (tmp_path / "lxc" / "c" / "config").write_text(
        f"lxc.rootfs.path = dir:{root}\nlxc.uts.name = c\nlxc.net.0.type = empty\n"
        "lxc.mount.auto = proc:mixed sys:mixed\n"
    )
    out = run(f"lxc-execute -P {tmp_path}/lxc -n c -- /bin/busybox echo from lxc")
    assert "from lxc" in out


def test_names_are_relative_to_the_default_mount(grafted: Grafted, web: Container) -> None:
    os.mkdir(web / "db")
    for name in ("web/db", f"{web.path}/db"):
        assert grafted.command("enter", name, "--", "hostname").stdout == "db\n"
        assert grafted.command("run", f"{name}/job", "--", "hostname").stdout == "job\n"
    assert os.listdir(web / "db").count("job") == 0
    # Those that take an instance take this one when none is named.
    assert json.loads(grafted.command("status", "--json").stdout)["dir"] == "/sys/namespaces"
    assert "2 containers" in grafted.command("umount", check=False).stderr


def test_two_instances_side_by_side(grafted: Grafted, tmp_path: Path, web: Container) -> None:
    other = Instance(tmp_path)
    other.mount()
    try:
        (other.tree / "web").mkdir()
        assert Container(other.tree / "web").init != web.init
        status = other.status()
        assert status["dir"] == str(other.tree)
        refused = other.command("umount", str(other.tree), check=False)
        assert refused.returncode == 1
        assert "1 container" in refused.stderr
        assert (other.tree / "web").is_dir()
    finally:
        other.umount()
    assert not other.groups()
    assert web.run("echo still here") == "still here\n"
