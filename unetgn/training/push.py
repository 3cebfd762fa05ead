"""Sends a pipeline to the hub of Hugging Face: unetgn push RUN NAME/REPO

RUN is a run's folder, whose pipeline/ is sent with the figures that were found of it, or the folder of any pipeline.
The token is the one that `hf auth login` keeps, or that HF_TOKEN holds. The same line again sends what has changed.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from unetgn.json_files import read_object
from unetgn.pipelines.card import NAME
from unetgn.programs.last_words import last_words, say
from unetgn.programs.paths import lacking, user_path
from unetgn.training.card import as_on_hub, check_licence, finish_card
from unetgn.training.checkpoint import CONFIG
from unetgn.training.errors import one_line, plain, reason
from unetgn.training.files import TEMPORARY
from unetgn.training.lora import FOLDER as ADAPTER
from unetgn.training.lora import WEIGHTS
from unetgn.training.run_directory import STATUS

logger = logging.getLogger("unetgn.training")
PIPELINE, INDEX = "pipeline", "model_index.json"
STATUSES = {
    401: "the token is not valid there: log in anew with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: it needs the right to write, and NAME in NAME/REPO has to be you or yours",
    404: "there is no such place, or the token may not see it",
}


class PushError(Exception):
    """Says in one line why a pipeline is not on the hub, and what would help."""


def check_target(repo: str) -> None:
    """Raise PushError where nothing could be sent to a repository, as far as that is known without asking anybody."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(
            f"{plain(repo)!r} is no name of a repository, such as me/my-model: {one_line(error)}"
        ) from error
    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so that nothing is sent: unset it")
    if huggingface_hub.get_token() is None:
        raise PushError("there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN")


def find_pipeline(folder: Path) -> tuple[Path, Path | None]:
    """Find the pipeline in a folder, and the run that it is of, if any. Raises PushError."""
    itself = any((folder / name).is_file() for name in (INDEX, WEIGHTS))
    pipeline = folder if itself else folder / PIPELINE
    if not itself and not (pipeline / INDEX).is_file():
        raise PushError(f"{lacking(folder, 'pipeline')}: neither {INDEX} nor {PIPELINE}/{INDEX} is there")
    run = pipeline.resolve().parent
    of_run = pipeline.resolve().name in (PIPELINE, ADAPTER) and (run / CONFIG).is_file()
    return pipeline, run if of_run else None


def is_finished(run: Path) -> bool:
    """Return False where a run goes on, or stopped, after the part that its pipeline is of."""
    try:
        return read_object(run / STATUS)["state"] == "completed"
    except (OSError, ValueError, KeyError):
        return True  # nobody says otherwise


def push(folder: Path, repo: str, *, private: bool = False, licence: str | None = None) -> str:
    """Send the pipeline in a folder to a repository, which is made where it is not there; return its address.

    Raises PushError.
    """
    check_target(repo)
    pipeline, run = find_pipeline(folder)
    if run is not None and not is_finished(run):
        logger.warning("%s is not at its end: %s, and its card, are those of the part that was finished", run, pipeline)
        run = None  # what it says now, keys and figures, is not of these weights
    try:
        finish_card(pipeline, run=run, licence=licence)
    except (OSError, ValueError) as error:
        raise PushError(f"the card of {pipeline} cannot be written: {plain(one_line(error))}") from error
    api = HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(address.repo_id).private:
            raise PushError(f"{address} is there already and is public: make it private there, or leave out --private")
        api.create_commit(
            address.repo_id, list(contents(pipeline, address.repo_id)), commit_message="A pipeline of unetgn"
        )
    except PushError:
        raise
    except Exception as error:  # those of the network, of HTTP and of the libraries that send have no parent in common
        raise PushError(f"{repo} at {api.endpoint}: {why(error)}") from error
    return str(address)


def contents(pipeline: Path, repo: str) -> Iterator[CommitOperationAdd]:
    """List the files of a pipeline, with the card as it is to be on the hub, without what a killed process left."""
    names = (path.relative_to(pipeline).as_posix() for path in sorted(pipeline.rglob("*")) if path.is_file())
    left_out = [*DEFAULT_IGNORE_PATTERNS, f"{TEMPORARY}*", f"*/{TEMPORARY}*"]
    for name in filter_repo_objects(names, ignore_patterns=left_out):
        if name == NAME:
            card = as_on_hub((pipeline / name).read_text(encoding="utf-8"), repo)
            yield CommitOperationAdd(name, card.encode())
        else:
            yield CommitOperationAdd(name, pipeline / name)


def why(error: BaseException) -> str:
    """Say in one line why something was not sent: what the hub answered, or what is behind the error."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None:
        return f"it could not be sent ({reason(error)})"
    status = cause.response.status_code
    said = (f"status {status}", plain(cause.server_message or ""), STATUSES.get(status, ""))
    return "; ".join(part for part in said if part)


def push_after(run: Path, repo: str, *, private: bool, licence: str | None) -> None:
    """Send the pipeline of a run that is finished; where that fails, warn with the line that does it later."""
    try:
        print(f"sent to {push(run, repo, private=private, licence=licence)}", flush=True)
    except (PushError, KeyboardInterrupt) as error:
        options = [*(["--private"] if private else []), *(["--license", licence] if licence else [])]
        line = shlex.join(["unetgn", "push", str(run), repo, *options])
        logger.warning("not sent: %s. The pipeline is whole; send it with: %s", str(error) or "stopped by Ctrl-C", line)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code: 0 sent, 1 where the hub did not take it, 2 where nothing can be sent."""
    parsed = make_parser().parse_args(arguments)
    try:
        check_target(parsed.repo)
        find_pipeline(parsed.folder)
    except PushError as error:
        say(f"unetgn push: error: {error}")
        return 2
    try:
        print(f"sent to {push(parsed.folder, parsed.repo, private=parsed.private, licence=parsed.license)}")
    except PushError as error:
        say(f"unetgn push: {error}")
        return 1
    except KeyboardInterrupt as error:
        return last_words("push.py", error)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="unetgn push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, metavar="RUN", help="a run's folder, or one that a pipeline is in")
    parser.add_argument("repo", metavar="NAME/REPO", help="the repository on the hub; REPO alone is your own")
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a repository and its card."""
    parser.add_argument("--private", action="store_true", help="make the repository a private one")
    parser.add_argument(
        "--license", type=licence, metavar="NAME", help="licence of the weights, for the card: apache-2.0, mit, …"
    )


def licence(text: str) -> str:
    """Read the identifier of a licence. Raises argparse.ArgumentTypeError."""
    try:
        return check_licence(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
