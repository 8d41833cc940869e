"""The manual pages say what the code has, and nothing else; and they build.

What is compared stands in definition lists: the terms are literals, what follows a colon is the
rest.

    ``NAME``, ``NAME`` : MODE : read-only inside : not at the root      a control file, in nsfs(5)
    ``KEY`` : ``DEFAULT``                        a key of nsfs.conf, below its [section], in nsfs(8)
    ``--OPTION`` *VALUE*                         below its command, in nsfs(8)
"""

import argparse
import functools
import io
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from docutils import nodes
from docutils.core import publish_doctree, publish_string

from nsfs import cli, config, namespaces, run
from nsfs.attribute import FOUND, HIDDEN, NOT_ON_ROOT, PARENTS, Directory, Link
from nsfs.daemon import tables
from nsfs.tree import Names, Tables
from tests.programs import program

MAN = Path(__file__).parents[2] / "man"
PAGES = ("nsfs.5", "nsfs.8")
READ_ONLY_INSIDE = "read-only inside"
NOT_AT_THE_ROOT = "not at the root"
FOUND_TOO = "found too"


class Item(NamedTuple):
    """One item of a definition list."""

    names: tuple[str, ...]
    """The term: its literals, with the emphasized text that follows them directly."""
    placeholders: tuple[str, ...]
    """The emphasized text of the term, of which each name has the same."""
    classifiers: tuple[str, ...]
    body: str


@functools.cache
def page(name: str) -> nodes.document:
    """A page as docutils reads it; what is wrong with it is an error."""
    settings = {"halt_level": 2, "report_level": 2, "warning_stream": io.StringIO()}
    return publish_doctree((MAN / f"{name}.rst").read_text(), settings_overrides=settings)


def section(name: str, title: str) -> nodes.section:
    """A section of a page, at any depth."""
    for found in page(name).findall(nodes.section):
        if found[0].astext() == title:
            return found
    raise AssertionError(f"{name} has no section {title}")


def items(parent: nodes.Element) -> Iterator[Item]:
    """The definition lists directly in a section whose terms begin with a literal."""
    for each in parent.children:
        if not isinstance(each, nodes.definition_list):
            continue
        for item in each.findall(nodes.definition_list_item, include_self=False):
            term = item.next_node(nodes.term)
            # A list within an item is about something else.
            if item.parent is not each or not isinstance(term.children[0], nodes.literal):
                continue
            names: list[str] = []
            for part in term.children:
                if isinstance(part, nodes.literal):
                    names.append(part.astext())
                elif isinstance(part, nodes.emphasis) and names[-1].endswith("/"):
                    names[-1] += part.astext()
            yield Item(
                tuple(names),
                tuple(part.astext() for part in term.findall(nodes.emphasis)),
                tuple(x.astext() for x in item.children if isinstance(x, nodes.classifier)),
                item.next_node(nodes.definition).astext(),
            )


# --- control files ---


def documented_files() -> dict[str, tuple[str, bool, bool, bool]]:
    """By path: the mode or `link`, read-only inside, not at the root, found too."""
    found: dict[str, tuple[str, bool, bool, bool]] = {}
    for item in items(section("nsfs.5", "CONTROL FILES")):
        mode, *marks = item.classifiers
        assert set(marks) <= {READ_ONLY_INSIDE, NOT_AT_THE_ROOT, FOUND_TOO}, item
        for name in item.names:
            kinds = namespaces.SORTED if name.endswith("/TYPE") else ("",)
            for kind in kinds:
                path = name.removesuffix("TYPE") + kind if kind else name
                assert path not in found, path
                known = (READ_ONLY_INSIDE in marks, NOT_AT_THE_ROOT in marks, FOUND_TOO in marks)
                found[path] = (mode, *known)
    return found


def actual_files() -> dict[str, tuple[str, bool, bool, bool]]:
    """The same of the tables."""
    found: dict[str, tuple[str, bool, bool, bool]] = {}
    for path, entry in Tables(Directory("", entries=tables()), Names()).paths():
        if HIDDEN in entry.flags:
            continue
        mode = "link" if isinstance(entry, Link) else f"{stat.S_IMODE(entry.mode):04o}"
        flags = (PARENTS in entry.flags, NOT_ON_ROOT in entry.flags, FOUND in entry.flags)
        found[f"{path}/" if isinstance(entry, Directory) else path] = (mode, *flags)
        if isinstance(entry, Directory) and entry.member is not None:
            member = entry.member
            found[f"{path}/{member.name}"] = (f"{stat.S_IMODE(member.mode):04o}", *flags)
    return found


def test_control_files() -> None:
    assert documented_files() == actual_files()


def keys_of(name: str) -> tuple[str, ...]:
    """The words in bold of the terms of the list that describes the keys of a file."""
    for item in section("nsfs.5", "CONTROL FILES").findall(nodes.definition_list_item):
        if item.next_node(nodes.term).astext() == name:
            lists = item.next_node(nodes.definition).findall(nodes.definition_list)
            terms = [row.next_node(nodes.term) for each in lists for row in each.children]
            return tuple(word.astext() for term in terms for word in term.findall(nodes.strong))
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "source", "function"),
    [
        ("state", "state", "state_show"),
        ("stat", "stat", "stat_show"),
        ("procs/PID", "../members", "describe"),
    ],
)
def test_keys(name: str, source: str, function: str) -> None:
    text = (MAN.parent / "nsfs/entries" / f"{source}.py").read_text()
    body = text.split(f"def {function}(")[1].split("\ndef ")[0]
    found = [key for key in re.findall(r'\("([a-z_.]+)", ', body) if "=" not in key]
    if "cpu_usec()" in body:
        found = [*(f"cpu.{key}" for key in ("usage_usec", "user_usec", "system_usec")), *found]
    assert keys_of(name) == tuple(found)


# --- nsfs.conf ---


def documented_keys() -> dict[str, str]:
    """By SECTION.KEY: the default, as it would stand in the file."""
    found: dict[str, str] = {}
    for each in section("nsfs.8", "CONFIGURATION").findall(nodes.section):
        title = each[0].astext()
        if title.startswith("["):
            for item in items(each):
                (name,) = item.names
                found[f"{title.strip('[]')}.{name}"] = " ".join(item.classifiers)
    return found


def test_config_keys() -> None:
    assert list(documented_keys()) == list(config.KEYS)


@pytest.mark.parametrize("key", config.KEYS)
def test_config_default(key: str) -> None:
    group, _, name = key.partition(".")
    assert config.parse(f"[{group}]\n{name} = {documented_keys()[key]}", key) == config.Config()


# --- options ---


THE_REST = "[[--] COMMAND [ARGUMENT]...]"
"""What the commands that begin a session take behind their options."""


class Found(Exception):
    """A parser, before it has parsed anything."""


def session_parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Those of the commands that begin a session, which make them themselves."""

    def parse_args(self: argparse.ArgumentParser, *args: object) -> None:
        raise Found(self)

    for name, command in (("enter", run.enter), ("run", run.run)):
        with mock.patch.object(run.Parser, "parse_args", parse_args):
            try:
                command([])
            except Found as found:
                yield name, found.args[0]


@functools.cache
def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    (found,) = (
        action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {**found.choices, **dict(session_parsers())}


def options(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Its options with the placeholders of their values, but for those of --help."""
    return {
        option: action.metavar if isinstance(action.metavar, str) else ""
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
        for option in action.option_strings
    }


def documented_options(title: str) -> dict[str, str]:
    """The same of a section."""
    return {
        name: "".join(item.placeholders)
        for item in items(section("nsfs.8", title))
        for name in item.names
        if name.startswith("-")
    }


def test_commands() -> None:
    titles = [
        each[0].astext()
        for each in section("nsfs.8", "COMMANDS").children
        if isinstance(each, nodes.section)
    ]
    assert titles == [*commands(), "Options of all commands"]


@pytest.mark.parametrize("command", commands())
def test_options(command: str) -> None:
    assert documented_options(command) == options(commands()[command])


def test_help_is_an_option_of_all_commands() -> None:
    expected = {option: "" for option in cli.parser()._option_string_actions}
    assert documented_options("Options of all commands") == expected
    for parser in commands().values():
        assert parser._option_string_actions.keys() >= expected.keys()


def arguments(text: str) -> list[str]:
    """What a line of the synopsis has: words, and brackets with all that is in them."""
    found = [""]
    depth = 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter.isspace() and not depth:
            found.append("")
        else:
            found[-1] += " " if letter.isspace() else letter
    return sorted(found)


def test_synopsis() -> None:
    shown = {}
    for line in section("nsfs.8", "SYNOPSIS").findall(nodes.line):
        _, command, rest = line.astext().split(" ", 2)
        shown[command] = arguments(rest)
    expected = {}
    for name, parser in commands().items():
        words = [THE_REST] if name in dict(session_parsers()) else []
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction) or action.nargs == argparse.REMAINDER:
                continue
            word = " ".join((*action.option_strings, str(action.metavar or ""))).rstrip()
            repeated = "..." if isinstance(action, argparse._AppendAction) else ""
            words.append(f"[{word}]{repeated}" if not action.required else word)
        expected[name] = sorted(words)
    assert shown == expected


# --- building ---


@functools.cache
def built(name: str) -> str:
    """The page as setup.py builds it."""
    settings = {"halt_level": 2, "report_level": 2, "warning_stream": io.StringIO()}
    source = (MAN / f"{name}.rst").read_text()
    text = publish_string(source, writer="manpage", settings_overrides=settings)
    return text.decode() if isinstance(text, bytes) else str(text)


@pytest.mark.parametrize("name", PAGES)
def test_page_builds(name: str) -> None:
    text = built(name)
    section_number = name.rpartition(".")[2]
    assert f'.TH "nsfs" "{section_number}"' in text
    assert re.search(r"^nsfs \\- \w", text, re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_page_is_shown_without_a_warning(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(built(name))
    environment = os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANROFFOPT": ""}
    ran = subprocess.run(
        [program("man"), "--warnings", "-E", "UTF-8", "-P", "cat", "-l", tmp_path / name],
        capture_output=True,
        text=True,
        env=environment,
        timeout=30,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    # Literal blocks are not wrapped.
    wide = [line for line in ran.stdout.splitlines() if len(line) > 80]
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize("name", PAGES)
def test_sections_that_are_named_exist(name: str) -> None:
    titles = {each[0].astext() for each in page(name).findall(nodes.section)}
    named = set(re.findall(r"\b(?:see|in|See) ([A-Z][A-Z ]+[A-Z])\b(?!-)", page(name).astext()))
    assert named
    assert named <= titles


# --- HACKING.rst ---


def test_example_module() -> None:
    text = (MAN.parent / "HACKING.rst").read_text()
    settings = {"halt_level": 2, "report_level": 2, "warning_stream": io.StringIO()}
    blocks = publish_doctree(text, settings_overrides=settings).findall(nodes.literal_block)
    (source,) = (each.astext() for each in blocks if "FILES = (" in each.astext())
    module: dict[str, object] = {}
    exec(source, module)
    paths = dict(Tables(Directory("", entries=module["FILES"]), Names()).paths())  # type: ignore[arg-type]
    assert {path: stat.S_IMODE(entry.mode) for path, entry in paths.items()} == {"weight": 0o644}
