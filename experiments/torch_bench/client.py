"""A client's round of FedMetaNAS as an eager training loop (Algorithm 1, "Client Search"; methods section 5).

First-order MAML: M steps on the support batch move weights and logits together, the query's gradient is taken
there, the un-adapted variables come back and move with it. Everything random is in the tasks.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import cos, pi
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_bench.relaxation import Alpha, mix


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
    """The numbers of one round, with the defaults of methods section 5 but for those that follow the round."""

    lr: float  # of the weights' meta step
    temperature: float
    searching: bool  # False during warm-up: the logits stand still
    M: int = 1
    task_lr: float = 0.01
    task_alpha_lr: float = 1.0  # times the temperature
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    alpha_lr: float = 3e-4
    alpha_weight_decay: float = 1e-3


def rates_at(t: int, rounds: int, M: int = 1) -> Rates:
    """Round t of `rounds`: cosine 0.025 -> 0.001, temperature 1 -> 0.1 over 80 %, logits still for 5 %."""
    lr = 0.001 + 0.024 * (1 + cos(pi * min(t / rounds, 1))) / 2
    temperature = 1 - 0.9 * min(t / rounds / 0.8, 1)
    return Rates(lr, temperature, t / rounds >= 0.05, M)


def running_statistics(net: nn.Module) -> list[Tensor]:
    """Running means and variances of every batch norm, the tensors themselves."""
    return [b for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))]


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
    norm = nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, torch.clamp(most / norm, max=1.0))


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

    forward: a compiled `net`, if the eager one is not to be used. autocast: makes the context in which the
    forward passes run.
    """
    forward = net if forward is None else forward
    alpha = Alpha(*(x.detach().clone().requires_grad_() for x in alpha))
    weights, statistics = list(net.parameters()), running_statistics(net)
    variables = [*weights, *alpha]
    sgd = torch.optim.SGD(weights, rates.lr, rates.momentum, weight_decay=rates.weight_decay)
    adam = torch.optim.Adam(alpha, rates.alpha_lr, (0.5, 0.999), weight_decay=rates.alpha_weight_decay)
    alpha_task_lr = rates.task_alpha_lr * rates.temperature * rates.searching
    inner = torch.optim.SGD([{"params": weights}, {"params": list(alpha), "lr": alpha_task_lr}], rates.task_lr)

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
        clip_global_norm(weights, rates.clip)
        sgd.step()
        if rates.searching:
            adam.step()
            # Weight decay and Adam's moments would move logits that are out of the search.
            with torch.no_grad():
                for x, alive, old in zip(alpha, mask, unadapted[-2:], strict=True):
                    x.copy_(torch.where(alive, x, old))
    return Alpha(*(x.detach() for x in alpha)), torch.stack(losses).mean()
