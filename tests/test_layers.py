"""The shape of the package: imports go down only, and modules and functions stay small."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import qcowfs

ROOT = Path(qcowfs.__file__).parent
LAYERS = {
    "errors": 0, "text": 0, "geometry": 0,
    "format": 10,
    "codecs": 20, "host": 20,
    "testing": 30,
    "metadata": 40,
    "check": 50, "creation": 50, "data": 50,
    "disk": 60,
    "bridge": 70, "copying": 70, "overlay": 70, "picture": 70,
    "library": 80,
    "daemon": 80,
    "cli": 90,
    "__main__": 100,
}  # fmt: skip
FOLDERS = tuple(sorted({path.parent.name for path in ROOT.glob("*/__init__.py")}))
DAEMON = LAYERS["daemon"]
PURE = (
    "qcowfs.errors", "qcowfs.text", "qcowfs.geometry", "qcowfs.format.", "qcowfs.codecs.",
    "qcowfs.metadata.lru", "qcowfs.metadata.metadata_map", "qcowfs.metadata.epochs",
    "qcowfs.metadata.granules", "qcowfs.data.zeros", "qcowfs.creation.layout",
)  # fmt: skip


@dataclass(frozen=True)
class Module:
    """One source file; `place` is the name that the table of layers knows it by."""

    path: Path

    @property
    def dotted(self) -> str:
        parts = ("qcowfs", *self.path.relative_to(ROOT).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def place(self) -> str:
        return place_of(self.dotted)

    @property
    def tree(self) -> ast.Module:
        return parse(self.path)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place_of(dotted: str) -> str:
    """`qcowfs.format.header` -> `format`; the package itself is the empty place."""
    return dotted.partition(".")[2].partition(".")[0]


MODULES = [Module(path) for path in sorted(ROOT.rglob("*.py"))]
DOTTED = {module.dotted for module in MODULES}
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.dotted)


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module imports anywhere, functions and type checks included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module.path}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in DOTTED else f"{node.module}") for name in names)


def own_imports(module: Module) -> Iterator[tuple[int, str]]:
    """Those imports that are modules of the package; its version may be had by all."""
    for line, name in imports(module):
        if name.partition(".")[0] == "qcowfs" and name != "qcowfs":
            yield line, name


def foreign_imports(module: Module) -> set[str]:
    """The top-level names of what is imported from outside the package."""
    return {name.partition(".")[0] for _, name in imports(module)} - {"qcowfs"}


def is_pure(module: Module) -> bool:
    return module.dotted.startswith(PURE)


@each_module
def test_each_module_has_a_layer(module: Module) -> None:
    assert module.place in LAYERS or module.dotted == "qcowfs"


@each_module
def test_imports_go_to_lower_layers_only(module: Module) -> None:
    mine = LAYERS.get(module.place, -1)
    upward = [
        f"{module.path}:{line}: imports {name}"
        for line, name in own_imports(module)
        if LAYERS[place_of(name)] >= mine and not (place_of(name) == module.place and module.place in FOLDERS)
    ]
    assert upward == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_of_one_folder_import_each_other_in_one_direction(folder: str) -> None:
    members = {m.dotted: {name for _, name in own_imports(m)} for m in MODULES if m.place == folder}
    while True:
        free = [name for name, wanted in members.items() if not wanted & (members.keys() - {name})]
        if not free:
            break
        for name in free:
            del members[name]
    assert members == {}


def test_the_verifier_shares_nothing_with_what_it_verifies() -> None:
    used = {place_of(name) for m in MODULES if m.place == "check" for _, name in own_imports(m)}
    assert used == {"check", "errors", "text", "geometry", "format", "codecs", "host"}


def test_the_package_itself_imports_nothing_of_the_package() -> None:
    assert list(own_imports(Module(ROOT / "__init__.py"))) == []


@each_module
def test_no_module_imports_a_star(module: Module) -> None:
    stars = [n for n in ast.walk(module.tree) if isinstance(n, ast.alias) and n.name == "*"]
    assert stars == []


@each_module
def test_pure_modules_do_not_wait_and_know_no_host(module: Module) -> None:
    waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    found = [n.lineno for n in ast.walk(module.tree) if isinstance(n, waiting)]
    used = foreign_imports(module) & {"os", "trio", "logging"}
    assert not is_pure(module) or (found, used) == ([], set())


@pytest.mark.parametrize(
    ("place", "libraries"),
    [("daemon", {"pyfuse3"}), ("codecs", {"Crypto", "isal", "zlib", "backports", "compression"})],
)
def test_a_library_is_imported_in_its_folder_only(place: str, libraries: set[str]) -> None:
    elsewhere = {m.dotted: foreign_imports(m) & libraries for m in MODULES if m.place != place}
    assert {name for name, used in elsewhere.items() if used} == set()
    assert any(foreign_imports(m) & libraries for m in MODULES if m.place == place)


HOST_IO = {
    f"os.{name}" for name in ("open", "pread", "preadv", "pwrite", "pwritev", "fdopen", "read", "write")
}


def dotted_uses(module: Module) -> set[str]:
    """Every `a.b` or `a.b.c` that a module mentions."""
    return {ast.unparse(n) for n in ast.walk(module.tree) if isinstance(n, ast.Attribute)}


def test_only_the_door_to_the_host_and_what_stands_beside_it_touch_descriptors() -> None:
    users = {
        m.dotted
        for m in MODULES
        if m.dotted != "qcowfs" and LAYERS[m.place] < DAEMON
        and (dotted_uses(m) & HOST_IO or "fcntl" in foreign_imports(m))
    }  # fmt: skip
    assert users == {"qcowfs.host.hostfile", "qcowfs.host.locks", "qcowfs.host.write_behind"}


def test_nobody_imports_parts_of_os() -> None:
    # or the test above could not see what they do
    froms = {m.dotted: m for m in MODULES for n in ast.walk(m.tree)
             if isinstance(n, ast.ImportFrom) and n.module in ("os", "trio", "fcntl")}  # fmt: skip
    assert set(froms) == set()


def test_only_one_module_starts_threads() -> None:
    users = {m.dotted for m in MODULES if any(u.startswith("trio.to_thread") for u in dotted_uses(m))}
    assert {name for name in users if not name.startswith("qcowfs.daemon.")} == {"qcowfs.host.waiting"}


# -- sizes


def functions() -> dict[str, int]:
    """The length in lines of every function."""
    return {
        f"{m.dotted}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for m in MODULES
        for node in ast.walk(m.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_no_function_is_longer_than_50_lines() -> None:
    assert {name: length for name, length in functions().items() if length > 50} == {}


def test_half_of_all_functions_have_at_most_10_lines() -> None:
    assert statistics.median(functions().values()) <= 10


@each_module
def test_each_module_is_short_and_says_what_it_is(module: Module) -> None:
    assert len(module.path.read_text().splitlines()) <= 400
    assert ast.get_docstring(module.tree)


# -- what importing loads


@pytest.mark.parametrize("name", ["qcowfs", "qcowfs.cli.main"])
def test_importing_is_light(name: str) -> None:
    code = f"import sys, {name}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = set(result.stdout.split())
    assert name in loaded
    assert loaded & {"pyfuse3", "numpy", "trio"} == set()


def test_a_mount_starts_without_numpy() -> None:
    code = "import sys, qcowfs.daemon.session; print('numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "False\n"
