"""scripts/check finds nothing in the source."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.programs import PACKAGES

TOP = Path(__file__).parents[2]


# gcc -fanalyzer and a first mypy take their time on a slow machine.
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["ruff", "format", "types", "c", "aarch64", "shell"])
def test_check(name: str) -> None:
    ran = subprocess.run(
        [TOP / "scripts/check", name], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith(f"{name}: ok\n")


def test_every_check_is_tested() -> None:
    marks = test_check.pytestmark  # type: ignore[attr-defined]
    names = next(mark for mark in marks if mark.name == "parametrize").args[1]
    assert f"set -- {' '.join(names)}\n" in (TOP / "scripts/check").read_text()


def test_check_that_does_not_exist() -> None:
    ran = subprocess.run([TOP / "scripts/check", "nope"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == "scripts/check: no check is called nope\n"


def test_what_the_tests_run_is_installed() -> None:
    """By scripts/setup --test, where a program of these is looked for."""
    lists = re.findall(r"^\w*packages=\((.*?)^\)", (TOP / "scripts/setup").read_text(), re.M | re.S)
    assert set(PACKAGES.values()) <= set(" ".join(lists).split())
