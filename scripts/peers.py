"""The engines that bench.py compares, behind one signature, and the processes they run in.

Knows: how each engine is loaded, called and timed. Does not know: what is compared with what, or how it is shown.
Read next: bench.py.

    PEERS[name](server, target, draft, device, draft_device, **settings) -> run(prompts, new_tokens) -> dict

prompts are lists of token ids, a batch of equal lengths; decoding is greedy unless the settings say otherwise, EOS is
ignored. A run gives `ids` (the new tokens of each row), `decoded` and `decode_s` (what followed the first round's
tokens, and how long that took: prefill is not decoding), `total_s`, `first_s` and `pieces_s` (until the first token,
and between the pieces of text of every row, as who reads along gets them), and `stats`, whatever else the engine tells.

Each side runs in a process of its own on its own cores, because affinity, thread counts and OpenMP's teams belong to a
process: an engine must neither inherit another's helpers nor share a core with its waiting ones. A process waits on
its pipe, asleep, while another one is timed.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from altered import altered  # noqa: E402

from cache import KVCache  # noqa: E402
from pair import Model  # noqa: E402
from runtime import Devices, available_cores, parse_device, read_bandwidth  # noqa: E402
from speed import CALIBRATION_ROUNDS  # noqa: E402
from ssd import NGRAM, Engine  # noqa: E402

DTYPE = "float32"
STATS = (
    "tokens_per_round", "acceptance_rate", "hit_rate", "round_ms", "verify_ms", "draft_ms", "exposed_ms", "hidden",
    "predicted_tokens_per_s", "bandwidth_fraction",
)  # fmt: skip


class Server:
    """What one process has loaded, and its answers to requests."""

    def __init__(self):
        self.models: dict[str, Model] = {}
        self.theirs: dict[str, object] = {}
        self.devices: dict[tuple, Devices] = {}
        self.engines: dict[tuple, Engine] = {}

    def answer(self, request: dict) -> dict:
        """{"do": NAME, ...} -> what it gives, or {"error": text, "users": whether it was the user's}."""
        table = {"run": self.run, "bandwidth": self.bandwidth, "size": self.size, "gap": self.gap}
        try:
            return table[request["do"]](**{key: value for key, value in request.items() if key != "do"})
        except Exception as error:  # the asking process decides what it means
            users = type(error) is ValueError  # a mistake that one sentence explains
            if not users:
                traceback.print_exc()
            return {"error": str(error) or type(error).__name__, "users": users}

    def run(self, peer: str, prompts: list, new: int, **how) -> dict:
        return PEERS[peer](self, **how)(prompts, new)

    def bandwidth(self, device: str) -> dict:
        return {"bytes_per_s": read_bandwidth(self.lanes_on(device).lanes("ar")[0])}

    def size(self, target: str) -> dict:
        model = self.model(target)
        return {"step_bytes": model.step_bytes}

    def gap(self, target: str, ids: list[int]) -> dict:
        """How far the best two logits for the token after `ids` are apart: a near-tie may fall either way."""
        model, n = self.model(target), len(ids)

        def best_two():
            cache = KVCache(model.config, 1, n, device="cpu", dtype=model.dtype)
            model.transformer.set_positions(n)
            place = cache.place(torch.tensor([0]), torch.tensor([n]), n, n)
            return model.transformer(torch.tensor([ids]), place, cache)[0, -1].topk(2).values.tolist()

        lane = self.lanes_on(f"cpu:{available_cores()[0]}").lanes("ar")[0]  # here it would start one more OpenMP team
        first, second = lane.start("gap", best_two).result()
        return {"gap": first - second}

    def model(self, name: str) -> Model:
        if name not in self.models:
            self.models[name] = Model.load(name, torch.device("cpu"), DTYPE)
        return self.models[name]

    def engine(self, target: str, draft: str | None, device: str, draft_device: str | None) -> Engine:
        """Engines are cheap, models are not: every placement of a pair shares the weights."""
        key = (target, draft, device, draft_device)
        if key not in self.engines:
            devices = self.lanes_on(device, draft_device)
            model = draft if draft in (None, NGRAM) else self.model(draft)
            self.engines[key] = Engine(self.model(target), model, devices)
        return self.engines[key]

    def lanes_on(self, device: str, draft_device: str | None = None) -> Devices:
        """One set of lanes for each placement. A second team of OpenMP threads on the same cores would make libgomp
        spin less while it waits (it counts the threads of all teams), and slow down both."""
        key = (device, draft_device or device)
        if key not in self.devices:
            self.devices[key] = Devices(*key)
        return self.devices[key]

    def transformers(self, name: str):
        """The checkpoint as transformers loads it, on all cores of this process, never stopping at EOS."""
        if name not in self.theirs:
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            torch.set_num_threads(len(available_cores()))
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=getattr(torch, DTYPE), attn_implementation="sdpa"
            )
            model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
            self.theirs[name] = model.eval()
        return self.theirs[name]


class Arrivals:
    """When new text came, row by row: what a reader of the stream sees."""

    def __init__(self, lengths: list[int]):
        self.begin, self.lengths = time.perf_counter(), lengths
        self.last: list[float | None] = [None] * len(lengths)
        self.pieces_s: list[float] = []

    def note(self, lengths: list[int]) -> None:
        now = time.perf_counter()
        for row, (before, length) in enumerate(zip(self.lengths, lengths)):
            if length > before:
                if self.last[row] is None:
                    self.first_s = now - self.begin
                else:
                    self.pieces_s.append(now - self.last[row])
                self.last[row] = now
        self.lengths = lengths

    def told(self) -> dict:
        return {"first_s": self.first_s, "pieces_s": self.pieces_s}


# ---- ours


def ours(mode: str, always: str | None = None) -> Callable:
    """AR, SD or SSD. `always` takes the place of the pair's draft: NGRAM, which guesses from the row's own text."""

    def build(server, target, draft=None, device=None, draft_device=None, **settings):
        engine = server.engine(target, always or draft, device, draft_device)
        return lambda prompts, new: run_ours(engine, prompts, mode=mode, max_new_tokens=new, **settings)

    return build


def run_ours(engine: Engine, prompts: list, without=(), **settings) -> dict:
    """One generation. without: names of altered.ALTERED."""
    arrivals = Arrivals([len(prompt) for prompt in prompts])
    decoding = engine.start(prompts, ignore_eos=True, **settings)
    with altered(decoding, without):
        for _ in decoding.rounds():
            arrivals.note([len(row.ids) for row in decoding.rows])
    total_s = time.perf_counter() - arrivals.begin
    stats = engine.finish(decoding).stats
    if decoding.mode != settings["mode"]:
        raise RuntimeError(f"the draft was lost in mode {settings['mode']}: such a run measures nothing")
    told = {key: stats[key] for key in STATS} | {"k_used": stats["k"], "fan_out_used": stats["fan_out"]}
    told |= {"stray": decoding.fan_out.stray} if decoding.mode == "ssd" and decoding.fan_out.by_scores else {}
    return {
        "ids": stats["token_ids"],
        "decoded": sum(stats["new_tokens"]) - len(prompts),
        "decode_s": stats["decode_s"],
        "total_s": total_s,
        **arrivals.told(),
        "stats": told | foretold(decoding, told) | round_by_round(decoding) | {"counts": counts(decoding)},
    }


def foretold(decoding, stats: dict) -> dict:
    """The prediction beside the rate of the rounds that it was not made from; the limit cuts the last one.

    alone_...: the forecast that knows nothing of how fast earlier runs were.
    """
    verifies, first, last = decoding.figures.verifies, CALIBRATION_ROUNDS, len(decoding.figures.verifies) - 1
    if last < 1.5 * first or not stats["predicted_tokens_per_s"]:
        return {}
    rest = sum(decoding.figures.emitted[first:last]) / (verifies[last][0] - verifies[first][0])
    decoding.figures.earlier = []
    alone = decoding.figures.predict(decoding.settings.mode, decoding.draft_lane.spans)["predicted_tokens_per_s"]
    errors = {"prediction_error": abs(stats["predicted_tokens_per_s"] / rest - 1), "alone_error": abs(alone / rest - 1)}
    return {"rest_tokens_per_s": rest, "alone_tokens_per_s": alone} | errors


def counts(decoding) -> dict:
    """What rates are made of, so that several runs can be pooled."""
    figures = decoding.figures
    return {
        "accepted": sum(kind[0] for kind in figures.kinds.values()),
        "tested": sum(kind[0] + kind[1] for kind in figures.kinds.values()),
        "hits": sum(x.rows - len(x.missed) for x in figures.lookups),
        "lookups": sum(x.rows for x in figures.lookups),
        "emitted": sum(figures.emitted[1:]),
        "row_rounds": sum(figures.live[1:]),
    }


def round_by_round(decoding) -> dict:
    """SSD: what a round on a hit lasts, beside its own verification, which the draft's lane was busy with."""
    figures = decoding.figures
    hits = [n for n in figures.hit_rounds() if n]
    if decoding.mode != "ssd" or not hits:
        return {}
    verify = [end - begin for begin, end in figures.verifies]
    lasts = [after[0] - before[0] for before, after in zip(figures.verifies, figures.verifies[1:])]
    spans = {name: [e - b for n, b, e in decoding.draft_lane.spans if n == name] for name in ("extend", "chain step")}
    return {
        "hit_round_ms": median(lasts[n] for n in hits) * 1e3,
        "hit_round_over_verify": median(lasts[n] / verify[n] for n in hits),
        "extend_ms": median(spans["extend"]) * 1e3,
        "chain_step_ms": median(spans["chain step"]) * 1e3,
        "chain_length": sum(x.steps for x in figures.lookups) / len(figures.lookups),
        **longest_wait(decoding, hits),
    }


def longest_wait(decoding, hits: list[int]) -> dict:
    """From the trace: the target's longest wait on a hit, beside what cutting allows it to wait for at most, the
    extend, the fork and one chain step of that round; and how many waits were longer than theirs."""
    verifies, works = decoding.figures.verifies, []
    for name, begin, end in sorted(decoding.draft_lane.spans, key=lambda span: span[1]):
        if name == "extend":
            works.append({})
        if name in ("extend", "fork", "chain step") and works:
            works[-1].setdefault(name, end - begin)
    allowed = {lookup.round: sum(work.values()) for lookup, work in zip(decoding.figures.lookups, works)}
    waits = [(verifies[n + 1][0] - verifies[n][1], allowed[n]) for n in hits]
    wait, most = max(waits)
    return {"longest_wait_ms": wait * 1e3, "allowed_wait_ms": most * 1e3, "too_long": sum(w > m for w, m in waits)}


# ---- transformers


class Clock(Arrivals):
    """A stopping criterion that stops nothing: notes when rounds were done, and how long the rows were after the first
    one."""

    length = rounds = 0

    def __call__(self, input_ids, scores, **_):
        B, T = input_ids.shape
        self.note([T] * B)
        self.length = self.length or T
        self.rounds += 1
        return torch.zeros(B, dtype=torch.bool)


def transformers_plain(server, target, **how):
    model = server.transformers(target)
    return lambda prompts, new: run_transformers(model, prompts, new, **sampled(**how))


def transformers_assisted(server, target, draft, k, threshold, **how):
    """Their speculative decoding. threshold: the draft stops early where it is less sure than this; 0 is off."""
    model, assistant = server.transformers(target), server.transformers(draft)
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = k, "constant"
    config.assistant_confidence_threshold = threshold
    return lambda prompts, new: run_transformers(model, prompts, new, assistant_model=assistant, **sampled(**how))


def transformers_lookup(server, target, k, **_):
    """Their n-gram guesses from the text."""
    model = server.transformers(target)
    return lambda prompts, new: run_transformers(model, prompts, new, prompt_lookup_num_tokens=k)


def sampled(temperature: float = 0.0, seed: int = 0, **_) -> dict:
    """Their names for a temperature, with nothing cut off the distribution, as with us."""
    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}


def run_transformers(model, prompts: list, new: int, **how) -> dict:
    ids_BT, clock = torch.tensor(prompts), Clock(list(map(len, prompts)))
    with torch.inference_mode():
        out_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True, max_new_tokens=new,
            stopping_criteria=[clock], **({"do_sample": False} | how),
        )  # fmt: skip
        end = time.perf_counter()
    B, T = ids_BT.shape
    assert out_BT.shape == (B, T + new), f"{new} new tokens were asked for, {out_BT.shape[1] - T} came"
    decoded = B * (T + new - clock.length)
    return {
        "ids": out_BT[:, T:].tolist(),
        "decoded": decoded,
        "decode_s": end - clock.begin - clock.first_s,
        "total_s": end - clock.begin,
        **clock.told(),
        "stats": {"tokens_per_round": decoded / B / max(clock.rounds - 1, 1)},
    }


PEERS: dict[str, Callable] = {
    "ar": ours("ar"),
    "sd": ours("sd"),
    "ssd": ours("ssd"),
    NGRAM: ours("sd", NGRAM),
    "transformers": transformers_plain,
    "transformers assisted": transformers_assisted,
    "transformers lookup": transformers_lookup,
}


# ---- processes


class Worker:
    """A process on its own cores that answers one request at a time, a JSON object a line each way."""

    def __init__(self, cores):
        pin = (lambda: os.sched_setaffinity(0, cores)) if hasattr(os, "sched_setaffinity") else None
        # Thread counts come from the cores alone, the same way for everyone.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            preexec_fn=pin, env=env,
        )  # fmt: skip

    def ask(self, do: str, **request) -> dict:
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"a process under measurement ended by itself, exit code {self.process.wait()}")
        return checked(json.loads(line))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def checked(answer: dict) -> dict:
    """An answer, or the error that it reports."""
    if "error" in answer:
        raise (ValueError if answer["users"] else RuntimeError)(answer["error"])
    return answer


def cores_of(device: str) -> tuple[int, ...]:
    return parse_device(device)[1] or tuple(available_cores())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    server = Server()
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
