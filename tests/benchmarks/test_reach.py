"""Tests the count of U-Nets that load: its verdicts on small configurations, and that a wrong network is seen."""

import json

import pytest
import torch

from benchmarks import reach
from benchmarks.reach import Row, judge, main, readme_table, table
from tests.structure.imports import ROOT
from unetgn import UNet

DDPM = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
LARGE = {**DDPM, "block_out_channels": [256, 512], "attention_head_dim": 64, "act_fn": "gelu"}


def test_a_network_that_loads_is_compared_at_its_size_or_as_a_small_copy():
    whole, small = judge("a", "UNet2DModel", DDPM), judge("b", "UNet2DModel", LARGE)
    assert (whole.verdict, whole.compared) == ("loads", "as it is")
    assert (small.verdict, small.compared) == ("loads", "a small copy")
    assert max(whole.error, small.error) <= reach.EXACT


def test_a_network_that_computes_something_else_is_wrong(monkeypatch):
    convert = UNet.from_diffusers

    def nearly(model):
        unet = convert(model)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter *= 1 + 1e-9
        return unet

    monkeypatch.setattr(UNet, "from_diffusers", staticmethod(nearly))
    assert judge("a", "UNet2DModel", DDPM).verdict == "wrong"


@pytest.mark.parametrize(
    ("class_name", "config", "family", "reason"),
    [
        ("UNet2DModel", {**DDPM, "down_block_types": ["SkipDownBlock2D"] * 2}, "NCSN++", "a block of NCSN"),
        ("NoSuchUNet", {}, "other classes", "diffusers has no class NoSuchUNet"),
        ("UNet2DModel", {**DDPM, "block_out_channels": [30, 60]}, "DDPM, ADM, LDM: UNet2DModel", "cannot build it"),
        ("StableCascadeUNet", {}, "Stable Cascade", "Stable Cascade's network"),
    ],
)
def test_a_refusal_has_a_family_and_a_reason(class_name, config, family, reason):
    row = judge("a", class_name, config)
    assert (row.verdict, row.family) == ("refused", family)
    assert reason in row.reason


def test_the_table_counts_each_family(tmp_path, capsys):
    rows = [Row("a", "x", "loads"), Row("b", "x", "refused", "why"), Row("c", "y", "loads"), Row("d", "x", "loads")]
    assert table(rows).splitlines()[2:] == [
        "| x | 2 | 1 | 0 |",
        "| y | 1 | 0 | 0 |",
        "| **all** | **3** | **1** | **0** |",
    ]
    configs = [{"name": "n", "class": "NoSuchUNet", "config": {}}]
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    assert main([str(tmp_path / "configs.json"), "--output", str(tmp_path / "reach.json")]) == 0
    assert "1 refused: diffusers has no class NoSuchUNet (first: n)" in capsys.readouterr().out
    assert json.loads((tmp_path / "reach.json").read_text())["rows"][0]["verdict"] == "refused"


def test_readme_shows_the_families_that_load_and_the_others_in_one_line():
    rows = [Row("a", "x", "loads"), Row("b", "y", "refused", "why"), Row("c", "z", "refused", "why")]
    assert readme_table(rows).splitlines()[2:-1] == ["| x | 1 | 0 | 0 |", "| y, z | 0 | 2 | 0 |"]


def test_readme_and_the_guide_show_what_is_recorded():
    rows = reach.recorded()
    assert f"\n\n{readme_table(rows)}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n\n{table(rows)}\n" in (ROOT / "docs/guides/weights.md").read_text(encoding="utf-8")
    assert f"Of {len(rows)} configurations" in (ROOT / "docs/guides/weights.md").read_text(encoding="utf-8")
    assert not [row.name for row in rows if row.verdict == "wrong"]
