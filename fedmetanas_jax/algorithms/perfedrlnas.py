"""PerFedRLNAS: one-for-all personalized federated neural architecture search.

Yao, Li: PerFedRLNAS: One-for-All Personalized Federated Neural Architecture Search, AAAI 2024; what its paper leaves
open is as in its authors' code (Plato). FedRLNAS with a policy for every client, all of which draw from one supernet.
A client never chosen keeps the policy that all began with.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.algorithms.drawing import Rewarded, drawing, judges
from fedmetanas_jax.core import Array, Graph, Mask, Phase, SearchSpace, Setting, Tree
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import policy as policies
from fedmetanas_jax.nas import relax, sample
from fedmetanas_jax.optimizers import local_sgd, sgd

Baseline = Literal["clients", "own"]


class Server(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w, of the whole supernet
    stats: Tree
    policy: policies.Policy  # of every client, leaves [clients, ...]
    best: Array  # [clients] float32, its largest accuracy so far; 0 before the first
    visited: Array  # [clients] bool, whether it was ever heard


def perfedrlnas(
    space: SearchSpace,
    setting: Setting,
    *,
    policy_lr: float = 0.5,
    baseline: Baseline = "clients",
    lambda_macs: float = 0.0,
    held_out: float = 0.1,
    reward: Rewarded = "train",
) -> list[Phase]:
    """Search of a network for every client, by a policy each, REINFORCE on its accuracies; one supernet for all.

    Nodes sum all their inputs. A client uses the likeliest operation of every edge by its own policy, none included.
    The search never ends: policies settle by themselves. No network serves everybody.

    Paper: Yao and Li, AAAI 2024

    Args:
      policy_lr: of the logits, Adam with betas (0.5, 0.999) and no decay.
      baseline: what a client's accuracy is compared with: "clients" is the source's, the plain mean over all clients
        heard before of their best one, "own" the client's own best one before. Without any the policy stands still.
      lambda_macs: what is taken off the reward of a network that has as many multiply-adds as the supernet, off others
        in proportion. The source takes off measured seconds instead.
      held_out: share of a client's training images that are held back; the accuracy of its network on them, after
        training, is the reward (D-18).
      reward: "test" is the source's: the accuracy on the client's own test images, with nothing held back. That leaks:
        the search then chooses by the images that its accuracies are reported on.
    """
    check_policies(setting, policy_lr, baseline)
    check(lambda_macs=(lambda_macs, lambda_macs >= 0, "0 or more"))
    judged = judges(reward, held_out)
    space = space.resized(every_edge=True)
    graph = space.graph
    rest, each = sample.macs(space, masks.full_plan(graph))
    share = each.astype("float32") / (rest + each.sum())  # of the supernet's multiply-adds

    def begin(key, params, stats) -> Server:
        return Server(jnp.int32(0), params, stats, *unvisited(graph, setting.clients, key))

    def alive(server: Server, client) -> Mask:
        return masks.full(graph)

    # 1 Z_k ~ softmax(alpha_k).  2 w_k <- SGD(w * Z_k) for E epochs; A_k its accuracy.
    # 3 w <- w + sum n_k (w_k - w) / sum n_k.

    def learn(server: Server, client, heard, drawn, accuracy) -> Server:
        macs = rest / (rest + each.sum()) + jnp.sum(drawn.op * share, axis=(1, 2, 3))
        how = {"alive": alive, "baseline": baseline, "rate": policy_lr, "cost": lambda_macs * macs}
        return after_visits(graph, server, client, heard, drawn, accuracy, **how)

    make = drawing(
        space,
        setting,
        begin=begin,
        draw=partial(drawn_or_likeliest, graph, alive),
        learn=learn,
        search=lambda sent, loss: (local.plain(loss), local_sgd(setting, sent.round)),
        adapt=lambda sent: sgd(setting.finetune_lr),
        judged=judged,
        reads_test=reward == "test",
        depth="epochs",
        least_rows=2 if reward == "train" else 1,
        report=partial(confidence, graph, alive),
    )
    return [Phase(0, lambda server, plan, key: (masks.full_plan(graph), None), make)]


def check_policies(setting: Setting, policy_lr: float, baseline: str) -> None:
    """ValueError for options of policies of clients, or a setting, that cannot be."""
    if not setting.clients:
        raise ValueError("the setting's clients is 0; a method with a policy for every client must know how many")
    check(policy_lr=(policy_lr, policy_lr >= 0, "0 or more"))
    check(baseline=(baseline, baseline in get_args(Baseline), "clients or own"))


def unvisited(graph: Graph, clients: int, key: Array) -> tuple[policies.Policy, Array, Array]:
    """(policy, best, visited) of all clients before the first round: policies begin alike."""
    one = policies.fresh(relax.init_alpha(key, graph))
    all_of_them = jax.tree.map(lambda x: jnp.tile(x, (clients, *[1] * x.ndim)), one)
    return all_of_them, jnp.zeros(clients), jnp.zeros(clients, bool)


def drawn_or_likeliest(graph: Graph, alive: Callable, server, client: Array, key: Array | None) -> Mask:
    """The network drawn for a client by its policy from what is alive(server, client); key None: the likeliest."""
    alpha = tree.take(server.policy.alpha, client)
    if key is None:
        return relax.best(graph, alpha, alive(server, client))
    return sample.draw(graph, alpha, alive(server, client), key)


def after_visits(
    graph: Graph,
    server,
    client: Array,
    heard: Array,
    drawn: Mask,
    accuracy: Array,
    *,
    alive: Callable,
    baseline: Baseline,
    rate: float,
    cost: Array | float = 0.0,
    moves: Array | bool = True,
):
    """The server after the policies of a cohort have learnt; of the clients not heard nothing changes.

    client, heard, accuracy [cohort], leaves of drawn [cohort, ...]; alive: (server, client []) -> Mask. `cost` comes
    off the reward; where `moves` is False no policy steps.
    """
    # 4 reward_k = A_k - baseline, which knows what was before this round
    if baseline == "own":
        known, level = server.visited[client], server.best[client]
    else:
        known, level = jnp.any(server.visited), local.mean_where(server.best, server.visited)
    reward, may = accuracy - cost - level, heard & known & moves

    # 5 alpha_k <- Adam(alpha_k, reward_k (p_k - Z_k)), on what was drawn
    def stepped(client, may, drawn, reward):
        mine, here = tree.take(server.policy, client), alive(server, client)
        gradient = policies.gradient(graph, mine.alpha, here, drawn, reward)
        after = policies.step(mine, gradient, policies.decided(graph, here, drawn), rate)
        return tree.where(may, after, mine)

    policy = tree.put(server.policy, client, tree.each(stepped, client, may, drawn, reward))
    best = server.best.at[client].max(jnp.where(heard, accuracy, 0.0))
    return server._replace(policy=policy, best=best, visited=server.visited.at[client].max(heard))


def confidence(graph: Graph, alive: Callable, server) -> dict:
    """For the round's record: how likely the likeliest operation of an edge is, averaged over the clients visited."""
    everyone = jnp.arange(len(server.visited))
    here = tree.each(partial(alive, server), everyone)
    largest, _ = tree.each(partial(masks.confidence, graph), server.policy.alpha, here)
    return {"alpha_max": local.mean_where(largest, server.visited), "clients_visited": jnp.sum(server.visited)}
