"""The command line: what it understands, and what it answers to what it does not."""

import dataclasses
import functools
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fedmetanas_jax
from fedmetanas_jax import main as cli
from fedmetanas_jax.config import Config
from fedmetanas_jax.options import UsageError
from fedmetanas_jax.tasks import TASKS

MAIN = Path(__file__).parents[1] / "experiments" / "main.py"


def searching(network, setting, *, M: int = 1, eta: float = 0.01, exact: bool = False):
    """A method that searches.

    Paper: Search, 2024
    """


def plain(network, setting, *, momentum: float = 0.9):
    """A method that does not.

    Paper: Plain, 2017
    """


class RunError(ValueError):
    """Stands for the failures a run knows of."""


@pytest.fixture
def calls(monkeypatch):
    """Two small methods and a build that notes what it is asked to run, or raises what `calls` holds."""
    noted = []
    algorithms = types.SimpleNamespace(ALGORITHMS={"fedmetanas": searching, "fedavg": plain})

    def run(config, **rest):
        for failure in [call for call in noted if isinstance(call, BaseException)]:
            raise failure
        noted.append({"config": config, **rest})

    build = types.SimpleNamespace(run=run, FAILURES=(RunError, UsageError))
    task = TASKS["digits_dir01"]

    @functools.wraps(task)
    def without_options():  # which are the real method's
        return dataclasses.replace(task(), options={})

    monkeypatch.setitem(TASKS, "digits_dir01", without_options)
    monkeypatch.setitem(sys.modules, "fedmetanas_jax.algorithms", algorithms)
    monkeypatch.setitem(sys.modules, "fedmetanas_jax.build", build)
    monkeypatch.setattr(fedmetanas_jax, "build", build, raising=False)
    return noted


def parse(*arguments):
    return cli.parse(["experiments/main.py", *arguments])


@pytest.mark.usefixtures("calls")
def test_nothing_said_is_the_bundled_task():
    asked = parse()
    assert asked.show == "run"
    assert asked.task == "digits_dir01"
    assert asked.workdir == Path("runs/digits_dir01-fedmetanas")
    assert asked.data_dir is None
    assert asked.stop_after is None
    assert asked.config.options == {"M": 1, "eta": 0.01, "exact": False}


@pytest.mark.usefixtures("calls")
def test_flags_override_the_fields_of_a_task():
    config = parse(
        "--config=cifar10_small", "--config.rounds=7", "--config.seed", "3", "--config.concentration=1",
        "--config.augment=", "--noconfig.final_adapt", "--config.stem=2",
    ).config  # fmt: skip
    assert (config.rounds, config.seed, config.concentration) == (7, 3, 1.0)
    assert (config.augment, config.final_adapt, config.stem) == ((), False, 2)
    assert config.clients == TASKS["cifar10_small"]().clients


@pytest.mark.usefixtures("calls")
def test_options_belong_to_the_method():
    asked = parse("--config.options.M=3", "--config.options.exact", "true")
    assert asked.config.options == {"M": 3, "eta": 0.01, "exact": True}
    asked = parse("--config.method=fedavg", "--config.options.momentum=0")
    assert asked.config.options == {"momentum": 0.0}
    assert asked.workdir == Path("runs/digits_dir01-fedavg")


@pytest.mark.usefixtures("calls")
def test_a_tasks_options_are_for_its_own_method(monkeypatch):
    monkeypatch.setitem(TASKS, "digits_dir01", lambda: Config(options={"M": 5}))
    assert parse().config.options["M"] == 5
    assert parse("--config.options.M=2").config.options["M"] == 2
    assert parse("--config.method=fedavg").config.options == {"momentum": 0.9}


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("pause", [["--stop_after=2"], ["--stop_after", "2"]])
def test_the_command_to_go_on_is_the_same_without_the_pause(pause):
    asked = parse("--config.rounds=9", *pause, "--workdir=a b")
    assert asked.stop_after == 2
    assert asked.command.endswith("experiments/main.py --config.rounds=9 '--workdir=a b'")


WRONG = {
    "--config=digits_dir1": "no task 'digits_dir1'; did you mean 'digits_dir01'",
    "--config.rouns=3": "no config field 'rouns'; did you mean 'rounds'",
    "--config.train.rounds=3": "no config field 'train.rounds'; did you mean 'rounds'",
    "--worddir=x": "no flag 'worddir'; did you mean 'workdir'",
    "--config.method=fedmetanass": "no method 'fedmetanass'; did you mean 'fedmetanas'",
    "--config.options.m=3": "no searching option 'm'; did you mean 'M'",
    "--config.options.M=x": "config.options.M: 'x' is not a whole number",
    "--config.options.M": "--config.options.M needs a value",
    "--config.partition=dirichle": "config.partition: no choice 'dirichle'; did you mean 'dirichlet'",
    "--config.rounds=many": "config.rounds: 'many' is not a whole number",
    "--config.rounds": "Missing value for flag --config.rounds",
    "--config.final_adapt=maybe": "config.final_adapt: 'maybe' is not true or false",
    "--config.cohort=11": "config.cohort is 11, but there are only 10 clients",
    "--stop_after=0": "stop_after: '0' is not a whole number of at least 1",
    "--noconfig.final_adapt=1": "does not take an argument",
    "rounds=3": "unexpected argument 'rounds=3'",
    "--config.lr=nan": "config.lr: 'nan' is not a finite number",
    "--config.options.eta=inf": "config.options.eta: 'inf' is not a finite number",
    "--config.options.M=2147483648": "config.options.M is 2147483648; it must be from",
    f"--config.rounds={'1' * 5000}": "...' is not a whole number",
    "--config.rounds=2147483648": "config.rounds is 2147483648; it must be at most 2147483647",
    "--stop_after=2147483648": "stop_after is 2147483648; it must be at most 2147483647",
    f"--config={'x' * 1000}": f"no task '{'x' * 80}...'",
    "--workdir=~nosuchuser/x": "workdir is '~nosuchuser/x', but ~nosuchuser is no user's folder",
    "--data_dir=~nosuchuser/x": "data_dir is '~nosuchuser/x', but ~nosuchuser is no user's folder",
    f"--workdir={'x' * 256}": "the names in a path can have at most 255 bytes",
    f"--workdir={MAIN}": "which is no folder",
    "--workdir=\udcff": "the argument '--workdir=\\udcff' is not UTF-8",
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_request_that_makes_no_sense_is_one_line_and_status_2(argument, calls, capsys):
    assert cli.main(["experiments/main.py", argument]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert WRONG[argument] in printed.err
    assert calls == []


def test_a_run_is_handed_to_build_and_its_place_is_said(calls, capsys):
    assert cli.main(["experiments/main.py", "--config.rounds=3", "--data_dir=/images", "--stop_after=1"]) == 0
    (call,) = calls
    assert call.pop("config").rounds == 3
    call.pop("sinks")
    assert call.pop("command").endswith("experiments/main.py --config.rounds=3 --data_dir=/images")
    assert call == {
        "task": "digits_dir01",
        "workdir": Path("runs/digits_dir01-fedmetanas"),
        "data_dir": "/images",
        "stop_after": 1,
    }
    assert capsys.readouterr().out == "digits_dir01 with fedmetanas in runs/digits_dir01-fedmetanas\n"


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [
        (RunError("no data\n  in data"), 1, "error: no data in data\n"),
        (UsageError("no 'tin' dataset"), 2, "error: no 'tin' dataset\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_failed_run_is_one_line_and_its_status(failure, status, line, calls, capsys):
    calls.append(failure)
    assert cli.main(["experiments/main.py"]) == status
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(calls):
    calls.append(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["experiments/main.py"])


@pytest.mark.usefixtures("calls")
def test_list_shows_tasks_and_methods_with_their_options(capsys):
    assert cli.main(["experiments/main.py", "--list"]) == 0
    printed = capsys.readouterr().out
    lines = [line.strip() for line in printed.splitlines()]
    for name in TASKS:
        assert any(line.startswith(f"{name} ") for line in lines)
    start = lines.index("fedmetanas       A method that searches.")
    assert lines[start + 1 :] == [
        "Paper: Search, 2024",
        "M=1 (a whole number)",
        "eta=0.01 (a number)",
        "exact=false (true or false)",
        "fedavg           A method that does not.",
        "Paper: Plain, 2017",
        "momentum=0.9 (a number)",
    ]


def test_help_lists_every_field_with_its_value_in_the_task(capsys):
    assert cli.main(["experiments/main.py", "--config=cifar10_small", "--help"]) == 0
    printed = capsys.readouterr().out
    for name, field in cli.FIELDS.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"  --config.{name}=")]
        assert field.metadata["help"] in line
    assert "--config.rounds=240 " in printed
    assert "--config.augment=crop,flip " in printed


@pytest.mark.parametrize("flag", ["--list", "--help"])
def test_without_docstrings_the_rest_is_shown(flag):
    line = [sys.executable, "-OO", str(MAIN), flag]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rounds=90" in done.stdout if flag == "--help" else "  cifar10_dir01" in done.stdout


def test_whoever_reads_one_line_of_the_list_sees_no_complaint():
    line = [sys.executable, str(MAIN), "--list"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before anything was written
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_wrong_name_is_answered_before_jax_is_loaded():
    program = (
        f"import runpy, sys\nsys.path.insert(0, {str(MAIN.parent)!r})\n"
        "sys.argv = ['experiments/main.py', '--config=digits_dir1']\n"
        "try:\n"
        f"    runpy.run_path({str(MAIN)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("error: no task 'digits_dir1'; did you mean 'digits_dir01'")


def test_the_script_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(MAIN), "--config.rounds=many"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: config.rounds: 'many' is not a whole number\n"


def test_pip_installs_it_as_a_command(tmp_path):
    installed = Path(sys.executable).with_name("fedmetanas")
    done = subprocess.run([installed, "--config=digits_dir1"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no task 'digits_dir1'; did you mean 'digits_dir01'")
