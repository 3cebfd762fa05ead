"""A finished pipeline goes to the hub (a stand-in of its HTTP interface), and is lost by nothing that fails there."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from PIL import Image

from tests.training.hub import TOKEN, Hub, serving
from unetgn.programs.command import main
from unetgn.training import push
from unetgn.training.card import data_of, finish_card
from unetgn.training.data.config import DataConfig

SMALL = [
    *("model.channels=[32]", "model.depth=1", "model.attention_levels=[]", "train.trackers=[]", "data.num_workers=0"),
    *("train.steps=2", "train.batch_size=2", "train.warmup_steps=0", "preview.count=10", "preview.steps=2"),
    "preview.every=2",
]


@contextmanager
def standing_in(folder: Path) -> Iterator[Hub]:
    """Send huggingface_hub to the stand-in, as HF_ENDPOINT would, with its token."""
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with standing_in(tmp_path) as hub:
        yield hub


@dataclass(frozen=True)
class Sent:
    run: Path
    files: dict[str, bytes]
    """What the hub had when the training was done."""
    private: bool
    said: str
    fetched: Path


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """A run of two steps that was sent when it was done, fetched, and then evaluated at two steps."""
    run, cache, said = tmp_path_factory.mktemp("runs") / "digits", tmp_path_factory.mktemp("cache"), io.StringIO()
    options = ["train.trackers=[tensorboard]", "--push-to-hub", "me/digits", "--private", "--license", "cc-by-4.0"]
    with standing_in(cache) as hub, redirect_stdout(said):
        assert main(["train", "--config", "digits8_ddpm", "--output", str(run), *SMALL, *options]) == 0
        fetched = Path(huggingface_hub.snapshot_download("me/digits", cache_dir=cache))
    sent = Sent(run, hub.repositories["me/digits"].copy(), hub.private["me/digits"], said.getvalue(), fetched)
    assert sent.files == as_sent(run / "pipeline")
    for step, kind, fid in ((2, "ddim-50-steps", 3.25), (1, "ddim-50-steps", 9.75), (2, "raw-ddim", 8.5)):
        folder = run / "evaluation" / f"step-{step:06d}" / kind
        folder.mkdir(parents=True)
        figures = {"step": step, "samples": 1000, "fid": fid, "fid_of_real": 1.5,
                   "extractor": {"name": "/home/me/mine.pt", "sha256": "0", "features": 64},
                   "reference": {"source": "digits", "part": "held_out", "images": 90, "sha256": "0"}}  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(figures))
    (run / "evaluation.csv").write_text("step,fid,kid,precision,recall\n1,7.125,1,1,1\n2,4.125,0.5,0.25,0.125\n")
    return sent


@pytest.fixture
def run(sent: Sent, tmp_path: Path) -> Path:
    shutil.copytree(sent.run, tmp_path / "digits")
    return tmp_path / "digits"


def card_of(text: str) -> tuple[dict, str]:
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_sent(pipeline: Path) -> dict[str, bytes]:
    """What a pipeline is on the hub: its files, the lines of whose card load the repository, not the folder."""
    files = files_of(pipeline)
    card = files["README.md"].decode()
    assert (card.count('"."'), card.count("FOLDER")) == (3, 0)
    said = "These lines are for a Python that was started in this folder; from elsewhere write its path for `.`. "
    files["README.md"] = card.replace('"."', '"me/digits"').replace(said, "").encode()
    return files


def test_a_run_sends_its_pipeline_when_it_is_done_and_a_friend_draws_with_what_is_fetched(sent: Sent) -> None:
    assert sent.private
    assert re.search(r"^sent to http://\S+/me/digits$", sent.said, re.MULTILINE)
    assert files_of(sent.fetched) == sent.files
    folder = str(sent.fetched)
    friend = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    assert friend(seeds=[0, 1], class_labels=3, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


def test_a_run_says_how_to_see_its_curves_and_what_is_there(sent: Sent) -> None:
    lines = sent.said.splitlines()
    assert f"its curves: tensorboard --logdir {sent.run}" in lines
    assert f"done: {sent.run / 'samples'}, {sent.run / 'checkpoints'}, {sent.run / 'pipeline'}" in lines


def test_what_has_failed_to_be_sent_is_a_warning_with_the_line_that_sends_it(
    hub: Hub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.refused = {"/api/models/me/digits/commit": 500}
    push.push_after(run, "me/digits", private=True, licence="mit")
    (warned,) = [record.getMessage() for record in caplog.records if record.name == "unetgn.training"]
    assert "status 500; said 500" in warned
    hub.refused = {}
    words = shlex.split(warned.partition("send it with: ")[2])
    assert words[0] == "unetgn"
    assert main(words[1:]) == 0
    assert (hub.repositories["me/digits"], hub.private["me/digits"]) == (as_sent(run / "pipeline"), True)
    assert card_of(hub.repositories["me/digits"]["README.md"].decode())[0]["license"] == "mit"


def test_the_card_has_the_licence_figures_and_pictures_and_is_written_again_as_it_was(hub: Hub, run: Path) -> None:
    assert card_of((run / "pipeline" / "README.md").read_text())[0]["license"] == "cc-by-4.0"
    assert main(["push", str(run), "digits"]) == 0
    sent = hub.repositories["me/digits"]
    fields, body = card_of(sent["README.md"].decode())
    assert (fields["library_name"], fields["license"]) == ("diffusers", "cc-by-4.0")
    (result,) = fields["model-index"][0]["results"]
    way = "features of mine.pt, 1000 samples against 90 real images (held_out)"
    assert result["metrics"] == [{"type": "fid", "name": f"fid ({way})", "value": 3.25}]
    assert f"fid, kid, precision and recall by ddim-50-steps: {way}; evaluate" in body
    assert "evaluate.*, while it trained: features of digits, 256 samples against real images (held_out)." in body
    assert "/home/me" not in body
    assert "| ddim-50-steps | 1000 | 3.25 (1.5) |  |  |  |" in body
    assert "| evaluate.*, while it trained |  | 4.125 | 0.5 | 0.25 | 0.125 |" in body
    assert not re.search(r"9\.75|7\.125", body)  # of an earlier step
    assert "8.5" not in body  # of weights that are not those in the pipeline
    assert "scikit-learn (digits), 1,797 images of 8×8 pixels" in body
    assert sent["samples.png"] == (run / "samples" / "step-000002.png").read_bytes()
    assert re.findall(r"!\[.*\]\((.*)\)", body) == ["samples.png"]
    assert str(run.parent) not in body
    assert main(["push", str(run / "pipeline"), "digits", "--license", "mit"]) == 0
    again, same = card_of(hub.repositories["me/digits"]["README.md"].decode())
    assert (again, same) == (fields | {"license": "mit"}, body)


def test_a_card_that_somebody_wrote_is_sent_as_it_is(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "pipeline" / "README.md").write_text("# Mine\n")
    assert main(["push", str(run), "me/digits"]) == 0
    assert hub.repositories["me/digits"]["README.md"] == b"# Mine\n"
    assert main(["push", str(run), "me/digits", "--license", "mit"]) == 1
    assert "write the line `license: mit` into it yourself" in capsys.readouterr().err


def test_what_somebody_wrote_into_a_card_stays_when_it_is_written_again(hub: Hub, run: Path) -> None:
    card = run / "pipeline" / "README.md"
    card.write_text(card.read_text().replace("license:", "language: en\nlicense:", 1) + "\n## Mine\n\nThank you.\n")
    assert main(["push", str(run), "me/digits"]) == 0
    fields, body = card_of(hub.repositories["me/digits"]["README.md"].decode())
    assert fields["language"] == "en"
    assert body.endswith("\n## Mine\n\nThank you.\n")
    assert "| ddim-50-steps | 1000 | 3.25 (1.5) |" in body


@pytest.mark.parametrize("own", [True, False])
def test_a_run_that_goes_on_keeps_what_somebody_wrote_into_its_card(own: bool, run: Path) -> None:
    card = run / "pipeline" / "README.md"
    text = card.read_text()
    assert card_of(text)[0]["license"] == "cc-by-4.0"
    card.write_text("# Mine\n" if own else f"{text}## Mine\n")
    keys = [key for key in SMALL if not key.startswith("train.steps")]
    line = ["train", "--config", "digits8_ddpm", "--output", str(run), *keys, "train.steps=3", "--resume", "auto"]
    with redirect_stdout(io.StringIO()):
        assert main(line) == 0
    if own:
        assert card.read_text() == "# Mine\n"
        return
    fields, body = card_of(card.read_text())
    assert fields["license"] == "cc-by-4.0"
    assert "3 steps of 2 images" in body
    assert body.endswith("## Mine\n")


def test_a_pipeline_of_a_run_that_went_on_and_stopped_is_sent_with_the_card_that_it_has(
    hub: Hub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The keys and figures that the run has now are of other weights."""
    card = run / "pipeline" / "README.md"
    before = card.read_text()
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  steps: 2\n  processes", "  steps: 9\n  processes"))
    assert (run / "config.yaml").read_text() != config
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps(status | {"state": "preempted", "step": 2}))
    assert main(["push", str(run), "me/digits"]) == 0
    assert card_of(card.read_text()) == card_of(before)
    assert hub.repositories["me/digits"]["README.md"] == as_sent(run / "pipeline")["README.md"]
    assert f"{run} is not at its end" in caplog.text


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"name": "folder", "path": "home/me/secret/photos"}, "photos"),
        ({"name": "folder", "path": "../secret/photos.zip"}, "photos.zip"),
        ({"name": "folder", "path": "."}, "a folder"),
        ({"name": "stream", "path": "secret/shards/train-*.tar"}, "train-*.tar"),
        ({"name": "stream", "path": "ylecun/mnist"}, "ylecun/mnist"),
        ({"name": "datasets", "path": "secret/mnist"}, "mnist"),
    ],
)
def test_a_card_does_not_say_where_data_lay(keys: dict[str, str], named: str, tmp_path: Path) -> None:
    """A run may be sent from another folder than it was started in, where a relative path leads nowhere."""
    assert data_of(tmp_path, DataConfig(image_size=64, **keys)).startswith(f"{named} ({keys['name']})")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that is ours: huggingface_hub draws bars, and warns before it tries again."""
    (line,) = re.findall(r"(?:unetgn push|train\.py): .*", capsys.readouterr().err)
    return line


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ({"/api/repos/create": 403}, "status 403; said 403; the token may not write there"),
        ({"/api/repos/create": 401}, "status 401; said 401; the token is not valid there"),
        ({"/api/models/me/digits/preupload": 404}, "status 404"),
        ({"/lfs/": 400}, "status 400"),
        ({"/api/models/me/digits/commit": 500}, "status 500; said 500"),
    ],
    ids=str,
)
def test_what_the_hub_refuses_is_said_in_one_line(
    refused: dict[str, int], says: str, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish_card(run / "pipeline", run=run)
    hub.refused, before = refused, files_of(run)
    assert main(["push", str(run), "me/digits"]) == 1
    assert says in said(capsys)
    assert files_of(run) == before


def test_a_repository_that_is_public_is_not_taken_for_a_private_one(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/digits"], hub.private["me/digits"] = {}, False
    assert main(["push", str(run), "me/digits", "--private"]) == 1
    assert "is there already and is public" in said(capsys)
    assert hub.repositories["me/digits"] == {}


def test_no_network_is_said_in_one_line(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(run), "me/digits"]) == 1
    assert "me/digits at http://127.0.0.1:9: it could not be sent (ConnectError" in said(capsys)


@pytest.mark.parametrize("starts", ["push", "train"])
@pytest.mark.parametrize(
    ("repo", "token", "offline", "says"),
    [
        ("me/digits", "", False, "there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN"),
        ("me/digits", TOKEN, True, "HF_HUB_OFFLINE"),
        ("me/my/digits", TOKEN, False, "'me/my/digits' is no name of a repository"),
        ("my digits", TOKEN, False, "'my digits' is no name of a repository"),
    ],
)
def test_what_could_never_be_sent_is_refused_before_anything_is_done(
    starts: str, repo: str, token: str, offline: bool, says: str, hub: Hub, sent: Sent, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    out = tmp_path / "run"
    line = ["push", str(sent.run), repo]
    if starts == "train":
        line = ["train", "--config", "digits8_ddpm", "--output", str(out), "--push-to-hub", repo, *SMALL]
    assert main(line) == 2
    assert says in said(capsys)
    assert not out.exists()
    assert hub.asked == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--private"], "--private is for --push-to-hub NAME/REPO"),
        (["--license", "Apache 2"], "'Apache 2' is no identifier of a licence, such as apache-2.0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "digits8_ddpm", *options])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_folder_without_a_pipeline_is_said(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "me/digits"]) == 2
    assert "holds no pipeline" in said(capsys)


@pytest.mark.thorough
def test_a_friend_with_diffusers_alone_draws_by_the_name_on_the_hub(sent: Sent, tmp_path: Path) -> None:
    """In a process without unetgn, as the card says, but for the endpoint."""
    _, body = card_of(sent.files["README.md"].decode())
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    code = f"import sys; sys.modules['unetgn'] = None\n{code}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with serving() as hub:
        hub.repositories["me/digits"], hub.private["me/digits"] = sent.files, True
        environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "cache")}
        line = [
            sys.executable,
            "-c",
            code.replace("range(8)", "[6]").replace("guidance_scale=2", "num_inference_steps=3"),
        ]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "image.png").size == (8, 8)


def test_a_run_that_goes_on_has_figures_of_other_weights_than_the_pipeline(hub: Hub, run: Path) -> None:
    """It is killed at step 3 of 4: what is sent is of step 2, and the card says so."""
    assert main(["push", str(run), "digits"]) == 0
    before = hub.repositories["me/digits"]["README.md"]
    (run / "checkpoints" / "step-000003").mkdir()
    (run / "evaluation.csv").write_text("step,fid,kid,precision,recall\n3,1.375,0.5,0.25,0.125\n")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("steps: 2\n", "steps: 4\n", 1))
    (run / "status.json").write_text('{"state": "running", "step": 3}')
    assert main(["push", str(run), "digits"]) == 0
    assert hub.repositories["me/digits"]["README.md"] == before


def test_what_a_killed_process_left_half_written_is_not_sent(hub: Hub, run: Path) -> None:
    for place in (run / "pipeline", run / "pipeline" / "unet"):
        (place / ".tmp-7-README.md").write_text("half")
    assert main(["push", str(run), "digits"]) == 0
    assert not [name for name in hub.repositories["me/digits"] if ".tmp-" in name]


@pytest.mark.parametrize("path", ["clients/acme", "../clients/acme/", "/clients/acme", "clients/2026/acme"])
def test_the_card_does_not_say_where_the_data_lay(path: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is written: a relative path is one of another folder there."""
    monkeypatch.chdir(run)
    for name in ("folder", "datasets"):
        assert data_of(run, DataConfig(name=name, path=path)).startswith(f"acme ({name}), ")


def test_the_newest_picture_is_that_of_the_largest_step(run: Path) -> None:
    newest = run / "samples" / "step-1000000.png"
    newest.write_bytes(b"newest")
    (run / "samples" / "step-999999.png").write_bytes(b"older")
    finish_card(run / "pipeline", run=run)
    assert (run / "pipeline" / "samples.png").read_bytes() == b"newest"
