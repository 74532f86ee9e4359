"""How many clients a program computes together, by the memory that is free; how a program is traced."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from fedmetanas_jax.build import one_phase
from fedmetanas_jax.engine import programs as engine
from fedmetanas_jax.engine.kept import Kept
from fedmetanas_jax.engine.round import init_state, state_shapes

CLIENTS, COHORT = 8, 6
CONDUCT = engine.Conduct(
    rounds=4, seed=0, clients=CLIENTS, cohort=COHORT, batch=4, epochs=1, at_once=-1, block=1, compile_ahead=0,
    client_states="auto", bn_eval="running", eval_batch=8, eval_every=0, adapt_every=0, final_adapt=False,
    checkpoint_every=1,
)  # fmt: skip


def heavy(sent, own, data, key):
    """The toy client with 4 MB of intermediate values."""
    reply = toy.client_update(sent, own, data, key)
    noise = jnp.sort(jax.random.uniform(key, (1 << 20,)))  # a sort is computed into memory of its own
    return reply._replace(metrics=reply.metrics | {"noise": noise[17]})


@pytest.fixture(scope="module")
def start():
    algorithm = toy.ALGORITHM._replace(client_update=heavy)
    return algorithm, init_state(algorithm, 0, CLIENTS), toy.make_data(CLIENTS)


def compiled(start, free, monkeypatch, at_once=None, kept=None):
    algorithm, state, data = start
    said = []
    monkeypatch.setattr(engine, "free_bytes", lambda: free)
    programs = engine.Programs(algorithm, CONDUCT, data, None, False, at_once, said.append, kept=kept)
    programs("round", jax.tree.map(jnp.copy, state), data, jnp.int32(1))
    return programs.at_once, said


def test_all_at_once_where_they_fit_or_nothing_is_known(start, monkeypatch):
    for free in (None, 10**9):
        at_once, said = compiled(start, free, monkeypatch)
        assert at_once == COHORT
        assert any("6 of a device's 6 clients at once" in line for line in said)


def test_as_many_as_fit(start, monkeypatch):
    """Six clients take 4 MB each at the least, so that 20 MB hold some of them and 1 MB one (there are no fewer)."""
    some, said = compiled(start, 20 * 10**6, monkeypatch)
    assert 1 <= some < COHORT
    assert any(f"{some} of a device's 6 clients at once" in line and "0.02 GB free" in line for line in said)
    assert compiled(start, 10**6, monkeypatch)[0] == 1


def test_a_resumed_run_takes_what_was_chosen(start, monkeypatch):
    assert compiled(start, 10**9, monkeypatch, at_once=2)[0] == 2


def test_a_run_that_is_given_programs_computes_as_many_as_they_do(start, monkeypatch):
    kept = Kept()
    some, _ = compiled(start, 20 * 10**6, monkeypatch, kept=kept)
    monkeypatch.setattr(engine, "_lowered", lambda *given: pytest.fail("something is compiled"))
    assert compiled(start, 10**6, monkeypatch, kept=kept)[0] == some


def test_the_round_is_compiled_while_the_state_is_made(start, monkeypatch):
    """Once, and what is needed later after it; with the bits of a round that nobody foresaw."""
    algorithm, state, data = start
    made, compile_anew = [], engine.Programs._compile_anew

    def counted(self, name, *arguments):
        made.append(name)
        return compile_anew(self, name, *arguments)

    monkeypatch.setattr(engine.Programs, "_compile_anew", counted)
    found = []
    for foreseen in (True, False):
        programs = engine.Programs(algorithm, CONDUCT, data, None, False, 2, print, later=["evaluation"])
        if foreseen:
            programs.foresee(state_shapes(algorithm, CLIENTS))
        found.append(programs("round", jax.tree.map(jnp.copy, state), data, jnp.int32(1)))
        assert np.isfinite(programs.answers(algorithm.global_model(state.server), data.central, None).loss).all()
        assert made == ["round", "evaluation"]
        made.clear()
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_what_surrounds_an_evaluation_is_compiled_before_one_is_due(start, caplog, monkeypatch):
    _, state, _ = start
    small = ["draw", "local_summary", "global_model"]

    def compiles(foreseen: bool) -> list[str]:
        def global_model(server):
            return toy.ALGORITHM.global_model(server)

        algorithm = start[0]._replace(global_model=global_model)
        data = toy.make_data(CLIENTS, q=29 + foreseen)  # of a size that nothing was compiled for before
        conduct = CONDUCT._replace(bn_eval="recalibrated")
        programs = engine.Programs(algorithm, conduct, data, None, False, 2, print, later=["evaluation"])
        if foreseen:
            programs.foresee(state_shapes(algorithm, CLIENTS))
        programs("round", jax.tree.map(jnp.copy, state), data, jnp.int32(1))
        programs._thread.shutdown()
        caplog.clear()
        with jax.log_compiles():
            programs.accuracies(programs.global_model(state.server), state)
        logged = [record.getMessage() for record in caplog.records]
        return [name for name in small if any(f"Compiling jit({name})" in line for line in logged)]

    assert compiles(foreseen=True) == []
    monkeypatch.setattr(engine.Programs, "_around_evaluation", lambda self, state: None)
    assert compiles(foreseen=False) == small


def test_what_takes_its_time_is_done_while_the_first_round_is_compiled(tmp_path):
    """Once in a process, also where nothing was foreseen, and before its first record."""
    said: list = []
    for rounds in (2, 1):
        told = {"meanwhile": lambda: said.append("meanwhile"), "stop_after": rounds}
        toy.run(one_phase(toy.ALGORITHM), toy.make_data(7), tmp_path / "run", said, **told)
    kinds = [line if isinstance(line, str) else line["round"] for line in said]
    kinds = [kind for kind in kinds if kind == "meanwhile" or not isinstance(kind, str)]
    assert kinds == ["meanwhile", 1, 2, "meanwhile", 3]


def test_a_new_run_has_its_round_foreseen_and_the_first_one_measured(tmp_path):
    said: list = []
    how = {"eval_every": 3, "block": 4, "checkpoint_every": 4}
    toy.run(one_phase(toy.ALGORITHM), toy.make_data(7), tmp_path / "run", said, **how)
    assert any("compiled the round" in line and "meanwhile" in line for line in said if isinstance(line, str))
    lines = [line for line in said if isinstance(line, dict)]
    assert [line["round"] for line in lines if "server_accuracy" in line] == [1, 3, 4]


def test_where_it_is_not_known_how_many_fit_nothing_is_foreseen(start):
    algorithm, _, data = start
    programs = engine.Programs(algorithm, CONDUCT, data, None, False, None, print)
    programs.foresee(state_shapes(algorithm, CLIENTS))
    assert not programs._begun


def test_what_the_last_run_did_not_use_is_not_kept():
    kept = Kept()
    for run in range(3):
        kept.next_run("a method")
        assert (kept.get("shared") is None) == (run == 0)
        kept.put("shared", "a program")
        assert kept.get(run) is None  # of a network that this run alone found
        kept.put(run, "a program")
    kept.next_run("a method")
    assert [kept.get(name) is None for name in ("shared", 0, 1, 2)] == [False, True, True, False]
    kept.next_run("another, whose programs may bear the same names")
    assert kept.get("shared") is None


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_searched_for_garbage_while_a_program_is_traced_and_then_all_is_as_before(collects, fails):
    seen = []

    def program(x):
        seen.append(gc.isenabled())
        return x / (0 if fails else 1)

    (gc.enable if collects else gc.disable)()
    try:
        if fails:
            with pytest.raises(ZeroDivisionError):
                engine._lowered(jax.jit(lambda: program(1)))
        else:
            engine._lowered(jax.jit(program), 1.0)
        assert seen == [False]
        assert gc.isenabled() == collects
    finally:
        gc.enable()
