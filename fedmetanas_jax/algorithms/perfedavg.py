"""Per-FedAvg: Personalized Federated Learning with Theoretical Guarantees, a Model-Agnostic Meta-Learning Approach.

Fallah, Mokhtari, Ozdaglar; NeurIPS 2020.
"""

from typing import Literal

from fedmetanas_jax import local, maml
from fedmetanas_jax.algorithms.averaging import averaging
from fedmetanas_jax.core import Algorithm, Model, Setting
from fedmetanas_jax.optimizers import local_sgd, sgd


def perfedavg(
    model: Model,
    setting: Setting,
    *,
    M: int = 1,
    task_lr: float = 0.01,
    order: Literal["first", "hf", "exact"] = "first",
    tasks: Literal["pairs", "one", "split"] = "pairs",
) -> Algorithm:
    """FedAvg of an initialisation from which one gradient step personalises: first-order MAML on every client.

    Paper: Fallah, Mokhtari and Ozdaglar, NeurIPS 2020

    Args:
      M: inner steps on the first batch of a task (the paper's is 1); 0 is SGD on the second batches.
      task_lr: of the inner steps and of personalising, plain SGD (alpha in the paper). The setting's local SGD is
        the meta optimizer (beta).
      order: "first" drops the Hessian (the paper's FO), "hf" takes it by a difference of gradients on a third
        batch (HF), "exact" differentiates through the inner steps.
      tasks: how an epoch is cut into tasks (D-7); the rows that fill none are dropped (D-37).
    """
    if M < 0:
        raise ValueError(f"M is {M}; it must be 0 or more")
    if order == "hf" and M != 1:
        raise ValueError(f"M is {M}, but order=hf takes 1 inner step")
    how = {"first": 1, "hf": "hf", "exact": 2}[order]
    # 1 w <- w_t.  2 for each pair (B1, B2): w' = w - a grad(B1; w); w <- w - b grad(B2; w').  3 return w - w_t.
    gradient = maml.gradient(local.classification_loss(model), sgd(task_lr), M=M, order=how)
    # 5 personalise: one step at rate a on the client's own images, which is FedAvg's fine-tuning.
    base = averaging(
        model, setting, lambda sent: local_sgd(setting, sent.round), sgd(task_lr), gradient=gradient, tasks=tasks
    )
    return base._replace(depth="step", least_rows=gradient.batches * setting.batch)
