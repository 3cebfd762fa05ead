"""Makes the pages that nobody writes: the reference, the keys of a run, the benchmarks. mkdocs calls `on_files`.

A page links to files of the repository, as one who reads it there needs; `on_page_markdown` leads such a link to what
the site has of that file.
"""

import ast
import dataclasses
import inspect
import json
import posixpath
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODULES = ("unetgn", "unetgn.pipelines", "unetgn.interop", "unetgn.fusion")
# Files of the repository, and the pages that are made of them.
MADE_OF = {
    "benchmarks/README.md": "benchmarks.md",
    "unetgn/__init__.py": "reference/unetgn.md",
    "unetgn/training/config.py": "reference/configuration.md",
    "unetgn/unet/description.py": "reference/unetgn.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the pictures that README and the pages share."""
    pages = {f"reference/{name.rpartition('.')[2]}.md": reference(name) for name in MODULES}
    pages |= {"reference/configuration.md": configuration(), "benchmarks.md": benchmarks()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for path in pictures():
        files.append(File.generated(config, f"assets/{path.name}", abs_src_path=str(path)))
    return files


def pictures() -> list[Path]:
    """List the files that the site has under assets/."""
    return [*sorted((ROOT / "assets").iterdir()), *sorted(RESULTS.glob("*.png"))]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the site's pages and pictures; others stay, and a strict build refuses them."""
    folder = posixpath.dirname(page.file.src_uri)
    places = {path.relative_to(ROOT).as_posix(): f"assets/{path.name}" for path in pictures()} | MADE_OF

    def led(link: re.Match[str]) -> str:
        path, mark, anchor = link[1].partition("#")
        place = places.get(posixpath.normpath(posixpath.join("docs", folder, path)))
        return f"]({posixpath.relpath(place, folder or '.')}{mark}{anchor})" if place else link[0]

    return re.sub(r"\]\(([^\s()]+)\)", led, markdown)


def reference(module: str) -> str:
    """Write the page of what a module exports; mkdocstrings puts the docstrings in."""
    found = import_module(module)
    parts = [f"# `{module}`", inspect.getdoc(found) or ""]
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            parts.append(f"::: {module}.{name}")
        else:
            text = (
                inspect.getdoc(value) if callable(value) else f"Holds, by name: {', '.join(map('`{}`'.format, value))}."
            )
            parts.append(f"## `{name}` {{ #{module}.{name} }}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def configuration() -> str:
    """Write the page of the keys of a run: a table for each dataclass of the configuration."""
    from unetgn.training.config import RunConfig

    parts = [
        "# Keys of a run",
        "In a file as groups (`train:` and, under it, `steps: 1000`), on the command line as `train.steps=1000`. "
        "`python training/train.py --help` lists the same. Two keys of a file are about files, and no keys of the run: "
        "[`base` and `on_cpu`](../guides/configurations.md).",
    ]
    for prefix, cls in groups(RunConfig, ""):
        parts += [f"## {f'`{prefix}*`' if prefix else 'The run'}", (inspect.getdoc(cls) or "").split("\n\n")[0]]
        hints, said = get_type_hints(cls), docstrings(cls)
        rows = ["| key | type | default | |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            if not nested(hints[field.name]):
                cells = (f"`{prefix}{field.name}`", f"`{typed(hints[field.name])}`", f"`{default(field)}`",
                         " ".join(said.get(field.name, "").split()).replace("|", "\\|"))  # fmt: skip
                rows.append(f"| {' | '.join(cells)} |")  # within `…` a | is one of the text
        parts.append("\n".join(rows) if len(rows) > 2 else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def groups(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Go through a configuration's dataclasses, each with what its keys begin with."""
    yield prefix, cls
    for name, hint in get_type_hints(cls).items():
        for inner in nested(hint):
            yield from groups(inner, f"{prefix}{name}.")


def nested(hint: Any) -> list[Any]:
    """Return the dataclass that a field holds, where it holds one (or None)."""
    return [kind for kind in (hint, *getattr(hint, "__args__", ())) if dataclasses.is_dataclass(kind)]


def typed(hint: Any) -> str:
    """Write a type as a reader of YAML has it."""
    text = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    return text.replace("typing.", "").replace("NoneType", "null").replace("None", "null")


def default(field: Any) -> str:
    """Write the value that a key has where nobody gives one, as YAML has it."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory
    if value is dataclasses.MISSING:
        return "required"
    value = value() if callable(value) else value
    return json.dumps(value, ensure_ascii=False)


def docstrings(cls: type) -> dict[str, str]:
    """Read the strings that stand under the fields of a dataclass and of those that it builds on."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for node, after in pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(node.target, ast.Name):
                found[node.target.id] = str(ast.literal_eval(after.value))
    return found


def benchmarks() -> str:
    """Write the page of what was measured, from the JSON files."""
    from benchmarks.fuse_coverage import readme_table as coverage
    from benchmarks.fuse_coverage import recorded
    from benchmarks.normalization import BATCH_SIZES, KINDS, mean_errors
    from benchmarks.tables import PLOT, origin, pages, results

    parts = [
        "# Benchmarks",
        "Made from the JSON files in `benchmarks/results`; `benchmarks/README.md` has the commands and says how each "
        "is measured. Where a table names no GPU, none was measured.",
    ]
    parts += pages(results())
    if (RESULTS / PLOT).is_file():
        parts.append(f"![Memory of a training step](assets/{PLOT})")
    for path in sorted(RESULTS.glob("host_overhead_*.json")):
        parts += ["## What a call costs on the host", host_overhead(json.loads(path.read_text()))]
    parts += ["## How much of diffusers is fused", coverage(recorded())]
    normalization = json.loads((RESULTS / "normalization.json").read_text())
    parts += ["## Normalizations as the batch shrinks", origin(normalization), "![](assets/normalization.png)"]
    for standardize in (False, True):
        weights = "standardized" if standardize else "plain"
        sizes = " | ".join(f"batch {size}" for size in BATCH_SIZES)
        rows = [f"| {weights} weights: validation error in % | {sizes} |", "|---" * (1 + len(BATCH_SIZES)) + "|"]
        for norm in KINDS:
            errors = mean_errors(normalization["rows"], norm, standardize)
            cells = [f"{100 * errors[size]:.2f}" if size in errors else "" for size in BATCH_SIZES]
            rows.append(f"| {norm} | " + " | ".join(cells) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def host_overhead(result: dict[str, Any]) -> str:
    """Write the table of one machine."""
    from benchmarks.tables import origin

    rows = ["| call | layout | passes | ours, µs | eager, µs | more, µs |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        figures = (row["ours_us"], row["eager_us"], row["extra_us"])
        cells = [row["call"], row["layout"], row["passes"], *(f"{figure:.1f}" for figure in figures)]
        rows.append("| " + " | ".join(cells) + " |")
    return origin(result) + "\n\n" + "\n".join(rows)
