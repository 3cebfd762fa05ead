"""Prints what completes the command `unetgn` in bash, zsh and fish: eval "$(unetgn completion)"

Put that line into ~/.bashrc or ~/.zshrc, into ~/.config/fish/config.fish `unetgn completion fish | source`; or, which
starts faster, the output into a file, once for each installed version: for bash
~/.local/share/bash-completion/completions/unetgn, for zsh any that ~/.zshrc sources, for fish
~/.config/fish/completions/unetgn.fish. It completes words, options, their values, names of configurations, keys of a
run, and files.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from unetgn.programs.command import PROGRAMS

SHELLS = ("bash", "zsh", "fish")
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


FISH = """\
function __unetgn_runs
    set -l words (commandline -opc)
    test (count $words) -gt 1; and test $words[2] = $argv[1]
end
complete -c unetgn -n 'test (count (commandline -opc)) -eq 1' -f
"""


def make_script(shell: str) -> str:
    """Write the script for a shell. What it offers is written into it: no Python starts when a key is pressed."""
    return for_fish() if shell == "fish" else for_bash()


def for_bash() -> str:
    """Write the script for bash, and for zsh, which has a stand-in for bash's completion."""
    configs, keys = names_of_configs(), names_of_keys()
    values, options = [], []
    for word, (module, _) in PROGRAMS.items():
        actions = import_module(module).make_parser()._actions
        offered = [name for action in actions for name in action.option_strings if name.startswith("--")]
        for action in actions:
            if action.nargs == 0:  # takes no value
                continue
            found = values_of(action, configs)
            if action.option_strings:
                cases = "|".join(f'"{word} {name}"' for name in action.option_strings)
                values.append(f'        {cases}) words="{" ".join(found)}" ;;')
            else:
                offered += found + keys_of(action, keys)
        options.append(f'            {word}) words="{" ".join(offered)}" ;;')
    return SCRIPT.format(words=" ".join(PROGRAMS), values="\n".join(values), options="\n".join(options))


def for_fish() -> str:
    """Write the script for fish, which shows beside a word and an option what they do."""
    configs, keys, lines = names_of_configs(), names_of_keys(), [FISH]
    for word, (module, does) in PROGRAMS.items():
        lines.append(f"complete -c unetgn -n 'test (count (commandline -opc)) -eq 1' -a {word} -d {quoted(does)}")
        parser = import_module(module).make_parser()
        for action in parser._actions:
            said = parser._get_formatter()._expand_help(action) if action.help else ""
            found = values_of(action, configs)
            if action.option_strings:
                names = [f"-{'l' if name[1] == '-' else 's'} {name.lstrip('-')}" for name in action.option_strings]
                takes = "" if action.nargs == 0 else " -r"
            else:
                names, takes, found = [], "", [*found, *keys_of(action, keys)]
                if not found:
                    continue  # files, which fish completes
            offered = f" -a {quoted(' '.join(found))}" + " -f" * bool(action.choices) if found else ""
            about = f" -d {quoted(said)}" if action.option_strings else ""
            lines.append(f"complete -c unetgn -n '__unetgn_runs {word}' {' '.join(names)}{takes}{offered}{about}")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """Write a text as fish quotes it, in one line."""
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{plain}'"


def names_of_configs() -> list[str]:
    """List the configurations that come along."""
    return sorted(file.stem for file in import_module("unetgn.training.config_yaml").CONFIGS.glob("*.yaml"))


def names_of_keys() -> list[str]:
    """List the keys of a run, as they are written before their values."""
    known = import_module("unetgn.training.config_files").known_keys()
    return [f"{name}=" for name, key in known.items() if not key.group]


def keys_of(action: argparse.Action, keys: list[str]) -> list[str]:
    """List the keys that a place takes, as its name says: data.key=value, key=value."""
    start = str(action.metavar).rpartition("|")[2].partition("key=")[0]
    return [key for key in keys if action.dest == "keys" and key.startswith(start)]


def values_of(action: argparse.Action, configs: list[str]) -> list[str]:
    """List the values that an option or a place is known to take; none where the shell completes files."""
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    return configs if action.dest in ("config", "name") and action.type is None else []


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="unetgn completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", nargs="?", choices=SHELLS, default=SHELLS[0], help="what it is for (default: bash)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    print(make_script(make_parser().parse_args(arguments).shell))
    return 0
