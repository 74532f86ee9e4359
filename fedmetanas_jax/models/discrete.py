"""A discrete DARTS network of fixed architecture, as a Model: what methods that search nothing can train."""

import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Model
from fedmetanas_jax.models.darts import darts_space


def discrete_network(*, keep: list, mix: np.ndarray, **network) -> Model:
    """The network that computes the operations `keep` alone, [2][edges] lists, with weights mix [2, edges, ops].

    `network` are the arguments of `darts` but for the plan. Batch norms are the search network's, without
    scale and shift, so weights found by a search fit.
    """
    supernet, mix = darts_space(**network).make(keep), jnp.asarray(mix)

    def apply(params, stats, image, train, key=None):
        return supernet.apply(params, stats, image, mix, train)

    return Model(supernet.init, apply, supernet.momentum, supernet.macs, head=("head_bias", "head_kernel"))
