"""The JAX client against the PyTorch one at any size, by hand: prints the largest differences.

    python experiments/oracle.py            # C=8, 3 cells, 2 nodes, batch 8; MobileNetV3 tiny
    python experiments/oracle.py --full     # C=16, 8 cells, 4 nodes, batch 8; MobileNetV3-Large
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
from absl import flags
from torch_bench import client, convert, draws
from torch_bench.mobilenetv3 import MobileNetV3
from torch_bench.relaxation import mix
from torch_bench.supernet import Supernet

from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.core import Alpha, Examples, Setting
from fedmetanas_jax.data import sources
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import mobilenetv3
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax

SHAPE, CLASSES = (32, 32, 3), 10
MEAN, STD = sources.OFFICIAL["cifar10"].mean, sources.OFFICIAL["cifar10"].std
ROUNDING = 6e-8  # of float32, as a share
ROUND, ROUNDS = 100, 1000  # past the warm-up, so that the logits move


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


def apart(a, b) -> tuple[float, str]:
    """The largest difference between two trees' numbers, and the path of the leaf that has it."""
    differences = {}
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        differences[name] = float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))))
    place = max(differences, key=differences.get)
    return differences[place], place


def report(name: str, got, want, again=None, start=None) -> float:
    """Prints one line -> the share of the difference, 0 where it is PyTorch's own.

    got: of PyTorch, want: of JAX, again: of PyTorch from weights changed by ROUNDING, start: before the round.
    """
    worst, place = apart(got, want)
    largest = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(want))
    line = f"{name:<34} {worst:.1e} of {largest:.1e}, a share of {worst / largest:.1e}; at {place or 'all'}"
    if start is not None:
        line += f"; the round moved it by {apart(want, start)[0]:.1e}"
    own = 0.0 if again is None else apart(got, again)[0]
    print(line if again is None else f"{line}; PyTorch from itself {own:.1e}")
    return 0.0 if worst <= 10 * own else worst / largest


def supernet(size: dict, batch: int, M: int, dtype) -> list[float]:
    """Compares one pass and one client round -> the shares."""
    space = darts_space(shape=SHAPE, classes=CLASSES, mean=MEAN, std=STD, dtype=dtype, **size)
    setting = Setting(rounds=ROUNDS, epochs=1, batch=batch, augment=lambda key, image: image)
    made = fedmetanas(space, setting, M=M)[0].make(masks.full_keep(space.nodes))
    net = space.make(masks.full_keep(space.nodes))
    state, _ = jax.jit(made.init)(jax.random.key(1))
    cast = jax.tree.map(lambda x: x.astype(dtype), (state.params, state.stats, state.alpha))
    state = state._replace(round=jnp.int32(ROUND), params=cast[0], stats=cast[1], alpha=cast[2])
    data, key = examples(4 * batch), jax.random.key(2)
    tree = {"params": state.params, "stats": state.stats}
    rates = client.rates_at(ROUND, ROUNDS, M)
    tasks = draws.tasks_of(key, data, state.alpha, M=M, batch=batch, epochs=1)
    image, label = data.image[:batch], data.label[:batch]
    noise = Alpha(*(x.numpy() for x in tasks[0].noise[0]))

    def loss(variables, noise):
        alpha = Alpha(*(a + g for a, g in zip(variables["alpha"], noise, strict=True)))
        weights = relax.mix(alpha, state.mask, rates.temperature)
        logits, _ = net.apply(variables["params"], state.stats, image, weights, True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label)), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))({"params": state.params, "alpha": state.alpha}, noise)

    alpha, mask = convert.alpha_to_torch(state.alpha), convert.alpha_to_torch(state.mask)

    def rival(changed: float):
        made = Supernet(channels=3, classes=CLASSES, mean=MEAN, std=STD, **size).to(torch_type(dtype))
        places = convert.supernet_places(made)
        convert.load(made, places, *jax.tree.map(np.asarray, (state.params, state.stats)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for x in made.parameters():
                x *= 1 + changed * torch.randn(x.shape, generator=generator).to(x.dtype)
        return made.train(), places

    def one_pass(changed: float):
        net, places = rival(changed)
        logits = [x.clone().requires_grad_() for x in alpha]
        seen = convert.batch_to_torch(image, label)
        found = net(seen.image, mix(convert.Alpha(*logits), mask, rates.temperature, tasks[0].noise[0]))
        torch.nn.functional.cross_entropy(found, seen.label).backward()
        by_name = {name: x.grad for name, x in net.named_parameters()}
        return found.detach().numpy(), convert.unload(by_name, places, tree)["params"], [x.grad for x in logits]

    def one_round(changed: float):
        net, places = rival(changed)
        found, loss = client.client_round(net, alpha, mask, tasks, rates)
        after = convert.unload(net.state_dict(), places, tree)
        return after["params"], after["stats"], Alpha(*(x.numpy() for x in found)), loss.item()

    wanted = logits, grads["params"], list(grads["alpha"])
    names = "logits", "gradient of the weights", "gradient of the logits"
    both = one_pass(0), wanted, one_pass(ROUNDING)
    shares = [report(f"supernet, {name}", *three) for name, *three in zip(names, *both, strict=True)]

    out = jax.jit(made.client_update)(state, (), data, key)
    wanted = *out.update, out.metrics["loss"]
    start = state.params, state.stats, state.alpha, None
    both = one_round(0), wanted, one_round(ROUNDING), start
    names = "weights", "statistics", "alpha", "query loss"
    return shares + [report(f"client round M={M}, {name}", *four) for name, *four in zip(names, *both, strict=True)]


def mobilenet(variant: str, batch: int, dtype) -> list[float]:
    """Compares one training pass without dropout -> the shares."""
    common = {"classes": CLASSES, "mean": MEAN, "std": STD, "variant": variant}
    ours = mobilenetv3(shape=SHAPE, dtype=dtype, **common)
    params, stats = jax.jit(ours.init)(jax.random.key(1))
    params, stats = jax.tree.map(lambda x: x.astype(dtype), (params, stats))
    data = examples(batch)

    def loss(params):
        logits, _ = ours.apply(params, stats, data.image, True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data.label)), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    theirs = MobileNetV3(channels=3, dropout=0.0, **common).to(torch_type(dtype))
    places = convert.mobilenet_places(theirs)
    convert.load(theirs, places, *jax.tree.map(np.asarray, (params, stats)))
    seen = convert.batch_to_torch(data.image, data.label)
    found = theirs.train()(seen.image)
    torch.nn.functional.cross_entropy(found, seen.label).backward()
    by_name = {name: x.grad for name, x in theirs.named_parameters()}
    tree = {"params": params, "stats": stats}
    return [
        report(f"MobileNetV3 {variant}, logits", found.detach().numpy(), logits),
        report(f"MobileNetV3 {variant}, gradient", convert.unload(by_name, places, tree)["params"], grads),
    ]


def torch_type(dtype) -> torch.dtype:
    """float32 or float64, as PyTorch has it."""
    return {jnp.float32: torch.float32, jnp.float64: torch.float64}[dtype]


def main(argv: list[str]) -> int:
    """argv (argv[0] is the program) -> the exit status."""
    values = flags.FlagValues()
    flags.DEFINE_bool("full", False, "the paper's sizes", flag_values=values)
    flags.DEFINE_bool("double", False, "float64", flag_values=values)
    flags.DEFINE_integer("M", 1, "inner steps of the client round", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("batch", 8, "images in a batch", lower_bound=2, flag_values=values)
    flags.DEFINE_float("most", 1e-2, "largest share that is let pass", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("help", False, "show this", flag_values=values)
    try:
        rest = values(argv)[1:]
        if rest:
            raise flags.Error(f"unexpected argument '{rest[0]}'; every argument is a --flag=value")
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if values.help:
        print(__doc__.strip(), *(f"  --{name:<7} {values[name].help}" for name in values), sep="\n")
        return 0
    size = {} if values.full else {"width": 8, "length": 3, "nodes": 2}
    dtype = jnp.float64 if values.double else jnp.float32
    with jax.enable_x64(values.double):
        shares = supernet(size, values.batch, values.M, dtype)
        shares += mobilenet("large" if values.full else "tiny", values.batch, dtype)
    return int(not max(shares) <= values.most)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
