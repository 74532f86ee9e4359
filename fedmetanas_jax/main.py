"""The command line: a task by name, its fields by flags, a run in a workdir.

    python experiments/main.py --config=digits_dir01 --config.rounds=20 --config.options.M=3
    fedmetanas --config=digits_dir01       # the same, as pip installs it

The first Ctrl-C, SIGTERM or SIGHUP ends the run after its round, saved; Ctrl-C once more ends it at once.

Exit status: 0 done or paused as asked, 1 the run failed, 2 the request made no sense, and of a run that a signal ended
130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP).
"""

import dataclasses
import inspect
import os
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag, written
from fedmetanas_jax.config import Config, to_dict, validate
from fedmetanas_jax.engine.interrupt import interruptible
from fedmetanas_jax.engine.sink_kinds import KINDS, Run, SinkError
from fedmetanas_jax.engine.sinks import Sinks
from fedmetanas_jax.environment import jax_variables
from fedmetanas_jax.options import (
    LARGEST_INT,
    UsageError,
    default_options,
    nearest,
    option_types,
    parse_options,
    parse_path,
    wanted,
)
from fedmetanas_jax.tasks import TASKS

FLAGS = {
    "config": Flag(str, "digits_dir01", "the task to start from"),
    "workdir": Flag(str, None, "where the run leaves its files and is resumed from; default runs/TASK-METHOD"),
    "data_dir": Flag(str, None, "where NAME.npz are; else $FEDMETANAS_DATA, else ~/.cache/fedmetanas_jax/data"),
    "stop_after": Flag(int, None, "pause after this many more rounds; the same command without it goes on", least=1),
    "list": Flag(bool, False, "show the tasks, and the methods with their options"),
    "help": command.HELP,
}
FIELDS = {field.name: field for field in dataclasses.fields(Config) if field.name != "options"}
FIELD_FLAGS = {f"config.{name}": Flag(field.type, ..., field.metadata["help"]) for name, field in FIELDS.items()}
OWN = FLAGS | {  # of a single run; the others are of scripts that make many as well
    "sinks": Flag(tuple[str, ...], (), f"where else the run is to be seen, with commas: {', '.join(KINDS)}"),
    "cluster": Flag(bool, False, "one run over all processes that Slurm, Open MPI, a TPU pod or Kubernetes started"),
    "coordinator": Flag(str, None, "the same for processes started by hand: HOST:PORT of the first one"),
    "processes": Flag(int, None, "how many they are", least=1),
    "process": Flag(int, None, "which of them this is, from 0", least=0),
    "heartbeat": Flag(int, 100, "seconds without a sign of life after which one of them counts as dead", least=10),
}
OPTIONS = {"config.options.NAME": Flag(str, ..., "the method's own knobs; --list shows them")}  # stands for them all


class Parsed(NamedTuple):
    """What a command line asks for."""

    show: Literal["run", "list", "help"]
    task: str
    config: Config
    workdir: Path
    data_dir: str | None  # None = where the data package looks by itself
    stop_after: int | None  # rounds of this invocation, None = to the end
    command: str  # the line that goes on with the run
    values: dict[str, Any]  # of every flag but the fields


def parse(argv: list[str], own: dict[str, Flag] = OWN) -> Parsed:
    """The command line as values; argv[0] is the program. UsageError if it asks for what is not there.

    own: the flags beside the fields of a task, for a script whose flags are not those of OWN ("stop_after" and "sinks"
    may be missing). jax is imported only once everything else was found good, to read the method's options.
    """
    for argument in argv[1:]:
        if not argument.isprintable() and argument != argument.encode(errors="ignore").decode():
            encoding = sys.getfilesystemencoding().upper()  # but in odd locales UTF-8
            raise UsageError(f"the argument {ascii(argument)} is not {encoding}")  # no output could show it
    options, rest = command.take(argv, "config.options.")
    values = command.read(rest, own | FIELD_FLAGS | OPTIONS)
    fields = {name: values.pop(f"config.{name}") for name in FIELDS if f"config.{name}" in values}
    task = values["config"]
    if task not in TASKS:
        raise UsageError(nearest("task", task, TASKS))
    config = dataclasses.replace(TASKS[task](), **fields)
    show = "help" if values["help"] else "list" if values["list"] else "run"
    if show == "run":
        validate(config)
        config = _with_options(config, TASKS[task]().method, options)
    workdir = parse_path("workdir", values["workdir"] or f"runs/{task}-{config.method}")
    if values["data_dir"]:
        parse_path("data_dir", values["data_dir"])
    if show == "run" and os.path.exists(workdir) and not os.path.isdir(workdir):
        raise UsageError(f"workdir is '{workdir}', which is no folder")
    if (values.get("stop_after") or 0) > LARGEST_INT:
        raise UsageError(f"stop_after is {values['stop_after']}; it must be at most {LARGEST_INT}")
    if unknown := [name for name in values.get("sinks", ()) if name not in KINDS]:
        raise UsageError(nearest("sink", unknown[0], KINDS))
    if show == "run" and _in_cluster(values) and config.devices:
        raise UsageError(
            f"config.devices is {config.devices}; a run over several processes uses all devices of all of them: "
            "--config.devices=0"
        )
    go_on = shlex.join([sys.orig_argv[0], *command.take(argv, "stop_after")[1]])
    return Parsed(show, task, config, workdir, values["data_dir"], values.get("stop_after"), go_on, values)


def _in_cluster(values: dict[str, Any]) -> bool:
    """Whether this is one process of several; of scripts that have no such flags it never is."""
    coordinator, *numbers = (values.get(name) for name in ("coordinator", "processes", "process"))
    if coordinator is None:
        if numbers != [None, None]:
            raise UsageError("--processes and --process need --coordinator=HOST:PORT")
        return values.get("cluster", False)
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UsageError(f"coordinator is '{coordinator}'; it must be HOST:PORT, as in node7:8476")
    if None in numbers:
        raise UsageError("--coordinator needs --processes=N and --process=I")
    if numbers[1] >= numbers[0]:
        raise UsageError(f"process is {numbers[1]}; of {numbers[0]} processes it is from 0 to {numbers[0] - 1}")
    return True


def _with_options(config: Config, task_method: str, texts: dict[str, str]) -> Config:
    """Every option of the method with its value, so that the record of a run leaves none unsaid.

    A task's own options are meant for its own method; another method starts from its factory's defaults.
    """
    algorithms = _algorithms()
    if config.method not in algorithms:
        raise UsageError(nearest("method", config.method, algorithms))
    factory = algorithms[config.method]
    from_task = config.options if config.method == task_method else {}
    return dataclasses.replace(config, options=default_options(factory) | from_task | parse_options(factory, texts))


def _algorithms() -> dict[str, Callable]:
    """The methods' factories by name; loads jax."""
    with jax_variables():
        from fedmetanas_jax.algorithms import ALGORITHMS
    return ALGORITHMS


def help_text(asked: Parsed, about: str | None = __doc__, own: dict[str, Flag] = OWN) -> str:
    """Every flag with its help; the values shown are those of the chosen task and its overrides."""
    lines = [command.help_text(about or "", own), "", f"Fields of a task, with their values in {asked.task}:"]
    for name, field in FIELDS.items():
        choices = f" ({wanted(field.type)})" if typing.get_origin(field.type) is Literal else ""
        assignment = f"{name}={written(getattr(asked.config, name))}"
        lines.append(f"  --config.{assignment:<26} {field.metadata['help']}{choices}")
    lines += [f"  --{f'{name}=VALUE':<33} {flag.help}" for name, flag in OPTIONS.items()]
    return "\n".join(lines)


def list_text() -> str:
    """The tasks, and the methods with their papers and options."""
    lines = ["Tasks (--config=NAME):"]
    lines += [f"  {name:<16} {_docstring(task)[0]}" for name, task in TASKS.items()]
    lines += ["", "Methods (--config.method=NAME), each with its options (--config.options.NAME=VALUE):"]
    for name, factory in _algorithms().items():
        lines.append(f"  {name:<16} {_docstring(factory)[0]}")
        lines += [f"{'':<18} {line}" for line in _docstring(factory) if line.startswith("Paper: ")]
        for option, (kind, default) in option_types(factory).items():
            lines.append(f"{'':<20} {option}={written(default)} ({wanted(kind)})")
    return "\n".join(lines)


def _docstring(thing: Callable) -> list[str]:
    return (inspect.getdoc(thing) or " ").splitlines()  # python -OO leaves none


def help_or_list(asked: Parsed, *about) -> str:
    """What was asked for in place of a run. about: of `help_text`, for other scripts."""
    return help_text(asked, *about) if asked.show == "help" else list_text()


def failures() -> tuple:
    """What a run can fail of; loads jax."""
    from fedmetanas_jax.build import FAILURES

    return *FAILURES, SinkError


def _run(asked: Parsed, sinks: tuple[str, ...]) -> None:
    names = ("task", "workdir", "data_dir", "stop_after", "command")
    config, how = asked.config, {name: getattr(asked, name) for name in names}
    shown = Run(f"{asked.task}-{config.method}-{config.seed}", to_dict(config), asked.workdir)
    with Sinks(sinks, shown) as sending:
        from fedmetanas_jax import build

        command.show(f"{asked.task} with {config.method} in {asked.workdir}")
        build.run(config, **how, sinks=sending)


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> int | None:
        asked = parse(argv)
        if asked.show != "run":
            return command.show(help_or_list(asked))
        if not _in_cluster(asked.values):
            return _run(asked, asked.values["sinks"])
        with jax_variables():
            from fedmetanas_jax.engine import hosts, together
        place = together.Place(*(asked.values[name] for name in together.Place._fields))

        def mine() -> None:
            _run(asked, asked.values["sinks"] if hosts.leader() else ())

        return together.together(place, mine, lambda action: command.exit_status(action, failures))

    with interruptible():  # from before jax is loaded; the run shares it
        return command.exit_status(answer, failures)


def console() -> int:
    """What pip installs as `fedmetanas`."""
    return main(sys.argv)
