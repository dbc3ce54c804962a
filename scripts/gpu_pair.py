"""The parts of gpu_check.py that run two models: exactness on CUDA, three modes timed,
transformers.

Knows: engines, placements of target and draft, which texts must be equal. Does not know: kernels,
single steps (gpu_parts.py), time limits, tables (gpu_check.py). Read next: gpu_check.py.
"""

import gc
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from statistics import median

import torch

import engine
import runtime
import steps
from cache import KVCache
from engine import Engine, Model
from figures import Figures
from runtime import Devices, Lane, Policy, available_cores
from sampling import Params, noisy, warp

NEAR_TIE = 1e-4  # float32: two best scores this close may change places between shapes
TEXTS = (
    "def fibonacci(n):\n    if n < 2:\n        return",
    "class Stack:\n    def __init__(self):\n",
    "for line in lines:\n    name, _, value = line.partition('=')\n",
)
KEPT = (  # of the stats of a run
    "acceptance_rate", "hit_rate", "tokens_per_round", "round_ms", "verify_ms", "draft_ms",
    "exposed_ms", "hidden", "distinct_4grams", "bandwidth_fraction",
)  # fmt: skip
# Llama-3.2-1B, and two made-up shapes that read about 0.9 and 0.18 GB a step in bfloat16, with the
# same vocabulary.
DRAFTS = {
    "1B": "inflate:llama-3.2-1b:",
    "0.1B": "inflate:hidden=512,layers=8,heads=8,kv_heads=2,ffn=1408,vocab=128256:",
    "0.5B": "inflate:hidden=1024,layers=20,heads=16,kv_heads=8,ffn=4096,vocab=128256:",
}
# Read by CPU cores in float32, 0.13 GB a step.
CPU_DRAFT = "inflate:hidden=256,vocab=128256:"


def ids_of(model: Model, longest: int = 48) -> list[list[int]]:
    """Prompts of unequal length; a checkpoint without a tokenizer takes any ids."""
    if model.tokenizer is not None:
        return [model.tokenizer.encode(text)[:longest] for text in TEXTS]
    return [[byte % model.config.vocab_size for byte in text.encode()][:longest] for text in TEXTS]


def own(model: Model) -> Model:
    """The same weights with buffers and graphs of their own: modes in turn do not capture anew at
    every change.
    """
    return replace(model, runners={}, policy=Policy(model.policy.device, model.policy.static))


def play(pair: Engine, prompts, **settings) -> tuple[dict, Figures]:
    decoding, said = pair.start(prompts, ignore_eos=True, **settings), []
    decoding.warn = lambda text: (said.append(text), pair.warn(text))
    for _ in decoding.rounds():
        pass
    stats = pair.finish(decoding).stats
    if decoding.lost:
        raise RuntimeError(f"mode {settings['mode']}: {said[-1]}")
    # Chains of the last round may still run: they would slow down what is timed next.
    if settings["mode"] == "ssd":
        decoding.draft_lane.start(lambda: None).result(60)
    return stats, decoding.figures


# ---- exactness


def gap(lane: Lane, model: Model, ids: list[int], row: int, temperature: float, seed: int) -> float:
    """How far the best two scores for the token after `ids` are apart, by one eager pass."""

    def work():
        device, n = lane.device, len(ids)
        cache = KVCache(model.config, 1, n, device=device, dtype=model.dtype)
        model.transformer.set_positions(n)
        at_B1, start_B = torch.tensor([[n]], device=device), torch.zeros(1, device=device).long()
        where = cache.locate(start_B, at_B1[0], n, n)
        with torch.compiler.set_stance("force_eager"):  # a length that nobody needs again
            logits = model.transformer(torch.tensor([ids], device=device), where, cache)[:, -1:]
        params = Params.make([temperature], [0], [1.0], [seed], [row], device)
        scores = noisy(warp(logits, params), params, at_B1, logits.shape[-1])
        best, second = scores.flatten().topk(2).values.tolist()
        return best - second

    return lane.start(work).result()


def parted(a: list[int], b: list[int]) -> int | None:
    """Where two texts begin to differ, None if they are equal."""
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return None if a == b else at


def exactness(check) -> None:
    """float32: SD and SSD write AR's text, eager and captured, with the draft on this GPU, the next
    one, the CPU.
    """
    # Eager steps compile their Triton kernels when they first run, and a draft's in a round.
    steps.PREFILL_CHUNKS, runtime.PATIENCE_S = (64,), 60.0
    cpu = "cpu:" + ",".join(map(str, available_cores()[: 1 if check.tiny else 8]))
    places = [check.spec]
    if check.on_gpu and check.device.index + 1 < torch.cuda.device_count():
        places.append(f"cuda:{check.device.index + 1}")
    places += [cpu] if check.on_gpu else []
    eager = Model.load(check.target, check.device, "float32", compile=False)
    prompts, new = ids_of(eager), 8 if check.tiny else 96
    options = {"seed": 5, "max_new_tokens": new}
    plain, truth = Engine(eager, None, Devices(check.spec)), {}
    for temperature in (0.0, 1.0):
        of = play(plain, prompts, mode="ar", temperature=temperature, **options)[0]
        truth[temperature] = of["token_ids"]
    lane = plain.devices.lanes("ar")[0]
    options |= {"k": 3, "fan_out": 8}
    for graphs, place in product((False, True) if check.on_gpu else (False,), places):
        if graphs and place == places[0]:  # the draft's place changes, the target stays
            target = Model.load(check.target, check.device, "float32", compile=True)
        devices, said, how = Devices(check.spec, place), [], "graphs" if graphs else "eager"
        draft = Model.load(check.draft, devices.draft, "float32", compile=graphs and place != cpu)
        both = Engine(target if graphs else eager, draft, devices, said.append)
        for temperature, mode in product((0.0, 1.0), ("ar", "sd", "ssd")[not graphs :]):
            stats, _ = play(both, prompts, mode=mode, temperature=temperature, **options)
            label = f"{mode} == AR, T={temperature:g}, draft on {place}, {how}"
            compare(check, lane, eager, prompts, truth[temperature], stats, temperature, label)
        # The other couplings promise the distribution, not the text: here, that log q crosses and
        # nothing breaks.
        for coupling in ("maximal", "independent")[: 2 - graphs]:
            more = options | {"mode": "ssd", "temperature": 1.0, "coupling": coupling}
            stats, _ = play(both, prompts, **more)
            whole = all(len(row) == new for row in stats["token_ids"])
            label = f"ssd, {coupling}, T=1, draft on {place}, {how}: whole texts"
            check.right(label, whole, acceptance=stats["acceptance_rate"])
        for text in said:
            check.say({"name": f"draft on {place}", "value": text, "unit": ""})
        del draft, both
        gc.collect()  # a compiled block holds itself


def compare(check, lane, model, prompts, want, got, temperature, label) -> None:
    """Equal texts, or a near-tie where they part, which is counted and told."""
    ties, wrong = [], []
    for row, (prompt, a, b) in enumerate(zip(prompts, want, got["token_ids"])):
        if (at := parted(a, b)) is not None:
            apart = gap(lane, model, prompt + a[:at], row, temperature, 5)
            (ties if apart < NEAR_TIE else wrong).append({"row": row, "token": at, "gap": apart})
    check.right(
        label, not wrong, near_ties=ties, differences=wrong, acceptance=got["acceptance_rate"]
    )


# ---- AR, SD and SSD, timed


def plans(check) -> list[tuple]:
    """(temperature, what the draft is called, the draft, where it runs, is the target's stream
    preferred), what is worth most first.
    """
    cores = available_cores()
    small = f"cpu:{cores[0]}-{cores[len(cores) // 2]}" if check.on_gpu else check.spec
    slow = ("CPU", ("" if check.tiny else CPU_DRAFT) + check.draft, small, True)
    grown = [(name, shape + check.draft, check.spec, True) for name, shape in DRAFTS.items()]
    if check.tiny:
        grown = [("the checkpoint as it is", check.draft, check.spec, True)]
    grown.insert(1, (f"{grown[0][0]}, no stream priority", *grown[0][1:3], False))
    last = [(temperature, *slow) for temperature in (0.0, 1.0)]
    return [(0.0, *plan) for plan in grown] + [(1.0, *plan) for plan in grown if plan[-1]] + last


def pairs(check) -> None:
    """The three modes on one GPU in two streams, drafts of three costs; without priority; with the
    draft on the CPU.
    """
    check.machine()
    few_shapes(check)
    target, drafts = check.load(check.target), {}
    for temperature, name, path, place, priority in plans(check):
        devices, said = Devices(check.spec, place), []
        if not priority:
            devices._lanes[check.spec, "target"] = Lane(check.spec, "target")
        if (path, place) not in drafts:
            drafts[path, place] = check.load(path, devices.draft)
        # Captured anew for every plan: kernels keep the priority of the stream that they were
        # captured on.
        both, draft = own(target), drafts[path, place]
        engines = {
            "ar": Engine(own(target), None, devices, said.append),
            "sd": Engine(both, own(draft), devices, said.append),
            "ssd": Engine(both, own(draft), devices, said.append),
        }
        judged = priority and check.spec == place
        three_modes(check, engines, f"draft {name}, T={temperature:g}", temperature, judged)
        for text in dict.fromkeys(said):
            check.say({"name": f"draft {name}", "value": text, "unit": ""})
        del both, engines
        gc.collect()  # the plan's graphs and their buffers


def few_shapes(check) -> None:
    """One shape less to compile for each model, and the trunk of the part `decode`, whose code is
    on disk.
    """
    steps.PREFILL_CHUNKS, engine.SHORTEST_TRUNK = (64,), 64 if check.tiny else 1024


def sizes(check) -> tuple[int, int, int]:
    """The context of steps, K and M."""
    return (20, 3, 4) if check.tiny else (512, 7, 24)


def sizes_of_runs(check) -> tuple[int, dict]:
    """How often each prompt is played, and the options of a run that is timed."""
    _, k, m = sizes(check)
    options = {"seed": 1, "k": k, "fan_out": m, "max_new_tokens": 12 if check.tiny else 128}
    return 1 if check.tiny else 3, options


def three_modes(check, engines: dict, label: str, temperature: float, judged: bool) -> None:
    """Runs in turn, on the same prompts; a ratio is the median of the runs' own ratios."""
    repeats, options = sizes_of_runs(check)
    prompts, options = ids_of(engines["ar"].target)[:2], options | {"temperature": temperature}
    for mode, pair in engines.items():
        play(pair, prompts[:1], mode=mode, **options | {"max_new_tokens": 8})
    runs = {mode: [] for mode in engines}
    for number, prompt in product(range(repeats), prompts):
        for mode in list(engines)[:: -1 if number % 2 else 1]:
            runs[mode].append(play(engines[mode], [prompt], mode=mode, **options))
    rates = {mode: [stats["tokens_per_s"] for stats, _ in of] for mode, of in runs.items()}
    for mode, of in runs.items():
        told = {key: [stats[key] for stats, _ in of if stats[key] is not None] for key in KEPT}
        middle = {key: median(values) if values else None for key, values in told.items()}
        name = f"{label}: {mode.upper()}"
        check.result(name, median(rates[mode]), "tokens/s", runs=rates[mode], **middle)
        if mode != "sd" and (round_ms := middle["round_ms"]):  # SD drafts there; SSD's are of hits
            share = (middle["exposed_ms"] or round_ms - middle["verify_ms"]) / round_ms
            goal = "between" if judged else ""
            check.result(f"{name}, between two verifications, of a round", share, goal=goal)
        if middle["hit_rate"] is not None:
            goal = "hits" if judged and temperature else ""
            check.result(f"{name}, hits", middle["hit_rate"], goal=goal)
    for of, to in (("ssd", "sd"), ("ssd", "ar"), ("sd", "ar")):
        # Runs of a mode are in the order of the prompts.
        ratios = [a / b for a, b in zip(rates[of], rates[to])]
        ends = {"low": min(ratios), "high": max(ratios)}
        goal = "ssd" if judged and (of, to) == ("ssd", "sd") else ""
        check.result(f"{label}: {of.upper()} / {to.upper()}", median(ratios), goal=goal, **ends)
    tell_texts(check, engines["ar"], label, prompts * repeats, runs, temperature)


def tell_texts(check, pair: Engine, label: str, prompts, runs: dict, temperature: float) -> None:
    """How many runs wrote three equal texts, and for the others the token where they part and the
    gap of the best two scores there: the rounding of bfloat16 may decide below 2 units.
    """
    texts = {mode: [stats["token_ids"][0] for stats, _ in of] for mode, of in runs.items()}
    same = sum(a == b == c for a, b, c in zip(*texts.values()))
    told = {"name": f"{label}: runs with three equal texts", "unit": ""}
    check.say(told | {"value": f"{same} of {len(prompts)}"})
    places = {}  # the runs of a prompt may part in one place
    for mode in ("sd", "ssd"):
        for prompt, want, got in zip(prompts, texts["ar"], texts[mode]):
            if (at := parted(want, got)) is not None:
                places[mode, at, len(prompt)] = prompt + want[:at]
    for (mode, at, _), ids in places.items():
        apart = gap(pair.devices.lanes("ar")[0], pair.target, ids, 0, temperature, 1)
        name = f"{label}: {mode.upper()} parts from AR at token {at}, gap of the best two"
        check.result(name, apart, token=at)


def tuner(check) -> None:
    """K and M as the engine chooses them, against those that are fixed elsewhere here."""
    few_shapes(check)
    target, draft = check.load(check.target), check.load(check.draft)
    repeats, options = sizes_of_runs(check)
    auto, rates = {"k": "auto", "fan_out": "auto", "mode": "ssd"}, []
    for name, more in (("auto", auto), ("fixed", {"mode": "ssd"})):
        pair = Engine(own(target), own(draft), Devices(check.spec), lambda text: None)
        prompts = ids_of(target)[:2] * repeats
        play(pair, prompts[:1], **options | more)  # compiles
        runs = [play(pair, [prompt], **options | more) for prompt in prompts]
        rates.append([stats["tokens_per_s"] for stats, _ in runs])
        sizes = Counter(f"K={r.plan.k} M={r.plan.m}" for _, of in runs for r in of.rounds)
        check.result(f"SSD, {name}", median(rates[-1]), "tokens/s", rounds=dict(sizes))
        del pair
        gc.collect()
    ratios = [a / b for a, b in zip(*rates)]
    check.result("SSD, auto / fixed", median(ratios), low=min(ratios), high=max(ratios))


# ---- what one would use instead


def transformers_static(check) -> None:
    """Plain decoding by transformers with a static cache at the same shape, compiled by
    transformers itself.
    """
    try:
        import transformers
    except ImportError:
        check.say({"name": "transformers", "value": "not installed: not measured", "unit": ""})
        return
    check.machine()
    sizes = (64, 96, 2, 4, 2, 128) if check.tiny else (4096, 14336, 32, 32, 8, 128256)
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads vocab_size"
    ).split()
    config = transformers.LlamaConfig(**dict(zip(names, sizes)), tie_word_embeddings=False)
    with torch.device(check.device):
        dtype = torch.bfloat16 if check.on_gpu else torch.float32
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    few, many, prompt = (2, 6, 8) if check.tiny else (16, 80, 448)
    ids = torch.randint(1, sizes[-1], (1, prompt), device=check.device)

    def seconds(new: int) -> float:
        begin = time.perf_counter()
        more = {"cache_implementation": "static", "attention_mask": torch.ones_like(ids)}
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **more)
        if check.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    check.result("transformers: first run (compiles)", seconds(many), "s")
    seconds(few)
    steps_s = [(seconds(many) - seconds(few)) / (many - few) for _ in range(2 if check.tiny else 5)]
    step = check.spread(
        "transformers, static cache, compiled: plain decode step, wall", steps_s, "ms"
    )
    read = sum(w.nbytes for name, w in model.named_parameters() if "embed_tokens" not in name)
    check.result(
        "transformers, static cache, compiled: of copy bandwidth", read / step / check.copy
    )
