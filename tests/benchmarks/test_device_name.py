"""The name of the processor in results and their files' names; and where committed results come from."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import device_name, host_overhead, normalization
from benchmarks.tables import PROGRAMS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_two_cpus_of_one_architecture_have_two_names(tmp_path, monkeypatch):
    names = []
    for model in (17, 1):
        facts = tmp_path / f"cpuinfo{model}"
        facts.write_text(
            f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n"
        )
        monkeypatch.setattr(device_name, "CPU_FACTS", facts)
        names.append(device_name.device_name("cpu"))
    assert names == ["AMD EPYC family 25 model 17", "AMD EPYC family 25 model 1"]


def test_a_system_without_cpuinfo_still_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(device_name, "CPU_FACTS", tmp_path / "none")
    assert device_name.device_name("cpu")


@pytest.mark.parametrize(
    "path",
    [RESULTS / "normalization.json", *(path for name in PROGRAMS for path in RESULTS.glob(f"{name}_*.json"))],
    ids=lambda p: p.stem,
)
def test_committed_results_say_what_made_them(path):
    result = json.loads(path.read_text())
    assert len(result["commit"]) == 40
    assert result["command"]
    assert result["device"] != "x86_64"


def test_a_new_run_of_the_normalization_benchmark_writes_where_it_comes_from():
    origin = normalization.head("normalization")
    assert {"device", "torch", "commit", "command"} <= set(origin)
    assert origin["command"].startswith("python -m benchmarks.normalization")


def test_figures_of_host_overhead_name_the_model_of_the_processor(tmp_path, monkeypatch):
    facts, out = tmp_path / "cpuinfo", tmp_path / "out.json"
    facts.write_text("cpu family\t: 25\nmodel\t\t: 3\nmodel name\t: Made Up\n")
    monkeypatch.setattr(device_name, "CPU_FACTS", facts)
    monkeypatch.setattr(sys, "argv", ["host_overhead", "--rounds", "2", "--repeats", "1", "--out", str(out)])
    host_overhead.main()
    assert json.loads(out.read_text())["device"] == "Made Up family 25 model 3"
