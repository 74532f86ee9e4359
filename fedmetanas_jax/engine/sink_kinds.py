"""The sinks there are: TensorBoard, Weights & Biases, MLflow, each as three functions. Imports none of them at once.

What runs them, and is safe from them, is in sinks.py.
"""

import importlib
import math
import os
import time
import uuid
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from fedmetanas_jax.files import to_json
from fedmetanas_jax.options import brief

PROJECT = "fedmetanas_jax"  # what W&B calls a project and MLflow an experiment
DEAF = ("offline", "disabled", "dryrun")  # values of WANDB_MODE that need no key
MOST_PARAMETERS = 100  # of one call; MLflow takes no more


class SinkError(Exception):
    """A sink that was asked for is not to be had. The message is one line for the user."""


class Run(NamedTuple):
    """What a sink is told of the run."""

    name: str
    config: dict  # JSON
    workdir: Path


class Sink(NamedTuple):
    """One place to send a run to. Its functions are called in this order, all from one thread, and may raise."""

    begin: Callable[[str | None, int], tuple[str, str]]  # (its id, None: a new one; the round to come) -> id, where
    record: Callable[[int, dict[str, float]], None]  # a round's numbers
    end: Callable[[dict | None], None]  # the summary; None of a run that stopped before its end


def numbers(record: dict, prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record, those of dicts in it as NAME/KEY; what is text or a list stays out."""
    found = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            found[prefix + name] = float(value)
    return found


def one_line(error: Exception) -> str:
    """What an error of somebody else's says, as much of it as fits."""
    return brief(" ".join(str(error).split()), 200)


def _imported(sink: str, module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == sink:
            raise SinkError(f"--sinks={sink} needs the package {sink}: pip install 'fedmetanas_jax[{sink}]'") from None
        why = error
    except Exception as error:  # such as packages that do not suit each other
        why = error
    raise SinkError(f"--sinks={sink}: the package {sink} cannot be imported ({one_line(why)})") from why


def _tensorboard(run: Run) -> Sink:
    """Event files, written by TensorBoard's own writer, which needs no TensorFlow: who wants to see them has it."""
    writers = _imported("tensorboard", "tensorboard.summary.writer.event_file_writer")
    events, summaries, tensors, types = (
        _imported("tensorboard", f"tensorboard.compat.proto.{name}_pb2")
        for name in ("event", "summary", "tensor", "types")
    )
    folder, made = run.workdir / "tensorboard", []

    def write(step: int, **content) -> None:
        made[0].add_event(events.Event(step=step, wall_time=time.time(), **content))
        made[0].flush()  # so that what was noted as sent is in the file

    def text(step: int, tag: str, value: dict) -> None:
        plugin = summaries.SummaryMetadata(
            plugin_data=summaries.SummaryMetadata.PluginData(plugin_name="text"), data_class=2
        )
        fenced = f"```\n{to_json(value, 2)}\n```".encode()
        tensor = tensors.TensorProto(dtype=types.DT_STRING, string_val=[fenced])
        write(step, summary=summaries.Summary(value=[summaries.Summary.Value(tag=tag, metadata=plugin, tensor=tensor)]))

    def begin(known: str | None, start: int) -> tuple[str, str]:
        made.append(writers.EventFileWriter(str(folder)))
        # TensorBoard then forgets this round and later ones in the files before.
        write(start, session_log=events.SessionLog(status=events.SessionLog.START))
        text(start, "config", run.config)
        return known or run.name, f"tensorboard --logdir={folder}"

    def record(number: int, found: dict[str, float]) -> None:
        values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in found.items()]
        write(number, summary=summaries.Summary(value=values))

    def end(summary: dict | None) -> None:
        if summary is not None:
            text(summary.get("rounds", 0), "result", summary)
        made[0].close()

    return Sink(begin, record, end)


def _wandb(run: Run) -> Sink:
    """A run of Weights & Biases, resumed by the id that the workdir keeps; its own files are in WORKDIR/wandb."""
    wandb = _imported("wandb", "wandb")
    deaf = os.environ.get("WANDB_MODE") in DEAF
    if not deaf and not wandb.api.api_key:
        raise SinkError(
            "--sinks=wandb: there is no key for W&B: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
        )
    made = []

    def begin(known: str | None, start: int) -> tuple[str, str]:
        # Not derived from the workdir's path, where another run may have been before.
        identity = known or uuid.uuid4().hex[:12]
        project = {} if os.environ.get("WANDB_PROJECT") else {"project": PROJECT}
        settings = wandb.Settings(silent=True, console="off")  # it would write through the bar, and copy it
        about = {"name": run.name, "config": run.config, "dir": str(run.workdir), "settings": settings}
        made.append(wandb.init(id=identity, resume="allow", allow_val_change=True, **project, **about))
        return identity, f"run {identity}, {os.environ['WANDB_MODE']}" if deaf else str(made[0].url)

    def record(number: int, found: dict[str, float]) -> None:
        made[0].log(found, step=number)

    def end(summary: dict | None) -> None:
        if summary is not None:
            made[0].summary.update(numbers(summary))
        made[0].finish(exit_code=int(summary is None))

    return Sink(begin, record, end)


def _mlflow(run: Run) -> Sink:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; through its client, which has no state of the process."""
    mlflow = _imported("mlflow", "mlflow")
    entities = _imported("mlflow", "mlflow.entities")
    made = []
    try:
        client = mlflow.MlflowClient()
    except Exception as error:
        raise SinkError(f"--sinks=mlflow: {one_line(error)}") from error

    def begin(known: str | None, start: int) -> tuple[str, str]:
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            experiment = client.get_experiment_by_name(name)
            place = client.create_experiment(name) if experiment is None else experiment.experiment_id
            made.append(client.create_run(place, run_name=run.name).info.run_id)
            flat = run.config | {f"options.{key}": value for key, value in run.config.get("options", {}).items()}
            pairs = [entities.Param(key, brief(value, 400)) for key, value in flat.items() if key != "options"]
            for first in range(0, len(pairs), MOST_PARAMETERS):
                client.log_batch(made[0], params=pairs[first : first + MOST_PARAMETERS])
        else:
            made.append(known)
            client.update_run(known, status="RUNNING")
        return made[0], f"run {made[0]} in {mlflow.get_tracking_uri()}"

    def record(number: int, found: dict[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [entities.Metric(name, value, now, number) for name, value in found.items()]
        client.log_batch(made[0], metrics=metrics)

    def end(summary: dict | None) -> None:
        if summary is not None:
            record(int(summary.get("rounds", 0)), numbers(summary, "result/"))
        client.set_terminated(made[0], status="KILLED" if summary is None else "FINISHED")

    return Sink(begin, record, end)


KINDS: dict[str, Callable[[Run], Sink]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
