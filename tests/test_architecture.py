"""Fixed networks a config can ask for, and whole runs whose clients keep a state, on the device and on the host."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedmetanas_jax import architecture, build
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.config import Config
from fedmetanas_jax.data import sources
from fedmetanas_jax.engine.records import WorkdirError
from fedmetanas_jax.models.darts import darts_space
from fedmetanas_jax.nas import genotype as genotypes
from fedmetanas_jax.network import load
from fedmetanas_jax.options import UsageError

GENOTYPE = {
    "normal": ((("sep_conv_3x3", 0), ("skip_connect", 1)),),
    "reduce": ((("max_pool_3x3", 0), ("skip_connect", 1)),),
}
TINY = Config(
    dataset="digits", clients=4, cohort=2, train_size=32, test_size=16, rounds=4, epochs=1, batch=8, augment=(),
    width=2, cells=1, at_once=1, eval_every=2, checkpoint_every=2,
)  # fmt: skip


@pytest.fixture
def genotype_file(tmp_path):
    path = tmp_path / "found.json"
    path.write_text(genotypes.to_json(GENOTYPE))
    return path


def test_a_genotype_is_the_supernet_with_its_operations_alone(genotype_file):
    dataset = sources.load("digits", genotype_file.parent)
    config = dataclasses.replace(TINY, network=str(genotype_file))
    chosen = architecture.make_architecture(config, dataset, fedavg, jnp.float32)
    assert (chosen.kind, chosen.arguments["nodes"], chosen.genotype) == ("darts", 1, GENOTYPE)
    space = darts_space(**chosen.arguments)
    every = [[list(range(8))] * 2] * 2
    supernet = space.make(every)
    params, stats = supernet.init(jax.random.key(0))
    plan, mix = genotypes.to_plan(space.graph, GENOTYPE), jnp.asarray(genotypes.to_mix(space.graph, GENOTYPE))
    cut = [space.carry_over(x, every, plan) for x in (params, stats)]
    assert jax.tree.structure(cut[0]) == jax.tree.structure(jax.eval_shape(chosen.made.init, jax.random.key(0))[0])
    images = jnp.asarray(dataset.test_images[:6])
    np.testing.assert_allclose(
        chosen.made.apply(*cut, images, False)[0], supernet.apply(params, stats, images, mix, False)[0], atol=1e-5
    )
    assert set(chosen.made.head) <= set(cut[0])
    assert chosen.made.macs < supernet.macs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "neither one of mobilenetv3_large, mobilenetv3_tiny nor a genotype file to read"),
        ("{", "holds no genotype: the genotype is not JSON"),
        ('{"normal": [[["none", 0]]], "reduce": [[["nonsense", 0]]]}', "no operation 'nonsense'"),
        ('{"cell": [[["none", 0]]]}', "which is no network of config.space=darts"),
    ],
)
def test_a_network_that_is_not_there_is_named(tmp_path, text, message):
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    config, dataset = dataclasses.replace(TINY, network=str(path)), sources.load("digits", tmp_path)
    with pytest.raises(UsageError, match=message):
        architecture.make_architecture(config, dataset, fedavg, jnp.float32)


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "records.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("seconds", "compile_seconds")} for line in lines]


def test_a_run_with_states_on_the_host_and_a_pause_is_the_run_on_the_device(genotype_file, capsys):
    config = dataclasses.replace(TINY, method="ditto", network=str(genotype_file))
    runs = genotype_file.parent
    build.run(config, task="t", workdir=runs / "device", data_dir=runs)
    assert "kept on the device" in capsys.readouterr().out
    hosted = dataclasses.replace(config, client_states="host")
    for stop_after in (2, None):
        build.run(hosted, task="t", workdir=runs / "host", data_dir=runs, stop_after=stop_after)
    assert "kept on the host" in capsys.readouterr().out
    assert records(runs / "host") == records(runs / "device")
    last = records(runs / "device")[-1]
    assert list(last["local_accuracy_by_depth"]) == ["none", "step", "epoch", "epochs"]
    assert last["local_accuracy_adapted"] == last["local_accuracy_by_depth"]["none"]  # Ditto's v_k as it is
    assert last["local_accuracy_by_depth"]["epoch"] == last["local_accuracy_by_depth"]["epochs"]  # E = 1

    result = json.loads((runs / "device" / "result.json").read_text())
    assert result["network_largest_loss_difference"] < 1e-4
    assert load(runs / "device" / "network.npz").predict(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3,)
    assert genotypes.from_json((runs / "device" / "genotype.json").read_text()) == GENOTYPE

    genotype_file.write_text(genotypes.to_json(GENOTYPE | {"normal": GENOTYPE["reduce"]}))
    with pytest.raises(WorkdirError, match="is not the genotype that config.network now holds"):
        build.run(config, task="t", workdir=runs / "device", data_dir=runs)


def test_a_method_says_how_many_images_its_clients_need(tmp_path):
    config = dataclasses.replace(TINY, method="perfedavg", network="mobilenetv3_tiny", train_size=30, batch=16)
    with pytest.raises(UsageError, match="30 training images, but perfedavg needs 32 of every client; .* at most 15"):
        build.run(config, task="t", workdir=tmp_path / "run", data_dir=tmp_path)
