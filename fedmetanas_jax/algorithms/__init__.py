"""The federated methods by the name a user writes. A new one is a file here and a line below."""

from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas

ALGORITHMS = {"fedmetanas": fedmetanas, "fedavg": fedavg}
