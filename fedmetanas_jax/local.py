"""What a client does with its own rows: batches and tasks of them, the loss, epochs of an optimizer.

Everything here is written for one client and keeps its shapes whatever the client's size: a client holds n
padded rows, the real ones marked by `weight`, and a step that has no real row changes nothing.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import tree
from fedmetanas_jax.core import Array, Examples, Model, Setting, Tree

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


def epoch_tasks(
    key: Array, weight: Array, batch: int, kind: Tasks = "pairs", parts: int = 2
) -> tuple[Array, Array]:
    """One epoch's tasks (D-7): rows [tasks, parts, batch] int32 and valid [tasks] bool.

    The parts are support and query and, for what needs a third batch, that one.
    "pairs" cuts the shuffled rows into disjoint tasks and drops the rest; "one" keeps the first such task;
    "split" draws part i from every `parts`-th row, starting at row i, the same ones in every epoch.
    A task is valid if all its rows are real. ValueError if the n rows do not fill one task.
    """
    if kind not in get_args(Tasks):
        raise ValueError(f"no way of making tasks called {kind!r}; there are {', '.join(get_args(Tasks))}")
    n = weight.shape[0]
    if n < parts * batch:
        raise ValueError(
            f"a task takes {parts} batches of {batch} rows but no client has more than {n}; choose a smaller batch"
        )
    tasks = 1 if kind == "one" else n // (parts * batch)
    if kind == "split":
        keys = jax.random.split(key, parts)
        shares = [parts * _shuffled(keys[i], weight[i::parts])[: tasks * batch] + i for i in range(parts)]
        rows = jnp.stack([share.reshape(tasks, batch) for share in shares], axis=1)
    else:
        rows = _shuffled(key, weight)[: tasks * parts * batch].reshape(tasks, parts, batch)
    return rows, jnp.all(weight[rows] > 0, axis=(1, 2))


def all_tasks(
    key: Array, weight: Array, batch: int, epochs: int, kind: Tasks = "pairs", parts: int = 2
) -> tuple[Array, Array]:
    """`epoch_tasks` of every epoch end to end: rows [epochs * tasks, parts, batch], valid [epochs * tasks]."""
    keys = jax.random.split(key, epochs)
    rows, valid = jax.vmap(lambda k: epoch_tasks(k, weight, batch, kind, parts))(keys)
    return rows.reshape(-1, parts, batch), valid.reshape(-1)


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
    steps: Array | None = None,
) -> tuple[Tree, Tree, dict]:
    """`epochs` passes of `optimizer` over a client's rows, from a fresh optimizer state (D-30).

    loss: (variables, stats, batch, key) -> (value, (moments, accuracy)), moments shaped as stats.
    momentum: running stats <- (1 - momentum) stats + momentum moments, once a step.
    steps: stop after so many, a traced number, so that one program trains to any depth; None is all of them.
    Returns variables, stats and metrics: "loss" and "accuracy", means over the steps with a real row;
    "image_gradients", the real images that went through a forward and backward pass.
    """
    if epochs == 0:
        return variables, stats, {name: jnp.float32(0) for name in ("loss", "accuracy", "image_gradients")}
    order_key, step_key = jax.random.split(key)
    rows, weight = all_batches(order_key, data.weight, batch, epochs)
    keys = jax.random.split(step_key, len(rows))
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(i, carry):
        variables, stats, state, values, accuracies = carry
        augment_key, loss_key = jax.random.split(keys[i])
        examples = Examples(augment(augment_key, data.image[rows[i]]), data.label[rows[i]], weight[i])
        (value, (moments, accuracy)), grads = gradient(variables, stats, examples, loss_key)
        updates, state_after = optimizer.update(grads, state, variables)
        stepped = optax.apply_updates(variables, updates), tree.lerp(stats, moments, momentum), state_after
        # Without a real row the gradient is 0, yet momentum and weight decay would still move the weights.
        kept = tree.where(jnp.any(weight[i] > 0), stepped, (variables, stats, state))
        return *kept, values.at[i].set(value), accuracies.at[i].set(accuracy)

    # One flat loop: the network's gradient is compiled once.
    limit = len(rows) if steps is None else jnp.minimum(steps, len(rows))
    blank = jnp.zeros(len(rows), jnp.float32)
    start = variables, stats, optimizer.init(variables), blank, blank
    variables, stats, _, values, accuracies = jax.lax.fori_loop(0, limit, step, start)
    weight = jnp.where(jnp.arange(len(rows))[:, None] < limit, weight, 0.0)
    real = jnp.any(weight > 0, axis=1)
    metrics = {
        "loss": mean_where(values, real),
        "accuracy": mean_where(accuracies, real),
        "image_gradients": jnp.sum(weight > 0, dtype=jnp.float32),
    }
    return variables, stats, metrics


def steps_taken(weight: Array, batch: int, epochs: int) -> Array:
    """[] float32: the steps of `fit` that have a real row, ceil(n_k / batch) an epoch; weight [n]."""
    return epochs * jnp.ceil(jnp.sum(weight > 0) / batch)


def head_of(model: Model, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The entries of `params` that make up the head: `names`, or where that is None the last linear layer's.

    ValueError names what there is.
    """
    if names is None:
        return model.head
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    if unknown := [name for name in names if name not in params]:
        raise ValueError(f"the network has no part {unknown[0]!r} to be a head; there are {', '.join(sorted(params))}")
    return names


def classification_loss(model: Model) -> Callable:
    """-> loss(params, stats, batch, key) -> (cross entropy, (batch moments, accuracy)), in training mode."""

    def loss(params, stats, batch: Examples, key):
        logits, moments = model.apply(params, stats, batch.image, True, key)
        value = cross_entropy(logits, batch.label, batch.weight)
        return value, (moments, accuracy(logits, batch.label, batch.weight))

    return loss


def trainer(model: Model, setting: Setting) -> Callable:
    """-> train(optimizer, params, stats, data, key, epochs, steps=None): `fit` of a fixed network, under the
    conditions common to all methods."""
    common = {"batch": setting.batch, "augment": setting.augment, "momentum": model.momentum}
    loss = classification_loss(model)

    def train(optimizer, params, stats, data, key, epochs, steps=None):
        return fit(loss, optimizer, params, stats, data, key, epochs=epochs, steps=steps, **common)

    return train
