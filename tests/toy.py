"""A federated method small enough to recompute by hand: softmax regression on 8x8 images, a few SGD steps.

Its one statistic is the mean image; a client's state counts its turns and keeps the last noise it drew.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax.core import Algorithm, FederatedData, Net, Phase, Reply
from fedmetanas_jax.engine import run as engine
from fedmetanas_jax.engine.conduct import Conduct
from fedmetanas_jax.tree import lerp, sub, where

CLASSES, PIXELS, MOMENTUM = 4, 64, 0.1
HOW = ("stop_after", "mesh", "identity", "accepted", "meanwhile", "make_course")  # of `run`, for the engine's


class Server(NamedTuple):
    round: Any
    params: Any
    stats: Any


def forward(net, image, train):
    x = image.reshape(image.shape[0], PIXELS).astype(jnp.float32) / 255
    stats = {"mean": jnp.where(train, jnp.mean(x, axis=0), net.stats["mean"])}
    return (x - stats["mean"]) @ net.params["w"] + net.params["b"], stats


def fit(net, data, key, steps=2, rate=0.5):
    def loss(params, rows):
        logits, moments = forward(net._replace(params=params), data.image[rows], True)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), data.label[rows][:, None], 1)[:, 0]
        weight = data.weight[rows]
        return -jnp.sum(weight * picked) / jnp.maximum(jnp.sum(weight), 1), moments

    losses, first = [], jax.random.bits(key) % 1000
    for step in range(steps):
        rows = (first + 4 * step + jnp.arange(4, dtype=jnp.uint32)) % data.label.shape[0]
        (value, moments), slope = jax.value_and_grad(loss, has_aux=True)(net.params, rows)
        params = jax.tree.map(lambda p, g: p - rate * g, net.params, slope)
        net = Net(params, lerp(net.stats, moments, MOMENTUM))
        losses.append(value)
    return net, jnp.mean(jnp.stack(losses))


def init(key):
    params = {"w": 0.1 * jax.random.normal(key, (PIXELS, CLASSES)), "b": jnp.zeros(CLASSES)}
    own = {"turns": jnp.int32(0), "noise": jnp.float32(0)}
    return Server(jnp.int32(0), params, {"mean": jnp.zeros(PIXELS)}), own


def client_update(sent, own, data, key):
    start = Net(sent.params, sent.stats)
    net, loss = fit(start, data, key, rate=0.5 / (1 + sent.round))
    own = {"turns": own["turns"] + 1, "noise": jax.random.uniform(key)}
    change = {"params": sub(net.params, start.params), "stats": sub(net.stats, start.stats)}
    metrics = {"loss": loss, "image_gradients": jnp.float32(8)}
    return Reply(change, jnp.sum(data.weight), own, (), metrics)


def server_update(server, merged):
    params = jax.tree.map(jnp.add, server.params, merged.change["params"])
    stats = jax.tree.map(jnp.add, server.stats, merged.change["stats"])
    return Server(server.round + 1, params, stats)


def personalize(sent, own, data, key, steps):
    start = Net(sent.params, sent.stats)
    return where(steps > 0, fit(start, data, key, steps=1)[0], start)


ALGORITHM = Algorithm(
    init=init,
    send=lambda server, client, key: server,
    client_update=client_update,
    server_update=server_update,
    personalize=personalize,
    forward=forward,
    macs=PIXELS * CLASSES,
    global_model=lambda server: Net(server.params, server.stats),
    report=lambda server: {"server_round": server.round, "bias": jnp.sum(jnp.abs(server.params["b"]))},
)


def make_data(clients=7, n=10, m=5, q=23, seed=0):
    """Sizes differ between clients; the last q rows of the pool are the server's test set."""
    rng = np.random.default_rng(seed)
    pool = 60 + q
    label = rng.integers(0, CLASSES, pool)
    striped = label[:, None, None, None] == np.arange(8)[:, None, None]  # a bright row tells the class
    image = rng.integers(0, 120, (pool, 8, 8, 1)) + 40 * striped
    train_size = rng.integers(n // 2, n + 1, clients)
    train = rng.integers(0, 60, (clients, n))
    train = np.stack([np.resize(row[:size], n) for row, size in zip(train, train_size, strict=True)])
    return FederatedData(
        image=jnp.asarray(image, jnp.uint8),
        label=jnp.asarray(label, jnp.int32),
        train=jnp.asarray(train, jnp.int32),
        train_size=jnp.asarray(train_size, jnp.int32),
        test=jnp.asarray(60 + rng.integers(0, q, (clients, m)), jnp.int32),
        test_size=jnp.asarray(rng.integers(1, m + 1, clients), jnp.int32),
        central=jnp.arange(60, pool, dtype=jnp.int32),
    )


def run(phases: list[Phase], data: FederatedData, workdir, said: list, **changed) -> engine.Outcome | None:
    """A run of a few rounds in `workdir`; records and what is said are appended to `said`."""
    how = {name: changed.pop(name) for name in HOW if name in changed}
    conduct = Conduct(
        rounds=4, seed=3, clients=7, cohort=5, batch=4, epochs=1, at_once=1, block=1, compile_ahead=0,
        client_states="device", bn_eval="running", eval_batch=8, eval_every=0, adapt_every=0, final_adapt=False,
        checkpoint_every=1,
    )._replace(**changed)  # fmt: skip

    class Show:
        def __init__(self, *_):
            self.say = self.round = said.append

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    workdir.mkdir(exist_ok=True)
    return engine.run(phases, data, conduct, workdir=workdir, progress=Show, **how)
