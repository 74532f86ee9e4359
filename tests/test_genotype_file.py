"""What config.network may name besides a genotype, and networks that no machine can hold: one line each."""

import dataclasses
import json
import os

import jax.numpy as jnp
import pytest

from fedmetanas_jax import architecture
from fedmetanas_jax.algorithms.fedavg import fedavg
from fedmetanas_jax.algorithms.fednas import fednas
from fedmetanas_jax.config import Config
from fedmetanas_jax.data import sources
from fedmetanas_jax.options import UsageError

NODE = [["none", 0]]
WRONG = {
    "bytes": (b"\xff\xfe\x00", "holds no genotype: 'utf-8' codec can't decode"),
    "deep": (b"[" * 100_000, "holds no genotype: maximum recursion depth"),
    "digits": (b'{"normal": [[["none", ' + b"1" * 5000 + b"]]]}", "holds no genotype: Exceeds the limit"),
    "long": (json.dumps({"normal": [[[1] * 50_000]]}).encode(), "..."),
    "large": (b" " * (2**24 + 1), "it is too large for one"),
    "zeros": (b"\0" * 9, "the genotype is not JSON"),
    "wide": (json.dumps({"normal": [NODE] * 17, "reduce": [NODE] * 17}).encode(), "have 17 nodes; at most 16"),
    "part": (b'{"normal_' + b"1" * 5000 + b'": [[["none", 0]]]}', "holds no genotype: Exceeds the limit"),
}


def refusal(path, **changes):
    config = dataclasses.replace(Config(dataset="digits", cells=1), network=str(path), **changes)
    digits = sources.load("digits", path.parent if hasattr(path, "parent") else "/")
    with pytest.raises(UsageError) as caught:
        architecture.make_architecture(config, digits, fedavg, jnp.float32)
    message = str(caught.value)
    assert "config.network" in message
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_without_a_genotype_is_one_line(tmp_path, wrong):
    content, said = WRONG[wrong]
    path = tmp_path / "found.json"
    path.write_bytes(content)
    assert said in refusal(path)


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "it is no regular file" in refusal(tmp_path / "pipe")
    assert "it is no regular file" in refusal(tmp_path)
    assert "it is no regular file" in refusal("/dev/zero")
    assert "no user's folder" in refusal("~nosuchuser/found.json")
    assert "at most 255 bytes" in refusal(tmp_path / ("x" * 256))
    assert "Not a directory" in refusal("/dev/null/found.json")


@pytest.mark.parametrize("space", ["darts", "nasbench201"])
def test_weights_that_do_not_fit_the_machine_are_said_in_its_words(tmp_path, space):
    digits = sources.load("digits", tmp_path)
    config = Config(dataset="digits", space=space, width=65536, cells=9)
    said = r"weights take [\d,]+ GB, but this machine has [\d,]+ GB of memory: make config.width \(65536\)"
    with pytest.raises(UsageError, match=said):
        architecture.make_architecture(config, digits, fednas, jnp.float32)
