"""Plot the validation error against batch size, for four normalizations: `python -m benchmarks.normalization`.

A small ResNet of our blocks learns the 1,797 handwritten digits of scikit-learn (8x8 pixels, half for training, half
for validation), with batch, group, instance and layer normalization, with and without weight standardization, three
seeds each. Every run sees the same number of images; the learning rate is proportional to the batch size, as in
Wu & He 2018 (arXiv 1803.08494), whose figure 1 this repeats in small. Weight standardization: Qiao et al. 2019
(arXiv 1903.10520). With one image a batch, batch normalization takes its statistics over that image's pixels.

Outcome (results/normalization.json, means of three seeds, 901 validation images, so 0.1 % is one image): from 32 to 2
images a batch, batch normalization with plain weights is as good as the others or better (1.3 to 2.0 % of errors;
group 1.7 to 2.4; only instance normalization beats it, at 32, with 1.8), and at one image it breaks down (5.1 %; group
1.9, instance 1.7, layer 2.1). With standardized weights it gets worse below 8 images (1.4, 1.6, 1.7, 2.6 %), while the
other three stay between 1.4 and 2.0 % or improve. So the rise of batch normalization at small batches is there, but
only at the very end: 8x8 to 4x4 pixels give even two images 32 to 128 values a channel. Standardization helps layer
and batch normalization most.

Writes JSON and a plot under benchmarks/results; `--plot-only` draws the plot of an existing JSON again.
"""

from unetgn.programs import last_words  # noqa: F401  # the first of all: Ctrl-C and missing packages in one line

# isort: split
import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import head
from benchmarks.result_file import result_file
from unetgn.nn.conv_norm_act import ConvNormAct, NormKind
from unetgn.programs.paths import user_path
from unetgn.training.files import write_json

KINDS: tuple[NormKind, ...] = get_args(NormKind)
BATCH_SIZES = (32, 16, 8, 4, 2, 1)
SEEDS = (0, 1, 2)
SEEN_IMAGES = 6 * 896  # six times the training half, whole batches of every size
LEARNING_RATE = 0.1  # at 32 images a batch
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
NUM_GROUPS = 8
TICKS = (1, 1.5, 2, 3, 4, 6, 10)  # of the plot, %


def shared_options(norm: NormKind, standardize: bool) -> dict[str, Any]:
    """Return the options that all layers of one network share; only group normalization has a number of groups."""
    return {"norm": norm, "num_groups": NUM_GROUPS if norm == "group" else None, "standardize_weight": standardize}


class Residual(nn.Module):
    """Computes silu(x + norm(conv(act(norm(conv(x)))))), with a 1x1 convolution as shortcut where shapes change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormKind, standardize: bool) -> None:
        super().__init__()
        shared = shared_options(norm, standardize)
        self.first = ConvNormAct(in_channels, out_channels, stride=stride, **shared)
        self.second = ConvNormAct(out_channels, out_channels, activation=None, **shared)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNormAct(in_channels, out_channels, 1, stride=stride, activation=None, **shared)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.shortcut(x) + self.second(self.first(x)))


def resnet(norm: NormKind, standardize: bool) -> nn.Module:
    """Build a network (N, 1, 8, 8) -> (N, 10): 16 channels, 32 at 4x4 pixels, the mean over pixels, a linear layer."""
    shared = shared_options(norm, standardize)
    return nn.Sequential(
        ConvNormAct(1, 16, **shared),
        Residual(16, 16, 1, norm, standardize),
        Residual(16, 32, 2, norm, standardize),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 896 images and labels to train on, and 901 to validate with: a fixed shuffle, values in [-1, 1]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:896], order[896:]
    return images[train], labels[train], images[held_out], labels[held_out]


def train(norm: NormKind, standardize: bool, batch_size: int, seed: int, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """Train once, and return the validation error, training loss of the last epoch, and seconds."""
    images, labels, held_out, held_out_labels = data
    torch.manual_seed(seed)
    network = resnet(norm, standardize)
    rate = LEARNING_RATE * batch_size / 32
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, SEEN_IMAGES // batch_size)
    order, start = torch.Generator().manual_seed(seed), time.perf_counter()
    losses: list[float] = []
    for _ in range(SEEN_IMAGES // len(images)):
        losses.clear()
        for batch in torch.randperm(len(images), generator=order).split(batch_size):
            loss = F.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    network.eval()
    with torch.no_grad():
        error = (network(held_out).argmax(1) != held_out_labels).float().mean().item()
    return {
        "norm": norm,
        "weight_standardization": standardize,
        "batch_size": batch_size,
        "seed": seed,
        "validation_error": error,
        "last_epoch_loss": statistics.fmean(losses),
        "seconds": round(time.perf_counter() - start, 1),
    }


def mean_errors(rows: list[dict[str, Any]], norm: str, standardize: bool) -> dict[int, float]:
    """Average the validation error by batch size, over seeds, for the sizes that were run."""
    chosen = [row for row in rows if row["norm"] == norm and row["weight_standardization"] == standardize]
    sizes = sorted({row["batch_size"] for row in chosen}, reverse=True)
    return {
        size: statistics.fmean(row["validation_error"] for row in chosen if row["batch_size"] == size) for size in sizes
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot validation error against batch size: one line for each normalization, one panel for each kind of weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for standardize, panel in zip((False, True), panels, strict=True):
        for norm in KINDS:
            errors = mean_errors(rows, norm, standardize)
            places = [BATCH_SIZES.index(size) for size in errors]
            panel.plot(places, [100 * error for error in errors.values()], marker="o", label=norm)
            runs = [row for row in rows if row["norm"] == norm and row["weight_standardization"] == standardize]
            spots = [BATCH_SIZES.index(row["batch_size"]) for row in runs]
            panel.scatter(spots, [100 * row["validation_error"] for row in runs], s=6, alpha=0.5)
        panel.set_xticks(range(len(BATCH_SIZES)), [str(size) for size in BATCH_SIZES])
        panel.set_title("standardized weights" if standardize else "plain weights")
        panel.set_xlabel("images a batch")
        panel.set_yscale("log")
        panel.set_yticks(TICKS, [str(tick) for tick in TICKS])
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation error, %")
    panels[1].legend(title="normalization", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)


def main(given: list[str] | None = None) -> None:
    """Train all networks, write JSON after each, draw the plot, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, help="JSON file, with the plot beside it as PNG; by default under "
                        "benchmarks/results")  # fmt: skip
    parser.add_argument("--plot-only", action="store_true", help="draw the plot of an existing JSON again")
    arguments = parser.parse_args(given)
    out = result_file(parser, arguments.out, "normalization.json")
    plot = result_file(parser, out.with_suffix(".png"), "")
    if plot == out or (arguments.plot_only and not out.is_file()):
        parser.error(f"argument --out: {out} is {'that of the plot' if plot == out else 'not there'}: give a JSON file")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if arguments.plot_only:
        rows = json.loads(out.read_text())["rows"]
    else:
        data, origin = digits(), head("normalization")
        runs = [(s, w, b, n) for s in SEEDS for w in (False, True) for b in BATCH_SIZES for n in KINDS]
        for seed, standardize, batch_size, norm in runs:
            rows.append(train(norm, standardize, batch_size, seed, data))
            print(rows[-1], flush=True)
            write_json(out, {**origin, "rows": rows})
    draw(rows, plot)
    for standardize in (False, True):
        for norm in KINDS:
            errors = {size: f"{100 * error:.2f}" for size, error in mean_errors(rows, norm, standardize).items()}
            print(f"{norm:9} standardized={standardize!s:5} validation error in % by batch size: {errors}")


if __name__ == "__main__":
    main()
