"""Per-FedAvg: Personalized Federated Learning with Theoretical Guarantees, a Model-Agnostic Meta-Learning Approach.

Fallah, Mokhtari, Ozdaglar; NeurIPS 2020.
"""

from typing import Literal

import jax.numpy as jnp

from fedmetanas_jax import local, maml
from fedmetanas_jax.algorithms.fedavg import averaging
from fedmetanas_jax.core import Algorithm, ClientUpdate, Model, Setting
from fedmetanas_jax.optimizers import scheduled_sgd, sgd


def perfedavg(
    model: Model,
    setting: Setting,
    *,
    M: int = 1,
    task_lr: float = 0.01,
    order: Literal["first", "hf", "exact"] = "first",
    lr: float = 0.025,
    lr_end: float = 0.001,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    clip: float | None = None,
    tasks: Literal["pairs", "one", "split"] = "pairs",
) -> Algorithm:
    """FedAvg of an initialisation from which one gradient step personalises: first-order MAML on every client.

    Paper: Fallah, Mokhtari and Ozdaglar, NeurIPS 2020

    Args:
      M: inner steps on the first batch of a task (the paper's is 1); 0 is SGD on the second batches.
      task_lr: of the inner steps and of personalising, plain SGD (alpha in the paper).
      order: "first" drops the Hessian (the paper's FO), "hf" takes it by a difference of gradients on a third
        batch (HF), "exact" differentiates through the inner steps.
      lr, lr_end, momentum, weight_decay, clip: the meta optimizer, SGD, cosine over the rounds (beta).
      tasks: how an epoch is cut into tasks (D-7); the rows that fill none are dropped (D-37).
    """
    if M < 0:
        raise ValueError(f"M is {M}; it must be 0 or more")
    if order == "hf" and M != 1:
        raise ValueError(f"M is {M}, but order=hf takes 1 inner step")
    how = {"first": 1, "hf": "hf", "exact": 2}[order]
    loss, sgd_at = local.classification_loss(model), scheduled_sgd(setting, lr, lr_end, momentum, weight_decay, clip)
    base = averaging(model, setting, lambda server: sgd_at(server.round), sgd(task_lr))

    def client_update(server, client_state, data, key):
        # 1 w <- w_t.  2 for each pair (B1, B2): w' = w - a grad(B1; w); w <- w - b grad(B2; w').
        params, stats, metrics = maml.fit(
            loss, sgd(task_lr), sgd_at(server.round), server.params, server.stats, data, key,
            batch=setting.batch, epochs=setting.epochs, augment=setting.augment,
            momentum=model.momentum, steps=M, order=how, tasks=tasks,
        )  # fmt: skip
        # 3 return w.
        return ClientUpdate((params, stats), jnp.sum(data.weight), client_state, metrics)

    # 5 personalise: one step at rate a on the client's own images, which is what FedAvg's fine-tuning does.
    least_rows = maml.batches_of_a_task(how) * setting.batch
    return base._replace(client_update=client_update, depth="step", least_rows=least_rows)
