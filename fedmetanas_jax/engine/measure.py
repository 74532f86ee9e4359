"""What is evaluated between rounds, as entries of a round's record."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import tree
from fedmetanas_jax.core import Net, RoundState, Tree
from fedmetanas_jax.engine import evaluate, hosts
from fedmetanas_jax.engine.mesh import OWN, padded, put_data
from fedmetanas_jax.engine.programs import Programs, floats


def networks(programs: Programs, state: RoundState) -> dict:
    """Accuracies and loss of the network that serves everybody, and of what pruning would make of it; {} where a
    method has none (methods section 12.1)."""
    if programs.global_model is None:
        return {}
    net = programs.global_model(state.server)
    server, local, loss = programs.accuracies(net, state)
    found = {"server_accuracy": server, "local_accuracy": local, "server_loss": loss}
    if programs.discrete_model is not None:
        discrete = programs.discrete_model(state.server)
        # Once a single operation an edge is left the two are one network.
        same = bool(jnp.array_equal(discrete.mix, net.mix))
        found["server_accuracy_discrete"] = server if same else programs.accuracies(discrete, state)[0]
    return found | _architecture(programs, net)


def _architecture(programs: Programs, net: Net) -> dict:
    """{"mix": [cell types, edges, ops]} of a search: noise-free weights in steps of 0.001, at least that of what is
    alive, so that 0 means pruned."""
    if programs.discrete_model is None:
        return {}
    mix = np.asarray(net.mix, np.float64)
    return {"mix": np.where(mix > 0, np.maximum(mix.round(3), 0.001), 0.0).tolist()}


def ended(programs: Programs, state: RoundState, name: str, known: dict) -> dict:
    """What a search came to whose networks are given up now: `networks`, unless they are `known`, and how much of the
    pruned one's accuracy hangs on its batch-norm statistics, which are those of the whole supernet (D-10)."""
    found = {"ended": name} | ({} if "server_accuracy" in known else networks(programs, state))
    if programs.discrete_model is None:
        return found
    net = programs.discrete_model(state.server)
    by = {how: programs.server_accuracy_by(how, net, state) for how in ("running", "recalibrated")}
    return found | {f"server_accuracy_discrete_{how}": accuracy for how, accuracy in by.items()}


def server_accuracy(programs: Programs, state: RoundState) -> float | None:
    """Of the network that serves everybody; None where there is none."""
    if programs.global_model is None:
        return None
    return programs.accuracies(programs.global_model(state.server), state)[0]


def cost(programs: Programs, state: RoundState, server: Tree) -> float:
    """Accuracy on clients' training images that the state loses with another server; 0 without a global network."""
    if programs.global_model is None:
        return 0.0
    before, after = (programs.training_accuracy(programs.global_model(x), state) for x in (state.server, server))
    return before - after


def adapted(programs: Programs, state: RoundState) -> dict:
    """Local accuracy of the clients' own networks, after every depth of personalising and after the method's own."""
    conduct = programs.conduct
    depths = evaluate.depths(programs.data, conduct.batch, conduct.epochs)
    found = {steps: floats(evaluate.summary(_personal(programs, state, steps))) for steps in {*depths.values()}}
    by_depth = {name: found[steps] for name, steps in depths.items()}
    return {"local_accuracy_by_depth": by_depth, "local_accuracy_adapted": by_depth[programs.algorithm.depth]}


def _personal(programs: Programs, state: RoundState, steps: int) -> np.ndarray:
    """[clients]: every client's accuracy with its own network after so many personalising steps."""
    conduct, mesh = programs.conduct, programs.mesh
    # What is on the host comes in portions of about a cohort, the last one filled up.
    portion = padded(conduct.cohort if programs.hosted else conduct.clients, mesh)
    seen = programs.calibration(state)
    seen = None if seen is None else put_data(seen, mesh)
    found = []
    for start in range(0, conduct.clients, portion):
        rows = np.arange(start, start + portion, dtype=np.int32) % conduct.clients
        given = state
        if programs.hosted:
            given = state._replace(owns=put_data(tree.take(state.owns, rows), mesh, OWN))
        ids = put_data(rows, mesh, OWN)
        accuracy = programs("adaptation", given, ids, programs.data, jnp.int32(steps), seen)
        found.append(np.asarray(hosts.gathered(accuracy)))
    return np.concatenate(found)[: conduct.clients]


def event(programs: Programs, state: RoundState, name: str, before: float | None, after: float | None) -> dict:
    """What entering a phase is recorded as: the accuracy on both sides, what the method reports of the server, and what
    a search is left with."""
    report = {f"event_{key}": float(x) for key, x in jax.device_get(programs.report(state.server)).items()}
    known = {"event": name, "event_accuracy_before": before, "event_accuracy_after": after} | report
    if programs.global_model is None:
        return known
    return known | _architecture(programs, programs.global_model(state.server))
