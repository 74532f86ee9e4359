"""The federated methods by the name a user writes. A new one is a file here and a line below."""

from fedmetanas_jax.algorithms.ditto import ditto
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedbabu import fedbabu
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.algorithms.fedprox import fedprox
from fedmetanas_jax.algorithms.fedrandom import fedrandom
from fedmetanas_jax.algorithms.fedrep import fedrep
from fedmetanas_jax.algorithms.perfedavg import perfedavg
from fedmetanas_jax.algorithms.scaffold import scaffold

ALGORITHMS = {
    "fedmetanas": fedmetanas,
    "fedrandom": fedrandom,
    "fedavg": fedavg,
    "fedprox": fedprox,
    "scaffold": scaffold,
    "ditto": ditto,
    "perfedavg": perfedavg,
    "fedrep": fedrep,
    "fedbabu": fedbabu,
}
