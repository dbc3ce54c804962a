"""One loop for plain decoding (AR), speculative decoding (SD), and speculative speculative decoding
(SSD).

Knows: plans, proposals, outcomes, and who waits for whom. Does not know: how a pass computes
(steps.py), where it runs (runtime.py), how K and M are chosen (auto.py). The whole
method is Decoding.play, propose and prepare. Read next: engine.py.

    AR   feed the pending token, draw the next
    SD   the draft proposes K tokens, the target verifies them in one pass; they take turns
    SSD  while the target verifies, the draft prepares a chain for each of the M likeliest outcomes;
         the next proposal is a look-up

r is the pending token: it is emitted, but no model has read it yet. d_1 .. d_L, L <= K, is the
proposal. The outcome of a round is (j, r'): j draft tokens are accepted, and the target's own next
token r', the bonus token, follows them (where j < L, others call it the correction). A round emits
d_1 .. d_j and r', and r' is the next r.

Source: Kumar, Dao, May, "Speculative Speculative Decoding", ICLR 2026 (arXiv 2603.03251).
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from cache import SpeculationCache
from figures import Figures, Round
from rows import Row, Seats
from runtime import PATIENCE_TIMES, DraftLost, Lane, Work
from sampling import CHAIN, FIXED, NONE, Foresight
from steps import Feed, Fork, Runner

# How long the target waits for the draft's first passes, in seconds: they may still fetch weights
# from memory or disk, or compile. Later the lane is as patient as its slowest work tells it to be.
PREFILL_PATIENCE_S, WARM_UP_PATIENCE_S = 10.0, 600.0
# Draft tokens, and the LogQ that each was drawn from (None under `shared`).
Chain = tuple[list[int], list]


@dataclass(frozen=True)
class Plan:
    """What a round is played with. AR is k = 0 (then m = 0), SD is m = 0, SSD is the rest.

    k is the most draft tokens of a proposal. m is how many outcomes the draft prepares for while
    the target verifies; with 0 it prepares nothing, and every row misses. fallback is for a row
    that misses: "jit" drafts now, "fast" guesses from the row's own text, "auto" drafts now only
    if every row missed (a row that hit would have to wait for it), and else guesses. halves: while
    half of the rows is verified, the draft works for the other half (halves.py).

    cut: a chain ends where the verdict comes. The draft makes the first step of every chain; it
    begins another one only if the clock says that it will be done before the verdict, and no other
    work waits for it. The look-up takes the steps that are done. Without cut it waits for all K.
    Clock and queue do not look at tokens, so how long a chain is says nothing about what is in it:
    each token is drawn from the same q as in a whole chain, and the rule that accepts it holds.
    """

    k: int
    m: int
    fallback: str = "auto"
    cut: bool = True
    halves: bool = False


class SamePlan:
    """A planner that never changes its mind. auto.Auto is one that learns from every round."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def first(self) -> Plan:
        return self.plan

    def next(self, last: Round) -> Plan:
        return self.plan


class Proposal:
    """What the next verification tries, per row: draft tokens, their kind, and the LogQ of each."""

    def __init__(self, rows: int):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.kind, self.logq = [NONE] * rows, [None] * rows

    def put(self, row: int, kind: int, tokens: list[int], logq: list | None = None) -> None:
        if tokens:
            self.tokens[row], self.kind[row], self.logq[row] = tokens, kind, logq


class Decoding:
    """One generation: its rows, the target and the draft on their lanes, and the rounds that
    advance them.

    To draft in another way, write a subclass in a file of your own and hand it to Engine.generate
    as `decoding=`, like those in examples/. No file of the engine changes. Override

        prepare    what the draft does while the target verifies: chains.fork, then chains.append
        decode     what the draft does while the target waits: K tokens for each row that missed
        predict    which outcomes are prepared for
        draft_now  what a row that missed gets

    For one pass that proposes K tokens, write the pass as a method and call it in prepare and
    decode, where there is a loop of steps now. Unless the coupling is `shared`, each token comes
    with the log q that it was drawn from. Verification and acceptance do not ask how a proposal was
    made, so the text stays right.
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
        """rows: in the order of their prompts. As many as the target has places are decoded at
        once, the others wait. shapes: the lengths, budgets and parts of the batch that static steps
        are compiled for.
        """
        self.all_rows, self.seats, self.reading = rows, Seats(rows, target.batch), []
        self.rows = self.seats.rows  # by place
        self.planner, self.shapes, self.warn = planner, shapes, warn
        self.target, self.target_lane = target, target_lane
        self.draft, self.draft_lane = draft, draft_lane
        self.figures, self.foresight, self.lost = Figures(rows), Foresight(), False

    # ---- the method

    def rounds(self) -> Iterator[None]:
        """Play until every row has ended. Yields while each verification runs, and at the end."""
        self.prefill()
        self.plan = self.planner.first()
        yield from self.play(range(len(self.rows)), Proposal(len(self.rows)))
        self.figures.end = time.perf_counter()
        yield

    def play(self, places: range, proposal: Proposal) -> Generator[None, None, Proposal]:
        """The rounds of the rows in these places, from a proposal on. Returns the last one."""
        while live := self.seated(places):
            plan, feed, last = self.plan, self.feed(live, proposal), self.figures.last
            verdict = self.target_lane.start(self.target.verify, feed, proposal.kind, proposal.logq)
            chains = SpeculationCache(self.draft_lane, plan.cut)
            if plan.m > 0:  # with m = 0 the draft waits for the verdict, too
                job = self.prepare, chains, feed, self.take_skipped(feed), plan, verdict
                chains.filled_by(self.draft_lane.start(*job))
            yield  # the caller prints the text of the last round
            planned = self.planner.next(last) if last else plan  # it knows the rounds before
            accepted, bonus = verdict.result()  # waits for the target
            self.emit(live, proposal, accepted, bonus)
            done = self.figures.verified(plan, proposal, live, accepted, verdict)
            try:
                proposal, self.plan = self.propose(chains, accepted, bonus, planned, done), planned
            except DraftLost as lost:
                proposal, self.plan = self.go_on_alone(lost)
        return proposal

    def propose(self, chains, accepted, bonus, plan: Plan, done: Round) -> Proposal:
        """The next proposal. A row that hit gets its chain; for one that missed it is made now.

        The key of `chains` is (row, accepted, bonus); a look-up gives the Chain that was drafted.
        """
        proposal, live = Proposal(len(self.rows)), self.live(done.live)
        found = chains.look_up(live, accepted, bonus)  # waits as `cut` says
        missed = [b for b in live if b not in found]
        self.learn(done, chains, found, missed)
        if missed and (plan.fallback == "jit" or plan.fallback == "auto" and not found):
            found |= self.draft_now(missed, plan, done)
        for b in live:
            room = self.rows[b].room(plan.k)
            if b in found:
                proposal.put(b, CHAIN, *self.checked(*found[b], room))
            else:
                proposal.put(b, FIXED, self.rows[b].guess(room))  # not drawn from any q
        return proposal

    def prepare(self, chains, feed: Feed, skipped, plan: Plan, verdict: Work) -> None:
        """The draft's side of a round, on its own lane: extend, fork, chains until the verdict."""
        draft, lane = self.draft, self.draft_lane
        draft.prefill(*skipped)  # nothing, unless the draft was left out of some rounds
        with lane.span("extend"):
            scores = draft.extend(feed)
        with lane.span("fork"):
            tokens, depths, chance = self.predict(scores, feed, plan)
            chains.fork(tokens, depths, chance)
        for step in range(plan.k):
            if step > 0 and plan.cut and not lane.has_time(verdict):
                break  # by clock and queue alone: no token has a say in whether one is drawn
            with lane.span("chain step"):
                tokens, logq = draft.chain_step(feed, tokens, depths, step, saguaro_top(plan))
                chains.append(tokens, logq)
        chains.settle()  # the last step counts, too

    # ---- the steps of a round

    def live(self, places=None) -> list[int]:
        """The places, of all by default, whose prompt is read and whose row has not ended."""
        return self.seats.live(range(len(self.rows)) if places is None else places)

    def seated(self, places: range) -> list[int]:
        """The live ones of these places, after rows that wait took the places of rows that ended.

        Both lanes seat these rows and read their prompts. If the target fails at that, this is
        raised before the next round; if the draft fails, when it is next asked for something.
        """
        for work in self.reading:
            work.result()  # has ended by now
        self.reading = []
        for work, *args in self.seats.joining(places):
            self.reading.append(self.target_lane.start(getattr(self.target, work), *args))
            if self.draft is not None:
                self.draft_lane.start(getattr(self.draft, work), *args)
        return self.live(places)

    def feed(self, live: list[int], proposal: Proposal) -> Feed:
        """[r, d_1 .. d_L] of each live row, padded to one T; compiled steps exist for a few T."""
        fed, start = [[] for _ in self.rows], [0 for _ in self.rows]
        for b in live:
            ids = self.rows[b].ids
            fed[b], start[b] = [ids[-1], *proposal.tokens[b]], len(ids) - 1
        T = self.target.fits(max(map(len, fed)))
        padded = [tokens + [0] * (T - len(tokens)) for tokens in fed]
        return Feed(padded, start, list(map(len, fed)))

    def take_skipped(self, feed: Feed) -> tuple[list[list[int]], list[int]]:
        """The ids that the draft has skipped and must read before `feed`, and the position of the
        first, by row. It counts them and the feed as read: call it once for every feed.

        Where a proposal that was drafted while the target waited is accepted whole, its last token
        was never fed. A draft that was left out of some rounds has skipped all of theirs.
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
            # Past this the draft has read rejected tokens.
            row.draft_read = min(row.draft_read, len(row.ids) - 1)

    def learn(self, done: Round, chains: SpeculationCache, found: dict, missed: list[int]) -> None:
        """Note what was foreseen. The draft's next forks use it."""
        done.looked_up(chains, list(found), missed)
        for b in (*found, *missed) if chains.work else ():
            self.foresight.learn(chains.chance[b], b in found, done.accepted[b], done.rejected(b))

    def predict(self, scores, feed: Feed, plan: Plan) -> Fork:
        """The outcomes to prepare for, on the draft's lane: those that it finds likeliest."""
        return self.draft.fork(scores, feed, plan.m, self.foresight)

    def draft_now(self, missed: list[int], plan: Plan, done: Round) -> dict[int, Chain]:
        """A Chain for each row that missed, by ordinary decoding, while the target waits."""
        if self.draft is None or (most := max(self.rows[b].room(plan.k) for b in missed)) == 0:
            return {}
        feed = self.feed(missed, Proposal(len(self.rows)))  # the pending tokens alone
        skipped = self.take_skipped(feed)
        for b in missed:
            self.rows[b].draft_read += most - 1  # the last token that it drafts is never fed
        done.drafted = self.draft_lane.start(self.decode, feed, skipped, most, saguaro_top(plan))
        steps = self.draft_lane.answer(done.drafted)
        return {
            b: ([tokens[b] for tokens, _ in steps], [logq and logq.of(b, 0) for _, logq in steps])
            for b in missed
        }

    def decode(self, feed: Feed, skipped, most: int, top: int) -> list[tuple[list[int], object]]:
        """The tokens and LogQ of `most` steps of ordinary decoding, on the draft's lane. The ids
        that the draft skipped are fed first.
        """
        before, begins = skipped
        if max(map(len, before)) > 1:  # the draft was left out of some rounds
            self.draft.prefill(before, begins)
        elif any(before):
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
        """A chain, as long as the row has room for. Raises DraftLost for an id without a token."""
        if wrong := [t for t in tokens if not 0 <= t < self.target.vocab]:
            raise DraftLost(f"it proposed the token id {wrong[0]}")
        return tokens[:room], logq[:room]

    # ---- before the first round, and after a draft is lost

    def prefill(self) -> None:
        """Both models read the prompts, all but their last token, at the same time."""
        self.warm_up()
        self.figures.begin = time.perf_counter()
        start = [row.target_read for row in self.rows]
        ids = [row.prompt_left for row in self.rows]
        reading = self.target_lane.start(self.target.prefill, ids, start)
        if self.draft is not None:
            last = Feed([], [len(row.ids) - 1 for row in self.rows], [0] * len(self.rows))
            drafting = self.draft_lane.start(self.draft.prefill, *self.take_skipped(last))
        for row in self.rows:
            row.target_read = len(row.ids) - 1
        reading.result()
        if self.draft is not None:
            took = reading.end - reading.begin
            self.await_draft(drafting, PREFILL_PATIENCE_S + PATIENCE_TIMES * took)

    def warm_up(self) -> None:
        """Compile and capture what is new, one lane after the other, and tell how long it took."""
        began = time.perf_counter()
        fresh = self.target_lane.start(self.target.warm_up, *self.shapes).result()
        if self.draft is not None:
            work = self.draft_lane.start(self.draft.warm_up, *self.shapes)
            fresh |= bool(self.await_draft(work, WARM_UP_PATIENCE_S))
        if fresh:
            took = time.perf_counter() - began
            self.warn(f"compiled in {took:.1f} s; the same shapes will not compile again")
        self.draft_lane.slowest_s = 0.0  # compiling says nothing about later work

    def await_draft(self, work: Work, limit_s: float):
        """What the draft's work returns. If it fails: None, and the target goes on alone."""
        try:
            return self.draft_lane.answer(work, limit_s)
        except DraftLost as lost:
            self.go_on_alone(lost)

    def go_on_alone(self, lost: DraftLost) -> tuple[Proposal, Plan]:
        """An empty proposal and plain decoding, for the rest of the run.

        The text stays right: the target alone decides what is emitted, whoever proposed it.
        """
        if not self.lost:
            self.warn(f"the draft failed ({lost}): the target goes on alone, the text stays right")
        # Work that hangs keeps the old thread. The lane gets a new one: the target may share it.
        self.draft_lane.leave()
        self.draft, self.lost, self.planner = None, True, SamePlan(Plan(0, 0))
        return Proposal(len(self.rows)), self.planner.first()


def saguaro_top(plan: Plan) -> int:
    """How many of the draft's likeliest tokens Saguaro weighs down: the share of the budget that
    one of the K + 1 places has, and the drafted token.
    """
    return plan.m // (plan.k + 1) + 1


def __getattr__(name: str):
    """The engine's load, for `from ssd import load`. engine.py imports this file, so it is imported
    only when somebody asks.
    """
    if name == "load":
        import engine

        return engine.load
    raise AttributeError(f"module ssd has no {name!r}")
