"""What a client does with its own rows: batches and tasks of them, the loss, the optimizer, epochs of SGD.

Everything here is written for one client and keeps its shapes whatever the client's size: a client holds n
padded rows, the real ones marked by `weight`, and a step that has no real row changes nothing.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import tree
from fedmetanas_jax.core import Array, Examples, Tree

Tasks = Literal["pairs", "one", "split"]  # how an epoch is cut into (support, query): D-7 A, B, C


def _shuffled(key: Array, weight: Array) -> Array:
    """[n] int32: all rows, the real ones first and in random order."""
    draw = jax.random.uniform(key, weight.shape)  # below 1
    return jnp.argsort(jnp.where(weight > 0, draw, 1.0)).astype(jnp.int32)


def epoch_batches(key: Array, weight: Array, batch: int) -> tuple[Array, Array]:
    """One pass over the real rows: rows [steps=ceil(n / batch), batch] int32, weight alike.

    Every real row comes exactly once at its weight. What is left of the steps is filled with further real
    rows at weight 0, so that batch statistics see images and the loss does not (D-37).
    """
    steps = -(-weight.shape[0] // batch)
    order, size = _shuffled(key, weight), jnp.sum(weight > 0)
    position = jnp.arange(steps * batch)
    rows = order[position % jnp.maximum(size, 1)]
    weight = jnp.where(position < size, weight[rows], 0.0)
    return rows.reshape(steps, batch), weight.reshape(steps, batch)


def all_batches(key: Array, weight: Array, batch: int, epochs: int) -> tuple[Array, Array]:
    """`epoch_batches` of every epoch, freshly shuffled, end to end: two of [epochs * steps, batch]."""
    keys = jax.random.split(key, epochs)
    rows, weight = jax.vmap(lambda k: epoch_batches(k, weight, batch))(keys)
    return rows.reshape(-1, batch), weight.reshape(-1, batch)


def epoch_tasks(key: Array, weight: Array, batch: int, kind: Tasks = "pairs") -> tuple[Array, Array]:
    """One epoch's tasks (D-7): rows [tasks, 2, batch] int32, support then query, and valid [tasks] bool.

    "pairs" cuts the shuffled rows into disjoint pairs of batches and drops the rest; "one" keeps the first
    such pair; "split" draws support from the even and query from the odd rows, the same halves in every
    epoch. A task is valid if all its rows are real. ValueError if the n rows do not fill one task.
    """
    if kind not in get_args(Tasks):
        raise ValueError(f"no way of making tasks called {kind!r}; there are {', '.join(get_args(Tasks))}")
    n = weight.shape[0]
    if n < 2 * batch:
        raise ValueError(
            f"a task takes 2 batches of {batch} rows but no client has more than {n}; choose a smaller batch"
        )
    tasks = 1 if kind == "one" else n // (2 * batch)
    if kind == "split":
        keys = jax.random.split(key)
        halves = [2 * _shuffled(keys[i], weight[i::2])[: tasks * batch] + i for i in range(2)]
        rows = jnp.stack([half.reshape(tasks, batch) for half in halves], axis=1)
    else:
        rows = _shuffled(key, weight)[: tasks * 2 * batch].reshape(tasks, 2, batch)
    return rows, jnp.all(weight[rows] > 0, axis=(1, 2))


def all_tasks(
    key: Array, weight: Array, batch: int, epochs: int, kind: Tasks = "pairs"
) -> tuple[Array, Array]:
    """`epoch_tasks` of every epoch end to end: rows [epochs * tasks, 2, batch], valid [epochs * tasks]."""
    keys = jax.random.split(key, epochs)
    rows, valid = jax.vmap(lambda k: epoch_tasks(k, weight, batch, kind))(keys)
    return rows.reshape(-1, 2, batch), valid.reshape(-1)


def _weighted(values: Array, weight: Array) -> Array:
    """Mean of values [b] under weight [b]; 0 when all weights are 0."""
    total = jnp.sum(weight)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1.0)


def cross_entropy(logits: Array, label: Array, weight: Array) -> Array:
    """[] float32, nats: mean over the weighted rows of logits [b, classes]; 0 when all weights are 0."""
    values = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)
    return _weighted(values, weight)


def accuracy(logits: Array, label: Array, weight: Array) -> Array:
    """[] float32 in 0..1: share of the weighted rows whose largest logit is the label's; 0 without any."""
    return _weighted((jnp.argmax(logits, axis=-1) == label).astype(jnp.float32), weight)


def mean_where(values: Array, real: Array) -> Array:
    """[] mean of values [steps] over the steps that took place (real [steps] bool); 0 when none did."""
    return jnp.sum(jnp.where(real, values, 0.0)) / jnp.maximum(jnp.sum(real), 1)


def sgd(lr, momentum: float = 0.0, weight_decay: float = 0.0, clip: float | None = None):
    """SGD in PyTorch's order: clip the global norm, add the decay to the clipped gradient, then momentum.

    `lr` may be traced: make the optimizer inside the traced function and schedules never recompile.
    """
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


def fit(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    variables: Tree,
    stats: Tree,
    data: Examples,
    key: Array,
    *,
    batch: int,
    epochs: int,
    augment: Callable,
    momentum: float,
) -> tuple[Tree, Tree, dict]:
    """`epochs` passes of `optimizer` over a client's rows, from a fresh optimizer state (D-30).

    loss: (variables, stats, batch, key) -> (value, (moments, accuracy)), moments shaped as stats.
    momentum: running stats <- (1 - momentum) stats + momentum moments, once a step.
    Returns variables, stats and metrics: "loss" and "accuracy", means over the steps with a real row;
    "image_gradients", the real images that went through a forward and backward pass.
    """
    order_key, step_key = jax.random.split(key)
    rows, weight = all_batches(order_key, data.weight, batch, epochs)
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(carry, x):
        rows, weight, key = x
        variables, stats, state = carry
        augment_key, loss_key = jax.random.split(key)
        examples = Examples(augment(augment_key, data.image[rows]), data.label[rows], weight)
        (value, (moments, correct)), grads = gradient(variables, stats, examples, loss_key)
        updates, state = optimizer.update(grads, state, variables)
        stepped = optax.apply_updates(variables, updates), tree.lerp(stats, moments, momentum), state
        # Without a real row the gradient is 0, yet momentum and weight decay would still move the weights.
        real = jnp.any(weight > 0)
        return tree.where(real, stepped, carry), (real, value, correct)

    # One flat scan: the network's gradient is compiled once, in one loop.
    start = variables, stats, optimizer.init(variables)
    keys = jax.random.split(step_key, len(rows))
    (variables, stats, _), (real, values, correct) = jax.lax.scan(step, start, (rows, weight, keys))
    metrics = {
        "loss": mean_where(values, real),
        "accuracy": mean_where(correct, real),
        "image_gradients": jnp.sum(weight > 0, dtype=jnp.float32),
    }
    return variables, stats, metrics
