"""cgroup v2's files as cgroup v1's controllers can have them
(Documentation/admin-guide/cgroup-v1).

`Paths` gives the directory of a container's group in the hierarchy of each controller.  The groups
of nested containers are below it, and nobody inside can make others there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType

from nsfs.kernfs import pairs, read, walk, write
from nsfs.limits import IO_KEYS, NO_LIMIT, Limits, find, to_pages

Paths = Mapping[str, str]
Counters = dict[str, int]

UNLIMITED = 0x7FFFFFFFFFFFF000
"""What memory.limit_in_bytes reads without a limit (PAGE_COUNTER_MAX in bytes)."""

PLAIN = MappingProxyType(
    {
        "memory.current": ("memory", "memory.usage_in_bytes"),
        "memory.peak": ("memory", "memory.max_usage_in_bytes"),
        "pids.current": ("pids", "pids.current"),
        "pids.max": ("pids", "pids.max"),
        "pids.peak": ("pids", "pids.peak"),
    }
)
"""Those that are the same but for the name: controller and file."""

MEMORY_STAT = (
    ("anon", "total_rss"),
    ("file", "total_cache"),
    ("swapcached", "total_swapcached"),
    ("shmem", "total_shmem"),
    ("file_mapped", "total_mapped_file"),
    ("file_dirty", "total_dirty"),
    ("file_writeback", "total_writeback"),
    ("anon_thp", "total_rss_huge"),
    ("inactive_anon", "total_inactive_anon"),
    ("active_anon", "total_active_anon"),
    ("inactive_file", "total_inactive_file"),
    ("active_file", "total_active_file"),
    ("unevictable", "total_unevictable"),
    ("workingset_refault_anon", "total_workingset_refault_anon"),
    ("workingset_refault_file", "total_workingset_refault_file"),
    ("pgfault", "total_pgfault"),
    ("pgmajfault", "total_pgmajfault"),
)
"""memory.stat's keys, v2's and v1's."""

IO_MAX = MappingProxyType(
    {
        "rbps": "blkio.throttle.read_bps_device",
        "wbps": "blkio.throttle.write_bps_device",
        "riops": "blkio.throttle.read_iops_device",
        "wiops": "blkio.throttle.write_iops_device",
    }
)
IO_STAT = (
    ("blkio.throttle.io_service_bytes_recursive", "bytes"),
    ("blkio.throttle.io_serviced_recursive", "ios"),
)


# --- accounting ---


def _memory_stat(paths: Paths) -> str:
    old = pairs(read(f"{paths['memory']}/memory.stat"))
    found = [(new, old[name]) for new, name in MEMORY_STAT if name in old]
    for key, name in (("kernel", "memory.kmem"), ("sock", "memory.kmem.tcp")):
        with contextlib.suppress(FileNotFoundError):
            found.append((key, int(read(f"{paths['memory']}/{name}.usage_in_bytes"))))
    return "".join(f"{key} {value}\n" for key, value in found)


def cpu_stat(paths: Paths) -> str:
    """What v2's cpu.stat has beside the usage; that is there without a controller."""
    old = pairs(read(f"{paths['cpu']}/cpu.stat"))
    return "".join(
        f"{new} {old[name] // unit}\n"
        for new, name, unit in (
            ("nr_periods", "nr_periods", 1),
            ("nr_throttled", "nr_throttled", 1),
            ("throttled_usec", "throttled_time", 1000),
            ("nr_bursts", "nr_bursts", 1),
            ("burst_usec", "burst_time", 1000),
        )
        if name in old
    )


def _memory_events(paths: Paths) -> Counters:
    # v1 counts in the group that it happened to, not in those above.  Of low, high and oom.group it
    # has no more than that there are none.
    found = {"low": 0, "high": 0, "max": 0, "oom_kill": 0, "oom_group_kill": 0}
    for path in walk(paths["memory"]):
        with contextlib.suppress(FileNotFoundError):
            found["max"] += int(read(f"{path}/memory.failcnt"))
            found["oom_kill"] += pairs(read(f"{path}/memory.oom_control"))["oom_kill"]
    return found


def _pids_events(paths: Paths) -> Counters:
    found = {"max": 0}
    for path in walk(paths["pids"]):
        with contextlib.suppress(FileNotFoundError):
            found["max"] += pairs(read(f"{path}/pids.events"))["max"]
    return found


def _io_stat(paths: Paths) -> Counters:
    found: Counters = {}
    for file, unit in IO_STAT:
        for line in read(f"{paths['blkio']}/{file}").splitlines():
            words = line.split()
            letter = {"Read": "r", "Write": "w", "Discard": "d"}.get(words[1])
            if len(words) == 3 and letter:
                found[f"{words[0]} {letter}{unit}"] = int(words[2])
    return found


COUNTERS: Mapping[str, tuple[str, Callable[[Paths], Counters]]] = MappingProxyType(
    {
        "io.stat": ("blkio", _io_stat),
        "memory.events": ("memory", _memory_events),
        "pids.events": ("pids", _pids_events),
    }
)
"""Those whose counts go with the groups of nested containers: controller and how to read them."""


def account_disks(path: str) -> None:
    """Have io.stat counted for the disks that there are; `path` is a group of the blkio hierarchy.

    Since Linux 6.7 that begins with the first limit of a disk, by any group (tg_set_conf() in
    block/blk-throttle.c).  It may wait for requests that the disk has.
    """
    for each in os.scandir("/sys/block"):
        with contextlib.suppress(OSError):
            # Not what is in memory, or is on other disks.
            if os.path.exists(f"{each.path}/device"):
                device = read(f"{each.path}/dev").strip()
                write(f"{path}/{IO_MAX['rbps']}", f"{device} 0")


# --- limits ---


def _limit(value: str) -> str:
    return NO_LIMIT if int(value) >= UNLIMITED else str(int(value))


def _memory_max(paths: Paths) -> str:
    return _limit(read(f"{paths['memory']}/memory.limit_in_bytes"))


def _swap_max(paths: Paths) -> str:
    both = _limit(read(f"{paths['memory']}/memory.memsw.limit_in_bytes"))
    memory = _memory_max(paths)
    return NO_LIMIT if NO_LIMIT in (both, memory) else str(int(both) - int(memory))


def _swap_current(paths: Paths) -> str:
    both = int(read(f"{paths['memory']}/memory.memsw.usage_in_bytes"))
    return str(max(0, both - int(read(f"{paths['memory']}/memory.usage_in_bytes"))))


def _set_memory(paths: Paths, limits: Limits) -> None:
    """v1 limits memory, and memory and swap together, which is never less."""
    memory = to_pages(find(limits, "memory.max") or NO_LIMIT)
    swap = find(limits, "memory.swap.max")
    path = paths["memory"]
    if not swap:
        write(f"{path}/memory.limit_in_bytes", "-1" if memory == NO_LIMIT else memory)
        return
    before = read(f"{path}/memory.memsw.limit_in_bytes")
    write(f"{path}/memory.memsw.limit_in_bytes", "-1")
    try:
        write(f"{path}/memory.limit_in_bytes", "-1" if memory == NO_LIMIT else memory)
        if NO_LIMIT not in (memory, swap):
            both = int(memory) + int(to_pages(swap))
            write(f"{path}/memory.memsw.limit_in_bytes", str(both))
    except OSError:
        write(f"{path}/memory.memsw.limit_in_bytes", before)
        raise


def _cpu_weight(paths: Paths) -> str:
    # sched_weight_to_cgroup(), in kernel/sched/sched.h, and its inverse below.
    shares = int(read(f"{paths['cpu']}/cpu.shares"))
    return str(min(max((shares * 100 + 512) // 1024, 1), 10_000))


def _set_cpu_weight(paths: Paths, limits: Limits) -> None:
    weight = int(find(limits, "cpu.weight"))
    write(f"{paths['cpu']}/cpu.shares", str((weight * 1024 + 50) // 100))


def _cpu_max(paths: Paths) -> str:
    quota, period = (int(read(f"{paths['cpu']}/cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return f"{NO_LIMIT if quota < 0 else quota} {period}"


def _write_cpu_max(path: str, quota: str, period: str) -> None:
    write(f"{path}/cpu.cfs_quota_us", "-1")
    write(f"{path}/cpu.cfs_period_us", period)
    if quota != NO_LIMIT:
        write(f"{path}/cpu.cfs_quota_us", quota)


def _set_cpu_max(paths: Paths, limits: Limits) -> None:
    """v1 refuses a quota beyond that of a group above (__cfs_schedulable()), where v2 has the
    lesser one hold: so a group has none of its own where one above is less."""
    path = paths["cpu"]
    quota, period = find(limits, "cpu.max").split()
    try:
        _write_cpu_max(path, quota, period)
        return
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    for below in walk(path):
        other, its_period = _cpu_max({"cpu": below}).split()
        if other != NO_LIMIT and int(other) * int(period) > int(quota) * int(its_period):
            write(f"{below}/cpu.cfs_quota_us", "-1")
    try:
        _write_cpu_max(path, quota, period)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def bfq_weight(weight: int) -> int:
    """io.weight, 1 to 10000, as BFQ's, 1 to 1000: 100 is 100 (as systemd has it)."""
    if weight <= 100:
        return weight
    return 100 + (weight - 100) * 900 // 9900


def _io_weight(paths: Paths) -> str:
    weight = int(read(f"{paths['blkio']}/blkio.bfq.weight").split()[-1])
    return f"default {weight if weight <= 100 else 100 + (weight - 100) * 9900 // 900}"


def _set_io_weight(paths: Paths, limits: Limits) -> None:
    weight = int(find(limits, "io.weight").split()[1])
    write(f"{paths['blkio']}/blkio.bfq.weight", str(bfq_weight(weight)))


def _io_max(paths: Paths) -> str:
    found: dict[str, dict[str, str]] = {}
    for key, file in IO_MAX.items():
        for line in read(f"{paths['blkio']}/{file}").splitlines():
            device, value = line.split()
            found.setdefault(device, {})[key] = value
    return "\n".join(
        f"{device} " + " ".join(f"{key}={chosen.get(key, NO_LIMIT)}" for key in IO_KEYS)
        for device, chosen in found.items()
    )


def set_io_max(paths: Paths, value: str) -> None:
    """The limits of one device; ENODEV when there is none."""
    device, *words = value.split()
    for word in words:
        key, _, number = word.partition("=")
        number = "0" if number == NO_LIMIT else number
        write(f"{paths['blkio']}/{IO_MAX[key]}", f"{device} {number}")


def _text(name: str) -> Callable[[Paths], str]:
    controller, file = PLAIN[name]
    return lambda paths: read(f"{paths[controller]}/{file}").strip()


GET: Mapping[str, tuple[str, Callable[[Paths], str]]] = MappingProxyType(
    {
        **{name: (controller, _text(name)) for name, (controller, _) in PLAIN.items()},
        "cpu.max": ("cpu", _cpu_max),
        "cpu.weight": ("cpu", _cpu_weight),
        "io.max": ("blkio", _io_max),
        "io.weight": ("blkio", _io_weight),
        "memory.max": ("memory", _memory_max),
        "memory.stat": ("memory", _memory_stat),
        "memory.swap.current": ("memory", _swap_current),
        "memory.swap.max": ("memory", _swap_max),
    }
)
"""Controller, and how to read a value."""

SET: Mapping[str, Callable[[Paths, Limits], None]] = MappingProxyType(
    {
        "cpu.max": _set_cpu_max,
        "cpu.weight": _set_cpu_weight,
        "io.weight": _set_io_weight,
        "memory.max": _set_memory,
        "memory.swap.max": _set_memory,
        "pids.max": lambda paths, limits: write(
            f"{paths['pids']}/pids.max", find(limits, "pids.max")
        ),
    }
)
"""How to set one of a group's limits, all of which are given."""


def same(name: str, written: str, now: str) -> bool:
    """Whether a value that is read now is what became of one that was written."""
    if name == "cpu.max":
        # Not of its own, when one above is less.
        return now.split()[0] == NO_LIMIT
    if name == "io.weight":
        return bfq_weight(int(written.split()[1])) == bfq_weight(int(now.split()[1]))
    # Without memory.max there is nothing to add it to.
    return name == "memory.swap.max" and now == NO_LIMIT
