"""A server and clients as processes of their own, over loopback with TLS: what happens to them changes no bit.

FEDMETANAS_TEST_CLIENTS=6 takes six client processes in place of three, FEDMETANAS_TEST_METHODS=fedprox,fednas these
methods as well.
"""

import os

import pytest

pytest.importorskip("grpc", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")
pytest.importorskip("cryptography", reason="needs the extra: pip install 'fedmetanas_jax[deploy]'")

from served_run import METHODS, PATIENCE, assert_simulated, fields
from trial import Trial

CLIENTS = int(os.environ.get("FEDMETANAS_TEST_CLIENTS", "3"))


@pytest.mark.parametrize("method", METHODS)
def test_with_a_server_and_a_client_killed_it_is_the_simulated_run(method, tmp_path):
    cohort = CLIENTS - CLIENTS // 3
    with Trial(tmp_path, fields(method, clients=CLIENTS, cohort=cohort), CLIENTS) as trial:
        trial.finish("main", *trial.fields, f"--workdir={tmp_path / 'simulated'}")
        trial.make_shares()
        trial.serve(PATIENCE)
        for client in range(CLIENTS):
            trial.join(client)
        trial.until_round(2)
        trial.kill("server")
        trial.serve(PATIENCE)
        trial.until_round(5)
        trial.kill("client-1")
        trial.join(1)
        trial.until_done()
        assert "resuming after round " in trial.log("server")
        assert "client-1 is gone" in trial.log("server")
        assert "trying again in" in trial.log("client-0")
        assert not any("left_out" in line for line in trial.records())
        assert_simulated(trial.workdir, tmp_path / "simulated")
