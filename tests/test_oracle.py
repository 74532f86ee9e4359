"""The JAX client against an independent PyTorch one: logits, gradients, whole client rounds, MobileNetV3.

Both sides are given the same weights, statistics, logits, batches and Gumbel noise. The random images always
run; the real ones where cifar10.npz lies in the data directory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedmetanas_jax import tree
from fedmetanas_jax.algorithms.fedmetanas import fedmetanas
from fedmetanas_jax.core import Alpha, Examples, Setting
from fedmetanas_jax.data import sources
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.models.mobilenetv3 import VARIANTS, mobilenetv3
from fedmetanas_jax.models.plan import darts_graph
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax

torch = pytest.importorskip("torch", reason="the rival needs PyTorch: pip install '.[bench]'")

from timing.cases import SCHEDULE  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_bench import convert, rounds  # noqa: E402
from torch_bench.supernet import Supernet, gumbel, mix  # noqa: E402

torch.set_num_threads(1)  # the tensors are tiny
WIDTH, LENGTH, NODES, CLASSES = 4, 3, 2, 10  # cells: normal, reduction, reduction
GRAPH = darts_graph(NODES)
ROUND_LENGTH = 1  # a client's round is about its steps; one cell, a reduction, is enough to take them on
# Exact in float32, so that both sides normalise alike whatever they compute in.
SHAPE, MEAN, STD = (16, 16, 3), (0.5, 0.4375, 0.40625), (0.25, 0.25, 0.28125)
BATCH, ROWS, ROUND, ROUNDS = 4, 17, 7, 40  # a client's round is 2 tasks and a row too many
IMAGES = ("random", "cifar10")


def examples(kind, n=ROWS):
    """n labelled images: noise, or every second pixel of the real data set's first."""
    if kind == "random":
        rng = np.random.default_rng(0)
        image, label = rng.integers(0, 256, (n, *SHAPE)), rng.integers(0, CLASSES, n)
    else:
        if not (sources.data_dir() / "cifar10.npz").exists():
            pytest.skip(f"no cifar10.npz in {sources.data_dir()} (FEDMETANAS_DATA)")
        with np.load(sources.data_dir() / "cifar10.npz") as file:
            image, label = file["train_images"][:n, ::2, ::2], file["train_labels"][:n]
    return Examples(jnp.asarray(image, jnp.uint8), jnp.asarray(label, jnp.int32), jnp.ones(n, jnp.float32))


def space(dtype, length=LENGTH):
    size = {"width": WIDTH, "length": length, "nodes": NODES}
    return darts_space(shape=SHAPE, classes=CLASSES, mean=MEAN, std=STD, dtype=dtype, **size)


def whole(space):
    """The network of all operations."""
    return space.make(masks.full_plan(space.graph))


def torch_net(params, stats, dtype, plan=None, length=LENGTH):
    """The PyTorch supernet with these numbers, and its places."""
    size = {"width": WIDTH, "length": length, "nodes": NODES}
    net = Supernet(channels=3, classes=CLASSES, mean=MEAN, std=STD, plan=plan, **size)
    net, places = net.to(dtype), convert.places_of(net)
    convert.load(net, places, params, stats)
    return net, places


def varied(net, dtype, seed=1):
    """Weights, statistics and a mix with nothing special in them."""
    rng = np.random.default_rng(seed)
    params, stats = jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(dtype), params)
    stats = jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(dtype), stats)
    return params, stats, rng.uniform(0.1, 1, (2, 5, 8)).astype(dtype)


@pytest.fixture
def double():
    """float64 for the time of one test."""
    with jax.enable_x64(True):
        yield


def assert_close(got, want, rtol, atol):
    """got: of PyTorch, want: of JAX; the same structure, every leaf equal within atol of its own scale."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    want = jax.tree.map(np.asarray, want)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        # A leaf whose gradient is 0 in exact arithmetic, as a shift's before a batch norm, has only rounding.
        scale = max(np.abs(b).max(), 1e-6 * largest)
        np.testing.assert_allclose(a, b, rtol, atol * scale, err_msg=jax.tree_util.keystr(path))


# --- One pass through the supernet ------------------------------------------------------------------


@pytest.fixture(scope="module")
def single():
    """Compiled float32 training pass: logits and the batch's moments."""
    net = whole(space(jnp.float32))
    return jax.jit(lambda *given: net.apply(*given, True))


@pytest.fixture(scope="module")
def still():
    """Compiled float32 evaluation: logits."""
    net = whole(space(jnp.float32))
    return jax.jit(lambda *given: net.apply(*given, False)[0])


@pytest.mark.parametrize("kind", IMAGES)
def test_logits_in_float32(single, still, kind):
    data = examples(kind, BATCH)
    params, stats, weights = varied(whole(space(jnp.float32)), np.float32)
    net, _ = torch_net(params, stats, torch.float32)
    image = convert.batch_to_torch(data.image, data.label).image
    for layout in (torch.contiguous_format, torch.channels_last):
        net, image = net.to(memory_format=layout), image.contiguous(memory_format=layout)
        with torch.no_grad():
            evaluated = net.eval()(image, torch.from_numpy(weights))
            trained = net.train()(image, torch.from_numpy(weights))
        assert_close(evaluated.numpy(), still(params, stats, data.image, weights), 1e-4, 1e-4)
        assert_close(trained.numpy(), single(params, stats, data.image, weights)[0], 1e-4, 1e-4)
        convert.load(net, convert.places_of(net), params, stats)


def loss_of(net):
    """(variables, stats, image, label, mask, noise) -> mean cross entropy in the variables' precision."""

    def loss(variables, stats, image, label, mask, noise):
        alpha = Alpha(*(a + g for a, g in zip(variables["alpha"], noise, strict=True)))
        logits, moments = net.apply(variables["params"], stats, image, relax.mix(GRAPH, alpha, mask, 0.6), True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label)), moments

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def gradient():
    """Compiled float64 gradient of the loss by weights and alpha."""
    return loss_of(whole(space(jnp.float64)))


def masked():
    """A mask as pruning makes them: operations and pairs gone, an edge dead."""
    rng = np.random.default_rng(3)
    full = masks.full(GRAPH)
    alpha = Alpha(jnp.asarray(2 * rng.normal(size=full.op.shape)), jnp.tile(jnp.arange(4.0) * 9, (2, 1)))
    mask = masks.prune(GRAPH, alpha, full, 0.6, 0.05)
    assert not jnp.all(jnp.any(mask.op, -1))
    return mask


# Not closer, because XLA divides the pixels by 255 in float32 and rounds another way than PyTorch: 6e-8 of a pixel.
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("pruned", [False, True])
def test_gradient_of_every_weight_and_alpha_in_float64(gradient, kind, pruned):
    data, rng = examples(kind, BATCH), np.random.default_rng(5)
    params, stats, _ = varied(whole(space(jnp.float64)), np.float64)
    mask = masked() if pruned else masks.full(GRAPH)
    alpha = Alpha(*(rng.normal(size=x.shape) for x in mask))
    noise = Alpha(*(rng.gumbel(size=x.shape) for x in mask))
    variables = {"params": params, "alpha": alpha}
    (loss, moments), grads = gradient(variables, stats, data.image, data.label, mask, noise)

    net, places = torch_net(params, stats, torch.float64)
    theirs = convert.alpha_to_torch(alpha)
    for x in theirs:
        x.requires_grad_()
    batch = convert.batch_to_torch(data.image, data.label)
    weights = mix(theirs, convert.alpha_to_torch(mask), 0.6, convert.alpha_to_torch(noise))
    found = torch.nn.functional.cross_entropy(net.train()(batch.image, weights), batch.label)
    found.backward()
    assert_close(found.item(), loss, 1e-7, 0)
    by_name = {name: x.grad for name, x in net.named_parameters()}
    both = {"params": params, "stats": stats}
    assert_close(convert.unload(by_name, places, both)["params"], grads["params"], 1e-5, 1e-6)
    assert_close([x.grad.numpy() for x in theirs], list(grads["alpha"]), 1e-5, 1e-6)
    running = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, stats, moments)
    assert_close(convert.unload(net.state_dict(), places, both)["stats"], running, 1e-6, 1e-6)


def test_discrete_network_is_that_of_the_same_plan():
    """float32 logits after terminal pruning, on the weights that the plan keeps."""
    rng = np.random.default_rng(0)
    supernets, full = space(jnp.float32), masks.full_plan(GRAPH)
    params, stats, _ = varied(supernets.make(full), np.float32)
    alpha = Alpha(*(jnp.asarray(rng.normal(size=x.shape)) for x in masks.full(GRAPH)))
    mask = masks.terminal(GRAPH, alpha, masks.full(GRAPH))
    plan = masks.plan_of(GRAPH, mask)
    params, stats = (supernets.carry_over(x, full, plan) for x in (params, stats))
    weights, data = np.array(relax.harden(GRAPH, alpha, mask)), examples("random", BATCH)
    want = jax.jit(lambda image: supernets.make(plan).apply(params, stats, image, weights, True)[0])(data.image)
    net, _ = torch_net(params, stats, torch.float32, plan)
    with torch.no_grad():
        got = net.train()(convert.batch_to_torch(data.image, data.label).image, torch.from_numpy(weights))
    assert_close(got.numpy(), want, 1e-4, 1e-4)


# --- Whole client rounds ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 3], ids=["M=1", "M=3"])
def client(request):
    """M, the algorithm with M inner steps, and a client's compiled round: -> what it has learnt by part, and loss."""
    setting = Setting(rounds=ROUNDS, epochs=1, batch=BATCH, augment=lambda key, image: image, clip=5.0)
    phase = fedmetanas(space(jnp.float64, ROUND_LENGTH), setting, M=request.param, **SCHEDULE)[0]
    made = phase.make(masks.full_plan(GRAPH))

    @jax.jit
    def learn(server, data, key):
        sent = made.send(server, jnp.int32(0), key)
        reply = made.client_update(sent, (), data, key)
        learnt = {part: tree.add(getattr(sent, part), change) for part, change in reply.change.items()}
        return learnt, reply.metrics["loss"]

    return request.param, made, learn


def server_state(made, round, mask):
    server = jax.eval_shape(made.init, jax.random.key(0))[0]
    params, stats, _ = varied(whole(space(jnp.float64, ROUND_LENGTH)), np.float64)
    rng = np.random.default_rng(2)
    alpha = Alpha(*(jnp.asarray(rng.normal(size=x.shape)) for x in mask))
    return server._replace(round=jnp.int32(round), params=params, stats=stats, alpha=alpha, mask=mask)


def torch_client(state, data, key, M):
    """The PyTorch client's round from the same state -> what it has learnt, by part, and loss."""
    net, places = torch_net(state.params, state.stats, torch.float64, length=ROUND_LENGTH)
    tasks = convert.tasks_of(key, data, state.alpha, M=M, batch=BATCH, epochs=1)
    rates = rounds.rates_at(int(state.round), ROUNDS, M)
    alpha, mask = convert.alpha_to_torch(state.alpha), convert.alpha_to_torch(state.mask)
    alpha, loss = rounds.client_round(net, alpha, mask, tasks, rates)
    learnt = convert.unload(net.state_dict(), places, {"params": state.params, "stats": state.stats})
    return learnt | {"alpha": Alpha(*(x.numpy() for x in alpha))}, loss.item()


# The JAX loss is taken in float32 whatever the network computes in, as the PyTorch one is: what stays between
# them is float32 rounding of the gradient at the logits, a few 1e-8 of it.
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", IMAGES)
def test_client_round_leaves_the_same_state(client, kind):
    M, made, learn = client
    data, key, state = examples(kind), jax.random.key(11), server_state(made, ROUND, masks.full(GRAPH))
    want, want_loss = learn(state, data, key)
    found, loss = torch_client(state, data, key, M)
    for part in ("params", "stats", "alpha"):
        assert_close(found[part], want[part], 1e-5, 1e-6)
    np.testing.assert_allclose(loss, want_loss, 1e-5)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), found["params"], state.params)
    assert min(jax.tree.leaves(moved)) > 1e-5  # ten times what is tolerated: the equality says something


def moved_by_decay_alone(learnt, start, here):
    """Whether the rows of a leaf that are not `here`, and they alone, have shrunk by one factor, as decay shrinks."""
    factor = learnt / np.asarray(start)
    alike = np.ptp(factor, tuple(range(min(here.ndim, 1), factor.ndim)), keepdims=True) < 1e-14  # rounding
    return alike == ~np.asarray(here)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("round", "pruned"), [(0, False), (39, True)], ids=["warm-up", "pruned"])
def test_client_round_holds_the_same_logits(client, round, pruned):
    M, made, learn = client
    mask = masked() if pruned else masks.full(GRAPH)
    data, key, state = examples("random"), jax.random.key(3), server_state(made, round, mask)
    want, _ = learn(state, data, key)
    found, _ = torch_client(state, data, key, M)
    for part, here in made.held(state).items():
        start = getattr(state, part)
        if part == "params":  # not sent is what no image moves, and nothing else
            assert all(np.all(x) for x in jax.tree.leaves(jax.tree.map(moved_by_decay_alone, found[part], start, here)))
        found[part] = jax.tree.map(np.where, here, found[part], start)
    for part in ("params", "stats", "alpha"):
        assert_close(found[part], want[part], 1e-5, 1e-6)
    for learnt in (found["alpha"], want["alpha"]):
        for x, start, alive in zip(learnt, state.alpha, mask, strict=True):
            held = ~np.asarray(alive) | (round == 0)
            np.testing.assert_array_equal(np.asarray(x)[held], np.asarray(start)[held])


class Small:
    """A network of one node on 8 x 8 images, with a task to train it on."""

    def __init__(self):
        torch.manual_seed(0)
        shapes = ((2, 2, 8), (2, 1))
        self.net = Supernet(channels=3, classes=3, mean=MEAN, std=STD, width=2, length=1, nodes=1)
        weights, statistics = rounds.state_of(self.net)
        self.state = [*weights, *statistics]
        self.start = rounds.copies(self.state)
        self.alpha = convert.Alpha(*map(torch.zeros, shapes))
        self.mask = convert.Alpha(*(torch.ones(s).bool() for s in shapes))
        image, label = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4) % 3
        noise = [convert.Alpha(*map(gumbel, shapes)) for _ in range(2)]
        self.tasks = [rounds.Task(seen, seen, noise) for seen in (rounds.Batch(image, label),)]
        self.tasks += [rounds.Task(seen, seen, noise) for seen in (rounds.Batch(image.flip(3), label),)]
        self.rates = rounds.rates_at(9, 10)

    def after(self, tasks, **how):
        """The state and alpha after a client's round from the start."""
        rounds.put_back(self.state, self.start)
        alpha, _ = rounds.client_round(self.net, self.alpha, self.mask, tasks, self.rates, **how)
        return [*rounds.copies(self.state), *alpha]


def test_federated_round_is_the_mean_of_its_clients():
    small = Small()
    alone = [small.after([task]) for task in small.tasks]
    rounds.put_back(small.state, small.start)
    work = [[task] for task in small.tasks]
    alpha, _ = rounds.federated_round(small.net, small.alpha, small.mask, work, small.rates)
    for a, b, mean in zip(*alone, [*small.state, *alpha], strict=True):
        torch.testing.assert_close(mean.detach(), (a + b) / 2)
    assert any(torch.any(a != b) for a, b in zip(*alone, strict=True))


def test_compiled_network_takes_the_same_round():
    """The compiler's graph capture alone: what a backend makes of it is not ours to test."""
    small = Small()
    eager = small.after(small.tasks)
    compiled = small.after(small.tasks, forward=torch.compile(small.net, backend="eager"))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


# --- MobileNetV3 ------------------------------------------------------------------------------------


def torch_mobilenetv3(
    params: dict, stats: dict, image, train: bool, *, mean, std, variant: str = "large", stem: int = 1
):
    """MobileNetV3 in PyTorch's functions (methods section 9.1), without dropout: uint8 [N, channels, H, W] -> logits.

    params, stats: the pytrees of `models.mobilenetv3` as tensors; with `train` the running statistics in `stats` are
    moved in place. mean, std: of pixels in 0..1, tensors [channels]. stem: stride of the first convolution (D-26).
    """

    activations = {"RE": F.relu, "HS": F.hardswish, "": lambda x: x}

    def conv_norm(x, weights: dict, moments: dict, act: str = "", stride: int = 1, depthwise: bool = False):
        kernel = weights["kernel"]
        size = kernel.shape[-1] if kernel.ndim > 2 else 1  # a matrix is a 1x1 convolution
        kernel = kernel.reshape(len(kernel), -1, size, size)
        x = F.conv2d(x, kernel, None, stride, (size - 1) // 2, groups=len(kernel) if depthwise else 1)
        x = F.batch_norm(x, moments["mean"], moments["var"], weights["scale"], weights["shift"], train, 0.01, 1e-3)
        return activations[act](x)

    def linear(x, weights: dict):
        return F.linear(x, weights["kernel"], weights["bias"])

    x = (image / 255 - mean[:, None, None]) / std[:, None, None]
    x = conv_norm(x, params["stem"], stats["stem"], "HS", stem)
    for i, row in enumerate(VARIANTS[variant].rows):
        entry, weights, moments = x, params[f"block_{i:02d}"], stats[f"block_{i:02d}"]
        if "expand" in weights:
            x = conv_norm(x, weights["expand"], moments["expand"], row.act)
        x = conv_norm(x, weights["depthwise"], moments["depthwise"], row.act, row.stride, depthwise=True)
        if row.squeeze:
            gate = F.relu(linear(x.mean((2, 3)), weights["squeeze"]))
            x = x * F.hardsigmoid(linear(gate, weights["excite"]))[..., None, None]
        x = conv_norm(x, weights["project"], moments["project"])
        x = x + entry if row.stride == 1 and x.shape == entry.shape else x
    x = conv_norm(x, params["last"], stats["last"], "HS").mean((2, 3))
    return linear(F.hardswish(linear(x, params["hidden"])), params["head"])


def both_passes(params: dict, stats: dict, image, label, **how) -> tuple:
    """Arrays as the JAX side has them, image [N, H, W, C] -> evaluation logits, then of the cross entropy of training:
    (logits, gradients, running statistics). how: the rest of `torch_mobilenetv3`, mean and std as numbers.
    """
    params, stats = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), (params, stats))
    leaf = params["head"]["kernel"]
    how |= {name: torch.tensor(how[name], dtype=leaf.dtype) for name in ("mean", "std")}
    image = torch.from_numpy(np.array(image)).permute(0, 3, 1, 2)
    with torch.no_grad():
        still = torch_mobilenetv3(params, stats, image, False, **how)
    params = jax.tree.map(lambda x: x.requires_grad_(), params)
    logits = torch_mobilenetv3(params, stats, image, True, **how)
    F.cross_entropy(logits, torch.from_numpy(np.array(label)).long()).backward()
    grads = jax.tree.map(lambda x: x.grad.numpy(), params)
    return still.numpy(), logits.detach().numpy(), grads, jax.tree.map(lambda x: x.numpy(), stats)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("stem", [1, 2])
@pytest.mark.parametrize("kind", IMAGES)
def test_mobilenetv3_logits_and_gradients_in_float64(stem, kind):
    how, data = {"mean": MEAN, "std": STD, "stem": stem, "variant": "tiny"}, examples(kind, 6)
    ours = mobilenetv3(shape=SHAPE, classes=CLASSES, dtype=jnp.float64, **how)
    params, stats, _ = varied(ours, np.float64)

    def loss(params, stats, image, label):
        logits, moments = ours.apply(params, stats, image, True)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))
        return value, (logits, moments, ours.apply(params, stats, image, False)[0])

    want, (logits, moments, still) = jax.jit(jax.grad(loss, has_aux=True))(params, stats, data.image, data.label)
    evaluated, trained, grads, running = both_passes(params, stats, data.image, data.label, **how)
    assert_close(evaluated, still, 1e-5, 1e-6)
    assert_close(trained, logits, 1e-5, 1e-6)
    assert_close(grads, want, 1e-5, 1e-6)
    assert_close(running, jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, stats, moments), 1e-6, 1e-6)


@pytest.mark.usefixtures("double")
def test_mobilenetv3_large_from_its_first_weights():
    """float64 training logits. The full depth amplifies how each side rounds pixels, so weights are not random."""
    how, data = {"mean": MEAN, "std": STD, "variant": "large"}, examples("random", 6)
    ours = mobilenetv3(shape=SHAPE, classes=CLASSES, dtype=jnp.float64, **how)
    params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(ours.init)(jax.random.key(1)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 4_214_842
    want = jax.jit(lambda: ours.apply(params, stats, data.image, True)[0])()
    assert_close(both_passes(params, stats, data.image, data.label, **how)[1], want, 1e-5, 1e-6)


# --- What the rival is made of ----------------------------------------------------------------------


def test_parameter_counts_are_the_published_ones():
    net = Supernet(channels=3, classes=10, mean=MEAN, std=STD)
    assert sum(x.numel() for x in net.parameters()) == 1_930_618
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 1_395
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()) == 929


def test_what_does_not_fit_is_refused():
    params, stats, _ = varied(whole(space(jnp.float32)), np.float32)
    net, places = torch_net(params, stats, torch.float32)
    with pytest.raises(ValueError, match="not carried over"):
        convert.load(net, places, params | {"extra": np.zeros(3)}, stats)
    with pytest.raises(ValueError, match="has"):
        convert.load(net, places, params | {"stem": np.zeros((3, 3))}, stats)


def test_gumbel_noise_has_its_mean_and_spread():
    draw = gumbel((200_000,), torch.Generator().manual_seed(0))
    assert abs(draw.mean().item() - np.euler_gamma) < 0.02
    assert abs(draw.std().item() - np.pi / 6**0.5) < 0.02
