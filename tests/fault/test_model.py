"""A state machine drives the real tree beside a model in memory (hypothesis)."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.integration.conftest import DEADLINE_S, Container, Instance, serving, wait_until

NAMES = ("a", "b", "c")
MODES = (0o755, 0o700, 0o555, 0o711)
# All with a cgroup namespace: where cgroups are mounted with `nsdelegate` a nested container has to
# have its own.
UNSHARES = (
    "cgroup mnt pid user uts",
    "cgroup ipc mnt net pid user uts",
    "cgroup mnt pid time user uts",
)
LIMITS = ("pids.max 100", "pids.max 4096", "pids.max max")
ALL = "cgroup ipc mnt net pid syslog time user uts"


@dataclass
class Model:
    """What a container should be."""

    mode: int = 0o755
    owner: tuple[int, int] = (0, 0)
    unshare: str = ALL
    frozen: bool = False
    sleepers: int = 0
    defaults: dict[str, str] = field(default_factory=dict)
    children: dict[str, Model] = field(default_factory=dict)
    inode: int = 0

    def default(self, above: list[Model], name: str, last: str) -> str:
        """What its `defaults/` shows: its own word or that of one above."""
        for each in (self, *reversed(above)):
            if name in each.defaults:
                return each.defaults[name]
        return last

    def populated(self) -> bool:
        return bool(self.sleepers) or any(c.populated() for c in self.children.values())

    def procs(self) -> int:
        return self.sleepers + sum(c.procs() for c in self.children.values())

    def nested(self) -> int:
        return len(self.children) + sum(c.nested() for c in self.children.values())


paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)
names = st.sampled_from(NAMES)


class Tree(RuleBasedStateMachine):
    """The tree; `instance` is the class's, set by the test."""

    instance: Instance

    @initialize()
    def begin(self) -> None:
        self.root = Model()
        self.top = self.instance.tree

    def teardown(self) -> None:
        for name in NAMES:
            if (self.top / name).exists():
                done = subprocess.run(
                    ["rm", "-rf", self.top / name],
                    capture_output=True,
                    check=False,
                    timeout=DEADLINE_S,
                )
                assert (done.returncode, done.stderr) == (0, b"")
        self.instance.settled()

    # --- the model's side ---

    def lineage(self, names: list[str]) -> list[Model] | None:
        """The models from the root to the one at a path, or None when there is none."""
        found = [self.root]
        for name in names:
            if name not in found[-1].children:
                return None
            found.append(found[-1].children[name])
        return found

    def at(self, names: list[str]) -> Model | None:
        found = self.lineage(names)
        return None if found is None else found[-1]

    def real(self, names: list[str]) -> Container:
        return Container(self.top.joinpath(*names))

    def expect(self, number: int, function: Callable[..., object], *args: object) -> None:
        """Call it: it succeeds (0), or fails with just that error."""
        try:
            function(*args)
        except OSError as error:
            assert errno.errorcode[error.errno or 0] == errno.errorcode.get(number, "success")
        else:
            assert not number, f"{errno.errorcode[number]} was expected"

    def suspended(self, names: list[str]) -> bool:
        return any(each.frozen for each in self.lineage(names) or ())

    # --- what is done ---

    @rule(parent=st.lists(st.sampled_from(NAMES), max_size=1), name=names)
    def mkdir(self, parent: list[str], name: str) -> None:
        above = self.lineage(parent)
        path = [*parent, name]
        if above is None:
            return self.expect(errno.ENOENT, os.mkdir, self.real(path).path)
        if name in above[-1].children:
            return self.expect(errno.EEXIST, os.mkdir, self.real(path).path)
        if self.suspended(parent):
            return self.expect(errno.EBUSY, os.mkdir, self.real(path).path)
        self.expect(0, os.mkdir, self.real(path).path)
        made = Model(unshare=above[-1].default(above[:-1], "unshare", ALL))
        made.inode = os.stat(self.real(path).path).st_ino
        above[-1].children[name] = made
        return None

    @rule(path=paths)
    def rmdir(self, path: list[str]) -> None:
        model = self.at(path)
        number = 0
        if model is None:
            number = errno.ENOENT
        elif model.children:
            number = errno.ENOTEMPTY
        elif model.sleepers:
            number = errno.EBUSY
        self.expect(number, os.rmdir, self.real(path).path)
        if not number:
            above = self.at(path[:-1])
            assert above is not None
            del above.children[path[-1]]

    @rule(path=paths, how=st.sampled_from(["rm", "find", "shutil"]))
    def remove_all(self, path: list[str], how: str) -> None:
        if self.at(path) is None:
            return
        real = str(self.real(path).path)
        if how == "shutil":
            shutil.rmtree(real)
        else:
            words = ["rm", "-rf", real] if how == "rm" else ["find", real, "-delete"]
            done = subprocess.run(words, capture_output=True, check=False, timeout=DEADLINE_S)
            assert (done.returncode, done.stderr) == (0, b"")
        above = self.at(path[:-1])
        assert above is not None
        del above.children[path[-1]]

    @rule(path=paths, to=paths)
    def mv(self, path: list[str], to: list[str]) -> None:
        model, above = self.at(path), self.at(to[:-1])
        number = 0
        if model is None or above is None:
            number = errno.ENOENT
        elif path == to:
            number = 0
        elif to[: len(path)] == path:
            number = errno.EINVAL
        elif path[: len(to)] == to:
            # It would replace what it is in (rename(2)).
            number = errno.ENOTEMPTY
        elif path[:-1] != to[:-1]:
            number = errno.EPERM
        elif to[-1] in above.children:
            number = errno.EEXIST
        self.expect(number, os.rename, self.real(path).path, self.real(to).path)
        if not number and path != to:
            assert above is not None
            assert model is not None
            above.children[to[-1]] = above.children.pop(path[-1])

    @rule(path=paths, on=st.booleans())
    def freeze(self, path: list[str], on: bool) -> None:
        model = self.at(path)
        if model is not None:
            self.real(path).write("freeze", str(int(on)))
            model.frozen = on

    @rule(path=paths)
    def sleep(self, path: list[str]) -> None:
        model = self.at(path)
        if model is None:
            return
        if self.suspended(path):
            return self.expect(errno.EBUSY, self.real(path).write, "exec", "sleep 1000")
        self.real(path).write("exec", "sleep 1000")
        model.sleepers += 1
        return None

    @rule(path=paths, name=st.sampled_from(["1", "KILL", "SIGKILL", "TERM"]))
    def kill(self, path: list[str], name: str) -> None:
        model = self.at(path)
        if model is None or (name == "TERM" and self.suspended(path)):
            return

        def clear(each: Model) -> bool:
            """Whether none is left waiting for its signal in one that is frozen."""
            return not each.frozen and all(map(clear, each.children.values()))

        if name == "TERM" and not clear(model):
            return
        self.real(path).write("kill", name)

        def empty(each: Model) -> None:
            each.sleepers = 0
            for child in each.children.values():
                empty(child)

        empty(model)
        wait_until(lambda: self.real(path).state()["procs"] == "0", "all are killed")

    @rule(path=paths, mode=st.sampled_from(MODES))
    def chmod(self, path: list[str], mode: int) -> None:
        model = self.at(path)
        if model is not None:
            os.chmod(self.real(path).path, mode)
            model.mode = mode

    @rule(path=paths, owner=st.sampled_from([(0, 0), (1000, 1000), (1000, 0)]))
    def chown(self, path: list[str], owner: tuple[int, int]) -> None:
        model = self.at(path)
        if model is not None:
            os.chown(self.real(path).path, *owner)
            model.owner = owner

    @rule(path=paths, value=st.sampled_from([*UNSHARES, ALL]))
    def rebuild(self, path: list[str], value: str) -> None:
        model = self.at(path)
        if model is None:
            return
        if value != model.unshare and (model.children or model.sleepers):
            return self.expect(errno.EBUSY, self.real(path).write, "unshare", value)
        if value != model.unshare and self.suspended(path):
            return self.expect(errno.EBUSY, self.real(path).write, "unshare", value)
        self.real(path).write("unshare", value)
        model.unshare = value
        return None

    @rule(path=paths, name=st.sampled_from(["unshare", "limits"]), index=st.integers(0, 2))
    def default(self, path: list[str], name: str, index: int) -> None:
        model = self.at(path)
        if model is not None:
            value = (UNSHARES if name == "unshare" else LIMITS)[index]
            self.real(path).write(f"defaults/{name}", value)
            model.defaults[name] = value

    @precondition(lambda self: self.restarts < 2)
    @rule()
    def restart(self) -> None:
        """kill -9 of the daemon."""
        self.restarts += 1
        self.instance.kill_daemon()

    restarts = 0

    # --- what must hold ---

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "root"):
            return
        self.check([])

    def check(self, path: list[str]) -> None:
        model, real = self.at(path), self.real(path)
        assert model is not None
        there = {name for name in NAMES if (real / name).exists()}
        assert there == set(model.children)
        listed = set(os.listdir(real.path))
        assert {name for name in NAMES if name in listed} == there
        if path:
            found = os.stat(real.path)
            assert found.st_ino == model.inode
            assert found.st_mode & 0o777 == model.mode
            assert (found.st_uid, found.st_gid) == model.owner
            assert real.read("freeze") == f"{int(model.frozen)}\n"
            assert real.read("unshare") == f"{model.unshare}\n"
            above = self.lineage(path[:-1])
            assert above is not None
            for name, last in (("unshare", ALL), ("limits", "pids.max 4096")):
                assert real.read(f"defaults/{name}") == f"{model.default(above, name, last)}\n"
            state = real.state()
            assert state["procs"] == str(model.procs())
            assert state["populated"] == str(int(model.populated()))
            assert state["containers"] == str(model.nested())
            assert len(os.listdir(real / "procs")) == model.procs()
            assert "nsfs-init" in Path(f"/proc/{real.init}/comm").read_text()
        for name in model.children:
            self.check([*path, name])


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """One instance for all examples."""
    with serving(tmp_path_factory.mktemp("model")) as found:
        yield found


@pytest.mark.timeout(600)
def test_the_tree_does_what_the_model_does(instance: Instance) -> None:
    class Machine(Tree):
        pass

    Machine.instance = instance
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=int(os.environ.get("NSFS_TEST_EXAMPLES", "5")),
            stateful_step_count=30,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
