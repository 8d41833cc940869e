"""What a call of syslog(2) costs inside, beside the host's own, and what the filter costs others.

    unshare -m --propagation private python -m tests.bench.syslog_cost [COUNT] [CONTAINERS]

Prints JSON: for each caller and call the median and the 10th and 90th percentile, in microseconds.
`inside` is a container, `denied` one with `seccomp` `deny`, `host` the host; the host's log is only
read.  getppid(2) is a call that no filter asks for.  Then what so many idle containers cost the
daemon: descriptors, and CPU time in a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.integration.conftest import Container, Instance, serving
from tests.integration.test_syslog import PRELUDE

MEASURE = r"""
def measure(call, count):
    clock, found = time.perf_counter_ns, []
    for _ in range(count):
        begin = clock()
        call()
        found.append((clock() - begin) / 1000)
    found.sort()
    return {"median_us": found[count // 2], "p10_us": found[count // 10], "p90_us": found[-(count // 10)]}
import json
count = COUNT
result = {"size": measure(lambda: native(10), count), "unread": measure(lambda: native(9), count)}
if native(10) != "EPERM":
    result["size, 32-bit"] = measure(lambda: i386(10), count)
    result["read all"] = measure(lambda: native(3, buf, 1000), count)
    result["read all, 16 kB"] = measure(lambda: native(3, buf, 16384), count)
result["getppid"] = measure(libc.getppid, 10 * count)
print(json.dumps(result))
"""


def cpu_s(pid: int) -> float:
    """CPU time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle(instance: Instance, count: int) -> dict[str, Any]:
    """What containers that do nothing cost the daemon."""

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{instance.daemon()}/fd"))

    before = descriptors()
    for number in range(count):
        (instance.tree / f"c{number}").mkdir()
    time.sleep(2)
    after = descriptors()
    begin = cpu_s(instance.daemon())
    time.sleep(5)
    used = cpu_s(instance.daemon()) - begin
    instance.kill_daemon()
    started = time.monotonic()
    (instance.tree / f"c{count - 1}" / "state").read_text()
    taken_up = time.monotonic() - started
    for number in range(count):
        subprocess.run(["rm", "-rf", instance.tree / f"c{number}"], check=True)
    instance.settled()
    return {
        "containers": count,
        "descriptors_each": round((after - before) / count, 3),
        "cpu_s_per_s": round(used / 5, 4),
        "first_answer_of_the_next_daemon_s": round(taken_up, 3),
    }


def main() -> None:
    """Measure all."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    containers = int(sys.argv[2]) if len(sys.argv) > 2 else 300
    code = PRELUDE + MEASURE.replace("COUNT", str(count))
    host = subprocess.run(["python3", "-c", code], check=True, capture_output=True, text=True)
    result = {"host": json.loads(host.stdout)}
    with tempfile.TemporaryDirectory() as base, serving(Path(base)) as instance:
        web = Container(instance.tree / "web")
        for name, value in (("inside", "notify"), ("denied", "deny")):
            web.path.mkdir()
            web.write("seccomp", value)
            web.run("for n in $(seq 300); do echo $n 3456789 123456789 123456789 > /dev/kmsg; done")
            out = web.run(f"python3 - <<'END'\n{code}\nEND")
            result[name] = json.loads(out)
            subprocess.run(["rm", "-rf", web.path], check=True)
            instance.settled()
        result["idle"] = idle(instance, containers)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
