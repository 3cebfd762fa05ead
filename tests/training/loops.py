"""Makes runs in this process without what has nothing to do with their loop, in a fraction of a second each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from unetgn.training import loop as loop_module
from unetgn.training import train
from unetgn.training.config import RunConfig
from unetgn.training.config_files import load_config
from unetgn.training.data.images import Digits
from unetgn.training.data.samples import IndexedSamples
from unetgn.training.evaluation import Evaluator
from unetgn.training.loop import Loop
from unetgn.training.objective import Objective
from unetgn.training.preview import Conditions
from unetgn.training.run_directory import RunDirectory
from unetgn.training.signals import StopSignals
from unetgn.training.step import TrainState

CPU = torch.device("cpu")
SIX_STEPS = """
model: {sample_size: 8, in_channels: 1, out_channels: 1, channels: [8], depth: 1, attention_levels: [],
        dropout: 0.1, norm: {num_groups: 4}}
data: {held_out: 0.01}
train: {steps: 6, batch_size: 4, learning_rate: 1e-3, log_every: 2, validate_every: 3, trackers: []}
ema: {decay: 0.9}
checkpoint: {every: 6, keep: 9}
preview: {every: 3, count: 1, steps: 1}
"""


class Runs:
    """Makes runs of six steps in this process, of one configuration, in a fraction of a second each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loop = folder, None
        (folder / "tiny.yaml").write_text(SIX_STEPS)
        self.images = Digits()

    def run(self, name: str, *keys: str, resume: str = "") -> Path:
        """Train to the end, or go on; the errors of train.train come out."""
        config = load_config(self.folder / "tiny.yaml", list(keys))
        output = RunDirectory(self.folder / name)
        output.lock()
        self.loop = self.make_loop(config, output)
        if resume:
            found = train.find_start(output, resume)
            assert found is not None
            self.loop.restore(found)
        train.write_beginning(self.loop, None)
        train.train(self.loop)
        return output.path

    def make_loop(self, config: RunConfig, output: RunDirectory) -> Loop:
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        network = train.make_network(config, None, None)
        state = TrainState(
            network, Objective(config.objective, None), config.train, config.ema, accelerator, 0, config.optimizer
        )
        samples, held_out = (IndexedSamples(self.images, np.arange(*part), 0) for part in ((0, 99), (100, 104)))
        conditions, evaluator = Conditions((1, 8, 8)), None
        if config.evaluate.every:
            evaluator = Evaluator(config.evaluate, config.preview, held_out, conditions, data="digits", device=CPU)
        return Loop(config, state, samples, held_out, conditions, output, StopSignals(1), evaluator)


def spare_time(patch: Callable[..., object]) -> None:
    """Leave out what has nothing to do with the loop and takes most of its time."""
    patch(loop_module, "flops_per_image", lambda *_: 1)
    patch(train, "save_pipeline", lambda *_, **__: None)
