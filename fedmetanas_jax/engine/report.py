"""From a round's measurements to what is written: its record, the check that all of it is finite, the summary."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

try:
    import resource
except ImportError:  # Windows
    resource = None

from fedmetanas_jax.core import Algorithm, Tree
from fedmetanas_jax.engine import records


class NonFiniteError(ArithmeticError):
    """A number became infinite or NaN. The message is one line for the user."""


def lines(metrics: dict, start: int, stop: int, seconds: float, phase: int, algorithm: Algorithm) -> list[dict]:
    """One record a round for rounds start + 1 .. stop; the leaves of metrics are [block, cohort] or [block].

    What clients measured is averaged over those whose reply is finite; the others are named, "dropped". A client's
    losses and accuracies are means over its training images, so they weigh by how many those are; all else evenly.
    """
    out = []
    for i in range(stop - start):
        row = {name: x[i] for name, x in metrics.items() if name not in ("client", "rows", "finite")}
        clients, finite = metrics["client"][i], metrics["finite"][i]
        sums = {name: int(np.sum(row.pop(name), dtype=np.int64)) for name in ("bytes_up", "bytes_down")}
        gradients = float(np.sum(row.pop("image_gradients")[finite]))
        # A backward pass costs about two forward passes.
        macs = float(np.sum(row.pop("macs")[finite])) if "macs" in row else 3 * algorithm.macs * gradients
        line = {"round": start + i + 1, "phase": phase, "seconds": seconds}
        heard = {name: x[finite] if x.ndim else x for name, x in row.items()}
        line |= {name: _mean(name, x, metrics["rows"][i][finite]) for name, x in heard.items() if x.size}
        line |= {"cohort": clients.tolist(), "image_gradients": gradients, "macs": macs} | sums
        if not all(finite):
            line["dropped"] = clients[~finite].tolist()
        out.append(line)
    return out


def _mean(name: str, values: np.ndarray, rows: np.ndarray) -> float:
    return float(np.average(values, weights=rows) if values.ndim and of_images(name) else np.mean(values))


def of_images(name: str) -> bool:
    """Whether what a client measures under this name is a mean over its training images."""
    return name.endswith(("loss", "accuracy"))


def check_finite(metrics: dict, start: int, stop: int, saved: list[int], lost: int, allowed: int) -> int:
    """The replies that were not finite, in the run up to round `stop`; `lost` of them before round start + 1.

    NonFiniteError with round, client and quantity of the first one beyond `allowed`, or of a server's number.
    `saved`: the rounds that have a checkpoint, newest first.
    """
    kept = _kept(saved)
    for i in range(stop - start):
        where = f"round {start + i + 1}"
        for place, client in enumerate(metrics["client"][i]):
            if metrics["finite"][i, place]:
                continue
            lost += 1
            if lost > allowed:
                bad = [name for name, x in metrics.items() if x.ndim == 2 and not np.isfinite(x[i, place])]
                what = f"{bad[0]} = {metrics[bad[0]][i, place]}" if bad else "its reply (weights, statistics or alphas)"
                more = f"; {allowed} such replies may be left out in a run (config.aggregate)" if allowed else ""
                raise NonFiniteError(f"{where}, client {client}: {what} is not finite{more}; {kept}")
        for name, x in metrics.items():
            if x.ndim == 1 and not np.isfinite(x[i]):
                raise NonFiniteError(f"{where}, the server: {name} = {x[i]} is not finite; {kept}")
    return lost


def check_server(server: Tree, done: int, saved: list[int]) -> None:
    """NonFiniteError unless every number of the server's state after round `done` is finite.

    Clients' metrics need not show it: a network may be spoilt by the last step that they took. Looked at on the host,
    where a checkpoint needs the numbers anyway, so that nothing has to be compiled.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(server):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.all(np.isfinite(np.asarray(leaf))):
            name = jax.tree_util.keystr(path)
            raise NonFiniteError(f"round {done}, the server: its state{name} is not finite; {_kept(saved)}")


def _kept(saved: list[int]) -> str:
    """What is left, and how to go on: the same config would come to the same number again."""
    if saved:
        return f"the checkpoint of round {saved[0]} is kept; a lower rate (config.lr) needs another workdir"
    return "there is no checkpoint yet, so a lower rate (config.lr) can be tried in the same workdir"


ACCURACIES = (
    "server_accuracy", "server_accuracy_discrete", "server_accuracy_discrete_running",
    "server_accuracy_discrete_recalibrated", "local_accuracy", "local_accuracy_adapted", "local_accuracy_by_depth",
)  # fmt: skip


def summarize(lines: list[dict]) -> dict:
    """The figures a run reports: last and best accuracies, seconds, memory (D-35: mean of the last 20 rounds).

    Server accuracies are absent where a method has no network that serves everybody. Where a phase started anew
    (`Phase.ends`) accuracies are of what it trained; those of what came before are in a dict of their own.
    """
    seconds = [line["seconds"] for line in lines]
    peak = {}
    if resource is not None:
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = {"host_memory_peak_bytes_of_this_process": largest}
    ended, begun = {}, 0
    for n, line in enumerate(lines, 1):
        if "ended" in line:
            ended[line["ended"]], begun = _accuracies(lines[begun:n]), n
    return {
        **_accuracies(lines[begun:]),
        **ended,
        **{name: lines[-1][name] for name in ("epsilon", "delta") if name in lines[-1]},
        "seconds_in_rounds": sum(seconds),
        "seconds_a_round_median": float(np.median(seconds)),
        "seconds_compiling": sum(line.get("compile_seconds", 0.0) for line in lines),
        "replies_dropped": sum(len(line.get("dropped", ())) for line in lines),
        "image_gradients": sum(line["image_gradients"] for line in lines),
        "macs": sum(line["macs"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        **peak,
        "records_sha256": records.digest(lines),
    }


def _accuracies(lines: list[dict]) -> dict:
    """Of the rounds of one training: how many rounds there had been by its end, last and best accuracies."""
    scored = [line for line in lines if "server_accuracy" in line]
    recent = [line["server_accuracy"] for line in scored if line["round"] > lines[-1]["round"] - 20]
    figures = {"rounds": lines[-1]["round"]}
    for line in lines:
        figures |= {name: line[name] for name in ACCURACIES if name in line}  # the last one stays
    if scored:
        best = max(scored, key=lambda line: line["server_accuracy"])
        figures["server_accuracy_last_20_rounds"] = sum(recent) / len(recent)
        figures["server_accuracy_best"] = {"round": best["round"], "accuracy": best["server_accuracy"]}
    return figures
