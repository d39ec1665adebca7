"""Docstrings of installed packages, read from their source files without importing them."""

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jz3.errors import Jz3Error
from jz3.seeding import rng

STANDARD_LIBRARY = "stdlib"
MATHEMATICAL_PACKAGES = frozenset(
    """sympy scipy numpy networkx mpmath statsmodels sklearn skimage pandas cvxpy galois gmpy2 flint sage
    fractions statistics decimal cmath math""".split()
)

_SHORTEST = 160
"""Characters below which a docstring is a mere label."""
_PER_ROUND = 4
"""Docstrings taken from one file before the next file's turn."""
_SKIPPED_PARTS = frozenset(
    """test tests testing testsuite conftest benchmarks _lib _build_utils _vendor vendor _vendored externals
    __pycache__ site-packages dist-packages idlelib lib2to3 tkinter turtledemo ensurepip encodings pydoc_data
    distutils __phello__""".split()
)
_MATHEMATICAL_MODULES = frozenset(
    "statistics fractions decimal random numbers colorsys graphlib bisect heapq turtle".split()
)
"""Modules of the standard library that are no background to mathematics."""
_BOILERPLATE = re.compile(
    r"\.\. (?:autosummary|toctree|automodule|currentmodule|deprecated)::"
    r"|\A\W*(?:deprecated|internal use only|alias (?:of|for))\b"
    r"|\bthis (?:function|method|class|module) is deprecated\b|\bcopyright\b",
    re.IGNORECASE,
)
_TEMPLATE_LINE = re.compile(r"^[ \t]*%\(\w+\)s[ \t]*\n?", re.MULTILINE)


class Docstring(NamedTuple):
    """A cleaned docstring and what it documents."""

    text: str
    name: str
    """Dotted name of the module, class or function."""
    where: str
    """File inside the package, and line."""


class Unparsed(NamedTuple):
    """A source file that this Python can't parse."""

    where: str
    detail: str


def topic_of(package: str) -> str:
    """Return `mathematics`, `background` or, for an unknown package, nothing."""
    top = package.partition(".")[0]
    if top in MATHEMATICAL_PACKAGES:
        return "mathematics"
    return "background" if top == STANDARD_LIBRARY or top in sys.stdlib_module_names else ""


def version_of(package: str) -> str:
    """Return the package with its version, e.g. `sympy 1.14.0`."""
    top = package.partition(".")[0]
    if top == STANDARD_LIBRARY or top in sys.stdlib_module_names:
        return f"{package} of Python {platform.python_version()}"
    try:
        return f"{package} {importlib.metadata.version(top)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def source_files(package: str) -> tuple[Path, list[Path]]:
    """Find the public source files of an installed package.

    Args:
        package: a package, a dotted part of one, or `stdlib`.

    Returns:
        The folder that the package's top-level module lies in, and the files in order.

    Raises:
        Jz3Error: it isn't installed or has no Python sources.
    """
    if package == STANDARD_LIBRARY:
        base = root = Path(sysconfig.get_path("stdlib"))
    else:
        base, root = _locate(package)
    standard = package == STANDARD_LIBRARY
    found = sorted(_walk(root)) if root.is_dir() else [root]
    files = [path for path in found if _is_public(path.relative_to(base), standard)]
    if not files:
        raise Jz3Error(f"package {package!r} has no Python source files under {root}")
    return base, files


def _locate(package: str) -> tuple[Path, Path]:
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError) as error:
        raise Jz3Error(f"package {package!r} can't be found: {error}") from error
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        raise Jz3Error(f"package {package!r} is not installed; `pip install {top}` or remove the source")
    if spec.submodule_search_locations:
        root = Path(next(iter(spec.submodule_search_locations)))
    else:
        root = Path(spec.origin or "")
    base = root.parent
    for part in rest:
        root = root / part
    if not root.is_dir() and root.suffix != ".py":
        root = root.with_name(root.name + ".py")
    if not root.exists() or root.suffix not in ("", ".py"):
        raise Jz3Error(f"package {package!r} has no Python sources at {root}")
    return base, root


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_PARTS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _is_public(path: Path, standard: bool) -> bool:
    parts = [*path.parts[:-1], path.stem]
    if any(part in _SKIPPED_PARTS or part.startswith("test_") for part in parts):
        return False
    if standard:
        private = any(part.startswith("_") and part != "__init__" for part in parts)
        return not private and parts[0] not in _MATHEMATICAL_MODULES
    return not any(part.startswith("_") for part in path.parts[:-1])


def docstrings(package: str, seed: int, name: str) -> Iterator[Docstring | Unparsed]:
    """Give a package's docstrings in an order drawn once: a few of each file in turn.

    Files are parsed when their turn comes, so taking the first few is quick.

    Args:
        package: see `source_files`.
        seed: the run's seed.
        name: the source's name; with the seed it fixes the order.

    Yields:
        Public documented objects; tests, private names, labels and boilerplate are no candidates.
    """
    base, files = source_files(package)
    order = [files[i] for i in rng(seed, "corpus", name, "files").permutation(len(files))]
    waiting: list[list[Docstring]] = []
    for path in order:
        where = path.relative_to(base).as_posix()
        found = _parse(path, where)
        if isinstance(found, Unparsed):
            yield found
            continue
        shuffled = [found[i] for i in rng(seed, "corpus", name, where).permutation(len(found))]
        yield from shuffled[:_PER_ROUND]
        if shuffled[_PER_ROUND:]:
            waiting.append(shuffled[_PER_ROUND:])
    while waiting:
        for rest in waiting:
            yield from rest[:_PER_ROUND]
        waiting = [rest[_PER_ROUND:] for rest in waiting if rest[_PER_ROUND:]]


def _parse(path: Path, where: str) -> list[Docstring] | Unparsed:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError) as error:
        return Unparsed(where, f"{type(error).__name__}: {error}")
    module = where.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    names = _exported(tree) if path.stem.startswith("_") and path.stem != "__init__" else None
    found = []
    for name, line, text in _documented(tree, names):
        cleaned = _TEMPLATE_LINE.sub("", inspect.cleandoc(text)).strip()
        if len(cleaned) >= _SHORTEST and not _BOILERPLATE.search(cleaned):
            found.append(Docstring(cleaned, f"{module}.{name}" if name else module, f"{where}:{line}"))
    return found


def _exported(tree: ast.Module) -> frozenset[str] | None:
    """The names in the module's literal `__all__`; None if it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            if isinstance(node.value, (ast.List, ast.Tuple)):
                values = (e.value for e in node.value.elts if isinstance(e, ast.Constant))
                return frozenset(value for value in values if isinstance(value, str))
    return None


def _documented(tree: ast.Module, names: frozenset[str] | None) -> Iterator[tuple[str, int, str]]:
    """Name, line and raw docstring of the module and of its public classes, methods and functions.

    Also of the two other ways in which scientific packages document compiled functions:
    `add_newdoc("name", "text")`, and `name = "text"` in a module of docstrings (mpmath).
    """
    if text := ast.get_docstring(tree, clean=False):
        yield "", 1, text
    queue: list[tuple[str, ast.stmt]] = [("", node) for node in reversed(tree.body)]
    while queue:
        prefix, node = queue.pop()
        if isinstance(node, (ast.If, ast.Try)):
            queue.extend((prefix, child) for child in reversed(node.body))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_") or (not prefix and names is not None and node.name not in names):
                continue
            if text := ast.get_docstring(node, clean=False):
                yield prefix + node.name, node.lineno, text
            if isinstance(node, ast.ClassDef):
                queue.extend((f"{prefix}{node.name}.", child) for child in reversed(node.body))
        elif isinstance(node, ast.Assign) and not prefix:
            target, value = node.targets[0], node.value
            if (
                isinstance(target, ast.Name)
                and not target.id.startswith("_")
                and isinstance(value, ast.Constant)
            ):
                if isinstance(value.value, str) and names is None:
                    yield target.id, node.lineno, value.value
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Name) and call.func.id.lstrip("_") == "add_newdoc":
                texts = [
                    a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
                ]
                if len(texts) >= 2:
                    yield texts[-2], node.lineno, texts[-1]
