"""The page as its visitors have it: one server, started as README says, and a real browser, in one story.

What the tests find in the browser's console, and whom page and server asked for anything, is looked at in the end.
"""

import importlib.util
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.sampling.page_run import make_run
from tests.training.launched import ROOT
from unetgn.pipelines.pictures import tile_pixels
from unetgn.sampling.strips import pixels_of
from unetgn.sampling.trained import load_trained, open_pipeline
from unetgn.training.checkpoint import find_checkpoint

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_thread")]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LACKING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
if LACKING or BROWSER is None:
    pytest.skip(
        f"{' and '.join(LACKING) or 'chromium'} cannot be found: the page is tested in a browser where gradio, "
        "playwright and chromium (apt-get install chromium) are installed",
        allow_module_level=True,
    )
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

HERE = ("127.0.0.1", "localhost", "::1")
# Writes down whom the server's process asks for anything: Python calls it at every start.
LISTENER = """
import os, sys
def listen(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        with open(os.environ["ASKED_FOR"], "a") as file:
            file.write(f"{host}\\n")
sys.addaudithook(listen)
"""
OTHERS = itertools.count(1000, 4)  # seeds that nothing was drawn of before
PATIENCE = 30_000  # milliseconds, on a machine that is busy


@dataclass
class Served:
    """Holds the page that is served, and what browsers and server were found to do."""

    run: Path
    process: subprocess.Popen[str]
    url: str
    asked_for: Path
    """File of the hosts that the server asked for."""
    browser: Browser
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    """That the pages asked for."""

    def visit(self) -> Page:
        """Open the page in a browser of its own."""
        page = self.browser.new_context(accept_downloads=True).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname or HERE[0]))
        page.goto(self.url)
        return page


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("app")
    run = make_run(folder)
    (folder / "sitecustomize.py").write_text(LISTENER)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "ASKED_FOR": str(folder / "asked_for"),
        "OMP_NUM_THREADS": "1",
        "http_proxy": "http://192.0.2.1:9",  # nobody's (RFC 5737)
        "TMPDIR": str(folder),
    }
    (folder / "asked_for").touch()
    command = [sys.executable, "-m", "sampling.app", "--checkpoint", str(run)]
    with (
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process,
        sync_playwright() as playwright,
    ):  # fmt: skip
        try:
            # Chromium's sandbox needs what containers do not have, and shared memory may be small there.
            options = ["--no-sandbox", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("The page: http://127.0.0.1:"), said + process.communicate()[1]
            yield Served(run, process, said.split()[2], folder / "asked_for", browser)
            browser.close()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def page(served: Served) -> Page:
    return served.visit()


def fill(page: Page, **fields: str) -> None:
    """Fill fields by their labels; those that offer a choice take what is offered by that name."""
    for name, value in fields.items():
        place = page.get_by_label(name).first
        if name in ("Class", "Scheduler"):
            place.click()
            page.get_by_role("option", name=value, exact=True).click()
        else:
            place.fill(value)
        place.blur()
        expect(place).to_have_value(value)


def draw(page: Page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()


def progress(page: Page) -> Any:
    return expect(page.get_by_label("Progress"))


def drawn(page: Page, **fields: str) -> np.ndarray:
    """Draw, wait for the end, and return the pixels of what is shown then."""
    before = source(page)
    fill(page, **fields)
    draw(page)
    page.wait_for_function("before => (document.querySelector('#grid img') || {}).src != before", arg=before)
    progress(page).to_have_value(re.compile(r"images of step 20 in"), timeout=PATIENCE)
    return pixels(page.request.get(source(page) or "").body())


def source(page: Page) -> str | None:
    """Return the address of the picture that is shown as the images."""
    return page.evaluate("(document.querySelector('#grid img') || {src: null}).src")


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("L")).astype(int)


def defined(run: Path, seeds: range, labels: list[int], scheduler: str, steps: int) -> np.ndarray:
    """Draw with the pipeline what the page is to show."""
    import torch

    pipeline = open_pipeline(load_trained(find_checkpoint(run), "ema"))
    pipeline.use_scheduler(scheduler)
    images = pipeline(seeds, class_labels=labels, num_inference_steps=steps).images
    return np.asarray(tile_pixels(torch.stack([pixels_of(image) for image in images]))).astype(int)


def test_what_is_drawn_changes_with_what_is_asked_for(served: Served, page: Page) -> None:
    one = drawn(page, Seeds="0-8", Steps="4", Scheduler="ddim", Class="7")
    assert abs(one - defined(served.run, range(9), [7] * 9, "ddim", 4)).max() <= 1
    other = drawn(page, Seeds="100-108")
    assert abs(other - defined(served.run, range(100, 109), [7] * 9, "ddim", 4)).max() <= 1
    assert abs(other - one).max() > 20


def test_the_strip_is_seen_as_it_happens(page: Page) -> None:
    page.evaluate(
        """() => { window.seen = new Set(); setInterval(() => {
            const strip = document.querySelector('#strip img'); if (strip) window.seen.add(strip.src); }, 20) }"""
    )
    drawn(page, Seeds="0-3", Steps="150", Scheduler="ddpm")
    assert page.evaluate("window.seen.size") > 3


def test_the_images_are_downloaded_as_png(page: Page) -> None:
    shown = drawn(page, Seeds="5-6", Steps="2", Scheduler="euler")
    with page.expect_download() as download:
        page.get_by_text("Download as PNG").click()
    assert download.value.suggested_filename == "samples.png"
    file = Path(download.value.path()).read_bytes()
    assert file.startswith(b"\x89PNG")
    assert np.array_equal(pixels(file), shown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Seeds": "0-99999999999"}, "is of more than 64 numbers"),
        ({"Seeds": "<b>x</b>"}, "'<b>x</b>' is not a list of numbers and ranges"),
        ({"Steps": "0"}, "steps is 0; whole numbers from 1 to 1000 are possible"),
        ({"Steps": ""}, "steps is missing"),
        ({"Steps": "600", "Scheduler": "ddim"}, "steps is 600; 'DDIMScheduler' takes a number that divides"),
        ({"Class": "none in particular", "Guidance": "2"}, "no class_labels and no prompt were given to be guided by"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_said_and_the_next_is_drawn(page: Page, fields: dict[str, str], message: str) -> None:
    fill(page, **{"Seeds": "0-3", "Steps": "2", "Guidance": "1"} | fields)
    draw(page)
    expect(page.get_by_text(message).first).to_be_visible(timeout=PATIENCE)
    progress(page).to_have_value("stopped", timeout=PATIENCE)
    page.get_by_test_id("toast-close").first.click()
    first = next(OTHERS)
    drawn(page, Seeds=f"{first}-{first + 3}", Steps="2", Guidance="1", Class="in turn, by seed")


def test_a_run_without_a_checkpoint_says_so_and_draws_when_there_is_one(served: Served, page: Page) -> None:
    folder = served.run / "checkpoints"
    folder.rename(aside := served.run / "aside")
    try:
        draw(page)
        expect(page.get_by_text("holds no checkpoint").first).to_be_visible(timeout=PATIENCE)
        page.get_by_test_id("toast-close").first.click()
    finally:
        aside.rename(folder)
    drawn(page, Seeds="20-23")


def test_others_are_served_while_one_has_much_drawn(served: Served, page: Page) -> None:
    fill(page, Seeds="0-63", Steps="1000", Scheduler="ddpm")
    draw(page)
    progress(page).to_have_value(re.compile(r"step \d+ of 1000"), timeout=PATIENCE)
    other = served.visit()
    fill(other, Seeds="0-3", Steps="2")
    draw(other)
    expect(other.get_by_text(re.compile(r"queue: \d/\d|processing")).first).to_be_visible(timeout=PATIENCE)
    page.get_by_role("button", name="Stop", exact=True).click()
    progress(page).to_have_value("stopped", timeout=PATIENCE)
    progress(other).to_have_value(re.compile(r"4 images of step 20"), timeout=PATIENCE)
    other.context.close()
    drawn(page, Seeds="30-33", Steps="2", Scheduler="ddim")


def test_a_run_is_watched_and_the_page_looks_again(served: Served, page: Page) -> None:
    page.get_by_role("tab", name="Watch").click()
    expect(page.locator("#facts")).to_contain_text("20 of 20")
    for name in ("loss", "samples", "denoise"):
        shown = "name => (document.querySelector(`#${name} img`) || {}).naturalWidth > 100"
        page.wait_for_function(shown, arg=name)
    before = page.locator("#loss img").get_attribute("src")
    log = served.run / "metrics.csv"
    *_, last = log.read_text().splitlines()
    with log.open("a") as rows:
        rows.write("25" + last[last.index(",") :] + "\n")
    expect(page.locator("#facts")).to_contain_text("25 of 20", timeout=PATIENCE)
    expect(page.locator("#loss img")).not_to_have_attribute("src", before or "", timeout=PATIENCE)


def test_the_console_has_no_error_and_nobody_else_was_asked_for_anything(served: Served, page: Page) -> None:
    assert served.errors == []
    assert served.hosts == {"127.0.0.1"}
    assert set(served.asked_for.read_text().split()) <= set(HERE)


def test_ctrl_c_ends_it_in_one_line_and_leaves_nothing(served: Served) -> None:
    """While something is drawn."""
    page = served.visit()
    fill(page, Seeds="0-63", Steps="1000")
    draw(page)
    progress(page).to_have_value(re.compile(r"step \d+ of"), timeout=PATIENCE)
    page.context.close()
    served.process.send_signal(signal.SIGINT)
    _, said = served.process.communicate(timeout=60)
    assert served.process.returncode == 130, said
    assert said.splitlines() == ["app.py: stopped; the page is closed"]
    assert list(served.asked_for.parent.glob("unetgn-page-*")) == []
