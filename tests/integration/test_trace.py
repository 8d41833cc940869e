"""The tracer by itself: the C program tests/vm/trace.c, which other machines can run as well."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC

VM = Path(__file__).parents[1] / "vm"


@pytest.mark.slow
def test_here(tmp_path: Path) -> None:
    program = tmp_path / "trace"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-static"]
    subprocess.run(["gcc", *flags, "-o", program, VM / "trace.c"], check=True)
    done = subprocess.run([program, LIBEXEC / "nsfs-tracer"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.endswith("\n0 failures\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_aarch64() -> None:
    done = subprocess.run([VM / "aarch64"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
