"""Each optimizer by name does what its library's class does, is saved whole, and goes on to the same bits."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.training.test_hostile_checkpoints import EDITS, save, seal
from tests.training.test_step import batches
from unetgn import UNet
from unetgn.training.checkpoint import verify
from unetgn.training.config import EMAConfig, RunConfig, TrainConfig
from unetgn.training.data.config import DataConfig
from unetgn.training.errors import CheckpointError, ConfigError
from unetgn.training.objective import Objective, ObjectiveConfig
from unetgn.training.optimizer import check_optimizer_tensors, optimizer_to_tensors
from unetgn.training.optimizers import CLASSES, NEVER_NEGATIVE, READ_BY, OptimizerConfig, split, state_of
from unetgn.training.processes import make_accelerator
from unetgn.training.step import TrainState

VALUES: dict[str, Any] = {"eps": 1e-6, "momentum": 0.7, "nesterov": True, "adjust_lr_fn": "original", "beta3": 0.9,
                          "d0": 1e-5, "d_coef": 2.0, "growth_rate": 1.5, "use_bias_correction": True,
                          "safeguard_warmup": True}  # fmt: skip
# Each by its name alone, with all of its keys, and those that keep less.
KINDS = [
    *(({"name": name}, (0.9, 0.999)) for name in CLASSES),
    *(({"name": name, **{key: VALUES[key] for key in VALUES if name in READ_BY[key]}}, (0.8, 0.9)) for name in CLASSES),
    ({"name": "sgd", "momentum": 0.0}, (0.9, 0.999)),
    ({"name": "prodigy"}, (0.0, 0.9)),
]
every_kind = pytest.mark.parametrize(("keys", "betas"), KINDS, ids=lambda value: str(value) if "name" in value else "")


def installed(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of the library; skip where it is not installed."""
    _, module, found = CLASSES[name]  # type: ignore[index]
    return getattr(pytest.importorskip(module), found)


def make(keys: dict[str, Any], betas: tuple[float, float]) -> TrainState:
    AcceleratorState._reset_state(reset_partial_state=True)
    installed(keys["name"])
    torch.manual_seed(0)
    unet = UNet(in_channels=1, out_channels=1, channels=[16], attention_levels=[], depth=1, norm={"num_groups": 4},
                num_classes=2)  # fmt: skip
    train = TrainConfig(
        steps=8, learning_rate=1e-2, weight_decay=0.1, betas=betas, learning_rate_schedule="cosine", max_gradient_norm=0
    )
    objective = Objective(ObjectiveConfig(label_dropout=0.1), 2)
    return TrainState(unet, objective, train, EMAConfig(), Accelerator(cpu=True), 0, OptimizerConfig(**keys))


def labelled(count: int) -> list[dict[str, Tensor]]:
    return [batch | {"label": torch.tensor([0, 1, 0, 1])} for batch in batches(count, 4)]


def tensors(state: TrainState) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor for kind, all_of in state.tensors().items() for name, tensor in all_of.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every_kind
def test_a_run_goes_on_to_the_same_bits(keys: dict[str, Any], betas: tuple[float, float], tmp_path: Path) -> None:
    given = labelled(3)
    unbroken = make(keys, betas)
    for number, batch in enumerate(given):
        if number == 1:
            saved = save(unbroken, tmp_path)
        unbroken.run_step([batch])
    resumed = make(keys, betas)
    resumed.restore(verify(saved.path))
    assert same(tensors(resumed), {f"{kind}.{name}": tensor for kind in ("model", "ema", "optimizer")
                                   for name, tensor in saved.tensors(kind).items()})  # fmt: skip
    for batch in given[1:]:
        resumed.run_step([batch])
    assert same(tensors(resumed), tensors(unbroken))


@pytest.mark.parametrize(("keys", "betas"), [*KINDS[: len(CLASSES)], *KINDS[-2:]], ids=str)
def test_a_state_that_is_not_the_optimizers_is_refused(keys: dict[str, Any], betas: tuple[float, float]) -> None:
    """With each tensor gone, of another shape or type, not finite, or below 0 where it cannot be."""
    state = make(keys, betas)
    state.run_step(labelled(1))
    found = state.tensors()["optimizer"]
    one_of_each = {name.rpartition("/")[2]: name for name in sorted(found, key=lambda name: found[name].numel())}

    def check(changed: dict[str, Tensor]) -> None:
        check_optimizer_tensors(changed, state.optimizer_config, state.unet, betas, Path("file"), stepped=True)

    check(found)
    for kind, name in one_of_each.items():
        tensor, others = found[name], {key: value for key, value in found.items() if key != name}
        wrong = [others, others | {name: tensor[None]}, others | {name: tensor.to(torch.float16)}]
        wrong += [others | {name: tensor * float("nan")}] if tensor.is_floating_point() else []
        below = kind in ("step", "exp_avg_sq", "d", "d_max", "k", "absmax1", "absmax2")
        wrong += [others | {name: -torch.ones_like(tensor)}] if below else []
        for changed in wrong:
            with pytest.raises(CheckpointError, match="file"):
                check(changed)
    with pytest.raises(CheckpointError, match="it has more/more"):
        check(found | {"more/more": torch.zeros(1)})
    check_optimizer_tensors({}, state.optimizer_config, state.unet, betas, Path("file"), stepped=False)
    if found:
        with pytest.raises(CheckpointError, match="it lacks"):
            check({})


@every_kind
def test_a_strangers_state_is_refused_before_anything_is_changed(
    keys: dict[str, Any], betas: tuple[float, float], tmp_path: Path
) -> None:
    """With an edit to one tensor of each kind that the optimizer keeps, and right sums."""
    theirs, ours = make(keys, betas), make(keys, betas)
    theirs.run_step(labelled(1))
    path = save(theirs, tmp_path).path
    file = path / "optimizer.safetensors"
    found, before = load_file(file), {name: tensor.clone() for name, tensor in tensors(ours).items()}
    for kind, name in {name.rpartition("/")[2]: name for name in sorted(found)}.items():
        for edit, change in EDITS.items():
            whole = not found[name].is_floating_point()
            if (whole and edit in ("NaN", "infinite")) or (edit == "negative" and kind not in NEVER_NEGATIVE):
                continue
            edited = {key: tensor.clone() for key, tensor in found.items()}
            change(edited, name)
            if (
                edited.keys() == found.keys()
                and edit not in ("NaN", "infinite", "negative")
                and alike(edited, found, name)
            ):
                continue  # another number, which may be one of theirs
            save_file(edited, file)
            seal(path, file.name)
            with pytest.raises(CheckpointError) as caught:
                ours.restore(verify(path))
            assert str(caught.value).isprintable(), (name, edit)
            assert ours.step == 0
    assert same(tensors(ours), before)


def test_a_strangers_state_of_8_bits_is_refused_without_the_library_too(tmp_path: Path) -> None:
    """What bitsandbytes keeps of a parameter of 4,096 elements and more, and of a smaller one."""
    network, config = nn.Linear(64, 65), OptimizerConfig(name="adamw_8bit")
    wanted = state_of(config, network, (0.9, 0.999), {})
    torch.manual_seed(0)
    found = {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in wanted.items()}
    assert {name: found[name].dtype for name in found if name.startswith("weight/")} == {
        "weight/step": torch.int64, "weight/state1": torch.uint8, "weight/qmap1": torch.float32,
        "weight/absmax1": torch.float32, "weight/state2": torch.uint8, "weight/qmap2": torch.float32,
        "weight/absmax2": torch.float32
    }  # fmt: skip
    assert (found["weight/absmax1"].shape, found["bias/state1"].dtype) == ((17,), torch.float32)

    def check(tensors: dict[str, Tensor]) -> None:
        check_optimizer_tensors(tensors, config, network, (0.9, 0.999), tmp_path / "file", stepped=True)

    check(found)
    tried = 0
    for name in found:
        for edit, change in EDITS.items():
            whole = not found[name].is_floating_point()
            edited = {key: tensor.clone() for key, tensor in found.items()}
            if (whole and edit in ("NaN", "infinite")) or (edit == "negative" and found[name].dtype == torch.uint8):
                continue
            change(edited, name)
            below = edit == "negative" and name.rpartition("/")[2] in ("step", "state2", "absmax1", "absmax2")
            changed = edited.keys() != found.keys() or not alike(edited, found, name) or edit in ("NaN", "infinite")
            if below or (changed and edit != "negative"):
                tried += 1
                with pytest.raises(CheckpointError, match="file"):
                    check(edited)
    assert tried > 90


def alike(one: dict[str, Tensor], other: dict[str, Tensor], name: str) -> bool:
    return (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)


@every_kind
def test_a_step_is_the_one_of_the_librarys_class(keys: dict[str, Any], betas: tuple[float, float]) -> None:
    """On the same gradients; Muon's on matrices, while everything else is AdamW's."""
    state = make(keys, betas)
    torch.manual_seed(1)
    ours = state.unet
    theirs = UNet.from_unet_config(ours.unet_config)
    theirs.load_state_dict(ours.state_dict())
    more = {key: value for key, value in keys.items() if key != "name"}
    make_one, common = installed(keys["name"]), {"lr": 1e-2, "weight_decay": 0.1}
    parameters = dict(theirs.named_parameters())
    if keys["name"] == "muon":
        matrices = [p for module in theirs.modules() if isinstance(module, nn.Linear) for p in [module.weight]]
        others = [p for p in parameters.values() if not any(p is matrix for matrix in matrices)]
        optimizers = [make_one(matrices, **common, **{"adjust_lr_fn": "match_rms_adamw", **more}),
                      torch.optim.AdamW(others, betas=betas, **common)]  # fmt: skip
    elif keys["name"] == "sgd":
        optimizers = [make_one(parameters.values(), **common, **{"momentum": 0.9, **more})]
    else:
        optimizers = [make_one(parameters.values(), betas=betas, **common, **more)]
    for _ in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in (state.optimizer, *optimizers):
            optimizer.step()
    for name, one in ours.named_parameters():
        torch.testing.assert_close(one, parameters[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", CLASSES)
def test_a_gradient_that_is_not_finite_moves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make({"name": name}, (0.9, 0.999))
    first, second = labelled(2)
    state.run_step([first])
    before = tensors(state)
    monkeypatch.setattr(state, "_clip", lambda: torch.tensor(float("nan")))
    assert not state.run_step([second]).usable()
    after = tensors(state)
    for name_of, tensor in before.items():
        if not name_of.startswith("ema."):  # of the same weights it goes on
            assert torch.equal(tensor, after[name_of]), name_of


def test_muon_takes_matrices_and_no_tables_of_embeddings() -> None:
    unet = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[0], depth=1, norm={"num_groups": 4},
                attention={"num_heads": 1}, num_classes=2)  # fmt: skip
    matrices, others = split(unet)
    linear = {f"{name}.weight" for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    assert matrices.keys() == linear
    assert matrices.keys() | others.keys() == dict(unet.named_parameters()).keys()
    assert any("class" in name for name in others)


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_key_that_the_optimizer_does_not_read_is_refused(name: str, key: str) -> None:
    if name in READ_BY[key]:
        assert OptimizerConfig(**{"name": name, key: VALUES[key]}).given() == {key: VALUES[key]}
        return
    with pytest.raises(ValueError, match=rf"optimizer\.name is {name}, but optimizer\.{key} is {VALUES[key]}, which "):
        OptimizerConfig(**{"name": name, key: VALUES[key]})


def test_all_keys_that_are_not_read_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.momentum is 0\.9.*optimizer\.d_coef is 2"):
        OptimizerConfig(name="adamw", momentum=0.9, d_coef=2.0)


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"name": "sgd", "momentum": 1.0}, r"optimizer\.momentum is 1"),
     ({"name": "prodigy", "beta3": -0.1}, r"optimizer\.beta3 is -0\.1"),
     ({"name": "adamw", "eps": 0.0}, r"optimizer\.eps is 0"),
     ({"name": "prodigy", "d0": 0.0}, r"optimizer\.d0 is 0"),
     ({"name": "prodigy", "d_coef": -1.0}, r"optimizer\.d_coef is -1"),
     ({"name": "prodigy", "growth_rate": 0.9}, r"optimizer\.growth_rate is 0\.9"),
     ({"name": "sgd", "momentum": 0.0, "nesterov": True}, r"optimizer\.nesterov is true and optimizer\.momentum 0")],
)  # fmt: skip
def test_values_out_of_range_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**keys)


@pytest.mark.parametrize(
    ("train", "name", "words"),
    [({"betas": (0.8, 0.9)}, "sgd", r"train\.betas is \(0\.8, 0\.9\), but optimizer\.name sgd has none"),
     ({"channels_last": True}, "adamw_8bit", r"optimizer\.name is adamw_8bit and train\.channels_last true")],
)  # fmt: skip
def test_keys_of_train_that_are_not_for_the_optimizer_are_refused(train: dict, name: Any, words: str) -> None:
    model = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], norm={"num_groups": 4}).unet_config
    with pytest.raises(ValueError, match=words):
        RunConfig(model=model, data=DataConfig(), train=TrainConfig(**train), optimizer=OptimizerConfig(name=name))


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_not_installed_is_named_before_the_first_step(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, module, found = CLASSES[name]
    if module == "torch.optim":
        monkeypatch.delattr(importlib.import_module(module), found)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    model = UNet(in_channels=1, out_channels=1, channels=[8], attention_levels=[], norm={"num_groups": 4}).unet_config
    config = RunConfig(model=model, data=DataConfig(), optimizer=OptimizerConfig(name=name))
    with pytest.raises(ConfigError, match=rf"optimizer\.name is {name}, .*pip install '{package}'"):
        make_accelerator(config, tmp_path)


def test_a_number_that_an_optimizer_keeps_comes_back_as_one() -> None:
    """Prodigy computes with Python's numbers: of a tensor they would be rounded."""
    state = make({"name": "prodigy"}, (0.9, 0.999))
    state.run_step(labelled(1))
    group = state.optimizer.param_groups[0]
    saved = optimizer_to_tensors(state.optimizer, state.stepped())
    assert {key: saved[f"param_groups/{key}"].item() for key in ("d", "d_max", "d_numerator", "k")} == {
        key: group[key] for key in ("d", "d_max", "d_numerator", "k")
    }
