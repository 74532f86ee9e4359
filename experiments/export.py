"""A finished run's network in the formats of others, each read back and compared with it.

    python experiments/export.py runs/digits_dir01-fedmetanas                     # all formats, beside network.npz
    python experiments/export.py runs/mine --to=onnx,pytorch --out=exported

onnx         network.onnx, for ONNX Runtime and whatever else reads it
stablehlo    network.stablehlo, a `jax.export` for any number of images
safetensors  network.safetensors, the arrays of network.npz with the architecture as metadata
pytorch      network_pytorch.py, a module written out that needs torch alone, and network_pytorch.pt, its weights

Every one takes images as `predict` does, uint8 [n, h, w, c] from 0 to 255, and normalises them itself. Leaves
export.json, too: for each format the largest difference of a logit over all test images of the run's data set, how many
labels are equal, bytes, and the milliseconds that one image takes. What the formats need: pip install '.[export]', for
pytorch '.[bench]'. Exit status as main.py's; 1 as well where a package is missing or a label differs.
"""

import importlib.util
import json
import shlex
import sys
from functools import partial
from pathlib import Path

from fedmetanas_jax import command
from fedmetanas_jax.command import Flag
from fedmetanas_jax.files import write_json
from fedmetanas_jax.main import failures
from fedmetanas_jax.options import UsageError, nearest, parse_path

# (the module of `exports`, the packages it needs, the extra that brings them) of every format.
FORMATS = {
    "onnx": ("onnx_file", ("onnx", "onnxruntime"), "export"),
    "stablehlo": ("stablehlo", ("flatbuffers",), "export"),
    "safetensors": ("safetensors_file", ("safetensors",), "export"),
    "pytorch": ("pytorch_file", ("torch",), "bench"),
}
FLAGS = {
    "run": Flag(str, None, "the workdir of a finished run; may also be the first argument, without --run="),
    "to": Flag(tuple[str, ...], tuple(FORMATS), "formats, separated by commas"),
    "out": Flag(str, None, "the folder that everything is written to; default RUN"),
    "data_dir": Flag(str, None, "where NAME.npz are; else $FEDMETANAS_DATA, else ~/.cache/fedmetanas_jax/data"),
    "help": command.HELP,
}
say = partial(print, flush=True)


class ExportError(ValueError):
    """An export that cannot be made, or is not the network; the message is one line."""


def parse(argv: list[str]) -> dict:
    """FLAGS as values; argv[0] is the program. UsageError for what makes no sense."""
    asked = command.read(command.named(argv, "run"), FLAGS)
    if asked["help"]:
        return asked
    if not asked["run"]:
        raise UsageError("which run? export.py RUN, the workdir of a finished one")
    for name in asked["to"]:
        if name not in FORMATS:
            raise UsageError(nearest("format", name, FORMATS))
    if not asked["to"]:
        raise UsageError(f"--to names no format; there are {', '.join(FORMATS)}")
    run = parse_path("run", asked["run"])
    out = parse_path("out", asked["out"]) if asked["out"] else run
    return asked | {"run": run, "out": out, "to": tuple(dict.fromkeys(asked["to"]))}


def check_packages(names: tuple[str, ...]) -> None:
    """ExportError that names what the formats need and is not there, and the command that brings it."""
    lacking = {name: [x for x in FORMATS[name][1] if importlib.util.find_spec(x) is None] for name in names}
    lacking = {name: packages for name, packages in lacking.items() if packages}
    if lacking:
        extras = ",".join(dict.fromkeys(FORMATS[name][2] for name in lacking))
        said = ", ".join(f"{name} needs {' and '.join(packages)}" for name, packages in lacking.items())
        raise ExportError(f"{said}: pip install '.[{extras}]'")


def dataset_of(run: Path) -> str:
    """The name of the data set that the run was of. UsageError where there is no run."""
    try:
        return json.loads((run / "config.json").read_text())["config"]["dataset"]
    except FileNotFoundError:
        raise UsageError(f"{run} holds no run: there is no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run / 'config.json'} cannot be read: {error}") from None


def export(asked: dict, argv: list[str]) -> None:
    """Writes, reads and compares each format, then export.json. ExportError, and what `failures` has."""
    check_packages(asked["to"])
    dataset = dataset_of(asked["run"])
    from exports import check, networks

    from fedmetanas_jax import network
    from fedmetanas_jax.data import sources
    from fedmetanas_jax.engine.records import versions

    net = network.load(asked["run"] / "network.npz")
    images = sources.load(dataset, sources.data_dir(asked["data_dir"])).test_images
    expected, latency = check.answers(net, images)
    steps, figures = networks.steps(net), {}
    document = {
        "command": shlex.join(["python", "experiments/export.py", *argv[1:]]),
        "dataset": dataset,
        "input": {"dtype": "uint8", "shape": ["n", *net.header["arguments"]["shape"]], "normalised": "inside"},
        "network": {"kind": net.header["kind"], "versions": versions()} | latency,
        "formats": figures,
    }
    for name in asked["to"]:
        form = importlib.import_module(f"exports.{FORMATS[name][0]}")
        files = form.write(net, steps, asked["out"])
        figures[name] = check.compare(net, form.read(files), expected, images, files) | {"runtime": form.runtime()}
    write_json(asked["out"] / "export.json", document)
    median, least = latency.values()
    say(f"{check.table(figures)}\nnetwork.npz itself takes {median:.2f} ms for one image, at least {least:.2f}")
    say(f"all of it is in {asked['out']}")
    wrong = [name for name, one in figures.items() if one["labels_equal"] < one["images"]]
    if wrong:
        raise ExportError(f"labels of {', '.join(wrong)} differ from the network's; see {asked['out'] / 'export.json'}")


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    return command.run(argv, parse, export, __doc__, FLAGS, lambda: (*failures(), ExportError))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
