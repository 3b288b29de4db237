"""Hardware by name: what each name means, and what is said of one that means nothing."""

import jax
import pytest

from sftjax.plan import hardware as targets
from sftjax.plan.hardware import TargetError, parse


@pytest.mark.parametrize(
    ("text", "topology", "devices", "slices"),
    [
        ("v5e-16", "v5e:4x4", 16, 1),
        ("v5litepod-8", "v5e:2x4", 8, 1),
        ("v5e:2x4", "v5e:2x4", 8, 1),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5p-16", "v5p:2x2x2", 8, 1),  # counted in cores: 8 chips
        ("v5p:2x2x2", "v5p:2x2x2", 8, 1),
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v6e-256", "v6e:16x16", 256, 1),
        ("4xv6e-256", "v6e:16x16", 1024, 4),
        ("2xv6e:2x2", "v6e:2x2", 8, 2),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8, 1),  # 4 chips, two devices each
        ("tpu7x-16", "tpu7x:2x2x2", 16, 1),
        ("gpu-h100x8", "", 8, 1),
        ("gpu-h200", "", 1, 1),
    ],
)
def test_products_and_topologies(text, topology, devices, slices):
    target = parse(text)
    assert (target.topology, target.n, target.slices) == (topology, devices, slices)
    assert target.chip.flops > 1e14 and target.chip.hbm > 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "v9-8",
            "--target=v9-8 is unknown; known are here; a TPU slice by product or",
        ),
        ("", "--target= is unknown"),
        ("gpu-foo", "GPUs: gpu-a100xN, gpu-h100xN"),
        ("gpu-h100x0", "is unknown"),
        ("0xv5e-8", "is unknown"),
        ("v5e-10", "no product; there are v5e-1, v5e-4, v5e-8, .*topology: v5e:2x4"),
        ("v5p-9", "v5p-8192, counted in cores: two a chip"),
        ("v5p:2x2", "a slice of v5p has 3 dimensions, such as v5p:2x2x4"),
        ("v5e:0x4", "a slice of v5e has 2 dimensions"),
    ],
)
def test_what_no_target_is(text, says):
    with pytest.raises(TargetError, match=says):
        parse(text)


def test_here_is_what_is_here():
    target = targets.resolve("here")
    assert target.devices == tuple(jax.devices()) and target.n == 8
    assert target.chip is None and target.text() == "8 x cpu"


def test_present_devices_are_found_by_their_kind():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    found = {kind: targets._present(Device(kind)) for kind in ("TPU v5 lite", "TPU v5", "NVIDIA H100 80GB HBM3", "cpu")}
    expected = ("v5e", "v5p", "gpu-h100")
    assert list(found.values()) == [*(targets.CHIPS[name] for name in expected), None]


def test_without_libtpu_a_tpu_target_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(TargetError, match=r"needs libtpu to compile: pip install 'sftjax\[tpu\]'"):
        targets.resolve("v5e-4")


@pytest.mark.tpu
@pytest.mark.parametrize("text", ["v5e-1", "v5p-16", "2xv6e-8", "v4-8", "tpu7x:2x2x1"])
def test_devices_of_a_slice(text):
    target = targets.resolve(text)
    assert len(target.devices) == target.n
    assert {d.device_kind for d in target.devices} == {target.chip.kind}
    slices = {getattr(d, "slice_index", 0) for d in target.devices}
    assert len(slices) == target.slices


@pytest.mark.tpu
def test_a_slice_that_libtpu_does_not_know():
    with pytest.raises(TargetError, match="--target=v5e:3x5: there is no such slice: INVALID"):
        targets.resolve("v5e:3x5")
