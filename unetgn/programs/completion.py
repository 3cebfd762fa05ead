"""Prints what completes the command `unetgn` in bash and zsh: eval "$(unetgn completion)"

Put that line into ~/.bashrc or ~/.zshrc; or, which starts faster, the output into a file, once for each installed
version: for bash ~/.local/share/bash-completion/completions/unetgn, for zsh any that ~/.zshrc sources. It completes
words, options, their values, names of configurations, keys of a run, and files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module

from unetgn.programs.command import PROGRAMS

SCRIPT = """\
_unetgn() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{words}"
    elif [ "$prev" != "=" ] && [ "$cur" != "=" ]; then  # what follows KEY= is a value, which bash may have as a file
        case "${{COMP_WORDS[1]}} $prev" in
{values}
        *)
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [ -n "${{ZSH_VERSION-}}" ]; then  # whose words end where they say so: with a space, but for KEY=
        local word found; found=()
        for word in "${{COMPREPLY[@]}}"; do
            case "$word" in *=) found+=("$word") ;; *) found+=("$word ") ;; esac
        done
        COMPREPLY=("${{found[@]}}")
    else
        case "${{COMPREPLY[0]-}}" in *=) compopt -o nospace 2>/dev/null ;; esac
    fi
}}
if [ -n "${{ZSH_VERSION-}}" ]; then
    type compdef >/dev/null 2>&1 || {{ autoload -U +X compinit && compinit; }}
    autoload -U +X bashcompinit && bashcompinit
    complete -o nospace -o default -F _unetgn unetgn
else
    complete -o default -F _unetgn unetgn
fi"""


def make_script() -> str:
    """Write the script. What it offers is written into it, so that no Python starts when a key is pressed."""
    configs = sorted(file.stem for file in import_module("unetgn.training.config_yaml").CONFIGS.glob("*.yaml"))
    known = import_module("unetgn.training.config_files").known_keys()
    keys = [f"{name}=" for name, key in known.items() if not key.group]
    values, options = [], []
    for word, (module, _) in PROGRAMS.items():
        actions = import_module(module).make_parser()._actions
        offered = [name for action in actions for name in action.option_strings if name.startswith("--")]
        for action in actions:
            if action.nargs == 0:  # takes no value
                continue
            found = list(values_of(action, configs))
            if action.option_strings:
                cases = "|".join(f'"{word} {name}"' for name in action.option_strings)
                values.append(f'        {cases}) words="{" ".join(found)}" ;;')
            else:
                offered += found
                offered += [key for key in keys if action.dest == "keys" and key.startswith(prefix(action))]
        options.append(f'            {word}) words="{" ".join(offered)}" ;;')
    return SCRIPT.format(words=" ".join(PROGRAMS), values="\n".join(values), options="\n".join(options))


def values_of(action: argparse.Action, configs: list[str]) -> Iterator[str]:
    """List the values that an option or a place is known to take; none where bash completes files."""
    if action.choices is not None:
        yield from map(str, action.choices)
    elif action.dest in ("config", "name") and action.type is None:
        yield from configs


def prefix(action: argparse.Action) -> str:
    """Return what the keys begin with that a place takes, as its name says: data.key=value, key=value."""
    return str(action.metavar).rpartition("|")[2].partition("key=")[0]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    return argparse.ArgumentParser(
        prog="unetgn completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    make_parser().parse_args(arguments)
    print(make_script())
    return 0
