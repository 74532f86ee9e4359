"""The door of every script: its flags as typed values, and one line for what makes no sense.

Imports no jax, so that a mistyped name is answered at once. Exit status of every script: 0 done, 1 it failed, 2 the
request made no sense, 130 interrupted; a run that was asked to stop by another signal: 128 + its number.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from absl import flags as absl

from fedmetanas_jax.options import UsageError, nearest, parse_value, wanted

if not hasattr(signal, "SIGHUP"):  # Windows; before a script imports what has need of it
    sys.exit("error: Linux and macOS only: a run listens to SIGHUP and locks its workdir, and this system has neither")


class Flag(NamedTuple):
    """What a script can be told, as --NAME=VALUE; of a bool also --NAME and --noNAME."""

    kind: Any  # one that `options.parse_value` reads
    default: Any  # used as it is, of whatever type; `...`: the flag has no value unless it is given
    help: str
    least: float | None = None  # the smallest number that makes sense


HELP = Flag(bool, False, "show this")


def read(argv: list[str], flags: dict[str, Flag]) -> dict[str, Any]:
    """{name: value} of the flags that were given or have a default; argv[0] is the program.

    UsageError, one line, for an unknown flag, a value of another type or below the least, and what is no flag.
    """
    texts = absl.FlagValues()
    for name, flag in flags.items():
        absl.DEFINE_string(name, None, flag.help, flag_values=texts)
        texts[name].boolean = flag.kind is bool
    try:
        positional = texts(argv)[1:]
    except absl.UnrecognizedFlagError as error:
        raise UsageError(_unknown(error.flagname, flags)) from None
    except (absl.Error, ValueError) as error:
        raise UsageError(str(error)) from None
    if positional:
        raise UsageError(f"unexpected argument '{positional[0]}'; every argument is a --flag=value")
    given = {name: _value(name, texts[name].value, flag) for name, flag in flags.items() if texts[name].present}
    return {name: flag.default for name, flag in flags.items() if flag.default is not ...} | given


def _unknown(name: str, flags: dict[str, Flag]) -> str:
    family, _, rest = name.partition(".")
    if kin := [flag.removeprefix(f"{family}.") for flag in flags if flag.startswith(f"{family}.")]:
        return nearest(f"{family} field", rest, kin)
    return nearest("flag", name, [flag for flag in flags if "." not in flag])


def _value(name: str, text: str, flag: Flag) -> Any:
    try:
        value = parse_value(text, flag.kind)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    if flag.least is not None and not value >= flag.least:  # written so that NaN is refused
        raise UsageError(f"{name}: '{text}' is not {wanted(flag.kind)} of at least {flag.least}")
    return value


def take(argv: list[str], prefix: str) -> tuple[dict[str, str], list[str]]:
    """Takes --PREFIXname=value and --PREFIXname value out of argv -> ({name: value}, what is left).

    For flags whose names and types depend on the others. UsageError for one without a value.
    """
    taken, rest, remaining = {}, [], iter(argv)
    for argument in remaining:
        flag, equals, text = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not flag.startswith(prefix):
            rest.append(argument)
            continue
        if not equals and (text := next(remaining, "--")).startswith("--"):
            raise UsageError(f"--{flag} needs a value: --{flag}=VALUE")
        taken[flag.removeprefix(prefix)] = text
    return taken, rest


def help_text(about: str, flags: dict[str, Flag]) -> str:
    """A script's docstring, then every flag with its help and, where it has one to show, its default."""
    lines = [about.strip(), "", "Flags:"]
    for name, flag in flags.items():
        shown = flag.kind is not bool and flag.default is not None
        lines.append(f"  --{name:<12} {flag.help}" + (f"; default {written(flag.default)}" if shown else ""))
    return "\n".join(lines)


def written(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def show(text: str) -> None:
    """Prints it at once, where somebody who has had enough of it is expected. OSError, which names stdout."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise _named(error) from None


def _named(error: OSError) -> OSError:
    return type(error)(error.errno, error.strerror, "<stdout>")


def named(argv: list[str], *names: str) -> list[str]:
    """argv with its first arguments, as far as they are no flags, as --NAME=VALUE; argv[0] is the program."""
    program, *rest = argv
    for place, (name, argument) in enumerate(zip(names, rest, strict=False)):
        if argument.startswith("-"):
            break
        rest[place] = f"--{name}={argument}"
    return [program, *rest]


def run(argv: list[str], parse: Callable, action: Callable, about: str, flags: dict[str, Flag], failures) -> int:
    """A script: shows its help, or does parse(argv) and action of that and argv -> the exit status. failures: as
    `exit_status` has it."""

    def answer() -> int | None:
        asked = parse(argv)
        return show(help_text(about, flags)) if asked["help"] else action(asked, argv)

    return exit_status(answer, failures)


def exit_status(action: Callable[[], int | None], failures: Callable[[], tuple] = tuple) -> int:
    """Does it -> the exit status, which is the action's own unless it raises, or its output cannot be written.

    failures: () -> the exceptions that a user can cause, besides UsageError; asked for only where one was raised.
    Each is one line of text and no traceback; of anything else the traceback is kept.
    """
    line = None
    if hasattr(sys.stdout, "reconfigure"):  # not of a closed one, which is None
        sys.stdout.reconfigure(errors="backslashreplace")  # of what its encoding has not; stderr does so by itself
    try:
        status = action() or 0
    except KeyboardInterrupt as stop:  # whoever has something to save has saved it, and said how to go on
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)  # as shells have it
    except BrokenPipeError:  # whoever read the output has had enough of it
        status = 1
    except Exception as error:
        usage = isinstance(error, UsageError)
        if not usage and not isinstance(error, failures()):
            raise
        status, line = 2 if usage else 1, _line(error)
    if (lost := _lost_output()) is not None:
        status = status or 1
        if line in (None, _line(lost)):
            line = None if isinstance(lost, BrokenPipeError) else _line(_named(lost))
    if line is not None:
        with contextlib.suppress(OSError):  # stderr may be on the same full disk
            print(f"error: {line}", file=sys.stderr)
    return status


def _line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without its number, which tells nobody anything
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split())


def _lost_output() -> OSError | None:
    """Why what was printed cannot be written, if so; it is then given up, or Python would complain of it in the end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def leave(status: int) -> NoReturn:
    """Ends the process with this exit status, everything written. For scripts whose libraries' threads may still be
    ending then, as gRPC's: on Python's own way out one of them can abort the process (seen with Python 3.11)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
