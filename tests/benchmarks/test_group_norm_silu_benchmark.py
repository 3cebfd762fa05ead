"""The benchmark of the fused operator: its limits, its checks and its report, on made-up measurements (no GPU here)."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.group_norm_silu import report
from benchmarks.group_norm_silu.cases import SHAPES, Case, cases
from benchmarks.group_norm_silu.checks import Check, checks, faults
from benchmarks.group_norm_silu.measure import row
from benchmarks.group_norm_silu.record import OtherResults
from benchmarks.group_norm_silu.report import fraction, plot, summary, table

BANDWIDTH = 4e12


def made_up_rows(ours: float = 1.0) -> list[dict[str, Any]]:
    """Rows of a device on which eager takes 4, compiled 2 and ours `ours` times the limit."""
    found = []
    for case in cases():
        for which in ("forward", "backward"):
            limit = case.bytes_moved(which) / BANDWIDTH * 1e6
            times = {"ours_us": ours * limit, "eager_us": 4 * limit, "compiled_us": 2 * limit}
            found.append(row(case, which, times, BANDWIDTH, 2))
    return found


def run_as_command(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python -m module arguments…` in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [((8, 640, 32, 32), 4, 6), ((8, 320, 64, 64), 4, 10), ((1, 128, 512, 512), 6, 10)],
    ids=str,
)
def test_the_limits_bytes_at_16_bits_are_those_of_the_design(
    shape: tuple[int, int, int, int], forward: int, backward: int
) -> None:
    case = Case(shape, "bfloat16", "contiguous")
    assert case.bytes_moved("forward") == forward * case.elements
    assert case.bytes_moved("backward") == backward * case.elements
    assert case.bytes_moved("forward", clusters=True) == 4 * case.elements


def test_every_shape_dtype_and_layout_is_measured_and_the_extras_in_bfloat16() -> None:
    everything = cases()
    assert len({(c.shape, c.dtype, c.layout) for c in everything if c.extras == "none"}) == 12 * 3 * 2
    assert {c.extras for c in everything if c.dtype == "bfloat16"} == {"none", "pre_bias", "scale_shift", "maps"}
    assert len(everything) == len(set(everything))
    assert set(cases(quick=True)) < set(everything)


def test_the_most_important_cases_come_first_and_parts_share_them_out() -> None:
    everything = cases()
    assert {(c.dtype, c.extras) for c in everything[: 2 * len(SHAPES)]} == {("bfloat16", "none")}
    assert {c.layout for c in everything[:2]} == {"contiguous", "channels_last"}
    parts = [cases(part=(k, 3)) for k in (1, 2, 3)]
    assert [len(part) for part in parts] == [len(everything) // 3] * 3
    assert set(everything) == set().union(*parts)
    assert all(part[0].dtype == "bfloat16" and part[0].extras == "none" for part in parts)


def test_filters_leave_what_they_name() -> None:
    chosen = cases(dtypes=["float16"], shapes=[(1, 1280, 8, 8)])
    assert [(c.shape, c.dtype, c.layout) for c in chosen] == [
        ((1, 1280, 8, 8), "float16", layout) for layout in ("contiguous", "channels_last")
    ]


def test_the_summary_speaks_of_the_targets() -> None:
    figures = summary(made_up_rows())
    assert figures["median_speedup_over_eager"] == pytest.approx(4)
    assert figures["median_speedup_over_compiled"] == pytest.approx(2)
    assert figures["slower_than_the_better"] == []
    assert figures["least_share_of_bandwidth_forward"] == pytest.approx(1)
    slow = summary(made_up_rows(ours=2.5))
    assert len(slow["slower_than_the_better"]) == 12 * 3 * 2 * 2
    assert slow["least_share_of_bandwidth_backward"] == pytest.approx(0.4)


def test_the_table_has_a_line_a_row_and_leaves_out_peers_that_are_not_installed() -> None:
    rows = made_up_rows(ours=1.25)
    lines = table(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert all("80 %" in line and " – | – | " in line for line in lines[2:])
    assert fraction(rows[0]) == pytest.approx(0.8)


def test_a_contender_that_failed_is_in_the_table_and_out_of_the_figures() -> None:
    rows = made_up_rows()
    rows[0] |= {"compiled_error": "RuntimeError: no", "eager_us": rows[0]["ours_us"] / 2}
    del rows[0]["compiled_us"]
    del rows[1]["ours_us"]
    assert "failed" in table(rows).splitlines()[2]
    figures = summary(rows)
    assert figures["errors"] == figures["slower_than_the_better"] == rows[:1]


def test_parts_are_merged_and_reported_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", lambda *_: None)  # drawn below
    rows = made_up_rows()
    paths = [tmp_path / f"made_up_part{k}of2.json" for k in (1, 2)]
    for path, some in zip(paths, (rows[::2], rows[1::2]), strict=True):
        path.write_text(json.dumps({"device": "made up", "commit": "c", "rows": some, "faults": [], "errors": []}))
    monkeypatch.setattr(sys, "argv", ["report", *map(str, paths)])
    report.main()
    merged = json.loads((tmp_path / "made_up_merged.json").read_text())
    assert sorted(map(str, merged["rows"])) == sorted(map(str, rows))
    paths[1].write_text(json.dumps({"device": "made up", "commit": "c", "rows": rows[:1], "faults": [], "errors": []}))
    with pytest.raises(OtherResults, match=r"holds rows of .* 'pass': 'forward'.* and so does an earlier file"):
        report.main()
    paths[1].write_text(json.dumps({"device": "another", "commit": "c", "rows": [], "faults": [], "errors": []}))
    with pytest.raises(OtherResults, match="results of device another"):
        report.main()


def test_the_report_command_writes_a_table_and_a_plot_beside_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"device": "a made-up device", "rows": made_up_rows(), "faults": [], "errors": []}))
    run_as_command("benchmarks.group_norm_silu.report", [str(path)], monkeypatch)
    assert json.loads(capsys.readouterr().out)["median_speedup_over_eager"] == pytest.approx(4)
    assert path.with_suffix(".md").read_text().startswith("| shape |")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_rows_without_clusters_needs_no_peer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ours_alone = [{k: v for k, v in r.items() if k not in ("eager_us", "compiled_us")} for r in made_up_rows()[:2]]
    plot(ours_alone, tmp_path / "plot.png", "ours alone")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_as_command("benchmarks.group_norm_silu.__main__", ["--quick"], monkeypatch)
    assert left.value.code == 2
    assert "No CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_checks_pass_where_results_are_right(channels_last: bool) -> None:
    check = Check((2, 12, 5, 4), 3, torch.float32, channels_last, ("weight", "bias", "pre_bias", "scale", "shift"))
    assert faults(check, "reference", "cpu") == []


def test_the_checks_find_results_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from unetgn.ops import reference

    right = reference.forward

    def wrong(arguments: Any) -> tuple[torch.Tensor, ...]:
        y, mean, rstd = right(arguments)
        return (y if y.dtype == torch.float64 else y * 1.001), mean, rstd

    monkeypatch.setattr(reference, "forward", wrong)
    problems = faults(Check((2, 12, 5, 4), 3, torch.float32, False, ("weight", "bias")), "reference", "cpu")
    assert "y is off by 1.0e-03" in problems[0]


def test_the_checks_cover_both_layouts_all_dtypes_and_a_large_mean() -> None:
    everything = list(checks())
    assert {(c.channels_last, c.dtype) for c in everything} >= {
        (layout, dtype)
        for layout in (False, True)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    }
    assert any(c.mean == 1000 for c in everything)
