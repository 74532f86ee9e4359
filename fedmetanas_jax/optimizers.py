"""The optimizers of local training, as optax transformations, and what single methods add to them.

A rate may be traced: optimizers are made inside the traced function, so that schedules never recompile.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import tree
from fedmetanas_jax.core import Array, Setting, Tree


def sgd(lr, momentum: float = 0.0, weight_decay: float = 0.0, clip: float | None = None):
    """SGD in PyTorch's order: clip the global norm, add the decay to the clipped gradient, then momentum."""
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.trace(momentum) if momentum else optax.identity(),
        optax.scale_by_learning_rate(lr),
    )


def cosine(rounds: int, start: float, end: float) -> Callable[[Array], Array]:
    """round -> learning rate, half a cosine from `start` at round 0 to `end` at `rounds` and after (D-31)."""

    def lr(t):
        done = jnp.minimum(t / rounds, 1.0)
        return end + (start - end) * (1 + jnp.cos(jnp.pi * done)) / 2

    return lr


def local_sgd(setting: Setting, round: Array, momentum: float | None = None) -> optax.GradientTransformation:
    """The local optimizer of a round: `sgd` under the common conditions, at a cosine over all rounds (D-23, D-31).

    momentum: another than the setting's, for methods that cannot have one.
    """
    momentum = setting.momentum if momentum is None else momentum
    rate = cosine(setting.rounds, setting.lr, setting.lr_end)(round)
    return sgd(rate, momentum, setting.weight_decay, setting.clip)


def only(selected: Callable[[str], bool], optimizer: optax.GradientTransformation):
    """`optimizer` on the leaves whose path, written "a/b/c", is `selected`; the others are left as they are.

    The optimizer sees the selected leaves alone: a clip inside it measures their norm.
    """

    def label(path, _) -> str:
        return "train" if selected(jax.tree_util.keystr(path, simple=True, separator="/")) else "freeze"

    return optax.partition(
        {"train": optimizer, "freeze": optax.set_to_zero()},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def inside_and_outside(names: tuple[str, ...]) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    """Two predicates for `only`: the path begins with one of these names, or with none of them."""
    return lambda path: path.split("/")[0] in names, lambda path: path.split("/")[0] not in names


def pull(center: Tree, strength: float) -> optax.GradientTransformation:
    """Adds strength (w - center): the gradient of (strength / 2) |w - center|^2, FedProx's and Ditto's term."""

    def step(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda g, w, c: g + strength * (w - c), updates, params, center)

    return optax.stateless(step)


def correct(correction: Tree) -> optax.GradientTransformation:
    """Adds the same `correction` to every gradient: SCAFFOLD's c - c_k."""
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.add, updates, correction))


def adam(lr: float | Array, weight_decay: float, b1: float = 0.5) -> optax.GradientTransformation:
    """Adam with L2 decay in the gradient, as PyTorch has it, and DARTS's betas: what architecture parameters take."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, optax.scale_by_adam(b1=b1, b2=0.999), optax.scale_by_learning_rate(lr))


class Moments(NamedTuple):
    """What `adaptive` keeps."""

    m: Tree
    v: Tree


def adaptive(kind: Literal["adam", "yogi"], lr: float, b1: float, b2: float, tau: float):
    """FedAdam's and FedYogi's step of the server (Reddi et al., ICLR 2021, Algorithm 2), lr m / (sqrt(v) + tau).

    Unlike Adam's and Yogi's of libraries it starts from m = 0, v = tau^2 and corrects neither for it. Its updates are
    gradients, as everywhere: minus the mean change.
    """

    def second_moment(v: Array, g: Array) -> Array:
        square = jnp.square(g)
        return b2 * v + (1 - b2) * square if kind == "adam" else v - (1 - b2) * square * jnp.sign(v - square)

    def init(params: Tree) -> Moments:
        return Moments(jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda w: jnp.full_like(w, tau**2), params))

    def update(gradient: Tree, state: Moments, params=None) -> tuple[Tree, Moments]:
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, gradient)
        v = jax.tree.map(second_moment, state.v, gradient)
        return jax.tree.map(lambda m, v: -lr * m / (jnp.sqrt(v) + tau), m, v), Moments(m, v)

    return optax.GradientTransformation(init, update)


class Sampled(NamedTuple):
    """A gradient for which only a part of a network was drawn."""

    gradient: Tree
    times: Array  # [cell types, edges, ops] how often each operation was


def drawn_alone(optimizer: optax.GradientTransformation, moved: Callable) -> optax.GradientTransformation:
    """`optimizer` of `Sampled` gradients: what was not drawn keeps its value, and the optimizer what it knows of it.

    Otherwise weight decay and momentum would move operations that saw no image (D-17). moved: times -> a tree of bool
    that broadcasts to the variables.
    """

    def update(updates: Sampled, state, params=None):
        here = moved(updates.times)
        steps, new = optimizer.update(updates.gradient, state, params)
        held = tree.only(here, steps)
        moves = optax.tree.map_params(
            optimizer, lambda x, m: x if _is_masked(x) else m, new, here,
            transform_non_params=lambda _: True, is_leaf=_is_masked,
        )  # fmt: skip
        return held, jax.tree.map(lambda m, b, a: jnp.where(m, b, a), moves, new, state)

    return optax.GradientTransformation(optimizer.init, update)


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)  # what one of several optimizers leaves to another


def weights_and_alphas(params: optax.GradientTransformation, alpha: optax.GradientTransformation):
    """One optimizer for the weights and one for the logits of {"params": ..., "alpha": ...} (Eq. 9 and 10)."""
    return optax.multi_transform({"params": params, "alpha": alpha}, {"params": "params", "alpha": "alpha"})
