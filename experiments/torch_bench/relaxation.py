"""Architecture parameters to mixing weights: Gumbel-softmax over operations and pairs (methods sections 3.3, 4).

An edge normalises its operations, a node its pairs of inputs; what is masked weighs exactly 0.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor


class Alpha(NamedTuple):
    """Free logits, Gumbel noise for them, or a mask of them (bool): one of each shape."""

    op: Tensor  # [2, edges, ops]
    pair: Tensor  # [2, pairs]


def masked_softmax(logits: Tensor, alive: Tensor) -> Tensor:
    """Softmax over the last axis of what is alive; a row with nothing alive is all 0."""
    # A row of -inf alone would be NaN, in the gradient too, so a dead row is computed whole and cleared.
    counted = alive | ~alive.any(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(~counted, -torch.inf), -1) * alive


def gumbel(shape, generator: torch.Generator | None = None, device=None) -> Tensor:
    """-log(-log U) of float32 uniforms in (0, 1)."""
    tiny = torch.finfo(torch.float32).tiny
    u = torch.rand(shape, generator=generator, device=device).clamp_min(tiny)
    return -torch.log(-torch.log(u))


def mix(alpha: Alpha, mask: Alpha, temperature: float, noise: Alpha | None = None) -> Tensor:
    """[2, edges, ops]: Eq. 8's factor u_ij Z_k of every candidate; without `noise` the plain softmax.

    u_ij is the sum of the weights of node j's pairs that hold input i.
    """
    op, pair = alpha
    if noise is not None:
        op, pair = op + noise.op, pair + noise.pair
    z = masked_softmax(op / temperature, mask.op)
    edge_weights, first, nodes = [], 0, 0
    while first < pair.shape[-1]:
        pairs = list(combinations(range(nodes + 2), 2))
        mine = slice(first, first + len(pairs))
        weights = masked_softmax(pair[:, mine] / temperature, mask.pair[:, mine])
        for i in range(nodes + 2):
            edge_weights.append(sum(weights[:, p] for p, two in enumerate(pairs) if i in two))
        first, nodes = first + len(pairs), nodes + 1
    return torch.stack(edge_weights, 1)[..., None] * z
