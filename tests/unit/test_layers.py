"""Which module may import which: the order that the architecture gives, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nsfs"

# From top to bottom. A module imports those of rows below its own, and of its own row. One that
# is not here, a feature's (nsproxy, procs, entries/*, views/*, ...) or a newer one, may stand
# anywhere, as long as no way through it leads up.
LAYERS = (
    ("cli",),
    ("daemon",),
    ("fs",),
    ("openfile",),
    ("nodes",),
    ("removal",),
    ("lifecycle",),
    ("rebuild", "rebind"),
    ("construct",),
    ("trees", "ids", "grouplimits"),
    ("container", "authority", "discovery"),
    ("build",),
    ("tree", "attribute", "logring", "namespaces", "spawner"),
    ("init",),
    ("protocol",),
    ("syscalls",),
    ("_syscalls",),
)
ROW = {f"nsfs.{module}": row for row, modules in enumerate(LAYERS) for module in modules}
# These know nothing of the rest of nsfs.
GENERIC = {"nsfs.tree", "nsfs.attribute", "nsfs.logring"}
# Who alone imports what.
ALONE = {"pyfuse3": {"nsfs.fs", "nsfs.daemon"}, "nsfs._syscalls": {"nsfs.syscalls"}}


def sources() -> dict[str, Path]:
    """The modules of the package; the program that builds the cffi module is none of it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["nsfs._syscalls_build"]
    return found


SOURCES = sources()


def imports(module: str, path: Path, *, for_types: bool) -> Iterator[str]:
    """The full names that a module imports, wherever in it; those for types alone if asked."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (
                    module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                )
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            yield base
            yield from (f"{base}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += [*node.orelse, *(node.body if for_types else [])]
        else:
            waiting += ast.iter_child_nodes(node)


def graph() -> dict[str, set[str]]:
    """Which modules of nsfs each one needs when it runs; a package counts for what it holds."""
    known = set(SOURCES) | set(ROW)
    return {
        module: {name for name in imports(module, path, for_types=False) if name in known}
        - {module, "nsfs"}
        for module, path in SOURCES.items()
    }


GRAPH = graph()


def way(start: str, goals: set[str]) -> list[str] | None:
    """The modules on a shortest way of imports from one to any of the goals, if there is one."""
    ways = [[start]]
    seen = {start}
    for each in ways:
        for module in sorted(GRAPH.get(each[-1], set())):
            if module in goals:
                return [*each, module]
            if module not in seen:
                seen.add(module)
                ways.append([*each, module])
    return None


@pytest.mark.parametrize("module", SOURCES)
def test_no_circle(module: str) -> None:
    circle = way(module, {module})
    assert circle is None, " imports ".join(circle or [])


@pytest.mark.parametrize("module", [module for module in SOURCES if module in ROW])
def test_imports_go_downward(module: str) -> None:
    above = {name for name, row in ROW.items() if row < ROW[module]}
    upward = way(module, above)
    assert upward is None, " imports ".join(upward or [])


@pytest.mark.parametrize("module", sorted(GENERIC))
def test_generic_modules_import_nothing_of_the_rest(module: str) -> None:
    names = imports(module, SOURCES[module], for_types=True)
    assert {name for name in names if name in SOURCES} - {"nsfs"} <= GENERIC


@pytest.mark.parametrize("module", SOURCES)
def test_who_alone_imports_what(module: str) -> None:
    for name in imports(module, SOURCES[module], for_types=True):
        for what, modules in ALONE.items():
            if name == what or name.startswith(f"{what}."):
                assert module in modules, f"{module} imports {what}"
