"""FedMetaNAS as an eager training loop: a client's round (Algorithm 1, "Client Search"; methods section 5), and a
round of all clients, one after another on one model object, as simulators usually do it.

First-order MAML: M steps on the support batch move weights and logits together, the query's gradient is taken
there, the un-adapted variables come back and move with it. Everything random is in the tasks.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import cos, pi
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_bench.supernet import Alpha, mix


class Batch(NamedTuple):
    """Labelled images."""

    image: Tensor  # [N, channels, H, W] uint8
    label: Tensor  # [N] int64


class Task(NamedTuple):
    """What one meta update sees."""

    support: Batch
    query: Batch
    noise: list[Alpha]  # M + 1 Gumbel draws: of every support pass, then of the query pass


class Rates(NamedTuple):
    """The numbers that follow the round, and how many inner steps a task has."""

    lr: float  # of the weights' meta step
    temperature: float
    searching: bool  # False during warm-up: the logits stand still
    M: int = 1


def rates_at(t: int, rounds: int, M: int = 1) -> Rates:
    """Round t of `rounds`: cosine 0.025 -> 0.001, temperature 1 -> 0.1 over 80 %, logits still for 5 %."""
    lr = 0.001 + 0.024 * (1 + cos(pi * min(t / rounds, 1))) / 2
    temperature = 1 - 0.9 * min(t / rounds / 0.8, 1)
    return Rates(lr, temperature, t / rounds >= 0.05, M)


def state_of(net: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and running means and variances of every batch norm: the tensors themselves."""
    statistics = [b for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return list(net.parameters()), statistics


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that do not change when the tensors do."""
    return [x.detach().clone() for x in tensors]


@torch.no_grad()
def put_back(tensors: list[Tensor], saved: list[Tensor]) -> None:
    """Overwrites the tensors with what was saved of them."""
    torch._foreach_copy_(tensors, saved)


@torch.no_grad()
def clip_global_norm(tensors: list[Tensor], most: float) -> None:
    """Scales the gradients so that all of them together are no longer than `most`."""
    grads = [x.grad for x in tensors]
    torch._foreach_mul_(grads, torch.clamp(most / nn.utils.get_total_norm(grads), max=1.0))


def client_round(
    net: nn.Module,
    alpha: Alpha,
    mask: Alpha,
    tasks: Iterable[Task],
    rates: Rates,
    *,
    forward: Callable | None = None,
    autocast=nullcontext,
) -> tuple[Alpha, Tensor]:
    """Trains `net` in place on the tasks, from fresh optimizers -> (the client's alpha, mean query loss []).

    forward: a compiled `net`, if the eager one is not to be used. autocast: the context of the forward passes.
    """
    forward = net if forward is None else forward
    alpha = Alpha(*(x.detach().clone().requires_grad_() for x in alpha))
    weights, statistics = state_of(net)
    variables = [*weights, *alpha]
    # The rates of methods section 5.
    sgd = torch.optim.SGD(weights, rates.lr, momentum=0.9, weight_decay=3e-4)
    adam = torch.optim.Adam(alpha, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    task_alpha_lr = 1.0 * rates.temperature * rates.searching
    inner = torch.optim.SGD([{"params": weights}, {"params": list(alpha), "lr": task_alpha_lr}], lr=0.01)

    def gradients(batch: Batch, noise: Alpha) -> Tensor:
        inner.zero_grad()
        with autocast():
            logits = forward(batch.image, mix(alpha, mask, rates.temperature, noise))
        loss = nn.functional.cross_entropy(logits.float(), batch.label)
        loss.backward()
        return loss.detach()

    net.train()
    losses = []
    for task in tasks:
        unadapted, before = copies(variables), copies(statistics)
        for m in range(rates.M):
            gradients(task.support, task.noise[m])
            inner.step()
        # Moments seen by weights that are thrown away are thrown away too (D-10).
        put_back(statistics, before)
        losses.append(gradients(task.query, task.noise[rates.M]))
        put_back(variables, unadapted)
        clip_global_norm(weights, 5.0)
        sgd.step()
        if rates.searching:
            adam.step()
            # Weight decay and Adam's moments would move logits that are out of the search.
            with torch.no_grad():
                for x, alive, old in zip(alpha, mask, unadapted[-2:], strict=True):
                    x.copy_(torch.where(alive, x, old))
    return Alpha(*(x.detach() for x in alpha)), torch.stack(losses).mean()


def federated_round(
    net: nn.Module, alpha: Alpha, mask: Alpha, clients: list[Iterable[Task]], rates: Rates, **how
) -> tuple[Alpha, Tensor]:
    """Every client starts from the server's state; net becomes their mean -> (alpha's mean, mean query loss []).

    Clients weigh the same, as they hold equally many images. `how` goes to `client_round`.
    """
    weights, statistics = state_of(net)
    state = [*weights, *statistics]
    start, losses = copies(state), []
    total = [torch.zeros_like(x) for x in [*start, *alpha]]
    for tasks in clients:
        put_back(state, start)
        found, loss = client_round(net, alpha, mask, tasks, rates, **how)
        with torch.no_grad():
            torch._foreach_add_(total, [*state, *found], alpha=1 / len(clients))
        losses.append(loss)
    put_back(state, total[: len(state)])
    return Alpha(*total[len(state) :]), torch.stack(losses).mean()
