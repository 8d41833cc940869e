"""Values of control files: what is taken, what is refused and with which errno."""

import errno
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs.attribute import (
    Attribute,
    Directory,
    flat_keyed,
    one_line,
    parse_bool,
    parse_int,
    parse_words,
    unescape,
)


def refused(number: int, function: object, *args: object) -> None:
    assert callable(function)
    with pytest.raises(OSError, match=r".") as caught:
        function(*args)
    assert caught.value.errno == number


def test_the_mode_follows_from_show_and_store() -> None:
    def show(face: object) -> str:
        return ""

    def store(face: object, value: str, caller: object) -> None: ...

    assert Attribute("a", show=show).mode == stat.S_IFREG | 0o444
    assert Attribute("a", store=store).mode == stat.S_IFREG | 0o200
    assert Attribute("a", show=show, store=store).mode == stat.S_IFREG | 0o644
    assert Attribute("a", show=show, mode=0o440).mode == stat.S_IFREG | 0o440
    assert Directory("d").mode == stat.S_IFDIR | 0o755


@pytest.mark.parametrize("text", ["", "x", "1x", "0x1", "1 2", "--1", "\u0661", "+1"])
def test_what_is_no_number_is_einval(text: str) -> None:
    refused(errno.EINVAL, parse_int, text, 0, 9)


def test_a_number_out_of_range_is_erange() -> None:
    assert parse_int(" 7 ", 0, 9) == 7
    refused(errno.ERANGE, parse_int, "10", 0, 9)
    refused(errno.ERANGE, parse_int, "-1", 0, 9)
    refused(errno.ERANGE, parse_bool, "2")
    assert parse_bool("1") is True


def test_words_are_known_and_different() -> None:
    assert parse_words("net,uts  ipc", ("net", "uts", "ipc")) == ("net", "uts", "ipc")
    refused(errno.EINVAL, parse_words, "net net", ("net",))
    refused(errno.EINVAL, parse_words, "nut", ("net",))


def test_flat_keyed_lines() -> None:
    assert flat_keyed({"a": 1, "b": "max"}) == "a 1\nb max\n"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1))
def test_an_escaped_name_is_one_word_and_comes_back(name: str) -> None:
    word = one_line(name)
    assert word.split() == [word] or not word.isascii()
    assert unescape(word) == name


def test_an_escape_that_is_no_byte_is_einval() -> None:
    assert one_line("a b\\") == "a\\040b\\134"
    refused(errno.EINVAL, unescape, "\\777")
