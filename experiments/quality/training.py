"""Networks of one search space, each trained from scratch by FedAvg in the federation of a finished search.

A program trains any networks whose operations it has: of which of them a network consists, and in how many rounds its
learning rate falls, are values. So several networks can be trained side by side, in one vmap, and federations of other
seeds share the program. On a CPU a network is best trained alone, by the program of its own operations
(docs/formulations.md).
"""

import dataclasses
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import build, tree
from fedmetanas_jax.algorithms.fedrandom import fedrandom
from fedmetanas_jax.config import Config, validate
from fedmetanas_jax.core import Algorithm, FederatedData, Plan, Reply, RoundState, SearchSpace, Setting, Tree
from fedmetanas_jax.data import sources
from fedmetanas_jax.data.augment import augmenter
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.engine.programs import Programs
from fedmetanas_jax.engine.round import cohort, init_state, make_round, map_some, stream_key
from fedmetanas_jax.nas import mask as masks

BLOCK = 10  # rounds in one dispatch
AT_A_TIME = 128  # rounds whose cohorts are drawn together
PASSES = 3  # of a forward pass's multiply-adds in an image-gradient, as the records count them


class Federation(NamedTuple):
    """What a search was run in, on one device, and what networks begin with in it."""

    space: SearchSpace
    setting: Setting
    conduct: Conduct
    data: FederatedData
    start: RoundState  # of the whole supernet; a network takes what it has of it


def federation(config: Config, data_dir: str | None) -> Federation:
    """That of a run of `config`, on one device. Raises as `build.run`.

    The initial weights are those of a phase after the search, not the ones that the search began with: what it found
    might suit these better than others.
    """
    config = dataclasses.replace(config, method="fedrandom", options={}, devices=1)
    validate(config)
    build.prepare_jax(config)
    dataset = sources.load(config.dataset, sources.data_dir(data_dir))
    space = build.make_phases(config, dataset)[1].space
    mean, _ = sources.mean_std(config.dataset, dataset)
    setting = build.make_setting(config, augmenter(config.augment, mean=mean), searching=True)
    data = build.federate(config, dataset, build.deal(config, dataset, 1))
    whole = fedrandom(space, setting)[0].make(masks.full_plan(space.graph))
    start = init_state(whole, config.seed, config.clients)
    server, _ = jax.jit(whole.init)(stream_key(config.seed, "phase", 1))
    return Federation(space, setting, build.make_conduct(config), data, start._replace(server=server))


@partial(jax.jit, static_argnums=(2, 3))
def cohorts(seed, first, clients: int, size: int) -> jax.Array:
    """[AT_A_TIME, size]: the clients of as many rounds from the first one on."""
    return jax.vmap(lambda r: cohort(seed, first + r, clients, size))(jnp.arange(AT_A_TIME))


def rounds_within(where: Federation, plan: Plan, budget: float) -> int:
    """The rounds, at least 1, after which training the plan's network has cost as nearly `budget` multiply-adds as can
    be. In FedAvg a client sees all its images in every epoch."""
    conduct, sizes, spent = where.conduct, np.asarray(where.data.train_size), np.zeros(1)
    of_an_image = PASSES * where.space.make(plan).macs * conduct.epochs
    while spent[-1] < budget:
        chosen = cohorts(where.start.seed, len(spent) - 1, conduct.clients, conduct.cohort)
        more = of_an_image * np.cumsum(sizes[np.asarray(chosen)].sum(1), dtype=float)
        spent = np.concatenate([spent, spent[-1] + more])
    return 1 + int(np.argmin(abs(spent[1:] - budget)))


def together(plans: list[Plan]) -> Plan:
    """The operations that any of the plans has."""
    cells = zip(*plans, strict=True)
    return [[sorted(set().union(*ops)) for ops in zip(*same, strict=True)] for same in cells]


def present(space: SearchSpace, whole: Tree, program: Plan, plan: Plan) -> Tree:
    """Whether the rows of the program's weights (or statistics) belong to the plan: leaves [rows, 1, ...] bool."""
    rows = jax.tree.map(lambda x: np.arange(len(x)), whole)
    kept = dict(jax.tree_util.tree_leaves_with_path(space.carry_over(rows, program, plan)))

    def leaf(path, x):
        return np.isin(np.arange(len(x)), kept.get(path, [])).reshape(-1, *[1] * (x.ndim - 1))

    return jax.tree_util.tree_map_with_path(leaf, whole)


def holding(algorithm: Algorithm, here: dict[str, Tree]) -> Algorithm:
    """The algorithm, in which what is absent never changes: its gradient is 0, but weight decay would move it."""

    def client_update(message, own, data, key) -> Reply:
        reply = algorithm.client_update(message, own, data, key)
        held = {
            part: jax.tree.map(lambda keep, x: jnp.where(keep, x, 0), here[part], reply.change[part]) for part in here
        }
        return reply._replace(change=reply.change | held)

    return algorithm._replace(client_update=client_update)


class Program:
    """Trains `count` networks side by side, whose operations are among those of `plan`."""

    def __init__(self, where: Federation, plan: Plan, count: int):
        self.plan, self.compiled, self.form = plan, None, None
        self.algorithm = fedrandom(where.space, where.setting)[0].make(plan)
        conduct = where.conduct
        how = {"cohort_size": conduct.cohort, "at_once": max(conduct.at_once, 0), "aggregate": conduct.aggregate}

        def step(states: RoundState, here: dict, rounds, data: FederatedData):
            """At most BLOCK rounds of every network that is not finished; leaves [count, ...]."""

            def one(x):
                state, here, rounds = x
                algorithm = fedrandom(where.space, where.setting._replace(rounds=rounds))[0].make(plan)
                return make_round(holding(algorithm, here), block=BLOCK, **how)(state, data, rounds)

            return map_some(one, (states, here, rounds), 0 if count > 1 else 1)

        self.step = jax.jit(step, donate_argnums=0)

    def train(self, where: Federation, plans: list[Plan], rounds: list[int]) -> list[dict]:
        """The figures of each network after so many rounds."""
        states, measured = self.run(where, plans, rounds)
        programs = Programs(self.algorithm, where.conduct, where.data, None, False, 0, lambda text: None)
        found = []
        for n, plan in enumerate(plans):
            state, macs = tree.take(states, n), where.space.make(plan).macs
            server, local, loss = programs.accuracies(programs.global_model(state.server), state)
            figures = {"rounds": rounds[n], "macs_of_an_image": macs}
            figures["macs"] = PASSES * macs * measured[n]["image_gradients"]
            figures |= {"server_accuracy": server, "local_accuracy": local, "server_loss": loss}
            found.append(figures | measured[n])
        return found

    def run(self, where: Federation, plans: list[Plan], rounds: list[int]) -> tuple[RoundState, list[dict]]:
        """Where each network is after so many rounds, leaves [count, ...] in the form of the program's plan, and what
        was measured on the way."""
        states, here = jax.tree.map(lambda *x: jnp.stack(x), *[self.begin(where, plan) for plan in plans])
        limit, done = np.array(rounds, np.int32), np.zeros(len(plans), np.int32)
        given = here, jnp.asarray(limit), where.data
        clock = time.perf_counter()
        if self.form != tree.form((states, *given)):
            self.compiled, self.form = self.step.lower(states, *given).compile(), tree.form((states, *given))
        compiled, seen, lost = time.perf_counter(), np.zeros(len(plans)), np.zeros(len(plans), int)
        while np.any(done < limit):
            states, metrics = self.compiled(states, *given)
            before, done = done, np.asarray(states.round)
            ran = np.arange(BLOCK) < (done - before)[:, None]
            seen += np.asarray(metrics["image_gradients"]).sum((1, 2))
            lost += np.sum(ran[..., None] & ~np.asarray(metrics["finite"]), (1, 2))
        spent = {"seconds": (time.perf_counter() - compiled) / len(plans), "networks_at_once": len(plans)}
        spent["seconds_compiling"] = (compiled - clock) / len(plans)
        counted = zip(seen.tolist(), lost.tolist(), strict=True)
        return states, [spent | {"image_gradients": x, "replies_not_finite": n} for x, n in counted]

    def begin(self, where: Federation, plan: Plan) -> tuple[RoundState, dict]:
        """The network's state before round 0, in the program's form; what of it is present."""
        space, server = where.space, where.start.server
        full = masks.full_plan(space.graph)
        parts = {name: space.carry_over(getattr(server, name), full, self.plan) for name in ("params", "stats")}
        here = {name: present(space, part, self.plan, plan) for name, part in parts.items()}
        return where.start._replace(server=server._replace(mask=masks.of_plan(space.graph, plan), **parts)), here
