"""What a client keeps, holds and agrees to; no network."""

import dataclasses
import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grpc", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")

import certs
from toy_federation import first_algorithm
from toy_model import same

from fedmetanas_jax import tree
from fedmetanas_jax.config import Config, to_dict
from fedmetanas_jax.data.dataset import DataError
from fedmetanas_jax.data.sources import load
from fedmetanas_jax.deploy import client, credentials, layout, share, states, terms
from fedmetanas_jax.engine.round import traffic_of
from fedmetanas_jax.options import UsageError

CONFIG = Config(dataset="digits", train_size=6, test_size=4, network="mobilenetv3_tiny", method="fedavg", augment=())
AGREED = terms.of(CONFIG, load("digits", "unused"), "float32")
OWN = {"control": jnp.arange(5.0), "turns": jnp.int32(3)}


def file(folder, **changes):
    arrays = {
        "train_images": np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8, 1), "train_labels": np.arange(5),
        "test_images": np.ones((3, 8, 8, 1), np.uint8), "test_labels": np.arange(3),
    } | changes  # fmt: skip
    path = folder / "mine.npz"
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})
    return path


def refusal(path, test=False, least=1) -> str:
    with pytest.raises(DataError) as caught:
        share.load(path, AGREED, CONFIG, test, least)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_clients_rows_are_padded_as_in_simulation(tmp_path):
    rows, said = share.load(file(tmp_path), AGREED, CONFIG, True, 1)
    assert said == []
    np.testing.assert_array_equal(rows.label, [0, 1, 2, 3, 4, 0])
    np.testing.assert_array_equal(rows.weight, [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(rows.test.label, [0, 1, 2, 0])
    assert tree.form(rows) == tree.form(share.shapes(AGREED, CONFIG, True))
    assert share.load(file(tmp_path), AGREED, CONFIG, False, 1)[0].test is None


def test_of_more_images_than_there_is_room_for_the_first_are_used_and_it_is_said(tmp_path):
    many = file(tmp_path, train_images=np.zeros((9, 8, 8, 1), np.uint8), train_labels=np.arange(9))
    rows, said = share.load(many, AGREED, CONFIG, False, 1)
    np.testing.assert_array_equal(rows.label, range(6))
    assert "has 9 train_images; the first 6 are used" in said[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_labels": None}, "lacks train_labels"),
        ({"train_images": np.zeros((5, 4, 4, 1), np.uint8)}, "this run needs uint8 [n, 8, 8, 1]"),
        ({"train_images": np.zeros((5, 8, 8, 1))}, "is float64"),
        ({"train_labels": np.arange(4)}, "it must be 5 integers"),
        ({"train_labels": np.arange(5) + 6}, "labels run from 6 to 10; the server's run has classes 0 to 9"),
    ],
)
def test_a_file_that_does_not_suit_the_run_is_refused(tmp_path, changes, said):
    assert said in refusal(file(tmp_path, **changes))


def test_too_few_images_for_the_method_and_missing_test_images_are_refused(tmp_path):
    assert "has 5 training images, but fedavg needs 7" in refusal(file(tmp_path), least=7)
    assert "lacks test_images" in refusal(file(tmp_path, test_images=None), test=True)


def test_states_come_back_by_round_and_old_ones_go(tmp_path):
    kept = states.States(tmp_path / "states")
    for round in range(1, states.KEEP + 3):
        kept.save(round, OWN | {"turns": jnp.int32(round)})
    assert kept.rounds() == list(range(states.KEEP + 2, 2, -1))
    same(kept.load(4, OWN), OWN | {"turns": jnp.int32(4)})
    assert kept.load(1, OWN) is None
    kept.save(2, OWN)  # a server that began anew
    assert kept.rounds() == [2]


def test_a_state_that_is_damaged_or_another_ones_is_none(tmp_path):
    kept = states.States(tmp_path)
    kept.save(1, OWN)
    assert kept.load(1, {"control": OWN["control"]}) is None
    data = bytearray((tmp_path / "1.npz").read_bytes())
    for place in range(0, len(data), 16):  # wherever it is hit, it is none or the state that was saved
        hit = data.copy()
        hit[place] ^= 255
        (tmp_path / "1.npz").write_bytes(hit)
        back = kept.load(1, OWN)
        if back is not None:
            same(back, OWN)
    (tmp_path / "1.npz").write_bytes(data[:100])
    assert kept.load(1, OWN) is None


def test_terms_cross_the_wire_and_name_the_run():
    back = terms.read(json.loads(json.dumps(AGREED._asdict())))
    assert terms.run_of(back) == terms.run_of(AGREED)
    assert terms.config_of(back) == dataclasses.replace(CONFIG, compute="float32")
    assert back.config == to_dict(CONFIG) | {"compute": "float32"}
    how = AGREED._replace(config=AGREED.config | {"eval_every": 3})
    other = AGREED._replace(config=AGREED.config | {"lr": 0.5})
    assert terms.run_of(how) == terms.run_of(AGREED) != terms.run_of(other)


@pytest.mark.parametrize(
    "changed",
    [{"image": [8, 8]}, {"image": [8, 8, 10**9]}, {"mean": [np.nan]}, {"classes": 0}, {"more": 1}, {"config": {}}],
)
def test_terms_that_can_be_none_are_refused(changed):
    with pytest.raises(UsageError):
        terms.read(AGREED._asdict() | changed)


def test_of_a_drawn_network_only_its_weights_travel():
    algorithm = first_algorithm("fedrlnas", real=False)
    server, _ = jax.jit(algorithm.init)(jax.random.key(1))
    message = jax.jit(algorithm.send)(server, jnp.int32(0), jax.random.key(2))
    like = jax.eval_shape(lambda: message)
    held = jax.jit(algorithm.held)
    given = jax.device_get(held(message))
    row = layout.pack(layout.of_message(jax.device_get(message), given))
    back, known = layout.to_message(row, like, algorithm, held)
    same(known, given)
    same(back.child, jax.device_get(message.child))
    for part in given:
        hidden = jax.tree.map(lambda x, here: np.where(here, x, 0), getattr(message, part), given[part])
        same(getattr(back, part), jax.tree.map(np.asarray, hidden))
    reply = jax.tree.map(jnp.zeros_like, {"params": message.params, "stats": message.stats})
    counted = traffic_of(given, message, type("Reply", (), {"change": reply, "report": ()}))
    assert len(row) == counted["bytes_down"] < tree.nbytes(message)
    assert layout.size(layout.of_reply(reply, (), given)) == counted["bytes_up"]


def test_certificates_are_made_once_and_expired_ones_are_told(tmp_path):
    pytest.importorskip("cryptography", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
    assert certs.make(tmp_path, ["a", "b"], ["fl.example.org"], 2.0) == ["a", "b"]
    before = (tmp_path / "ca.pem").read_bytes()
    assert certs.make(tmp_path, ["b", "c"], [], -1.0) == ["c"]
    assert (tmp_path / "clients.txt").read_text() == "a\nb\nc\n"
    assert (tmp_path / "ca.pem").read_bytes() == before
    assert credentials.read(tmp_path / "clients/a", "client").ca == before
    with pytest.raises(UsageError, match=r"client.pem expired on "):
        credentials.read(tmp_path / "clients/c", "client")
    with pytest.raises(UsageError, match="server.pem cannot be read"):
        credentials.read(tmp_path / "clients/a", "server")
    with pytest.raises(UsageError, match="is no client's name"):
        certs.make(tmp_path, ["../x"], [], 1.0)


def test_a_client_gives_up_on_a_server_that_stays_away(tmp_path):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        where, said = f"127.0.0.1:{taken.getsockname()[1]}", []
        asked = client.Asked(where, file(tmp_path), tmp_path / "run", None, "mine", give_up=0.0)
        with pytest.raises(client.JoinError, match=f"no connection to {where} .*; given up after 0 s"):
            client.join(asked, said.append)
    assert not any("trying again" in line for line in said)
