"""One loop for plain decoding (AR), speculative decoding (SD), and speculative speculative decoding
(SSD).

Knows: plans, proposals, outcomes, and who waits for whom. Does not know: how a pass computes
(steps.py), where it runs (runtime.py), how K and M are chosen (auto.py). The whole
method is Decoding.play, propose and prepare. Read next: engine.py.

    AR   feed the pending token, draw the next
    SD   the draft proposes K tokens, the target verifies them in one pass; they take turns
    SSD  while the target verifies, the draft prepares a chain for each of a row's M likeliest
         outcomes; the next proposal is a look-up (a row hits if its outcome is there, else misses)

r, the pending token, is the last token of the text; the target has not read it yet. d_1 .. d_L,
L <= K, is the proposal. The outcome of a round is (j, r'): j draft tokens are accepted, and the
target's own next token r', the bonus token, follows them (elsewhere called the correction
where j < L). A round emits d_1 .. d_j and r', so 1 to K + 1 tokens, and r' is the next r. The
verdict is the target's answer, the outcomes of all rows; in the code, the future of it.

The coupling says when a draft token is accepted. `shared`: if the target draws the same token with
the same noise, a known function of seed, row, position and token. Then every token of the text is
argmax(log p + noise) of the target, whoever proposed it, and the text is the same in every mode
(steps.decide). `maximal` and `independent`: by the ratio p / q of the target's and the draft's
probabilities (sampling.accept_exact). To foresee outcomes the draft looks at the noise that will
draw the bonus token, except under `independent`.

A lane is a thread that owns a device: `start` queues work there and returns its future at once. Two
models on one device may share a lane; then they take turns. A row is a sequence, and its place is
its seat in the batch. A branch is an outcome that the draft prepares for, and its chain is the
draft tokens after it.

Source: Kumar, Dao, May, "Speculative Speculative Decoding", ICLR 2026 (arXiv 2603.03251).
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from cache import SpeculationCache
from figures import Drafting, Figures, Round
from rows import Row, Seats
from runtime import PATIENCE_TIMES, DraftLost, Lane, Work
from sampling import CHAIN, FIXED, NONE, Foresight
from steps import PREFILL_CHUNKS, Feed, Fork, Runner

# How long the target waits for the draft's first passes, in seconds: those may still load weights
# from disk, or compile. Later the limit grows with the slowest work so far.
PREFILL_PATIENCE_S, WARM_UP_PATIENCE_S = 10.0, 600.0
# A warm-up of more than NOTICED_S seconds is reported. COMPILES_S: how long a kernel that compiles
# in the middle of a round may take; the draft's time limit starts there.
NOTICED_S, COMPILES_S = 0.5, 3.0
# Draft tokens, and for each the LogQ that it was drawn from (under `shared` None).
Chain = tuple[list[int], list]


@dataclass(frozen=True)
class Plan:
    """The settings of a round. AR is k = 0 and m = 0, SD is k > 0 and m = 0, SSD is both > 0.

    k: the most draft tokens in a proposal. m: how many outcomes of each row the draft prepares for
    while the target verifies; with 0 it prepares none, and every row misses. fallback is for rows
    that miss: "jit" drafts for them now; "fast" repeats what followed the same n-gram in the row's
    own text; "auto" is "jit" if every row missed, else "fast", so that rows that hit need not wait.
    With m = 0 "auto" therefore drafts in every round: that is SD. Without a draft both are "fast".
    halves: while half of the rows are being verified, the draft works for the other half (halves.py
    reads it).

    cut: chains may stop before K tokens, so that the next round need not wait for them once the
    verdict is in. The draft always makes the first step. It begins another one only if at least
    half of it should be done before the verdict, going by the time that such work has taken so far,
    and if no other work is queued (Lane.has_time). If a row hit, the look-up waits for the step
    that was begun last; without cut, for all K steps. Neither the clock nor the queue depends on
    tokens, so the length of a chain says nothing about what is in it: each token is drawn from the
    same q as in a whole chain, and the acceptance rule remains exact.
    """

    k: int
    m: int
    fallback: str = "auto"
    cut: bool = True
    halves: bool = False


class SamePlan:
    """A planner that never changes its mind. auto.Auto is one that learns from every round.

    The plan of the next round is made from earlier ones, while the target verifies: K and M must
    not depend on what this round draws.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def first(self) -> Plan:
        return self.plan

    def next(self, last: Round) -> Plan:
        return self.plan


class Proposal:
    """What the next verification tries, by place: draft tokens, their kind (NONE, CHAIN or FIXED,
    as in sampling.py), and their LogQ.
    """

    def __init__(self, places: int):
        self.tokens: list[list[int]] = [[] for _ in range(places)]
        self.kind, self.logq = [NONE] * places, [None] * places

    def put(self, place: int, kind: int, tokens: list[int], logq: list | None = None) -> None:
        if tokens:
            self.tokens[place], self.kind[place], self.logq[place] = tokens, kind, logq


class Decoding:
    """One generation: its rows, the target and the draft on their lanes, and the rounds that
    advance them.

    To draft differently, write a subclass in a file of your own and hand it to Engine.generate as
    `decoding=`, like those in examples/. No engine file needs to change. Override

        prepare    what the draft does while the target verifies: draft.prefill(*skipped) and
                   draft.extend(feed) if there is a draft, chains.fork(tokens, depths, chance), then
                   once a step chains.append(tokens, logq), where tokens[place][branch] is an id,
                   and chains.settle() at the end
        decode     what the draft does while the target waits: for the rows that missed, a list of
                   `most` pairs (tokens by place, LogQ)
        predict    which outcomes are prepared for
        draft_now  which rows that missed are drafted for. It marks all drafted tokens but the last
                   as read by the draft: override it if your decode does not feed them, or if
                   self.draft, a Runner or None, is None: then it drafts nothing

    For one pass that proposes K tokens, write a method of the subclass that calls your own model,
    and call it in prepare and decode, where there is a loop of steps now; append the K tokens of
    all branches one position after the other. Draw with the TOKEN noise of each position
    (sampling.noisy, with self.draft.params): under `shared` a token is accepted if the target draws
    it too, and the LogQ is None. Under the other couplings each token needs the log q that it was
    drawn from (steps.LogQ), and neither the length of a chain nor the choice of outcomes for any j
    may depend on how later tokens were drawn (sampling.share_out). Verification asks for no more,
    so the text stays exact.
    """

    def __init__(
        self,
        rows: list[Row],
        planner,
        target: Runner,
        target_lane: Lane,
        draft: Runner | None,
        draft_lane: Lane,
        shapes: tuple,
        warn,
    ):
        """rows: in the order of their prompts. Up to target.batch of them are decoded at once,
        each in a place of the batch; the rest wait. shapes: what static steps are compiled for
        (Runner.warm_up).
        """
        self.all_rows, self.seats, self.reading = rows, Seats(rows, target.batch), []
        self.rows = self.seats.rows  # by place
        self.planner, self.shapes, self.warn = planner, shapes, warn
        self.target, self.target_lane = target, target_lane
        self.draft, self.draft_lane = draft, draft_lane
        self.figures, self.foresight, self.lost = Figures(rows), Foresight(), False
        self.run_number = target.run_number

    # ---- the method

    def rounds(self) -> Iterator[None]:
        """Play until every row has ended. Yields while each verification runs, and at the end."""
        self.prefill()
        self.plan = self.planner.first()
        yield from self.play(range(len(self.rows)), Proposal(len(self.rows)))
        self.figures.end = time.perf_counter()
        yield

    def play(self, places: range, proposal: Proposal) -> Generator[None, None, Proposal]:
        """The rounds of the rows in these places, from `proposal` on. Returns the final one."""
        while live := self.seated(places):  # rows that wait take the places of rows that ended
            plan, feed, previous = self.plan, self.feed(live, proposal), self.figures.last
            verdict = self.target_lane.start(self.target.verify, feed, proposal.kind, proposal.logq)
            chains = SpeculationCache(self.draft_lane)  # for this round's outcomes
            if plan.m > 0:  # else the draft idles until the verdict, and every row misses
                job = (self.prepare, chains, feed, self.take_skipped(feed), plan, verdict)
                chains.filled_by(self.draft_lane.start(*job))
            yield  # the caller prints the text of the previous round
            ahead = self.planner.next(previous) if previous else self.planner.first()
            accepted, bonus = verdict.result()  # waits for the target
            self.emit(live, proposal, accepted, bonus)
            played = self.figures.verified(plan, proposal, live, accepted, verdict)
            try:
                proposal, self.plan = self.propose(chains, accepted, bonus, ahead, played), ahead
            except DraftLost as lost:  # the tokens that this round emitted stay
                proposal = self.go_on_alone(lost)
        return proposal

    def propose(self, chains, accepted, bonus, ahead: Plan, played: Round) -> Proposal:
        """What the next round tries, under its plan `ahead`; for rows that miss see Plan.fallback.

        The key of `chains` is (place, accepted, bonus); a look-up gives the Chain drafted for it.
        """
        proposal, live = Proposal(len(self.rows)), self.live(played.live)  # some may have ended
        hits = chains.look_up(live, accepted, bonus)  # waits for the fork; on a hit, for the steps
        missed = [b for b in live if b not in hits]
        self.learn(played, chains, hits, missed)
        jit = ahead.fallback == "jit" or (ahead.fallback == "auto" and not hits)
        chain_of = hits | (self.draft_now(missed, ahead, played) if missed and jit else {})
        for b in live:
            room = self.rows[b].room(ahead.k)  # at most k, less at the end of a text
            if b in chain_of:
                proposal.put(b, CHAIN, *self.checked(*chain_of[b], room))
            else:
                proposal.put(b, FIXED, self.rows[b].guess(room))  # drawn from no q
        return proposal

    def prepare(self, chains, feed: Feed, skipped, plan: Plan, verdict: Work) -> None:
        """The draft's side of a round, on its own lane: M outcomes, then a chain after each."""
        draft, lane = self.draft, self.draft_lane
        draft.prefill(*skipped)  # usually nothing: see take_skipped
        with lane.span("extend"):  # read the proposal into the KV cache, score what may follow
            scores = draft.extend(feed)
        with lane.span("fork"):  # the M likeliest outcomes: r' (tokens) and j (depths)
            tokens, depths, chance = self.predict(scores, feed, plan)
            chains.fork(tokens, depths, chance)
        for step in range(plan.k):
            if self.figures.end or step > 0 and plan.cut and not lane.has_time(verdict):
                break  # by clock and queue alone, never by what was drawn; or the run is over
            with lane.span("chain step"):
                tokens, logq = draft.chain_step(feed, tokens, depths, step, saguaro_top(plan))
                chains.append(tokens, logq)
        chains.settle()  # a GPU's step has only been launched: wait for the last one's tokens

    # ---- the steps of a round

    def live(self, places=None) -> list[int]:
        """Those of these places (default: all) whose prompt has been read and whose row has not
        ended.
        """
        return self.seats.live(range(len(self.rows)) if places is None else places)

    def seated(self, places: range) -> list[int]:
        """Seat waiting rows where rows have ended, let both models read their prompts, and return
        the live places.

        A failure of the target is raised before the next round, a failure of the draft when the
        draft is next asked for something.
        """
        if not self.is_last():
            raise RuntimeError("another text was begun with this engine: end one before the next")
        for reading in self.reading:
            reading.result()  # a lane works in order: this ended before the last verification
        self.reading = []
        for method, *args in self.seats.joining(places):  # method: "seat" or "prefill"
            self.reading.append(self.target_lane.start(getattr(self.target, method), *args))
            if self.draft is not None:
                drafting = self.draft_lane.start(getattr(self.draft, method), *args)
                if self.draft_lane is self.target_lane:  # the next verification has no time limit
                    self.await_reading(self.reading[-1], drafting)
                else:  # allow its next answer the time of a long chunk
                    slowest_s = PREFILL_PATIENCE_S / PATIENCE_TIMES
                    self.draft_lane.slowest_s = max(self.draft_lane.slowest_s, slowest_s)
            if len(self.reading) > 2 and not self.live():  # Ctrl-C must wait for few of them
                self.reading.pop(0).result()
        return self.live(places)

    def feed(self, live: list[int], proposal: Proposal) -> Feed:
        """[r, d_1 .. d_L] of each live row, padded to the longest, or to the next length that both
        models are compiled for.
        """
        fed, start = [[] for _ in self.rows], [0 for _ in self.rows]
        for b in live:
            ids = self.rows[b].ids
            fed[b], start[b] = [ids[-1], *proposal.tokens[b]], len(ids) - 1
        T = max(map(len, fed))
        for runner in filter(None, (self.target, self.draft)):
            T = runner.fits(T)
        padded = [tokens + [0] * (T - len(tokens)) for tokens in fed]
        return Feed(padded, start, list(map(len, fed)))

    def take_skipped(self, feed: Feed) -> tuple[list[list[int]], list[int]]:
        """The ids that the draft has skipped and must read before `feed`, and the position of the
        first, by place. It marks these ids and those of `feed` as read: call it once for each feed
        that the draft reads.

        A draft that was left out of some rounds has skipped all of theirs. And where a proposal was
        drafted while the target waited, its last token was drawn and never fed: with m = 0 that
        token is skipped if it is accepted.
        """
        begins = [min(row.draft_read, start) for row, start in zip(self.rows, feed.start)]
        ids = [row.ids[known:start] for row, known, start in zip(self.rows, begins, feed.start)]
        for row, start, count in zip(self.rows, feed.start, feed.count):
            row.draft_read = max(row.draft_read, start + count)
        return ids, begins

    def emit(self, live, proposal: Proposal, accepted: list[int], bonus: list[int]) -> None:
        """Append d_1 .. d_j and the bonus token to each row. A row that ends drops the rest."""
        for b in live:
            row = self.rows[b]
            for token in (*proposal.tokens[b][: accepted[b]], bonus[b]):
                if row.finish is None:
                    row.push(token)
            # The bonus token is unread, and what was read after the accepted tokens is wrong.
            row.draft_read = min(row.draft_read, len(row.ids) - 1)

    def learn(self, played: Round, chains: SpeculationCache, hits: dict, missed: list[int]) -> None:
        """Record hits and misses. Foresight learns from them for the next forks."""
        played.looked_up(chains, list(hits), missed)
        if chains.chance:  # else nothing was prepared, or the draft failed before it forked
            for b in (*hits, *missed):
                tests = played.accepted[b], played.rejected(b)
                self.foresight.learn(chains.chance[b], b in hits, *tests)

    def predict(self, scores, feed: Feed, plan: Plan) -> Fork:
        """The outcomes to prepare for, on the draft's lane: see Runner.fork."""
        return self.draft.fork(scores, feed, plan.m, self.foresight)

    def draft_now(self, missed: list[int], ahead: Plan, played: Round) -> dict[int, Chain]:
        """A Chain for each row that missed, for the next round and its plan `ahead`: drafted token
        by token while the target waits.
        """
        if self.draft is None or (most := max(self.rows[b].room(ahead.k) for b in missed)) == 0:
            return {}
        feed = self.feed(missed, Proposal(len(self.rows)))  # the pending tokens alone
        skipped = self.take_skipped(feed)
        for b in missed:
            self.rows[b].draft_read += most - 1  # the last token that it drafts is never fed
        job = self.decode, feed, skipped, most, saguaro_top(ahead)
        work = self.draft_lane.start(*job)
        steps = self.draft_lane.answer(work)
        played.drafted = Drafting(work.begin, work.end, most)
        return {
            b: ([tokens[b] for tokens, _ in steps], [q and q.of(b, 0) for _, q in steps])
            for b in missed
        }

    def decode(self, feed: Feed, skipped, most: int, top: int) -> list[tuple[list[int], object]]:
        """The tokens and LogQ of `most` steps of ordinary decoding, on the draft's lane. The ids
        that the draft skipped are fed first.
        """
        before, begins = skipped
        if max(map(len, before)) > 1:  # the draft was left out of some rounds
            self.draft.prefill(before, begins)
        elif any(before):  # one skipped token is fed together with r
            tokens = [old + new for old, new in zip(before, feed.tokens)]
            tokens = [row + [0] * (2 - len(row)) for row in tokens]
            count = [c and len(old) + c for old, c in zip(before, feed.count)]
            feed = Feed(tokens, [b if c else 0 for b, c in zip(begins, count)], count)
        steps = []
        while len(steps) < most:
            tokens, logq = self.draft.decode(feed, top)
            steps.append((tokens, logq))
            start = [s + c for s, c in zip(feed.start, feed.count)]
            feed = Feed(tokens, start, [min(c, 1) for c in feed.count])
        return [([row and row[0] for row in tokens], logq) for tokens, logq in steps]

    def checked(self, tokens: list[int], logq: list, room: int) -> Chain:
        """A chain, cut to the room its row has. Raises DraftLost for an id the target lacks."""
        if wrong := [t for t in tokens if not 0 <= t < self.target.vocab]:
            raise DraftLost(f"it proposed the token id {wrong[0]}")
        return tokens[:room], logq[:room]

    # ---- before the first round, and after a draft is lost

    def prefill(self) -> None:
        """Both models read the prompts, all but their last token, at the same time. Each waits for
        the other after every chunk: a lane cannot abandon work, so Ctrl-C waits for one chunk.
        """
        self.warm_up()
        self.figures.begin = time.perf_counter()
        nothing = Feed([], [len(row.ids) - 1 for row in self.rows], [0] * len(self.rows))
        sides = [([row.prompt_left for row in self.rows], [row.target_read for row in self.rows])]
        sides += [self.take_skipped(nothing)] if self.draft is not None else []
        for row in self.rows:
            row.target_read = len(row.ids) - 1
        for at in range(0, max(len(row) for ids, _ in sides for row in ids), PREFILL_CHUNKS[-1]):
            jobs = [
                ([row[at : at + PREFILL_CHUNKS[-1]] for row in ids], [at + s for s in start])
                for ids, start in sides
            ]
            reading = self.target_lane.start(self.target.prefill, *jobs[0])
            if self.draft is not None:
                self.await_reading(reading, self.draft_lane.start(self.draft.prefill, *jobs[1]))
            reading.result()

    def await_reading(self, reading: Work, drafting: Work) -> None:
        """Wait until both models have read a chunk. The draft's limit grows with the time that the
        target took.
        """
        reading.result()
        took = reading.end - reading.begin
        self.await_draft(drafting, PREFILL_PATIENCE_S + PATIENCE_TIMES * took)

    def is_last(self) -> bool:
        """Whether this is still the newest run on these buffers."""
        return self.run_number == self.target.run_number

    def warm_up(self) -> None:
        """Compile and capture what is new, one lane after the other, and report the time."""
        began = time.perf_counter()
        fresh = self.target_lane.start(self.target.warm_up, *self.shapes).result()
        if self.draft is not None:
            work = self.draft_lane.start(self.draft.warm_up, *self.shapes)
            fresh |= bool(self.await_draft(work, WARM_UP_PATIENCE_S))
        took = time.perf_counter() - began
        if fresh and took > NOTICED_S:
            self.warn(f"compiled in {took:.1f} s; the same shapes will not compile again")
        # Compile time does not predict later work. But the Triton kernels of an eager draft compile
        # when texts grow, in the middle of rounds.
        late = self.draft is not None and self.draft.policy.compiles_late
        self.draft_lane.slowest_s = COMPILES_S if late else 0.0

    def await_draft(self, work: Work, limit_s: float):
        """What the draft's work returns. If it fails: None, and the target goes on alone."""
        try:
            return self.draft_lane.answer(work, limit_s)
        except DraftLost as lost:
            self.go_on_alone(lost)

    def go_on_alone(self, lost: DraftLost) -> Proposal:
        """Plain decoding for the rest of the run, from this empty proposal on.

        The text stays exact: the target alone decides what is emitted.
        """
        if not self.lost:
            self.warn(f"the draft failed ({lost}): the target goes on alone, the text stays right")
        # Work that hangs keeps the old thread. The lane gets a new one, which the target may share.
        self.draft_lane.leave()
        self.draft, self.lost, self.plan = None, True, Plan(0, 0)
        self.planner = SamePlan(self.plan)
        return Proposal(len(self.rows))


def saguaro_top(plan: Plan) -> int:
    """How many of the draft's likeliest tokens Saguaro makes less likely, so that the target's next
    token after a rejection is among them (sampling.saguaro): M / (K + 1) for each position, and one
    more for the drafted token.
    """
    return plan.m // (plan.k + 1) + 1


def __getattr__(name: str):
    """The engine's load, for `from ssd import load`. It is imported on demand, since engine.py
    imports this file.
    """
    if name == "load":
        import engine

        return engine.load
    raise AttributeError(f"module ssd has no {name!r}")
