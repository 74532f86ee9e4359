"""First-order MAML on all variables at once, weights and architecture alike (paper Eqs. 6, 7, 9, 10).

As the equations are read here: the inner loop starts at the un-adapted variables for every task; one
backward pass a step moves weights and alphas together (Eq. 9, the joint form); the query loss is
differentiated at the adapted point and that gradient is applied to the un-adapted variables (Eq. 10).
What differs between weights and alphas, rates and frozen parts, is said by the optax transformations.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.core import Array, Examples, Tree


def adapt(
    loss: Callable,
    variables: Tree,
    stats: Tree,
    batches: Examples,
    key: Array,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[Tree, Tree, Tree, dict]:
    """Eq. 9: one step of `optimizer` on each of k batches, leaves [k, b, ...], from a fresh state.

    loss: (variables, stats, batch, key) -> (value, (moments, accuracy)). Step m draws from fold_in(key, m),
    so that every forward pass has Gumbel noise of its own. `stats` stay as they are.
    Returns the adapted variables; the gradients and the moments of the last batch, taken where it was
    visited, before its own step; and {"loss" [k], "accuracy" [k]} along the way.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(carry, x):
        variables, state, _, _ = carry
        m, batch = x
        (value, (moments, accuracy)), grads = gradient(variables, stats, batch, jax.random.fold_in(key, m))
        updates, state = optimizer.update(grads, state, variables)
        visited = {"loss": value, "accuracy": accuracy}
        return (optax.apply_updates(variables, updates), state, grads, moments), visited

    start = variables, optimizer.init(variables), tree.zeros_like(variables), tree.zeros_like(stats)
    steps = jnp.arange(len(batches.label))
    (variables, _, grads, moments), visited = jax.lax.scan(step, start, (steps, batches))
    return variables, grads, moments, visited


def meta_gradient(
    loss: Callable,
    variables: Tree,
    stats: Tree,
    support: Examples,
    query: Examples,
    key: Array,
    *,
    steps: int,
    optimizer: optax.GradientTransformation,
    order: int = 1,
) -> tuple[Tree, Tree, dict]:
    """Gradient for the un-adapted variables after `steps` = M steps on `support`, of the query's size.

    order=1: the query's gradient at the adapted point (paper section 4.5; D-33). order=2: the exact
    derivative of Eq. 7 through the M steps; it keeps the intermediate values of all M + 1 passes in memory
    and takes 2 (M = 1) to 3 (large M) times the multiply-adds. M = 0: the plain gradient of the query.
    Returns gradients shaped as variables, the query's batch moments (those of the support are dropped:
    they belong to weights that are thrown away, D-10), and metrics: "loss" and "accuracy" of the query and,
    for M >= 1, "support_loss" before adaptation. ValueError for another order.
    """
    if order not in (1, 2):
        raise ValueError(f"order of the meta gradient is {order!r}; it can be 1 (first order) or 2 (exact)")

    def query_loss(variables):
        return loss(variables, stats, query, jax.random.fold_in(key, steps))

    if steps == 0:
        (value, (moments, accuracy)), grads = jax.value_and_grad(query_loss, has_aux=True)(variables)
        return grads, moments, {"loss": value, "accuracy": accuracy}

    if order == 1:
        # The query rides as the last of M + 1 batches, so that one compiled gradient serves all of them;
        # its own step, which adapt takes too, is not used.
        batches = jax.tree.map(lambda s, q: jnp.stack([s] * steps + [q]), support, query)
        _, grads, moments, visited = adapt(loss, variables, stats, batches, key, optimizer=optimizer)
        value, accuracy, support_loss = visited["loss"][-1], visited["accuracy"][-1], visited["loss"][0]
    else:
        batches = jax.tree.map(lambda s: jnp.stack([s] * steps), support)

        def adapted_query_loss(variables):
            adapted, _, _, visited = adapt(loss, variables, stats, batches, key, optimizer=optimizer)
            value, (moments, accuracy) = query_loss(adapted)
            return value, (moments, accuracy, visited["loss"][0])

        whole = jax.value_and_grad(adapted_query_loss, has_aux=True)
        (value, (moments, accuracy, support_loss)), grads = whole(variables)
    return grads, moments, {"loss": value, "accuracy": accuracy, "support_loss": support_loss}


def fit(
    loss: Callable,
    task_optimizer: optax.GradientTransformation,
    meta_optimizer: optax.GradientTransformation,
    variables: Tree,
    stats: Tree,
    data: Examples,
    key: Array,
    *,
    batch: int,
    epochs: int,
    augment: Callable,
    momentum: float,
    steps: int,
    order: int = 1,
    tasks: local.Tasks = "pairs",
) -> tuple[Tree, Tree, dict]:
    """`epochs` passes of meta updates over a client's rows, cut into tasks (D-7); optimizers start fresh.

    loss as in `adapt`; steps = M; momentum: stats <- (1 - momentum) stats + momentum moments of the query.
    Returns the meta variables (not the adapted ones), stats and metrics, means over the valid tasks:
    "loss" and "accuracy" of the query after adaptation, "support_loss" before it (M >= 1); and
    "image_gradients", the images through a forward and backward pass, batch (M + 1) a task. A task that
    holds padding changes nothing.
    """
    order_key, task_key = jax.random.split(key)
    rows, valid = local.all_tasks(order_key, data.weight, batch, epochs, tasks)

    def examples(key, rows) -> Examples:
        return Examples(augment(key, data.image[rows]), data.label[rows], data.weight[rows])

    def task(carry, x):
        (support_rows, query_rows), valid, key = x
        variables, stats, state = carry
        support_key, query_key, loss_key = jax.random.split(key, 3)
        grads, moments, metrics = meta_gradient(
            loss,
            variables,
            stats,
            examples(support_key, support_rows),
            examples(query_key, query_rows),
            loss_key,
            steps=steps,
            optimizer=task_optimizer,
            order=order,
        )
        updates, state = meta_optimizer.update(grads, state, variables)
        stepped = optax.apply_updates(variables, updates), tree.lerp(stats, moments, momentum), state
        return tree.where(valid, stepped, carry), metrics

    start = variables, stats, meta_optimizer.init(variables)
    keys = jax.random.split(task_key, len(rows))
    (variables, stats, _), metrics = jax.lax.scan(task, start, (rows, valid, keys))
    metrics = {name: local.mean_where(values, valid) for name, values in metrics.items()}
    metrics["image_gradients"] = jnp.sum(valid, dtype=jnp.float32) * batch * (steps + 1)
    return variables, stats, metrics
