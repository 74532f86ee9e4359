"""Genotypes: both rules on an example done by hand, their forms, their errors, their picture."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.text import Text

from fedmetanas_jax.core import Alpha, Mask
from fedmetanas_jax.models.nasbench201 import GRAPH as NASBENCH201
from fedmetanas_jax.models.plan import darts_graph
from fedmetanas_jax.nas import genotype, mask, picture, relax
from fedmetanas_jax.nas.genotype import Genotype

SMALL = darts_graph(2)
NONE, MAX, AVG, SKIP, SEP3, SEP5, DIL3, DIL5 = range(8)
EXAMPLE: Genotype = dict(
    normal=((("sep_conv_3x3", 0), ("none", 1)), (("skip_connect", 0), ("dil_conv_5x5", 2))),
    reduce=((("max_pool_3x3", 0), ("max_pool_3x3", 1)), (("avg_pool_3x3", 1), ("sep_conv_5x5", 2))),
)
LARGER: Genotype = dict(
    normal=(*EXAMPLE["normal"], (("sep_conv_3x3", 1), ("dil_conv_3x3", 3))),
    reduce=(*EXAMPLE["reduce"], (("max_pool_3x3", 0), ("none", 2))),
)


def example_alpha() -> Alpha:
    """Two nodes. Logits of the normal cell, all others 0:

    edge   op logits                softmax: none / best other
    (0,0)  sep3 3                   .037 / .742
    (0,1)  none 4, skip 1           .858 / .043
    (1,0)  none 3, sep5 2           .602 / .222   largest of all is `none`
    (1,1)  dil3 2                   .070 / .514
    (1,2)  avg 1                    .103 / .280
    pairs of node 1: (0,1) 0, (0,2) 1, (1,2) .5
    """
    op, pair = np.zeros((2, 5, 8), np.float32), np.zeros((2, 4), np.float32)
    op[0, 0, SEP3] = 3
    op[0, 1, [NONE, SKIP]] = 4, 1
    op[0, 2, [NONE, SEP5]] = 3, 2
    op[0, 3, DIL3] = 2
    op[0, 4, AVG] = 1
    pair[0, 1:] = 0, 1, 0.5
    return Alpha(jnp.array(op), jnp.array(pair))


def random_alpha(seed: int, nodes: int = 4) -> Alpha:
    random = np.random.default_rng(seed)
    return Alpha(*(jnp.array(random.normal(size=alive.shape), jnp.float32) for alive in mask.full(darts_graph(nodes))))


def test_darts_rule_by_hand():
    found = genotype.darts_rule(SMALL, example_alpha(), mask.full(SMALL))
    assert found["normal"] == (
        (("sep_conv_3x3", 0), ("skip_connect", 1)),
        (("dil_conv_3x3", 1), ("avg_pool_3x3", 2)),
    )


def test_pair_rule_by_hand():
    found = genotype.pair_rule(SMALL, example_alpha(), mask.full(SMALL))
    assert found["normal"] == ((("sep_conv_3x3", 0), ("none", 1)), (("none", 0), ("avg_pool_3x3", 2)))


def test_ties_go_to_the_lowest_index():
    alpha, full = example_alpha(), mask.full(SMALL)
    tie = ("max_pool_3x3", 0), ("max_pool_3x3", 1)
    assert genotype.darts_rule(SMALL, alpha, full)["reduce"] == (tie, tie)
    tie = ("none", 0), ("none", 1)
    assert genotype.pair_rule(SMALL, alpha, full)["reduce"] == (tie, tie)


def test_darts_rule_looks_only_at_what_is_alive():
    """Without (1,1), and with `none` alone alive on (1,2), node 1 keeps what it has."""
    full = mask.full(SMALL)
    op, pair = np.array(full.op), np.array(full.pair)
    op[0, 3] = op[0, 4, 1:] = op[0, 0, SEP3] = False
    pair[0, [1, 3]] = False
    alive = Mask(jnp.array(op), jnp.array(pair))
    found = genotype.darts_rule(SMALL, example_alpha(), alive)
    assert found["normal"] == ((("max_pool_3x3", 0), ("skip_connect", 1)), (("sep_conv_5x5", 0), ("none", 2)))


@pytest.mark.parametrize("nodes", [1, 4])
def test_pair_rule_is_the_terminal_network(nodes):
    alpha = random_alpha(nodes, nodes)
    graph = darts_graph(nodes)
    full = mask.full(graph)
    found = genotype.pair_rule(graph, alpha, full)
    np.testing.assert_array_equal(genotype.to_mix(graph, found), relax.harden(graph, alpha, full))
    assert genotype.to_plan(graph, found) == mask.plan_of(graph, mask.terminal(graph, alpha, full))
    assert genotype.pair_rule(graph, alpha, mask.terminal(graph, alpha, full)) == found
    assert all(len(node) == 2 for cell in found.values() for node in cell)


def test_darts_rule_agrees_with_the_terminal_network_unless_none_won():
    alpha, graph = random_alpha(1), darts_graph(4)
    end = mask.terminal(graph, alpha, mask.full(graph))
    assert genotype.darts_rule(graph, alpha, end) == genotype.pair_rule(graph, alpha, end)


def test_mix_of_the_example():
    mix = genotype.to_mix(SMALL, EXAMPLE)
    assert mix.dtype == np.float32
    assert np.argwhere(mix).tolist() == [
        [0, 0, SEP3], [0, 1, NONE], [0, 2, SKIP], [0, 4, DIL5],
        [1, 0, MAX], [1, 1, MAX], [1, 3, AVG], [1, 4, SEP5],
    ]  # fmt: skip
    assert genotype.of_mix(SMALL, mix) == EXAMPLE
    assert genotype.to_plan(SMALL, EXAMPLE)[0] == [[SEP3], [NONE], [SKIP], [], [DIL5]]


def test_a_genotype_of_another_number_of_nodes_is_refused():
    with pytest.raises(ValueError, match="normal cell has 2 nodes, the network's 4"):
        genotype.to_mix(darts_graph(4), EXAMPLE)


@pytest.mark.parametrize("example", [EXAMPLE, LARGER], ids=["2 nodes", "3 nodes"])
def test_json_round_trip(example):
    assert genotype.from_json(genotype.to_json(example)) == example


def test_json_inputs_may_come_in_any_order():
    text = genotype.to_json(EXAMPLE).replace(
        '[["skip_connect", 0], ["dil_conv_5x5", 2]]', '[["dil_conv_5x5", 2], ["skip_connect", 0]]'
    )
    assert genotype.from_json(text) == EXAMPLE


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "", "not JSON"),
        ('"normal"', '"ordinary"', "has cells ordinary, reduce, the network normal, reduce"),
        ("sep_conv_3x3", "sep_conv_9x9", "node 0: no operation 'sep_conv_9x9'; there are none, max_pool_3x3"),
        ('["dil_conv_5x5", 2]', '["dil_conv_5x5", 3]', "normal cell, node 1: no input 3; there are 0, 1, 2"),
        ('["dil_conv_5x5", 2]', '["dil_conv_5x5", true]', "normal cell, node 1: .* is not .operation, input"),
        ('["dil_conv_5x5", 2]', '["dil_conv_5x5", 0]', "normal cell, node 1: an input occurs twice"),
        ('["sep_conv_5x5", 2]', '["sep_conv_5x5"]', "reduce cell, node 1: .* is not .operation, input"),
        ('[["skip_connect", 0], ["dil_conv_5x5", 2]]', "[]", "normal cell, node 1: should be a list of"),
        (', [["skip_connect", 0], ["dil_conv_5x5", 2]]', "", "normal cell has 1 nodes, the network's 2"),
    ],
)
def test_what_is_no_genotype_is_refused_by_name(old, new, message):
    text = genotype.to_json(EXAMPLE)
    assert old in text
    with pytest.raises(ValueError, match=message):
        genotype.check(SMALL, genotype.from_json(text.replace(old, new)))


@pytest.mark.parametrize("text", ["[]", "{}", '{"normal": 3}', '{"normal": [[[3, "none"]]]}'])
def test_json_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="genotype"):
        genotype.from_json(text)


CELL = {"cell": ((("nor_conv_3x3", 0),), (("none", 0), ("skip_connect", 1)), (("avg_pool_3x3", 1), ("none", 2)))}


def test_forms_of_a_cell_without_pairs():
    """Every edge stays; both rules read the largest logits, `none` among them or not."""
    full = mask.full(NASBENCH201)
    random = np.random.default_rng(0).normal(size=full.op.shape)
    alpha = Alpha(jnp.array(random, jnp.float32), jnp.zeros(full.pair.shape))
    found = genotype.pair_rule(NASBENCH201, alpha, full)
    assert [[i for _, i in node] for node in found["cell"]] == [[0], [0, 1], [0, 1, 2]]
    assert genotype.to_mix(NASBENCH201, found).argmax(-1).tolist() == random.argmax(-1).tolist()
    found = genotype.darts_rule(NASBENCH201, alpha, full)
    assert genotype.to_mix(NASBENCH201, found).argmax(-1).tolist() == (random[..., 1:].argmax(-1) + 1).tolist()
    assert genotype.from_json(genotype.to_json(found)) == found
    assert genotype.to_text(NASBENCH201, CELL).splitlines()[2].split() == ["cell", "0", "c_{k-1}", "nor_conv_3x3"]


def test_text_is_a_table():
    lines = genotype.to_text(SMALL, EXAMPLE).splitlines()
    assert lines[0].split() == ["cell", "node", "input", "operation"]
    assert lines[2].split() == ["normal", "0", "c_{k-2}", "sep_conv_3x3"]
    assert lines[5].split() == ["normal", "1", "node", "0", "dil_conv_5x5"]
    assert len(lines) == 2 + 8


@pytest.mark.parametrize(
    ("normal", "said"),
    [
        (((("none", 0), ("skip_connect", 1)), (("none", 0), ("dil_conv_5x5", 2))), None),
        (((("none", 0), ("none", 1)), (("none", 0), ("dil_conv_5x5", 2))), "normal 0, 1"),
        (((("none", 0), ("none", 1)), (("none", 1), ("none", 2))), "normal 0, 1"),
        (((("skip_connect", 0), ("none", 1)), (("none", 0), ("none", 2))), "normal 1"),
    ],
)
def test_text_names_the_nodes_that_no_image_reaches(normal, said):
    *table, last = genotype.to_text(SMALL, EXAMPLE | {"normal": normal}).splitlines()
    assert len(table) == 2 + 8 - (said is None)
    assert (last == f"`none` keeps every image from the nodes {said}") == (said is not None)


def test_equal_logits_leave_a_network_that_is_said_to_be_cut_off():
    full = mask.full(SMALL)
    alpha = Alpha(jnp.zeros(full.op.shape), jnp.zeros(full.pair.shape))
    assert genotype.to_text(SMALL, genotype.pair_rule(SMALL, alpha, full)).endswith("nodes normal 0, 1; reduce 0, 1")
    assert "keeps every image" not in genotype.to_text(SMALL, genotype.darts_rule(SMALL, alpha, full))
    assert "keeps every image" not in genotype.to_text(NASBENCH201, CELL)


@pytest.mark.parametrize(("graph", "found"), [(darts_graph(3), LARGER), (NASBENCH201, CELL)], ids=["darts", "cell"])
def test_picture_names_every_operation_once_and_no_label_hides_another(tmp_path, graph, found):
    figure = picture.figure_of(graph, found)
    labels = [t for t in figure.findobj(Text) if t.get_text() in graph.ops]
    operations = [op for cell in found.values() for node in cell for op, _ in node]
    assert sorted(t.get_text() for t in labels) == sorted(operations)
    boxes = [t.get_window_extent() for t in labels]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    picture.draw(graph, found, tmp_path / "cells.png")
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")
