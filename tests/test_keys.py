"""No method draws from a key twice, nor from one that it also splits: seen in what a client's work is traced to."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from toy_federation import NAMES, federation, first_algorithm

from fedmetanas_jax.core import Setting
from fedmetanas_jax.engine.round import train_examples


def noise(key, image):
    """An augmentation, so that every step draws."""
    return jax.random.bits(key, image.shape, image.dtype)


SETTING = Setting(rounds=10, epochs=2, batch=4, augment=noise, share=0.5, clients=6)
DATA = federation()

NUMBERS = {  # what a loop counts with
    "add": np.add, "lt": np.less, "select_n": lambda which, *of: np.where(which, of[1], of[0]),
}  # fmt: skip


class Keys:
    """Goes through a traced function in Python, with numbers in place of keys.

    fold_in(k, i) and split(k)[i] have the same number, since they may be the same key. What is neither a key nor made
    of constants is None; a key that is not followed fails.
    """

    def __init__(self, function, *args):
        """The last of args is the one key that there is."""
        self.drawn, self.split, self._numbers = Counter(), set(), {}
        traced = jax.make_jaxpr(function)(*args)
        unknown = [None] * (len(traced.jaxpr.invars) - 1)
        self._run(traced, [*unknown, self._child(None, 0)])

    def _child(self, key, i) -> np.ndarray:
        return np.array(self._numbers.setdefault((key, int(i)), len(self._numbers)))

    def _children(self, keys, indices) -> np.ndarray:
        return np.vectorize(self._child, otypes=[int])(keys, indices)

    def _run(self, traced, args) -> list:
        jaxpr = getattr(traced, "jaxpr", traced)
        known = dict(zip(jaxpr.constvars, map(small, getattr(traced, "consts", ())), strict=True))
        known |= zip(jaxpr.invars, args, strict=True)

        def value(x):
            return np.asarray(x.val) if isinstance(x, Literal) else known.get(x)

        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, self._step(eqn, [value(x) for x in eqn.invars]), strict=True)
        return [value(x) for x in jaxpr.outvars]

    def _step(self, eqn, args) -> list:
        name, how = eqn.primitive.name, eqn.params
        unknown = [None] * len(eqn.outvars)
        if name == "scan":
            return self._scan(how, args)
        if name == "while":
            return self._while(how, eqn, args)
        if name in NUMBERS and all(x is not None for x in args):
            return [NUMBERS[name](*args)]
        if name == "dynamic_slice" and all(x is not None for x in args):
            here = zip(args[1:], how["slice_sizes"], strict=True)
            return [args[0][tuple(slice(int(start), int(start) + size) for start, size in here)]]
        if name == "cond":
            for branch in how["branches"]:
                self._run(branch, args[1:])
            return unknown
        if name in ("jit", "pjit", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "closed_call"):
            inner = next(how[part] for part in ("jaxpr", "call_jaxpr") if part in how)
            return self._run(inner, args)
        if name == "random_bits":
            self.drawn.update(args[0].ravel().tolist())
            return unknown
        if name == "random_split":
            self.split.update(args[0].ravel().tolist())
            shape = how["shape"]
            each = np.expand_dims(args[0], tuple(range(args[0].ndim, args[0].ndim + len(shape))))
            return [self._children(each, np.arange(np.prod(shape)).reshape(shape))]
        if name == "random_fold_in":
            return [self._children(*args)]
        if name == "iota":
            line = np.arange(how["shape"][how["dimension"]])
            return [np.broadcast_to(line, how["shape"])] if len(how["shape"]) == 1 else unknown
        if name == "convert_element_type":
            return args
        if args and args[0] is not None and name == "squeeze":
            return [args[0].squeeze(how["dimensions"])]
        if args and args[0] is not None and name == "slice":
            edges = zip(how["start_indices"], how["limit_indices"], strict=True)
            return [args[0][tuple(slice(*edge) for edge in edges)]]
        if args and args[0] is not None and name == "unstack":  # from JAX 0.11 on
            return list(np.moveaxis(args[0], how["axis"], 0))
        assert not any(is_key(x) for x in (*eqn.invars, *eqn.outvars)), f"{name} is not followed"
        return unknown

    def _scan(self, how, args) -> list:
        if "num_consts" in how:
            fixed, carried = how["num_consts"], how["num_carry"]
        else:  # JAX 0.11 has them as trees: constants, carry, what is gone through
            fixed, carried = (len(part) for part in how["ft_in"].unpack()[:2])
        consts, carry, xs = args[:fixed], args[fixed : fixed + carried], args[fixed + carried :]
        for i in range(how["length"]):
            here = [None if x is None else x[i] for x in xs]
            out = self._run(how["jaxpr"], [*consts, *carry, *here])
            carry = out[:carried]
        return [*carry, *[None] * (len(out) - carried)]

    def _while(self, how, eqn, args) -> list:
        """As many turns as there are keys to take one by one: a loop of fewer draws from fewer."""
        before, consts = how["cond_nconsts"], how["body_nconsts"]
        given, carry = args[before : before + consts], args[before + consts :]
        keys = [x for x, v in zip(given, eqn.invars[before : before + consts], strict=True) if is_key(v) and x.ndim]
        assert len(keys) == 1, "a loop of unknown length takes its keys from one array"
        for _ in range(len(keys[0])):
            carry = self._run(how["body_jaxpr"], [*given, *carry])
        return [None] * len(carry)


def small(x):
    """A constant as numpy, if it may be a number to fold into a key."""
    return np.asarray(x) if jnp.issubdtype(x.dtype, jnp.integer) and x.size < 100 else None


def is_key(x) -> bool:
    return jnp.issubdtype(x.aval.dtype, jax.dtypes.prng_key)


def followed(function, *args) -> Keys:
    return Keys(function, *args, jax.random.key(0))


@pytest.mark.parametrize("name", NAMES)
def test_no_client_draws_from_a_key_twice(name):
    algorithm = first_algorithm(name, SETTING, real=False)
    server, own = jax.eval_shape(algorithm.init, jax.random.key(0))
    message = jax.eval_shape(lambda server, key: algorithm.send(server, jnp.int32(0), key), server, jax.random.key(0))
    keys = followed(algorithm.client_update, message, own, train_examples(DATA, jnp.int32(0), algorithm.reads_test))
    assert len(keys.drawn) > SETTING.epochs  # which take one each, for the order of the rows
    assert set(keys.drawn.values()) == {1}
    assert not keys.split & keys.drawn.keys()


def test_a_key_that_is_drawn_from_twice_is_found():
    def folded(key):
        _, second = jax.random.split(key)
        return jax.random.uniform(second), jax.random.normal(jax.random.fold_in(key, 1), (3,))

    def in_a_loop(key):
        return jax.lax.scan(lambda m, x: (m, jax.random.uniform(jax.random.fold_in(key, x))), 0, np.array([1, 2, 1]))

    def in_a_row(key):
        return jax.vmap(jax.random.uniform)(jax.random.split(key, 3)), jax.random.uniform(key)

    def in_a_loop_of_any_length(length, key):
        own, first = jax.random.split(key, 3), jax.random.fold_in(key, 5)

        def turn(i, m):
            return m + jax.random.uniform(own[i]) * jax.random.uniform(first)

        return jax.lax.fori_loop(0, length, turn, 0.0)

    assert sorted(followed(in_a_loop_of_any_length, jnp.int32(2)).drawn.values()) == [1, 1, 1, 3]
    assert sorted(followed(folded).drawn.values()) == [2]
    assert sorted(followed(in_a_loop).drawn.values()) == [1, 2]
    found = followed(in_a_row)
    assert len(found.drawn) == 4
    assert len(found.split & found.drawn.keys()) == 1
