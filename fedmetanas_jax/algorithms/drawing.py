"""What the methods share in which the server draws one network of the search space for every client of a round.

Yao et al., FedRLNAS, ICDCS 2021. A client is sent the weights of its network alone and trains them; it answers with
their change and with how good the network was, which is what the server's policies learn from. What a client was not
given has not changed: an operation that one of five equal clients trained moves by a fifth of its change (D-41).
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.core import Algorithm, Array, Depth, Examples, Net, Reply, SearchSpace, Setting, Tree
from fedmetanas_jax.nas import policy, sample

Rewarded = Literal["train", "test"]


class Message(NamedTuple):
    """What a client is sent; of weights and statistics, those of its network alone."""

    round: Array  # [] int32
    params: Tree
    stats: Tree
    child: policy.Child


class Report(NamedTuple):
    """What reaches the server client by client."""

    child: policy.Child
    reward: Array  # [] float32


def drawing(
    space: SearchSpace,
    setting: Setting,
    *,
    begin: Callable,
    draw: Callable,
    learn: Callable,
    search: Callable,
    adapt: Callable,
    judged: Callable | None = None,
    reads_test: bool = False,
    depth: Depth,
    least_rows: int = 1,
    best: Callable | None = None,
    report: Callable,
) -> Callable:
    """-> make(plan) -> Algorithm: a client trains the weights of the network drawn for it, the server learns of it.

    Args:
      begin: (key, params, stats) -> server, a NamedTuple that has `round`, `params` and `stats`.
      draw: (server, client [], key) -> Mask, the network that this client trains (`sample.draw`); key None: uses.
      learn: (server, client [cohort], heard [cohort] bool, drawn: Mask [cohort, ...], reward [cohort]) -> server, whose
        policies have learnt. Where `heard` is False the client was left out, and its reward means nothing.
      search: (sent: Message, loss) -> (local.Gradient, optimizer) of a round; they act on the weights. loss is
        (params, stats, batch, key) -> (value, (moments, accuracy)).
      adapt: (sent,) -> optimizer of the plain gradient by which a client personalises them, `depth` of the way.
      judged: Examples -> (the rows to train on, the rows that the trained network is judged by); see `judges`. None:
        it is the accuracy that `search` measures.
      reads_test, depth, least_rows: the Algorithm's.
      best: server -> Mask, the network that serves everybody; None where there is none.
      report: server -> numbers for the round's record.
    """
    graph = space.graph

    def make(plan) -> Algorithm:
        net = space.make(plan, sampled=True)
        rest, each = sample.macs(space, plan)

        def mix_of(sent: Message) -> Array:
            return sample.drawn_mix(graph, policy.of_child(graph, sent.child))

        def held(sent: Message) -> dict:
            return sample.held(space, plan, mix_of(sent) != 0, sent)

        def train(gradient, optimizer, sent: Message, data: Examples, key, steps=None):
            how = {"setting": setting, "momentum": net.momentum, "tasks": "pairs", "steps": steps}
            return local.fit(gradient, optimizer, sent.params, sent.stats, data, key, **how)

        def loss_of(sent: Message) -> Callable:
            mix, given = mix_of(sent), held(sent)["stats"]

            def loss(params, stats, batch, key):
                logits, moments = net.apply(params, stats, batch.image, mix, True)
                moments = jax.tree.map(jnp.where, given, moments, stats)  # what was not computed has none
                value = local.cross_entropy(logits, batch.label, batch.weight)
                return value, (moments, local.accuracy(logits, batch.label, batch.weight))

            return loss

        def init(key):
            net_key, key = jax.random.split(key)
            return begin(key, *net.init(net_key)), ()

        def send(server, client, key) -> Message:
            child = policy.to_child(graph, draw(server, client, key))
            return Message(server.round, server.params, server.stats, child)

        def client_update(sent: Message, own, data, key) -> Reply:
            rows, judges = (data, None) if judged is None else judged(data)
            params, stats, metrics = train(*search(sent, loss_of(sent)), sent, rows, key)
            reward, mix = metrics["accuracy"], mix_of(sent)
            if judges is not None:
                logits, _ = net.apply(params, stats, judges.image, mix, False)
                reward = local.accuracy(logits, judges.label, judges.weight)
            learnt, given = {"params": params, "stats": stats}, held(sent)
            change = {part: tree.sub(learnt[part], getattr(sent, part)) for part in learnt}
            # Weight decay moves what was not given, too; it is to stay to the bit.
            change = tree.only(given, change)
            macs = rest + jnp.sum(mix * each.astype(np.float32))
            metrics["macs"] = 3 * macs * metrics["image_gradients"]  # a backward pass costs about two forward passes
            return Reply(change, jnp.sum(data.weight), own, Report(sent.child, reward), metrics | {"reward": reward})

        def server_update(server, merged):
            heard, (child, reward) = merged.weight > 0, merged.report
            drawn = tree.each(partial(policy.of_child, graph), child)
            learnt = learn(server, merged.client, heard, drawn, jnp.where(heard, reward, 0.0))
            moved = {part: tree.add(getattr(server, part), change) for part, change in merged.change.items()}
            return learnt._replace(round=server.round + 1, **moved)

        def personalize(sent: Message, own, data, key, steps) -> Net:
            params, stats, _ = train(local.plain(loss_of(sent)), adapt(sent), sent, data, key, steps)
            return Net(params, stats, mix_of(sent))

        def served(server) -> Net:
            return Net(server.params, server.stats, sample.drawn_mix(graph, best(server)))

        return Algorithm(
            init=init,
            send=send,
            client_update=client_update,
            server_update=server_update,
            personalize=personalize,
            forward=lambda net_of, image, train: net.apply(net_of.params, net_of.stats, image, net_of.mix, train),
            macs=net.macs,
            depth=depth,
            least_rows=least_rows,
            global_model=served if best else None,
            discrete_model=served if best else None,
            report=report,
            held=held,
            reads_test=reads_test,
            space=space,
        )

    return make


def judges(reward: Rewarded, held_out: float) -> Callable:
    """-> judged(Examples) -> (the rows to train on, the rows that a reward is the accuracy on).

    "train": the last max(1, round(held_out n_k)) of the real rows are held back (D-18), which come first of all rows.
    "test": everything is trained on, and the client's own test images judge.
    """
    check(reward=(reward, reward in ("train", "test"), "train or test"))
    check(held_out=(held_out, 0 < held_out <= 0.5, "above 0, at most 0.5"))

    def held_back(data: Examples) -> tuple[Examples, Examples]:
        count = len(data.label)
        sizes = np.arange(count + 1)
        back = np.minimum(np.maximum(np.round(held_out * sizes).astype(int), 1), sizes)  # of a client of each size
        size = jnp.sum(data.weight > 0)
        last = size - 1 - jnp.arange(back.max())
        mine = Examples(*(x[jnp.maximum(last, 0)] for x in data[:3]))
        judging = mine._replace(weight=jnp.where(jnp.arange(back.max()) < jnp.asarray(back)[size], mine.weight, 0.0))
        most = (sizes - back).max()
        kept = jnp.arange(most) < size - jnp.asarray(back)[size]
        training = Examples(*(x[:most] for x in data[:3]))
        return training._replace(weight=jnp.where(kept, training.weight, 0.0)), judging

    return held_back if reward == "train" else lambda data: (data, data.test)
