"""The command line: a task by name, its fields by flags, a run in a workdir.

    python experiments/main.py --config=digits_dir01 --config.rounds=20 --config.options.M=3

Exit status: 0 done or paused as asked, 1 the run failed, 2 the request made no sense, 130 interrupted.
"""

import dataclasses
import inspect
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from absl import flags

from fedmetanas_jax.config import TASKS, Config, validate
from fedmetanas_jax.options import UsageError, nearest, option_types, parse_options, parse_value, wanted

DEFAULT_TASK = "digits_dir01"
FIELDS = {field.name: field for field in dataclasses.fields(Config) if field.name != "options"}


class Parsed(NamedTuple):
    """What a command line asks for."""

    show: Literal["run", "list", "help"]
    task: str
    config: Config
    workdir: Path
    data_dir: str | None  # None = where the data package looks by itself
    stop_after: int | None  # rounds of this invocation, None = to the end
    command: str  # the line that goes on with the run


def parse(argv: list[str]) -> Parsed:
    """The command line as values; argv[0] is the program. UsageError if it asks for what is not there.

    jax is imported only once everything else was found good, to read the method's options.
    """
    options, rest = _take(argv, "config.options.")
    values = _flags()
    try:
        positional = values(rest)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown_flag(error.flagname, values)) from None
    except (flags.Error, ValueError) as error:
        raise UsageError(str(error)) from None
    if positional:
        raise UsageError(f"unexpected argument '{positional[0]}'; every argument is a --flag=value")

    task = values["config"].value
    if task not in TASKS:
        raise UsageError(nearest("task", task, TASKS))
    config = _override(TASKS[task](), values)
    stop_after = _stop_after(values["stop_after"].value)
    show = "help" if values["help"].value else "list" if values["list"].value else "run"
    if show == "run":
        validate(config)
        config = _with_options(config, TASKS[task]().method, options)
    return Parsed(
        show=show,
        task=task,
        config=config,
        workdir=Path(values["workdir"].value or f"runs/{task}-{config.method}").expanduser(),
        data_dir=values["data_dir"].value,
        stop_after=stop_after,
        command=shlex.join([sys.orig_argv[0], *_take(argv, "stop_after")[1]]),
    )


def _stop_after(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"stop_after: '{text}' is not a whole number of at least 1")
    return int(text)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    for name, field in FIELDS.items():
        flags.DEFINE_string(f"config.{name}", None, field.metadata["help"], flag_values=values)
        values[f"config.{name}"].boolean = field.type is bool  # --config.NAME, --noconfig.NAME
    for name, default, text in (
        ("config", DEFAULT_TASK, f"the task to start from; default {DEFAULT_TASK}"),
        ("workdir", None, "where the run leaves its files and is resumed from; default runs/TASK-METHOD"),
        ("data_dir", None, "where data sets lie as NAME.npz; else $FEDMETANAS_DATA, else ~/.cache/fedmetanas_jax/data"),
        ("stop_after", None, "pause after this many more rounds; the same command without it goes on"),
    ):
        flags.DEFINE_string(name, default, text, flag_values=values)
    flags.DEFINE_bool("list", False, "show the tasks, and the methods with their options", flag_values=values)
    flags.DEFINE_bool("help", False, "show this", flag_values=values)
    return values


def _take(argv: list[str], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Takes --PREFIXname=value and --PREFIXname value out of argv -> ({name: value}, what is left).

    absl must know its flags beforehand, and which options there are depends on the method.
    """
    taken, rest, remaining = {}, [], iter(argv)
    for argument in remaining:
        flag, equals, text = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not flag.startswith(prefix):
            rest.append(argument)
            continue
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise UsageError(f"--{flag} needs a value: --{flag}=VALUE")
        taken[flag.removeprefix(prefix)] = text
    return taken, rest


def _unknown_flag(name: str, values: flags.FlagValues) -> str:
    if name.startswith("config."):
        return nearest("config field", name.removeprefix("config."), [*FIELDS, "options.NAME"])
    return nearest("flag", name, [flag for flag in values if not flag.startswith("config.")])


def own_flags(own: flags.FlagValues, argv: list[str]) -> list[str]:
    """Reads another script's `own` flags -> what is left of argv, for `parse`. UsageError for one without a value."""
    try:
        return own(argv, known_only=True)[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from None


def _override(config: Config, values: flags.FlagValues) -> Config:
    changed = {}
    for name, field in FIELDS.items():
        flag = values[f"config.{name}"]
        if flag.present:
            try:
                changed[name] = parse_value(flag.value, field.type)
            except UsageError as error:
                raise UsageError(f"config.{name}: {error}") from None
    return dataclasses.replace(config, **changed)


def _with_options(config: Config, task_method: str, texts: dict[str, str]) -> Config:
    """Every option of the method with its value, so that the record of a run leaves none unsaid.

    A task's own options are meant for its own method; another method starts from its factory's defaults.
    """
    from fedmetanas_jax.algorithms import ALGORITHMS

    if config.method not in ALGORITHMS:
        raise UsageError(nearest("method", config.method, ALGORITHMS))
    factory = ALGORITHMS[config.method]
    defaults = {name: default for name, (_, default) in option_types(factory).items()}
    from_task = config.options if config.method == task_method else {}
    return dataclasses.replace(config, options=defaults | from_task | parse_options(factory, texts))


def help_text(task: str, config: Config) -> str:
    """Every flag with its help; the values shown are those of the chosen task and its overrides."""
    values = _flags()
    lines = [__doc__.strip(), "", "Flags:"]
    lines += [f"  --{name:<12} {values[name].help}" for name in values if not name.startswith("config.")]
    lines += ["", f"Fields of a task, with their values in {task}:"]
    for name, field in FIELDS.items():
        choices = f" ({wanted(field.type)})" if typing.get_origin(field.type) is Literal else ""
        assignment = f"{name}={_text(getattr(config, name))}"
        lines.append(f"  --config.{assignment:<26} {field.metadata['help']}{choices}")
    lines.append(f"  --config.{'options.NAME=VALUE':<26} the method's own knobs; --list shows them")
    return "\n".join(lines)


def list_text() -> str:
    """The tasks, and the methods with their papers and options."""
    from fedmetanas_jax.algorithms import ALGORITHMS

    lines = ["Tasks (--config=NAME):"]
    lines += [f"  {name:<16} {_docstring(task)[0]}" for name, task in TASKS.items()]
    lines += ["", "Methods (--config.method=NAME), each with its options (--config.options.NAME=VALUE):"]
    for name, factory in ALGORITHMS.items():
        lines.append(f"  {name:<16} {_docstring(factory)[0]}")
        lines += [f"{'':<18} {line}" for line in _docstring(factory) if line.startswith("Paper: ")]
        for option, (kind, default) in option_types(factory).items():
            lines.append(f"{'':<20} {option}={_text(default)} ({wanted(kind)})")
    return "\n".join(lines)


def _docstring(thing: Callable) -> list[str]:
    return inspect.getdoc(thing).splitlines()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def run(asked: Parsed) -> None:
    """The run itself."""
    from fedmetanas_jax import build

    print(f"{asked.task} with {asked.config.method} in {asked.workdir}", flush=True)
    build.run(
        asked.config,
        task=asked.task,
        workdir=asked.workdir,
        data_dir=asked.data_dir,
        stop_after=asked.stop_after,
        command=asked.command,
    )


def exit_status(action: Callable[[], None]) -> int:
    """Does it -> the exit status; what a user can cause is one line of text, and no traceback."""
    try:
        action()
    except KeyboardInterrupt:  # the engine has saved, and said how to go on
        return 130
    except Exception as error:
        if not isinstance(error, UsageError):
            from fedmetanas_jax.build import FAILURES  # here, so that a mistyped name does not wait for jax

            if not isinstance(error, FAILURES):
                raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = parse(argv)
        if asked.show == "run":
            run(asked)
        else:
            print(help_text(asked.task, asked.config) if asked.show == "help" else list_text())

    return exit_status(answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
