"""Lays the page out with Gradio: fields to draw with, and a run to watch."""

from __future__ import annotations

import contextlib
import html
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from unetgn.sampling.folder import SamplingError
from unetgn.sampling.page.artist import Artist, LeftError
from unetgn.sampling.page.asked import IN_TURN, LONGEST, MOST_IMAGES, MOST_STEPS, NO_CLASS, Choices, read_asked
from unetgn.sampling.page.watching import Watcher
from unetgn.training.errors import CheckpointError, ConfigError

MOST_WAITING = 16  # drawings
EVERY = 5  # seconds between two looks at a run
KEPT = 600  # seconds that a picture stays on the disk
QUICK = ("dpmsolver++", "edm_dpmsolver++")  # schedulers that twenty steps are enough for
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # the page's alone: there is no programming interface
REFUSALS = (SamplingError, CheckpointError, ConfigError, LeftError, ValueError, OSError, torch.OutOfMemoryError)


def lay_out(choices: Choices, artist: Artist, watcher: Watcher) -> gr.Blocks:
    """Make the page."""
    with gr.Blocks(title=choices.title, analytics_enabled=False, delete_cache=(KEPT, KEPT), fill_width=True) as page:
        gr.Markdown(f"# {html.escape(choices.title)}")
        with gr.Tab("Draw"):
            lay_out_drawing(choices, artist)
        with gr.Tab("Watch"):
            lay_out_watching(page, watcher)
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)


def lay_out_drawing(choices: Choices, artist: Artist) -> None:
    """Lay out the fields, and what is drawn: the strip as it happens, the images, the file."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            subjects = [("in turn, by seed", IN_TURN), *((name, str(i)) for i, name in enumerate(choices.classes))]
            subjects = subjects if choices.classes else []
            if choices.any_class or not choices.classes:
                subjects.append(("none in particular", NO_CLASS))
            subject = gr.Dropdown(subjects, value=subjects[0][1], label="Class", visible=bool(choices.classes))
            prompt = gr.Textbox(None, label="Prompt", max_length=LONGEST, visible=choices.reads_text)
            negative = gr.Textbox(
                None, label="Negative prompt", info="what guidance leads away from", max_length=LONGEST,
                visible=choices.reads_text,
            )  # fmt: skip
            seeds = gr.Textbox(
                "0-39",
                label="Seeds",
                info=f"one image each, as in 0-15 or 3,7; {MOST_IMAGES} at most",
                max_length=LONGEST,
            )
            steps = gr.Number(20, label="Steps", info=f"{MOST_STEPS} at most")
            scheduler = gr.Dropdown(
                list(choices.schedulers), value=prefer(QUICK, choices.schedulers), label="Scheduler"
            )
            guidance = gr.Number(1, label="Guidance", info="uncond + guidance · (cond - uncond); 1 is off", step=0.5)
            size = gr.Textbox(
                "", label="Size", info="of a side in pixels; empty: what it was trained on", max_length=LONGEST
            )
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", min_width=100)
                stop = gr.Button("Stop", min_width=100)
        with gr.Column(scale=3):
            words = gr.Textbox("", label="Progress", interactive=False, max_lines=1)
            strip = picture_of("From noise to image", "strip")
            grid = picture_of("Images", "grid")
            file = gr.DownloadButton("Download as PNG", interactive=False)

    def drawing(*fields: Any) -> Iterator[Any]:
        with refusals_shown(), tempfile.TemporaryDirectory() as folder:
            for look in artist.draw(read_asked(*fields)):
                download: Any = gr.skip()
                if look.settings is not None and look.grid is not None:
                    saved = Path(folder) / "samples.png"
                    look.grid.save(saved, pnginfo=look.settings)
                    download = gr.DownloadButton(value=saved, interactive=True)
                pictures = (gr.skip() if picture is None else picture for picture in (look.strip, look.grid))
                yield look.words, *pictures, download

    fields = [seeds, subject, prompt, negative, scheduler, steps, guidance, size]
    drawn = draw.click(
        drawing, fields, [words, strip, grid, file], show_progress="minimal", show_progress_on=words, **PRIVATE
    )
    stop.click(None, cancels=drawn, **PRIVATE)
    # Written where the drawing has ended, by Stop or by a refusal: what it said last would come after what Stop says.
    drawn.failure(lambda: "stopped", None, words, queue=False, **PRIVATE)


def lay_out_watching(page: gr.Blocks, watcher: Watcher) -> None:
    """Lay out how a run stands, its losses and samples, and look again every few seconds."""
    with gr.Row():
        facts = gr.HTML(elem_id="facts", label="Run")
        with gr.Column():
            loss = picture_of("Loss", "loss")
    samples, strip = picture_of("Newest samples", "samples"), picture_of("From noise to image", "denoise")

    def look() -> tuple[Any, ...]:
        sight = watcher.look()
        rows = (
            f"<tr><td>{html.escape(key)}</td><td>{html.escape(value)}</td></tr>" for key, value in sight.facts.items()
        )
        return f"<table>{''.join(rows)}</table>", sight.loss, sight.samples, sight.strip

    for event in (page.load, gr.Timer(EVERY).tick):
        event(look, None, [facts, loss, samples, strip], show_progress="hidden", queue=False, **PRIVATE)


def picture_of(label: str, name: str) -> gr.Image:
    """Make a place for a picture, of losses or images, that is shown as it is: as PNG, and no smaller ones smoothed."""
    gr.Markdown(f"**{label}**")  # not on the picture
    return gr.Image(
        alt_text=label, format="png", type="filepath", image_mode=None, interactive=False, elem_id=name,
        show_label=False, buttons=["download", "fullscreen"],
    )  # fmt: skip


def prefer(wanted: Sequence[str], names: Sequence[str]) -> str:
    """Return the first of `wanted` that is there, and else the first name."""
    return next((name for name in wanted if name in names), names[0])


@contextlib.contextmanager
def refusals_shown() -> Iterator[None]:
    """Say on the page what cannot be drawn, and why. What is a fault of ours goes to the terminal."""
    try:
        yield
    except REFUSALS as error:
        message = html.escape(str(error) or type(error).__name__, quote=False)
        raise gr.Error(message, duration=None, print_exception=False) from error
