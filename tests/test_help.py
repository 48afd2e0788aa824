"""The flags of every script, lesson and asset: what --help says of them, and what torchrun takes.

Run: python -m pytest tests/test_help.py
"""
import importlib
import sys

import pytest
from torch.distributed.run import get_args_parser

import run_flags
from conftest import ROOT

FOLDERS = (".", "walkthroughs", "assets")
SCRIPTS = []
for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
    if "\ndef parse_args(" in path.read_text("utf-8"):
        SCRIPTS.append(path.relative_to(ROOT).as_posix())
every_script = pytest.mark.parametrize("name", SCRIPTS)


def load(name):
    """The module of a script, as `python NAME` would import what it needs."""
    folder, _, stem = name.removesuffix(".py").rpartition("/")
    sys.path.insert(0, str(ROOT / folder))
    try:
        return importlib.import_module(stem)
    finally:
        sys.path.pop(0)


def parser_of(module, monkeypatch):
    """The parser that a script's parse_args() makes."""
    parsers = []

    def keep_and_stop(parser, *_):
        parsers.append(parser)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_flags.Parser, "parse_args", keep_and_stop)
        with pytest.raises(KeyboardInterrupt):
            module.parse_args([])
    return parsers[0]


def test_every_program_is_found():
    programs = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")
                if "__main__" in path.read_text("utf-8")]
    assert sorted(path.relative_to(ROOT).as_posix() for path in programs) == SCRIPTS
    assert len(SCRIPTS) == 14


@every_script
def test_help_says_every_default(name, monkeypatch, capsys):
    module = load(name)
    with pytest.raises(SystemExit) as ending:
        module.parse_args(["--help"])
    assert ending.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())  # as if it were one line

    parser = parser_of(module, monkeypatch)
    parser.format_help()                               # completes the help of each flag
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        assert action.option_strings[0] in shown
        assert "default" in action.help.lower(), f"{name} {action.option_strings[0]}"
        default = parser.shown_defaults.get(action.dest, action.default)
        if isinstance(default, (int, float, str)) and "(default: " in action.help:
            said = action.help.split("(default: ")[1].removesuffix(".").removesuffix(")")
            expected = "off" if default is False else f"{default}"
            if isinstance(default, float):
                expected = f"{default:g}"
            said = said.split(";")[0]                  # "4096; for the tiny encoder 340"
            assert said in (expected, "the shipped one"), f"{name} {action.help}"


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "/" not in name])
def test_torchrun_leaves_every_flag_to_the_script(name, monkeypatch):
    """torchrun refuses what could be short for several of its own flags: another name must do."""
    own_flags = get_args_parser()._option_string_actions
    for action in parser_of(load(name), monkeypatch)._actions:
        names = action.option_strings
        if action.dest == "help" or not names:         # torchrun may keep its own --help
            continue
        usable = []
        for flag in names:
            meant = [own for own in own_flags if own.startswith(flag)]
            if flag in own_flags or len(meant) < 2:
                usable.append(flag)
        assert usable, f"{name} {names}"


def test_the_second_name_of_the_number_of_images_reaches_the_script():
    torchrun = get_args_parser()
    words = ["--nproc_per_node=2", "sample.py", "--num_images", "12"]
    args = torchrun.parse_args(words)
    assert args.training_script_args == ["--num_images", "12"]
    with pytest.raises(SystemExit):
        torchrun.parse_args(["--nproc_per_node=2", "sample.py", "--n", "12"])
    assert importlib.import_module("sample").parse_args(["--num_images", "12"]).n == 12
