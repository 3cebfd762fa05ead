"""Checks what `import unetgn` brings along, and what it leaves for later."""

import json
import subprocess
import sys

import pytest
import torch

import unetgn

STAGES = {  # in one process, one after the other
    "package": "import unetgn",
    "packages": "import unetgn.unet, unetgn.pipelines",
    "function": "import torch; x = torch.ones(2, 4, 3); unetgn.group_norm_silu(x.requires_grad_(), 2).sum().backward()",
    "exported": "x = x.detach(); y = torch.export.load(sys.argv[1]).module()(x)",
    "operator": "assert torch.equal(unetgn.GroupNormSiLU(2, 4).requires_grad_(False)(x), y)",
    "derivative": "unetgn.GroupNormSiLU(2, 4)(x).sum().backward()",
    "attributes": "unetgn.nn, unetgn.ops",
    "loaded network": "program = torch.export.load(sys.argv[2])",
    "configuration": "unetgn.UNetConfig(), unetgn.ResBlock",
    "pictures": "import unetgn.pipelines.pictures",
    "network": "inputs = torch.ones(1, 3, 8, 8), torch.tensor(5); y = program.module()(*inputs)",
    "values": "assert type(y) is unetgn.unet.UNetOutput and y.sample.equal(torch.load(sys.argv[3]))",
    "loaded again": "assert type(torch.export.load(sys.argv[2]).module()(*inputs)) is type(y)",
}


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """Map each stage to the modules that a process holds after it. The arguments are programs of ours, and a value."""
    folder = tmp_path_factory.mktemp("exported")
    program, network, value = folder / "norm.pt2", folder / "network.pt2", folder / "value.pt"
    torch.export.save(torch.export.export(unetgn.GroupNormSiLU(2, 4), (torch.ones(2, 4, 3),)), program)
    unet = unetgn.UNet(channels=(8,), depth=1, attention_levels=(), norm={"num_groups": 4}).eval()
    torch.nn.init.normal_(unet.conv_out.weight)
    inputs = (torch.ones(1, 3, 8, 8), torch.tensor(5))
    torch.export.save(torch.export.export(unet, inputs), network)
    torch.save(unet(*inputs).sample.detach(), value)
    code = "import json, sys; found = {}\n"
    code += "".join(f"{stage}; found[{name!r}] = list(sys.modules)\n" for name, stage in STAGES.items())
    command = [sys.executable, "-c", f"{code}print(json.dumps(found))", *map(str, (program, network, value))]
    result = subprocess.run(command, capture_output=True, check=True)
    return {name: set(found) for name, found in json.loads(result.stdout).items()}


def test_the_packages_import_neither_diffusers_nor_triton_nor_the_compiler(modules):
    assert not modules["packages"] & {"diffusers", "triton", "torch._dynamo", "torch._inductor", "PIL"}


def test_a_program_that_was_exported_loads_in_a_new_process_after_importing_the_package_alone(modules):
    assert "exported" in modules  # the process loaded and ran it, and the operator agreed
    assert "unetgn.ops.library" in modules["package"]
    assert not modules["exported"] & {"diffusers", "unetgn.nn"}


def test_calling_the_operator_on_the_cpu_imports_neither_diffusers_nor_triton_nor_a_compiler(modules):
    assert "unetgn.ops.aten" in modules["operator"]
    assert "torch._dynamo" not in modules["function"]  # the compiler, which takes more than a second
    assert "diffusers" not in modules["derivative"]
    assert not {name for name in modules["derivative"] if name.startswith("unetgn.ops.triton")}


def test_a_network_that_was_exported_loads_and_returns_what_it_did_before(modules):
    assert "loaded again" in modules  # the process loaded and ran it, and compared type and values
    assert not modules["loaded network"] & {"diffusers", "unetgn.unet.model"}


def test_the_packages_are_reached_as_attributes(modules):
    assert modules["attributes"] >= {"unetgn.nn", "unetgn.ops"}


@pytest.mark.parametrize("stage", ["configuration", "pictures"])
def test_the_configuration_and_the_pictures_do_without_diffusers(stage, modules):
    assert not modules[stage] & {"diffusers", "unetgn.unet.model"}


HEAVY = ("diffusers", "triton", "torch._dynamo", "torch._inductor", "PIL")


def test_every_exported_name_but_the_network_is_had_without_a_heavy_import():
    """The network is a model of diffusers, whose import brings PyTorch's compiler."""
    names = ["GroupNormSiLU", *(name for name in unetgn.__all__ if name not in ("UNet", "GroupNormSiLU"))]
    code = f"import sys, unetgn\nfor name in {names}:\n    getattr(unetgn, name)\n"
    code += f"    print(name, *(heavy for heavy in {HEAVY} if heavy in sys.modules))\n"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert result.stdout.splitlines() == names


@pytest.mark.parametrize("name", unetgn.__all__)
def test_every_exported_name_can_be_had(name):
    assert callable(getattr(unetgn, name))
    assert name in dir(unetgn)


def test_type_checkers_are_told_every_exported_name():
    with open(unetgn.__file__, encoding="utf-8") as file:
        source = file.read()
    for name in unetgn.__all__:
        assert f" import {name} as {name}\n" in source


def test_an_unknown_name_is_an_error_that_lists_the_others():
    with pytest.raises(AttributeError, match=r"no attribute 'groupnorm'; it exports .*group_norm_silu"):
        unetgn.groupnorm  # noqa: B018
