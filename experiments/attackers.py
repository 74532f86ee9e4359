"""Clients that send something else than they learnt, as a wrapper around a method."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms import ALGORITHMS
from fedmetanas_jax.core import Algorithm, Array, Phase, Tree

LOUDER = 10.0  # times the norm of what was learnt, of "random"


def flip(change: dict, key: Array) -> dict:
    """The other way."""
    return tree.scale(change, -1.0)


def scale(change: dict, key: Array) -> dict:
    """A million times as far."""
    return tree.scale(change, 1e6)


def random(change: dict, key: Array) -> dict:
    """Gaussian numbers; LOUDER times as long as what was learnt, part by part."""

    def of(part: Tree, key: Array) -> Tree:
        flat, like = ravel_pytree(part)
        noise = jax.random.normal(key, flat.shape)
        return like(LOUDER * tree.global_norm(flat) / tree.global_norm(noise) * noise)

    return {name: of(part, jax.random.fold_in(key, n)) for n, (name, part) in enumerate(sorted(change.items()))}


ATTACKS: dict[str, Callable] = {"none": lambda change, key: change, "flip": flip, "scale": scale, "random": random}


class Told(NamedTuple):
    """A message, and whom it is to."""

    message: Tree
    client: Array  # [] int32


class Own(NamedTuple):
    """What a client keeps, and what it does if it is bad: a value, so that a method has one program for all attacks."""

    own: Tree
    attack: Array  # [] int32, its place in ATTACKS


def poisoned(algorithm: Algorithm, attack: str, attackers: int) -> Algorithm:
    """The method whose clients 0 to attackers - 1 train as the others do, and then send ATTACKS[attack] of it."""

    def init(key):
        server, own = algorithm.init(key)
        return server, Own(own, jnp.int32(list(ATTACKS).index(attack)))

    def client_update(told: Told, kept: Own, data, key):
        reply = algorithm.client_update(told.message, kept.own, data, key)
        change = reply.change
        for place, lie in enumerate(ATTACKS.values()):
            bad = (told.client < attackers) & (kept.attack == place)
            change = tree.where(bad, lie(reply.change, jax.random.fold_in(key, 1)), change)
        return reply._replace(change=change, own=Own(reply.own, kept.attack))

    def personalize(told: Told, kept: Own, *rest):
        return algorithm.personalize(told.message, kept.own, *rest)

    def send(server, client, key):
        return Told(algorithm.send(server, client, key), client)

    return algorithm._replace(init=init, send=send, client_update=client_update, personalize=personalize)


def register(methods: Sequence[str], attackers: int) -> None:
    """Makes METHOD+ATTACK a method, for this process, of each method and attack."""
    for method in methods:
        for attack in ATTACKS:
            ALGORITHMS[f"{method}+{attack}"] = attacked(ALGORITHMS[method], attack, attackers)


def attacked(factory: Callable, attack: str, attackers: int) -> Callable:
    """The method's factory, of whose every phase the first clients are bad (`poisoned`)."""

    @functools.wraps(factory)  # its arguments say what it is made of, and which options it has
    def made(first, setting, **options) -> Algorithm | list[Phase]:
        found = factory(first, setting, **options)
        if isinstance(found, Algorithm):
            return poisoned(found, attack, attackers)

        @functools.cache  # phases that share a maker share its programs
        def bad(make: Callable) -> Callable:
            return lambda plan: poisoned(make(plan), attack, attackers)

        return [phase._replace(make=bad(phase.make)) for phase in found]

    return made
