"""nsfs.config: the administrator's file, its defaults and its errors."""

import re
from dataclasses import FrozenInstanceError, asdict, fields
from ipaddress import IPv4Network
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs import config, limits
from nsfs.config import Config, ConfigError, parse

EXAMPLE = Path(__file__).parents[2] / "nsfs.conf.example"


def errors_of(text: str) -> tuple[str, ...]:
    try:
        parse(text, "nsfs.conf")
    except ConfigError as error:
        reasons = error.errors
        message = str(error)
    else:
        return ()
    assert reasons
    assert message == "\n".join(reasons)
    return reasons


def test_empty_file_is_the_defaults() -> None:
    assert parse("", "nsfs.conf") == Config()
    defaults = Config()
    assert defaults.mount.dir == PurePosixPath("/sys/namespaces")
    assert defaults.log.bytes == 256 * 1024
    assert defaults.defaults.limits == (("pids.max", "4096"),)
    assert defaults.ids.first == 0x7000_0000
    assert defaults.ids.per_container == 16 * 65536


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Config().log.rate = 1  # type: ignore[misc]


def test_every_key_has_a_parser_and_every_section_is_one_of_the_config() -> None:
    assert [key.name for key in fields(Config)] == list(config.SECTIONS)
    assert set(config.KEYS) == {
        f"{section}.{key}" for section, keys in asdict(Config()).items() for key in keys
    }


def test_example_is_the_defaults_commented_out_and_with_them_switched_on() -> None:
    text = EXAMPLE.read_text()
    assert parse(text, "example") == Config()
    # Prose has a space behind its #; a default has none, or is the indented end of one.
    switched_on = re.sub(r"^#(?=\w|    \S)", "", text, flags=re.MULTILINE)
    switched_on = re.sub(r"^ +(binds =|/opt.*|/data.*)$", "", switched_on, flags=re.MULTILINE)
    assert parse(switched_on, "example") == Config()
    for key in config.KEYS:
        assert re.search(rf"^{key.split('.')[1]} =", switched_on, re.MULTILINE), key


def test_example_shows_binds_that_are_valid() -> None:
    shown = re.findall(r"^#     (.*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert len(parse("[defaults]\n" + "\n".join(shown), "example").defaults.binds) == 2


def test_everything_set() -> None:
    got = parse(
        """
        # an indented comment, and blank lines, mean nothing
[mount]
dir = /mnt/tree
graft=off
[ids]
first = 0x10000
last = 1048575
per_container = 65536
[ defaults ]
unshare = net uts
    syslog
rootfs = /srv/debian
idmap = host
binds =
    /opt/tools /opt/tools ro

    ; in between
\t/data //srv/data rw
network = host
seccomp = deny
limits =
    memory.max 512M
    cpu.max   50000   100000
    pids.max max
[make]
spare = 2
[network]
prefix = 10.0.0.0/8
[log]
bytes = 1m
bytes_max = 2M
rate = max
burst = 10
firewall_log = off
firewall_rate = max
firewall_pause_s = 0.5
kernel_lines = context
[discovery]
enabled = off
interval_s = 0.5
[limits]
containers_per_user = max
ranges_per_user = 3
[views]
modules =
    /opt/views/fds.py
""",
        "nsfs.conf",
    )
    assert asdict(got) == {
        "mount": {"dir": PurePosixPath("/mnt/tree"), "graft": False},
        "ids": {"first": 65536, "last": 1048575, "per_container": 65536},
        "defaults": {
            "unshare": ("net", "uts", "syslog"),
            "rootfs": "/srv/debian",
            "idmap": "host",
            "binds": (("/opt/tools", "/opt/tools", "ro"), ("/data", "/srv/data", "rw")),
            "network": "host",
            "seccomp": "deny",
            "limits": (
                ("memory.max", str(512 * 2**20)),
                ("cpu.max", "50000 100000"),
                ("pids.max", "max"),
            ),
        },
        "make": {"spare": 2},
        "network": {"prefix": IPv4Network("10.0.0.0/8")},
        "log": {
            "bytes": 2**20,
            "bytes_max": 2**21,
            "rate": None,
            "burst": 10,
            "firewall_log": False,
            "firewall_rate": None,
            "firewall_pause_s": 0.5,
            "kernel_lines": "context",
        },
        "discovery": {"enabled": False, "interval_s": 0.5},
        "limits": {"containers_per_user": None, "ranges_per_user": 3},
        "views": {"modules": (PurePosixPath("/opt/views/fds.py"),)},
    }


def test_empty_lists_are_empty() -> None:
    got = parse("[defaults]\nunshare =\nlimits=\nbinds =", "nsfs.conf").defaults
    assert (got.unshare, got.limits, got.binds) == ((), (), ())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("dir = /x", "1: dir: stands before any [section]"),
        ("[mounts]\ndir = /x", "1: no such section: [mounts]"),
        ("[mount", "1: a section without ']': '[mount'"),
        ("[mount]\ndri = /x", "2: mount.dri: no such key"),
        ("[mount]\ngraft", "2: neither [section] nor key = value: 'graft'"),
        ("  graft = on", "1: an indented line that continues nothing: 'graft = on'"),
        ("[mount]\n  graft = on", "2: an indented line that continues nothing: 'graft = on'"),
        ("[mount]\ngraft = on\n[mount]\ngraft = on", "4: mount.graft: set before, in line 2"),
        ("[mount]\ngraft = yes", "2: mount.graft: not one of on, off: 'yes'"),
        ("[mount]\ngraft =", "2: mount.graft: has no value"),
        ("[mount]\ngraft = on\n off", "3: mount.graft: takes one line only"),
        ("[mount]\ndir = x", "2: mount.dir: not an absolute path without '..': 'x'"),
        ("[mount]\ndir = /a/../b", "2: mount.dir: not an absolute path without '..': '/a/../b'"),
        ("[mount]\ndir = //", "2: mount.dir: the root directory cannot be the mount point"),
        ("[ids]\nfirst = abc", "2: ids.first: not a number: 'abc'"),
        ("[ids]\nfirst = 1_0", "2: ids.first: not a number: '1_0'"),
        ("[ids]\nfirst = " + "9" * 5000, "2: ids.first: not a number: '" + "9" * 5000 + "'"),
        ("[ids]\nfirst = 65537", "2: ids.first: not a multiple of 65536: '65537'"),
        ("[ids]\nfirst = 0", "2: ids.first: out of range: '0' (65536 to 4294901759)"),
        (
            "[ids]\nlast = 4294967295",
            "2: ids.last: out of range: '4294967295' (65536 to 4294901759)",
        ),
        (
            "[ids]\nlast = 0x70000fff\nfirst=0x70000000",
            "3: ids.first: 1879048192 to 1879052287 has no room for 1048576 IDs",
        ),
        (
            "[defaults]\nunshare = net\n  nett",
            "3: defaults.unshare: not a namespace type: 'nett' "
            "(cgroup ipc mnt net pid time user uts syslog)",
        ),
        ("[defaults]\nbinds = /a /b", "2: defaults.binds: not TARGET SOURCE ro|rw: '/a /b'"),
        (
            "[defaults]\nbinds =\n  /a /b ro\n  /a /c rw",
            "4: defaults.binds: a second bind at '/a'",
        ),
        ("[defaults]\nbinds = / /b ro", "2: defaults.binds: a bind over the root: that is rootfs"),
        ("[defaults]\nnetwork = wifi", "2: defaults.network: not one of none, host, veth: 'wifi'"),
        (
            "[defaults]\nlimits = pid.max 1",
            "2: defaults.limits: not a limit: 'pid.max' (" + " ".join(limits.NAMES) + ")",
        ),
        ("[defaults]\nlimits = pids.max", "2: defaults.limits: pids.max has no value"),
        (
            "[defaults]\nlimits = pids.max 1 2",
            "2: defaults.limits: pids.max takes one value: '1 2'",
        ),
        ("[defaults]\nlimits = pids.max 1\n pids.max 2", "3: defaults.limits: a second pids.max"),
        ("[defaults]\nlimits = cpu.weight max", "2: defaults.limits: not a number: 'max'"),
        (
            "[defaults]\nlimits = cpu.max 1 2 3",
            "2: defaults.limits: cpu.max takes MAX and PERIOD, in microseconds",
        ),
        (
            "[defaults]\nlimits = cpu.max max 5",
            "2: defaults.limits: out of range: '5' (1000 to 1000000)",
        ),
        ("[network]\nprefix = 10.0.0.1/8", "2: network.prefix: not a prefix of IPv4: '10.0.0.1/8'"),
        ("[network]\nprefix = fd00::/8", "2: network.prefix: not a prefix of IPv4: 'fd00::/8'"),
        (
            "[network]\nprefix = 10.0.0.1",
            "2: network.prefix: not a prefix with room for two addresses: '10.0.0.1'",
        ),
        ("[log]\nbytes = 1T", "2: log.bytes: not a number: '1T'"),
        ("[log]\nrate = 0", "2: log.rate: out of range: '0' (1 to 1000000000)"),
        (
            "[discovery]\ninterval_s = nan",
            "2: discovery.interval_s: not a number of seconds: 'nan'",
        ),
        ("[discovery]\ninterval_s = 0", "2: discovery.interval_s: out of range: '0' (0.1 to 3600)"),
    ],
)
def test_one_mistake_is_one_error_with_file_line_and_key(text: str, error: str) -> None:
    assert errors_of(text) == (f"nsfs.conf:{error}",)


def test_all_errors_at_once_in_the_order_of_lines() -> None:
    text = "[ids]\nfirst = a\n[nope]\nx = 1\n  y\n[log]\nrate = b\nbytes\n  more of it\n"
    assert errors_of(text) == (
        "nsfs.conf:2: ids.first: not a number: 'a'",
        "nsfs.conf:3: no such section: [nope]",
        "nsfs.conf:7: log.rate: not a number: 'b'",
        "nsfs.conf:8: neither [section] nor key = value: 'bytes'",
    )


def test_crlf_is_a_line_end() -> None:
    assert parse("[log]\r\nrate = 7\r\n", "nsfs.conf").log.rate == 7


def test_load_without_the_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "PATH", tmp_path / "nsfs.conf")
    assert config.load() == Config()
    (tmp_path / "nsfs.conf").write_text("[log]\nrate = 7\n")
    assert config.load().log.rate == 7


def test_load_of_a_path_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.conf"
    with pytest.raises(FileNotFoundError):
        config.load(path)
    path.write_bytes(b"\xef\xbb\xbf[log]\nrate = 7\n")
    assert config.load(path).log.rate == 7
    path.write_bytes(b"[log]\nrate = \xff\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}:2: not UTF-8")):
        config.load(path)


@given(st.text())
def test_any_text_is_valid_or_a_config_error(text: str) -> None:
    assert all(re.match(r"nsfs\.conf:[0-9]+: ", line) for line in errors_of(text))


@given(st.sampled_from(sorted(config.KEYS)), st.text(), st.sampled_from(["", "max", "0x", "-1"]))
def test_any_value_is_valid_or_an_error_of_its_key(key: str, value: str, begin: str) -> None:
    section, name = key.split(".")
    rows = (begin + value).split("\n")
    text = f"[{section}]\n{name} = " + "\n  ".join(rows)
    errors = errors_of(text)
    assert len(errors) <= 1
    assert all(f": {key}: " in error for error in errors)


@given(
    st.sampled_from(["", "K", "M"]),
    st.integers(4096, 2**30),
)
def test_sizes(suffix: str, number: int) -> None:
    shift = {"": 0, "K": 10, "M": 20}[suffix]
    count = number >> shift
    if count << shift >= 4096:
        got = parse(f"[log]\nbytes = {count}{suffix}", "nsfs.conf")
        assert got.log.bytes == count << shift
