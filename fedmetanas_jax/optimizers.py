"""The optimizers of local training, as optax transformations, and what single methods add to them.

A rate may be traced: optimizers are made inside the traced function, so that schedules never recompile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

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


def scheduled_sgd(
    setting: Setting, lr: float, lr_end: float, momentum: float, weight_decay: float, clip: float | None
) -> Callable[[Array], optax.GradientTransformation]:
    """round -> the local optimizer of that round: `sgd` at a cosine over all rounds (D-23, D-31)."""
    lr_at = cosine(setting.rounds, lr, lr_end)
    return lambda round: sgd(lr_at(round), momentum, weight_decay, clip)


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
