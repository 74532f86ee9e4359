"""Meta-FedPNAS: FedPNAS's shared base and personal part, searched as FedMetaNAS searches.

Huang, Gao: Federated Neural Architecture Search with Model-Agnostic Meta Learning, arXiv 2504.06457, Table 5. All it
says is that this form "incorporates our proposed MAML and pruning". Of several readings this one keeps FedPNAS's cut of
the network and nothing else of it (D-53): the inner steps move the personal part alone, the meta step everything.
"""

from typing import Literal

from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.algorithms.personal import base_of, personal_part
from fedmetanas_jax.core import Phase, SearchSpace, Setting


def metafedpnas(
    space: SearchSpace,
    setting: Setting,
    *,
    base_cells: int | None = None,
    M: int = 1,
    task_lr: float = 0.01,
    task_alpha_lr: float = 1.0,
    alpha_lr: float | None = None,
    travel: float = 40.0,
    gumbel: bool = True,
    prune: Literal["line", "threshold"] = "line",
    prune_from: float = 0.15,
    prune_until: float = 0.5,
    prune_events: int = 18,
    prune_tolerance: float | None = 0.01,
    order: Literal[1, 2] = 1,
) -> list[Phase]:
    """FedMetaNAS whose inner steps, and a client that adapts, move the last cells and the head alone.

    Cells of the base and cells of the personal part have logits of their own, by type.

    Paper: Huang and Gao, arXiv 2504.06457; Hoang and Kingsford, NeurIPS 2021 workshop

    Args:
      base_cells: cells of the base; none = all but a quarter, and but one at least (D-19). The head is personal.
      M, task_lr, task_alpha_lr, alpha_lr, travel, gumbel, prune, prune_from, prune_until, prune_events,
        prune_tolerance, order: as of fedmetanas.
    """
    base = base_of(space, base_cells)
    cut = space.resized(parts=(base,)) if 0 < base < space.cells else space
    return fedmetanas(
        cut,
        setting,
        M=M,
        task_lr=task_lr,
        task_alpha_lr=task_alpha_lr,
        alpha_lr=alpha_lr,
        travel=travel,
        gumbel=gumbel,
        prune=prune,
        prune_from=prune_from,
        prune_until=prune_until,
        prune_events=prune_events,
        prune_tolerance=prune_tolerance,
        order=order,
        personal=personal_part(cut, base),
    )
