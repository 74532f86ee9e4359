"""What a method does with the network that it found: a last phase of federated averaging.

McMahan et al., AISTATS 2017. Two programs compute the same. One is of the network's own operations; that of the other,
the whole supernet's, is told as an array which operations these are, and skips the rest: runs that found different
networks can share it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms import averaging
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.core import Algorithm, Array, Model, Net, Phase, Plan, Reply, SearchSpace, Setting, Tree
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import sample


class Server(NamedTuple):
    """What the server keeps between rounds, and what a client is sent, where a program serves any network."""

    round: Array  # [] int32
    params: Tree  # of the whole supernet; what the network lacks never changes, and is not sent
    stats: Tree
    ops: Array  # [cell types, edges, ops] bool: the network


def training(
    space: SearchSpace, setting: Setting, start: int, enter: Callable, event: str, *, ends: str = "", show: bool = True
) -> Phase:
    """From round `start` on, federated averaging of a discrete network of `space`, every operation at weight 1.

    Args:
      enter: (the search's server, its plan, key) -> (the network's plan, averaging.Server or None: fresh weights).
      event, ends: the Phase's.
      show: whether the records go on showing a search, whose network does not change any more.
    """
    graph, whole = space.graph, masks.full_plan(space.graph)

    def make(plan: Plan) -> Algorithm:
        made = of_any(space, whole, setting) if plan == whole else of_one(space, plan, setting)
        return made._replace(depth="epochs", discrete_model=made.global_model if show else None, space=space)

    def shared(server: averaging.Server, plan: Plan) -> tuple[Plan, Server]:
        ops = np.asarray(masks.of_plan(graph, plan).op)
        like = jax.eval_shape(space.make(whole).init, jax.random.key(0))
        both = zip((server.params, server.stats), like, strict=True)
        params, stats = (_among(x, shapes, space.spread(ops, whole, shapes, True)) for x, shapes in both)
        return whole, Server(server.round, params, stats, jnp.asarray(ops))

    return Phase(start, enter, make, event, ends=ends, shared=shared if space.skips else None)


def of_one(space: SearchSpace, plan: Plan, setting: Setting) -> Algorithm:
    """FedAvg of the plan's network, by a program of its operations alone."""
    base = fedavg(space.derive(plan), setting)

    def served(server: averaging.Server) -> Net:
        return Net(server.params, server.stats, masks.of_plan(space.graph, plan).op.astype(jnp.float32))

    return base._replace(global_model=served)


def of_any(space: SearchSpace, plan: Plan, setting: Setting) -> Algorithm:
    """FedAvg of the network that the server's `ops` say, by a program of all of the plan's operations."""
    net = space.make(plan, True)
    rest, each = sample.macs(space, plan)

    def held(sent: Server) -> dict:
        return sample.held(space, plan, sent.ops, sent)

    def mix(server: Server) -> Array:
        return server.ops.astype(jnp.float32)

    def base(sent: Server) -> Algorithm:
        def apply(params, stats, image, train, key=None):
            logits, moments = net.apply(params, stats, image, mix(sent), train)
            return logits, jax.tree.map(jnp.where, held(sent)["stats"], moments, stats)  # what is skipped has none

        return fedavg(Model(net.init, apply, net.momentum, net.macs, head=()), setting)

    def init(key):
        return Server(jnp.int32(0), *net.init(key), masks.of_plan(space.graph, plan).op), ()

    def client_update(sent: Server, own, data, key) -> Reply:
        reply = base(sent).client_update(sent, own, data, key)
        change = {part: tree.only(here, reply.change[part]) for part, here in held(sent).items()}
        macs = 3 * (rest + jnp.sum(mix(sent) * each.astype(np.float32)))  # a backward pass costs about two forward ones
        return reply._replace(change=change, metrics=reply.metrics | {"macs": macs * reply.metrics["image_gradients"]})

    return Algorithm(
        init=init,
        send=lambda server, client, key: server,
        client_update=client_update,
        server_update=lambda server, merged: base(server).server_update(server, merged),
        personalize=lambda sent, *given: base(sent).personalize(sent, *given)._replace(mix=mix(sent)),
        forward=lambda net_of, image, train: net.apply(net_of.params, net_of.stats, image, net_of.mix, train),
        macs=net.macs,
        global_model=lambda server: Net(server.params, server.stats, mix(server)),
        held=held,
        held_alike=True,
    )


def _among(given: Tree, shapes: Tree, here: Tree) -> Tree:
    """The numbers of a tree in the places of one of these shapes that are `here`; 0 elsewhere."""
    known = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(given)}

    def placed(path, shape, places):
        leaf, name = np.zeros(shape.shape, shape.dtype), jax.tree_util.keystr(path)
        if name in known:
            leaf[np.broadcast_to(places, leaf.shape)] = known[name].ravel()
        return leaf

    return jax.tree_util.tree_map_with_path(placed, shapes, here)
