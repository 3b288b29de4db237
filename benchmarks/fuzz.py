"""Mutations of valid inputs: each is read, or refused by a clear error, and nothing else happens.

    python benchmarks/fuzz.py [--cases=20000] [--seed=0] [--only=KIND [--case=N]] [--out=fuzz.json]

records      files of all kinds and forms of record, by index and as a stream, to conversations
spans        conversations through chat templates: each trained message's own words are trained,
             no other's are, and what the rendering lacks is said
safetensors  headers, offsets, shapes, dtypes, cut files, indices; what is accepted is what was
             written, and the format's own library accepts it too
models       config.json of a model, up to the shapes of all its parameters
config       config files and overrides, up to sources, durations and the mesh
manifests    a workdir to resume: config.json, env.json, metrics.jsonl, checkpoints/manifest.json

A case fails if it raises anything but a UserError, if the message has 2,000 characters or more, if
it takes too long or too much memory, or if what was read is wrong. Each is known by its kind, the
seed and its number, which run it alone. Fixtures' tokenizers take part where $SFTJAX_FIXTURES
(default ../shared/fixtures beside the repository) has them.
"""

import argparse
import collections
import contextlib
import faulthandler
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fuzz_cases

from sftjax.errors import UserError
from sftjax.training import workdir

SECONDS = 20  # for one case
GROWTH = 512 << 20  # bytes that a case may add to the most memory there ever was
ROOM = 6 << 30  # bytes of addresses that the whole run may add


class TooLong(BaseException):
    """No code that is tried catches it as an error of its own."""


@contextlib.contextmanager
def alarm():
    """TooLong after SECONDS; a library that does not come back to Python ends the whole run."""

    def ring(*_):
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def limited():
    """A limit on the addresses that this process takes beyond those that it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(kind, seed, case):
    """(outcome, what went wrong): "ok", the class of a clear error, or "failed" and the reason."""
    rng, before = random.Random(f"{kind} {seed} {case}"), peak()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    outcome, wrong = "ok", ""
    try:
        with alarm():
            fuzz_cases.KINDS[kind](rng, folder)
    except UserError as error:
        outcome = type(error).__name__
        if len(str(error)) >= fuzz_cases.MESSAGE:
            wrong = f"a message of {len(str(error)):,} characters: {str(error)[:300]}"
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        wrong = traceback.format_exc()[-2500:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if peak() > before + GROWTH:
        wrong = wrong or f"{(peak() - before) >> 20} MiB more memory"
    return ("failed" if wrong else outcome), wrong


def run(kinds, numbers, seed):
    """({kind: {outcome: cases}}, [failures]) of these cases of each kind."""
    counts, failures = {kind: collections.Counter() for kind in kinds}, []
    if "spans" in kinds:
        fuzz_cases.tokenizers()
    with limited():
        for kind in kinds:
            for case in numbers:
                outcome, wrong = one(kind, seed, case)
                counts[kind][outcome] += 1
                if wrong:
                    failures.append(dict(kind=kind, seed=seed, case=case, wrong=wrong))
                    print(f"--only={kind} --seed={seed} --case={case}\n{wrong}", file=sys.stderr)
    return {kind: dict(sorted(found.items())) for kind, found in counts.items()}, failures


def main():
    logging.getLogger("sftjax").setLevel(logging.ERROR)  # what is left out is said of each case
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(fuzz_cases.KINDS), help="one kind")
    parser.add_argument("--case", type=int, help="with --only: this one alone")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    kinds, began = [args.only] if args.only else list(fuzz_cases.KINDS), time.process_time()
    each = -(-args.cases // len(kinds))
    numbers = range(each) if args.case is None else [args.case]
    counts, failures = run(kinds, numbers, args.seed)
    for kind, found in counts.items():
        print(f"{kind:<12}{'  '.join(f'{n} {what}' for what, n in found.items())}")
    print(f"{len(failures)} failures, {time.process_time() - began:.0f} s of one core")
    if args.out:
        value = dict(seed=args.seed, cases=each * len(kinds), counts=counts, failures=failures)
        value |= dict(seconds=time.process_time() - began, environment=workdir.environment())
        Path(args.out).write_text(json.dumps(value, indent=2) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
