"""network.stablehlo: what `jax.export` leaves, for any number of images.

It is exported for one platform, but nothing in it is of that platform, and so calling it on others is not refused.
Exported for several, the program would ask at every convolution where it runs, by a conditional.
"""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from exports import plain
from exports.layers import Step
from fedmetanas_jax.files import write_bytes
from fedmetanas_jax.network import Network

# A shape_assertion is let through: by it JAX makes sure that there is an image at all.
UNWANTED = re.compile(r"optimization_barrier|stablehlo\.(?:case|if|while)|custom_call @(?!shape_assertion)\w+")


def write(network: Network, steps: list[Step], folder: Path) -> list[Path]:
    """-> the files. RuntimeError where the program holds what it should not."""
    exported = program(network, steps)
    if found := sorted({*UNWANTED.findall(exported.mlir_module())}):
        raise RuntimeError(f"the exported program holds {', '.join(found)}")
    path = folder / "network.stablehlo"
    write_bytes(path, bytes(exported.serialize()))
    return [path]


def program(network: Network, steps: list[Step]) -> export.Exported:
    """The function of images [n, h, w, c] for whatever n."""
    (batch,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((batch, *network.header["arguments"]["shape"]), jnp.uint8)
    anywhere = [export.DisabledSafetyCheck.platform()]
    return export.export(jax.jit(plain.function(steps)), platforms=["cpu"], disabled_checks=anywhere)(images)


def read(files: list[Path]) -> Callable:
    """images [n, h, w, c] uint8 -> logits, by the files alone."""
    return jax.jit(export.deserialize(bytearray(files[0].read_bytes())).call)


def runtime() -> str:
    """What `read` runs it in."""
    return f"jax {jax.__version__}"
