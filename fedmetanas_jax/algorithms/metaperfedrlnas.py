"""meta-PerFedRLNAS: PerFedRLNAS with FedMetaNAS's meta-learning and pruning.

Huang, Gao: Federated Neural Architecture Search with Model-Agnostic Meta Learning, arXiv 2504.06457, who say no more
of it than that. As read here (D-22, D-54): a client's policy draws a pair of inputs for every node and an operation for
each of their edges; the client trains the weights of that network by first-order MAML; the reward is the accuracy on
query batches, that is after adaptation, on images not adapted to; and its policy loses what has become unlikely.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedmetanas_jax import maml, tree
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.algorithms.drawing import drawing
from fedmetanas_jax.algorithms.perfedrlnas import (
    after_visits,
    check_policies,
    confidence,
    drawn_or_likeliest,
    unvisited,
)
from fedmetanas_jax.core import Array, Mask, Phase, SearchSpace, Setting, Tree
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import policy as policies
from fedmetanas_jax.optimizers import local_sgd, sgd


class Server(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w, of the whole supernet
    stats: Tree
    policy: policies.Policy  # of every client, leaves [clients, ...]
    best: Array  # [clients] float32, its largest accuracy so far; 0 before the first
    visited: Array  # [clients] bool, whether it was ever heard
    mask: Mask  # of every client, leaves [clients, ...]: what its policy may still draw


def metaperfedrlnas(
    space: SearchSpace,
    setting: Setting,
    *,
    M: int = 1,
    task_lr: float = 0.01,
    policy_lr: float = 0.5,
    baseline: Literal["clients", "own"] = "clients",
    threshold: float = 0.01,
    prune_from: float = 0.1,
    search: float = 0.6,
) -> list[Phase]:
    """Search of a network for every client, by a policy each that is pruned; one supernet, trained by MAML.

    The setting's local SGD is the weights' meta optimizer. A client uses the likeliest pairs and operations of its own
    policy, none included, after an epoch of inner steps. No network serves everybody.

    Paper: Huang and Gao, arXiv 2504.06457

    Args:
      M: inner steps on the support batch before the query gradient (D-6).
      task_lr: of the inner steps, plain SGD.
      policy_lr: of the logits, Adam with betas (0.5, 0.999) and no decay. Those of edges that were not drawn stand
        still.
      baseline: what a client's accuracy is compared with: "clients" is the plain mean over all clients heard before of
        their best one, "own" the client's own best one before. Without any the policy stands still.
      threshold: what a policy is less likely to draw goes, each time its client was asked, never the likeliest.
      prune_from: share of the rounds before which nothing goes.
      search: share of the rounds that search; then every client trains the likeliest network of its policy, which
        stands still.
    """
    check_policies(setting, policy_lr, baseline)
    check(M=(M, M >= 0, "0 or more"), task_lr=(task_lr, task_lr >= 0, "0 or more"))
    check(threshold=(threshold, 0 <= threshold < 1, "from 0 to below 1"))
    check(search=(search, 0 < search <= 1, "above 0, at most 1"))
    check(prune_from=(prune_from, 0 <= prune_from <= 1, "0 to 1"))
    graph = space.graph

    def begin(key, params, stats) -> Server:
        mask = jax.tree.map(lambda x: jnp.tile(x, (setting.clients, *[1] * x.ndim)), masks.full(graph))
        return Server(jnp.int32(0), params, stats, *unvisited(graph, setting.clients, key), mask)

    def searches(server: Server) -> Array:
        return server.round < round(search * setting.rounds)

    def alive(server: Server, client) -> Mask:
        mask, alpha = tree.take((server.mask, server.policy.alpha), client)
        return tree.where(searches(server), mask, masks.terminal(graph, alpha, mask))

    # 1 c_j ~ softmax(beta_k), z_e ~ softmax(alpha_k) on the edges of those pairs.

    def meta_search(sent, loss):  # 2 w' = w - task_lr grad(T_s; w), M times; w <- SGD(w, grad(T_q; w'))
        return maml.gradient(loss, sgd(task_lr), M=M), local_sgd(setting, sent.round)

    # 3 A_k = mean accuracy on T_q at w'.

    def learn(server: Server, client, heard, drawn, accuracy) -> Server:
        how = {"alive": alive, "baseline": baseline, "rate": policy_lr, "moves": searches(server)}
        learnt = after_visits(graph, server, client, heard, drawn, accuracy, **how)  # 4

        def pruned(alpha, mask):  # 5 what has p < threshold goes
            return masks.prune(graph, alpha, mask, 1.0, threshold)

        alpha, before = tree.take((learnt.policy.alpha, server.mask), client)
        due = heard & searches(server) & (server.round / setting.rounds >= prune_from)
        after = tree.each(tree.where, due, tree.each(pruned, alpha, before), before)
        return learnt._replace(mask=tree.put(server.mask, client, after))

    def report(server: Server) -> dict:
        here = tree.each(partial(alive, server), jnp.arange(setting.clients))
        ops, pairs = tree.each(partial(masks.alive, graph), here)
        return confidence(graph, alive, server) | {"ops_alive": jnp.mean(ops), "pairs_alive": jnp.mean(pairs)}

    make = drawing(
        space,
        setting,
        begin=begin,
        draw=partial(drawn_or_likeliest, graph, alive),
        learn=learn,
        search=meta_search,
        adapt=lambda sent: sgd(task_lr),
        depth="epoch",
        least_rows=2 * setting.batch,
        report=report,
    )
    return [Phase(0, lambda server, plan, key: (masks.full_plan(graph), None), make)]
