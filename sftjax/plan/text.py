"""A plan as text: what is held, what is done, what is projected, and what may be done instead."""

from collections.abc import Sequence

from sftjax import parallel
from sftjax.plan.compile import GIB, Plan


def amount(size: float) -> str:
    """Bytes for people, in a column."""
    return f"{size / GIB:>9.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:>9.2f} MiB"


def report(p: Plan) -> str:
    """The whole report of one Plan."""
    sizes = parallel.mesh_text(p.mesh) or "of one device"
    lines = [
        ("target", p.target),
        ("mesh", f"{sizes}; {p.micro_batches} micro-batches, remat {p.remat}"),
        ("work", p.work),
        ("basis", f"{p.basis}, in {p.seconds:.0f} s"),
        ("memory", _memory(p)),
        ("FLOPs", _flops(p)),
        ("sent", _collectives(p)),
    ]
    if p.cost.kernels:
        lines.append(("kernels", _kernels(p)))
    loops = [x for x in p.cost.loops if not x.known]
    if loops:
        lines.append(("assumed", "\n".join(f"{x.trips} rounds of {x.name}" for x in loops)))
    lines.append(("projected", _time(p)))
    return "\n".join(f"{name:<10}" + text.replace("\n", "\n" + " " * 10) for name, text in lines)


def _memory(p) -> str:
    rows = [f"{name:<16}{amount(size)}" for name, size in p.memory.items()]
    rows.append(f"{'needed':<16}{amount(p.total)} a device")
    left = amount(abs(p.limit - p.total)).strip()
    said = f"{left} remain" if p.total <= p.limit else f"it does NOT fit, {left} over"
    rows.append(f"{'of':<16}{amount(p.limit)}; {said}")
    if not p.fits:
        rows.append(f"largest: {amount(p.largest[0][0]).strip()}, {p.largest[0][1]}")
        rows += [f"{'':9}{amount(size).strip()}, {what}" for size, what in p.largest[1:5]]
    return "\n".join(rows)


def _flops(p) -> str:
    share = p.model_flops / p.hardware_flops if p.hardware_flops else 0.0
    return (
        f"{p.model_flops / 1e12:.4g} TFLOP of the model a step, {p.hardware_flops / 1e12:.4g} done"
        f" with what is computed again ({share:.0%} of them the model's)"
    )


def _collectives(p) -> str:
    rows = [
        f"{kind:<19}x{group:<5}{c.count:>7,} times {c.bytes / 1e9:>9.3f} GB,"
        f" {c.async_bytes / c.bytes if c.bytes else 0:.0%} asynchronous"
        for (kind, group), c in sorted(p.cost.collectives.items(), key=lambda x: -x[1].bytes)
    ]
    return "\n".join(rows) or "nothing: one device"


def _kernels(p) -> str:
    rows = []
    for name, k in sorted(p.cost.kernels.items()):
        cost = f"{k.flops / 1e12:.4g} TFLOP a device as declared"
        none = "no cost declared: attention's FLOPs by shapes are projected"
        rows.append(f"{name}: {k.count:,} times, {cost if k.flops else none}")
    return "\n".join(rows)


def _time(p) -> str:
    if p.time is None:
        return "nothing: no figures of this chip are known"
    t = p.time
    return (
        f"{t['step']:.3f} s a step, MFU {t['mfu']:.1%}; {t['tokens_per_s']:,.0f} tokens/s, of them"
        f" {t['trained_tokens_per_s']:,.0f} trained\n{t['work']:.3f} s of work, {t['collectives']:.3f} s of"
        f" collectives, of which {t['hidden']:.3f} s behind work\n"
        "A projection, no measurement: work from the compiler's cycles over the clock, or FLOPs at 60% of\n"
        "peak where it counts none; collectives from bytes over links, without contention or latency.\n"
        "Copies to the host (remat=offload) are not counted."
    )


def table(plans: Sequence[Plan]) -> str:
    """A search's plans, best first, and the lines of the best that fits."""
    lines = [f"{'mesh':<28}{'micro':>6}{'remat':>14}{'GiB':>9}{'s/step':>9}{'MFU':>7}  basis"]
    for p in plans:
        sizes = parallel.mesh_text(p.mesh, " ") or "one device"
        t = p.time
        step, mfu = (f"{t['step']:.3f}", f"{t['mfu']:.1%}") if t else ("-", "-")
        fits = p.basis if p.fits else f"{p.basis}; does not fit"
        lines.append(f"{sizes:<28}{p.micro_batches:>6}{p.remat:>14}{p.total / GIB:>9.2f}{step:>9}{mfu:>7}  {fits}")
    if best := next((p for p in plans if p.fits), None):
        lines += ["", "To paste into the config:", *config_lines(best)]
    else:
        lines.append("Nothing that was tried fits: more devices, or a shorter row.")
    return "\n".join(lines)


def config_lines(p: Plan) -> list:
    """The lines of a config file that set a plan's mesh, micro-batches and remat."""
    sizes = ", ".join(f"{axis}={n}" for axis, n in p.mesh.items())
    return [
        f"    c.mesh.update(dict({sizes}))",
        f"    c.train.micro_batches = {p.micro_batches}",
        f'    c.model.remat = "{p.remat}"',
    ]
