"""A target and a draft, loaded and checked, and what stands around one generation.

Knows: which pieces make a usable model, what two models must share, what a chat keeps between
turns. Does not know: rounds (ssd.py), formats of files (checkpoint/). Read next: rows.py.
"""

import difflib
import math
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from cache import in_whole_blocks
from checkpoint.config import Config
from checkpoint.tokenizer import Tokenizer, load_tokenizer, read_eos_ids, vocabulary_difference
from checkpoint.weights import (
    available_bytes,
    default_target,
    load_config,
    load_model,
    resolve,
    split_inflate,
)
from figures import run_stats
from linear import FORMATS, few_bits_problem, finish_all, finisher, speeds
from model import Transformer
from parallel import ALONE, Group
from ranks import join, serve
from rows import AUTO, Row, Settings, make_rows
from runtime import Devices, Policy, one_thread, peak_memory_gb
from sampling import Params
from ssd import Decoding, Plan, SamePlan
from steps import PREFILL_CHUNKS, Runner

DEFAULT_DRAFT = str(Path(__file__).resolve().parent / "assets" / "draft")
NGRAM = "ngram"  # a draft that is not a model: it guesses from the row's own text
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Tokens. Static trunks are as long as this, or twice, four times ... as long: at most 8 sizes.
SHORTEST_TRUNK = 256
# Of the memory that is free, runs use so much; the rest is for what nobody counts.
FREE_SHARE = 0.8
# So many times a pass holds what it reads, and the scores of all words, at once: measured in
# float32.
READ_COPIES, SCORE_COPIES = 4, 8
KEPT_CHAINS = 2  # this round's and the next one's: except under `shared` they keep probabilities


@dataclass
class Model:
    """A transformer that is ready to run. bits: of its weights, as in choose_format. step_bytes:
    what one decode step reads, without the embedding table.
    """

    name: str
    transformer: Transformer
    config: Config
    tokenizer: Tokenizer | None
    eos: frozenset[int]
    dtype: torch.dtype
    bits: str
    policy: Policy
    step_bytes: int
    runners: dict[tuple, Runner] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        name: str,
        device: torch.device,
        dtype: str | None = None,
        compile: bool | None = None,
        target: "Model | None" = None,
        quantize: str | None = None,
        group: Group = ALONE,
    ) -> "Model":
        """target: the loaded target, for a draft that was trained for it and uses its embedding.
        group: the ranks that share the model.
        """
        where = resolve(name)
        compile = device.type == "cuda" if compile is None else compile
        drafts = target is not None
        file = where if split_inflate(name) is None else Path()  # what is grown has no few bits
        numbers, bits = group.same(choose_format(file, device, dtype, quantize, compile, drafts))
        share = group.share if group.ranks > 1 else None
        of = target and target.transformer
        with one_thread():
            if of is not None and of.group.ranks > 1 and load_config(name).head_tokens:
                of = load_model(target.name, device, numbers, Transformer, ends=True)
            finish = finisher(bits, not compile, group)
            transformer = load_model(name, device, numbers, Transformer, of, finish, bits, share)
            if share is not None:
                group.split(transformer)
        tokenizer = load_tokenizer(where)
        eos = frozenset() if tokenizer else frozenset(read_eos_ids(where))
        return cls.of(transformer, str(name), tokenizer, eos, compile, bits)

    @classmethod
    def of(
        cls, transformer: Transformer, name="model", tokenizer=None, eos=frozenset(), compile=None,
        bits="none",
    ) -> "Model":  # fmt: skip
        """A model from a transformer that is already in memory. Its linear layers get these bits,
        those that have not got theirs at load.
        """
        config, weight = transformer.config, transformer.norm.weight
        if tokenizer is not None:
            eos = eos or frozenset(tokenizer.eos_ids)
            if tokenizer.vocab_size > config.vocab_size:
                raise ValueError(
                    f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, but the model "
                    f"only {config.vocab_size}: use the tokenizer files of this checkpoint"
                )
        compile = weight.device.type == "cuda" if compile is None else compile
        policy = Policy(weight.device, compile)
        with one_thread():
            finish_all(transformer, finisher(bits, not compile))
        read = step_bytes(transformer)
        if compile:
            policy.compile(transformer)
        elif weight.device.type == "cpu":
            transformer.script()
        if weight.device.type == "cuda":  # the lanes' streams do not wait for the filling one
            torch.cuda.synchronize(weight.device)
        return cls(name, transformer, config, tokenizer, eos, weight.dtype, bits, policy, read)

    @property
    def device(self) -> torch.device:
        return self.transformer.norm.weight.device

    def room(self, trunk: int) -> int:
        """Tokens that a row of a runner for `trunk` has room for: static ones have few sizes."""
        if not self.policy.static:
            return trunk
        return SHORTEST_TRUNK << ((trunk - 1) // SHORTEST_TRUNK).bit_length()

    def row_bytes(self, trunk: int, k: int, branches: int, kept: int = 0) -> int:
        """Bytes that a row of so many tokens takes, about: its keys and values, and the numbers of
        the largest pass, which reads a chunk of its prompt or scores all words. kept: times that
        the probabilities of all chains are held.
        """
        c = self.config
        slots = self.room(trunk) + branches * k + 1  # the trunk, the scratch, the dead slot
        kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.dtype.itemsize * slots
        wide = c.hidden_size + c.intermediate_size + trunk * c.num_heads // c.num_kv_heads
        scores = (SCORE_COPIES * max(k + 1, branches) + kept * k * branches) * c.vocab_size
        return kv + 4 * max(READ_COPIES * PREFILL_CHUNKS[-1] * wide, scores)

    def numbers(self) -> dict[str, str]:
        """The dtype and the bits, by the names of the flags. A dtype of weights alone counts."""
        if self.bits == "bfloat16":
            return {"dtype": self.bits, "quantize": "none"}
        return {"dtype": str(self.dtype).split(".")[1], "quantize": self.bits}

    def runner(
        self, role: str, batch: int, trunk: int, k: int, branches: int, vocab: int
    ) -> Runner:
        """A runner with room for `trunk` tokens a row. A static one is kept: its graphs belong to
        its buffers.

        A shorter text runs in a longer trunk, since attention reads no more than there is. Graphs
        belong to a stream as well, and so to the thread of a lane: another one gets a new runner.
        """
        key = (threading.current_thread(), role, batch, k, branches, vocab)
        kept = self.runners.get(key)
        if kept is not None and kept.cache.trunk >= trunk:
            return kept
        self.runners.clear()  # one set of buffers at a time
        room = self.room(trunk)
        made = Runner(role, self.transformer, batch, room, k, branches, self.policy, vocab)
        if self.policy.static:
            self.runners[key] = made
        return made

    def set_up(self, rows: list[Row], settings: Settings, before, shape: tuple) -> Runner:
        """A runner that knows how the first of these rows sample, with the KV of the tokens that
        the runner `before` has read. shape: the arguments of runner().
        """
        _, batch, *_ = shape
        values = zip(*((*row.sampling, row.number) for row in rows))  # rows that wait count, too
        params = Params.make(*values, "cpu").narrow(range(batch))
        how, read = (settings.coupling, settings.saguaro_c), before and rows[0].target_read
        return self.ready(before, shape, params, how, read)

    def ready(self, before, shape: tuple, params: Params, how: tuple, read: int | None) -> Runner:
        """set_up of numbers: all ranks run it alike. read: how many tokens' KV to take over."""
        self.transformer.group.tell("set_up", shape, params, how, read)
        runner = self.runner(*shape)
        runner.set_rows(params.to(runner.device), *how)
        if read is not None:
            runner.cache.copy_trunk(before.cache, read)
        return runner


def choose_format(
    where: Path,
    device: torch.device,
    dtype: str | None,
    quantize: str | None,
    plain: bool,
    drafts: bool = False,
) -> tuple[torch.dtype, str]:
    """The dtype between the layers of a model, and the bits of their weights: what was asked for,
    or what is fastest here.

    Bits are "none", "bfloat16", "int8", "int4", or "stored": the few bits of a GGUF file as they
    are, the default where this CPU multiplies them faster than floats. plain: weights must stay
    nn.Linear's. drafts: it is a draft's, whose bits cost hits and never exactness: without a choice
    of the user it gets few bits where they are fastest, whatever its file has.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    asked = usual if dtype is None else getattr(torch, dtype)
    if device.type == "cuda" or plain or quantize not in (None, "none"):
        return asked, quantize or "none"
    if dtype not in (None, "bfloat16"):
        return asked, "none"  # nothing to choose, so nothing is measured
    here = speeds()
    faster = [name for name in here if here[name] < here.get("float32", math.inf)]
    quickest = min(here, key=here.get, default="none")
    if dtype is None and quantize is None:
        if drafts and quickest in ("int8", "int4"):
            return usual, quickest
        if where.is_file() and "int4" in faster:
            return usual, "stored"
    if dtype is None and "bfloat16" in faster or dtype == "bfloat16" and dtype in here:
        return torch.float32, "bfloat16"  # a CPU computes the rest in float32 as fast
    return asked, "none"


def step_bytes(transformer: Transformer) -> int:
    """Bytes of weights that one decode step reads; of an embedding one row, so nothing, unless it
    is the head as well.
    """
    named = transformer.named_parameters(remove_duplicate=False)
    floats = {id(weight): weight.nbytes for name, weight in named if name != "embed.weight"}
    return sum(floats.values(), sum(getattr(m, "weight_bytes", 0) for m in transformer.modules()))


def check_pair(target: Model, draft: Model) -> None:
    """Refuse a draft whose tokens are not the target's. Paddings of the embeddings may differ."""
    if draft.config.head_tokens:
        return  # trained for this target, which was checked when it was loaded
    if target.tokenizer is None or draft.tokenizer is None:
        if target.config.vocab_size != draft.config.vocab_size:
            raise ValueError(
                f"the target {target.name} has {target.config.vocab_size} tokens and the draft "
                f"{draft.name} {draft.config.vocab_size}: use a draft with the target's vocabulary"
            )
        return
    if difference := vocabulary_difference(target.tokenizer, draft.tokenizer):
        token, ours, theirs = difference
        raise ValueError(
            f"target and draft do not share a vocabulary: token {token} is {ours!r} in "
            f"{target.name} and {theirs!r} in {draft.name}: use a draft with the target's tokenizer"
        )


def fit_memory(
    models: list[tuple[str, Model, int]],
    rows: list[Row],
    batch: int | None,
    k: int,
    kept: int,
    tell,
) -> tuple[int, int]:
    """How many rows are decoded at once, and the tokens of the longest: `batch` rows, or fewer
    where memory does not hold so many; by default all that it holds.

    A row that does not fit by itself is refused, before anything is allocated. Raises ValueError
    where none is left. models: roles, models, numbers of branches. kept: as of row_bytes. tell: is
    told what is taken.
    """
    free = {model.device: available_bytes(model.device) for _, model, _ in models}
    free = {device: found for device, found in free.items() if found is not None}
    for _, model, _ in models:  # static runners are used again, or make room for others
        if model.device in free:
            for runner in model.runners.values():
                free[model.device] += runner.cache.k_LBGSD.nbytes + runner.cache.v_LBGSD.nbytes
    free = {device: FREE_SHARE * found for device, found in free.items()}
    while left := [row for row in rows if row.finish is None]:
        longest = max(left, key=lambda row: row.limit)
        trunk, row_bytes = in_whole_blocks(longest.limit + k + 1), dict.fromkeys(free, 0)
        for _, model, branches in models:
            if model.device in free:
                row_bytes[model.device] += model.row_bytes(trunk, k, branches, kept)
        fits = {device: free[device] / row_bytes[device] for device in free}
        most = min(fits.values(), default=math.inf)
        if most >= 1:
            batch = int(min(batch or len(left), len(left), most))
            for device in fits:
                tell(
                    f"memory on {device}: {batch} rows of {trunk} tokens, "
                    f"{batch * row_bytes[device] / 1e9:.2f} of {free[device] / 1e9:.1f} GB"
                )
            return batch, trunk
        device = min(fits, key=fits.get)
        why = (
            f"a row of {trunk} tokens needs {row_bytes[device] / 1e9:.2f} GB, but {device} has "
            f"{free[device] / FREE_SHARE / 1e9:.2f} GB free, of which it gets {FREE_SHARE:.0%}: "
            "use a shorter prompt or a smaller max_new_tokens"
        )
        for row in left:  # all of that length at once
            if row.limit >= longest.limit:
                row.refuse(why)
    raise ValueError(rows[0].refused)


@dataclass
class Result:
    """What generate() returns: lists with an entry for each prompt, and stats, the object that
    --json prints.
    """

    token_ids: list[list[int]]
    text: list[str | None]
    finish_reason: list[str | None]
    stats: dict


class Engine:
    """A target, perhaps a draft, their tokenizer, and their lanes. Make one with load()."""

    def __init__(self, target: Model, draft: Model | str | None, devices: Devices, warn=None):
        self.target, self.devices, self.ngram = target, devices, draft == NGRAM
        self.draft = draft = None if self.ngram else draft
        self.tokenizer, self.eos = target.tokenizer, target.eos
        self.warn = warn or (lambda text: print(f"warning: {text}", file=sys.stderr))
        self.tell = lambda text: None  # how much memory a run is about to take
        self.seen: dict[tuple, object] = {}  # for --k auto: what runs of a kind have shown
        # What the next turn of a chat may use: runners by role, a row's ids, its draft_read.
        self.previous = {}, [], 0
        if draft is not None:
            check_pair(target, draft)

    def generate(self, prompts: list, keep: bool = False, **settings) -> Result:
        """The completions of a batch of prompts, each a text or a list of token ids.

        settings: as in rows.Settings. keep: a single prompt starts from the KV of the call before
        it, as far as their ids agree (a chat's turns). Raises ValueError with one sentence for
        anything that the user can set right.
        """
        decoding = self.start(prompts, keep, **settings)
        for _ in decoding.rounds():
            pass
        return self.finish(decoding)

    def stream(self, prompt, keep: bool = False, **settings) -> Iterator[str]:
        """The text of one prompt, piece by piece, never half a character."""
        if self.tokenizer is None:
            raise ValueError(
                "the checkpoint has no tokenizer files, wanted some to print text: use generate()"
            )
        decoding = self.start([prompt], keep, **settings)
        for _ in decoding.rounds():
            if piece := decoding.rows[0].piece():
                yield piece
        self.finish(decoding)

    def start(
        self, prompts: list, keep=False, decoding=Decoding, planner=None, numbers=None, **settings
    ) -> Decoding:
        """A generation that is set up and has not begun. Everything that a user can get wrong is
        checked here.

        decoding: a subclass that drafts or predicts in another way (examples/). planner: an object
        with first() and next(done), whose plans stay within the numbers k and fan_out. numbers: the
        rows' own, which name their noise; by default their places in the list.
        """
        self.settings = settings = check_settings(settings)
        config = self.target.config
        rows = make_rows(prompts, settings, self.tokenizer, self.eos, config, numbers)
        mode = settings.mode
        drafts = [self.draft] if self.draft is not None and mode != "ar" else []
        if mode != "ar" and not drafts and (mode == "ssd" or not self.ngram):
            raise ValueError(
                f"mode {mode} needs a draft model: load one with draft=..., or use mode ar"
            )
        most = min(settings.batch or len(rows), len(rows))
        usual, ks, ms = self.planner(settings, most, drafts)
        k = max(ks)
        halves = settings.batch_halves if drafts and most > 1 else "off"
        lanes = self.devices.lanes("ssd" if halves == "on" else mode)
        if lanes[0] is lanes[1]:  # where they take turns on one lane another half gains nothing
            halves = "off"
        models = [("target", self.target, 0)] + [("draft", draft, max(ms)) for draft in drafts]
        if not keep:
            self.previous = {}, [], 0  # its memory is free for this run
        kept = KEPT_CHAINS if settings.coupling != "shared" else 0
        batch, trunk = fit_memory(models, rows, settings.batch, k, kept, self.tell)
        old = self.reuse(rows[0], len(models)) if keep and len(rows) == 1 else {}
        self.previous = {}, [], 0  # this run may overwrite it, and perhaps it never ends
        for row in rows:
            if row.refused:
                self.warn(row.refused)
        left = [row for row in rows if row.finish is None]
        runners = {"draft": None}
        # On the lanes themselves: a GPU's streams would not wait for what another stream allocates.
        for lane, (role, model, m) in zip(lanes, models):
            shape = role, batch, trunk, k, m, config.vocab_size
            runners[role] = lane.start(model.set_up, left, settings, old.get(role), shape).result()
        parts = [range(batch)] + [range(b, b + 1) for b in range(batch) if len(left) > batch > 1]
        if halves != "off":
            from halves import Halves, Quicker

            middle = (batch + 1) // 2
            parts += [range(middle), range(middle, batch)] if batch > 2 else []
            if planner is None:
                ways = {} if halves == "on" else {False: usual}
                planner = Quicker(ways | {True: self.planner(settings, middle, drafts, True)[0]})
            own = decoding is not Decoding
            decoding = type(decoding.__name__, (decoding, Halves), {}) if own else Halves
        shapes = sorted({1, *(1 + k for k in ks)}), [m for m in ms if m], parts
        sides = runners["target"], lanes[0], runners["draft"], lanes[1]
        return decoding(rows, planner or usual, *sides, shapes, self.warn)

    def planner(self, settings: Settings, batch: int, drafts: list[Model], halves=False) -> tuple:
        """The planner of a run, and all the K and M that it may choose. The plan is what makes a
        mode.
        """
        if settings.mode == "ar":
            return SamePlan(Plan(0, 0)), (0,), (0,)
        m = 0
        fallback = "jit" if drafts else "fast"
        models = (self.target, *drafts)
        common = min(model.config.head_tokens or model.config.vocab_size for model in models)
        if settings.mode == "ssd":
            m, fallback = settings.fan_out, settings.fallback
            if m != AUTO and m >= common:
                raise ValueError(
                    f"fan_out is {m}, wanted less than the vocabulary, {common} tokens"
                )
        plan = Plan(settings.k, m, fallback, settings.cut, halves)
        if AUTO not in (plan.k, plan.m):
            return SamePlan(plan), (plan.k,), (plan.m,)
        import auto

        ks, ms = auto.SIZES[any(model.policy.static for model in models)]
        ks = (0, *ks) if plan.k == AUTO else (plan.k,)
        ms = (0, *(m for m in ms if m < common)) if plan.m == AUTO else (plan.m,)
        kind = (
            settings.mode,
            plan,
            batch,
            settings.coupling,
            any(settings.per_row("temperature", None)),
        )
        seen = self.seen.setdefault(kind, auto.Seen())
        return auto.Auto(ks, ms, plan, batch, seen), ks, ms

    def reuse(self, row: Row, models: int) -> dict[str, Runner]:
        """The runners of the previous call by their roles, if their KV holds a beginning of this
        prompt. row.target_read is how many tokens of it they hold.
        """
        runners, ids, draft_read = self.previous
        if len(runners) != models:
            return {}
        same = min(len(ids), len(row.ids)) - 1  # the last token has no KV
        row.target_read = next((i for i in range(same) if ids[i] != row.ids[i]), same)
        row.draft_read = min(draft_read, row.target_read)
        return runners

    def finish(self, decoding: Decoding) -> Result:
        """The result of a generation, complete or interrupted."""
        rows, figures = decoding.all_rows, decoding.figures
        figures.end = figures.end or time.perf_counter()
        if decoding.lost:
            self.draft.runners.clear()  # what hangs may still write to their buffers
        # A prompt that was not read whole leaves no KV worth keeping.
        elif len(rows) == 1 and figures.rounds and decoding.is_last():
            runners = {"target": decoding.target}
            if decoding.draft is not None:
                runners["draft"] = decoding.draft
            self.previous = runners, list(rows[0].ids), rows[0].draft_read
        # Before the bandwidth is measured, which takes memory of its own.
        peak = peak_memory_gb(decoding.target_lane.device)
        lost = self.target.transformer.group.lost  # then the lane may wait for ever
        bandwidth = None if lost else self.devices.bandwidth(decoding.target_lane)
        models = {"target": self.target.name, "draft": NGRAM, "draft_quantize": None}
        models |= self.target.numbers() | {"peak_memory_gb": peak}
        if self.draft:
            models |= {"draft": self.draft.name, "draft_quantize": self.draft.numbers()["quantize"]}
        floor_s = bandwidth and self.target.step_bytes / bandwidth
        stats = run_stats(decoding, self.settings, models, floor_s)
        return Result(stats["token_ids"], stats["text"], stats["finish_reason"], stats)


def check_settings(given: dict) -> Settings:
    """Settings from keywords. ValueError names one that does not exist, and the nearest."""
    known = [f.name for f in fields(Settings)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
            raise ValueError(f"there is no setting {name!r}: {hint}")
    return Settings(**given)


def load(
    target: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    draft_device: str | None = None,
    dtype: str | None = None,
    compile: bool | None = None,
    quantize: str | None = None,
    draft_quantize: str | None = None,
) -> Engine:
    """An engine with a pair of checkpoints (folders, .gguf files, hub ids or inflate:SHAPE:FOLDER)
    on their devices.

    target None: the default model and the draft that was trained for it. draft "ngram": not a
    model; mode "sd" proposes what followed the same n-gram earlier in the text. device,
    draft_device: "cpu", "cpu:0-1", "cuda:1"; by default what suits the mode: on a CPU all cores, in
    SSD the last one for the draft. dtype: "float32", "bfloat16", "float16", "float64"; by default
    bfloat16 on CUDA, and on a CPU what is faster there, float32 or bfloat16. compile: by default
    only on CUDA. quantize, draft_quantize: "none", "int8", "int4"; by default, without dtype and
    compile, a GGUF file's few bits stay as they are where a CPU is fast with them, and a draft has
    what is fastest there. Raises ValueError with one sentence for anything that the user can set
    right.
    """
    for name, bits in (("quantize", quantize), ("draft_quantize", draft_quantize)):
        if bits is not None and bits not in FORMATS:
            raise ValueError(f"{name} is {bits!r}, wanted one of {', '.join(FORMATS)}")
    flags = {"dtype": dtype, "compile": compile, "quantize": quantize}
    group, device, draft_device = join(target, device, draft_device, flags)
    if target is None:
        target = default_target()
        draft = draft or DEFAULT_DRAFT
    devices = Devices(device, draft_device)
    whole = target, devices.target, dtype, compile, None, quantize, group
    if group.rank > 0:
        serve(group, lambda: Model.load(*whole), devices.lanes("ar")[0])
    loaded = Model.load(*whole)
    group.serving = True
    if draft not in (None, NGRAM):
        draft = Model.load(draft, devices.draft, dtype, compile, loaded, draft_quantize)
    engine = Engine(loaded, draft, devices)
    for device, bits in ((devices.target, quantize), (devices.draft, draft_quantize)):
        few = device.type == "cpu" and bits in ("int8", "int4")  # else nothing need be measured
        if few and speeds().get(bits, 0.0) > speeds().get("float32", math.inf):
            engine.warn(f"this CPU has no instructions for {bits}, which is slower than float32")
    models = [model for model in (loaded, engine.draft) if model is not None]
    few = any(m.device.type == "cpu" and m.bits in ("int8", "int4", "stored") for m in models)
    if few and (why := few_bits_problem()):
        engine.warn(f"{why}: PyTorch's own operators are used for few bits, which are slower")
    return engine
