"""EDM's objective against the formulas of its paper (Karras et al. 2022, table 1 and equation 8) in float64."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from tests.training.launched import SIX_STEPS
from tests.training.loops import Runs, spare_time
from tests.training.runs import assert_equal_bits, rows
from tests.training.test_objective import Oracle, make_batch
from unetgn.pipelines import UNetPipeline
from unetgn.pipelines.levels import levels_of
from unetgn.pipelines.schedulers import set_to_steps
from unetgn.sampling.evaluate import main as evaluate
from unetgn.sampling.sample import main as sample
from unetgn.sampling.trained import load_trained
from unetgn.training.checkpoint import find_checkpoint
from unetgn.training.config import RunConfig
from unetgn.training.edm import EDMConfig, draw_sigma, make_edm_scheduler, precondition
from unetgn.training.objective import Objective, ObjectiveConfig
from unetgn.training.train import main as train

CONFIGS = [EDMConfig(), EDMConfig(sigma_data=1.3, p_mean=0.4, p_std=2.0, sigma_max=200.0)]


class Noted(nn.Module):
    """Predicts what a function makes of what it sees and of its timestep."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: None = None, class_labels: None = None
    ) -> SimpleNamespace:
        return SimpleNamespace(sample=self.function(noisy.double(), timesteps.double().view(-1, 1, 1, 1)).float())


@pytest.mark.parametrize("config", CONFIGS)
def test_the_loss_is_that_of_the_preconditioned_denoiser(config: EDMConfig) -> None:
    objective, batch = Objective(ObjectiveConfig(edm=config), None), make_batch()
    prediction = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    oracle = Oracle(prediction)
    prepared = objective.prepare(batch)
    losses = objective.losses(oracle, prepared)
    sigma, data = prepared["sigma"].double().view(-1, 1, 1, 1), config.sigma_data
    image, x = batch["image"].double(), batch["image"].double() + sigma * batch["noise"].double()
    total = sigma**2 + data**2
    skip, out, into = data**2 / total, sigma * data / total.sqrt(), 1 / total.sqrt()
    weight = total / (sigma * data) ** 2
    denoised = skip * x + out * prediction.double()
    torch.testing.assert_close(oracle.noisy.double(), into * x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(oracle.timesteps.double(), sigma.flatten().log() / 4, rtol=1e-5, atol=1e-6)
    expected = (weight * (denoised - image) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_noise_levels_are_lognormal_and_a_function_of_the_number_drawn(config: EDMConfig) -> None:
    time = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    log = draw_sigma(time, config).double().log()
    assert log.mean() == pytest.approx(config.p_mean, abs=1e-3)
    assert log.std() == pytest.approx(config.p_std, rel=1e-3)
    share = (log < config.p_mean + config.p_std).double().mean()
    assert share == pytest.approx(0.841345, abs=1e-4)
    ends = draw_sigma(torch.tensor([0.0, 2**-53, 1 - 2**-53], dtype=torch.float64), config)
    assert ends.isfinite().all()
    assert ends[0] > 0
    assert ends[0] < ends[1] < ends[2]
    assert torch.equal(draw_sigma(time[7:8], config), draw_sigma(time, config)[7:8])


@pytest.mark.parametrize("config", CONFIGS)
def test_the_scheduler_of_sampling_has_the_factors_of_training(config: EDMConfig) -> None:
    """What the network is asked for is what sampling finds the image of, at every level."""
    scheduler = set_to_steps(make_edm_scheduler(config, clip_sample=True), 7)
    levels, batch = levels_of(scheduler), make_batch(1)
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index]
        seen, time, target = precondition(batch["image"], batch["noise"], sigma[None], config)
        kept = batch["image"] + sigma * batch["noise"]
        torch.testing.assert_close(time[0], timestep, rtol=1e-4, atol=1e-5)
        noisy = scheduler.scale_model_input(kept, timestep)
        torch.testing.assert_close(noisy, seen)
        share = levels.at(index, timestep)
        image = levels.image_of(target, kept, noisy, share)
        torch.testing.assert_close(image, batch["image"], rtol=0, atol=2e-3)  # of x as large as sigma_max, in float32
        scheduler.step(target, timestep, kept)


def test_the_denoiser_of_a_gaussian_has_the_least_loss_there_is() -> None:
    """Of images N(m, s²) the best D is (s²·x + sigma²·m) / (s² + sigma²); its error is the posterior's variance."""
    config, mean, spread = EDMConfig(sigma_data=0.5), 0.3, 0.8
    generator, count = torch.Generator().manual_seed(0), 4000
    objective = Objective(ObjectiveConfig(edm=config), None)
    batch = {
        "image": mean + spread * torch.randn(count, 1, 4, 4, generator=generator),
        "noise": torch.randn(count, 1, 4, 4, generator=generator),
        "label": torch.zeros(count, dtype=torch.long),
        "time": torch.rand(count, generator=generator, dtype=torch.float64),
        "drop": torch.rand(count, generator=generator, dtype=torch.float64),
    }
    prepared = objective.prepare(batch)

    def best(seen: Tensor, noise: Tensor) -> Tensor:
        sigma, data = (4 * noise).exp(), config.sigma_data
        total = sigma**2 + data**2
        x = seen * total.sqrt()
        image = (spread**2 * x + sigma**2 * mean) / (spread**2 + sigma**2)
        return (image - data**2 / total * x) / (sigma * data / total.sqrt())

    sigma = prepared["sigma"].double()
    weight = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
    least = (weight * sigma**2 * spread**2 / (sigma**2 + spread**2)).mean()
    found = objective.losses(Noted(best), prepared).double().mean()
    assert found == pytest.approx(least.item(), rel=0.02)
    for wrong in (lambda seen, noise: 1.05 * best(seen, noise), lambda seen, noise: best(seen, noise + 0.02)):
        assert objective.losses(Noted(wrong), prepared).mean() > found


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({name: value}, rf"objective\.{name} is {value}, but objective\.edm is set")
        for name, value in {
            "prediction_type": "v_prediction", "schedule": "squared_cosine", "beta_start": 0.001, "beta_end": 0.1,
            "weighting": "min_snr", "min_snr_gamma": 3.0, "num_train_timesteps": 500,
        }.items()
    ],
)  # fmt: skip
def test_what_has_no_meaning_beside_it_is_refused(keys: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ObjectiveConfig(edm=EDMConfig(), **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sigma_data": 0.0}, r"objective\.edm\.sigma_data is 0\.0"),
        ({"p_std": -1.0}, r"objective\.edm\.p_std is -1\.0"),
        ({"sigma_min": float("nan")}, r"objective\.edm\.sigma_min is nan"),
        ({"sigma_min": 90.0}, r"sigma_min is 90\.0 and objective\.edm\.sigma_max 80\.0"),
        ({"sigma_max": 4.0}, r"sampling begins in pure noise: give 5 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(keys: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EDMConfig(**keys)


def test_a_scheduler_of_previews_that_does_not_fit_is_refused() -> None:
    from unetgn.training.preview import PreviewConfig

    edm = ObjectiveConfig(edm=EDMConfig())
    with pytest.raises(ValueError, match="'ddim' does not fit a network with EDM's preconditioning"):
        RunConfig(objective=edm, preview=PreviewConfig(scheduler="ddim"))
    with pytest.raises(ValueError, match="schedulers of EDM's take 2 or more"):
        RunConfig(objective=edm, preview=PreviewConfig(steps=1))
    with pytest.raises(ValueError, match="it is for networks with EDM's preconditioning"):
        RunConfig(preview=PreviewConfig(scheduler="edm_euler"))
    assert RunConfig(objective=edm, preview=PreviewConfig(scheduler="edm_euler")).preview.scheduler == "edm_euler"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    spare_time(monkeypatch.setattr)
    return Runs(tmp_path)


EDM = ("objective.edm.sigma_data=0.75", "preview.steps=2")


def test_a_resumed_run_is_the_unbroken_one(runs: Runs) -> None:
    whole = runs.run("whole", *EDM, "checkpoint.every=3")
    again = runs.run("again", *EDM, "checkpoint.every=3", resume=str(whole / "checkpoints" / "step-000003"))
    assert_equal_bits(whole, again, 6)
    trained = load_trained(find_checkpoint(whole), "ema")
    assert type(trained.scheduler).__name__ == "EDMDPMSolverMultistepScheduler"
    assert trained.scheduler.config.sigma_data == 0.75


def test_a_short_training_lowers_the_loss(runs: Runs) -> None:
    keys = ("train.steps=30", "train.batch_size=16", "train.learning_rate=1e-2", "train.validate_every=10",
            "checkpoint.every=30", "preview.every=0", "train.log_every=30", "model.dropout=0")  # fmt: skip
    losses = [float(row["loss"]) for row in rows(runs.run("run", *EDM, *keys), "validation.csv")]
    assert losses[-1] < 0.8 * losses[0]


def test_the_scripts_sample_and_judge_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(SIX_STEPS.replace("objective: {", "objective: {edm: {}, "))
    run, shown = tmp_path / "run", tmp_path / "shown"
    assert train(["--config", str(tmp_path / "tiny.yaml"), "--output", str(run)]) == 0
    assert (run / "samples" / "step-000006.png").is_file()
    pipeline = UNetPipeline.from_pretrained(run / "pipeline")
    assert pipeline.scheduler.config.sigma_data == 0.5
    AcceleratorState._reset_state(reset_partial_state=True)
    line = ["--checkpoint", str(run), "--seeds", "0-3"]
    assert sample([*line, "--out", str(shown), "--steps", "3", "--guidance-scale", "2", "--strip"]) == 0
    request = json.loads((shown / "request.json").read_text())
    assert (request["scheduler"], request["steps"]) == ("edm_dpmsolver++", 3)
    again = ["--image", str(shown / "000000.png"), "--steps", "3", "--scheduler", "EDMEulerScheduler"]
    assert sample([*line, "--out", str(tmp_path / "again"), *again]) == 0
    for wrong, words in (
        (["--scheduler", "ddim"], "does not fit a network with EDM's"),
        (["--steps", "1"], "2 or more"),
    ):
        assert sample([*line, "--out", str(tmp_path / "wrong"), *wrong]) == 2
        assert words in capsys.readouterr().err
    judged = ["--checkpoint", str(run), "--seeds", "0-9", "--steps", "2", "--scheduler", "edm_euler"]
    assert evaluate([*judged, "--cache", str(tmp_path / "cache")]) == 0
