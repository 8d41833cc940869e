"""The sysctl nf_log_all_netns and its note, with plain files in their place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nsfs.firewall import FirewallLog, Rate


class Files:
    """A note and a sysctl."""

    def __init__(self, path: Path) -> None:
        self.note = path / "note"
        self.sysctl = path / "sysctl"
        self.sysctl.write_text("0\n")

    def open(self, wanted: bool = True) -> FirewallLog:
        """An instance of nsfs begins."""
        return FirewallLog(wanted, str(self.note), str(self.sysctl))

    @property
    def value(self) -> str:
        """What the sysctl is."""
        return self.sysctl.read_text()[:1]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Off, and no note."""
    return Files(tmp_path)


@pytest.mark.parametrize("before", ["0", "1"])
def test_what_there_was_is_put_back(files: Files, before: str) -> None:
    files.sysctl.write_text(f"{before}\n")
    switch = files.open()
    assert switch.on
    assert files.value == "1"
    switch.close()
    assert files.value == before
    assert not files.note.exists()
    # Twice is once.
    switch.close()


def test_nobody_asked_for_it(files: Files) -> None:
    switch = files.open(wanted=False)
    assert (files.value, switch.on, switch.paused) == ("0", False, 0)
    switch.pause(10)
    switch.resume()
    switch.close()
    assert files.value == "0"
    assert not files.note.exists()


def test_the_last_of_several(files: Files) -> None:
    one, two = files.open(), files.open()
    one.close()
    assert files.value == "1"
    three = files.open()
    two.close()
    assert files.value == "1"
    three.close()
    assert files.value == "0"
    assert not files.note.exists()


def killed(files: Files) -> None:
    """An instance that was killed: nobody holds its lock."""
    switch = files.open()
    note, value = files.note.read_text(), files.value
    switch.close()
    files.note.write_text(note)
    files.sysctl.write_text(f"{value}\n")


def test_one_that_was_killed(files: Files) -> None:
    killed(files)
    assert files.value == "1"
    # What there was before is in its note.
    switch = files.open()
    switch.close()
    assert files.value == "0"


@pytest.mark.parametrize("stale", ["1\n0-another-boot\n0\n", "", "garbage", "\0\xff", "2\n"])
def test_a_note_that_says_nothing_of_now(files: Files, stale: str) -> None:
    files.note.write_text(stale)
    switch = files.open()
    assert files.value == "1"
    switch.close()
    assert files.value == "0"
    assert not files.note.exists()


def test_a_note_that_becomes_unreadable_while_it_is_held(files: Files) -> None:
    one = files.open()
    files.note.write_text("")
    two = files.open()
    two.pause(10)
    for each in (one, two):
        each.close()
    # What there was is not known any more: it stays as it is.
    assert files.value == "1"
    assert not files.note.exists()


def test_a_pause_is_everybodys(files: Files) -> None:
    one, two = files.open(), files.open()
    one.pause(10)
    assert files.value == "0"
    assert 9 < two.paused <= 10
    two.resume()
    assert files.value == "0"
    three = files.open()
    assert files.value == "0"
    assert three.paused
    one.pause(0)
    three.resume()
    assert files.value == "1"
    for each in (one, two, three):
        each.close()
    assert files.value == "0"


def test_a_pause_outlives_who_made_it(files: Files) -> None:
    switch = files.open()
    switch.pause(100)
    note = files.note.read_text()
    switch.close()
    files.note.write_text(note)
    files.sysctl.write_text("0\n")
    switch = files.open()
    assert files.value == "0"
    assert switch.paused > 90
    switch.close()


def test_the_rate_is_of_one_second() -> None:
    rate = Rate()
    now = time.monotonic()
    assert rate.quiet
    for n in range(20):
        assert rate.count(now + n * 0.1)
    assert len(rate) == 11
    assert not rate.quiet
    # What was printed long ago is nothing new.
    assert not rate.count(now - 60)
    assert len(rate) == 11
    rate.clear()
    assert rate.quiet
    assert not len(rate)
