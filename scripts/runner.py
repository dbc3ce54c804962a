"""How ways to decode are measured: each in a process of its own, in turn, on the same prompts.

Knows: processes and cores, pairing, medians and intervals, how each engine is called. Does not
know: what is compared with what (bench.py), how it is shown (render.py). Read next: bench.py.

Our engine is used as anybody would use it: ssd.load, engine.generate, result.stats. Affinity,
thread counts and OpenMP's teams belong to a process, so no two engines share one. A process waits
asleep on its pipe while another is timed. Nothing may import torch before a process has its cores.
How fast a process reads its weights is settled when it starts, by where they lie: so processes
start anew after a few repeats, or an interval would be of one process's luck. They read the code
that is there then: leave it alone.
"""

import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import comb
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
OURS = ("ar", "sd", "ssd")
PLACES = {"one": "one core", "both": "both cores", "apart": "a core for each model"}
SAME = 0.98  # of the fastest in a sweep: as good as it. The first such setting is taken
WARM = 8  # tokens of the run before the first that counts
ANEW = 3  # repeats until all processes start anew: see above
UNWRITTEN = ("ids", "target", "draft")
KEPT = (  # of our engine's stats
    "k", "fan_out", "cut", "rounds", "tokens_per_round", "acceptance_rate", "accepted_fraction",
    "hit_rate", "distinct_4grams", "round_ms", "verify_ms", "draft_ms", "exposed_ms", "hidden",
    "speedup_ceiling", "bandwidth_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to decode. mode is one of OURS or a peer's. Of `sweep` the fastest takes part."""

    name: str
    mode: str
    place: str = "one"
    settings: dict = field(default_factory=dict)
    sweep: tuple[dict, ...] = ()
    beside: bool = False  # by the other checkout that --beside names

    @property
    def ours(self) -> bool:
        return self.mode in OURS


# ---- numbers


def interval(values: list[float]) -> dict:
    """Median, and the narrowest pair of order statistics around it that holds the true one in 95%.

    With fewer than six values no pair does: then they are the lowest and the highest.
    """
    x, n = sorted(values), len(values)
    skip, tail = 0, 0.5**n  # tail: P(Binomial(n, 1/2) <= skip)
    while 2 * (tail + comb(n, skip + 1) * 0.5**n) <= 0.05:
        skip += 1
        tail += comb(n, skip) * 0.5**n
    return {"median": median(x), "low": x[skip], "high": x[n - 1 - skip], "n": n}


def ratio(of: list[dict], to: list[dict]) -> dict:
    """How much faster one way was than another, repeat by repeat."""
    pairs = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(of, to, strict=True)]
    return {**interval(pairs), "pairs": pairs}


def rounded(value):
    """The same data with five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def distinct_4grams(ids: list[int]) -> float | None:
    """Share of distinct 4-grams: repetitive text flatters every speculative figure."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return len(set(grams)) / len(grams) if grams else None


def check_out(file: str | None) -> None:
    """ValueError if keep() could not write there: before hours of work, not after."""
    if file is None:
        return
    path = Path(file)
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{file} cannot be written, its folder is missing: create it first")
    if path.is_dir():
        raise ValueError(f"{file} is a folder, wanted a file: name one in it")
    try:
        good = not path.exists() or isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{file} does not hold results in JSON, and is kept: name another file")


def keep(file: str, name: str, result: dict, groups: bool = False) -> None:
    """Write one entry of a JSON file of results; the others stay. With `groups` the groups that
    were not measured stay, too, each with the environment that it was measured in.
    """
    path = Path(file)
    kept = json.loads(path.read_text()) if path.exists() else {}
    if groups and name in kept:
        of = {"environment": kept[name].get("environment")}
        old = {title: of | group for title, group in kept[name]["groups"].items()}
        result = result | {"groups": old | result["groups"]}
    path.write_text(json.dumps(kept | {name: result}, indent=1) + "\n")


def environment() -> dict:
    """Where and from what the numbers come, without names of hosts, people or folders."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = {}
    for name in ("torch", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "cpu": models[0] if models else platform.machine(), "cores": len(available_cores()),
        **packages,
        "dtype": "chosen by the engine", "commit": commit or None,
        "load_before": round(os.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }  # fmt: skip


def available_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# ---- the engines, each in a process of its own


class Ours:
    """The engine of a checkout: `root` is this one, or the one that --beside names."""

    def __init__(self, root: str, target: str | None, draft: str | None, numbers: dict):
        """numbers: what load takes of dtype, quantize and draft_quantize."""
        sys.path.insert(0, root)
        from ssd import load

        self.load, self.pair, self.numbers, self.engines = load, (target, draft), numbers, {}

    def engine(self, devices: tuple[str, str]):
        if devices not in self.engines:
            self.engines[devices] = self.load(*self.pair, *devices, **self.numbers)
            self.engines[devices].warn = self.warned
        return self.engines[devices]

    def warned(self, text: str) -> None:
        print(text, file=sys.stderr)
        if "draft failed" in text or "draft was lost" in text:
            raise RuntimeError(f"{text}: such a run measures nothing")

    def encode(self, devices, texts: list[str], chat: bool) -> list[list[int]]:
        """Token ids: of a question in the chat template, or of a text to go on with."""
        tokenizer = self.engine(devices).tokenizer
        if tokenizer is None:
            raise ValueError(
                "the target has no tokenizer, wanted one that has: the prompts are text"
            )
        if chat:
            return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        return [tokenizer.encode(text) for text in texts]

    def run(self, devices, prompts, new: int, mode: str, **settings) -> dict:
        """Settings are generate's own. The engine chooses k and fan_out if none are given."""
        prompts, engine = [prompt["ids"] for prompt in prompts], self.engine(devices)
        getattr(engine, "seen", {}).clear()  # what auto learnt: a program that starts has nothing
        stats = engine.generate(prompts, mode=mode, max_new_tokens=new, **settings).stats
        kept = {key: stats.get(key) for key in KEPT}
        kept |= {key: stats[key] for key in ("target", "draft", "tokens_per_s")}
        return {"ids": stats["token_ids"], **kept}


class Transformers:
    """Hugging Face's generate on the same files: plain, assisted by the draft, or by n-grams."""

    def __init__(self, target: str, draft: str | None, dtype: str | None):
        sys.path.insert(0, str(ROOT))
        import torch
        import transformers

        from linear import speeds

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(len(available_cores()))
        speed = {} if dtype else speeds()  # of small products on this CPU
        half = speed.get("bfloat16", math.inf) < speed.get("float32", 0)
        dtype = dtype or ("bfloat16" if half else "float32")
        self.torch, self.dtype, self.draft = torch, getattr(torch, dtype), draft
        self.load = transformers.AutoModelForCausalLM.from_pretrained
        self.model, self.assistant = self.read(target), None

    def read(self, name: str):
        folder, file = os.path.split(name)
        where = {"gguf_file": file} if file.endswith(".gguf") else {}
        model = self.load(folder if where else name, dtype=self.dtype, **where).eval()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    def run(self, devices, prompts, new: int, mode: str, k: int = 4, **_) -> dict:
        how = {"prompt_lookup_num_tokens": k} if mode.endswith("lookup") else {}
        if mode.endswith("assisted"):
            how["assistant_model"] = self.assistant = self.assistant or self.read(self.draft)
            config = self.assistant.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = k, "constant"
            config.assistant_confidence_threshold = 0.0
        ids, seen = self.torch.tensor([prompt["ids"] for prompt in prompts]), []

        def note(input_ids, scores, **_):  # a stopping criterion that stops nothing
            seen.append((time.perf_counter(), input_ids.shape[1]))
            return self.torch.zeros(len(input_ids), dtype=self.torch.bool)

        with self.torch.inference_mode():
            how |= {"attention_mask": self.torch.ones_like(ids), "stopping_criteria": [note]}
            out = self.model.generate(ids, do_sample=False, max_new_tokens=new, **how)
            end = time.perf_counter()
        (begin, length), rounds = seen[0], max(len(seen) - 1, 1)
        after_first = out.shape[1] - length
        return {"ids": out[:, ids.shape[1] :].tolist(), "tokens_per_round": after_first / rounds,
                "tokens_per_s": len(ids) * after_first / (end - begin)}  # fmt: skip


class LlamaCpp:
    """The programs of llama.cpp: llama-bench, and for "... draft" llama-speculative-simple."""

    def __init__(self, folder: str, target: str, draft: str | None):
        self.folder, self.target, self.draft = Path(folder), target, draft

    def run(self, devices, prompts, new: int, mode: str, k: int = 4, **_) -> dict:
        threads, pair = str(len(available_cores())), ["-m", self.target]
        if not mode.endswith("draft"):
            told = self.call(
                "llama-bench",
                *pair,
                "-p",
                "0",
                "-n",
                str(new),
                "-t",
                threads,
                "-r",
                "1",
                "-o",
                "json",
            )
            return {"ids": None, "tokens_per_s": json.loads(told)[0]["avg_ts"]}
        pair += ["-md", str(self.draft), "-p", prompts[0]["text"], "-n", str(new), "-t", threads]
        told = self.call(
            "llama-speculative-simple",
            *pair,
            *("-td", threads, "--spec-type", "draft-simple", "--spec-draft-n-max", str(k)),
            *("--temp", "0"),
        )
        return {
            "ids": None,
            "tokens_per_s": float(re.findall(r"decoded.*speed:\s*([\d.]+) t/s", told)[-1]),
        }

    def call(self, program: str, *flags: str) -> str:
        done = subprocess.run(
            [self.folder / program, *flags], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(f"{program} ended with exit code {done.returncode}")
        return done.stdout if program == "llama-bench" else done.stdout + done.stderr


class Command:
    """generate.py as a user runs it, loading and choosing K and M anew every time."""

    def __init__(self, flags: list[str]):
        self.flags = flags

    def run(self, devices, prompts, new: int, mode: str, **_) -> dict:
        words = [sys.executable, str(ROOT / "generate.py"), "--ssd", "--json", "-", "--ignore-eos"]
        words += ["--max-new-tokens", str(new), *self.flags]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=600)
        if done.returncode:
            raise ValueError(
                f"generate.py ended with exit code {done.returncode}: {done.stderr.strip()}"
            )
        stats = json.loads(done.stdout.splitlines()[-1])
        return {
            "ids": None,
            "tokens_per_s": stats["tokens_per_s"],
            **{key: stats.get(key) for key in KEPT},
        }


def serve(pipe, cores: list[int], build, given: tuple) -> None:
    """The life of a process under measurement: take the cores, then answer requests."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    peer = None
    while request := pipe.recv():
        name, how = request
        try:
            peer = peer or build(*given)
            pipe.send((None, getattr(peer, name)(**how)))
        except ValueError as error:  # a mistake that one sentence explains
            pipe.send((ValueError, str(error)))
        except Exception as error:  # the process that asked decides what it means
            traceback.print_exc()
            pipe.send((RuntimeError, str(error) or type(error).__name__))


class Worker:
    """A process that has loaded one engine on its own cores."""

    def __init__(self, cores: list[int], build, *given):
        # A fork would inherit this process's threads.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, cores, build, given), daemon=True
        )
        self.process.start()
        theirs.close()

    def ask(self, name: str, **how):
        try:
            self.pipe.send((name, how))
            error, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError) as gone:
            raise RuntimeError("a process under measurement ended by itself") from gone
        if error:
            raise error(answer)
        return answer

    def close(self) -> None:
        with suppress(OSError):  # it has ended by itself, or Ctrl-C reached it as well
            self.pipe.send(None)
        self.process.join(30)


# ---- measuring


class Runner:
    """Runs comparisons for one pair of models. args are bench.py's, texts prompts by kind."""

    def __init__(self, args, texts: dict[str, list[str]]):
        self.args, self.began, self.workers, self.skipped = args, time.perf_counter(), {}, {}
        self.cores = available_cores()[:2]
        named = ("dtype", "quantize", "draft_quantize")
        self.numbers = {name: getattr(args, name) for name in named if getattr(args, name)}
        self.commit = environment()["commit"]
        self.devices = self.places()
        encoded = {kind: self.encode(kind, of_kind) for kind, of_kind in texts.items()}
        self.prompts = {kind: prompts for kind, prompts in encoded.items() if prompts}
        self.pair = self.files()

    def places(self) -> dict[str, tuple[str, str]]:
        """The devices of target and draft at each of PLACES."""
        first, second = self.cores[0], self.cores[-1]
        one = self.args.device or f"cpu:{first}"
        other, both = self.args.draft_device or f"cpu:{second}", f"cpu:{first},{second}"
        return {"one": (one, one), "both": (both, both), "apart": (one, other)}

    def encode(self, kind: str, texts: list[str]) -> list[dict]:
        """Prompts that are short enough; none where the target has no chat template."""
        how = {"devices": self.devices["one"], "texts": texts, "chat": kind == "chat"}
        try:
            ids = self.worker(Way("", "ar")).ask("encode", **how)
        except ValueError as error:
            if kind != "chat":
                raise
            self.skipped[kind] = str(error)
            return []
        few = [
            {"ids": i, "text": text} for i, text in zip(ids, texts) if len(i) <= self.args.longest
        ]
        if not few:
            raise ValueError(
                f"all prompts of {kind} are over {self.args.longest} tokens long: raise --longest"
            )
        return few

    def files(self) -> tuple[str, str]:
        """The names of target and draft, which are the default model's if none were given."""
        run = self.run(Way("", "sd"), {"k": 1}, self.batch(0, 1, None), WARM)
        return run["target"], run["draft"]

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def worker(self, way: Way) -> Worker:
        """Ours: one process for all places. A peer: one for each set of cores."""
        a, cores = self.args, self.cores[:1] if way.place == "one" else self.cores
        key = ("ours", way.beside) if way.ours else (way.mode.split()[0], way.place)
        if key not in self.workers:
            given = a.target, a.draft
            if way.ours:
                root = str(Path(a.beside).resolve()) if way.beside else str(ROOT)
                made = Worker(self.cores, Ours, root, *given, self.numbers)
            elif key[0] == "transformers":
                made = Worker(cores, Transformers, *self.pair, a.dtype)
            elif key[0] == "command":
                named = {"target": a.target, "draft": a.draft, **self.numbers}
                flags = [f"--{name.replace('_', '-')}={v}" for name, v in named.items() if v]
                made = Worker(cores, Command, flags)
            else:
                made = Worker(cores, LlamaCpp, a.llama, *self.pair)
            self.workers[key] = made
        return self.workers[key]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def lacks(self, way: Way) -> str | None:
        """Why a way cannot be measured here, or None."""
        a, peer = self.args, way.mode.split()[0]
        two = len(self.cores) > 1 or (a.device and way.place == "apart")
        if way.place != "one" and not two or a.device and way.place == "both":
            return f"it needs {PLACES[way.place]}"
        if way.beside and not a.beside:
            return "no other checkout was named (--beside)"
        if peer == "llama.cpp" and not (a.llama and self.pair[0].endswith(".gguf")):
            return "it needs a folder with its programs (--llama) and a .gguf file"
        if peer == "transformers" and importlib.util.find_spec("transformers") is None:
            return "it is not installed"
        config = Path(self.pair[1]) / "config.json"
        if (
            way.mode == "transformers assisted"
            and config.exists()
            and '"head_tokens"' in config.read_text()
        ):
            return "the draft uses the target's embedding, which only this engine can"
        return None

    def ceiling(self) -> dict:
        """Passes over the target a second that a plain read of the memory allows, by place."""
        out = {}
        for place in ("one", "both"):
            if self.lacks(way := Way("", "ar", place)):
                continue
            run = self.run(way, {}, self.batch(0, 1, None), WARM)
            share = run["bandwidth_fraction"]
            out[place] = run["tokens_per_s"] / share if share else None
        return out

    def batch(self, repeat: int, size: int, kind: str | None) -> list[dict]:
        """The prompts of a repeat: of one kind, or of all kinds in turn."""
        kinds = list(self.prompts)
        of_kind = self.prompts[kind or kinds[repeat % len(kinds)]]
        turn = repeat if kind else repeat // len(kinds)
        return [of_kind[(turn * size + i) % len(of_kind)] for i in range(size)]

    def run(self, way: Way, settings: dict, prompts: list[dict], new: int) -> dict:
        how = {"mode": way.mode, **settings, **way.settings}
        return self.worker(way).ask(
            "run", devices=self.devices[way.place], prompts=prompts, new=new, **how
        )

    def able(self, ways: list[Way], settings: dict) -> list[Way]:
        """The ways that can be measured here, each run once, which does not count."""
        out = []
        for way in ways:
            why = self.lacks(way)
            try:
                if not why:
                    first = way.sweep[0] if way.sweep else {}
                    self.run(way, settings | first, self.batch(0, 1, None), WARM)
                    out.append(way)
            except (RuntimeError, ValueError) as error:  # a peer that cannot is left out; ours must
                if way.ours:
                    raise
                why = str(error).splitlines()[0]
            if why:
                self.skipped[way.name] = why
                self.say(f"{way.name} is left out: {why}")
        return out

    def fastest(self, way: Way, settings: dict, repeats: int, new: int) -> tuple[dict, list[dict]]:
        """The first settings of a sweep that are as fast as the fastest; and the whole sweep."""
        rates = [[] for _ in way.sweep]
        for repeat in range(repeats):
            for place, more in enumerate(way.sweep):
                run = self.run(way, settings | more, self.batch(repeat, 1, None), new)
                rates[place].append(run["tokens_per_s"])
        # All tokens over all seconds.
        rates = [len(runs) / sum(1 / rate for rate in runs) for runs in rates]
        found = [more | {"tokens_per_s": rate} for more, rate in zip(way.sweep, rates)]
        return next(m for m, rate in zip(way.sweep, rates) if rate >= SAME * max(rates)), found

    def group(self, comparison, temperature: float, kind: str | None) -> dict:
        """All ways at one temperature: the repeats in turn, then what they come to."""
        c, settings = comparison, {"temperature": temperature, "ignore_eos": True}
        ways = self.able([way for way in c.ways if way.ours or not temperature], settings)
        chosen, sweeps = {}, {}
        for way in ways:
            chosen[way.name] = {}
            if way.sweep:
                found = self.fastest(way, settings, c.sweep_repeats, c.sweep_tokens)
                chosen[way.name], sweeps[way.name] = found
        runs = {way.name: [] for way in ways}
        for repeat in range(c.repeats):
            if repeat and repeat % ANEW == 0:
                self.close()
                self.able(ways, settings)  # which runs each once
            for way in ways[:: -1 if repeat % 2 else 1]:
                how = settings | {"seed": repeat} | chosen[way.name]
                run = self.run(way, how, self.batch(repeat, c.batch, kind), c.tokens)
                runs[way.name].append(run)
        text = same_text(ways, runs, temperature)
        out = {
            "temperature": temperature,
            "kind": kind,
            "same_text": text,
            "ways": {},
            "ratios": {},
        }
        for way in ways:
            how = {**way.settings, **chosen[way.name]}
            out["ways"][way.name] = record(way, how, runs[way.name])
            if way.sweep:
                out["ways"][way.name]["sweep"] = sweeps[way.name]
            self.say(
                f"{c.name} T={temperature:g} {kind or ''} {way.name}: "
                f"{out['ways'][way.name]['told']}"
            )
        for of, to in c.ratios:
            if of in runs and to in runs:
                out["ratios"][f"{of} over {to}"] = ratio(runs[of], runs[to])
        return out


def same_text(ways: list[Way], runs: dict, temperature: float) -> dict:
    """How many texts are those of the first way that must write them, and where others differ.

    Under `shared` every setting of ours writes the same text, at temperature 0 every engine.
    """

    def same(way: Way) -> bool:
        heat = way.settings.get("temperature", temperature)
        coupling = way.settings.get("coupling", "shared")
        return heat == temperature and (not heat or coupling == "shared")

    must = [way for way in ways if same(way)]
    compared, found = 0, []
    for way in must[1:]:
        for repeat, (want, got) in enumerate(zip(runs[must[0].name], runs[way.name])):
            for ours, theirs in zip(want["ids"] or (), got["ids"] or ()):
                compared += 1
                if ours != theirs:
                    at = next(
                        (i for i, (x, y) in enumerate(zip(ours, theirs)) if x != y), len(ours)
                    )
                    found.append({"way": way.name, "repeat": repeat, "token": at})
    return {"compared": compared, "differ": len(found), "where": found}


def record(way: Way, settings: dict, runs: list[dict]) -> dict:
    """What is written of a way: speed with its interval, medians of other figures, every repeat."""
    kept = []
    for run in runs:
        shares = [share for ids in run["ids"] or () if (share := distinct_4grams(ids)) is not None]
        run |= {"distinct_4grams": mean(shares)} if shares else {}
        kept.append({key: run[key] for key in run if key not in UNWRITTEN and run[key] is not None})
    medians = {}
    for key in dict.fromkeys(key for run in kept for key in run):
        medians[key] = median([run[key] for run in kept if key in run])
    speed = interval([run["tokens_per_s"] for run in runs])
    told = f"{speed['median']:.1f} tokens/s"
    if "hit_rate" in medians:
        told += (
            f", acceptance {medians.get('acceptance_rate', 0):.2f}, hits {medians['hit_rate']:.2f}"
        )
    cores = 1 if way.place == "one" else 2
    return {"mode": way.mode, "place": way.place, "settings": settings, "told": told, **medians,
            "tokens_per_s": speed, "per_core": speed["median"] / cores, "runs": kept}  # fmt: skip
