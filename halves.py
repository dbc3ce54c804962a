"""Two halves of a batch take turns on the two lanes: while one is verified, the draft works for the
other (MineDraft, arXiv 2603.18016).

Knows: which places are a half, when halves are made anew, which way was faster so far. Does not
know: how a round is played (ssd.py). Read next: figures.py.

    target  [ verify A     ][ verify B     ][ verify A     ][ verify B     ]
    draft   [draft B|chains][draft A|chains][draft B|chains][draft A|chains]

No guess is needed: the draft begins a proposal when its half's verdict is in, and the target is
busy with the other half meanwhile. In a plan with m > 0 the draft then prepares chains with the
time that is left, so that rows that hit need no drafting.

The target passes over its weights twice as often. If a verification takes a fixed time and one for
each token, and drafting for a half takes no longer than verifying one, halves save the drafting
time and cost the fixed time once more. So they pay where drafting takes longer than the fixed part:
for large models on GPUs only when the batch is large, on a CPU with a draft that is not small.

Rows, lanes and rounds are those of ssd.py; the draws of a row know nothing of its half, so its text
is the same.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from figures import Round
from ssd import Decoding, Plan, Proposal

# A window is so many rounds of a batch; halves play twice as many of theirs. The first of a window
# are not counted. The other way is tried after so many windows, each time after twice as many.
WINDOW, NOT_COUNTED, FIRST_TRY, LAST_TRY = 12, 2, 1, 32


class Halves(Decoding):
    """A Decoding that plays two halves in turn where the plan says so, else all rows at once."""

    def rounds(self) -> Iterator[None]:
        self.prefill()
        self.plan = self.planner.first()
        proposal = Proposal(len(self.rows))
        while self.seats.waiting or any(row.finish is None for row in self.rows):
            self.parts = self.halves() if self.plan.halves else [range(len(self.rows))]
            turns = deque(self.play(part, proposal) for part in self.parts)
            proposal = Proposal(len(self.rows))
            while turns:
                group = turns.popleft()
                try:
                    next(group)
                except StopIteration as ended:
                    last = ended.value
                    for b, proposed in enumerate(zip(last.kind, last.tokens, last.logq)):
                        proposal.put(b, *proposed)
                else:
                    turns.append(group)
                    yield
        self.figures.end = time.perf_counter()
        yield

    def halves(self) -> list[range]:
        """The places in two parts with as many rows each; compiled steps exist for fixed parts."""
        places = range(len(self.rows))
        left = [b for b in places if self.rows[b].finish is None or self.seats.waiting]
        fixed = self.target.policy.static
        middle = (len(places) + 1) // 2 if fixed or len(left) < 2 else left[len(left) // 2]
        parts = [places[:middle], places[middle:]]
        return parts if all(any(b in part for b in left) for part in parts) else [places]

    def seated(self, places: range) -> list[int]:
        """None where the parts are no longer what they should be. Then all of them end, and others
        begin with their proposals.
        """
        live = super().seated(places)
        counts = [len(self.live(part)) for part in self.parts]
        split = len(counts) > 1
        if self.plan.halves:
            uneven = max(counts) - min(counts) > 1
            anew = (uneven or not split) and sum(counts) > 1 and self.halves() != self.parts
        else:
            anew = split
        if anew:
            self.parts = [range(0)]
        return live if places in self.parts else []


class Quicker:
    """A planner that plays halves or the whole batch, whichever emits more tokens a second.

    Each way is measured by the rounds of the run, one window after another, and the other way is
    tried again and again: no choice is final. Choices hang on the clock and on past outcomes only.
    """

    def __init__(self, ways: dict):
        """ways: a planner of halves, by True, and perhaps one of the whole batch, by False. Each
        learns from the rounds of its own way.
        """
        self.ways, self.plan = ways, {way: planner.first() for way, planner in ways.items()}
        self.now, self.best, self.wait, self.windows = True, None, FIRST_TRY, 0
        self.speed: dict[bool, float] = {}
        self.seen: list[Round] = []

    def first(self) -> Plan:
        return replace(self.plan[self.now], halves=self.now)

    def next(self, done: Round) -> Plan:
        way = done.plan.halves
        self.plan[way] = self.ways[way].next(done)
        self.seen = [*self.seen, done] if way == self.now and len(self.ways) > 1 else []
        if len(self.seen) == NOT_COUNTED + WINDOW * (1 + self.now):
            self.judge(self.seen[NOT_COUNTED:])
        return self.first()

    def judge(self, rounds: list[Round]) -> None:
        """A window has ended: note its speed, and choose what is played in the next."""
        tokens = sum(r.emitted for r in rounds[:-1])
        self.speed[self.now] = tokens / max(rounds[-1].begin - rounds[0].begin, 1e-9)
        self.seen, self.windows = rounds[-NOT_COUNTED:], self.windows + 1
        if len(self.speed) < 2 or (self.now == self.best and self.windows >= self.wait):
            self.now, self.windows = not self.now, 0  # try the other way, right after this one
        elif self.now != self.best:
            before, self.best = self.best, max(self.speed, key=self.speed.get)
            self.wait = min(2 * self.wait, LAST_TRY) if before == self.best else FIRST_TRY
            self.now, self.windows = self.best, 0
