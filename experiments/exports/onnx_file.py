"""network.onnx: the steps as ONNX operators, one or two each. Checked by onnx, run by ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from exports.layers import IMAGE, Step
from fedmetanas_jax.files import write_bytes
from fedmetanas_jax.network import Network

OPSET, IR = 17, 8  # of 2022, so that older runtimes read it too; nothing newer is needed
LOGITS = "logits"
ALPHA = {"alpha": 1 / 6, "beta": 0.5}  # of a hard sigmoid, as everywhere but in ONNX's defaults


class Graph:
    """Nodes and constants of an ONNX graph."""

    def __init__(self):
        self.nodes, self.constants = [], {}

    def constant(self, name: str, value, dtype=np.float32) -> str:
        """A named array of the graph."""
        self.constants[name] = np.asarray(value, dtype)
        return name

    def node(self, op: str, name: str, *inputs: str, **attributes) -> str:
        """Appends a node, whose result has its name."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def step(self, step: Step) -> None:
        """Appends the nodes of a step, the last of which has its name."""
        MAKERS[step.op](self, step, *step.inputs, **step.settings)

    def weight(self, step: Step, which: str, start: float | None = None) -> str:
        """A step's array as a constant; `start` where it has none of that name."""
        value = step.weights[which] if which in step.weights else np.full_like(step.weights["mean"], start)
        return self.constant(f"{step.name}.{which}", value)


def _normalize(graph, step, x, mean, std):
    name = step.name
    x = graph.node("Cast", f"{name}.float", x, to=1)  # 1: float32
    x = graph.node("Div", f"{name}.unit", x, graph.constant(f"{name}.255", 255))
    x = graph.node("Sub", f"{name}.centred", x, graph.constant(f"{name}.mean", mean))
    x = graph.node("Div", f"{name}.scaled", x, graph.constant(f"{name}.std", std))
    graph.node("Transpose", name, x, perm=(0, 3, 1, 2))


def _conv(graph, step, x, stride, dilation, groups):
    size = step.weights["kernel"].shape[-1]
    graph.node(
        "Conv", step.name, x, graph.weight(step, "kernel"), kernel_shape=(size,) * 2, strides=(stride,) * 2,
        dilations=(dilation,) * 2, pads=(dilation * (size - 1) // 2,) * 4, group=groups,
    )  # fmt: skip


def _norm(graph, step, x, epsilon):
    arrays = [graph.weight(step, "scale", 1), graph.weight(step, "shift", 0)]
    arrays += [graph.weight(step, "mean"), graph.weight(step, "var")]
    graph.node("BatchNormalization", step.name, x, *arrays, epsilon=epsilon)


def _crop(graph, step, x):
    ends = {"starts": (1, 1), "ends": (2**31 - 1,) * 2, "axes": (2, 3)}
    graph.node("Slice", step.name, x, *(graph.constant(f"{step.name}.{n}", at, np.int64) for n, at in ends.items()))


def _zeros(graph, step, x, stride):
    ends = {"starts": (0, 0), "ends": (2**31 - 1,) * 2, "axes": (2, 3), "steps": (stride,) * 2}
    ends = [graph.constant(f"{step.name}.{n}", at, np.int64) for n, at in ends.items()]
    like = graph.node("Slice", f"{step.name}.like", x, *ends)
    graph.node("Mul", step.name, like, graph.constant(f"{step.name}.zero", 0))


def _gate(graph, step, x, gate):
    axes = graph.constant(f"{step.name}.axes", (2, 3), np.int64)
    graph.node("Mul", step.name, x, graph.node("Unsqueeze", f"{step.name}.wide", gate, axes))


def _pool(op, **more):
    def pool(graph, step, x, stride):
        graph.node(op, step.name, x, kernel_shape=(3, 3), strides=(stride,) * 2, pads=(1,) * 4, **more)

    return pool


def _same(op, **attributes):
    return lambda graph, step, *inputs: graph.node(op, step.name, *inputs, **attributes)


MAKERS = {
    "normalize": _normalize,
    "conv": _conv,
    "norm": _norm,
    "relu": _same("Relu"),
    "hard_swish": _same("HardSwish"),
    "hard_sigmoid": _same("HardSigmoid", **ALPHA),
    "max_pool": _pool("MaxPool"),
    "avg_pool": _pool("AveragePool", count_include_pad=0),
    "mean_pool": _same("AveragePool", kernel_shape=(2, 2), strides=(2, 2)),
    "crop": _crop,
    "zeros": _zeros,
    "scale": lambda graph, step, x, factor: graph.node("Mul", step.name, x, graph.constant(f"{step.name}.by", factor)),
    "add": _same("Sum"),
    "concat": _same("Concat", axis=1),
    "gate": _gate,
    "global_pool": _same("ReduceMean", axes=(2, 3), keepdims=0),
    "linear": lambda graph, step, x: graph.node(
        "Gemm", step.name, x, graph.weight(step, "kernel"), graph.weight(step, "bias"), transB=1
    ),
}


def write(network: Network, steps: list[Step], folder: Path) -> list[Path]:
    """-> the files."""
    import onnx
    from onnx import helper, numpy_helper

    graph = Graph()
    for step in steps:
        graph.step(step)
    graph.node("Identity", LOGITS, steps[-1].name)
    arguments = network.header["arguments"]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "network",
            [helper.make_tensor_value_info(IMAGE, onnx.TensorProto.UINT8, ["n", *arguments["shape"]])],
            [helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, ["n", arguments["classes"]])],
            [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="fedmetanas_jax",
    )
    helper.set_model_props(model, {"kind": network.header["kind"], "label_names": "\n".join(network.label_names)})
    onnx.checker.check_model(model, full_check=True)
    path = folder / "network.onnx"
    write_bytes(path, model.SerializeToString())
    return [path]


def read(files: list[Path]) -> Callable:
    """images [n, h, w, c] uint8 -> logits, by the files alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # as `pytorch_file.read` has it
    session = onnxruntime.InferenceSession(files[0].read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run([LOGITS], {IMAGE: np.asarray(images)})[0]


def runtime() -> str:
    """What `read` runs it in."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"
