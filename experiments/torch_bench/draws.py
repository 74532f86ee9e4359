"""The random numbers of the JAX client's round, for the PyTorch client: rows of every task, Gumbel noise.

The functions called are the project's own, with the keys that `maml.fit` derives from a client's key.
"""

from functools import partial

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from fedmetanas_jax import local
from torch_bench.client import Task
from torch_bench.convert import alpha_to_torch, batch_to_torch


@partial(jax.jit, static_argnums=(3, 4, 5))
def drawn(key, weight, alpha, M: int, batch: int, epochs: int):
    """rows [tasks, 2, batch], valid [tasks], noise shaped as alpha with [tasks, M + 1] in front."""
    order_key, task_key = jax.random.split(key)
    rows, valid = local.all_tasks(order_key, weight, batch, epochs)
    flat, unravel = ravel_pytree(alpha)

    def noise(key, m):  # as `relax.softmax` draws it
        return unravel(jax.random.gumbel(jax.random.fold_in(key, m), flat.shape).astype(flat.dtype))

    def of_task(key):
        *_, loss_key = jax.random.split(key, 3)
        return jax.vmap(partial(noise, loss_key))(np.arange(M + 1))

    return rows, valid, jax.vmap(of_task)(jax.random.split(task_key, len(rows)))


def tasks_of(key, data, alpha, *, M: int, batch: int, epochs: int, **layout) -> list[Task]:
    """The tasks that `fedmetanas.client_update(server, state, data, key)` works on, without augmentation.

    data: Examples; alpha: of the server, for its shapes; layout: of `batch_to_torch`. To be called under the
    float precision that the JAX side runs in: the draws differ. ValueError where a task holds padding, which
    the JAX client skips and the PyTorch one cannot.
    """
    rows, valid, noise = drawn(key, data.weight, alpha, M, batch, epochs)
    if not np.all(valid):
        raise ValueError("a task holds padding; give data whose rows are all real")
    image, label, noise = np.asarray(data.image), np.asarray(data.label), jax.tree.map(np.asarray, noise)
    tasks = []
    for t, halves in enumerate(np.asarray(rows)):
        support, query = (batch_to_torch(image[half], label[half], **layout) for half in halves)
        draws = [alpha_to_torch([x[t, m] for x in noise]) for m in range(M + 1)]
        if "device" in layout:
            draws = [type(g)(*(x.to(layout["device"]) for x in g)) for g in draws]
        tasks.append(Task(support, query, draws))
    return tasks
