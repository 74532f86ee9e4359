"""Genotypes: both rules on an example done by hand, their forms, their errors, their picture."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.text import Text

from fedmetanas_jax.core import Alpha, Mask
from fedmetanas_jax.nas import genotype, mask, picture, relax
from fedmetanas_jax.nas.genotype import Genotype
from fedmetanas_jax.topology import OPS, edge

NONE, MAX, AVG, SKIP, SEP3, SEP5, DIL3, DIL5 = range(8)
EXAMPLE = Genotype(
    normal=((("sep_conv_3x3", 0), ("none", 1)), (("skip_connect", 0), ("dil_conv_5x5", 2))),
    reduce=((("max_pool_3x3", 0), ("max_pool_3x3", 1)), (("avg_pool_3x3", 1), ("sep_conv_5x5", 2))),
)
LARGER = Genotype(
    normal=(*EXAMPLE.normal, (("sep_conv_3x3", 1), ("dil_conv_3x3", 3))),
    reduce=(*EXAMPLE.reduce, (("max_pool_3x3", 0), ("none", 2))),
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
    op[0, edge(0, 0), SEP3] = 3
    op[0, edge(0, 1), [NONE, SKIP]] = 4, 1
    op[0, edge(1, 0), [NONE, SEP5]] = 3, 2
    op[0, edge(1, 1), DIL3] = 2
    op[0, edge(1, 2), AVG] = 1
    pair[0, 1:] = 0, 1, 0.5
    return Alpha(jnp.array(op), jnp.array(pair))


def random_alpha(seed: int, nodes: int = 4) -> Alpha:
    random = np.random.default_rng(seed)
    return Alpha(*(jnp.array(random.normal(size=alive.shape), jnp.float32) for alive in mask.full(nodes)))


def test_darts_rule_by_hand():
    found = genotype.darts_rule(example_alpha(), mask.full(2))
    assert found.normal == (
        (("sep_conv_3x3", 0), ("skip_connect", 1)),
        (("dil_conv_3x3", 1), ("avg_pool_3x3", 2)),
    )


def test_pair_rule_by_hand():
    found = genotype.pair_rule(example_alpha(), mask.full(2))
    assert found.normal == ((("sep_conv_3x3", 0), ("none", 1)), (("none", 0), ("avg_pool_3x3", 2)))


def test_ties_go_to_the_lowest_index():
    alpha, full = example_alpha(), mask.full(2)
    tie = ("max_pool_3x3", 0), ("max_pool_3x3", 1)
    assert genotype.darts_rule(alpha, full).reduce == (tie, tie)
    tie = ("none", 0), ("none", 1)
    assert genotype.pair_rule(alpha, full).reduce == (tie, tie)


def test_darts_rule_looks_only_at_what_is_alive():
    """Without (1,1), and with `none` alone alive on (1,2), node 1 keeps what it has."""
    full = mask.full(2)
    op, pair = np.array(full.op), np.array(full.pair)
    op[0, edge(1, 1)] = op[0, edge(1, 2), 1:] = op[0, edge(0, 0), SEP3] = False
    pair[0, [1, 3]] = False
    alive = Mask(jnp.array(op), jnp.array(pair))
    found = genotype.darts_rule(example_alpha(), alive)
    assert found.normal == ((("max_pool_3x3", 0), ("skip_connect", 1)), (("sep_conv_5x5", 0), ("none", 2)))


@pytest.mark.parametrize("nodes", [1, 4])
def test_pair_rule_is_the_terminal_network(nodes):
    alpha = random_alpha(nodes, nodes)
    full = mask.full(nodes)
    found = genotype.pair_rule(alpha, full)
    np.testing.assert_array_equal(genotype.to_mix(found, nodes), relax.harden(alpha, full))
    assert genotype.to_keep(found, nodes) == mask.keep(mask.terminal(alpha, full))
    assert genotype.pair_rule(alpha, mask.terminal(alpha, full)) == found
    assert all(len(node) == 2 for cell in found for node in cell)


def test_darts_rule_agrees_with_the_terminal_network_unless_none_won():
    alpha = random_alpha(1)
    end = mask.terminal(alpha, mask.full(4))
    assert genotype.darts_rule(alpha, end) == genotype.pair_rule(alpha, end)


def test_mix_of_the_example():
    mix = genotype.to_mix(EXAMPLE, 2)
    assert mix.dtype == np.float32
    assert np.argwhere(mix).tolist() == [
        [0, 0, SEP3], [0, 1, NONE], [0, 2, SKIP], [0, 4, DIL5],
        [1, 0, MAX], [1, 1, MAX], [1, 3, AVG], [1, 4, SEP5],
    ]  # fmt: skip
    assert genotype.to_keep(EXAMPLE, 2)[0] == [[SEP3], [NONE], [SKIP], [], [DIL5]]


def test_a_genotype_of_another_number_of_nodes_is_refused():
    with pytest.raises(ValueError, match="cells have 2 nodes, the network's 4"):
        genotype.to_mix(EXAMPLE, 4)


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
        ('"normal"', '"ordinary"', '"normal": cell, "reduce": cell'),
        ("sep_conv_3x3", "sep_conv_9x9", "node 0: no operation 'sep_conv_9x9'; there are none, max_pool_3x3"),
        ('["dil_conv_5x5", 2]', '["dil_conv_5x5", 3]', "normal cell, node 1: no input 3; there are 0 to 2"),
        ('["dil_conv_5x5", 2]', '["dil_conv_5x5", true]', "normal cell, node 1: no input True"),
        ('["dil_conv_5x5", 2]', '["dil_conv_5x5", 0]', "normal cell, node 1: an input occurs twice"),
        ('["sep_conv_5x5", 2]', '["sep_conv_5x5"]', "reduce cell, node 1: .* is not .operation, input"),
        ('[["skip_connect", 0], ["dil_conv_5x5", 2]]', "[]", "normal cell, node 1: should be a list of"),
        (', [["skip_connect", 0], ["dil_conv_5x5", 2]]', "", "normal has 1 nodes, reduce 2"),
    ],
)
def test_what_is_no_genotype_is_refused_by_name(old, new, message):
    text = genotype.to_json(EXAMPLE)
    assert old in text
    with pytest.raises(ValueError, match=message):
        genotype.from_json(text.replace(old, new))


def test_text_is_a_table():
    lines = genotype.to_text(EXAMPLE).splitlines()
    assert lines[0].split() == ["cell", "node", "input", "operation"]
    assert lines[2].split() == ["normal", "0", "c_{k-2}", "sep_conv_3x3"]
    assert lines[5].split() == ["normal", "1", "node", "0", "dil_conv_5x5"]
    assert len(lines) == 2 + 8


def test_picture_names_every_operation_once_and_no_label_hides_another(tmp_path):
    found = LARGER
    figure = picture.figure_of(found)
    labels = [t for t in figure.findobj(Text) if t.get_text() in OPS]
    operations = [op for cell in found for node in cell for op, _ in node]
    assert sorted(t.get_text() for t in labels) == sorted(operations)
    boxes = [t.get_window_extent() for t in labels]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    picture.draw(found, tmp_path / "cells.png")
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")
