"""Makes the tables of whole programs, side by side, from the JSON files: `python -m benchmarks.tables`.

Prints README's table. `--write` puts it into README, between two marks, and draws the plot of memory; the page of
benchmarks in the documentation has the whole tables. What no file tells is said to be not measured yet.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.result_file import RESULTS

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- begin: python -m benchmarks.tables --write -->\n"
END = "<!-- end -->\n"
PLOT = "memory.png"
NOT_YET = "not measured yet"
MIB = 2**20
PROGRAMS = ("unet_step_compiled", "unet_step", "train_compiled", "train", "sample", "memory", "startup")
Result = dict[str, Any]


def results(folder: Path = RESULTS) -> dict[str, dict[str, Result]]:
    """Read what was measured: by device, the result of each program."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(folder.glob("*.json")):
        program = next((name for name in PROGRAMS if path.stem.startswith(f"{name}_")), None)
        if program is not None:
            result = json.loads(path.read_text())
            found.setdefault(result["device"], {})[program] = result
    return found


def origin(result: Result) -> str:
    """Say where figures arose."""
    threads = "" if "threads" not in result else f", {result['threads']} thread{'s' * (result['threads'] != 1)}"
    return f"On {result['device']}{threads}, torch {result['torch']}, commit {result['commit'][:10]}."


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Write a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def readme(found: dict[str, dict[str, Result]]) -> str:
    """Write README's table: what ours takes of what diffusers' takes, on each machine.

    What was measured on another machine alone is left out.
    """
    parts = []
    for device, measured in found.items() or {"": {}}.items():
        others = [each for name, each in found.items() if name != device]
        lines = [
            [what, value(measured)]
            for what, value in summary_rows()
            if value(measured) != NOT_YET or all(value(other) == NOT_YET for other in others)
        ]
        parts.append(markdown(["ours, of what diffusers' takes in the same run", device or "no machine yet"], lines))
        said = {(r["threads"], r["torch"], r["commit"][:10]): [] for r in measured.values()}  # type: ignore[var-annotated]
        for name, result in measured.items():
            said[result["threads"], result["torch"], result["commit"][:10]].append(f"`{name}`")
        parts += [
            f"{', '.join(names)}: {threads} thread{'s' * (threads != 1)}, torch {torch}, commit {commit}."
            for (threads, torch, commit), names in said.items()
        ]
    return "\n\n".join(parts)


def summary_rows() -> Iterator[tuple[str, Callable[[dict[str, Result]], str]]]:
    """List what README says, each with the function that reads it from the results of a machine."""

    def row_of(program: str, **which: Any) -> Callable[[dict[str, Result]], Result | None]:
        def find(measured: dict[str, Result]) -> Result | None:
            rows = measured.get(program, {}).get("rows", [])
            return next((row for row in rows if all(row.get(key) == value for key, value in which.items())), None)

        return find

    def told(find: Callable[[dict[str, Result]], Result | None], text: str) -> Callable[[dict[str, Result]], str]:
        def tell(measured: dict[str, Result]) -> str:
            row = find(measured)
            return NOT_YET if row is None else text.format(**row, spread=spread(row))

        return tell

    for processes in (1, 2):
        many = f"{processes} process{'es' * (processes > 1)}"
        yield (f"`training/train.py` and the loop of diffusers' example, {many}: time",
               told(row_of("train", processes=processes), "{spread}"))  # fmt: skip
    yield ("`training/train.py` with `train.compile=true`, and that loop, 1 process: time",
           told(row_of("train_compiled", processes=1), "{spread}"))  # fmt: skip
    for batch in (1, 64):
        yield (f"50 DDIM steps, {batch} image{'s' * (batch > 1)} at a time: time",
               told(row_of("sample", what="pipeline", batch=batch), "{spread}"))  # fmt: skip
    yield "1,000 images of digits, the whole program: time", told(row_of("sample", what="program"), "{spread}")
    case = {"network": "cifar10", "layout": "contiguous", "dtype": "float32"}
    for contender, words in (("ours", ""), ("ours, activations", ", activations computed again")):
        yield (f"a training step of CIFAR-10's network{words}: time, bytes kept for backward",
               told(row_of("unet_step", contender=contender, **case), "{spread}, {kept_ratio:.2f}"))  # fmt: skip
    compiled = row_of("unet_step_compiled", contender="ours, compiled", **case)
    yield ("a training step of CIFAR-10's network, compiled, of diffusers' uncompiled: time, bytes kept for backward",
           told(compiled, "{spread}, {kept_ratio:.2f}"))  # fmt: skip
    for name in ("unetgn.GroupNormSiLU", "unetgn.UNet"):
        yield f"`{name}`: import, after torch", told(row_of("startup", what=name), "{seconds_above:.2f} s")
    for what in ("first step", "first image"):
        yield f"{what}, with all imports: time", told(row_of("startup", what=f"{what}, ours"), "{spread}")


def replaced(text: str, table: str) -> str:
    """Return README's text with this table between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no part between {BEGIN.strip()} and {END.strip()}: put these two lines back")
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def pages(found: dict[str, dict[str, Result]]) -> list[str]:
    """Write the parts of the documentation's page: a heading, where the figures are from, a table."""
    titles = {
        "train": ("Training, whole programs", train),
        "train_compiled": ("Training, whole programs, ours with `train.compile=true`", train),
        "sample": ("Drawing images", sample),
        "unet_step": ("Training steps of U-Nets", unet_step),
        "unet_step_compiled": ("Training steps of U-Nets, compiled", unet_step),
        "memory": ("Memory of a training step", memory),
        "startup": ("Before the first step", startup),
    }
    parts = []
    for program, (title, table) in titles.items():
        parts.append(f"## {title}")
        for measured in found.values():
            if program in measured:
                parts += [origin(measured[program]), table(measured[program])]
                if program == "unet_step" and measured[program]["parts"]:
                    parts += [PARTS_WORDS, broken_down(measured[program])]
        if not any(program in measured for measured in found.values()):
            parts.append(f"{NOT_YET.capitalize()}.")
    return parts


PARTS_WORDS = (
    "Where a step's time goes, in milliseconds. In brackets what the machine's own matrix product would need for as "
    "many operations; norms and the rest move memory and have no such figure."
)


def spread(row: Result) -> str:
    """Write a ratio with its quartiles."""
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f}–{high:.2f})"


def train(result: Result) -> str:
    """Write the table of whole training programs."""
    rows = []
    for row in result["rows"]:
        rates = [f"{rate:.1f}" for rate in row["images_per_second"].values()]
        rows.append([str(row["processes"]), *rates, spread(row)])
    names = [f"{name}, images/s" for name in result["rows"][0]["images_per_second"]]
    return markdown(["processes", *names, "time of ours, of theirs (quartiles)"], rows)


def sample(result: Result) -> str:
    """Write the table of drawing."""
    rows = []
    for row in result["rows"]:
        what = f"{row['images']} images, whole program" if row["what"] == "program" else "50 DDIM steps"
        rates = [f"{rate:.2f}" for rate in row["images_per_second"].values()]
        rows.append([what, str(row["batch"]), f"{row['size']}×{row['size']}", *rates, spread(row)])
    names = [f"{name}, images/s" for name in result["rows"][0]["images_per_second"]]
    return markdown(["what", "batch", "pixels", *names, "time of ours, of theirs (quartiles)"], rows)


def unet_step(result: Result) -> str:
    """Write the table of steps."""
    rows = []
    for row in result["rows"]:
        case = [f"{row['network']}, batch {row['batch']}" if "batch" in row else row["network"]]
        case += [row["layout"], row["dtype"], row["contender"]]
        if "absent" in row:
            rows.append([*case, row["absent"], "", "", ""])
            continue
        kept = f"{row['kept_bytes'] / MIB:.0f} ({row['kept_ratio']:.2f})" if "kept_bytes" in row else ""
        peak = f"{row['peak_bytes'] / MIB:.0f}" if "peak_bytes" in row else ""
        rows.append([*case, f"{1000 * row['seconds']:.1f}", spread(row), kept, peak])
    heads = [
        "network",
        "layout",
        "type",
        "",
        "ms",
        "of diffusers' (quartiles)",
        "MiB kept (of diffusers')",
        "MiB, peak",
    ]
    return markdown(heads, rows)


def broken_down(result: Result) -> str:
    """Write the table of a step's time by parts."""
    rows = []
    for row in result["parts"]:
        cells = [
            f"{1000 * part['seconds']:.1f}" + (f" ({1000 * part['at_best']:.1f})" if "at_best" in part else "")
            for part in row["parts"].values()
        ]
        rows.append([row["network"], row["contender"], *cells])
    return markdown(["network", "", *result["parts"][0]["parts"]], rows)


def memory(result: Result) -> str:
    """Write the table of memory."""
    points = list(dict.fromkeys((row["batch"], row["size"]) for row in result["rows"]))
    rows = []
    for name in dict.fromkeys(row["contender"] for row in result["rows"]):
        own = {(row["batch"], row["size"]): row for row in result["rows"] if row["contender"] == name}
        cells = [f"{own[at]['step_bytes'] / MIB:.0f} ({own[at]['kept_bytes'] / MIB:.0f})" for at in points]
        rows.append([name, *cells])
    heads = [f"{batch} of {size}×{size}" for batch, size in points]
    return markdown(["MiB for a step (kept for backward)", *heads], rows)


def startup(result: Result) -> str:
    """Write the table of starts."""
    rows = [
        [row["what"], f"{row['seconds']:.2f}", row["compared_with"], f"{row['seconds_above']:+.2f}", spread(row)]
        for row in result["rows"]
    ]
    return markdown(["a process of its own", "s", "compared with", "s more", "of it (quartiles)"], rows)


def draw_memory(result: Result, path: Path) -> None:
    """Plot the memory of a step against batch, and against height and width."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    small, one = (min(row[key] for row in result["rows"]) for key in ("size", "batch"))
    for panel, axis, other, value in ((panels[0], "batch", "size", small), (panels[1], "size", "batch", one)):
        for name in dict.fromkeys(row["contender"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["contender"] == name and row[other] == value]
            rows.sort(key=lambda row, axis=axis: row[axis])  # type: ignore[misc]
            panel.plot([row[axis] for row in rows], [row["step_bytes"] / MIB for row in rows], marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({row[axis] for row in result["rows"] if row[other] == value}))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.set_xlabel(f"images of {small}×{small} a batch" if axis == "batch" else f"pixels a side, batch {one}")
    panels[0].set_ylabel("MiB for a step")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    """Print README's table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md, and draw the plot")
    arguments = parser.parse_args(given)
    found = results()
    print(readme(found))
    if arguments.write:
        README.write_text(replaced(README.read_text(encoding="utf-8"), readme(found)), encoding="utf-8")
        measured = [result["memory"] for result in found.values() if "memory" in result]
        if measured:
            draw_memory(measured[0], RESULTS / PLOT)


if __name__ == "__main__":
    main()
