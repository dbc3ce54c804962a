"""The parts of gpu_check.py that time and profile single steps: plain decoding, verification, the
draft's steps, alone and beside each other.

Knows: how each step is called, its graph, what a profiler's trace says of it. Does not know:
kernels by themselves (gpu_parts.py), runs (gpu_pair.py). Read next: gpu_pair.py.
"""

import gc
import gzip
import json
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from gpu_pair import few_shapes, ids_of, play, sizes
from torch.profiler import ProfilerActivity, profile

from engine import Engine, Model
from runtime import Devices, Lane
from sampling import Params
from steps import Feed, Runner

# Categories of a trace's events that are work on the device; on a CPU its operators stand for them.
WORK = {True: ("kernel", "gpu_memcpy", "gpu_memset"), False: ("cpu_op",)}
REPLAYS, SHOWN = 20, 40  # of a step that is profiled; kernels that are kept, the dearest first
TRACE, MOST_BYTES = "ssd-round.json.gz", 16 << 20


def calls(check, runner: Runner) -> dict[str, tuple]:
    """Two steps of a target or a draft by name: a call, and the step's name and width in step_of.

    A call waits for its result. Each row of the batch has the same context.
    """
    (at, k, m), B = sizes(check), runner.batch

    def feed(T: int) -> Feed:
        return Feed([[1] * T for _ in range(B)], [at] * B, [T] * B)

    if runner.role == "target":
        verify = [lambda T=T: runner.verify(feed(T), [0] * B, [None] * B) for T in (1, k + 1)]
        plain = {"decode step": (verify[0], "_verify", 1)}
        return plain | {f"verification of {k + 1}": (verify[1], "_verify", k + 1)}
    branches, depths = [list(range(1, m + 1))] * B, [[i % (k + 1) for i in range(m)]] * B
    chain = lambda: list(runner.chain_step(feed(k + 1), branches, depths, 2, 0)[0])  # noqa: E731
    single = (lambda: list(runner.decode(feed(1), 0)[0])), "_decode", 1  # lists wait for tokens
    return {"single-row step": single, f"chain step M={m}": (chain, "_chain_step", m)}


def replay_of(runner: Runner, step: str, width: int):
    """The replay of a captured step by itself, or None where nothing is captured."""
    for (name, layout, _, *rest), graph in reversed(runner.step_of.items()):
        # Tokens are numbers of the step, or a tensor of their own.
        if (name, dict(layout).get("tokens") or rest[0][1]) == (step, width):
            return graph.graph.replay
    return None


# ---- the time of a step


def time_steps(check, model: Model, role: str, batch=1, temperature=0.0, goals=("", "")):
    """Seconds of both steps of `calls`, by the host's clock.

    goals: what their shares of the copy bandwidth are held against.
    """
    _, k, m = sizes(check)
    trunk, m = 64 if check.tiny else 1024, m if role == "draft" else 0
    runner = model.runner(role, batch, trunk, k, m, model.config.vocab_size)
    model.policy.enter_thread()
    rows = [temperature], [0], [1.0], [0]
    params = Params.make(*(values * batch for values in rows), list(range(batch)), check.device)
    runner.set_rows(params, "shared", 1.0)
    found, label = [], f"{role}, {model.bits}, batch {batch}, T={temperature:g}"
    for (name, (call, step, width)), goal in zip(calls(check, runner).items(), goals):
        check.result(f"{label}: first {name} (compiles)", *check.wall(call, 1), "s")
        call()
        wall = check.spread(f"{label}: {name}, wall", check.wall(call), "ms")
        share = model.step_bytes / check.copy
        check.result(f"{label}: {name}: of copy bandwidth", share / wall, goal=goal)
        if replay := replay_of(runner, step, width):
            alone = check.spread(f"{label}: {name}, graph alone", check.timed(replay), "ms")
            check.result(f"{label}: {name}, graph alone: of copy bandwidth", share / alone)
        found.append(wall)
    return found


def decode(check) -> None:
    """The target's plain step and its verification; the draft's single row and its branches."""
    check.machine()
    target = check.load(check.target)
    plain, verify = time_steps(check, target, "target", goals=("decode", ""))
    check.result("verification / decode step", verify / plain, goal="verify")
    del target
    gc.collect()  # a compiled block holds itself
    draft = check.load(check.draft)
    for temperature in (0.0, 1.0):
        told = time_steps(check, draft, "draft", 1, temperature, ("single", "chain"))
        name = f"chain step / single-row step, T={temperature:g}"
        check.result(name, told[1] / told[0], goal="branches")


def wide(check) -> None:
    """Steps of several rows, and the target with few bits."""
    check.machine()
    draft = check.load(check.draft)
    for batch in (4, 16):
        time_steps(check, draft, "draft", batch, 1.0)
    del draft
    for bits, batches in ((None, (4, 16)), ("int8", (1,)), ("int4", (1,))):
        gc.collect()
        target = check.load(check.target, quantize=bits)
        for batch in batches:
            told, name = time_steps(check, target, "target", batch), f"{target.bits}, batch {batch}"
            check.result(f"target, {name}: verification / decode step", told[1] / told[0])
        del target


# ---- what a profiler sees


def kernels_of(trace: dict, on_gpu: bool) -> list[tuple[str, float, float]]:
    """(name, begin, end) in microseconds of all work on the device, in the order of begin."""
    events = [e for e in trace["traceEvents"] if e.get("cat") in WORK[on_gpu] and "dur" in e]
    found = [(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events]
    return sorted(found, key=lambda kernel: kernel[1:])


def busy_of(kernels: list[tuple[str, float, float]], repeats: int) -> dict:
    """The time of one of `repeats` equal works: busy, gaps (nothing runs), both in microseconds,
    and [name, count, microseconds, share of the busy time] of each kernel.

    Where streams overlap shares add up to more than 1.
    """
    of, busy, end = defaultdict(list), 0.0, kernels[0][1]
    for name, begin, over in kernels:
        of[name].append(over - begin)
        busy += max(0.0, over - max(begin, end))
        end = max(end, over)
    gaps = end - kernels[0][1] - busy
    rows = sorted(of.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    table = [[name[:100], len(t) / repeats, sum(t) / repeats, sum(t) / busy] for name, t in rows]
    return {"busy_us": busy / repeats, "gaps_us": gaps / repeats, "kernels": table}


def profiled(check, name: str, work, path: Path, repeats: int = 1, host: bool = False) -> None:
    """Tell what `work`, which plays something `repeats` times, does on the device. The trace is
    written to `path`, with the host's operators if `host`.
    """
    device = [ProfilerActivity.CUDA] if check.on_gpu else []
    with profile(activities=device + [ProfilerActivity.CPU] * (host or not device)) as seen:
        work()
        if check.on_gpu:
            torch.cuda.synchronize()
    seen.export_chrome_trace(str(path))
    with gzip.open(path, "rt") as file:
        kernels = kernels_of(json.load(file), check.on_gpu)
    if not kernels:
        check.say({"name": name, "value": "the profiler saw no work on the device", "unit": ""})
        return
    told = busy_of(kernels, repeats)
    check.result(name, told["busy_us"] + told["gaps_us"], "us", **told)


def beside(check, name: str, lane: Lane, call, other: Lane, busy) -> None:
    """How much longer a step takes while the other model's runs again and again."""
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            busy()

    alone = median(lane.start(check.wall, call).result())
    work = other.start(keep_busy)
    both = median(lane.start(check.wall, call).result())
    stop.set()
    work.result()
    check.result(f"{name}: beside the other model / alone", both / alone)


def profile_part(check) -> None:
    """The kernels of each step and of an SSD round, and how target and draft slow each other."""
    few_shapes(check)
    _, k, m = sizes(check)
    models = check.load(check.target), check.load(check.draft)
    pair, prompts = Engine(*models, Devices(check.spec)), ids_of(models[0])[:1]
    options = {"mode": "ssd", "k": k, "fan_out": m, "max_new_tokens": 24 if check.tiny else 64}
    play(pair, prompts, **options)
    decoding = pair.start(prompts, ignore_eos=True, **options)
    rounds = decoding.rounds()
    for _ in range(4):
        next(rounds)
    both = (decoding.target, decoding.target_lane), (decoding.draft, decoding.draft_lane)
    with tempfile.TemporaryDirectory() as folder:
        kept, thrown = Path(check.folder) / TRACE, Path(folder) / TRACE
        # To the next verification and to the one after it: a whole round lies between.
        one_round = lambda: (next(rounds), next(rounds))  # noqa: E731
        profiled(check, "profile: an SSD round and the end of another", one_round, kept, host=True)
        size = kept.stat().st_size
        check.right(f"{TRACE}, {size / 1e6:.2f} MB, is under 16 MiB", size < MOST_BYTES)
        for _ in rounds:
            pass
        pair.finish(decoding)
        asked = [calls(check, runner) for runner, _ in both]
        for (runner, lane), named in zip(both, asked):
            for name, (call, *step) in named.items():
                once = replay_of(runner, *step) or call
                again = lambda once=once: [once() for _ in range(REPLAYS)]  # noqa: E731
                told = f"profile: {runner.role}: {name}"
                lane.start(profiled, check, told, again, thrown, REPLAYS).result()
    sides = [(lane, *list(named.items())[1]) for (_, lane), named in zip(both, asked)]
    for (lane, name, (call, *_)), (other, _, (busy, *_)) in (sides, sides[::-1]):
        beside(check, name, lane, call, other, busy)
