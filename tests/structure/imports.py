"""Draws the graph of imports of this repository: `python tests/structure/imports.py` prints it, layer by layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# From the bottom to the top. A file imports from its own layer and from those below, never from those above.
LAYERS = (
    ("unetgn.programs",),
    ("unetgn.serialize", "unetgn.json_files", "unetgn.pickles", "unetgn.messages"),
    ("unetgn.ops",),
    ("unetgn.nn",),
    ("unetgn.unet",),
    ("unetgn.interop", "unetgn.fusion"),
    ("unetgn.pipelines",),
    ("unetgn",),  # the names that it exports
    ("unetgn.training",),
    ("unetgn.sampling",),
    ("training", "sampling", "benchmarks", "examples"),
)


@dataclass(frozen=True)
class Import:
    """One import: of module `imported` by module `importer`; `deferred` in a function, or for type checkers alone."""

    importer: str
    imported: str
    deferred: bool
    line: int


def modules() -> dict[str, Path]:
    """Find every module of the repository that can be imported, by dotted name."""
    tops = sorted({name.partition(".")[0] for names in LAYERS for name in names})
    files = (path for top in tops for path in (ROOT / top).rglob("*.py"))
    return {name_of(path): path for path in files}


def name_of(path: Path) -> str:
    """Give the dotted name of a file; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(importer: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Read the imports of one file that lead to this repository, those for type checkers alone among them."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        yield from _walk(node, importer, known, deferred=False)


def _walk(node: ast.AST, importer: str, known: dict[str, Path], *, deferred: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _import(alias.name, importer, known, deferred, node.lineno)
    elif isinstance(node, ast.ImportFrom) and node.module:
        beside = f"{importer.rpartition('.')[0]}." if node.level else ""  # of files that saved pipelines carry
        for alias in node.names:
            module = beside + node.module
            whole = f"{module}.{alias.name}"
            yield from _import(whole if whole in known else module, importer, known, deferred, node.lineno)
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    within = deferred or for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, importer, known, deferred=within)


def _import(name: str, importer: str, known: dict[str, Path], deferred: bool, line: int) -> Iterator[Import]:
    if name in known and name != importer:
        yield Import(importer, name, deferred, line)


def all_imports() -> list[Import]:
    """Read every import within the repository."""
    known = modules()
    return [found for name, path in known.items() for found in imports_of(name, path, known)]


def layer_of(module: str) -> int:
    """Find the layer of a module: that of the longest name in LAYERS which it is or lies in."""
    fitting = [
        (len(name), level)
        for level, names in enumerate(LAYERS)
        for name in names
        if module == name or (module.startswith(f"{name}.") and name != "unetgn")
    ]
    return max(fitting)[1]


def circles(imports: list[Import]) -> list[list[str]]:
    """Find the groups of modules that import each other, directly or through others (Tarjan 1972)."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        edges.setdefault(found.importer, set()).add(found.imported)
        edges.setdefault(found.imported, set())
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found_circles: list[list[str]] = []

    def visit(module: str) -> None:
        numbers[module] = lowest[module] = len(numbers)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in numbers:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], numbers[other])
        if lowest[module] == numbers[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                found_circles.append(sorted(circle))

    for module in sorted(edges):
        if module not in numbers:
            visit(module)
    return found_circles


def main() -> None:
    """Print each layer, from the top, with its modules and what they import."""
    imports = all_imports()
    for level in reversed(range(len(LAYERS))):
        print(f"\n{' and '.join(LAYERS[level])}")
        for module in sorted(name for name in modules() if layer_of(name) == level):
            imported = sorted({found.imported for found in imports if found.importer == module})
            print(f"  {module}{' <- ' if imported else ''}{', '.join(imported)}")


if __name__ == "__main__":
    main()
