"""Random command lines for main.py and tables.py: each ends with status 0, 1 or 2, and in one line where it is not 0.

    python tests/random_lines.py --count=500 --seed=1

Values are drawn from the declared types and ranges, from their edges, and from beyond. Nothing is trained: the engine
is a stand-in, so that everything that is refused before the first round is asked for, and no more. Prints how many
lines ended how, and every one that ended otherwise, made as small as it can be; exit status 1 if there was one.
"""

import argparse
import collections
import contextlib
import io
import os
import random
import resource
import shlex
import signal
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

for folder in (Path(__file__).parents[1], Path(__file__).parents[1] / "experiments"):  # where nothing is installed
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import tables  # noqa: E402

from fedmetanas_jax import main as cli  # noqa: E402
from fedmetanas_jax.options import option_types  # noqa: E402
from fedmetanas_jax.tasks import TASKS  # noqa: E402

LONGEST = 60  # seconds of the processor for one line; the machine may have other work
MOST_MEMORY = 6 * 2**30  # bytes that all lines may take beside what the process has when it begins
WILD = (
    "", " ", "-1", "0", "1", "2147483647", "2147483648", "-2147483649", "9" * 30, "1" * 5000, "1e3", "1.5", "1e400",
    "nan", "inf", "-inf", "-0.0", "1e-45", "3.5e38", "none", "None", "true", "maybe", "0x10", "1_0", " 3 ",
    "\u0661\u0662", "\U0001f642", "e\u0301\u202e", "a,b", ",", ",,", "x=y", "--", "~nosuchuser/x", "/dev/null",
    "/dev/zero", "/proc/self/mem", "x" * 300, "%s", "{0}", "$HOME", "\n", "a\tb", "[1]", "'", '"', "\\",
)  # fmt: skip
TEXTS = {  # of fields and flags that are text
    "method": (),  # the methods there are
    "dataset": ("digits", "mine", "odd", "broken", "nowhere", "cifar10", "mnist"),
    "network": ("mobilenetv3_tiny", "mobilenetv3_large", "genotype.json", "broken.json"),
    "aggregate": ("mean", "finite:1,mean", "clip:1,mean", "clip:1:2:3,mean", "clip:0,mean", "finite:-1", "mean,mean"),
    "partition": ("dirichlet", "label_skew", "iid", "natural", "file:mine.json", "file:"),
    "workdir": ("run", "a/b", "r\u00fcn", ".", "file", "file/x"),
    "data_dir": ("data", "nowhere", "file"),
    "config": tuple(TASKS),
    "sinks": ("tensorboard", "mlflow,wandb", "tensorbord"),
    "augment": ("crop", "flip,crop", "cutout", "crop,crop"),
    "scale": ("minutes", "cpu", "paper"),
    "table": ("1", "2,3", "all", "6", "1,1"),
    "methods": ("fedmetanas", "fedavg,mine", "fedmetanas+M=0", "fedavg+lr=nan", "fedavg+", "+"),
    "columns": ("digits:dir0.1", "mine:tau4", "digits:iid,digits:iid", "digits", "digits:dir", "digits:dir-1", ":"),
}
UNKNOWN = (
    "--config.rouns=3", "--worddir=x", "--config.options.nothing=1", "--config.=1", "--config.options.=1", "--=x", "--",
    "-", "---", "rounds=3", "--config.options.M", "--config.options={}", "--config.rounds.x=1", "--nohelp",
    "--noworkdir", "--config.options", "--no", "--CONFIG=digits_dir01", "--help=maybe",
)  # fmt: skip
USUAL = {"rounds": 3, "clients": 4, "cohort": 2, "width": 4, "cells": 3, "nodes": 1, "batch": 8}


class Late(BaseException):
    """A line took too long; no OSError, which a run is expected to fail of."""


class Draw:
    """Command lines, one after another, the same for the same seed."""

    def __init__(self, seed: int, algorithms: dict[str, Callable]):
        self._dice, self._algorithms = random.Random(seed), algorithms

    def line(self) -> list[str]:
        """main.py or tables.py, and what it is given."""
        if self._dice.random() < 0.15:
            given = [self._flag(name, flag.kind, None) for name, flag in self._some(tables.FLAGS)]
            given += [self._flag(f"config.{name}", field.type, field) for name, field in self._some(cli.FIELDS, 2)]
            return ["tables.py", *self._mixed(given)]
        method = self._dice.choice(list(self._algorithms))
        small = [[f"--config.{name}={value}"] for name, value in USUAL.items() if self._dice.random() < 0.95]
        given = [self._flag(name, flag.kind, None) for name, flag in self._some(cli.OWN, 2)]
        given += [self._flag(f"config.{name}", field.type, field) for name, field in self._some(cli.FIELDS)]
        options = option_types(self._algorithms[method])
        given += [self._flag(f"config.options.{name}", kind, None) for name, (kind, _) in self._some(options, 2)]
        given += [[f"--config.method={method}"]] if self._dice.random() < 0.9 else []
        return ["main.py", *self._mixed(small + given)]  # of a flag that is given twice, the last one counts

    def _some(self, there: dict, most: int = 3) -> list[tuple]:
        return self._dice.sample(list(there.items()), min(len(there), self._dice.randint(0, most)))

    def _mixed(self, given: list[list[str]]) -> list[str]:
        if self._dice.random() < 0.07:
            given = [*given, [self._dice.choice(UNKNOWN)]]
        if given and self._dice.random() < 0.1:
            given = [*given, self._dice.choice(given)]
        return [argument for arguments in given for argument in arguments]

    def _flag(self, name: str, kind, field) -> list[str]:
        if kind is bool and self._dice.random() < 0.7:
            return [f"--{self._dice.choice(['', 'no'])}{name}"]
        value = self._dice.choice(WILD) if self._dice.random() < 0.15 else self._value(name, kind, field)
        style = self._dice.random()
        return [f"--{name}", value] if style < 0.1 else [f"-{name}={value}"] if style < 0.15 else [f"--{name}={value}"]

    def _value(self, name: str, kind, field) -> str:
        origin, inner, dice = typing.get_origin(kind), typing.get_args(kind), self._dice
        last = name.split(".")[-1]
        if texts := tuple(self._algorithms) if last == "method" else TEXTS.get(last):
            return dice.choice(texts)
        if origin is typing.Literal:
            return str(dice.choice(inner))
        if origin is not None and origin is not tuple:  # X | None
            return self._value(name, dice.choice(inner), field)
        if origin is tuple:
            several = inner[:1] * dice.randint(0, 3) if inner[-1] is Ellipsis else inner
            return ",".join(self._value(name, one, field) for one in several)
        least, most = (None, None) if field is None else (field.metadata["least"], field.metadata["most"])
        if kind is int:
            edges = [least or 0, (least or 0) - 1, most or 2**31 - 1, (most or 2**31 - 1) + 1]
            usual = [dice.randint(1, 9), dice.randint(1, 9), dice.randint(1, 999), int(10 ** dice.uniform(0, 10))]
            return str(dice.choice(edges + 2 * usual))
        if kind is float:
            return repr(dice.choice([0.0, 0.5, 1.0, -1.0, least or 0.1, 10 ** dice.uniform(-50, 50), dice.random()]))
        return dice.choice(["true", "false"] if kind is bool else ["none"] if kind is type(None) else WILD)


@contextlib.contextmanager
def nothing_is_trained() -> Iterator[dict[str, Callable]]:
    """In a folder of its own with small data sets; no network, no run -> the methods' factories."""
    from fedmetanas_jax import build

    home, keys = os.getcwd(), ("FEDMETANAS_DATA", "WANDB_MODE")
    kept = {name: os.environ.get(name) for name in keys}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, home)
        for size, name in ((8, "mine"), (6, "odd")):
            image, label = np.zeros((256, size, size, 1), np.uint8), np.arange(256) % 4
            image[:, 0, 0, 0] = label
            split = {"train_images": image, "train_labels": label, "test_images": image, "test_labels": label}
            os.makedirs("data", exist_ok=True)
            np.savez(f"data/{name}.npz", **split)
        for path in ("data/broken.npz", "broken.json", "file"):
            Path(path).write_text("{")
        os.environ |= {"FEDMETANAS_DATA": f"{folder}/data", "WANDB_MODE": "offline"}
        stack.callback(lambda: [os.environ.pop(name) if kept[name] is None else None for name in keys])
        stack.enter_context(mock.patch.object(build.engine, "run", return_value=None))
        stack.enter_context(mock.patch.object(tables, "make", return_value=0))
        stack.enter_context(mock.patch.dict(sys.modules, {"tensorflow_datasets": None}))  # which would download
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        yield build.ALGORITHMS


def outcome(line: list[str]) -> tuple[int | None, str]:
    """(exit status, "") of a command line; (None, what is wrong) where it did not end as it should."""

    def late(*_):
        raise Late(f"more than {LONGEST} s")

    out, err, program = io.StringIO(), io.StringIO(), {"main.py": cli, "tables.py": tables}[line[0]]
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = program.main(line)
    except (Exception, SystemExit, Late) as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    said = err.getvalue()
    if status not in (0, 1, 2) or (status and (said.count("\n") != 1 or not said.startswith("error: "))):
        return None, f"status {status}, stderr {said!r}"
    return status, ""


def smallest(line: list[str], wrong: str) -> list[str]:
    """The line without the arguments that it fails without."""
    for argument in line[1:]:
        shorter = [one for one in line if one is not argument]
        if outcome(shorter)[1].partition(":")[0] == wrong.partition(":")[0]:
            line = shorter
    return line


def run(count: int, seed: int) -> tuple[collections.Counter, list[tuple[str, str]]]:
    """{exit status: lines}, and the (line, what is wrong) of those that did not end as they should."""
    counts, wrong = collections.Counter(), []
    with nothing_is_trained() as algorithms:
        draw = Draw(seed, algorithms)
        for _ in range(count):
            line = draw.line()
            status, what = outcome(line)
            counts["wrong" if status is None else status] += 1
            if status is None:
                small = line if what.startswith(Late.__name__) else smallest(line, what)  # which would take an hour
                wrong.append((shlex.join(small), what))
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    counts, wrong = run(asked.count, asked.seed)
    print(f"{asked.count} lines: " + ", ".join(f"{counts[key]} with status {key}" for key in sorted(counts, key=str)))
    for line, what in wrong:
        print(f"{line}\n    {what}")
    sys.exit(1 if wrong else 0)
