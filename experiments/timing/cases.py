"""What is timed: cases (a network and an amount of work) and variants (who does it, and how).

A client's work is `tasks` tasks of M support steps and a query step, as Algorithm 1 has it; a gradient step is
one batch of one client forward and backward. With M = 0 a task is one gradient step. Imports neither JAX nor
PyTorch.
"""

from itertools import combinations
from typing import NamedTuple

import numpy as np

OPS = 8
ROUND, ROUNDS = 100, 1000  # what is timed is past the warm-up: the logits move
FULL_ROUND = 45  # tasks of a client in the paper's round: 5 epochs of 600 // (2 * 32)


class Variant(NamedTuple):
    """Who computes, and how."""

    side: str  # "ours" or "torch"
    at_once: int = 1  # ours: clients computed together; torch has one after another
    channels_last: bool = False
    compiled: bool = False  # torch.compile
    way: str = "remat"  # ours: how the gradient is computed, one of fedmetanas_jax.networks.WAYS

    @property
    def label(self) -> str:
        """As the table has it: "torch compiled, channels_last"."""
        if self.side == "ours":
            return f"ours, at_once={self.at_once}" + ("" if self.way == "remat" else f", {self.way}")
        return f"torch {'compiled' if self.compiled else 'eager'}, {'channels_last' if self.channels_last else 'NCHW'}"


class Case(NamedTuple):
    """One amount of work that all its variants do in turn."""

    name: str
    clients: int  # K, in one round
    tasks: int  # of each client, as timed
    round_tasks: int  # of each client in a whole round; equal to `tasks`: the round itself is timed
    variants: tuple[Variant, ...]
    M: int = 1
    dtype: str = "float32"  # or "bfloat16"
    plan: str = "full"  # or "terminal": one pair a node and one operation an edge
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
    nodes, rng = case.nodes, np.random.default_rng(seed)
    pairs = [(j, two) for j in range(nodes) for two in combinations(range(j + 2), 2)]
    edges = nodes * (nodes + 3) // 2
    if case.plan == "full":
        return [[list(range(OPS))] * edges] * 2, np.ones((2, edges, OPS), bool), np.ones((2, len(pairs)), bool)
    if case.plan != "terminal":
        raise ValueError(f"no plan {case.plan!r}; there are full and terminal")
    op, pair = np.zeros((2, edges, OPS), bool), np.zeros((2, len(pairs)), bool)
    for kind in range(2):
        for j in range(nodes):
            mine = [p for p, (node, _) in enumerate(pairs) if node == j]
            chosen = int(rng.choice(mine))
            pair[kind, chosen] = True
            for i in pairs[chosen][1]:
                op[kind, j * (j + 3) // 2 + i, rng.integers(1, OPS)] = True
    return [[np.flatnonzero(edge).tolist() for edge in cell] for cell in op], op, pair


def images(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random (image [K, n, h, w, c] uint8, label [K, n] int32), n = the rows of `tasks` tasks."""
    rng = np.random.default_rng(seed)
    n = case.tasks * 2 * case.batch
    image = rng.integers(0, 256, (case.clients, n, *case.image), dtype=np.uint8)
    return image, rng.integers(0, case.classes, (case.clients, n), dtype=np.int32)


EAGER = (Variant("torch", channels_last=True), Variant("torch"))


def quick() -> list[Case]:
    """For two CPU cores: a gradient step of the paper's supernet, and whole rounds of the task cifar10_small."""
    small, pruned = {"width": 12, "cells": 3, "nodes": 2, "batch": 16}, Variant("ours", way="batched")
    return [
        Case("supernet step", 1, 1, 2 * FULL_ROUND, (Variant("ours"), EAGER[0]), M=0, repeats=2),
        Case("round of cifar10_small", 6, 18, 18, (Variant("ours"), EAGER[0]), repeats=1, **small),
        # For these the time may not suffice; the same command again goes on with them.
        Case("pruned round of cifar10_small", 6, 18, 18, (pruned, EAGER[0]), plan="terminal", repeats=2, **small),
        Case("supernet step in NCHW", 1, 1, 2 * FULL_ROUND, (EAGER[1],), M=0, repeats=2),
    ]


def gpu() -> list[Case]:
    """For one GPU: the paper's round in every way, what matters most first; a second call goes on."""
    compiled = Variant("torch", channels_last=True, compiled=True)
    cases = []
    for plan in ("full", "terminal"):
        for dtype in ("bfloat16", "float32"):
            for clients in (5, 1, 20, 100):
                ours = tuple(Variant("ours", at_once, way="batched") for at_once in dict.fromkeys((clients, 1)))
                few = clients <= 5
                if clients == 5 and plan == "full":
                    ours += tuple(Variant("ours", clients, way=way) for way in ("batched-remat", "remat"))
                tasks = 9 if few else 1  # an epoch of a few clients, a task of many
                torch = (*EAGER, compiled) if clients == 5 else EAGER[:1]
                name = f"{plan} {dtype} K={clients}"
                how = {"dtype": dtype, "plan": plan, "repeats": 5 if few else 3}
                cases.append(Case(name, clients, tasks, FULL_ROUND, ours + torch, **how))
    order = {5: 0, 1: 1, 20: 2, 100: 3}
    batched = Variant("ours", 5, way="batched")
    whole = Case("whole round", 5, FULL_ROUND, FULL_ROUND, (batched, EAGER[0], compiled), dtype="bfloat16", repeats=2)
    # Last, since its kernels compile for many minutes where there are few cores.
    pallas = Case("Pallas kernels", 5, 9, FULL_ROUND, (batched, batched._replace(way="pallas")), dtype="bfloat16")
    return [whole, *sorted(cases, key=lambda case: order[case.clients]), pallas]


def tiny() -> list[Case]:
    """Seconds on any machine: shows that the command works, and times nothing worth knowing."""
    size = {"width": 4, "cells": 1, "nodes": 1, "batch": 2, "image": (8, 8, 3), "repeats": 2}
    every = (Variant("ours", 1), Variant("ours", 2), *EAGER)
    return [
        Case("tiny round", 2, 1, 1, every, **size),
        Case("tiny bfloat16", 1, 1, 3, (Variant("ours"), EAGER[0]), dtype="bfloat16", plan="terminal", **size),
    ]


SWEEPS = {"quick": quick, "gpu": gpu, "tiny": tiny}
