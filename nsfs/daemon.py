"""The daemon: what the supervisor starts again and again.  pyfuse3's beginning and end, the root
nursery.

Everything that is acquired pushes its undo at once onto one exit stack.  All that the daemon knows
is also in the run directory, so any moment is a good one to die.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import json
import logging
import os
import pkgutil
import resource
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyfuse3
import trio

import nsfs.entries
import nsfs.views
from nsfs import cgroup1, config, console, graft, leaf, lifecycle
from nsfs.attribute import Entry, TagType
from nsfs.cgroup import Hierarchies
from nsfs.container import ROOT, reserved
from nsfs.discovery import Discovery
from nsfs.fs import Operations
from nsfs.instance import Instance
from nsfs.kernlog import Router
from nsfs.spare import Spares
from nsfs.spawner import FEATURES, Spawner
from nsfs.store import Store
from nsfs.syslog import Syslog
from nsfs.takeover import Device, Supervisor
from nsfs.world import World

log = logging.getLogger("nsfs")

MAX_TASKS = 100_000
"""A handler that waits holds a task of pyfuse3, and with none left the whole tree would hang."""
END_WAIT_S = 30.0
"""How long the processes of containers that were killed at the end may take to go."""


def tables(further: Iterable[PurePosixPath] = ()) -> tuple[Entry, ...]:
    """The entries of a container's directory: every table of `nsfs.entries` and `nsfs.views`, and
    of the files that the configuration names."""
    found: list[Entry] = []
    for package in (nsfs.entries, nsfs.views):
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
            found += importlib.import_module(f"{package.__name__}.{module.name}").FILES
    for path in further:
        found += _views_of(path, {entry.name for entry in found})
    return tuple(found)


def _views_of(path: PurePosixPath, taken: set[str]) -> tuple[TagType, ...]:
    """The table of a file that the configuration names; ConfigError when it has none."""
    try:
        spec = importlib.util.spec_from_file_location(f"nsfs_view_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError("not a file of Python: its name does not end in .py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = tuple(module.FILES)
        for each in found:
            if not isinstance(each, TagType) or each.name in taken or reserved(each.name):
                raise ValueError(f"not a view of a new name: {each.name}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise config.ConfigError([f"views.modules: {path}: {reason}"]) from error
    return found


def arguments() -> argparse.ArgumentParser:
    """What the supervisor passes on."""
    parser = argparse.ArgumentParser(prog="nsfs-daemon")
    parser.add_argument("--dir", required=True)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--cgroup", required=True)
    parser.add_argument("--config")
    return parser


class Control:
    """The daemon's side of `nsfs umount` and `nsfs status`: one JSON object asked, one answered."""

    def __init__(
        self,
        world: World,
        args: argparse.Namespace,
        features: frozenset[str],
        router: Router,
        spares: Spares,
        discovery: Discovery,
    ) -> None:
        self.world = world
        self.args = args
        self.features = features
        self.router = router
        self.spares = spares
        self.discovery = discovery
        self.end = trio.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[trio.socket.SocketType]:
        """The socket, below the run directory, which only root can search."""
        path = f"{self.args.run_dir}/control"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        plain.bind(path)
        plain.listen(16)
        with trio.socket.from_stdlib_socket(plain) as listener:
            yield listener

    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Answer whoever asks; for ever."""
        while True:
            connection, _ = await listener.accept()
            assert self.world.nursery is not None
            self.world.nursery.start_soon(self._answer, connection)

    async def _answer(self, connection: trio.socket.SocketType) -> None:
        with connection, contextlib.suppress(OSError, ValueError):
            with trio.move_on_after(5):
                asked = json.loads(await connection.recv(65536))
                await connection.send(json.dumps(self._reply(asked)).encode())

    def _reply(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked.get("do") == "status":
            return self._status()
        if asked.get("do") == "umount":
            count = sum(1 for _ in self.world.root.descendants())
            if count and not asked.get("kill"):
                return {"error": "busy", "containers": count}
            self.end.set()
            return {"containers": count}
        return {"error": "unknown"}

    def _status(self) -> dict[str, Any]:
        hierarchies = self.world.hierarchies
        return {
            "dir": self.args.dir,
            "cgroup": self.world.root.group.path,
            "daemon": os.getpid(),
            "containers": sum(1 for _ in self.world.root.descendants()),
            "spare": len(self.spares.ready),
            "controllers": {
                "v2": sorted(hierarchies.controllers),
                "v1": sorted(hierarchies.v1),
            },
            "features": {
                **{name: name in self.features for name in FEATURES.values()},
                "shared_cgroup": not hierarchies.delegates,
            },
            "kernel_lines": self.router.status(),
            "discovery": self.discovery.status(),
        }


async def run(args: argparse.Namespace, device: Device, supervisor: Supervisor) -> None:
    """Serve until told to end; then end every container."""
    settings = config.load(Path(args.config) if args.config else None)
    entries = tables(settings.views.modules)
    async with contextlib.AsyncExitStack() as stack:
        # Before anything grows: a fork of a big process is slow.
        spawner = await stack.enter_async_context(Spawner.running(args.dir))
        world = World(
            store=Store(args.run_dir),
            hierarchies=Hierarchies.detect(),
            config=settings,
            group=args.cgroup,
        )
        world.spawner = spawner
        # The kernel knows `.f` already.
        world.primed = device.takeover
        world.device_numbers = graft.device_numbers(args.dir)
        world.root.group.create_top()
        operations = Operations(world, entries, device)
        options = {"fsname=namespaces", "default_permissions", "allow_other"}
        pyfuse3.init(operations, device.path, options)
        # The mount is the supervisor's to take down.
        stack.callback(pyfuse3.close, unmount=False)
        router = Router(world)
        syslog = Syslog(world)
        spares = Spares(world)
        discovery = Discovery(world)
        control = Control(world, args, await spawner.features(), router, spares, discovery)
        listener = stack.enter_context(control.listening())
        async with trio.open_nursery() as nursery:
            world.nursery = nursery
            await lifecycle.resume(world)
            leaf.resume(world)
            console.resume(world)
            await discovery.begin()
            nursery.start_soon(_serve, operations)
            nursery.start_soon(_need, spawner)
            nursery.start_soon(_pass_interrupts, operations, device)
            nursery.start_soon(world.watch_events)
            nursery.start_soon(world.notices.run)
            nursery.start_soon(_account_disks, world)
            nursery.start_soon(router.run)
            nursery.start_soon(syslog.run)
            nursery.start_soon(world.housekeeping)
            nursery.start_soon(spares.run)
            nursery.start_soon(discovery.run)
            nursery.start_soon(control.serve, listener)
            nursery.start_soon(_wait_for_signal, control.end)
            nursery.start_soon(_watch_supervisor, supervisor, args.run_dir)
            await world.prime()
            if not device.takeover:
                await lifecycle.show_again(world)
            device.ready()
            log.info("generation %d serves %s", device.generation, args.dir)
            await control.end.wait()
            spares.close()
            await _end_all(world)
            nursery.cancel_scope.cancel()


async def _account_disks(world: World) -> None:
    path = world.root.group.v1.get("blkio")
    if path is not None:
        await trio.to_thread.run_sync(cgroup1.account_disks, path, abandon_on_cancel=True)


async def _serve(operations: Operations) -> None:
    await pyfuse3.main(min_tasks=8, max_tasks=MAX_TASKS)
    log.info("the mount is gone")


async def _need(spawner: Spawner) -> None:
    # The next daemon starts another one, and answers what this one could not.
    await spawner.died.wait()
    raise OSError(errno.EPIPE, "the spawner has died")


async def _pass_interrupts(operations: Operations, device: Device) -> None:
    async for unique in device.interrupts():
        operations.interrupt(unique)


async def _wait_for_signal(end: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            end.set()


async def _watch_supervisor(supervisor: Supervisor, run_dir: str) -> None:
    """Start another supervisor when ours is killed.

    It takes the device from this daemon and kills it, so that the next one is a child of its own.
    """
    await supervisor.died()
    log.warning("the supervisor is gone")
    instance = Instance(run_dir)
    try:
        if "--foreground" in instance.command():
            # Whoever had it started, such as systemd(1), starts it again.
            log.warning("the next nsfs mount takes its place")
            return
        words = instance.adopting(foreground=False)
        # Of a process as big as this; but it is to end now.
        pid = os.posix_spawn(words[0], words, os.environ)  # noqa: ASYNC221
    except OSError as error:
        log.error("no other can be started: %s", error)
        return
    await trio.to_thread.run_sync(os.waitpid, pid, 0, abandon_on_cancel=True)
    log.error("the other one did not start")


async def _end_all(world: World) -> None:
    for each in list(world.root.children.values()):
        lifecycle.end(each)
    with trio.move_on_after(END_WAIT_S):
        await world.emptied()
    if len(world.containers) > 1:
        log.error("%d containers have processes that do not end", len(world.containers) - 1)
    world.root.group.remove()
    for found in list(world.found.values()):
        world.lose(found)
    # The next instance begins as its configuration says.
    world.store.drop(ROOT)


def main(argv: list[str] | None = None) -> int:
    """The program; 0 after a clean end, which the supervisor takes as its own."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    args = arguments().parse_args(argv)
    # Two for each container whose log and output somebody has looked at.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        device = Device.from_environment()
        supervisor = Supervisor(args.run_dir)
        trio.run(run, args, device, supervisor)
        if not supervisor.lives():
            Instance(args.run_dir).take_down(args.dir)
    except (OSError, config.ConfigError) as error:
        log.error("%s", error)
        return 1
    except BaseException:
        log.exception("the daemon failed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
