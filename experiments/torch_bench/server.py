"""One federated round, one client after another on one model object, as simulators usually do it."""

import torch
from torch import nn

from torch_bench.client import Rates, Task, client_round, copies, put_back, running_statistics
from torch_bench.relaxation import Alpha


@torch.no_grad()
def add_share(total: list, values: list, share: float) -> None:
    """total += share * values, tensor by tensor."""
    torch._foreach_add_(total, values, alpha=share)


def federated_round(
    net: nn.Module, alpha: Alpha, mask: Alpha, clients: list[list[Task]], rates: Rates, **how
) -> tuple[Alpha, torch.Tensor]:
    """Every client starts from the server's state; net and the alpha returned become their mean.

    Clients weigh the same, as they hold equally many images. `how` goes to `client_round`. Returns
    (alpha, mean query loss []).
    """
    state = [*net.parameters(), *running_statistics(net)]
    start = copies(state)
    total, total_alpha = [torch.zeros_like(x) for x in start], [torch.zeros_like(x) for x in alpha]
    losses = []
    for tasks in clients:
        put_back(state, start)
        found, loss = client_round(net, alpha, mask, tasks, rates, **how)
        add_share(total, [x.detach() for x in state], 1 / len(clients))
        add_share(total_alpha, list(found), 1 / len(clients))
        losses.append(loss)
    put_back(state, total)
    return Alpha(*total_alpha), torch.stack(losses).mean()
