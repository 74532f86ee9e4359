"""What is timed: cases (a network and an amount of work) and variants (who does it, and how); no JAX, no PyTorch.

A client's work is `tasks` tasks of M support steps and a query step, as Algorithm 1 has it; a gradient step is
one batch of one client forward and backward. With M = 0 a task is one gradient step.
"""

from itertools import combinations, product
from typing import Literal, NamedTuple

import numpy as np

OPS = 8
ROUND, ROUNDS = 100, 1000  # what is timed is past the warm-up: the logits move
# The schedule of fedmetanas that both sides compute: `torch_bench.rounds.rates_at` is the same in PyTorch.
SCHEDULE = {"alpha_lr": 3e-4, "alpha_weight_decay": 1e-3, "warmup": 0.05, "anneal": "linear", "temperature_until": 0.8}
FULL_ROUND = 45  # tasks of a client in the paper's round: 5 epochs of 600 // (2 * 32)


class Variant(NamedTuple):
    """Who computes, and how."""

    side: Literal["ours", "torch"]
    at_once: int = 1  # ours: clients computed together; torch has one after another
    way: Literal["scan", "side_by_side"] | None = None  # ours: how a cell is computed; None: as a run would choose
    channels_last: bool = False  # torch
    compiled: bool = False  # torch.compile

    @property
    def label(self) -> str:
        """As the table has it: "torch compiled, channels_last"."""
        if self.side == "ours":
            return f"ours, at_once={self.at_once}" + ("" if self.way is None else f", {self.way}")
        return f"torch {'compiled' if self.compiled else 'eager'}, {'channels_last' if self.channels_last else 'NCHW'}"


class Case(NamedTuple):
    """One amount of work that all its variants do in turn."""

    name: str
    clients: int  # K, in one round
    tasks: int  # of each client, as timed
    round_tasks: int  # of each client in a whole round; equal to `tasks`: the round itself is timed
    variants: tuple[Variant, ...]
    M: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    plan: Literal["full", "terminal"] = "full"  # terminal: one pair a node and one operation an edge
    batch: int = 32
    width: int = 16
    cells: int = 8
    nodes: int = 4
    image: tuple[int, int, int] = (32, 32, 3)
    classes: int = 10
    repeats: int = 5

    @property
    def steps(self) -> int:
        """Gradient steps of one timing, all clients together."""
        return self.clients * self.tasks * (self.M + 1)

    def work(self) -> dict:
        """Everything but the variants and how often it is repeated: what makes two timings comparable."""
        return {k: v for k, v in self._asdict().items() if k not in ("variants", "repeats")}


def plan_and_mask(case: Case, seed: int) -> tuple[list, np.ndarray, np.ndarray]:
    """(plan [2][edges] of operations, op mask [2, edges, OPS], pair mask [2, pairs]) of the case.

    A terminal plan is drawn: a pair for each node and one of the operations but `none` for each of its edges.
    ValueError for another plan.
    """
    if case.plan not in ("full", "terminal"):
        raise ValueError(f"no plan {case.plan!r}; there are full and terminal")
    rng, first = np.random.default_rng(seed), [j * (j + 3) // 2 for j in range(case.nodes + 1)]
    op = np.full((2, first[-1], OPS), case.plan == "full")
    for kind, j in product(range(2), range(case.nodes)):
        op[kind, first[j] + rng.choice(j + 2, 2, replace=False), rng.integers(1, OPS, 2)] = True
    pairs = [(first[j] + a, first[j] + b) for j in range(case.nodes) for a, b in combinations(range(j + 2), 2)]
    pair = np.stack([op[:, a].any(-1) & op[:, b].any(-1) for a, b in pairs], axis=1)
    return [[np.flatnonzero(edge).tolist() for edge in cell] for cell in op], op, pair


def images(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random (image [K, n, h, w, c] uint8, label [K, n] int32), n = the rows of `tasks` tasks."""
    rng, n = np.random.default_rng(seed), case.tasks * 2 * case.batch
    image = rng.integers(0, 256, (case.clients, n, *case.image), dtype=np.uint8)
    return image, rng.integers(0, case.classes, (case.clients, n), dtype=np.int32)


OURS, EAGER, NCHW = Variant("ours"), Variant("torch", channels_last=True), Variant("torch")
COMPILED = EAGER._replace(compiled=True)


def quick() -> list[Case]:
    """For two CPU cores: a gradient step of the paper's supernet, and whole rounds of the task cifar10_small."""
    small = {"width": 12, "cells": 3, "nodes": 2, "batch": 16}
    return [
        Case("supernet step", 1, 1, 2 * FULL_ROUND, (OURS, EAGER), M=0, repeats=2),
        Case("round of cifar10_small", 6, 18, 18, (OURS, EAGER), repeats=1, **small),
        # For these the time may not suffice; the same command again goes on with them.
        Case("pruned round of cifar10_small", 6, 18, 18, (OURS, EAGER), plan="terminal", repeats=2, **small),
        Case("supernet step in NCHW", 1, 1, 2 * FULL_ROUND, (NCHW,), M=0, repeats=2),
    ]


def gpu() -> list[Case]:
    """For one GPU: the paper's round in every way, what matters most first; a second call goes on."""
    ours, how = OURS._replace(at_once=5), {"dtype": "bfloat16", "repeats": 3}
    cases = [
        Case(f"three tasks, {plan}", 5, 3, FULL_ROUND, (ours, EAGER), plan=plan, **how) for plan in ("full", "terminal")
    ]
    cases.append(Case("whole round", 5, FULL_ROUND, FULL_ROUND, (ours, EAGER, COMPILED), **how))
    for clients, plan, dtype in product((5, 1, 20, 100), ("full", "terminal"), ("bfloat16", "float32")):
        variants = tuple(OURS._replace(at_once=n) for n in dict.fromkeys((clients, 1)))
        if clients == 5 and plan == "full":
            variants += tuple(OURS._replace(at_once=5, way=way) for way in ("side_by_side", "scan"))
        variants += (EAGER, NCHW, COMPILED) if clients == 5 else (EAGER,)
        tasks, repeats = (9, 5) if clients <= 5 else (1, 3)  # an epoch of a few clients, a task of many
        how = {"dtype": dtype, "plan": plan, "repeats": repeats}
        cases.append(Case(f"{plan} {dtype} K={clients}", clients, tasks, FULL_ROUND, variants, **how))
    return cases


def tiny() -> list[Case]:
    """Seconds on any machine: shows that the command works, and times nothing worth knowing."""
    size = {"width": 4, "cells": 1, "nodes": 1, "batch": 2, "image": (8, 8, 3), "repeats": 2}
    return [
        Case("tiny round", 2, 1, 1, (OURS, OURS._replace(at_once=2), EAGER, NCHW), **size),
        Case("tiny bfloat16", 1, 1, 3, (OURS, EAGER), dtype="bfloat16", plan="terminal", **size),
    ]


SWEEPS = {"quick": quick, "gpu": gpu, "tiny": tiny}
