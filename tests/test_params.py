"""The abstract tree and what is derived from it; rules over names; trained and frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sftjax import parallel
from sftjax import params as params_lib
from sftjax.params import Param


def tree(**more):
    attn = {"q": {"w": Param((3, 8, 4), ("layers", "embed", "heads"))}}
    return {
        "embed": {"w": Param((16, 8), ("vocab", "embed"))},
        "layers": {"0-2": {"attn": attn} | more},
        "norm": {"scale": Param((8,), ("norm",), jax.nn.initializers.ones)},
    }


NAMES = ["embed/w", "layers/0-2/attn/q/w", "norm/scale"]

# ---- the abstract tree ---------------------------------------------------------------------


def test_leaves_are_named_by_their_path():
    assert list(params_lib.flatten(tree())) == NAMES
    values = {"a": [jnp.ones(1), None, {"b": jnp.ones(2)}]}
    assert list(params_lib.flatten(values)) == ["a/0", "a/2/b"]
    assert params_lib.flatten(params_lib.map_named(lambda name, p: name, tree())) == {n: n for n in NAMES}
    with pytest.raises(ValueError, match=r"Param has shape \(2, 3\) but axes \('embed',\)"):
        Param((2, 3), ("embed",))


def test_adding_a_parameter_changes_no_other():
    before = params_lib.flatten(params_lib.init(tree(), jax.random.key(0)))
    more = {"b": Param((3, 4), ("layers", "heads"))}
    after = params_lib.flatten(params_lib.init(tree(**more), jax.random.key(0)))
    assert after.keys() - before.keys() == {"layers/0-2/b"}
    for name, x in before.items():
        np.testing.assert_array_equal(x, after[name])
    values = [np.asarray(after[n]).ravel()[:8] for n in ("embed/w", "layers/0-2/attn/q/w")]
    assert not np.allclose(*values), "each parameter draws its own numbers"
    other = params_lib.flatten(params_lib.init(tree(), jax.random.key(1)))
    assert not np.allclose(other["embed/w"], before["embed/w"])
    np.testing.assert_array_equal(after["norm/scale"], np.ones(8))


def test_init_on_a_mesh_draws_the_same_numbers():
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    shardings = parallel.param_shardings(mesh, tree())
    plain = params_lib.init(tree(), jax.random.key(0), jnp.bfloat16)
    placed = params_lib.init(tree(), jax.random.key(0), jnp.bfloat16, shardings)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(placed), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings


def test_shapes_are_targets_with_shardings():
    plain = params_lib.shapes(tree(), jnp.bfloat16)
    assert plain["embed"]["w"] == jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)
    mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
    shardings = parallel.param_shardings(mesh, tree())
    placed = params_lib.shapes(tree(), shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    assert {x.dtype for x in jax.tree.leaves(placed)} == {np.dtype(np.float32)}


def test_count_and_bytes():
    assert params_lib.count(tree()) == 16 * 8 + 3 * 8 * 4 + 8
    arrays = {"a": jnp.ones((2, 3)), "b": jnp.ones(5, jnp.bfloat16), "c": None, "d": jnp.ones(())}
    assert params_lib.count(arrays) == 12
    assert params_lib.nbytes(arrays) == 6 * 4 + 5 * 2 + 4
    big = {"w": Param((2**20, 2**20), ("vocab", "embed"))}  # more than an int32 counts
    assert params_lib.count(big) == 2**40
    assert params_lib.nbytes(params_lib.shapes(big, jnp.bfloat16)) == 2**41
    m = tiny.model(qkv_bias=True)
    assert params_lib.count(m.abstract) == params_lib.count(tiny.params(m))


def test_the_table_says_what_is_trained():
    trainable = params_lib.match_rules([(".*/w", True), (".*", False)], tree(), "x")
    lines = params_lib.table(params_lib.shapes(tree(), jnp.bfloat16), trainable).splitlines()
    assert lines[0].split() == ["parameter", "shape", "dtype", "count", "trained"]
    assert lines[1].split() == ["embed/w", "16x8", "bfloat16", "128", "yes"]
    assert lines[3].split() == ["norm/scale", "8", "bfloat16", "8", "frozen"]
    assert len({line.index(word) for line, word in zip(lines, ["dtype"] + 3 * ["bfloat16"], strict=True)}) == 1


# ---- rules ---------------------------------------------------------------------------------


def test_the_first_rule_that_matches_the_whole_name_wins():
    rules = [("layers/.*", 1), (".*/w", 2), ("norm/scale", 3)]
    assert params_lib.flatten(params_lib.match_rules(rules, tree(), "x")) == dict(zip(NAMES, [2, 1, 3], strict=True))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("layers/.*", 1)], r"no rule covers parameter 'embed/w'; end .* \('.\*', value\)"),
        ([("layer/.*", 1), (".*", 0)], "optim.trainable: rule 'layer/.*' matches no parameter"),
        ([("embed", 1), (".*", 0)], "rule 'embed' matches no parameter. Rules match whole names;"
         " the names here are: embed/w, layers/0-2/attn/q/w, norm/scale"),
        ([("(", 1)], r"optim.trainable: rule '\(' is not a regular expression: missing \)"),
        ([], "no rule covers parameter 'embed/w'"),
    ],
    ids=str,
)  # fmt: skip
def test_rules_that_are_wrong(rules, message):
    with pytest.raises(ValueError, match=message):
        params_lib.match_rules(rules, tree(), "optim.trainable")


def test_a_long_list_of_names_is_cut():
    many = {f"p{i:02d}": Param((1,), (None,)) for i in range(20)}
    with pytest.raises(ValueError, match=r"are: p00, .*p11, \.\.\. \(8 more\)"):
        params_lib.match_rules([("q", 1)], many, "x")


# ---- trained and frozen --------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["layers/.*", ".*", "norm/scale"])
def test_combine_is_the_inverse_of_partition(rule):
    params = params_lib.init(tree(), jax.random.key(0))
    rest = [] if rule == ".*" else [(".*", False)]
    trainable = params_lib.match_rules([(rule, True), *rest], params, "x")
    trained, frozen = params_lib.partition(params, trainable)
    names = {n for n, on in params_lib.flatten(trainable).items() if on}
    assert params_lib.flatten(trained).keys() == names
    assert params_lib.flatten(frozen).keys() == set(NAMES) - names
    whole = params_lib.combine(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True):
        assert a is b
    assert jax.tree.structure(params_lib.combine(frozen, trained)) == jax.tree.structure(params)
