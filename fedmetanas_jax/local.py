"""What a client does with its own rows: batches and tasks of them, the loss, epochs of an optimizer.

Everything here is written for one client and keeps its shapes whatever the client's size: a client holds n
padded rows, the real ones marked by `weight`, and a step that has no real row is not taken. How long the padding is
says nothing: what is drawn for a row, a step or an epoch depends on the real rows alone.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedmetanas_jax import tree
from fedmetanas_jax.core import Array, Examples, Model, Setting, Tree

# How an epoch is cut into (support, query): D-7 A, B, C; and into (training, validation) halves of the rows.
Tasks = Literal["pairs", "one", "split", "halves"]


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


def epoch_tasks(key: Array, weight: Array, batch: int, kind: Tasks = "pairs", parts: int = 2) -> tuple[Array, Array]:
    """One epoch's tasks (D-7): rows [tasks, parts, batch] int32, weight alike.

    The parts are support and query and, for what needs a third batch, that one.
    "pairs" cuts the shuffled rows into disjoint tasks and drops the rest; "one" keeps the first such task;
    "split" draws part i from every `parts`-th row, starting at row i, the same ones in every epoch.
    "halves" passes once over the even rows, as `epoch_batches` does, beside batches drawn anew from the odd ones; its
    tasks are as many as the even rows fill, to the last one.
    A task of the others that holds a row of padding has weight 0 throughout. ValueError if the n rows do not fill one.
    """
    if kind not in get_args(Tasks):
        raise ValueError(f"no way of making tasks called {kind!r}; there are {', '.join(get_args(Tasks))}")
    n = weight.shape[0]
    if kind == "halves":
        return _halves(key, weight, batch)
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
    whole = jnp.all(weight[rows] > 0, axis=(1, 2), keepdims=True)
    return rows, jnp.where(whole, weight[rows], 0.0)


def _halves(key: Array, weight: Array, batch: int) -> tuple[Array, Array]:
    """`epoch_tasks` of (training, validation) halves."""
    order_key, key = jax.random.split(key)
    rows, real = epoch_batches(order_key, weight[::2], batch)
    odd = weight[1::2]

    size, place = jnp.sum(odd > 0), jnp.arange(batch)

    def drawn(key):
        order = _shuffled(key, odd)[place % jnp.maximum(size, 1)]
        return 2 * order + 1, jnp.where(place < size, odd[order], 0.0)

    other, counted = jax.vmap(drawn)(jax.random.split(key, len(rows)))
    here = jnp.any(real > 0, axis=1, keepdims=True)  # a step without training rows is none
    return jnp.stack([2 * rows, other], axis=1), jnp.stack([real, counted * here], axis=1)


def all_tasks(
    key: Array, weight: Array, batch: int, epochs: int, kind: Tasks = "pairs", parts: int = 2
) -> tuple[Array, Array]:
    """`epoch_tasks` of every epoch end to end: two of [epochs * tasks, parts, batch]."""
    keys = jax.random.split(key, epochs)
    rows, weight = jax.vmap(lambda k: epoch_tasks(k, weight, batch, kind, parts))(keys)
    return rows.reshape(-1, parts, batch), weight.reshape(-1, parts, batch)


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


def keys_of_training(key: Array) -> tuple[Array, Array, Array]:
    """A client's key split, once for all: for the order of its rows, for its steps, and for what is no part of `fit`.

    A method that trains twice takes the third as the key of its other training. Folding a number into `key` instead
    could give one of the first two, since that is how a key is split.
    """
    order_key, step_key, other_key = jax.random.split(key, 3)
    return order_key, step_key, other_key


def mean_where(values: Array, real: Array) -> Array:
    """[] mean of values [steps] over the steps that took place (real [steps] bool); 0 when none did."""
    return jnp.sum(jnp.where(real, values, 0.0)) / jnp.maximum(jnp.sum(real), 1)


class Gradient(NamedTuple):
    """What a step of local training descends along."""

    of: Callable  # (variables, stats, batches, key) -> (gradients, moments shaped as stats, metrics {name: []}), with
    #   as many batches, Examples of [b, ...], as `passes` is long
    passes: tuple[int, ...] = (1,)  # how often each batch of a step goes forward and backward
    metrics: tuple[str, ...] = ("loss", "accuracy")  # the names of those of `of`, which must be known before it runs

    @property
    def batches(self) -> int:
        """Batches a step takes: a client must be able to fill them, unless it is one."""
        return len(self.passes)


def plain(loss: Callable) -> Gradient:
    """The gradient of `loss`: (variables, stats, batch, key) -> (value, (moments, accuracy))."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def of(variables, stats, batches, key):
        (value, (moments, accuracy)), grads = gradient(variables, stats, *batches, key)
        return grads, moments, {"loss": value, "accuracy": accuracy}

    return Gradient(of)


def fit(
    gradient: Gradient | Sequence[Gradient],
    optimizer: optax.GradientTransformation | Sequence[optax.GradientTransformation],
    variables: Tree,
    stats: Tree,
    data: Examples,
    key: Array,
    *,
    setting: Setting,
    momentum: float,
    epochs: int | None = None,
    steps: Array | None = None,
    tasks: Tasks = "pairs",
) -> tuple[Tree, Tree, dict]:
    """Passes of `optimizer` along `gradient` over a client's rows, from a fresh optimizer state (D-30).

    A gradient of one batch sees every row once an epoch; one of several sees them cut into `tasks` (D-7). Steps
    without a real row, of a client with fewer rows than others, are not taken: one after another, clients cost what
    they have, and side by side what the largest has. Running stats <- (1 - momentum) stats + momentum moments, once a
    step.
    Several gradients, with as many optimizers, take turns in every step on the same batches: each is taken where the
    one before has moved the variables. Moments and metrics are the last one's.
    epochs: as many as the setting says where it is None.
    steps: stop after so many of those that the largest client takes, a traced number, so that one program trains to
      any depth: k epochs of the largest are k epochs of everybody. None is all of them.
    Returns variables, stats and, where `steps` is None, metrics: those of the gradient as means over the real rows of
    the steps, and "image_gradients", the real images that went through a forward and backward pass.
    """
    epochs = setting.epochs if epochs is None else epochs
    if epochs == 0:
        return variables, stats, {name: jnp.float32(0) for name in ("loss", "accuracy", "image_gradients")}
    order_key, step_key, _ = keys_of_training(key)
    gradients = [gradient] if isinstance(gradient, Gradient) else list(gradient)
    optimizers = [optimizer] if isinstance(gradient, Gradient) else list(optimizer)
    parts, passes = gradients[0].batches, np.sum([g.passes for g in gradients], axis=0)
    if parts == 1:
        rows, weight = (x[:, None] for x in all_batches(order_key, data.weight, setting.batch, epochs))
    else:
        rows, weight = all_tasks(order_key, data.weight, setting.batch, epochs, tasks, parts)
    real = jnp.any(weight > 0, axis=(1, 2))
    taken = jnp.argsort(~real)  # those with a real row, which are taken, come first and in order
    xs = rows[taken], weight[taken], jax.random.split(step_key, len(rows))
    # A step counts by its rows, which are the first batch's (those of a task are alike full, but for a half that is
    # held back). As a share of a batch, so that full steps count exactly 1.
    share = jnp.sum(weight[taken, 0], axis=1) / setting.batch

    def step(i, carry):
        variables, stats, states = carry
        rows, weight, key = tree.take(xs, i)
        *keys, loss_key = jax.random.split(key, parts + 1)
        turn_keys = [loss_key] if len(gradients) == 1 else jax.random.split(loss_key, len(gradients))
        batches = [
            Examples(setting.augment(k, data.image[r]), data.label[r], w)
            for k, r, w in zip(keys, rows, weight, strict=True)
        ]
        after = []
        for g, o, state, turn_key in zip(gradients, optimizers, states, turn_keys, strict=True):
            grads, moments, metrics = g.of(variables, stats, batches, turn_key)
            updates, state = o.update(grads, state, variables)
            variables = optax.apply_updates(variables, updates)
            after.append(state)
        stepped = variables, tree.lerp(stats, moments, momentum), after
        # Never in vain, so always true. Without it XLA rounds a step otherwise, and recorded runs are not repeated.
        return tree.where(jnp.any(weight > 0), stepped, carry), metrics

    start = variables, stats, [o.init(variables) for o in optimizers]
    if steps is not None:
        limit = jnp.sum(real & (jnp.arange(len(real)) < steps))
        variables, stats, _ = jax.lax.fori_loop(0, limit, lambda i, carry: step(i, carry)[0], start)
        return variables, stats, {}

    def counted(i, both):
        carry, sums = both
        carry, metrics = step(i, carry)
        if set(metrics) != set(sums):
            raise ValueError(f"a gradient has metrics {', '.join(metrics)} but is said to have {', '.join(sums)}")
        return carry, {name: sums[name] + share[i] * value for name, value in metrics.items()}

    both = start, dict.fromkeys(gradients[-1].metrics, jnp.float32(0))
    (variables, stats, _), sums = jax.lax.fori_loop(0, jnp.sum(real), counted, both)
    total = jnp.sum(share)
    metrics = {name: value / jnp.where(total > 0, total, 1.0) for name, value in sums.items()}
    seen = jnp.sum(weight > 0, axis=(0, 2), dtype=jnp.float32)
    return variables, stats, metrics | {"image_gradients": jnp.sum(seen * passes)}


def steps_a_round(weight: Array, batches: int, setting: Setting, tasks: Tasks = "pairs") -> Array:
    """[] int32: the steps of `fit` along a gradient of so many batches for a client whose rows weigh `weight` [n], the
    real ones first."""
    size = jnp.sum(weight > 0, dtype=jnp.int32)
    if batches == 1:
        return setting.epochs * -(-size // setting.batch)
    if tasks == "halves":
        return setting.epochs * -(-((size + 1) // 2) // setting.batch)
    whole = size // (batches * setting.batch)
    return setting.epochs * (jnp.minimum(whole, 1) if tasks == "one" else whole)


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


def trainer(model: Model, setting: Setting, gradient: Gradient | None = None, tasks: Tasks = "pairs") -> Callable:
    """-> train(optimizer, params, stats, data, key, epochs=None, steps=None): `fit` of a fixed network, along the
    plain gradient of its cross entropy where none is given."""
    gradient = plain(classification_loss(model)) if gradient is None else gradient

    def train(optimizer, params, stats, data, key, epochs=None, steps=None):
        how = {"setting": setting, "momentum": model.momentum, "epochs": epochs, "steps": steps, "tasks": tasks}
        return fit(gradient, optimizer, params, stats, data, key, **how)

    return train
