"""Exports to ONNX and runs the graph in onnxruntime. The extra [onnx] has both."""

from pathlib import Path

import pytest
import torch

from tests.unet.test_tracers import OTHER_SIZE, SIZE, SUBJECTS, Subject, free
from unetgn.ops import implementation

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.thorough  # a minute


def values(file: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file)
    named = zip(session.get_inputs(), inputs, strict=True)
    return torch.from_numpy(session.run(None, {name.name: value.numpy() for name, value in named})[0])


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of deprecation
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        # Its parts are here without it, and the whole network is ours.
        pytest.param(name, "auto", marks=pytest.mark.slow if name == "fused UNet2DModel" else ())
        for name in SUBJECTS
    ]
    + [("operator", "aten")],
)
def test_the_graph_gives_the_values_at_any_size(name: str, chosen: str, tmp_path: Path) -> None:
    """The implementation that computes here has no place in a graph for another program."""
    make, _, inputs = SUBJECTS[name]
    subject, file = Subject(make, inputs), tmp_path / "graph.onnx"
    given = inputs(*SIZE)
    with torch.no_grad(), implementation(chosen):
        torch.onnx.export(subject.module, given, file, dynamo=True, dynamic_shapes=free(given), verbose=False)
        subject.compare(lambda *others: values(file, others), OTHER_SIZE)


def test_a_program_that_was_exported_before_becomes_a_graph_where_it_holds_the_definition(tmp_path: Path) -> None:
    make, _, inputs = SUBJECTS["GroupNormSiLU"]
    subject, file = Subject(make, inputs), tmp_path / "graph.onnx"
    with implementation("reference"):
        program = torch.export.export(subject.module, inputs(*SIZE), dynamic_shapes=free(inputs(*SIZE)))
    torch.onnx.export(program, f=file, dynamo=True, verbose=False)
    with torch.no_grad():
        subject.compare(lambda *others: values(file, others), OTHER_SIZE)
