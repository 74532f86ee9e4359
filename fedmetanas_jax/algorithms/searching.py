"""What the methods that search a supernet share: weights and alphas learnt together, prune events, evaluation.

A method says how logits become a mix, what a client descends along, and when and what the server prunes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms import passes
from fedmetanas_jax.core import Algorithm, Alpha, Array, Depth, Mask, Net, Phase, Reply, SearchSpace, Setting, Tree
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax, sample
from fedmetanas_jax.nas.logits import Logits, free
from fedmetanas_jax.optimizers import drawn_alone


class Server(NamedTuple):
    """What the server keeps between rounds, and what a client is sent."""

    round: Array  # [] int32
    params: Tree  # w
    stats: Tree
    alpha: Tree  # what is learnt of the logits: Alpha, where they are free
    mask: Mask


def searching(
    space: SearchSpace,
    setting: Setting,
    *,
    mix: Callable,
    search: Callable,
    adapt: Callable,
    prune: Callable | None = None,
    events: Sequence[int] = (),
    tolerance: float | None = None,
    batches: int = 1,
    tasks: local.Tasks = "pairs",
    depth: Depth = "epoch",
    report: Callable = lambda server: {},
    begin: Callable | None = None,
    sampled: bool = False,
    samples: int = 1,
    personal: Callable = lambda name: True,
    discrete: Callable | None = None,
    adapt_mix: Callable | None = None,
    logits: Logits | None = None,
) -> list[Phase]:
    """A federated search of `space`: local epochs on weights and alphas, the mean of their changes, prune events.

    Args:
      mix: (sent: Server, alpha, key) -> [cell types, edges, ops], the weight of every operation. key None: without
        noise, as in evaluation.
      search: (sent, loss, steps) -> (local.Gradient, optimizer), what a client does in its round of so many steps, or
        as many of both as take turns in a step. They act on {"params": w, "alpha": alpha}; loss is (variables, stats,
        batch, key) -> (value, (moments, accuracy)). A sampled search is given the loss's gradient in its place,
        `passes.sampled`, and its own gradients are `Sampled`, too.
      adapt: (sent,) -> optimizer of the plain gradient by which a client personalises both, `depth` of the way.
      prune: (server, round, last) -> Mask, what is alive after an event; `last` says whether it is the last one.
      events: the rounds before which it is called.
      tolerance: accuracy on training images that an event may cost; one that would cost more is put off.
      batches: how many batches a step of `search` takes, cut into `tasks` (D-7) where they are several.
      report: server -> further numbers for the round's record.
      begin: key -> the plan of the first round, for a method that does not start from the whole space.
      sampled: whether `mix` makes most operations 0 where it draws. What is not drawn is then neither computed, where
        the program can leave it out, nor learnt.
      samples: mixes that a batch goes through; the loss is that of their mean class probabilities.
      personal: (a name at the top level of params and stats) -> whether adapting moves that part's statistics.
      adapt_mix: as `mix`, for a client that personalises; None: `mix` itself.
      discrete: server -> [cell types, edges, ops] of 0 and 1, what pruning would leave; None: the best pair of every
        node and the best operation of every edge.
      logits: where the logits come from that `mix` takes for alpha; None: they are what is learnt.
    """
    graph = space.graph
    logits = logits or free(graph)
    harden = discrete or (lambda server: relax.harden(graph, logits.of(server.alpha, server.stats), server.mask))
    prunes = prune is not None
    skips = sampled or (prunes and space.skips)  # what is pruned, too, where that spares time

    def make(plan) -> Algorithm:
        net = space.make(plan, skips)

        def spread(value: Array, like: Tree, rest) -> Tree:
            return space.spread(value, plan, like, rest)

        def init(key):
            net_key, alpha_key = jax.random.split(key)
            params, stats = net.init(net_key)
            alpha, further = logits.init(alpha_key)
            return Server(jnp.int32(0), params, stats | further, alpha, masks.of_plan(graph, plan)), ()

        def net_of(params, stats, mix: Array) -> Net:
            return Net(params, tree.split(stats, logits.further)[1], mix)

        def loss_of(sent: Server, mix: Callable = mix) -> Callable:
            return passes.losses(net, logits, partial(mix, sent), spread if skips else None, samples)

        def held(sent: Server) -> dict:
            return sample.held(space, plan, masks.live(graph, sent.mask).op, sent)

        def moved(sent: Server, times: Array) -> dict:
            every_logit = jax.tree.map(lambda _: jnp.array(True), sent.alpha)
            return {"params": spread(times > 0, sent.params, True), "alpha": every_logit}

        def train(gradient, optimizer, sent: Server, data, key, steps=None):
            variables = {"params": sent.params, "alpha": sent.alpha}
            how = {"setting": setting, "momentum": net.momentum, "tasks": tasks, "steps": steps}
            return local.fit(gradient, optimizer, variables, sent.stats, data, key, **how)

        def client_update(sent: Server, own, data, key) -> Reply:
            steps = local.steps_a_round(data.weight, batches, setting, tasks)
            loss = loss_of(sent)
            given = passes.sampled(loss, samples) if sampled else passes.plain(loss)
            gradient, optimizer = search(sent, given, steps)
            if sampled:
                rest, each = sample.macs(space, plan)
                gradient = _counting_macs(gradient, rest + logits.macs, each)
                optimizer = drawn_alone(optimizer, partial(moved, sent))
            variables, stats, metrics = train(gradient, optimizer, sent, data, key)
            if skips and not sampled:
                rest, each = sample.macs(space, plan)
                metrics["macs"] = rest + jnp.sum(each * masks.live(graph, sent.mask).op)
            elif prunes and not sampled:  # said too, since a server that skips expects it of clients that cannot
                metrics["macs"] = jnp.float32(net.macs)
            if prunes or sampled:
                metrics["macs"] *= 3 * metrics["image_gradients"]  # a backward pass costs about two forward passes
            learnt = variables | {"stats": stats}
            change = {part: tree.sub(learnt[part], getattr(sent, part)) for part in learnt}
            if prunes:  # weight decay moves what is pruned, too, which is not sent
                change |= {part: tree.only(here, change[part]) for part, here in held(sent).items()}
            return Reply(change, jnp.sum(data.weight), own, (), metrics)

        def server_update(server: Server, merged) -> Server:
            moved = {part: tree.add(getattr(server, part), change) for part, change in merged.change.items()}
            return server._replace(round=server.round + 1, **moved)

        def personalize(sent: Server, own, data, key, steps) -> Net:
            gradient = local.plain(passes.plain(loss_of(sent, adapt_mix or mix)))
            variables, stats, _ = train(gradient, adapt(sent), sent, data, key, steps)
            stats = {name: moments if personal(name) else sent.stats[name] for name, moments in stats.items()}
            return net_of(variables["params"], stats, mix(sent, logits.of(variables["alpha"], stats), None))

        def everybodys(server: Server) -> Net:
            return net_of(server.params, server.stats, mix(server, logits.of(server.alpha, server.stats), None))

        def measures(server: Server) -> dict:
            alpha = logits.of(server.alpha, server.stats)
            ops, pairs = masks.alive(graph, server.mask)
            every, undecided = masks.confidence(graph, alpha, server.mask)
            entropy = masks.entropy(graph, alpha, server.mask)
            alive = {"ops_alive": ops, "pairs_alive": pairs}
            alphas = {"alpha_max": every, "alpha_max_undecided": undecided, "alpha_entropy": entropy}
            return alive | alphas | report(server)

        return Algorithm(
            init=init,
            send=lambda server, client, key: server,
            client_update=client_update,
            server_update=server_update,
            personalize=personalize,
            forward=lambda net_of, image, train: net.apply(net_of.params, net_of.stats, image, net_of.mix, train),
            macs=net.macs,
            depth=depth,
            least_rows=1 if batches == 1 else 2 if tasks == "halves" else batches * setting.batch,
            global_model=everybodys,
            discrete_model=lambda server: net_of(server.params, server.stats, harden(server)),
            report=measures,
            held=held if prunes else None,
            held_alike=prunes,
            space=space,
        )

    def smaller(server: Server):
        return masks.plan_of(graph, server.mask)

    def carry(server: Server, plan, after):
        params, stats = (space.carry_over(x, plan, after) for x in (server.params, server.stats))
        return server._replace(params=params, stats=stats)

    def event(start: int, last: bool) -> Phase:
        def enter(server: Server, plan, key):
            return plan, server._replace(mask=prune(server, start, last))

        return Phase(start, enter, make, "prune", tolerance, smaller, carry)

    first = Phase(0, lambda server, plan, key: (begin(key) if begin else masks.full_plan(graph), None), make)
    return [first, *(event(t, following is None) for t, following in pairwise([*events, None]))]


def _counting_macs(gradient: local.Gradient, rest: int, each: Array) -> local.Gradient:
    """The gradient with one more metric, "macs": multiply-adds of an image's forward pass through what was drawn."""

    def of(variables, stats, batches, key):
        sampled, moments, metrics = gradient.of(variables, stats, batches, key)
        macs = rest + jnp.sum(sampled.times * each) / sum(gradient.passes)
        return sampled, moments, metrics | {"macs": macs}

    return gradient._replace(of=of, metrics=(*gradient.metrics, "macs"))


def hold(mask: Mask, searching: Array) -> optax.GradientTransformation:
    """No step for pruned logits (decay and momentum would move them), nor for any where `searching` [] is False."""

    def step(updates: dict, variables=None) -> dict:
        held = (jnp.where(alive & searching, x, 0) for alive, x in zip(mask, updates["alpha"], strict=True))
        return updates | {"alpha": Alpha(*held)}

    return optax.stateless(step)
