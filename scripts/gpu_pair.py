"""The parts of gpu_check.py that run two models: exactness on CUDA, three modes timed,
transformers.

Knows: engines, placements of target and draft, which texts must be equal. Does not know: kernels,
single steps (gpu_parts.py), time limits, tables (gpu_check.py). Read next: gpu_check.py.
"""

import time
from dataclasses import replace
from itertools import product
from statistics import median

import torch

import engine
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
# Llama-3.2-1B, and two made-up shapes that read about 0.9 and 0.18 GB a step in bfloat16, with the
# same vocabulary.
DRAFTS = {
    "1B": "inflate:llama-3.2-1b:",
    "0.1B": "inflate:hidden=512,layers=8,heads=8,kv_heads=2,ffn=1408,vocab=128256:",
    "0.5B": "inflate:hidden=1024,layers=20,heads=16,kv_heads=8,ffn=4096,vocab=128256:",
}


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
    decoding = pair.start(prompts, ignore_eos=True, **settings)
    for _ in decoding.rounds():
        pass
    stats = pair.finish(decoding).stats
    if decoding.lost:
        raise RuntimeError(f"the draft was lost in mode {settings['mode']}")
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
        place = cache.place(
            torch.tensor([0], device=device), torch.tensor([n], device=device), n, n
        )
        logits = model.transformer(torch.tensor([ids], device=device), place, cache)[:, -1:]
        params = Params.make([temperature], [0], [1.0], [seed], [row], device)
        best = (
            noisy(
                warp(logits, params), params, torch.tensor([[n]], device=device), logits.shape[-1]
            )
            .topk(2)
            .values.flatten()
        )
        return (best[0] - best[1]).item()

    return lane.start(work).result()


def exactness(check) -> None:
    """float32: SD and SSD write AR's text, eager and captured, with the draft on this GPU, the next
    one, the CPU.
    """
    steps.PREFILL_CHUNKS = (64,)
    cpu = "cpu:" + ",".join(map(str, available_cores()[: 1 if check.tiny else 8]))
    places = [check.spec]
    if check.on_gpu and check.device.index + 1 < torch.cuda.device_count():
        places.append(f"cuda:{check.device.index + 1}")
    places += [cpu] if check.on_gpu else []
    eager = Model.load(check.target, check.device, "float32", compile=False)
    prompts, new = ids_of(eager), 8 if check.tiny else 96
    plain, truth = Engine(eager, None, Devices(check.spec)), {}
    for temperature in (0.0, 1.0):
        truth[temperature] = play(
            plain, prompts, mode="ar", temperature=temperature, seed=5, max_new_tokens=new
        )[0]
    lane = plain.devices.lanes("ar")[0]
    for graphs in (False, True) if check.on_gpu else (False,):
        target = (
            Model.load(check.target, check.device, "float32", compile=True) if graphs else eager
        )
        steps_are = "graphs" if graphs else "eager"
        for place in places:
            devices, said = Devices(check.spec, place), []
            draft = Model.load(
                check.draft, devices.draft, "float32", compile=graphs and place != cpu
            )
            both = Engine(target, draft, devices, said.append)
            for temperature, mode in product(
                (0.0, 1.0), ("ar", "sd", "ssd") if graphs else ("sd", "ssd")
            ):
                options = {
                    "temperature": temperature,
                    "seed": 5,
                    "max_new_tokens": new,
                    "k": 3,
                    "fan_out": 8,
                }
                stats, _ = play(both, prompts, mode=mode, **options)
                label = f"{mode} == AR, T={temperature:g}, draft on {place}, {steps_are}"
                compare(check, lane, eager, prompts, truth[temperature], stats, temperature, label)
            # The other couplings promise the distribution, not the text: here, that log q crosses
            # and nothing breaks.
            for coupling in ("maximal", "independent") if not graphs else ("maximal",):
                stats, _ = play(both, prompts, mode="ssd", coupling=coupling, **options)
                whole = all(len(row) == new for row in stats["token_ids"])
                label = f"ssd, {coupling}, T=1, draft on {place}, {steps_are}: whole texts"
                check.right(label, whole, acceptance=stats["acceptance_rate"])
            for text in said:
                check.say({"name": f"draft on {place}", "value": text, "unit": ""})


def compare(check, lane, model, prompts, want, got, temperature, label) -> None:
    """Equal texts, or a near-tie where they part, which is counted and told."""
    ties, wrong = [], []
    for row, (prompt, a, b) in enumerate(zip(prompts, want["token_ids"], got["token_ids"])):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            apart = gap(lane, model, prompt + a[:at], row, temperature, 5)
            (ties if apart < NEAR_TIE else wrong).append({"row": row, "token": at, "gap": apart})
    check.right(
        label, not wrong, near_ties=ties, differences=wrong, acceptance=got["acceptance_rate"]
    )


# ---- AR, SD and SSD, timed


def plans(check) -> list[tuple]:
    """(what it is called, the draft, where it runs, is the target's stream preferred)."""
    cores = available_cores()
    small = f"cpu:{cores[0]}-{cores[len(cores) // 2]}" if check.on_gpu else check.spec
    small = ("CPU, the checkpoint as it is", check.draft, small, True)
    if check.tiny:
        whole = ("the checkpoint as it is", check.draft, check.spec)
        return [(*whole, True), ("no stream priority", *whole[1:], False), small]
    grown = [(name, shape + check.draft, check.spec, True) for name, shape in DRAFTS.items()]
    return [grown[0], ("1B, no stream priority", *grown[0][1:3], False), *grown[1:], small]


def pairs(check) -> None:
    """The three modes on one GPU in two streams, drafts of three costs; without priority; with the
    draft on the CPU.
    """
    check.machine()
    # One shape less to compile for each model, and the trunk of the part `decode`, whose code is on
    # disk.
    steps.PREFILL_CHUNKS, engine.SHORTEST_TRUNK = (64,), 64 if check.tiny else 1024
    dtype = "bfloat16" if check.on_gpu else "float32"
    target, last = Model.load(check.target, check.device, dtype), None
    for name, path, place, priority in plans(check):
        devices, said = Devices(check.spec, place), []
        if not priority:
            devices._lanes[check.spec, "target"] = Lane(check.spec, "target")
        if (path, place) != last:
            draft = None  # at most one beside the target
            draft = Model.load(
                path, devices.draft, dtype if devices.draft.type == "cuda" else "float32"
            )
            last = path, place
        # Captured anew for every plan: kernels keep the priority of the stream that they were
        # captured on.
        both = own(target)
        engines = {
            "ar": Engine(own(target), None, devices, said.append),
            "sd": Engine(both, own(draft), devices, said.append),
            "ssd": Engine(both, own(draft), devices, said.append),
        }
        for temperature in (0.0, 1.0) if priority else (0.0,):
            three_modes(check, engines, f"draft {name}, T={temperature:g}", temperature)
        for text in said:
            check.say({"name": f"draft {name}", "value": text, "unit": ""})


def three_modes(check, engines: dict, label: str, temperature: float) -> None:
    """Runs in turn, on the same prompts; a ratio is the median of the runs' own ratios."""
    k, M = (2, 4) if check.tiny else (7, 24)
    prompts, new, repeats = (
        ids_of(engines["ar"].target)[:2],
        12 if check.tiny else 128,
        1 if check.tiny else 3,
    )
    options = {"temperature": temperature, "seed": 1, "k": k, "fan_out": M}
    for mode, pair in engines.items():
        play(pair, prompts[:1], mode=mode, max_new_tokens=8, **options)
    runs = {mode: [] for mode in engines}
    for number in range(repeats):
        order = list(engines)[:: -1 if number % 2 else 1]
        for prompt, mode in product(prompts, order):
            runs[mode].append(
                play(engines[mode], [prompt], mode=mode, max_new_tokens=new, **options)
            )
    rates = {mode: [stats["tokens_per_s"] for stats, _ in of] for mode, of in runs.items()}
    for mode, of in runs.items():
        middle = {}
        for key in ("acceptance_rate", "hit_rate", "tokens_per_round", "round_ms", "verify_ms",
        "draft_ms",
                    "exposed_ms", "hidden", "distinct_4grams", "bandwidth_fraction"):  # fmt: skip
            values = [stats[key] for stats, _ in of if stats[key] is not None]
            middle[key] = median(values) if values else None
        check.result(
            f"{label}: {mode.upper()}", median(rates[mode]), "tokens/s", runs=rates[mode], **middle
        )
        if (share := between(of, mode)) is not None:
            check.result(
                f"{label}: {mode.upper()}, between two verifications, of a round", share, most=0.02
            )
    for of, to in (("ssd", "sd"), ("ssd", "ar"), ("sd", "ar")):
        # Runs of a mode are in the order of the prompts.
        ratios = [a / b for a, b in zip(rates[of], rates[to])]
        ends = {"low": min(ratios), "high": max(ratios), "n": len(ratios)}
        check.result(f"{label}: {of.upper()} / {to.upper()}", median(ratios), **ends)
    texts = [[stats["token_ids"] for stats, _ in of] for of in runs.values()]
    same = sum(a == b == c for a, b, c in zip(*texts))
    check.say(
        {
            "name": f"{label}: runs with three equal texts",
            "value": f"{same} of {len(texts[0])}",
            "unit": "",
        }
    )


def between(runs: list[tuple], mode: str) -> float | None:
    """The share of a round that is not verification: on hits for SSD, always for AR, undefined for
    SD, which drafts.
    """
    shares = []
    for _, figures in runs:
        for this, after in zip(figures.rounds[1:], figures.rounds[2:]):
            if mode == "ar" or (mode == "ssd" and this.look_up and not this.missed):
                shares.append((after.begin - this.end) / (after.begin - this.begin))
    return median(shares) if shares else None


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
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    config = transformers.LlamaConfig(
        **dict(zip((*names, "vocab_size"), sizes)), tie_word_embeddings=False
    )
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
