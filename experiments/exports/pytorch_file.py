"""network_pytorch.py and network_pytorch.pt: a module that is written out, and its weights. They need torch alone.

Steps that only the next one reads become one `nn.Sequential`, so that an operation on an edge is an attribute and what
`forward` says is how the parts hang together.
"""

import importlib.util
import io
from collections import Counter
from collections.abc import Callable
from os.path import commonprefix
from pathlib import Path

import numpy as np

from exports.layers import IMAGE, Step
from exports.pytorch_terms import FUNCTIONS, HEAD, MODULES, TAIL, tensors
from fedmetanas_jax.files import write_bytes, write_text
from fedmetanas_jax.network import Network

WIDTH = 70  # of a chain, above which it has a line for every part


def write(network: Network, steps: list[Step], folder: Path) -> list[Path]:
    """-> the files."""
    import torch

    code, weights = source(network, steps)
    files = [folder / "network_pytorch.py", folder / "network_pytorch.pt"]
    data = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in weights.items()}, data)
    write_text(files[0], code)
    write_bytes(files[1], data.getvalue())
    return files


def source(network: Network, steps: list[Step]) -> tuple[str, dict[str, np.ndarray]]:
    """The text of the module and its state_dict. Needs no torch."""
    made, weights, body, values = [], {}, [], {IMAGE: IMAGE}
    for name, chain in _chains(steps):
        inputs = [values[x] for x in chain[0].inputs]
        result = values[chain[-1].name] = "x_" + name.replace(".", "_")
        if chain[0].op in FUNCTIONS:
            body.append(f"{result} = {FUNCTIONS[chain[0].op](*inputs, **chain[0].settings)}")
            continue
        attribute = name.replace(".", "_")
        own = [step.name.removeprefix(f"{name}.").replace(".", "_") for step in chain]
        parts = [MODULES[step.op](step.weights, **step.settings) for step in chain]
        made.append(f"self.{attribute} = {parts[0] if len(chain) == 1 else _chain(own, parts)}")
        body.append(f"{result} = self.{attribute}({inputs[0]})")
        for part, step in zip(own, chain, strict=True):
            where = attribute if len(chain) == 1 else f"{attribute}.{part}"
            weights |= {f"{where}.{n}": x for n, x in tensors(step).items()}
    body.append(f"return {values[steps[-1].name]}")
    about = {"kind": network.header["kind"], "labels": network.label_names, "classes": len(network.label_names)}
    head = HEAD.format(shape=tuple(network.header["arguments"]["shape"]), **about)
    return head + "".join(f"        {x}\n" for x in made) + TAIL + "".join(f"        {x}\n" for x in body), weights


def _chains(steps: list[Step]) -> list[tuple[str, list[Step]]]:
    """(name, steps) of what is one module, or one line of `forward`, in order."""
    readers, chains, of = Counter(name for step in steps for name in step.inputs), [], {}
    for step in steps:
        before = of.get(step.inputs[0])
        if before and step.op in MODULES and before[-1].op in MODULES and readers[step.inputs[0]] == 1:
            before.append(step)
        else:
            chains.append(before := [step])
        of[step.name] = before
    named, taken = [], set()
    for chain in chains:
        split = [step.name.split(".") for step in chain]
        name = ".".join(commonprefix([path[:-1] for path in split])) if len(chain) > 1 else chain[0].name
        name = name if name and name not in taken else chain[0].name
        taken.add(name)
        named.append((name, chain))
    return named


def _chain(names: list[str], parts: list[str]) -> str:
    body = [f"{name}={part}" for name, part in zip(names, parts, strict=True)]
    line = f"chain({', '.join(body)})"
    return line if len(line) < WIDTH else "chain(\n" + "".join(f"            {x},\n" for x in body) + "        )"


def read(files: list[Path]) -> Callable:
    """images [n, h, w, c] uint8 -> logits, by the files alone."""
    import torch

    spec = importlib.util.spec_from_file_location("network_pytorch", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.load()
    torch.set_num_threads(1)  # for one image, several have little to do, and on a busy machine wait for each other

    def run(images):
        with torch.inference_mode():
            return net(torch.from_numpy(np.array(images))).numpy()

    return run


def runtime() -> str:
    """What `read` runs it in."""
    import torch

    return f"torch {torch.__version__}"
