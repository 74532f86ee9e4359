"""Times formulations of the DARTS supernet against each other, on whatever JAX runs on.

    python experiments/formulations.py step                          # remat, stored and batched cells
    python experiments/formulations.py step --before OTHER_CHECKOUT  # and the network of another checkout
    python experiments/formulations.py step --plan terminal          # the network a search ends with
    python experiments/formulations.py layers                        # single layers

All run in one process and in turn, so that other work on the machine meets all alike: read ratios, not
seconds. Every program holds a scan over several steps, as a round does; a program of one step would mostly
measure how memory is handed out. "cpu" is processor time, which other processes disturb less.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing.cases import Case, plan_and_mask

HERE = str(Path(__file__).resolve().parents[1])


def load(checkout: str):
    """The module `models.darts` of a checkout, apart from that of any other checkout loaded."""
    for name in [name for name in sys.modules if name.split(".")[0] == "fedmetanas_jax"]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    module = importlib.import_module("fedmetanas_jax.models.darts")
    sys.path.pop(0)
    return module


def compare(functions: dict, arguments: tuple, repetitions: int, steps: int) -> None:
    """Compiles and runs functions {name: f(*arguments)} in turn; prints time of one of their `steps`."""
    programs, times, first = {}, {name: [] for name in functions}, None
    for name, function in functions.items():
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        traced = time.perf_counter()
        programs[name] = lowered.compile()
        compiled = time.perf_counter()
        memory = programs[name].memory_analysis()
        out = jax.block_until_ready(programs[name](*arguments))
        first = out if first is None else first
        apart = max(distance(a, b) for a, b in zip(*map(jax.tree.leaves, (out, first)), strict=True))
        print(
            f"{name:34s} trace {traced - start:6.1f} s  compile {compiled - traced:6.1f} s  "
            f"temporaries {memory.temp_size_in_bytes / 1e6:8.1f} MB  differs from the first by {apart:.1e}",
            flush=True,
        )
    for _ in range(repetitions):
        for name, program in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*arguments))
            times[name].append(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    least = {name: np.min(values, 0) for name, values in times.items()}
    reference = next(iter(least.values()))
    for name, values in times.items():
        wall, cpu = 1e3 * least[name]
        middle = 1e3 * np.median([w for w, _ in values])
        ratio = reference / least[name]
        print(
            f"{name:34s} wall {wall:9.2f} ms (median {middle:9.2f})  cpu {cpu:9.2f} ms  "
            f"speed against the first: wall {ratio[0]:.2f}, cpu {ratio[1]:.2f}",
            flush=True,
        )


def distance(a, b) -> float:
    """|a - b| / |b|."""
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def network_steps(flags) -> dict:
    """{name: function of (params, stats, images, mix)} that takes `flags.steps` steps of plain SGD."""
    size = {"width": flags.width, "length": flags.cells, "nodes": flags.nodes, "dtype": flags.dtype}
    task = {"shape": (flags.image, flags.image, 3), "classes": 10, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    case = Case("step", 1, 1, 1, (), plan=flags.plan, nodes=flags.nodes)
    task["plan"] = tuple(tuple(map(tuple, edges)) for edges in plan_and_mask(case, seed=0)[0])

    def training(net):
        def loss(trained, stats, image):
            logits, _ = net.apply(trained[0], stats, image, trained[1], True)
            return jnp.mean(jnp.square(logits - 1))

        def run(params, stats, images, mix):
            def step(trained, image):
                grads = jax.grad(loss)(trained, stats, image)
                return jax.tree.map(lambda x, g: x - 1e-3 * g, trained, grads), None

            return jax.lax.scan(step, (params, mix), images)[0]

        return run

    found = {}
    if flags.before:
        found["before"] = training(load(flags.before).darts(**task, **size))
    darts = load(HERE).darts
    ways = importlib.import_module("fedmetanas_jax.networks").WAYS
    for name in flags.ways.split(","):
        found[name] = training(darts(**task, **size, how=ways[name]))
    params, stats = jax.jit(darts(**task, **size).init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (flags.steps, flags.batch, *task["shape"])).astype(np.uint8)
    edges = flags.nodes * (flags.nodes + 3) // 2
    mix = jnp.asarray(rng.uniform(0.05, 0.2, (2, edges, 8)), jnp.float32)
    return found, (params, stats, jnp.asarray(images), mix)


def layer_pairs(flags):
    """(title, {name: one layer's value}, its arguments) of layers written in more than one way."""
    load(HERE)
    from fedmetanas_jax.models import batchnorm, layers

    rng = np.random.default_rng(0)
    for width, image in ((flags.width, flags.image), (4 * flags.width, flags.image // 4)):
        x = jnp.asarray(rng.normal(size=(width, image, image, flags.batch)), flags.dtype)
        kernel = jnp.asarray(rng.normal(size=(width, 5, 5)), jnp.float32)
        matrix = jnp.asarray(rng.normal(size=(width, width)), jnp.float32)
        title = f"[C, H, W, N] = {x.shape}"

        def einsum(x, kernel, matrix):
            return jnp.einsum("oi,ihwn->ohwn", matrix.astype(x.dtype), layers.depthwise(x, kernel))

        def product(x, kernel, matrix):
            return layers.pointwise(layers.depthwise(x, kernel), matrix)

        def settled(x, kernel, matrix):
            return layers.pointwise(layers.settled(layers.depthwise(x, kernel)), matrix)

        yield (
            f"depthwise 5x5, then pointwise, {title}",
            {"pointwise: einsum": einsum, "pointwise: 2-d product": product, "product, input settled": settled},
            (x, kernel, matrix),
        )

        def two_passes(x, matrix, weight):
            x = layers.pointwise(x, matrix)
            centred = x - jnp.mean(x, (1, 2, 3), keepdims=True)
            return weight * centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), (1, 2, 3), keepdims=True) + 1e-5)

        def weight_after(x, matrix, weight):
            return weight.astype(x.dtype) * batchnorm.batch_norm(layers.pointwise(x, matrix))[0]

        def weight_inside(x, matrix, weight):
            return batchnorm.weighted_norm(layers.pointwise(x, matrix), weight)[0]

        yield (
            f"pointwise, batch norm, weight, {title}",
            {
                "two passes, automatic gradient": two_passes,
                "one pass, weight after": weight_after,
                "one pass, weight inside": weight_inside,
            },
            (x, matrix, jnp.float32(0.3)),
        )
        if flags.kernel:
            yield f"ReLU, depthwise 5x5, pointwise, batch norm, {title}", blocks(flags.kernel), (x, kernel, matrix)


def blocks(kernel: str) -> dict:
    """A block by the layers and by the Pallas kernels: function of (x, depthwise, pointwise)."""
    from fedmetanas_jax.models import batchnorm, fused, layers

    def by_layers(x, depthwise, pointwise):
        y = layers.settled(layers.depthwise(jax.nn.relu(x), depthwise))
        return batchnorm.batch_norm(layers.pointwise(y, pointwise))[0]

    def by_kernels(x, depthwise, pointwise):
        y, sums, squares = fused.relu_depthwise_pointwise(x, depthwise, pointwise, interpret=kernel == "interpret")
        return batchnorm.batch_norm(y, known=(sums / y[0].size, squares / y[0].size))[0]

    return {"by layers": by_layers, "by Pallas kernels": by_kernels}


def repeated(layer, steps: int):
    """`steps` forward and backward passes, each fed by the last."""

    def run(x, *weights):
        def step(x, _):
            y, pull = jax.vjp(layer, x, *weights)
            grad_x, *grads = pull(jnp.sin(y))
            return (x + 1e-3 * grad_x).astype(x.dtype), grads

        return jax.lax.scan(step, x, None, steps)

    return run


def main() -> None:
    """Reads the flags and runs one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "layers"))
    parser.add_argument("--before", help="a checkout of the project to compare with")
    names = "of the network: remat, stored, batched, batched-remat and, on a GPU, pallas"
    parser.add_argument("--ways", default="remat,stored,batched", help=names)
    parser.add_argument("--kernel", choices=("pallas", "interpret"), help="layers: also a block by the Pallas kernels")
    parser.add_argument("--plan", choices=("full", "terminal"), default="full", help="of the network")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="in one program")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.default_backend()}, {flags.dtype}, batch {flags.batch}", flush=True)
    if flags.what == "step":
        compare(*network_steps(flags), flags.repetitions, flags.steps)
        return
    for title, functions, arguments in layer_pairs(flags):
        print(f"\n{title}, forward and backward")
        functions = {name: repeated(layer, flags.steps) for name, layer in functions.items()}
        compare(functions, arguments, flags.repetitions, flags.steps)


if __name__ == "__main__":
    main()
