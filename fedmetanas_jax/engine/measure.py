"""What is evaluated between rounds, as entries of a round's record."""

import jax
import jax.numpy as jnp
import numpy as np

from fedmetanas_jax import tree
from fedmetanas_jax.core import Net, RoundState, Tree
from fedmetanas_jax.engine import evaluate, hosts
from fedmetanas_jax.engine.mesh import OWN, devices_of, padded, put_data
from fedmetanas_jax.engine.programs import EVALUATION, OF_CLIENTS, Programs, floats


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
        same = np.array_equal(discrete.mix, net.mix)
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


class Candidate:
    """The network with which a server serves everybody, before or after an event. Its batch norm is recalibrated once,
    however much is asked of it."""

    def __init__(self, programs: Programs, state: RoundState, server: Tree):
        self.programs, self._state, self._seen = programs, state, None
        self.net: Net | None = None  # where a method has none
        if programs.global_model is not None:
            self._asked = self.net = programs.global_model(server)

    def server_accuracy(self) -> float | None:
        """On the server's test images; None where there is no network."""
        return None if self.net is None else self._accuracy(self.programs.data.central)

    def training_accuracy(self) -> float:
        """On clients' training images, of whose test images an event must know nothing."""
        return self._accuracy(self.programs.judges(self._state))

    def _accuracy(self, rows) -> float:
        seen = self._seen or self.programs.calibration(self._state)
        found = self.programs.answers(self._asked, rows, seen)
        self._asked, self._seen = found.net, evaluate.none_of(seen)
        return float(np.mean(found.correct))


def adapted(programs: Programs, state: RoundState) -> dict:
    """Local accuracy of the clients' own networks, after every depth of personalising and after the method's own."""
    conduct = programs.conduct
    depths = evaluate.depths(programs.data, conduct.batch, conduct.epochs)
    found = {steps: floats(evaluate.summary(_personal(programs, state, steps))) for steps in {*depths.values()}}
    by_depth = {name: found[steps] for name, steps in depths.items()}
    return {"local_accuracy_by_depth": by_depth, "local_accuracy_adapted": by_depth[programs.algorithm.depth]}


def _personal(programs: Programs, state: RoundState, steps: int) -> np.ndarray:
    """[clients]: every client's accuracy with its own network after so many personalising steps.

    A portion of the clients makes its networks at a time, then each of these answers.
    """
    mesh, clients, data = programs.mesh, programs.conduct.clients, programs.data
    devices, seen = devices_of(mesh), programs.calibration(state)
    share, portion = padded(clients, mesh) // devices, programs.portion()  # of a device
    test, size = np.asarray(data.test), np.asarray(data.test_size)
    found = np.zeros(clients)
    for start in range(0, share, portion):
        first = min(start, share - portion)  # the last portion is filled up with some that were there before
        chosen = (np.arange(devices)[:, None] * share + first + np.arange(portion)).reshape(-1)
        chosen = chosen.astype(np.int32) % clients
        given = state
        if programs.hosted:
            given, first = state._replace(owns=put_data(tree.take(state.owns, chosen), mesh, OWN)), 0
        ids = put_data(chosen, mesh, OWN)
        nets = programs("adaptation", given, ids, data, jnp.int32(steps), jnp.int32(first))
        nets = jax.tree.map(np.asarray, hosts.gathered(nets))
        name = _evaluation_of(programs, state, tree.take(nets, 0))
        for place, client in enumerate(chosen):
            net = put_data(tree.take(nets, place), mesh)
            found[client] = np.mean(programs.answers(net, test[client, : size[client]], seen, name).correct)
    return found


def _evaluation_of(programs: Programs, state: RoundState, net: Net) -> str:
    """The program that such a network of a client answers by."""
    serves = programs.global_model
    alike = serves is None or tree.form(net) == tree.form(jax.eval_shape(serves, state.server))
    return EVALUATION if alike else OF_CLIENTS


def event(programs: Programs, state: RoundState, name: str, before: float | None, after: float | None) -> dict:
    """What entering a phase is recorded as: the accuracy on both sides, what the method reports of the server, and what
    a search is left with."""
    report = {f"event_{key}": float(x) for key, x in jax.device_get(programs.report(state.server)).items()}
    known = {"event": name, "event_accuracy_before": before, "event_accuracy_after": after} | report
    if programs.global_model is None:
        return known
    return known | _architecture(programs, programs.global_model(state.server))
