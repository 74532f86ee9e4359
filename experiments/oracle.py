"""The JAX client against the PyTorch one at any size, by hand: prints the largest differences.

    python experiments/oracle.py            # C=8, 3 cells, 2 nodes, batch 8
    python experiments/oracle.py --full     # C=16, 8 cells, 4 nodes, batch 8
    python experiments/oracle.py --double   # float64 on both sides

Both sides get the same weights, logits, statistics, batches and Gumbel noise; images are CIFAR-10's where
cifar10.npz lies in the data directory, else random. Each line printed names a quantity, the largest absolute
difference between the two sides over all its numbers, that difference as a share of the largest such number,
and where it is. Quantities: logits, gradients of every weight and logit, and the weights, statistics and logits
after one client round (M = 1, two tasks; M = 3 with --M=3) with how far the round itself moved them.

A round of the full network is sensitive: ReLUs and maxima switch, and every step carries on what the last one
switched. So each of its lines also says what PyTorch's own result does when its weights are changed by 6e-8 of
themselves, a float32 rounding (both sides round pixels and the loss to float32, with --double too). Where two
programs differ by as much as one of them from itself, they do not disagree.

Exit status: 0 all shares are below --most or below ten times PyTorch's own, 1 one is not, 2 the request made no sense.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from timing.cases import SCHEDULE
from torch_bench import convert, rounds
from torch_bench.supernet import Supernet, mix

from fedmetanas_jax import command, tree
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.command import Flag
from fedmetanas_jax.core import Alpha, Examples, Setting
from fedmetanas_jax.data import sources
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax

SHAPE, CLASSES = (32, 32, 3), 10
PIXELS = {"mean": sources.OFFICIAL["cifar10"].mean, "std": sources.OFFICIAL["cifar10"].std}
ROUNDING = 6e-8  # of float32, as a share
ROUND, ROUNDS = 100, 1000  # past the warm-up, so that the logits move
FLAGS = {
    "full": Flag(bool, False, "the paper's sizes"),
    "double": Flag(bool, False, "float64"),
    "M": Flag(int, 1, "inner steps of the client round", least=0),
    "batch": Flag(int, 8, "images in a batch", least=2),
    "most": Flag(float, 1e-2, "largest share that is let pass", least=0),
    "help": command.HELP,
}


def examples(n: int) -> Examples:
    """n labelled images, real where there are any; says which."""
    path = sources.data_dir() / "cifar10.npz"
    if path.exists():
        with np.load(path) as file:
            image, label = file["train_images"][:n], file["train_labels"][:n]
    else:
        rng = np.random.default_rng(0)
        image, label = rng.integers(0, 256, (n, *SHAPE)), rng.integers(0, CLASSES, n)
    print(f"images: {path if path.exists() else f'random, as there is no {path}'}")
    return Examples(jnp.asarray(image, jnp.uint8), jnp.asarray(label, jnp.int32), jnp.ones(n, jnp.float32))


def difference(a, b) -> tuple[float, str]:
    """The largest difference between two trees' numbers, and the path of the leaf that has it."""
    differences = []
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        most = np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)))
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        differences.append((float(np.nan_to_num(most, nan=np.inf)), place))
    return max(differences)


def report(name: str, got, want, again=None, moved=None) -> float:
    """Prints one line -> the share of the difference, 0 where it is PyTorch's own.

    got: of PyTorch, want: of JAX, again: of PyTorch from weights changed by ROUNDING, moved: by JAX's round.
    """
    worst, place = difference(got, want)
    largest = difference(want, tree.zeros_like(want))[0]
    share, own = worst / largest, 0.0 if again is None else difference(got, again)[0]
    line = f"{name:<34} {worst:.1e} of {largest:.1e}, a share of {share:.1e}; at {place or 'all'}"
    line += "" if moved is None else f"; the round moved it by {difference(moved, tree.zeros_like(moved))[0]:.1e}"
    print(line if again is None else f"{line}; PyTorch from itself {own:.1e}")
    return 0.0 if worst <= 10 * own < np.inf else share


def compare(size: dict, batch: int, M: int, dtype) -> list[float]:
    """Compares one pass and one client round -> the shares."""
    space = darts_space(shape=SHAPE, classes=CLASSES, dtype=dtype, **PIXELS, **size)
    setting = Setting(rounds=ROUNDS, epochs=1, batch=batch, augment=lambda key, image: image, clip=5.0)
    plan = masks.full_plan(space.graph)
    algorithm, net = fedmetanas(space, setting, M=M, **SCHEDULE)[0].make(plan), space.make(plan)
    server, own = jax.jit(algorithm.init)(jax.random.key(1))
    parts = {name: getattr(server, name) for name in ("params", "stats", "alpha")}
    parts = jax.tree.map(lambda x: x.astype(dtype), parts)
    data, key = examples(4 * batch), jax.random.key(2)
    sent = algorithm.send(server._replace(round=jnp.int32(ROUND), **parts), jnp.int32(0), key)
    rates = rounds.rates_at(ROUND, ROUNDS, M)
    tasks = convert.tasks_of(key, data, sent.alpha, M=M, batch=batch, epochs=1)
    image, label = data.image[:batch], data.label[:batch]
    noise = Alpha(*(x.numpy() for x in tasks[0].noise[0]))

    def loss(variables):
        weights = relax.mix(space.graph, tree.add(variables["alpha"], noise), sent.mask, rates.temperature)
        logits, _ = net.apply(variables["params"], sent.stats, image, weights, True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label)), logits

    def theirs(changed: float) -> dict:
        """Every quantity as PyTorch has it, from weights changed by so much of themselves."""
        net = Supernet(channels=3, classes=CLASSES, **PIXELS, **size).train()
        net = net.double() if dtype == jnp.float64 else net
        places, generator = convert.places_of(net), torch.Generator().manual_seed(0)
        convert.load(net, places, *jax.tree.map(np.asarray, (sent.params, sent.stats)))
        with torch.no_grad():
            for x in net.parameters():
                x *= 1 + changed * torch.randn(x.shape, generator=generator).to(x.dtype)
        start = {name: x.clone() for name, x in net.state_dict().items()}
        alpha, mask = convert.alpha_to_torch(sent.alpha), convert.alpha_to_torch(sent.mask)
        logits, seen = type(alpha)(*(x.clone().requires_grad_() for x in alpha)), convert.batch_to_torch(image, label)
        found = net(seen.image, mix(logits, mask, rates.temperature, tasks[0].noise[0]))
        torch.nn.functional.cross_entropy(found, seen.label).backward()
        grads = convert.unload({name: x.grad for name, x in net.named_parameters()}, places, parts)["params"]
        passed = found.detach().numpy(), grads, Alpha(*(x.grad.numpy() for x in logits))
        net.load_state_dict(start)
        found, loss = rounds.client_round(net, alpha, mask, tasks, rates)
        after = convert.unload(net.state_dict(), places, parts) | {"alpha": Alpha(*(x.numpy() for x in found))}
        return dict(zip(ours, (*passed, *(after[name] for name in parts), loss.item()), strict=True))

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))({"params": sent.params, "alpha": sent.alpha})
    reply = jax.jit(algorithm.client_update)(sent, own, data, key)
    moved = {f"client round M={M}, {name}": reply.change[name] for name in parts}
    ours = {
        "supernet, logits": logits,
        "supernet, gradient of the weights": grads["params"],
        "supernet, gradient of the logits": grads["alpha"],
        **{name: tree.add(before, moved[name]) for name, before in zip(moved, parts.values(), strict=True)},
        f"client round M={M}, query loss": reply.metrics["loss"],
    }
    found, again = theirs(0), theirs(ROUNDING)
    return [report(name, found[name], want, again[name], moved.get(name)) for name, want in ours.items()]


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""

    def answer() -> int:
        asked = command.read(argv, FLAGS)
        if asked["help"]:
            return print(command.help_text(__doc__, FLAGS))
        size = {} if asked["full"] else {"width": 8, "length": 3, "nodes": 2}
        dtype = jnp.float64 if asked["double"] else jnp.float32
        with jax.enable_x64(asked["double"]):
            shares = compare(size, asked["batch"], asked["M"], dtype)
        return int(not max(shares) <= asked["most"])

    return command.exit_status(answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
