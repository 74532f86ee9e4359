"""Secure sums between processes: the server sees no change, and the run is the simulated one to the bit."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
pytest.importorskip("Crypto", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")

from served_run import PATIENCE, assert_simulated, fields
from trial import Trial

from fedmetanas_jax.deploy import client
from fedmetanas_jax.options import UsageError

CLIENTS = 3  # of whom all must take part
FIELDS = fields("scaffold", clients=CLIENTS, cohort=CLIENTS, rounds=6, aggregate="clip:0.3:0.1:3,secure")


def test_with_a_client_killed_it_is_the_simulated_run_with_the_same_sums(tmp_path):
    """SCAFFOLD: what clients keep goes with what was summed. Changes are clipped, losses and counts are summed, too."""
    with Trial(tmp_path, FIELDS, CLIENTS) as trial:
        trial.finish("main", *trial.fields, f"--workdir={tmp_path / 'simulated'}")
        trial.make_shares()
        trial.serve(PATIENCE)
        for number in range(CLIENTS):
            trial.join(number, "--only_secure")
        trial.until_round(2)
        trial.kill("client-1")
        trial.join(1, "--only_secure")
        trial.until_done()
        assert "client-1 is gone" in trial.log("server")
        assert "the server is to see sums of 3 clients' changes and no single one" in trial.log("client-1")
        records = assert_simulated(trial.workdir, tmp_path / "simulated", "sums_failed", "sum_attempts")
    assert {line["clipped"] for line in records} & {1.0}


def asked(**changed) -> client.Asked:
    return client.Asked("localhost:1", Path("mine.npz"), Path("nowhere"), None, **changed)


def test_a_client_may_insist_on_secure_sums():
    """Or a server could have another run, whose changes it sees."""
    for only, secure in ((True, None), (False, None), (False, "sums"), (True, "sums")):
        one = client.Client(asked(only_secure=only), lambda text: None)
        one._worker = SimpleNamespace(secure=secure, config=SimpleNamespace(cohort=CLIENTS), phases=[])
        if secure is None and only:
            with pytest.raises(client.JoinError, match="the server would see this client's changes"):
                one._secure("run", 0)
        elif secure is None:
            assert one._secure("run", 0) is None
        else:  # it has no certificate
            with pytest.raises(UsageError, match="rests on clients' certificates"):
                one._secure("run", 0)
