"""Pods: namespaces shared between containers that are not in each other."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import Container, Instance, fails, wait_until


@pytest.fixture
def db(tree: Path, web: Container) -> Container:
    (tree / "db").mkdir()
    return Container(tree / "db")


def line(container: Container, kind: str) -> list[str]:
    """The ID of a namespace, and whose it is."""
    found = dict(row.split(" ", 1) for row in container.read("namespaces").splitlines())
    return found[kind].split(" ", 1)


def is_dead(container: Container) -> bool:
    try:
        return not container.read("init")
    except OSError as error:
        return error.errno == errno.ENODEV


def inode(container: Container, kind: str) -> int:
    return os.stat(f"/proc/{container.init}/ns/{kind}").st_ino


@pytest.mark.parametrize("kind", ["ipc", "net", "pid", "time", "uts"])
def test_a_namespace_is_shared_shown_by_both_and_freed_by_the_last(
    tree: Path, web: Container, db: Container, kind: str
) -> None:
    db.write("namespaces", f"{kind} ../web")
    assert inode(db, kind) == inode(web, kind)
    assert line(db, kind) == [line(web, kind)[0], "../web"]
    assert line(web, kind)[1] == "own"
    for other in {"ipc", "net", "uts", "pid", "user", "mnt"} - {kind}:
        assert inode(db, other) != inode(web, other)
    assert db.run("echo x") == "x\n"
    os.rename(web.path, tree / "www")
    assert line(db, kind)[1] == "../www"
    before = line(db, kind)[0]
    subprocess.run(["rm", "-rf", tree / "www"], check=True)
    if kind == "pid":
        # The death of its init kills all in a PID namespace: the kernel's rule.
        wait_until(lambda: is_dead(db), "it has ended")
        return
    assert line(db, kind) == [before, "own"]
    assert db.run("echo x") == "x\n"
    (tree / "web").mkdir()
    assert inode(Container(tree / "web"), kind) != inode(db, kind)


def test_a_network_of_two(web: Container, db: Container) -> None:
    db.write("namespaces", "net ../web\nuts ../web")
    server = "import socket; s=socket.socket(); s.bind(('127.0.0.1', 80)); s.listen(); s.accept()"
    web.start("python3", "-c", server)
    client = "import socket; socket.create_connection(('127.0.0.1', 80)); print('through')"
    wait_until(lambda: db.run_code(f'python3 -c "{client}"')[1] == "through\n", "it listens")
    assert db.run("hostname") == "web\n"
    web.write("net/lo/mtu", "1400")
    assert db.read("net/lo/mtu") == db.run("cat /sys/class/net/lo/mtu") == "1400\n"
    assert db.run("cat /sys/namespaces/net/lo/mtu") == "1400\n"
    # db's root has no power over what is web's.
    assert db.run_code("echo 1300 > /sys/namespaces/net/lo/mtu")[0]
    assert db.run_code("ip link set lo mtu 1300")[0]
    # The view goes on with the namespace, when web has gone.
    subprocess.run(["rm", "-rf", web.path], check=True)
    assert db.read("net/lo/mtu") == "1400\n"
    assert db.run("hostname") == "web\n"


def test_a_log_of_two(tree: Path, web: Container, db: Container, instance: Instance) -> None:
    db.run("echo alone > /dev/kmsg")
    db.write("namespaces", "syslog ../web")
    web.run("echo from web > /dev/kmsg")
    db.run("echo from db > /dev/kmsg")
    assert web.read("kmsg") == db.read("kmsg")
    assert re.findall(r";(.*)", db.read("kmsg")) == ["from web", "from db"]
    assert "from web" in db.run("cat /sys/namespaces/kmsg")
    assert line(db, "syslog") == [line(web, "syslog")[0], "../web"]
    number = line(web, "syslog")[0]
    subprocess.run(["rm", "-rf", web.path], check=True)
    assert line(db, "syslog") == [number, "own"]
    db.run("echo after > /dev/kmsg")
    instance.kill_daemon()
    assert re.findall(r";(.*)", db.read("kmsg")) == ["from web", "from db", "after"]
    assert line(db, "syslog") == [number, "own"]
    # Its owner is now who holds it.
    assert "after" in db.run("dmesg -c")
    assert not db.run("dmesg")


def test_three_and_the_holder_goes(tree: Path, web: Container, db: Container) -> None:
    (tree / "cache").mkdir()
    cache = Container(tree / "cache")
    for each in (db, cache):
        each.write("namespaces", "net ../web")
    shared = inode(web, "net")
    os.kill(web.init, 9)
    wait_until(lambda: line(db, "net")[1] == "own", "another holds it")
    assert line(cache, "net")[1] == "../db"
    assert inode(db, "net") == inode(cache, "net") == shared
    db.write("net/lo/mtu", "1234")
    assert cache.read("net/lo/mtu") == "1234\n"
    with fails(errno.EBUSY):
        db.write("namespaces", "uts ..")
    cache.write("namespaces", "net own")
    assert inode(cache, "net") != shared
    db.write("namespaces", "net own")
    assert inode(db, "net") == shared


def test_nested_in_one_that_shares(web: Container, db: Container) -> None:
    db.write("namespaces", "net ../web")
    db.write("defaults/unshare", "user pid mnt uts syslog cgroup")
    (db / "sub").mkdir()
    sub = Container(db / "sub")
    assert inode(sub, "net") == inode(web, "net")
    assert line(sub, "net")[1] == "../../web"
    # From inside of db nothing names web.
    inside = [
        db.run(f"grep ^net /sys/namespaces/{name}").split()[2]
        for name in ("namespaces", "sub/namespaces")
    ]
    assert inside == ["..", ".."]


def test_with_an_ancestor(web: Container) -> None:
    (web / "a").mkdir()
    (web / "a/b").mkdir()
    deep = Container(web / "a/b")
    deep.write("namespaces", "net ..")
    assert (inode(deep, "net"), line(deep, "net")[1]) == (inode(Container(web / "a"), "net"), "..")
    assert "net" not in deep.read("unshare").split()
    deep.write("namespaces", "net ../..")
    assert (inode(deep, "net"), line(deep, "net")[1]) == (inode(web, "net"), "../..")
    deep.write("namespaces", "net own\nuts ..")
    assert line(deep, "net")[1] == "own"
    assert "net" in deep.read("unshare").split()


def test_what_is_read_can_be_written(web: Container, db: Container) -> None:
    db.write("namespaces", "net ../web")
    init = db.init
    db.write("namespaces", db.read("namespaces").rstrip("\n"))
    assert db.init == init


def test_errors(tree: Path, web: Container, db: Container) -> None:
    (db / "sub").mkdir()
    sub = db / "sub"
    for value, number in (
        ("", errno.EINVAL),
        ("net", errno.EINVAL),
        ("disk own", errno.EINVAL),
        ("net ../web\nnet own", errno.EINVAL),
        ("net ../nowhere", errno.ENOENT),
        ("net ../../..", errno.ENOENT),
        ("user ../web", errno.EOPNOTSUPP),
        ("mnt ../web", errno.EOPNOTSUPP),
        ("cgroup ../web", errno.EOPNOTSUPP),
        ("net sub", errno.EPERM),
    ):
        with fails(number):
            db.write("namespaces", value)
    with fails(errno.EPERM):
        Container(tree).write("namespaces", "net own")
    # Not idle: it has a child.
    with fails(errno.EBUSY):
        db.write("namespaces", "net ../web")
    os.rmdir(sub)
    db.write("namespaces", "net ../web")
    # A circle.
    with fails(errno.EINVAL):
        web.write("namespaces", "net ../db")
    with fails(errno.EBUSY):
        web.write("unshare", web.read("unshare").replace(" uts", "").strip())
    # From inside there is no sibling, and its own is its parent's to change.
    assert db.run_code("echo net own > /sys/namespaces/namespaces")[0]


def test_it_survives_the_daemon(instance: Instance, web: Container, db: Container) -> None:
    db.write("namespaces", "net ../web")
    instance.kill_daemon()
    assert line(db, "net")[1] == "../web"
    db.write("net/lo/mtu", "1345")
    assert web.read("net/lo/mtu") == "1345\n"
    subprocess.run(["rm", "-rf", web.path], check=True)
    instance.kill_daemon()
    assert line(db, "net")[1] == "own"
    assert db.read("net/lo/mtu") == "1345\n"


def test_of_a_dead_one(web: Container, db: Container) -> None:
    os.kill(web.init, 9)

    wait_until(lambda: is_dead(web), "it is dead")
    with fails(errno.ENODEV):
        db.write("namespaces", "net ../web")
    assert db.run("echo still") == "still\n"


def test_lines_written_one_by_one_are_one_value(web: Container, db: Container) -> None:
    # As the echo of bash does.
    script = f"printf 'net ../web\\nuts ../web\\n' > {db / 'namespaces'}"
    subprocess.run(["bash", "-c", script], check=True)
    assert (line(db, "net")[1], line(db, "uts")[1]) == ("../web", "../web")
