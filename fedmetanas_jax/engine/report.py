"""From a round's measurements to what is written: its record, the check that all of it is finite, the summary."""

import resource
import sys

import numpy as np

from fedmetanas_jax.core import Algorithm


class NonFiniteError(ArithmeticError):
    """A number became infinite or NaN. The message is one line for the user."""


def lines(
    metrics: dict, start: int, stop: int, seconds: float, phase: int, algorithm: Algorithm, bytes_a_client: dict
) -> list[dict]:
    """One record a round for rounds start + 1 .. stop; the leaves of metrics are [block, cohort] or [block]."""
    out = []
    for i in range(stop - start):
        row = {name: x[i] for name, x in metrics.items() if name not in ("client", "finite")}
        gradients = float(np.sum(row.pop("image_gradients")))
        line = {"round": start + i + 1, "phase": phase, "seconds": seconds}
        line |= {name: float(np.mean(x)) for name, x in row.items()}
        line |= {"cohort": metrics["client"][i].tolist(), "image_gradients": gradients}
        # A backward pass costs about two forward passes.
        line |= {"macs": 3 * algorithm.macs * gradients}
        line |= {name: n * len(metrics["client"][i]) for name, n in bytes_a_client.items()}
        out.append(line)
    return out


def check_finite(metrics: dict, start: int, stop: int, saved: list[int]) -> None:
    """NonFiniteError with round, client and quantity of the first number of rounds start + 1 .. stop that is none.

    `saved`: the rounds that have a checkpoint, newest first.
    """
    for i in range(stop - start):
        for place, client in enumerate(metrics["client"][i]):
            for name, x in metrics.items():
                value = x[i] if x.ndim == 1 else x[i, place]
                bad = not value if name == "finite" else not np.isfinite(value)
                if bad and (x.ndim == 2 or place == 0):
                    what = "its update (weights, statistics or alphas)" if name == "finite" else f"{name} = {value}"
                    kept = f"the checkpoint of round {saved[0]} is kept" if saved else "there is no checkpoint yet"
                    where = f"client {client}" if x.ndim == 2 else "the server"
                    raise NonFiniteError(f"round {start + i + 1}, {where}: {what} is not finite; {kept}")


def summarize(lines: list[dict]) -> dict:
    """The figures a run reports: last and best accuracies, seconds, memory (D-35: mean of the last 20 rounds)."""
    scored = [line for line in lines if "server_accuracy" in line]
    recent = [line["server_accuracy"] for line in scored if line["round"] > lines[-1]["round"] - 20]
    best = max(scored, key=lambda line: line["server_accuracy"])
    seconds = [line["seconds"] for line in lines]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    names = (
        "server_accuracy", "server_accuracy_discrete", "local_accuracy", "local_accuracy_adapted",
        "local_accuracy_by_depth",
    )  # fmt: skip
    return {
        "rounds": lines[-1]["round"],
        **{name: scored[-1][name] for name in names if name in scored[-1]},
        "server_accuracy_last_20_rounds": sum(recent) / len(recent),
        "server_accuracy_best": {"round": best["round"], "accuracy": best["server_accuracy"]},
        "seconds_in_rounds": sum(seconds),
        "seconds_a_round_median": float(np.median(seconds)),
        "seconds_compiling": sum(line.get("compile_seconds", 0.0) for line in lines),
        "image_gradients": sum(line["image_gradients"] for line in lines),
        "macs": sum(line["macs"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "host_memory_peak_bytes_of_this_process": peak,
    }
