"""nsfs-marker as it is built: what it lacks where there is no clang, and what is chosen then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from nsfs.marker import LIBEXEC, OBJECT, PROGRAM, Marker, Tier

from .conftest import EXACT

TOP = Path(__file__).parents[2]
# What setup.py does for nsfs-marker, and nothing else of it.
BUILD = """
import pathlib, runpy, setuptools, sys
setuptools.setup = lambda **_: None
runpy.run_path("setup.py")["compile_marker"](pathlib.Path("nsfs/csrc"), pathlib.Path(sys.argv[1]))
"""


def build(libexec: Path, clang: str) -> str:
    """Build it with that compiler; what was said."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(libexec)],
        check=True,
        cwd=TOP,
        env={**os.environ, "CLANG": clang},
        capture_output=True,
        text=True,
    )
    return done.stderr


def best(libexec: Path) -> Tier:
    """The best tier of a build, on this kernel."""

    async def start() -> Tier:
        marker = await Marker.start(Tier.EXACT, f"nsfs-test-{os.getpid()}", libexec)
        await marker.aclose()
        return marker.tier

    return trio.run(start)


@pytest.mark.parametrize("clang", ["no-such-compiler", "false"])
def test_a_build_without_clang(tmp_path: Path, clang: str) -> None:
    (tmp_path / OBJECT).write_bytes(b"of an earlier build")
    assert "attributed by context only" in build(tmp_path, clang)
    # Nothing is left that would be tried.
    assert [path.name for path in tmp_path.iterdir()] == [PROGRAM]
    asked = [tmp_path / PROGRAM, "--bpf", LIBEXEC / OBJECT]
    done = subprocess.run(asked, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Function not implemented" in done.stderr
    assert best(tmp_path) is Tier.CONTEXT


@pytest.mark.parametrize("data", [b"", b"no object file"])
def test_a_program_that_the_kernel_does_not_take(tmp_path: Path, data: bytes) -> None:
    (tmp_path / PROGRAM).symlink_to(LIBEXEC / PROGRAM)
    (tmp_path / OBJECT).write_bytes(data)
    assert best(tmp_path) is Tier.CONTEXT


def test_this_build() -> None:
    assert best(LIBEXEC) is (Tier.EXACT if EXACT else Tier.CONTEXT)
