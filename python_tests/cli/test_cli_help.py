"""The help of every command: sorted into groups, short, complete."""

from __future__ import annotations

import dataclasses

import pytest

from lnl_ext.cli import main as command
from lnl_ext.cli.options import GROUPS

COMMANDS = list(command._COMMANDS)


def shown(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_in_a_group(name, capsys):
    text = shown(name, capsys)
    options, _ = command._COMMANDS[name]
    flags = {
        "--" + field.name.replace("_", "-")
        for field in dataclasses.fields(options)
        if not field.metadata["positional"]
    }
    ungrouped, *sections = text.split("\n\n")[2:]
    if ungrouped.startswith("positional"):
        ungrouped, *sections = sections
    assert ungrouped.split("\n")[1:] == ["  -h, --help            show this help message and exit"]
    titles = [section.split(":\n")[0] for section in sections]
    assert titles == [title for title in GROUPS if title in titles]
    found = {
        word.rstrip(",")
        for section in sections
        for line in section.splitlines()
        if line.startswith("  --")
        for word in line.split()
        if word.startswith("--")
    }
    assert {flag for flag in found if not flag.startswith("--no-")} == flags


@pytest.mark.parametrize("name", COMMANDS)
def test_the_usage_is_what_a_command_needs(name, capsys):
    usage = shown(name, capsys).split("\n\n")[0]
    assert usage.startswith(f"usage: lnl {name} ")
    assert len(usage.splitlines()) <= 2
    assert "RUN" in usage or "--csv FILE" in usage
