"""The DARTS supernet a second time, from methods section 3: plain convolutions, [N, C, H, W], Python loops.

Slow to compile and easy to check by eye. It shares nothing with the package but the names of the operations
and the layout of the weights.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fedmetanas_jax.models.plan import OPS


def conv(x, kernel, stride=1, dilation=1, groups=1):
    pad = dilation * (kernel.shape[-1] - 1) // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), rhs_dilation=(dilation, dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=groups,
    )  # fmt: skip


def conv1x1(x, kernel, stride=1):
    return conv(x, kernel[:, :, None, None], stride)


def pool(x, start, operation, stride):
    return lax.reduce_window(
        x, start, operation, (1, 1, 3, 3), (1, 1, stride, stride), ((0, 0), (0, 0), (1, 1), (1, 1))
    )


def batch_norm(x, given, train):
    """Returns (y, the moments that running averages take)."""
    mean = jnp.where(train, x.mean((0, 2, 3)), given["mean"])
    variance = jnp.where(train, x.var((0, 2, 3)), given["var"])
    unbiased = jnp.where(train, variance * x[:, 0].size / (x[:, 0].size - 1), variance)
    wide = (slice(None), None, None)
    return (x - mean[wide]) / jnp.sqrt(variance[wide] + 1e-5), {"mean": mean, "var": unbiased}


def halving(x, weights):
    x = jax.nn.relu(x)
    return jnp.concatenate([conv1x1(x, weights["even"], 2), conv1x1(x[:, :, 1:, 1:], weights["odd"], 2)], 1)


def depthwise_pointwise(x, depthwise, pointwise, stride, dilation):
    x = conv(jax.nn.relu(x), depthwise[:, None], stride, dilation, groups=x.shape[1])
    return conv1x1(x, pointwise)


def operation(op, x, w, s, stride, train):
    """One candidate operation with weights w and statistics s; (y, moments by norm)."""
    if op == "none":
        return jnp.zeros_like(x[:, :, ::stride, ::stride]), {}
    if op == "skip_connect" and stride == 1:
        return x, {}
    if op == "max_pool_3x3":
        y = pool(x, -jnp.inf, lax.max, stride)
    elif op == "avg_pool_3x3":
        y = pool(x, 0.0, lax.add, stride) / pool(jnp.ones_like(x), 0.0, lax.add, stride)
    elif op == "skip_connect":
        y = halving(x, w)
    else:
        y = depthwise_pointwise(x, w["depthwise"], w["pointwise"], stride, 2 if op.startswith("dil") else 1)
    y, moments = batch_norm(y, s["norm"], train)
    found = {"norm": moments}
    if op.startswith("sep"):
        y = depthwise_pointwise(y, w["depthwise_2"], w["pointwise_2"], 1, 1)
        y, found["norm_2"] = batch_norm(y, s["norm_2"], train)
    return y, found


def cell(s0, s1, params, stats, mix, nodes, reduce, halve, train):
    """(output, moments) from the outputs of the two cells before; `halve` where s0 is twice as large as s1."""
    first = halving(s0, params["preprocess_0"]) if halve else conv1x1(
        jax.nn.relu(s0), params["preprocess_0"]["pointwise"]
    )  # fmt: skip
    second = conv1x1(jax.nn.relu(s1), params["preprocess_1"]["pointwise"])
    states, found = [], {}
    for name, x in (("preprocess_0", first), ("preprocess_1", second)):
        y, moments = batch_norm(x, stats[name]["norm"], train)
        states.append(y)
        found[name] = {"norm": moments}
    collected = {op: [] for op in OPS}
    for j in range(nodes):
        node = 0.0
        for i in range(j + 2):
            edge = j * (j + 3) // 2 + i
            stride = 2 if reduce and i < 2 else 1
            for k, op in enumerate(OPS):
                row = len(collected[op])  # how many edges before this one have weights or norms
                at_row = partial(jax.tree.map, lambda leaf, row=row: leaf[row])
                bare = op == "skip_connect" and stride == 1
                w, s = ({}, {}) if bare else (at_row(params.get(op, {})), at_row(stats.get(op, {})))
                y, moments = operation(op, states[i], w, s, stride, train)
                node = node + mix[edge, k] * y
                collected[op] += [moments] if moments else []
        states.append(node)
    for op, rows in collected.items():
        if rows:
            found[op] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return jnp.concatenate(states[2:], 1), found


def naive(params, stats, x, mix, train, length, nodes):
    """(logits, moments) of normalised images x [N, C, H, W].

    `train` may be a traced value, so that one compiled program serves both modes.
    """
    x, moments = batch_norm(conv(x, params["stem"]), stats["stem_norm"], train)
    found = {"stem_norm": moments}
    s0 = s1 = params["stem_scale"][:, None, None] * x + params["stem_shift"][:, None, None]
    reductions = (length // 3, 2 * length // 3)
    for i in range(length):
        name, reduce = f"cell_{i}", i in reductions
        halve = i - 1 in reductions
        out, found[name] = cell(s0, s1, params[name], stats[name], mix[int(reduce)], nodes, reduce, halve, train)
        s0, s1 = s1, out
    return s1.mean((2, 3)) @ params["head_kernel"].T + params["head_bias"], found
