"""FedRLNAS: federated model search via reinforcement learning.

Yao, Wang, Xu, Xia, Shi: Federated Model Search via Reinforcement Learning, ICDCS 2021; what its paper leaves open is
as in its authors' code (Plato). One policy on the server draws a network for every client; clients train theirs, and
the policy learns from how good they were. There is no delay compensation: all clients of a round answer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms import averaging, found
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.algorithms.drawing import Rewarded, drawing, judges
from fedmetanas_jax.core import Alpha, Array, Phase, SearchSpace, Setting, Tree
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import policy as policies
from fedmetanas_jax.nas import relax, sample
from fedmetanas_jax.optimizers import local_sgd, sgd


class Server(NamedTuple):
    """What the server keeps between rounds."""

    round: Array  # [] int32
    params: Tree  # w, of the whole supernet
    stats: Tree
    policy: policies.Policy
    baseline: Array  # [] what accuracies are compared with


def fedrlnas(
    space: SearchSpace,
    setting: Setting,
    *,
    policy_lr: float | None = None,
    policy_weight_decay: float = 3e-4,
    exploration: float = 0.0,
    search: float = 0.6,
    held_out: float = 0.1,
    reward: Rewarded = "train",
) -> list[Phase]:
    """Search by one policy that draws clients' networks, REINFORCE on their accuracies; then FedAvg of the likeliest.

    Nodes sum all their inputs. The network that is evaluated has the likeliest operation of every edge, none included.
    What the policy learns from is the plain mean over the clients heard, as in the source, whatever they hold.

    Paper: Yao et al., ICDCS 2021

    Args:
      policy_lr: of the logits, Adam with betas (0.5, 0.999). none = 3 / rounds: a logit can then go 3 far, as at the
        source's 3e-3 in 1000 rounds (D-49).
      policy_weight_decay: L2 in the logits' gradient.
      exploration: share of the draws that are uniform. The policy's gradient does not know of it, as in the source.
      search: share of the rounds that search; the rest trains the network found, its weights inherited (D-44).
      held_out: share of a client's training images that are held back while it searches; the accuracy of its network
        on them, after training, is the reward (D-18).
      reward: "test" is the source's: the accuracy on the client's own test images, with nothing held back. That leaks:
        the search then chooses by the images that its accuracies are reported on.
    """
    rate = 3 / setting.rounds if policy_lr is None else policy_lr
    check(policy_lr=(policy_lr, rate >= 0, "none, 0 or more"))
    check(policy_weight_decay=(policy_weight_decay, policy_weight_decay >= 0, "0 or more"))
    check(exploration=(exploration, 0 <= exploration <= 1, "0 to 1"))
    check(search=(search, 0 < search <= 1, "above 0, at most 1"))
    judged = judges(reward, held_out)
    space = space.resized(every_edge=True)
    graph = space.graph

    def begin(key, params, stats) -> Server:
        policy, chance = policies.fresh(relax.init_alpha(key, graph)), 1 / params["head_bias"].size
        return Server(jnp.int32(0), params, stats, policy, jnp.float32(chance))

    def draw(server: Server, client, key):  # 1 Z_k ~ (1 - eps) p + eps / 8, for each client apart
        alpha, everything = server.policy.alpha, masks.full(graph)
        if key is None:
            return relax.best(graph, alpha, everything)
        p = relax.softmax(graph, alpha, everything, 1.0)
        explored = (1 - exploration) * p.op + exploration / len(graph.ops)
        return sample.draw(graph, Alpha(jnp.log(explored), alpha.pair), everything, key)

    # 2 w_k <- SGD(w * Z_k) for E epochs; A_k its accuracy.  3 w <- w + sum n_k (w_k - w) / sum n_k.

    def learn(server: Server, client, heard, drawn, accuracy) -> Server:
        def mean(x):
            return tree.weighted_mean(x, heard.astype(jnp.float32))

        # 4 base <- base + 0.99 (mean A - base)
        baseline = server.baseline + 0.99 * (mean(accuracy) - server.baseline)

        # 5 G = mean (A_k - base) (p - Z_k); alpha <- Adam(alpha, G + decay alpha)
        def gradient(drawn, gain):
            return policies.gradient(graph, server.policy.alpha, masks.full(graph), drawn, gain)

        gradients = tree.each(gradient, drawn, accuracy - baseline)
        policy = policies.step(server.policy, mean(gradients), masks.full(graph), rate, policy_weight_decay)
        learnt = server._replace(policy=policy, baseline=baseline)
        return tree.where(jnp.any(heard), learnt, server)

    def report(server: Server) -> dict:
        alpha, everything = server.policy.alpha, masks.full(graph)
        largest, _ = masks.confidence(graph, alpha, everything)
        entropy = masks.entropy(graph, alpha, everything)
        return {"alpha_max": largest, "alpha_entropy": entropy, "baseline": server.baseline}

    make = drawing(
        space,
        setting,
        begin=begin,
        draw=draw,
        learn=learn,
        search=lambda sent, loss: (local.plain(loss), local_sgd(setting, sent.round)),
        adapt=lambda sent: sgd(setting.finetune_lr),
        judged=judged,
        reads_test=reward == "test",
        depth="epochs",
        least_rows=2 if reward == "train" else 1,
        best=lambda server: draw(server, None, None),
        report=report,
    )

    def enter(server: Server, plan, key):
        child = masks.plan_of(graph, masks.terminal(graph, server.policy.alpha, masks.full(graph)))
        both = jax.device_get((server.params, server.stats))  # on the device every slice would be a program of its own
        params, stats = (space.carry_over(x, plan, child) for x in both)
        return child, averaging.Server(server.round, params, stats)

    border = max(1, round(search * setting.rounds))
    first = Phase(0, lambda server, plan, key: (masks.full_plan(graph), None), make)
    return [first, found.training(space, setting, border, enter, "prune")] if border < setting.rounds else [first]
