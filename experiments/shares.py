"""The clients' shares of a simulated federation as files, one a client, for a trial of a networked one.

    python experiments/shares.py --config=digits_dir01 --to=shares           # shares/client-0.npz to client-9.npz

Each has train_images, train_labels, test_images and test_labels: the very rows that main.py would deal to that client,
in their order. Flags of the task as main.py's. Exit status as main.py's.
"""

import sys

import numpy as np

from fedmetanas_jax import command
from fedmetanas_jax import main as run_script
from fedmetanas_jax.command import Flag
from fedmetanas_jax.config import SIZED
from fedmetanas_jax.options import UsageError, parse_path

FLAGS = {name: flag for name, flag in run_script.FLAGS.items() if name not in ("workdir", "stop_after", "list")} | {
    "to": Flag(str, None, "the folder"),
    "workdir": Flag(str, "runs/shares", "not used"),
    "list": Flag(bool, False, "show the tasks, and the methods with their options"),
}


def write(asked: run_script.Parsed, folder) -> str:
    """Writes the files -> what to tell a server so that it runs what a simulation would. Raises as `build.run`."""
    from fedmetanas_jax import build
    from fedmetanas_jax.data import sources

    config = asked.config
    build.prepare_jax(config)
    dataset = sources.load(config.dataset, sources.data_dir(asked.data_dir))
    least = build.first_algorithm(build.make_phases(config, dataset)[0]).least_rows
    parts = build.deal(config, dataset, least)
    for client, (train, test) in enumerate(zip(parts.train, parts.test, strict=True)):
        arrays = {
            "train_images": dataset.train_images[train],
            "train_labels": np.asarray(dataset.train_labels[train], np.int32),
            "test_images": dataset.test_images[test],
            "test_labels": np.asarray(dataset.test_labels[test], np.int32),
        }
        sources.write(folder / f"client-{client}.npz", arrays)
    if config.partition in SIZED:  # nobody has more than the config says
        return ""
    sizes = {"train_size": max(map(len, parts.train)), "test_size": max(map(len, parts.test))}
    changed = {name: size for name, size in sizes.items() if size != getattr(config, name)}
    return " ".join(f"--config.{name}={size}" for name, size in changed.items())


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> None:
        asked = run_script.parse(argv, FLAGS)
        if asked.show != "run":
            return command.show(run_script.help_or_list(asked, __doc__, FLAGS))
        if not asked.values["to"]:
            raise UsageError(f"--to is missing: {FLAGS['to'].help}")
        folder = parse_path("to", asked.values["to"])
        more = write(asked, folder)
        command.show(f"wrote {asked.config.clients} shares to {folder}" + (f"; serve them with {more}" if more else ""))

    return command.exit_status(answer, run_script.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
