"""What `unetgn completion` prints is sourced by bash, zsh or fish, which then completes."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from unetgn.programs.command import PROGRAMS
from unetgn.programs.completion import make_script
from unetgn.training.config_files import known_keys
from unetgn.training.config_yaml import CONFIGS

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
NAMES = {file.stem for file in CONFIGS.glob("*.yaml")}
KEYS = {f"{name}=" for name, key in known_keys().items() if not key.group}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "unetgn"
    file.write_text(make_script("bash"))
    return file


def complete(script: Path, lines: list[str]) -> list[set[str]]:
    """Have bash complete the end of each line, as it does when Tab is pressed."""
    program = [f"source {shlex.quote(str(script))}", "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}"]
    for line in lines:
        words = " ".join(shlex.quote(word) for word in line.split(" "))
        program.append(
            f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _unetgn; echo "${{COMPREPLY[*]}}"'
        )
    program.append("complete -p unetgn")
    done = subprocess.run(
        ["bash", "--norc", "-u", "-c", "\n".join(program)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    *found, registered = done.stdout.splitlines()
    assert registered == "complete -o default -F _unetgn unetgn"
    return [set(line.split()) for line in found]


def options_of(word: str) -> set[str]:
    parser = import_module(PROGRAMS[word][0]).make_parser()
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


@needs_bash
def test_bash_completes_every_word_its_options_and_their_values(script: Path) -> None:
    expected = {"unetgn ": {*PROGRAMS}, "unetgn tr": {"train"}, "unetgn nothing ": set()}
    for word, (module, _) in PROGRAMS.items():
        expected[f"unetgn {word} --"] = options_of(word)
        for action in import_module(module).make_parser()._actions:
            for name in action.option_strings:
                if action.choices is not None:
                    expected[f"unetgn {word} {name} "] = set(map(str, action.choices))
    found = complete(script, list(expected))
    assert dict(zip(expected, found, strict=True)) == expected


@needs_bash
def test_bash_completes_names_of_configurations_keys_and_leaves_files_to_itself(script: Path) -> None:
    expected = {
        "unetgn train --config ": NAMES,
        "unetgn train --config digits8_e": {"digits8_edm"},
        "unetgn configs mnist": {name for name in NAMES if name.startswith("mnist")},
        "unetgn evaluate --config cifar": {name for name in NAMES if name.startswith("cifar")},
        "unetgn train --config x train.": {key for key in KEYS if key.startswith("train.")},
        "unetgn train --dry-run train.ste": {"train.steps="},
        "unetgn cache-latents ": {key for key in KEYS if key.startswith("data.")} | options_of("cache-latents"),
        "unetgn train --output ": set(),  # none of ours: bash completes files, by `-o default`
        "unetgn sample --checkpoint ru": set(),
        "unetgn convert --config ": set(),  # a file of somebody else's
        "unetgn train data.path = m": set(),  # so bash divides data.path=m: a value, and no key such as model.depth
        "unetgn train data.path =": set(),
    }
    assert dict(zip(expected, complete(script, list(expected)), strict=True)) == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_completes_by_its_stand_in_for_bash(script: Path) -> None:
    """A space ends a word, but not `key=`; what nothing is known of is left to zsh, which completes files."""
    lines = {
        "unetgn tr": ["train "],
        "unetgn train --config digits8_e": ["digits8_edm "],
        "unetgn train --config x train.ste": ["train.steps="],
    }
    program = [f"source {shlex.quote(str(script))}", "(( $+functions[complete] )) || exit 3"]
    program.append("""try() {
        local -a COMP_WORDS; local COMP_CWORD CURRENT=$#; local -a words
        COMP_WORDS=("$@"); words=("$@"); COMP_CWORD=$(( CURRENT - 1 ))
        compgen -o nospace -o default -F _unetgn -- "${@[-1]}"
        print -r -- ---
    }""")
    program += [f"try {' '.join(map(shlex.quote, line.split(' ')))}" for line in lines]
    done = subprocess.run(["zsh", "-f", "-c", "\n".join(program)], capture_output=True, text=True, check=True)
    # compgen gives all that the function offers: zsh itself takes those that begin with the word
    found = [part.strip("\n").split("\n") for part in done.stdout.split("---\n")[:-1]]
    for (line, wanted), offered in zip(lines.items(), found, strict=True):
        assert [each for each in offered if each.startswith(line.rpartition(" ")[2]) and each] == wanted, line


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], list[dict[str, str]]]:
    """Has fish complete the end of each line, in a folder with one file: what it offers, and what it says of that."""
    if shutil.which("fish") is None:
        pytest.skip("there is no fish")
    folder = tmp_path_factory.mktemp("fish")
    (folder / "unetgn.fish").write_text(make_script("fish"))
    (folder / "here").mkdir()
    (folder / "here" / "runs.txt").touch()

    def complete(lines: list[str]) -> list[dict[str, str]]:
        asked = "; ".join(f"complete -C {shlex.quote(line)}; echo ---" for line in lines)
        program = f"source ../unetgn.fish; or exit 3; {asked}"
        environment = os.environ | {"XDG_CONFIG_HOME": str(folder), "XDG_DATA_HOME": str(folder), "HOME": str(folder)}
        done = subprocess.run(["fish", "--no-config", "-c", program], cwd=folder / "here", env=environment,
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stderr == ""
        parts = done.stdout.split("---\n")[:-1]
        return [dict(line.partition("\t")[::2] for line in part.splitlines()) for part in parts]

    return complete


def test_fish_completes_every_word_its_options_and_their_values_and_says_what_they_do(
    completed: Callable[[list[str]], list[dict[str, str]]],
) -> None:
    expected: dict[str, set[str]] = {"unetgn ": {*PROGRAMS}, "unetgn tr": {"train"}}
    for word, (module, _) in PROGRAMS.items():
        expected[f"unetgn {word} --"] = options_of(word)
        for action in import_module(module).make_parser()._actions:
            if action.choices is not None:
                places = [f"{name} " for name in action.option_strings] or [""]
                expected |= {f"unetgn {word} {name}": {*map(str, action.choices)} for name in places}
    found = completed(list(expected))
    assert {line: {*offered} for line, offered in zip(expected, found, strict=True)} == expected
    assert found[0] == {word: does for word, (_, does) in PROGRAMS.items()}
    for word, (module, _) in PROGRAMS.items():
        offered = found[list(expected).index(f"unetgn {word} --")]
        helped = {name for action in import_module(module).make_parser()._actions if action.help
                  for name in action.option_strings if name.startswith("--")}  # fmt: skip
        assert {name for name, said in offered.items() if said} == helped


def test_fish_completes_names_of_configurations_keys_and_files(
    completed: Callable[[list[str]], list[dict[str, str]]],
) -> None:
    file = {"runs.txt"}
    expected = {
        "unetgn train --config ": NAMES | file,
        "unetgn train --config digits8_e": {"digits8_edm"},
        "unetgn configs mnist": {name for name in NAMES if name.startswith("mnist")},
        "unetgn train --config x train.": {key for key in KEYS if key.startswith("train.")},
        "unetgn train --dry-run train.ste": {"train.steps="},
        "unetgn cache-latents ": {key for key in KEYS if key.startswith("data.")} | file,
        "unetgn train --output ": file,
        "unetgn sample --checkpoint ru": file,
        "unetgn nothing ru": file,
        "unetgn push train --conf": set(),  # `train` is no word there, but a folder
    }
    assert {line: {*offered} for line, offered in zip(expected, completed(list(expected)), strict=True)} == expected
