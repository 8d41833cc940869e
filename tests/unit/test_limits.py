"""nsfs.limits: what may be written; nsfs.cgroup1: v2's values as v1 has them, and back."""

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs import cgroup1, limits

VALUES = {
    "cpu.max": st.from_regex(r"(max|[0-9]{4,7})( [0-9]{4,6})?", fullmatch=True),
    "cpu.weight": st.integers(1, 10_000).map(str),
    "io.max": st.from_regex(r"[0-9]{1,3}:[0-9]{1,3} (r|w)bps=[1-9][KMGT]?", fullmatch=True),
    "io.weight": st.integers(1, 10_000).map(str),
    **dict.fromkeys(
        ("memory.high", "memory.low", "memory.max", "memory.swap.max"),
        st.from_regex(r"max|[0-9]{1,5}[KMGTkmgt]?", fullmatch=True),
    ),
    "pids.max": st.integers(1, 4_194_304).map(str),
}


@pytest.mark.parametrize("name", limits.NAMES)
@given(data=st.data())
def test_what_is_read_can_be_written(name: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[name])
    try:
        once = limits.parse(name, value)
    except OSError as error:
        assert error.errno == errno.ERANGE
        return
    assert limits.parse(name, once) == once
    assert limits.parse(name, f"  {value} ") == once
    assert limits.parse_lines([f"{name} {once}"]) == ((name, once),)


@given(st.sampled_from(limits.NAMES), st.text(max_size=20))
def test_anything_else_is_refused_in_a_sentence(name: str, value: str) -> None:
    try:
        limits.parse(name, value)
    except OSError as error:
        assert error.errno in (errno.EINVAL, errno.ERANGE)
        assert error.strerror


def test_bytes_have_suffixes() -> None:
    assert limits.parse("memory.max", "64M") == str(64 << 20)
    assert limits.parse("memory.max", "1t") == str(1 << 40)
    for value, number in (("64X", errno.EINVAL), ("-1", errno.ERANGE), ("9999999T", errno.ERANGE)):
        with pytest.raises(OSError, match="'") as caught:
            limits.parse("memory.max", value)
        assert caught.value.errno == number


def test_what_is_not_written_stays() -> None:
    assert limits.parse("cpu.max", "5000", "max 20000") == "5000 20000"
    now = limits.parse("io.max", "8:0 rbps=5")
    assert limits.parse("io.max", "8:0 wiops=7", now) == "8:0 rbps=5 wbps=max riops=max wiops=7"


def test_merging_is_by_name_and_device() -> None:
    found = limits.merged((), "pids.max", "5")
    found = limits.merged(found, "io.max", limits.parse("io.max", "8:0 rbps=5"))
    found = limits.merged(found, "io.max", limits.parse("io.max", "8:16 rbps=6"))
    found = limits.merged(found, "pids.max", "7")
    assert [value.split()[0] for _, value in found] == ["7", "8:0", "8:16"]
    assert limits.find(found, "io.max", "8:16").startswith("8:16 rbps=6 ")
    assert limits.find(found, "pids.max") == "7"
    assert not limits.find(found, "cpu.max")


def test_weights_come_back_from_v1(tmp_path: Path) -> None:
    paths = {"cpu": str(tmp_path), "blkio": str(tmp_path)}
    (tmp_path / "cpu.shares").touch()
    (tmp_path / "blkio.bfq.weight").touch()
    for weight in (1, 2, 3, 50, 77, 99, 100, 101, 777, 5000, 9999, 10_000):
        (tmp_path / "cpu.shares").write_text("")
        cgroup1.SET["cpu.weight"](paths, (("cpu.weight", str(weight)),))
        assert cgroup1.GET["cpu.weight"][1](paths) == str(weight)
        (tmp_path / "blkio.bfq.weight").write_text("")
        cgroup1.SET["io.weight"](paths, (("io.weight", f"default {weight}"),))
        assert 1 <= int((tmp_path / "blkio.bfq.weight").read_text()) <= 1000
        assert cgroup1.same("io.weight", f"default {weight}", cgroup1.GET["io.weight"][1](paths))
