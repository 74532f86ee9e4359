"""The door of the scripts: flags as typed values, and what is answered where they make no sense."""

import errno
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.options import UsageError

FLAGS = {
    "rate": Flag(float, 0.1, "a number", least=0),
    "names": Flag(tuple[str, ...], ("a", "b"), "several"),
    "fast": Flag(bool, False, "yes or no"),
    "task.size": Flag(int | None, ..., "left out unless given"),
    "help": command.HELP,
}


def read(*arguments):
    return command.read(["script.py", *arguments], FLAGS)


def test_values_are_typed_and_defaults_are_as_declared():
    assert read() == {"rate": 0.1, "names": ("a", "b"), "fast": False, "help": False}
    given = read("--rate=1", "--names", "c", "--fast", "--task.size=none")
    assert given == {"rate": 1.0, "names": ("c",), "fast": True, "help": False, "task.size": None}
    last = read("--fast", "--nofast", "--rate=2", "--rate=3")
    assert (last["fast"], last["rate"]) == (False, 3.0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rat=1", "no flag 'rat'; did you mean 'rate' or 'fast'? there are: rate, names"),
        ("--task.siz=1", "no task field 'siz'; did you mean 'size'"),
        ("--rate=-1", "rate: '-1' is not a number of at least 0"),
        ("--rate=nan", "rate: 'nan' is not a finite number"),
        ("--task.size=x", "task.size: 'x' is not a whole number or none"),
        ("--rate", "Missing value for flag --rate"),
        ("more", "unexpected argument 'more'"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(argument, message):
    with pytest.raises(UsageError) as caught:
        read(argument)
    assert message in str(caught.value)


def test_help_shows_defaults():
    lines = command.help_text("About.", FLAGS).splitlines()
    assert "  --rate         a number; default 0.1" in lines
    assert "  --names        several; default a,b" in lines
    assert "  --fast         yes or no" in lines


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (KeyboardInterrupt(signal.SIGTERM), 143, ""),
        (KeyboardInterrupt(signal.SIGHUP), 129, ""),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "error: No space left on device: a/b\n"),
        (OSError("the disk\nis gone"), 1, "error: the disk is gone\n"),
    ],
)
def test_what_may_happen_to_a_script_is_a_status_and_at_most_a_line(raised, status, line, capsys):
    def action():
        raise raised

    assert command.exit_status(action, lambda: (OSError,)) == status
    assert capsys.readouterr().err == line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without room")
@pytest.mark.parametrize("show", [print, command.show])
@pytest.mark.parametrize("text", ["few", "many " * 20_000])  # which wait in a buffer, and which do not
def test_output_on_a_full_disk_is_one_line(show, text, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command.exit_status(lambda: show(text), lambda: (OSError,)) == 1
        full.flush()  # nothing is left that the interpreter could fail to write
    assert capsys.readouterr().err.startswith("error: No space left on device")


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert command.exit_status(lambda: command.show("in ü/猫")) == 0
    assert written.getvalue() == b"in \\xfc/\\u732b\n"


def test_without_stdout_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert command.exit_status(lambda: command.show("x")) == 0


def test_a_system_without_sighup_is_told_before_anything_else_is_imported(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    with pytest.raises(SystemExit, match="^error: Linux and macOS only: "):
        runpy.run_path(command.__file__)


def test_whoever_closes_the_pipe_gets_no_traceback():
    script = "import command, sys; sys.exit(command.exit_status(lambda: [print('x' * 99) for _ in range(9999)] and 0))"
    folder = Path(command.__file__).parent
    done = subprocess.run(
        f'"{sys.executable}" -c "{script}" | head -n 1', shell=True, capture_output=True, text=True, cwd=folder
    )
    assert (done.stdout, done.stderr) == ("x" * 99 + "\n", "")
