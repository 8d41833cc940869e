"""How many LOG lines reach their container, in each tier: python -m tests.bench.kernlog [LINES].

Four network namespaces with the same addresses and interface names (containers a and b, c nested in
a, f that is nobody's) get packets in, through and out, rules before and after the marks logging
each.  In bursts of some hundred lines, which is what the host's log holds.  Run it in a mount
namespace of its own, as scripts/bench does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.integration.conftest import Container, serving, wait_until
from tests.integration.firewall import (
    CHAINS,
    Net,
    attached,
    caught_up,
    foreign,
    kernel,
    looked,
    prefixes,
    texts,
    traffic,
)
from tests.integration.firewall import (
    tier as tier_of,
)

LINES_A_ROUND = 10
"""Of the three packets of a round, one comes in (3 lines), one goes through (4), one out (3)."""


class Truth:
    """What the host's kernel prints, read from its /dev/kmsg by ourselves."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)
        self._end = False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._end:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                while True:
                    self.lines.append(os.read(self._fd, 8192).decode().split(";", 1)[1])
            time.sleep(0.001)

    def close(self) -> None:
        """Read no more."""
        self._end = True
        self._thread.join()
        os.close(self._fd)


def measure(tier: str, lines: int, pace_s: float) -> dict[str, object]:
    """Delivered and lost, right and wrong, in one tier."""
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = base / "nsfs.conf"
        config.write_text(
            f"[log]\nkernel_lines = {tier}\nfirewall_rate = max\nrate = max\nbytes = 16M\n"
        )
        instance = stack.enter_context(serving(base, ["--config", str(config)]))
        wait_until(lambda: tier_of(instance) == tier, "there is a tier")
        # Others on the machine may do the same.
        tag = f"{os.getpid()}"
        paths = {"a": base / "tree/a", "b": base / "tree/b", "c": base / "tree/a/c"}
        for path in paths.values():
            path.mkdir()
        boxes = {name: Container(path) for name, path in paths.items()}
        nets = [Net(tag + name, box.init, box) for name, box in boxes.items()]
        nets.append(Net(tag + "f", foreign(stack)))
        for net in nets:
            stack.callback(net.close)
            net.rules()
        attached(instance, 3)
        if tier == "context":
            # Names are read each second.
            looked(instance)
        (base / "tree/kmsg").write_text("")
        before = instance.status()["kernel_lines"]["lines"]
        truth = Truth()
        stack.callback(truth.close)
        sent: Counter[str] = Counter()
        rounds = lines // (4 * LINES_A_ROUND)
        while rounds > 0:
            sent += traffic(nets, min(rounds, 60), pace_s)
            rounds -= 60
        caught_up(instance)
        # Others on the machine may have switched LOG lines off meanwhile: what was printed counts.
        expected = prefixes(line for line in truth.lines if line.startswith(tag))
        status = instance.status()["kernel_lines"]
        wrong = own = right = 0
        missing: Counter[str] = Counter()
        for name, box in boxes.items():
            found = prefixes(kernel(box))
            wrong += sum(n for p, n in found.items() if not p.startswith(f"{tag}{name}-"))
            for prefix, count in expected.items():
                if prefix.startswith(f"{tag}{name}-"):
                    own += count
                    right += min(found[prefix], count)
                    if found[prefix] != count:
                        missing[prefix.split("-")[1]] += count - found[prefix]
        host = prefixes(texts((base / "tree/kmsg").read_text()))
        result = {
            "tier": tier,
            "sent": sum(sent.values()),
            "printed": sum(expected.values()),
            "read": status["lines"] - before,
            "own": own,
            "delivered": right,
            "percent": round(100 * right / own, 3),
            "wrong": wrong,
            "missing": dict(missing),
            "host_of_f": sum(n for p, n in host.items() if p.startswith(f"{tag}f-")),
            "of_f": sum(n for p, n in expected.items() if p.startswith(f"{tag}f-")),
            "chains": list(CHAINS),
            "status": status,
        }
        subprocess.run(["rm", "-rf", str(paths["a"]), str(paths["b"])], check=True)
        instance.settled()
    return result


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for each in sys.argv[2:] or ["exact", "context", "own"]:
        print(json.dumps(measure(each, count, 0.03)), flush=True)
