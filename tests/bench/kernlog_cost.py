"""What marks cost a packet: python -m tests.bench.kernlog_cost [PACKETS].

Packets are sent in, and through, a container's network namespace by way of veth pairs, where all of
it is done before sendto(2) returns.  With the marks, and without (`kernel_lines = own`), in turn.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.integration.conftest import Container, serving, wait_until
from tests.integration.firewall import Net, tier

SEND = """
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 5001))
n = int(sys.argv[2])
begin = time.perf_counter()
for i in range(n):
    try:
        s.send(b"x")
    except OSError:
        pass
print((time.perf_counter() - begin) / n * 1e6)
"""


def measure(best: str, packets: int) -> dict[str, float]:
    """Microseconds a packet: to a closed port of the namespace, and forwarded by it."""
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (base / "conf").write_text(f"[log]\nkernel_lines = {best}\n")
        instance = stack.enter_context(serving(base, ["--config", str(base / "conf")]))
        wait_until(lambda: tier(instance) == best, "there is a tier")
        (base / "tree/a").mkdir()
        net = Net("a", Container(base / "tree/a").init)
        stack.callback(net.close)
        time.sleep(0.5)
        found = {}
        for name, to in (("in", "10.9.0.1"), ("forward", "10.9.1.9")):
            words = ["python3", "-c", SEND, to, str(packets)]
            enter = ["nsenter", f"--net=/proc/{net.sender_host.pid}/ns/net"]
            done = subprocess.run([*enter, *words], check=True, capture_output=True, text=True)
            found[name] = float(done.stdout)
        subprocess.run(["rm", "-rf", str(base / "tree/a")], check=True)
        instance.settled()
    return found


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    runs: dict[str, list[dict[str, float]]] = {"exact": [], "own": []}
    for _ in range(5):
        for best, results in runs.items():
            results.append(measure(best, count))
    medians = {
        best: {name: statistics.median(r[name] for r in results) for name in ("in", "forward")}
        for best, results in runs.items()
    }
    print(json.dumps({"us": medians, "runs": runs}, indent=1))
