"""Writes completion scripts for shells, from the options of an argparse parser.

The scripts hold every option with its choices and meaning, so that completing starts no Python. They are for a command
that is called as `python -m MODULE`, by whatever name or path Python has.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence

SHELLS = ("bash", "zsh", "fish")


@dataclasses.dataclass(frozen=True)
class Option:
    """Describes an option: its names, its meaning in one line, and what its value can be.

    values: what can be chosen; is_file: the value is a file's name; takes_value: it has one.
    """

    names: tuple[str, ...]
    meaning: str
    takes_value: bool
    values: tuple[str, ...] = ()
    is_file: bool = False


def options_of(actions: Sequence[argparse.Action]) -> list[Option]:
    """Returns the options among a parser's actions. An option whose metavar is FILE takes the name of one."""
    return [
        Option(
            tuple(action.option_strings),
            _meaning(action),
            takes_value=action.nargs != 0,
            values=tuple(map(str, action.choices or ())),
            is_file=action.metavar == "FILE",
        )
        for action in actions
        if action.option_strings
    ]


def completion_script(shell: str, module: str, options: Sequence[Option]) -> str:
    """Returns the script for one of SHELLS. module: what stands behind `python -m`."""
    function = "_" + re.sub(r"\W", "_", module)
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](module, function, options)


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default, "prog": ""} if action.help else ""
    return " ".join(text.split())


def _quoted(text: str) -> str:
    """Quotes a text for any of the shells."""
    return "'" + text.replace("'", "'\\''") + "'"


def _bash(module: str, function: str, options: Sequence[Option]) -> str:
    names = " ".join(name for option in options for name in option.names)
    cases = []
    for option in options:
        if option.takes_value:
            pattern = "|".join(option.names)
            if option.values:
                words = f'COMPREPLY=($(compgen -W {_quoted(" ".join(option.values))} -- "$cur"))'
            elif option.is_file:
                words = f"{function}_files"
            else:
                words = "COMPREPLY=()"
            cases.append(f"        {pattern}) {words}; return ;;")
    return f"""\
# Completion of {module} for bash. To use it: eval "$(python -m {module} --completion bash)"
# It completes `python -m {module}`, for python, python3 and any path to one.
{function}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}} IFS=$' \\t\\n'
    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${{COMP_WORDS[COMP_CWORD - 2]}}; fi
    case $prev in
{chr(10).join(cases)}
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W {_quoted(names)} -- "$cur"))
    else
        {function}_files
    fi
}}
{function}_files() {{
    local IFS=$'\\n'  # names may have spaces
    compopt -o filenames 2>/dev/null
    COMPREPLY=($(compgen -f -- "$cur"))
}}
{function}_python() {{
    if [[ ${{COMP_WORDS[1]}} == -m && ${{COMP_WORDS[2]}} == {module} && $COMP_CWORD -gt 2 ]]; then
        {function}
    elif [[ ${{COMP_WORDS[1]}} == -m && $COMP_CWORD -eq 2 ]]; then
        COMPREPLY=($(compgen -W {module} -- "${{COMP_WORDS[2]}}"))
    else
        compopt -o default 2>/dev/null
        COMPREPLY=()
    fi
}}
complete -F {function}_python python python3
"""


def _zsh(module: str, function: str, options: Sequence[Option]) -> str:
    specs = []
    for option in options:
        meaning = option.meaning.replace("[", "(").replace("]", ")").replace(":", " -")
        value = ""
        if option.takes_value:
            kind = f"({' '.join(option.values)})" if option.values else "_files" if option.is_file else " "
            value = f":value:{kind}"
        specs += [_quoted(f"*{name}[{meaning}]{value}") for name in option.names]
    lines = " \\\n        ".join(specs)
    return f"""\
# Completion of {module} for zsh. To use it, after compinit: source <(python -m {module} --completion zsh)
{function}() {{
    _arguments -S \\
        {lines} \\
        '*:prompt:_files'
}}
{function}_python() {{
    if [[ $words[2] == -m && $words[3] == {module} && $CURRENT -gt 3 ]]; then
        shift 2 words
        (( CURRENT -= 2 ))
        {function}
    elif [[ $words[2] == -m && $CURRENT -eq 3 ]]; then
        compadd {module}
    else
        _files
    fi
}}
compdef {function}_python python python3
"""


def _fish(module: str, function: str, options: Sequence[Option]) -> str:
    lines = [
        f"# Completion of {module} for fish. To use it: python -m {module} --completion fish | source",
        f"function {function}",
        "    set -l words (commandline -opc)",
        f"    test (count $words) -ge 3; and test $words[2] = -m; and test $words[3] = {module}",
        "end",
    ]
    for command in ("python", "python3"):
        for option in options:
            names = " ".join(
                f"-l {name.removeprefix('--')}" if name.startswith("--") else f"-s {name.removeprefix('-')}"
                for name in option.names
            )
            value = ""
            if option.takes_value:
                value = (
                    " -r"
                    if option.is_file
                    else f" -x -a {_quoted(' '.join(option.values))}"
                    if option.values
                    else " -x"
                )
            lines.append(f"complete -c {command} -n {function} {names}{value} -d {_quoted(option.meaning)}")
    return "\n".join(lines) + "\n"
