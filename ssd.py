"""Speculative speculative decoding: one loop for plain decoding (AR), speculative decoding (SD), and SSD.

Knows: rows, proposals, outcomes, and who waits for whom. Does not know: how a pass computes (steps.py), where it runs
(runtime.py), where the budget goes (fanout.py). Read first: Decoding.rounds and the two methods below it, which are
the whole method on one screen. Read next: steps.py.

    AR   feed the pending token, draw the next
    SD   the draft proposes K tokens, the target verifies them in one pass; they take turns
    SSD  while the target verifies, the draft prepares a chain for every likely outcome; the next proposal is a look-up

Source: Kumar, Dao, May, "Speculative Speculative Decoding", ICLR 2026 (arXiv 2603.03251).
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cache import SpeculationCache
from pair import Model, check_memory, check_pair
from report import run_stats
from rows import Row, make_rows
from runtime import Devices, Lane, Pending, peak_memory_gb
from sampling import CHAIN, FIXED, NONE
from settings import Settings
from speed import Figures
from steps import Feed, Runner
from tuner import PLAIN, TURNS, Times, Tuner

NGRAM = "ngram"  # a draft that is no model
NO_LESSON = ((), None, None, None, None)  # live rows, what was tried, accepted, following, chains
# How long the target waits for a draft that should have answered: this, or so many times the draft's slowest job yet.
PATIENCE_S, PATIENCE_TIMES = 2.0, 20
# The same for its first passes, which may still fetch weights from memory or disk, or compile.
PREFILL_PATIENCE_S, WARM_UP_PATIENCE_S = 10.0, 600.0
BEGIN_IF = 0.75  # so much of a chain step, at least, must fit before the verdict is expected: times vary


@dataclass
class Proposal:
    """What the next verification tries, per row: draft tokens, their kind, and the log q they were drawn from."""

    tokens: list[list[int]]
    kind: list[int]
    logq: list[list[torch.Tensor] | None]

    def put(self, row: int, kind: int, tokens: list[int], logq=None) -> None:
        if tokens:
            self.tokens[row], self.kind[row], self.logq[row] = tokens, kind, logq


class Decoding:
    """One generation: its rows, the target and the draft on their lanes, and the rounds that advance them."""

    def __init__(self, rows: list[Row], settings: Settings, target: Runner, target_lane: Lane,
                 draft: Runner | None, draft_lane: Lane | None, tuner: Tuner, warn):  # fmt: skip
        self.rows, self.settings, self.mode, self.warn = rows, settings, settings.mode, warn
        self.target, self.draft, self.target_lane, self.draft_lane = target, draft, target_lane, draft_lane
        self.tuner, self.fan_out = tuner, tuner.fan_out()
        self.k, self.fan_out.budget = tuner.k, tuner.budget
        self.figures, self.lesson, self.slowest_draft_s = Figures(rows, settings), NO_LESSON, 0.0

    # ---- the loop

    def rounds(self) -> Iterator[None]:
        """Play rounds until every row has ended. Yields once a round, while the next one is already running."""
        self.prefill()
        proposal, chains = self.nothing(), None
        while self.live():
            feed = self.feed(proposal)
            verdict = self.target_lane.start("verify", self.target.verify, feed, proposal.kind, proposal.logq)
            chains = self.start_preparing(feed, proposal, verdict, chains)
            yield  # the caller prints the last round's text while this one runs
            self.learn()
            accepted, following = verdict.result()
            self.emit(proposal, accepted, following, verdict)
            if chains:
                proposal = self.take(chains, proposal, accepted, following)
            elif self.mode != "ar":
                proposal = self.draft_now(self.live()) if self.draft else self.guess(self.live())
            else:
                proposal = self.nothing()
        self.figures.end = time.perf_counter()
        yield

    def prepare(self, chains: SpeculationCache, feed: Feed, fan_out, weigh, verdict: Pending) -> None:
        """The draft's side of a round, on its own lane: extend, fork, then chains until the verdict is in."""
        with chains.filling():
            with self.draft_lane.span("extend"):
                scores = self.draft.extend(feed)
            with self.draft_lane.span("fork"):
                forked = self.draft.fork(scores, feed, fan_out)
                chains.fork(forked)
            branches, depths = forked.tokens, forked.depths
            for step, top in enumerate(weigh):
                if step > 0 and self.settings.cut and verdict.done(within=BEGIN_IF * self.draft_lane.last_s):
                    break  # cut by the clock alone: no token's value decides whether it is drawn
                with self.draft_lane.span("chain step"):
                    branches, logq = self.draft.chain_step(feed, branches, depths, step, top)
                    chains.append(branches, logq)

    def take(self, chains: SpeculationCache, tried: Proposal, accepted, following) -> Proposal:
        """The look-up: rows that hit get the chain prepared for their outcome, rows that miss fall back."""
        proposal, missed, live = self.nothing(), [], self.live()
        if live and not self.settings.cut:
            self.await_draft(chains.work, self.patience())
        if not live or self.mode != "ssd" or not self.answered(chains.forked, chains):
            return proposal
        begin = time.perf_counter()
        branch = {b: chains.look_up(b, accepted[b], following[b]) for b in live}
        if any(found is not None for found in branch.values()) and not self.answered(chains.ready, chains):
            return proposal
        for b in live:
            if branch[b] is None:
                missed.append(b)
            else:
                proposal.put(b, CHAIN, *chains.chain(b, branch[b], self.rows[b].room(self.k)))
        self.figures.looked_up(begin, len(live), missed, len(chains.steps))
        self.lesson = (live, tried, accepted, following, chains)
        return self.fall_back(proposal, missed) if missed else proposal

    def fall_back(self, proposal: Proposal, missed: list[int]) -> Proposal:
        """Rows that missed: draft now and wait (jit), or guess from their own text (fast)."""
        how = self.settings.fallback
        guess = self.guess(missed, proposal) if how != "jit" else proposal
        if how == "auto":
            lengths = [len(guess.tokens[b]) for b in missed]
            how = "jit" if self.figures.prefers_jit(lengths, self.tuner.k_miss) else "fast"
        return self.draft_now(missed, proposal) if how == "jit" else guess

    def guess(self, wanted: list[int], proposal: Proposal | None = None) -> Proposal:
        """A fixed proposal for the wanted rows from their own text: what followed the same n-gram before, or none."""
        proposal = self.nothing() if proposal is None else proposal
        for b in wanted:
            proposal.put(b, FIXED, self.rows[b].guess(self.rows[b].room(self.k)))
        return proposal

    # ---- the steps of a round

    def nothing(self) -> Proposal:
        return Proposal([[] for _ in self.rows], [NONE] * len(self.rows), [None] * len(self.rows))

    def live(self) -> list[int]:
        return [b for b, row in enumerate(self.rows) if row.finish is None]

    def prefill(self) -> None:
        """Both models read the prompts, all but their last token, at the same time."""
        self.warm_up()
        self.figures.begin = time.perf_counter()
        ids, kept = [row.ids[row.kept : -1] for row in self.rows], [row.kept for row in self.rows]
        reading = self.target_lane.start("prefill", self.target.prefill, ids, kept)
        drafting = self.mode != "ar" and self.draft and self.draft_lane.start("prefill", self.draft.prefill, ids, kept)
        reading.result()
        if drafting:
            self.await_draft(drafting, PREFILL_PATIENCE_S + PATIENCE_TIMES * (reading.end - reading.begin))

    def warm_up(self) -> None:
        """Compile and capture what is not yet, one lane after the other, and tell how long it took."""
        began, lengths = time.perf_counter(), [1 + k for k in self.tuner.ks] if self.mode != "ar" else [1]
        fresh = self.target_lane.start("warm-up", self.target.warm_up, "target", lengths).result()
        if self.draft is not None:
            work = self.draft_lane.start("warm-up", self.draft.warm_up, "draft", lengths, self.tuner.budgets)
            fresh |= bool(self.await_draft(work, WARM_UP_PATIENCE_S))
        if fresh:
            self.warn(f"compiled in {time.perf_counter() - began:.1f} s; the same shapes will not compile again")
        if self.mode != "ar":
            self.tuner.calibrate(self)
        self.slowest_draft_s = 0.0  # compiling and calibrating say nothing about later jobs

    def learn(self) -> None:
        """The fan-out from the last look-up's ranks, K and M from the speed model: while the target verifies."""
        (live, tried, accepted, following, chains), self.lesson = self.lesson, NO_LESSON
        for b in live:
            lesson = chains.lesson(b, accepted[b], following[b]) if chains else (None, 0)
            self.fan_out.observe(tried.kind[b], len(tried.tokens[b]), accepted[b], *lesson)
        self.tuner.revise(self.fan_out, self.figures)
        self.k, self.fan_out.budget = self.tuner.k, self.tuner.budget

    def feed(self, proposal: Proposal) -> Feed:
        live, V = set(self.live()), self.target.model.config.vocab_size
        if wrong := [d for tokens in proposal.tokens for d in tokens if not 0 <= d < V]:
            self.lose_draft(f"it proposed the token id {wrong[0]}")
            proposal = self.nothing()
        longest = max(len(tokens) for tokens in proposal.tokens)
        if self.target.policy.static and self.mode != "ar":
            longest = min(k for k in self.tuner.ks if k >= max(longest, self.k))
        T = 1 + longest
        feed = Feed([], [], [])
        for b, row in enumerate(self.rows):
            fed = [row.ids[-1], *proposal.tokens[b]] if b in live else []
            feed.tokens.append(fed + [0] * (T - len(fed)))
            feed.start.append(len(row.ids) - 1 if fed else 0)
            feed.count.append(len(fed))
        return feed

    def start_preparing(self, feed: Feed, proposal: Proposal, verdict: Pending, before) -> SpeculationCache | None:
        if self.mode != "ssd" or self.fan_out.budget == TURNS:
            if self.mode == "ssd" and before:  # what comes from the cache, the draft has not read in its place yet
                self.draft_lane.start("catch up", self.draft.extend, feed)
            return None
        chains, verdict.usual_s = SpeculationCache(), self.figures.usual_verify()
        fan_out = self.fan_out.plan(proposal.kind, [len(d) for d in proposal.tokens])
        chains.work = self.draft_lane.start("prepare", self.prepare, chains, feed, fan_out, self.weigh(self.k), verdict)
        return chains

    def weigh(self, k: int) -> list[int | None]:
        """Saguaro: how many of the draft's top tokens to weigh down at each place of a chain (None: off)."""
        if self.settings.saguaro_c == 1 or self.fan_out.budget == TURNS:
            return [None] * k
        return [F + 1 for F in self.fan_out.lists(CHAIN, k)[:k]]

    def emit(self, proposal: Proposal, accepted: list[int], following: list[int], verdict: Pending) -> None:
        """Append d_1..d_j and r' to every live row, at once; what lies behind an end of text is dropped."""
        live = self.live()
        self.figures.prefilled = self.figures.prefilled or time.perf_counter()
        lengths = [len(d) for d in proposal.tokens]
        self.figures.verified(proposal.kind, lengths, accepted, live, verdict, (self.k, self.fan_out.budget))
        self.lesson = (live, proposal, accepted, following, None)
        for b in live:
            for token in (*proposal.tokens[b][: accepted[b]], following[b]):
                if self.rows[b].finish is None:
                    self.rows[b].push(token)

    def draft_now(self, wanted: list[int], proposal: Proposal | None = None) -> Proposal:
        """The draft decodes a chain for the wanted rows, and the target waits for it."""
        proposal = self.nothing() if proposal is None else proposal
        weigh = self.weigh(self.tuner.k_miss)
        if wanted and weigh and (work := self.draft_lane.start("draft", self.decode_now, wanted, weigh)):
            drafted = self.await_draft(work, self.patience())
            for b, (tokens, logq) in (drafted or {}).items():
                proposal.put(b, CHAIN, tokens, logq)
            self.figures.jit_s.append(work.end - work.begin)
        return proposal

    def decode_now(self, wanted: list[int], weigh) -> dict[int, tuple[list[int], list | None]]:
        """On the draft's lane: ordinary decoding of up to K tokens. The last two tokens are fed first, because after a
        wholly accepted proposal the draft has not read its own last token yet."""
        rows, k = self.rows, len(weigh)
        out = {b: ([], None if self.settings.coupling == "shared" else []) for b in wanted}
        feed = Feed([r.ids[-2:] for r in rows], [len(r.ids) - 2 for r in rows], [2] * len(rows))
        for b in set(range(len(rows))) - set(wanted):
            feed.start[b] = feed.count[b] = 0
        for step in range(max(rows[b].room(k) for b in wanted)):
            tokens, logq_BV = self.draft.decode(feed, weigh[step])
            for b in wanted:
                out[b][0].append(tokens[b])
                if logq_BV is not None:
                    out[b][1].append(logq_BV[b])
            start = [s + c for s, c in zip(feed.start, feed.count)]
            feed = Feed([[token] for token in tokens], start, [min(c, 1) for c in feed.count])
        return {b: (tokens[: rows[b].room(k)], logq) for b, (tokens, logq) in out.items()}

    # ---- a draft that fails: the target goes on alone and says so once

    def patience(self) -> float:
        return max(PATIENCE_S, PATIENCE_TIMES * self.slowest_draft_s)

    def answered(self, event, chains: SpeculationCache) -> bool:
        if not event.wait(self.patience()):
            self.lose_draft(f"it did not answer within {self.patience():.3g} s")
        elif error := chains.error or self.draft_lane.error:  # a chain step of the round before may have failed late
            self.lose_draft(str(error) or type(error).__name__)
        return self.mode == "ssd"

    def await_draft(self, work: Pending, limit_s: float):
        try:
            value = work.result(limit_s)
            self.slowest_draft_s = max(self.slowest_draft_s, work.end - work.begin)
            return value
        except Exception as error:
            self.lose_draft(str(error) or type(error).__name__)

    def lose_draft(self, why: str) -> None:
        if self.mode != "ar":
            self.mode = "ar"
            self.draft_lane.broken = True
            if self.target_lane is self.draft_lane:  # one lane for both: do not wait behind a draft that hangs
                self.target_lane = Lane(self.draft_lane.spec, "target")
            self.warn(f"the draft failed ({why}): the target goes on alone, the text stays right")


# ---- the engine around it


@dataclass
class Result:
    """What generate() returns, a list entry per prompt; stats is the terminal contract's JSON object."""

    token_ids: list[list[int]]
    text: list[str | None]
    finish_reason: list[str | None]
    stats: dict


class Engine:
    """A target, perhaps a draft, their tokenizer, and the lanes they run on. Make one with load()."""

    def __init__(self, target: Model, draft: Model | str | None, devices: Devices, warn=None):
        self.target, self.devices, self.ngram = target, devices, draft == NGRAM
        self.draft = draft = None if self.ngram else draft
        self.tokenizer, self.eos = target.tokenizer, target.eos
        self.warn = warn or (lambda text: print(f"warning: {text}", file=sys.stderr))
        self.times: dict[tuple, Times] = {}  # measured for --k auto, by kind of run
        self.kept: tuple | None = None  # (runners, ids) of the last generation, for the next turn of a chat
        if draft is not None:
            check_pair(target, draft)

    def generate(self, prompts: list, keep: bool = False, **settings) -> Result:
        """Complete a batch of prompts, each a text or a list of token ids; settings as in settings.Settings.

        keep: a single prompt starts from the KV of the call before it, as far as their ids agree (a chat's turns).
        Raises ValueError with one sentence for anything the user can set right.
        """
        decoding = self.start(prompts, keep, **settings)
        for _ in decoding.rounds():
            pass
        return self.finish(decoding)

    def stream(self, prompt, keep: bool = False, **settings) -> Iterator[str]:
        """The text of one prompt, piece by piece, never half a character."""
        if self.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer files, wanted some to print text: use generate()")
        decoding = self.start([prompt], keep, **settings)
        for _ in decoding.rounds():
            if piece := decoding.rows[0].piece():
                yield piece
        self.finish(decoding)

    def start(self, prompts: list, keep: bool = False, **settings) -> Decoding:
        """Check everything a user can get wrong, allocate the KV caches, and set up one generation."""
        settings = Settings(**settings)
        rows = make_rows(prompts, settings, self.tokenizer, self.eos, self.target.config)
        mode, V = settings.mode, self.target.config.vocab_size
        drafts = [self.draft] if self.draft is not None and mode != "ar" else []
        if mode != "ar" and not drafts and (mode == "ssd" or not self.ngram):
            raise ValueError(f"mode {mode} needs a draft model: load one with draft=..., or use mode ar")
        tuner = Tuner(settings, len(rows), [self.target, *drafts], self.times)
        target_lane, draft_lane = self.devices.lanes(mode)
        k, M = max(tuner.ks) if mode != "ar" else 0, max(tuner.budgets)
        longest = max(row.limit for row in rows) + k + 1
        models = [(self.target, 0)] + [(draft, M if mode == "ssd" else 0) for draft in drafts]
        check_memory(models, len(rows), longest, k)
        old = self.reuse(rows[0], len(models)) if keep and len(rows) == 1 else [None] * len(models)
        # On the lanes themselves: a GPU's streams would not wait for what another stream allocates and zeroes.
        lanes = zip((target_lane, draft_lane), models, old)
        runners = [
            lane.start("set up", model.set_up, rows, settings, longest, k, branches, V, before).result()
            for lane, (model, branches), before in lanes
        ]
        runners += [None]  # where there is no draft model
        return Decoding(rows, settings, runners[0], target_lane, runners[1], draft_lane, tuner, self.warn)

    def reuse(self, row: Row, models: int) -> list[Runner | None]:
        """The runners of the previous call, if their KV holds a beginning of this prompt: row.kept tokens of it."""
        if self.kept is None or len(self.kept[0]) != models:
            return [None] * models
        old, ids = self.kept
        # The pending token has no KV, and after SD the draft may not have read the token before it.
        same = min(len(ids) - 2, len(row.ids) - 1)
        row.kept = max(0, next((i for i in range(same) if ids[i] != row.ids[i]), same))
        return old

    def finish(self, decoding: Decoding) -> Result:
        """The result of a generation, complete or interrupted."""
        rows, settings, figures = decoding.rows, decoding.settings, decoding.figures
        self.kept = None
        decoding.tuner.remember(decoding.fan_out, figures.rate())
        if self.draft is not None and decoding.mode != settings.mode:
            self.draft.runners.clear()  # what hangs may still write to their buffers
        # A draft that failed, or a prompt that was interrupted while it was read, leaves no KV worth keeping.
        if len(rows) == 1 and decoding.mode == settings.mode and figures.prefilled:
            runners = [decoding.target, *([decoding.draft] if decoding.draft else [])]
            self.kept = (runners, rows[0].ids[: len(rows[0].ids) - figures.emitted_with(PLAIN)])
        figures.end = figures.end or time.perf_counter()
        draft = self.draft.name if decoding.draft else NGRAM if settings.mode == "sd" else None
        stats = {"target": self.target.name, "draft": draft, "dtype": str(self.target.dtype).split(".")[1]}
        stats |= run_stats(decoding, self.target.step_bytes / self.devices.bandwidth(decoding.target_lane))
        stats["peak_memory_gb"] = peak_memory_gb(decoding.target_lane.device)
        return Result(stats["token_ids"], stats["text"], stats["finish_reason"], stats)


def load(target: str, draft: str | None = None, device: str | None = None, draft_device: str | None = None,
         dtype: str | None = None, compile: bool | None = None) -> Engine:  # fmt: skip
    """Load a pair of checkpoints (folders, hub ids or inflate:SHAPE:FOLDER) onto their devices.

    draft "ngram": no model; mode "sd" proposes what followed the same n-gram earlier in the text.
    device, draft_device: "cpu", "cpu:0-1", "cuda:1"; by default what measures best for the mode on this machine.
    dtype: "float32", "bfloat16", "float16", "float64"; by default float32 on a CPU and bfloat16 on CUDA.
    compile: by default only on CUDA. Raises ValueError with one sentence for anything the user can set right.
    """
    devices = Devices(device, draft_device)
    return Engine(
        Model.load(target, devices.target, dtype, compile),
        draft if draft in (None, NGRAM) else Model.load(draft, devices.draft, dtype, compile),
        devices,
    )
