"""The federated methods by the name a user writes. A new one is a file here and a line below."""

from fedmetanas_jax.algorithms.ditto import ditto
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedbabu import fedbabu
from fedmetanas_jax.algorithms.feddsnas import feddsnas
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.algorithms.fednas import fednas
from fedmetanas_jax.algorithms.fedpnas import fedpnas
from fedmetanas_jax.algorithms.fedprox import fedprox
from fedmetanas_jax.algorithms.fedrandom import fedrandom
from fedmetanas_jax.algorithms.fedrep import fedrep
from fedmetanas_jax.algorithms.fedrlnas import fedrlnas
from fedmetanas_jax.algorithms.metafedpnas import metafedpnas
from fedmetanas_jax.algorithms.metaperfedrlnas import metaperfedrlnas
from fedmetanas_jax.algorithms.perfedavg import perfedavg
from fedmetanas_jax.algorithms.perfedrlnas import perfedrlnas
from fedmetanas_jax.algorithms.scaffold import scaffold

ALGORITHMS = {
    "fedmetanas": fedmetanas,
    "fedrandom": fedrandom,
    "fednas": fednas,
    "feddsnas": feddsnas,
    "fedpnas": fedpnas,
    "metafedpnas": metafedpnas,
    "fedrlnas": fedrlnas,
    "perfedrlnas": perfedrlnas,
    "metaperfedrlnas": metaperfedrlnas,
    "fedavg": fedavg,
    "fedprox": fedprox,
    "scaffold": scaffold,
    "ditto": ditto,
    "perfedavg": perfedavg,
    "fedrep": fedrep,
    "fedbabu": fedbabu,
}
