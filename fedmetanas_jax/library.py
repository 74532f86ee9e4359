"""A whole run as one call, for notebooks and programs: arrays in, a network out."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedmetanas_jax import build
from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.config import Config, validate
from fedmetanas_jax.data import sources
from fedmetanas_jax.data.dataset import checked
from fedmetanas_jax.engine import records
from fedmetanas_jax.network import Network, load
from fedmetanas_jax.options import UsageError, default_options, nearest
from fedmetanas_jax.tasks import TASKS

NAME = "images"  # of the data set in a workdir
TEST_SHARE = 0.2  # of the images, where none are given to test with


class Found(NamedTuple):
    """What a finished run left."""

    workdir: Path
    result: dict  # result.json: accuracies as fractions of 1, costs
    records: list[dict]  # one a round
    network: Network | None  # that serves everybody; None of a method without one

    def __repr__(self) -> str:
        accuracy = self.result.get("server_accuracy")
        return f"Found({self.workdir}{'' if accuracy is None else f', server accuracy {accuracy:.3f}'})"


def search(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    test_images: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    label_names: tuple[str, ...] | None = None,
    task: str = "digits_dir01",
    method: str | None = None,
    options: dict[str, Any] | None = None,
    workdir: str | Path = "runs/search",
    **fields,
) -> Found:
    """Deals the images to clients and runs `method` on them; what was begun in `workdir` is gone on with.

    images uint8 [n, h, w, c], labels integers [n] from 0. Without test images a fifth of the images, drawn by the seed,
    is kept for that. task: whose Config is started from; fields: those of Config that differ (clients=20, rounds=30);
    options: the method's own knobs. Raises one of `build.FAILURES`: UsageError or DataError for what makes no sense,
    before anything is written; KeyboardInterrupt once the run is saved.
    """
    config = _config(task, method, options or {}, fields)
    if (test_images is None) != (test_labels is None):
        raise UsageError("test_images and test_labels belong together: give both, or neither")
    arrays = {name: np.asarray(x) for name, x in (("train_images", images), ("train_labels", labels))}
    if not (arrays["train_images"].ndim and arrays["train_labels"].ndim):
        raise UsageError("images are to be [n, h, w, c] and labels [n]")
    if len(arrays["train_images"]) != len(arrays["train_labels"]):
        raise UsageError(f"there are {len(images)} images, but {len(labels)} labels")
    if test_images is None:
        order = np.random.default_rng(config.seed).permutation(len(arrays["train_labels"]))
        kept, trained = np.split(order, [round(TEST_SHARE * len(order))])
        arrays |= {f"test_{name}": arrays[f"train_{name}"][kept] for name in ("images", "labels")}
        arrays |= {f"train_{name}": arrays[f"train_{name}"][trained] for name in ("images", "labels")}
    else:
        arrays |= {"test_images": np.asarray(test_images), "test_labels": np.asarray(test_labels)}
    if label_names is not None:
        arrays["label_names"] = np.array(label_names)
    checked("what was given", arrays, None)  # before it takes the place of anything
    workdir = Path(workdir)
    sources.write(workdir / "data" / f"{NAME}.npz", arrays)
    build.run(config, task=task, workdir=workdir, data_dir=workdir / "data", command="the same call")
    network = workdir / "network.npz"
    return Found(
        workdir,
        json.loads((workdir / "result.json").read_text()),
        records.read(workdir / records.RECORDS),
        load(network) if network.exists() else None,
    )


def _config(task: str, method: str | None, options: dict, fields: dict) -> Config:
    if task not in TASKS:
        raise UsageError(nearest("task", task, TASKS))
    known = [field.name for field in dataclasses.fields(Config) if field.name not in ("method", "options", "dataset")]
    if unknown := [name for name in fields if name not in known]:
        raise UsageError(nearest("config field", unknown[0], known))
    base = TASKS[task]()
    method = base.method if method is None else method
    if method not in ALGORITHMS:
        raise UsageError(nearest("method", method, ALGORITHMS))
    defaults = default_options(ALGORITHMS[method])
    if unknown := [name for name in options if name not in defaults]:
        raise UsageError(nearest(f"{method} option", unknown[0], defaults))
    of_task = base.options if method == base.method else {}
    config = dataclasses.replace(base, method=method, dataset=NAME, options=defaults | of_task | options, **fields)
    validate(config)
    return config
