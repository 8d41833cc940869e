"""Limits of containers: in their groups, and in the record that a rebuild goes by."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import trio

from nsfs.container import Container
from nsfs.limits import DEVICES, find, key, merged, no_limit, parse

_limiting = trio.CapacityLimiter(16)


async def limit(container: Container, name: str, values: Sequence[str]) -> None:
    """Set a limit of a container that runs, with `DEVICES` those of several; it is kept with its
    construction.

    EINVAL, ERANGE: the value; EOPNOTSUPP: no controller of this host has it; what the kernel says
    to it.  On an error nothing has changed.  The kernel may take long over it, as when memory has
    to be reclaimed: a thread waits.  When nobody waits for that any more, the limit holds
    nevertheless, as with cgroupfs itself.
    """
    for value in values:
        parse(name, value)
    async with container.limiting:
        before, done = container.build.limits, list[str]()
        try:
            for value in values:
                await _limit(container, name, value)
                done.append(value.split()[0])
        except OSError:
            for device in done:
                await _limit(container, name, find(before, name, device) or no_limit(device))
            raise


async def _limit(container: Container, name: str, value: str) -> None:
    while True:
        while not container.settled.is_set():
            await container.settled.wait()
        container.check_alive()
        group, limits = container.group, container.build.limits
        chosen = parse(name, value)
        now = find(limits, *key(name, chosen)) if name in DEVICES else group.shown(name, limits)
        chosen = parse(name, value, now)
        try:
            await trio.to_thread.run_sync(
                group.set, name, chosen, limits, abandon_on_cancel=True, limiter=_limiting
            )
        except trio.Cancelled:
            _keep(container, name, chosen)
            raise
        if container.settled.is_set():
            break
        # It is being built anew, with what was set before.
    _keep(container, name, chosen)


def _keep(container: Container, name: str, value: str) -> None:
    limits = merged(container.build.limits, name, value)
    container.build = replace(container.build, limits=limits)
    container.save()
    if name == "cpu.max" and "cpu" in container.group.v1:
        # A lesser one above is no longer, or newly is, what holds.
        for each in container.descendants():
            own = find(each.build.limits, name)
            if own:
                with contextlib.suppress(OSError):
                    each.group.set(name, own, each.build.limits)


async def set_limits(container: Container, gone: tuple[int, ...] = ()) -> None:
    """Set those of its construction in new groups; an errno of `gone` is no error of io.*."""
    limits = container.build.limits
    for name, value in limits:
        if name.startswith("io."):
            try:
                # The device may not answer.
                await trio.to_thread.run_sync(
                    container.group.set, name, value, limits, abandon_on_cancel=True
                )
            except OSError as error:
                # A disk may have been taken away since.
                if error.errno not in gone:
                    raise
        else:
            container.group.set(name, value, limits)


async def lift_io(container: Container) -> None:
    """What is held back by io.max cannot be killed before it is let through."""
    for each in [*container.descendants(), container]:
        for name, value in each.build.limits:
            if name == "io.max":
                lifted = no_limit(value.split()[0])
                with contextlib.suppress(OSError):
                    await trio.to_thread.run_sync(each.group.set, name, lifted, limiter=_limiting)
