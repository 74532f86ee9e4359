"""Files of networks that are none: each is one line where it is loaded, never a surprise where it is used."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from test_network import saved

from fedmetanas_jax.network import NetworkError, load

IMAGES = np.zeros((1, 4, 4, 1), np.uint8)
KINDS = ("darts", "mobilenetv3")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{kind: (header, arrays)} of sound files, and the bytes of one: compressed as nothing is."""
    found = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp("good") / "network.npz"
        saved(path, kind)
        with np.load(path) as file:
            arrays = dict(file)
        found[kind] = json.loads(str(arrays.pop("header"))), arrays
        load(path).logits(IMAGES)  # compiled once; sound files of the same network share it
    return found | {"bytes": path.read_bytes()}


def write(path, header, arrays):
    text = header if isinstance(header, str) else json.dumps(header)
    np.savez(path, header=np.array(text), **arrays)


def refusal(path):
    with pytest.raises(NetworkError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert str(path) in message
    return message


MISSING = object()
HEADERS = [
    ("darts", (), [], "its header is []"),
    ("darts", (), 3, "its header is 3"),
    ("darts", (), None, "its header is None"),
    ("darts", ("format",), 2, "has format 2"),
    ("darts", ("kind",), MISSING, "of kind 'None'"),
    ("darts", ("kind",), ["darts"], "of kind"),
    ("darts", ("kind",), "mobilenetv3", "no argument 'width'"),
    ("darts", ("arguments",), MISSING, "its header lacks arguments"),
    ("darts", ("plan",), MISSING, "its header lacks plan"),
    ("darts", ("label_names",), MISSING, "its header lacks label_names"),
    ("darts", ("label_names",), ["a"], "there are 1 label_names for 3 classes"),
    ("darts", ("label_names",), [1, 2, 3], "not a list of texts"),
    ("darts", ("arguments",), [1], "arguments is [1], not names with values"),
    ("darts", ("arguments", "shape"), MISSING, "arguments lacks shape"),
    ("darts", ("arguments", "wdith"), 2, "no argument 'wdith'"),
    ("darts", ("arguments", "dtype"), "float16", "no argument 'dtype'"),
    ("darts", ("arguments", "width"), 10**9, "argument width is 1000000000; it must be from 1 to 65536"),
    ("darts", ("arguments", "width"), 4000, "; the network has float32 ("),
    ("darts", ("arguments", "width"), 0, "argument width is 0; it must be from 1"),
    ("darts", ("arguments", "width"), "2", "argument width is 2, not a whole number"),
    ("darts", ("arguments", "width"), True, "argument width is True, not a whole number"),
    ("darts", ("arguments", "width"), 2.0, "argument width is 2.0, not a whole number"),
    ("darts", ("arguments", "width"), 10**4000, "argument width is a number of more than 80 digits"),
    ("darts", ("arguments", "nodes"), 10**6, "argument nodes is 1000000; it must be from 1 to"),
    ("darts", ("arguments", "length"), 10**9, "argument length is 1000000000; it must be from 1 to"),
    ("darts", ("arguments", "parts"), [5], "make no network (ValueError: parts of the network begin at (5,)"),
    ("darts", ("arguments", "shape"), [4, 4], "argument shape is (4, 4), not"),
    ("darts", ("arguments", "shape"), [5, 4, 1], "make no network (ValueError: the DARTS network halves"),
    ("darts", ("arguments", "shape"), [4, 4, 3], "argument mean has 1 numbers for 3 channels"),
    ("darts", ("arguments", "std"), [0.0], "argument std is (0.0,); it must be at least"),
    ("darts", ("arguments", "mean"), [float("nan")], "argument mean is (nan,), not"),
    ("darts", ("arguments", "classes"), 4, "there are 3 label_names for 4 classes"),
    ("darts", ("plan",), None, "the plan is None"),
    ("darts", ("plan",), [[[3], [1]]], "not a list of 2 cells"),
    ("darts", ("plan", 0), [[3]], "not a list of 2 edges"),
    ("darts", ("plan", 0, 0), [99], "an edge of the plan is [99], not ascending operations from 0 to 7"),
    ("darts", ("plan", 0, 0), [-1], "an edge of the plan is [-1]"),
    ("darts", ("plan", 0, 0), [3, 1], "an edge of the plan is [3, 1]"),
    ("darts", ("plan", 0, 0), 3, "an edge of the plan is 3"),
    ("darts", ("plan", 1, 0), [3, 4], "it lacks the array"),
    ("mobilenetv3", ("plan",), [[[3]]], "but a network of kind mobilenetv3 has none"),
    ("mobilenetv3", ("arguments", "variant"), "huge", "argument variant is huge, not one of large, tiny"),
    ("mobilenetv3", ("arguments", "variant"), "large", "it has an array too many, params/block_01/"),
    ("mobilenetv3", ("arguments", "stem"), 3, "make no network (ValueError: the MobileNetV3 stem"),
]


@pytest.mark.parametrize(("kind", "where", "value", "said"), HEADERS)
def test_a_header_of_no_network_is_one_line(tmp_path, good, kind, where, value, said):
    header, arrays = good[kind]
    write(tmp_path / "network.npz", changed(header, where, value), arrays)
    assert said in refusal(tmp_path / "network.npz")


def changed(tree, where, value):
    """A copy of the JSON with another value in one place, or without it."""
    if not where:
        return value
    copy, (key, *rest) = tree.copy(), where
    if value is MISSING and not rest:
        del copy[key]
    else:
        old = copy[key] if isinstance(copy, list) else copy.get(key)
        copy[key] = changed(old, rest, value)
    return copy


NAME = "params/head/kernel"
ARRAYS = {
    "dropped": (lambda x: None, f"it lacks the array {NAME}"),
    "reshaped": (lambda x: x[:-1], f"{NAME} is float32 (2, 64); the network has float32 (3, 64)"),
    "transposed": (lambda x: x.T.copy(), f"{NAME} is float32 (64, 3)"),
    "not finite": (lambda x: np.where(x == x.max(), np.inf, x), f"{NAME} holds numbers that are not finite"),
    "wider": (lambda x: x.astype(np.float64), f"{NAME} is float64"),
    "whole numbers": (lambda x: x.astype(np.int32), f"{NAME} is int32"),
    "text": (lambda x: np.full(x.shape, "a"), f"{NAME} is <U1"),
    "structured": (lambda x: np.zeros(x.shape, [("a", np.float32)]), "the network has float32 (3, 64)"),
}


@pytest.mark.parametrize("damage", ARRAYS)
def test_arrays_of_another_network_are_one_line(tmp_path, good, damage):
    change, said = ARRAYS[damage]
    header, arrays = good["mobilenetv3"]
    new = {NAME: change(arrays[NAME])}
    write(tmp_path / "network.npz", header, {n: x for n, x in (arrays | new).items() if x is not None})
    assert said in refusal(tmp_path / "network.npz")


def test_what_else_an_archive_may_hold_is_one_line(tmp_path, good):
    path, (header, arrays) = tmp_path / "network.npz", good["mobilenetv3"]
    (variance,) = [name for name in arrays if name == "stats/stem/var"]
    write(path, header, arrays | {variance: -1 - arrays[variance]})
    assert "negative variances" in refusal(path)
    write(path, header, arrays | {"params/" + "a/" * 5000: np.zeros(1)})
    assert "it has an array too many, params/a/a" in refusal(path)
    write(path, header, arrays | {"mix": np.zeros(1, np.float32)})
    assert "it has an array too many, mix" in refusal(path)
    write(path, {name: x for name, x in header.items() if name != "x"}, {})
    assert "it lacks the array" in refusal(path)
    for depth in (100, 900, 1000, 5000, 100_000):  # a nested list, up to where Python gives up
        write(path, json.dumps(header)[:-1] + f', "plan": {"[" * depth}{"]" * depth}}}', arrays)
        refusal(path)
    for odd in (np.array([1]), np.zeros(0), np.array("[" * 10), np.array("1" * 5000), np.array(["{}", "{}"])):
        np.savez(path, header=odd)
        refusal(path)
    write(path, dict.fromkeys(header), {})
    refusal(path)


def test_an_array_that_claims_more_than_there_is_takes_no_memory(tmp_path, good):
    path = tmp_path / "network.npz"
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("header.npy", head.getvalue())
    assert "is not what the file holds" in refusal(path)


def test_only_a_regular_file_of_a_sane_size_is_opened(tmp_path):
    path = tmp_path / "network.npz"
    path.mkdir()
    assert "no regular file" in refusal(path)
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refusal(tmp_path / "pipe")
    with pytest.raises(NetworkError, match="no regular file"):
        load("/dev/zero")
    for name in ("a" * 300, "a\0b"):
        with pytest.raises(NetworkError, match="is no network file"):
            load(tmp_path / name)
    big = tmp_path / "big.npz"
    with zipfile.ZipFile(big, "w") as file:
        file.writestr("header.npy", b"")
    sound = big.read_bytes()
    with open(big, "wb") as file:  # sparse: a zip may have anything before it
        file.seek(2**33)
        file.write(sound)
    assert "a network file has at most 4294967296" in refusal(big)


VALUES = [None, True, 0, -1, 1, 2, 3, 99, 10**9, 10**30, 0.5, -0.5, float("nan"), "", "darts", "tiny", [], {}, [[]]]


def places(tree, path=()):
    """Every place in the JSON, the whole of it left out."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [(*path, key) for key, _ in items] + [p for key, x in items for p in places(x, (*path, key))]


def mutated(rng, header, arrays):
    """The header or one of the arrays changed in one to three places."""
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.6:
            spots = places(header)
            spot = spots[rng.integers(len(spots))] if spots else ()
            value = MISSING if rng.random() < 0.2 else VALUES[rng.integers(len(VALUES))]
            header = changed(header, spot, value) if spots else value
        elif arrays:
            name = sorted(arrays)[rng.integers(len(arrays))]
            x = arrays[name]
            new = [
                None, x[:-1] if x.ndim else x, x[None], x.T, x.astype(np.float16), np.ones(x.shape, int), x * np.nan,
                -x, x * 1e30, np.zeros_like(x), np.random.default_rng(0).permutation(x.ravel()).reshape(x.shape),
            ][rng.integers(11)]  # fmt: skip
            arrays = {n: a for n, a in (arrays | {name: new}).items() if a is not None}
            if rng.random() < 0.1:
                arrays = {f"{n}x" if n == name else n: a for n, a in arrays.items()}
    return header, arrays


def is_network(path):
    """Whether the file is one; then it computes, for images of the size that it says."""
    try:
        network = load(path)
    except NetworkError as error:
        said = str(error)
    else:
        said, images = "", np.zeros((1, *network.header["arguments"]["shape"]), np.uint8)
        assert network.logits(images).shape == (1, 3)
    assert "\n" not in said
    return not said


def test_no_mutation_gets_past_load(tmp_path, good):
    rng, path, sound = np.random.default_rng(0), tmp_path / "network.npz", 0
    for i in range(360):
        write(path, *mutated(rng, *good[KINDS[i % 2]]))
        sound += is_network(path)
    assert 10 < sound < 180  # both answers are given
    data = np.frombuffer(good["bytes"], np.uint8)
    for _ in range(240):
        flipped = data.copy()
        flipped[rng.integers(len(data), size=rng.integers(1, 4))] ^= rng.integers(1, 256, dtype=np.uint8)
        path.write_bytes(flipped[: rng.integers(len(data))].tobytes() if rng.random() < 0.1 else flipped.tobytes())
        is_network(path)
