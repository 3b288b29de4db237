"""The product with a weight: its gradients, by the rule for CPUs and by JAX's own elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from sftjax import parallel
from sftjax.ops import linear

EQUATIONS = {
    "bsd,dnh->bsnh": ((2, 6, 8), (8, 4, 3)),
    "bsnh,nhd->bsd": ((2, 6, 4, 3), (4, 3, 8)),
    "bsd,df->bsf": ((2, 6, 8), (8, 5)),
    "bsnh,nh->bsn": ((2, 6, 4, 3), (4, 3)),
}


def grads(equation, x, w):
    return jax.grad(lambda x, w: jnp.sum(jnp.sin(linear.einsum(equation, x, w))), (0, 1))(x, w)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_rule_for_cpus_gives_the_gradients_of_jax(equation, monkeypatch):
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(k, s) for k, s in zip(keys, EQUATIONS[equation], strict=True))
    found = grads(equation, x, w)
    monkeypatch.setattr(linear, "_for_cpu", lambda: False)
    for a, b in zip(found, grads(equation, x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_the_rule_follows_the_mesh_of_the_program(platform):
    """Not the machine that compiles it: programs for TPUs are compiled on CPUs too."""
    sizes = (1,) * len(parallel.AXES)
    mesh = AbstractMesh(sizes, parallel.AXES, abstract_device=AbstractDevice("", None, platform))
    x, w = jnp.ones((2, 6, 8)), jnp.ones((8, 5))
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(lambda x, w: linear.einsum("bsd,df->bsf", x, w))(x, w))
    assert ("custom_vjp_call" in text) == (platform == "cpu")
