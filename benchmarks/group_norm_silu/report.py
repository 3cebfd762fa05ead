"""Makes a table and a roofline plot from the JSON of a run: `python -m benchmarks.group_norm_silu.report RESULT.json`.

Several files, the parts of a run, are merged into one, which is written beside them.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.group_norm_silu.record import merged
from unetgn.programs.paths import user_path

Row = dict[str, Any]
PEERS = ("eager", "compiled", "liger", "apex")


def limit_us(row: Row) -> float:
    """Return the microseconds that the row's bytes take at the copy bandwidth of the same run."""
    return float(row["bytes"]) / float(row["copy_bandwidth"]) * 1e6


def fraction(row: Row) -> float:
    """Return the share of the copy bandwidth that ours reaches, by the limit's bytes."""
    return limit_us(row) / float(row["ours_us"])


def table(rows: list[Row]) -> str:
    """Write the rows as a Markdown table: microseconds of each contender, and ours against the limit.

    A dash: not measured; "failed": the row says why (NAME_error).
    """
    head = ["shape", "dtype", "layout", "extras", "pass", "clusters", "limit", "ours", *PEERS, "of copy bandwidth"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = [
            "×".join(str(size) for size in row["shape"]),
            *(str(row[name]) for name in ("dtype", "layout", "extras", "pass")),
            "yes" if row["clusters"] else "no",
            f"{limit_us(row):.1f}",
            *(_cell(row, name) for name in ("ours", *PEERS)),
            f"{100 * fraction(row):.0f} %" if "ours_us" in row else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row, name: str) -> str:
    if f"{name}_error" in row:
        return "failed"
    return f"{row[f'{name}_us']:.1f}" if f"{name}_us" in row else "–"


def summary(rows: list[Row]) -> dict[str, Any]:
    """Compute the figures that the targets speak of, over the rows without extras and without clusters.

    Median speed-ups over eager and compiled; rows where ours is slower than the better of the two; rows in which a
    contender failed; the least share of the copy bandwidth among tensors of at least 64 MB, by pass.
    """
    plain = [row for row in rows if row["extras"] == "none" and not row["clusters"] and "ours_us" in row]
    speedups = {
        peer: [row[f"{peer}_us"] / row["ours_us"] for row in plain if f"{peer}_us" in row]
        for peer in ("eager", "compiled")
    }
    result: dict[str, Any] = {
        f"median_speedup_over_{peer}": statistics.median(found) if found else None for peer, found in speedups.items()
    }
    result["slower_than_the_better"] = [
        row for row in plain if row["ours_us"] > min(row.get(f"{peer}_us", math.inf) for peer in speedups)
    ]
    result["errors"] = [row for row in rows if any(key.endswith("_error") for key in row)]
    for which in ("forward", "backward"):
        large = [row for row in plain if row["pass"] == which and tensor_bytes(row) >= 64e6]
        result[f"least_share_of_bandwidth_{which}"] = min((fraction(row) for row in large), default=None)
    return result


def tensor_bytes(row: Row) -> int:
    """Return the bytes of x."""
    size = {"bfloat16": 2, "float16": 2, "float32": 4}[row["dtype"]]
    for extent in row["shape"]:
        size *= extent
    return size


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Plot the bandwidth reached (the limit's bytes over time) against the size of x; the copy's is the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, which in zip(axes, ("forward", "backward"), strict=True):
        chosen = [row for row in rows if row["pass"] == which and row["extras"] == "none"]
        for name, marker in (("ours", "o"), ("compiled", "^"), ("eager", "x")):
            for layout, colour in (("contiguous", "tab:blue"), ("channels_last", "tab:orange")):
                some = [r for r in chosen if r["layout"] == layout and f"{name}_us" in r and not r["clusters"]]
                sizes = [tensor_bytes(r) / 1e6 for r in some]
                reached = [r["bytes"] / r[f"{name}_us"] / 1e3 for r in some]
                axis.plot(sizes, reached, marker, color=colour, label=f"{name}, {layout}")
        for row in chosen[:1]:
            axis.axhline(row["copy_bandwidth"] / 1e9, color="black", linestyle="--", label="copy")
        axis.set(xscale="log", yscale="log", xlabel="x, MB", title=which)
    axes[0].set_ylabel("GB/s, by the limit's bytes")
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Write the table (.md) and the plot (.png) beside the JSON, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "results", type=user_path, nargs="+", help="JSON written by `python -m benchmarks.group_norm_silu`"
    )
    paths = parser.parse_args().results
    result, path = merged(paths), paths[0]
    if len(paths) > 1:
        path = path.with_name(re.sub(r"_part\d+of\d+$", "", path.stem) + "_merged.json")
        path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(result["rows"]) + "\n")
    plot(result["rows"], path.with_suffix(".png"), f"group norm + SiLU, {result['device']}")
    print(
        json.dumps({**summary(result["rows"]), "wrong": result["faults"], "not_measured": result["errors"]}, indent=2)
    )


if __name__ == "__main__":
    main()
