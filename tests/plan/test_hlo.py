"""The reader of compiled programs, against programs whose FLOPs and collectives are known."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sftjax.plan import hlo, hlo_text


def text_of(fn, *args) -> str:
    return jax.jit(fn).lower(*args).compile().as_text()


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def forgotten(text) -> str:
    """The program without XLA's own notes of trip counts, as a TPU's is."""
    text, n = re.subn(r'"known_trip_count":\{"n":"\d+"\}', '"known_trip_count":null', text)
    assert n
    return text


# ---- FLOPs and loops -----------------------------------------------------------------------


def scans(x, w):
    """5 rounds of (one product, then 3 more): 20 products of [16, 32] and [32, 32]."""

    def outer(x, _):
        x = jnp.tanh(x @ w)
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    return jax.lax.scan(outer, x, None, length=5)[0]


def test_a_scan_in_a_scan_counts_every_round():
    text = text_of(scans, f32(16, 32), f32(32, 32))
    cost = hlo.analyze(text)
    assert cost.flops == 20 * 2 * 16 * 32 * 32
    assert sorted(x.trips for x in cost.loops) == [3, 5] and all(x.known for x in cost.loops)
    # And the same where the loop's scalars have to be run.
    assert hlo.analyze(forgotten(text)) == cost


@pytest.mark.parametrize(
    ("start", "more", "step", "trips"),
    [
        (0, lambda i: i < 7, 1, 7),
        (3, lambda i: i <= 21, 6, 4),
        (9, lambda i: i > 0, -2, 5),
        (8, lambda i: i != 0, -2, 4),
        (5, lambda i: i < 5, 1, 0),
    ],
)
def test_trip_counts_of_any_counter(start, more, step, trips):
    def fn(x):
        def body(c):
            return c[0] + step, jnp.sin(c[1] @ c[1])

        return jax.lax.while_loop(lambda c: more(c[0]), body, (start, x))

    text = text_of(fn, f32(8, 8))
    if "known_trip_count" in text:
        text = forgotten(text)
    cost = hlo.analyze(text)
    assert cost.flops == trips * 2 * 8**3
    assert [x.known for x in cost.loops] in ([True], [])  # a loop that never runs is taken out


def test_a_loop_that_ends_by_data_is_named_and_assumed():
    def fn(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)

    text = text_of(fn, f32(8, 8), jax.ShapeDtypeStruct((), jnp.int32))
    (loop,) = hlo.analyze(text).loops
    assert not loop.known and loop.trips == 1 and "while" in loop.name
    assert hlo.analyze(text, assume=6).flops == 6 * 2 * 8**3


def test_an_outer_counter_does_not_pass_for_a_fixed_limit():
    """The inner loop's limit is the outer loop's counter: its trips are not those of round 0."""

    def fn(x):
        def outer(i, x):
            return jax.lax.fori_loop(0, i, lambda j, x: jnp.tanh(x @ x), x)

        return jax.lax.fori_loop(2, 6, outer, x)

    cost = hlo.analyze(text_of(fn, f32(8, 8)))
    assert sorted((x.trips, x.known) for x in cost.loops) == [(1, False), (4, True)]


def test_of_branches_the_costliest_counts():
    def fn(x, p):
        return jax.lax.cond(p, lambda x: jnp.sin(x @ x @ x), lambda x: jnp.sin(x @ x), x)

    text = text_of(fn, f32(8, 8), jax.ShapeDtypeStruct((), jnp.bool))
    assert hlo.analyze(text).flops == 2 * 2 * 8**3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilate", [1, 3])
@pytest.mark.parametrize("window_dilate", [1, 2])
def test_convolutions_count_what_meets_the_input(stride, dilate, window_dilate):
    """As a sum over positions, in the plainest form."""

    def fn(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,), [(2, 1)], (dilate,), (window_dilate,), ("NWC", "WIO", "NWC")
        )

    x, w = f32(2, 10, 3), f32(4, 3, 5)
    out = jax.eval_shape(fn, x, w)
    pairs = 0
    for o in range(out.shape[1]):
        for k in range(4):
            place = o * stride + k * window_dilate - 2
            pairs += place % dilate == 0 and 0 <= place <= 9 * dilate
    assert hlo.analyze(text_of(fn, x, w)).flops == 2 * 2 * 5 * 3 * pairs


# ---- collectives ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


X = f32(16, 8, 32)  # of which a device holds [2, 8, 32]: 2 KiB
PART = 2 * 8 * 32 * 4


@pytest.mark.parametrize(
    ("kind", "group", "fn", "payload", "sends"),
    [
        ("all-reduce", 4, lambda x: jax.lax.psum(x, "b"), PART, 2 * PART * 3 / 4),
        ("all-reduce", 8, lambda x: jax.lax.psum(x, ("a", "b")), PART, 2 * PART * 7 / 8),
        ("all-gather", 2, lambda x: jax.lax.all_gather(x, "a"), 2 * PART, PART),
        (
            "reduce-scatter",
            4,
            lambda x: jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True),
            PART,
            PART * 3 / 4,
        ),
        (
            "all-to-all",
            4,
            lambda x: jax.lax.all_to_all(x, "b", 1, 1, tiled=True),
            PART,
            PART * 3 / 4,
        ),
        ("collective-permute", 2, lambda x: jax.lax.ppermute(x, "b", [(0, 1)]), PART, PART),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bytes_of_a_collective_in_a_loop(mesh, kind, group, fn, payload, sends):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(), check_vma=False)
    def loop(x):
        def body(x, i):
            y = fn(x * (i + 1))
            return x + jnp.sum(jnp.sin(y)), None

        return jax.lax.scan(body, x, jnp.arange(6.0))[0]

    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, P(("a", "b"))))
    cost = hlo.analyze(text_of(loop, x))
    assert list(cost.collectives) == [(kind, group)]
    found = cost.collectives[kind, group]
    assert (found.count, found.bytes, found.wire) == (6, 6 * payload, 6 * sends)
    assert sum(c.bytes for c in cost.collectives.values()) == 6 * payload
    assert cost.async_share == 0 and found.async_bytes == 0  # the CPU's are not


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={1}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", 2),
        ("source_target_pairs={{0,1},{1,2}}", 2),
        ("replica_groups={}", 0),
    ],
)
def test_groups_in_every_notation(attributes, size):
    assert hlo_text.group_size(f", channel_id=1, {attributes}, use_global_device_ids=true") == size


# ---- what only a TPU's text has ------------------------------------------------------------

ASYNC = """HloModule m, is_scheduled=true

%start (p: bf16[2,8]) -> (bf16[2,8], bf16[16,8]) {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
  ROOT %c = (bf16[2,8], bf16[16,8]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[2,8], q: bf16[4,6], r: bf16[6,4]) -> (bf16[4,4], bf16[16,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %q = bf16[4,6]{1,0} parameter(1)
  %r = bf16[6,4]{1,0} parameter(2)
  %d = bf16[4,4]{1,0} convolution(%q, %r), dim_labels=bf_io->bf
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
  ROOT %t = (bf16[4,4], bf16[16,8]) tuple(%d, %all-gather.2)
}

%done (p: bf16[2,8]) -> bf16[16,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %all-gather.3 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8]
  ROOT %c = bf16[16,8] custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: f32[16,8]) -> f32[2,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %d = f32[2,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,8}
}

%on_the_sparse_core (p: bf16[16,8], t: token[]) -> bf16[8,8] {
  %t = token[] parameter(1)
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %reduce-scatter.1 = bf16[8,8]{1,0} reduce-scatter(%p), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[2,8], q: bf16[4,6], r: bf16[6,4], g: f32[16,8]) -> bf16[16,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %q = bf16[4,6]{1,0} parameter(1)
  %r = bf16[6,4]{1,0} parameter(2)
  %g = f32[16,8]{1,0} parameter(3)
  %s = (bf16[2,8], /*index=1*/bf16[16,8]) fusion(%a), kind=kCustom, calls=%start
  %ready = s32[] custom-call(), custom_call_target="PrepareAsyncCallStart"
  %o = bf16[16,8]{1,0} broadcast(%a), dimensions={}
  %call-start = ((bf16[16,8]{1,0}, token[]), bf16[8,8]{1,0}) call-start(%o, %ready), async_execution_thread="sparsecore", to_apply=%on_the_sparse_core
  %b = (bf16[4,4], bf16[16,8]) fusion(%a, %q, %r), kind=kOutput, calls=%beside, metadata={op_name="jit(f)/mul"}, backend_config={"window_config":{"x":
"a line break"
}},"estimated_cycles":"100"}
  %call-done = bf16[8,8]{1,0} call-done(%call-start)
  %rs = f32[2,8] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"30"}
  ROOT %e = bf16[16,8] fusion(%a), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_a_collective_in_flight_counts_once():
    cost = hlo.analyze(ASYNC)
    gather, scatter = cost.collectives["all-gather", 8], cost.collectives["reduce-scatter", 8]
    assert (gather.count, gather.bytes, gather.async_bytes) == (1, 256, 256)
    assert (scatter.count, scatter.bytes, scatter.async_bytes) == (1, 512, 0)
    apart = cost.collectives["reduce-scatter", 2]  # on a core apart
    assert (apart.count, apart.bytes, apart.async_bytes, apart.wire) == (1, 256, 256, 128)
    assert cost.async_share == 512 / 1024
    assert cost.flops == 2 * 4 * 6 * 4
    assert cost.cycles == {"matmul": 100, "other": 30}
    assert cost.summary()["collectives"]["all-gather x8"]["bytes"] == 256


def test_kernels_with_their_declared_cost():
    call = (
        '%splash_fwd.12 = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1200","bytes_accessed":"340"}},'
        '"tiling":[]}'
    )
    text = f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  %a = f32[8] parameter(0)\n  ROOT {call}\n}}\n"
    assert hlo.analyze(text).kernels == {"splash_fwd": hlo.Kernel(1, 1200.0, 340.0)}


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation; give compiled.as_text"):
        hlo.analyze("HloModule m\n")
