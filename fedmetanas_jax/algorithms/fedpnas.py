"""FedPNAS: personalized neural architecture search for federated learning.

Hoang, Kingsford; NeurIPS 2021 workshop on new frontiers in federated learning. A network has a base, which all clients
share, and a personal part, whose weights and logits every client adapts before it uses them. The server averages both:
the mean personal part is where clients start from.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fedmetanas_jax import local, tree
from fedmetanas_jax.algorithms.checks import check
from fedmetanas_jax.algorithms.personal import base_of, personal_part
from fedmetanas_jax.algorithms.searching import Server, searching
from fedmetanas_jax.core import Array, Phase, SearchSpace, Setting
from fedmetanas_jax.nas import mask as masks
from fedmetanas_jax.nas import relax, sample, schedule
from fedmetanas_jax.nas.logits import by_context
from fedmetanas_jax.optimizers import Sampled, adam, local_sgd, sgd, weights_and_alphas


def fedpnas(
    space: SearchSpace,
    setting: Setting,
    *,
    base_cells: int | None = None,
    task_lr: float = 0.01,
    task_alpha_lr: float = 1.0,
    alpha_lr: float | None = None,
    travel: float = 8.0,
    alpha_weight_decay: float = 0.0,
    temperature: float = 0.1,
    warmup: float = 0.09,
    none: bool = False,
    sampler: Literal["free", "context"] = "free",
    samples: int = 1,
) -> list[Phase]:
    """Search of a shared base and personal cells, the personal part by a first-order meta step.

    Nodes sum all their inputs, and every cell has operations of its own. The network that is evaluated has the
    likeliest operation of every edge. The auxiliary head of the authors' upload is left out (D-51).

    Paper: Hoang and Kingsford, NeurIPS 2021 workshop

    Args:
      base_cells: cells of the base; none = all but a quarter, and but one at least (D-19). The head is personal.
      task_lr, task_alpha_lr: of the trial step of personal weights and logits, and of adapting them.
      alpha_lr, alpha_weight_decay: of the logits, Adam with betas (0.5, 0.999). none = the rate at which a logit can go
        as far as `travel` after the warm-up, however long the run is. At this temperature most gradients are nearly
        0; a decay, which Adam scales up as it does a gradient, would then pull all logits back to 0.
      temperature: of the Gumbel-softmax whose gradient the operation drawn hands on; what is computed is discrete.
      warmup: share of the rounds in which clients descend without a trial step.
      none: whether `none` is a candidate. The authors' space has no such operation, and one pass through what was drawn
        gives it no gradient, as its output is 0: it gains whatever the others lose, and on CIFAR-10 it took the whole
        personal cell within 20 rounds (D-34).
      sampler: free = every cell's logits are learnt; context = a small network of every cell scores its operations by
        what the cell reads, as in the authors' upload (`logits.by_context`). It takes the logits' place in all of the
        above: `travel` and the rates are those of its weights. Of eight operations it draws none with more than 0.28,
        of seven 0.31, so it cannot concentrate (D-51).
      samples: draws that a batch goes through in a pass; their class probabilities are averaged. The upload has 5.
    """
    check(samples=(samples, samples >= 1, "at least 1"))
    check(sampler=(sampler, sampler == "free" or space.cells > 1, "free for a network of one cell"))
    check(alpha_lr=(alpha_lr, alpha_lr is None or alpha_lr >= 0, "none, 0 or more"))
    check(travel=(travel, travel >= 0, "0 or more"), temperature=(temperature, temperature > 0, "positive"))
    check(warmup=(warmup, 0 <= warmup < 1, "from 0 to below 1"))
    base, space = base_of(space, base_cells), space.resized(every_edge=True, parts=tuple(range(1, space.cells)))
    graph, part = space.graph, personal_part(space, base)
    rates = {"params": task_lr, "alpha": task_alpha_lr}

    def mix(sent: Server, alpha, key):
        if key is None:
            return relax.harden(graph, alpha, sent.mask)
        return sample.hard_gumbel(graph, alpha, sent.mask, temperature, key)

    def client_search(sent: Server, backward: local.Gradient, count: Array):
        def of(variables, stats, batches, key):
            keys = jax.random.split(key)
            # 1 g1 at (w, alpha).  2 the personal part takes a trial step.
            (g1, times), warm_moments, first = backward.of(variables, stats, batches, keys[0])
            steps = {name: tree.scale(g1[name], rate) for name, rate in rates.items()}
            trial = {name: part.of(tree.sub, variables[name], step) for name, step in steps.items()}
            # 3 g2 there, on the same batch with fresh noise.
            (g2, more_times), moments, metrics = backward.of(trial, stats, batches, keys[1])
            # 4 the base descends along g2, the personal part along g2 - eta g1 <g1, g2>: MAML's (I - eta H) g2 with the
            # outer product g1 g1' for the Hessian H, of weights and logits apart (Eq. 9 there).
            meta = {name: part.of(_corrected(rate), g2[name], g1[name]) for name, rate in rates.items()}
            warm = sent.round < warmup * setting.rounds  # when the second pass counts as another of the first
            times += jnp.where(warm, times, more_times)
            gradient, moments = tree.where(warm, (g1, warm_moments), (meta, moments))
            return Sampled(gradient, times), moments, metrics | {"support_loss": first["loss"]}

        rate = alpha_lr
        if rate is None:
            rate = schedule.travel_rate(travel, (1 - warmup) * setting.rounds, count)
        outer = weights_and_alphas(local_sgd(setting, sent.round), adam(rate, alpha_weight_decay))
        return local.Gradient(of, (2 * samples,), (*backward.metrics, "support_loss")), outer

    return searching(
        space,
        setting,
        mix=mix,
        search=client_search,
        adapt=lambda sent: part.alone(weights_and_alphas(sgd(task_lr), sgd(task_alpha_lr))),
        personal=part.has,
        depth="epochs",
        begin=lambda key: masks.full_plan(graph, none),
        sampled=True,
        samples=samples,
        logits=by_context(graph, space.reads) if sampler == "context" else None,
    )


def _corrected(rate: float):
    """-> (g2, g1) -> g2 - rate g1 <g1, g2>."""

    def correct(g2, g1):
        product = sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(g1), jax.tree.leaves(g2), strict=True))
        return tree.sub(g2, tree.scale(g1, rate * product))

    return correct
