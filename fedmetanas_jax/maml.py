"""First-order MAML on all variables at once, weights and architecture alike (paper Eqs. 6, 7, 9, 10).

As the equations are read here: the inner loop starts at the un-adapted variables for every task; one
backward pass a step moves weights and alphas together (Eq. 9, the joint form); the query loss is
differentiated at the adapted point and that gradient is applied to the un-adapted variables (Eq. 10).
What differs between weights and alphas, rates and frozen parts, is said by the optax transformations.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

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

    # The last two are of their shapes alone: the first step writes over them. Zeros would be one more program each.
    start = variables, optimizer.init(variables), variables, stats
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


def hessian_free_gradient(
    loss: Callable,
    variables: Tree,
    stats: Tree,
    support: Examples,
    query: Examples,
    third: Examples,
    key: Array,
    *,
    optimizer: optax.GradientTransformation,
    delta: float = 1e-3,
) -> tuple[Tree, Tree, dict]:
    """`meta_gradient` after one inner step, its Hessian by a difference of gradients (Per-FedAvg's HF form).

    v - a [g(w + delta v) - g(w - delta v)] / (2 delta): v is the query's gradient at w' = w - a g(w; support),
    g(.) the third batch's. `optimizer` is to be linear in the gradient, as plain SGD at rate a is.
    """
    pair = jax.tree.map(lambda s, q: jnp.stack([s, q]), support, query)
    _, v, moments, visited = adapt(loss, variables, stats, pair, key, optimizer=optimizer)

    def beside(side: Array) -> Tree:
        moved = jax.tree.map(lambda w, d: w + side * delta * d, variables, v)
        return jax.grad(loss, has_aux=True)(moved, stats, third, jax.random.fold_in(key, 2))[0]

    sides = jax.lax.map(beside, jnp.array([1.0, -1.0]))
    hessian_times_v = jax.tree.map(lambda g: (g[0] - g[1]) / (2 * delta), sides)
    through_the_step, _ = optimizer.update(hessian_times_v, optimizer.init(variables), variables)
    loss_and_accuracy = {"loss": visited["loss"][1], "accuracy": visited["accuracy"][1]}
    return tree.add(v, through_the_step), moments, loss_and_accuracy | {"support_loss": visited["loss"][0]}


def gradient(
    loss: Callable, optimizer: optax.GradientTransformation, *, M: int, order: Literal[1, 2, "hf"] = 1
) -> local.Gradient:
    """Meta gradient after M steps of `optimizer`: `meta_gradient` of that order or, "hf", `hessian_free_gradient`.

    To be descended along by `local.fit`, whose tasks then have a support and a query batch and, with "hf", a third.
    ValueError for "hf" with another M than 1.
    """
    names = "loss", "accuracy", "support_loss"
    if order != "hf":
        of = partial(_of_a_task, partial(meta_gradient, steps=M, order=order), loss, optimizer)
        return local.Gradient(of, (M, 1), names if M else names[:2])
    if M != 1:
        raise ValueError(f"the Hessian-free meta gradient takes 1 inner step, not {M}")
    return local.Gradient(partial(_of_a_task, hessian_free_gradient, loss, optimizer), (1, 1, 2), names)


def _of_a_task(way, loss, optimizer, variables, stats, batches, key):
    return way(loss, variables, stats, *batches, key, optimizer=optimizer)
