"""Networks in the formats of others: they compute what the network does, and what cannot be made is said."""

import ast
import importlib
import json

import export
import jax
import numpy as np
import pytest
from exports import check, networks, plain, pytorch_file, stablehlo

from fedmetanas_jax import network
from fedmetanas_jax.core import Net

COMMON = {"shape": (8, 8, 1), "classes": 10, "mean": (0.3,), "std": (0.4,)}  # as the bundled digits are
ARGUMENTS = {
    "darts": COMMON | {"width": 2, "length": 2, "nodes": 2, "parts": (1,)},
    "nasbench201": COMMON | {"width": 2, "length": 3},
    "mobilenetv3": COMMON | {"variant": "tiny"},
}
# Every way in which an operation is written down, at each stride; two cells with operations of their own, the second of
# which reads what is larger; a node that nothing reaches.
PLANS = {
    "darts": [[[0], [], [3], [4], [1]], [[2], [6], [1], [3], [3]]],
    "nasbench201": [[[1, 3], [2], [0], [4], [2], [3]]],
    "mobilenetv3": None,
}


def saved(path, kind):
    """Writes a network of the kind whose moments and mix are none that leave things as they are; returns it, loaded."""
    rng, made, mix = np.random.default_rng(0), network.MAKERS[kind](**ARGUMENTS[kind]), ()
    if kind in network.SPACES:
        graph, made = made.graph, made.make(PLANS[kind])
        mix = rng.uniform(0.5, 1, (len(graph.cell_types), len(graph.edges), len(graph.ops))).astype(np.float32)
        mix[:, ::2] = 1  # as what searches leave
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.7, x.shape).astype(np.float32), shapes[0])
    stats = jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), shapes[1])
    names = tuple(f'the "{n}"' for n in range(10))
    arguments = {"kind": kind, "arguments": ARGUMENTS[kind], "plan": PLANS[kind], "label_names": names}
    network.save(path, Net(params, stats, mix), **arguments)
    return network.load(path)


@pytest.fixture(scope="module", params=network.MAKERS)
def known(request, tmp_path_factory):
    """(a network, its steps, images, their logits) of every kind."""
    net = saved(tmp_path_factory.mktemp("export") / "network.npz", request.param)
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    return net, networks.steps(net), images, net.logits(images)


def test_the_steps_compute_what_the_network_does(known):
    net, steps, images, expected = known
    np.testing.assert_allclose(jax.jit(plain.function(steps))(images), expected, rtol=1e-4, atol=1e-4)
    carried = sum(x.size for step in steps for x in step.weights.values())
    assert carried == sum(x.size for x in jax.tree.leaves((net.net.params, net.net.stats)))
    assert len({step.name for step in steps}) == len(steps)


def test_what_is_exported_is_no_training_program(known):
    net, steps, images, _ = known
    text = stablehlo.program(net, steps).mlir_module()
    assert "tensor<?x8x8x1xui8>" in text
    assert "stablehlo.convolution" in text
    assert not stablehlo.UNWANTED.findall(text)
    assert stablehlo.UNWANTED.findall("stablehlo.optimization_barrier, stablehlo.case, stablehlo.custom_call @x")


def test_the_module_is_written_out_and_stands_alone(known):
    net, steps, _, _ = known
    code, weights = pytorch_file.source(net, steps)
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert imported == {"collections", "pathlib", "torch"}
    assert max(map(len, code.splitlines())) < 200
    assert sum(x.size for x in weights.values() if x.ndim) == sum(x.size for s in steps for x in s.weights.values())


@pytest.mark.parametrize("form", export.FORMATS)
def test_an_export_is_the_network(known, form, tmp_path):
    module, packages, extra = export.FORMATS[form]
    for package in packages:
        pytest.importorskip(package, reason=f"{form} needs {package}: pip install '.[{extra}]'")
    net, steps, images, expected = known
    module = importlib.import_module(f"exports.{module}")
    files = module.write(net, steps, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    run = module.read(files)
    np.testing.assert_allclose(net._replace(apply=run).logits(images), expected, rtol=1e-4, atol=1e-4)
    for count in (1, 3):  # any number of images
        np.testing.assert_allclose(run(images[:count]), expected[:count], rtol=1e-4, atol=1e-4)
    assert module.runtime()


def test_the_figures_say_what_differs(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "REPEATS", 2)
    net = network.Network(None, {"arguments": COMMON, "kind": "x", "label_names": [*"abcdefghij"]}, None)
    images, expected = np.zeros((3, 8, 8, 1), np.uint8), np.tile(np.arange(10, dtype=np.float32), (3, 1))

    def run(images):
        return np.repeat(expected[:1] - 8 * (np.arange(10) == 9), len(images), axis=0)

    (tmp_path / "file").write_bytes(b"12345")
    found = check.compare(net, run, expected, images, [tmp_path / "file"])
    assert found["milliseconds_one_image"] >= found["milliseconds_at_least"] > 0
    assert (found["labels_equal"], found["images"], found["largest_logit_difference"], found["bytes"]) == (0, 3, 8, 5)
    assert "| mine | file | 5 | 0 of 3 | 8.0e+00 |" in check.table({"mine": found | {"runtime": "x"}})


def test_the_script(monkeypatch, tmp_path, capsys):
    def answer(*flags):
        status = export.main(["export.py", *flags])
        out, error = capsys.readouterr()
        assert error.count("\n") == (status != 0), error
        return status, error or out

    run, at = tmp_path / "run", str(tmp_path / "run")
    assert answer("--help") == (0, answer("--help")[1])
    for flags, said in (
        ((), "which run?"), ((at, "--to=onx"), "no format 'onx'; did you mean 'onnx'?"),
        ((at, "--to="), "names no format"), ((at, "--t=onnx"), "no flag 't'"),
    ):  # fmt: skip
        status, line = answer(*flags)
        assert (status, said in line) == (2, True), line
    there = {"onnx": False, "onnxruntime": False, "torch": False, "flatbuffers": True, "safetensors": True}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there[name] or None)
    assert answer(at, "--to=pytorch,onnx") == (
        1, "error: pytorch needs torch, onnx needs onnx and onnxruntime: pip install '.[bench,export]'\n",
    )  # fmt: skip
    assert answer(at, "--to=stablehlo") == (2, f"error: {at} holds no run: there is no config.json\n")
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"dataset": "digits"}}))
    assert answer(at, "--to=stablehlo") == (1, f"error: there is no network file {at}/network.npz\n")

    # The rest with a format that needs nothing, which is the network itself and, then, another one.
    def apply(images):  # a network that needs no compiling
        return np.asarray(images, np.float32)[:, 2:4].reshape(len(images), -1)[:, :10]

    net, off = saved(run / "network.npz", "mobilenetv3")._replace(apply=apply), [0]
    monkeypatch.setattr(network, "load", lambda path: net)

    class Same:
        @staticmethod
        def write(network, steps, folder):
            (folder / "same").write_text("")
            return [folder / "same"]

        @staticmethod
        def read(files):
            return lambda images: np.roll(apply(images), off[0], axis=-1)

        @staticmethod
        def runtime():
            return "none"

    monkeypatch.setattr(check, "REPEATS", 2)
    monkeypatch.setattr("importlib.import_module", lambda name: Same)
    out = tmp_path / "out"
    out.mkdir()
    status, said = answer(at, "--to=safetensors", f"--out={out}")
    assert (status, "360 of 360" in said) == (0, True)
    document = json.loads((out / "export.json").read_text())
    assert document["formats"]["safetensors"]["labels_equal"] == 360
    assert document["input"] == {"dtype": "uint8", "shape": ["n", 8, 8, 1], "normalised": "inside"}
    off[0] = 1
    assert answer(at, "--to=safetensors")[0] == 1
    assert json.loads((run / "export.json").read_text())["formats"]["safetensors"]["labels_equal"] < 360
