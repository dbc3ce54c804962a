"""--k auto, --fan-out auto: the planner on a simulated machine, and in runs on real ones.

The machine plays rounds as ssd.py does, with times that are drawn and not measured. What the
planner reaches is held against every plan that never changes.
"""

import random
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace

import pytest
from tiny import engine, play, transformer

import auto
import runtime
from auto import Auto, Seen, Times
from figures import Drafting, Round
from sampling import CHAIN, FIXED
from ssd import Plan, SamePlan
from steps import Runner

# ---- the simulated machine


@dataclass
class Machine:
    """Times are in units of a plain decode step of the target.

    decode: seconds of a draft step. slope: what each further token adds to a verification. beside:
    how much slower a verification is while the draft works. easy, hard: acceptance in easy and in
    hard stretches of the text, each 20 tokens long on average. miss: of one branch; of M it is miss
    * M^-power. slow: (until second, what is slow, how much).
    """

    decode: float = 0.1
    easy: float = 0.85
    hard: float = 0.7
    slope: float = 0.03
    beside: float = 1.05
    miss: float = 0.5
    power: float = 0.6
    branch: float = 0.01  # what each branch adds to a draft step, as a share of it
    exposed: float = 0.01  # seconds between two verifications
    noise: float = 0.05
    slow: tuple = (0.0, "", 1.0)

    def play(self, planner, seconds: float, seed: int = 0) -> SimpleNamespace:
        """Rounds of one row until the time is over. Returns rate (tokens a second) and plans, a
        list.
        """
        rng, holds = random.Random(seed), self.text(int(10 * seconds) + 100)
        free = t = 0.0
        tokens, plan, length, last, plans = 0, planner.first(), 0, None, []

        def lasts(what: str, s: float) -> float:
            until, slow, factor = self.slow
            return s * rng.gauss(1, self.noise) * (factor if t < until and what in slow else 1)

        while t < seconds:
            usual = (1 + self.slope * length) * (self.beside if plan.m else 1)
            begin, end = t, t + lasts("verify", usual)
            start = moment = max(begin, free)
            moments, step, prepared = [], self.decode * (1 + self.branch * plan.m), 0.0
            if plan.m:
                moment = prepared = start + lasts("draft", 1.3 * self.decode)
                while len(moments) < plan.k:
                    late = moment + runtime.STEP_SHARE * step > begin + usual or moment >= end
                    if moments and plan.cut and late:
                        break
                    moments.append(moment := moment + lasts("draft", step))
                free = moment
            plans.append(plan)
            next_plan = planner.next(last) if last else plan
            accepted = 0
            while accepted < length and holds[tokens + accepted]:
                accepted += 1
            tokens += accepted + 1
            last = done = Round(plan, [0], [CHAIN], [length], [accepted], begin, end)
            hit = plan.m > 0 and rng.random() > self.miss * plan.m**-self.power
            t = max(end + self.exposed, prepared)
            length = 0
            if plan.m:
                t = max(t, moment) if hit else t
                done.look_up, done.hit, done.missed = (end, t), [0] * hit, [0] * (not hit)
                done.chain_steps = length = sum(m <= t for m in moments)
                done.prepare_s, steps = prepared - start, [prepared, *moments[: done.chain_steps]]
                done.step_s = (
                    median(b - a for a, b in zip(steps, steps[1:])) if done.chain_steps else None
                )
            plan, length = next_plan, min(length, next_plan.k) if hit else 0
            if not hit and next_plan.k and next_plan.fallback != "fast":
                begin = max(t, free)
                t = free = begin + lasts("draft", next_plan.k * self.decode)
                done.drafted, length = Drafting(begin, t, next_plan.k), next_plan.k
        return SimpleNamespace(rate=tokens / t, plans=plans)

    def text(self, tokens: int) -> list[bool]:
        """Would a draft token hold, at each position? One text, whoever reads it."""
        rng, easy, out = random.Random(7), True, []
        for _ in range(tokens):
            out.append(rng.random() < (self.easy if easy else self.hard))
            easy ^= rng.random() < 0.05
        return out

    def best(self, plans: list[Plan], seconds: float = 300.0) -> tuple[float, Plan]:
        """The highest rate of a plan that never changes, and the plan. The best few play much
        longer.
        """
        order = sorted(plans, key=lambda plan: -self.play(SamePlan(plan), seconds).rate)
        long = [(self.play(SamePlan(plan), 10 * seconds, 1).rate, plan) for plan in order[:4]]
        return max(long, key=lambda found: found[0])


def planner(ks=(0, *auto.KS), ms=(0, *auto.MS), fallback="auto", cut=True, seen=None) -> Auto:
    return Auto(ks, ms, Plan(0, 0, fallback, cut), 1, seen or Seen())


AR, SD, SSD = (False, False), (True, False), (True, True)


def mode_of(plan: Plan) -> tuple[bool, bool]:
    return plan.k > 0, plan.m > 0


MACHINES = {  # name: (the machine, the mode that is best on it)
    "a device of its own, easy text": (Machine(0.12, 0.97, 0.85), SSD),
    "a device of its own": (Machine(0.12, 0.85, 0.5), SSD),
    "a device of its own, hard text": (Machine(0.12, 0.6, 0.3), SSD),
    "a draft a third as slow": (Machine(0.3, 0.97, 0.85), SSD),
    "a draft a third as slow, mostly right": (Machine(0.3, 0.99, 0.95, miss=0.2), SSD),
    "the same, usual text": (Machine(0.3, 0.85, 0.5), SSD),
    "a device that is shared, quick draft": (Machine(0.03, 0.97, 0.85, beside=1.5), SD),
    "the same, hard text": (Machine(0.03, 0.6, 0.3, beside=1.5), SD),
    "verification by the token": (Machine(0.05, 0.85, 0.5, slope=0.2, beside=1.6), SD),
    "many branches are dear": (Machine(0.1, 0.9, 0.7, branch=0.3), None),
    "few outcomes are foreseen": (Machine(0.12, 0.85, 0.5, miss=1.5), None),
    "a useless draft": (Machine(0.6, 0.3, 0.1, beside=1.5), AR),
    "a draft as slow as the target": (Machine(1.0, 0.6, 0.4, beside=1.3), AR),
    "times that scatter": (Machine(0.12, 0.85, 0.5, noise=0.15), SSD),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_long_run_comes_close_to_the_best_plan(name):
    """Including what trying costs; and nearly all of it is played in the mode that is best."""
    machine, mode = MACHINES[name]
    auto_plans = planner()
    best, plan = machine.best(auto_plans.plans)
    got = machine.play(auto_plans, 3000.0, 2)
    assert mode in (None, mode_of(plan)), f"the machine is not what its name says: {plan}"
    assert got.rate > 0.95 * best, f"{got.rate / best:.3f} of {plan}"
    if mode is not None:
        played = [mode_of(p) == mode for p in got.plans]
        assert sum(played) > 0.8 * len(played)


@pytest.mark.parametrize("what", ["draft", "verify", "draft verify"])
@pytest.mark.parametrize("name", ["a device of its own", "a device that is shared, quick draft"])
def test_noisy_seconds_at_the_start_do_not_decide_a_run(what, name):
    """For 60 steps of the target something else has the cores; then the best is found."""
    machine, mode = MACHINES[name]
    noisy = Machine(**vars(machine) | {"slow": (60.0, what, 6.0)})
    got = noisy.play(planner(), 1500.0)
    late = [mode_of(p) for p in got.plans[-400:]]
    assert late.count(mode) > 0.9 * len(late)
    steady = machine.play(planner(), 1500.0)
    assert got.rate > 0.85 * steady.rate


def test_a_draft_that_becomes_slow_is_left_and_one_that_recovers_is_found_again():
    for what, factor, mode in (("draft", 20.0, AR), ("draft", 1.0, SSD)):
        machine = Machine(0.12, 0.85, 0.5, slow=(1000.0, what, factor))
        early = [mode_of(p) for p in machine.play(planner(), 900.0).plans[200:]]
        assert early.count(mode) > 0.9 * len(early)
    late = machine.play(planner(), 2500.0).plans[-400:]
    assert sum(mode_of(p) == SSD for p in late) > 0.9 * len(late)


def test_acceptance_is_that_of_the_state_and_chains_are_longer_where_text_is_easy():
    """The last proposal tells what the next one meets: easy stretches of text are long."""
    machine, one = Machine(0.12, 0.98, 0.2, slope=0.15), planner()
    got = machine.play(one, 3000.0)
    assert one.seen.acceptance(True) > one.seen.acceptance(False) + 0.2
    assert one.best[True].k > one.best[False].k and mode_of(one.best[True]) == SSD
    best, plan = machine.best(one.plans)
    assert got.rate > 1.0 * best, (
        f"better than every plan that knows no state: {got.rate / best:.3f}"
    )


def test_a_run_begins_with_what_earlier_ones_learnt():
    machine, seen = Machine(0.12, 0.97, 0.85), Seen()
    first = machine.play(planner(seen=seen), 60.0)
    second = machine.play(planner(seen=seen), 60.0)
    assert len({(p.k, p.m) for p in first.plans[:10]}) >= 3, "who knows nothing tries sizes"
    assert {mode_of(p) for p in second.plans[:10]} == {SSD} and second.rate > first.rate


@pytest.mark.parametrize("name", ["a device of its own", "a useless draft"])
def test_short_runs_try_other_modes_as_rarely_as_a_long_one(name):
    """Turns of a chat, of 30 rounds each: what is tried, and when, goes on from run to run."""
    machine, mode = MACHINES[name]
    seen, plans = Seen(), []
    for turn in range(40):
        plans += machine.play(planner(seen=seen), 32.0, turn).plans
    late = [mode_of(p) == mode for p in plans[len(plans) // 4 :]]
    assert sum(late) > 0.95 * len(late)
    assert seen.tried > 4, "but they are tried"


def test_what_is_given_by_hand_stays():
    for ks, ms in (((3,), (0, *auto.MS)), ((0, *auto.KS), (12,)), ((0, *auto.KS), (0,))):
        for fallback, cut in (("auto", True), ("fast", False), ("jit", True)):
            one = planner(ks, ms, fallback, cut)
            plans = {one.first(), *Machine().play(one, 300.0).plans}
            assert {p.k for p in plans} <= set(ks) and {p.m for p in plans} <= {0, *ms}
            offered = {p.cut for p in one.plans if p.m and p.k > 1}
            assert offered <= {False, cut} and len(offered) == (1 + cut) * (max(ms) > 0)
            assert cut or not any(p.cut for p in plans), "who wants whole chains gets them"
            on_miss, in_turns = {fallback}, {fallback}
            if fallback == "auto":
                on_miss, in_turns = {"auto", "fast"}, {"jit"}
            assert all(p.fallback in (on_miss if p.m else in_turns) for p in plans)


def test_whole_chains_are_waited_for_where_that_pays():
    """Where a step takes .4 of a verification, and not where all of them fit into it."""
    for machine, whole in (
        (Machine(0.4, 0.99, 0.95, miss=0.2), True),
        (Machine(0.05, 0.9, 0.8), False),
    ):
        late = machine.play(planner(), 1500.0).plans[-300:]
        played = [not p.cut for p in late if p.m and p.k > 1]
        assert sum(played) > 0.7 * len(played) if whole else sum(played) < 0.3 * len(played)
    halves = Auto((0, *auto.KS), (0, *auto.MS), Plan(0, 0, halves=True), 1, Seen())
    assert all(p.cut for p in halves.plans), "the other half needs the draft"


def test_a_run_that_knows_nothing_tries_sizes_that_cost_little():
    one, sizes = planner(), []
    for _ in range(6):
        sizes.append((one.now.k, one.now.m))
        assert one.now.cut, "to wait for whole chains may cost more"
        one.now = one.trying.pop() if one.trying else None
    assert one.now is None and max(sizes) < (4, 24) and len(set(sizes)) == 2


def test_what_to_do_on_a_miss_is_never_final():
    """M is given: without SD among the plans, only a plan that drafts on a miss learns its time."""
    for quick in (Machine(0.1, 0.9, 0.9), Machine(0.1, 0.9, 0.9, slow=(60.0, "draft", 8.0))):
        plans = quick.play(planner(ms=(16,)), 1500.0).plans[-300:]
        assert sum(p.fallback == "auto" for p in plans) > 0.8 * len(plans)


def test_guesses_from_the_text_say_nothing_about_the_draft():
    for kind, moved in ((CHAIN, True), (FIXED, False)):
        seen = Seen()
        before = seen.acceptance(True)
        for _ in range(20):
            seen.learn(Round(Plan(3, 8), [0], [kind], [3], [0], 0.0, 1.0), True, (CHAIN,))
        assert (seen.acceptance(True) < 0.5 * before) == moved
    one = planner((3,), (0,), "fast")  # n-grams alone, or misses that are only guessed
    assert one.kinds == (CHAIN, FIXED) and planner().kinds == (CHAIN,)


def test_a_miss_is_drafted_for_only_where_that_pays():
    """By hand: K = 4, a hit rate of one half. Drafting takes 4 steps and gains what is accepted."""
    for decode, acceptance, fallback in ((0.1, 0.9, "auto"), (0.3, 0.3, "fast")):
        machine = Machine(decode, acceptance, acceptance, miss=2.0, power=0.5, noise=0.0)
        got = machine.play(planner((4,), (16,)), 1000.0)
        late = [p.fallback for p in got.plans[-200:]]
        assert late.count(fallback) > 0.8 * len(late)  # the other is tried now and then
        (better, plan) = machine.best([Plan(4, 16, way) for way in ("auto", "fast")])
        assert plan.fallback == fallback and got.rate > 0.97 * better


def test_times_between_and_past_what_was_measured():
    times = Times()
    for size, seconds in ((2, 1.0), (5, 3.0), (9, 6.0), (5, 5.0)):
        times.of[size].append((1, seconds))
    assert times.at(3) == 0.0, "nothing is known before revise()"
    times.revise(1)
    assert [times.at(x) for x in (2, 3, 5, 7, 9)] == [1, 2, 4, 5, 6], "the median of each size"
    slope = (6 - 1) / (9 - 2)
    assert times.at(11) == pytest.approx(6 + 2 * slope) and times.at(1) == 0.5, "or half at least"
    times.of[7] += [(auto.FRESH, 7.0)] * auto.SURE
    times.revise(auto.FRESH)
    assert times.points == [(7, 7.0)], "what is old, or may be an accident, is left out"
    times.revise(9 * auto.FRESH)
    assert len(times.points) == 4, "old times are better than none"


# ---- in real runs

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [5], [8, 9, 7, 9, 3, 2, 3, 8], [46]]
HEAT = [0.0, 1.0, 0.7, 1.3, 0.0, 1.0]
ROWS = {"temperature": HEAT, "seed": list(range(6)), "max_new_tokens": [40, 33, 47, 25, 40, 9]}


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(runtime, "PATIENCE_S", 60.0)


@pytest.fixture(scope="module")
def pair():
    target = transformer(0)
    return engine(target, transformer(1, base=target, noise=0.03), warn=pytest.fail)


def restless(monkeypatch, seed: int) -> set:
    """Another plan every round, at random, AR and turns among them. Returns what was chosen."""
    rng, chosen = random.Random(seed), set()

    def anything(self, done):
        chosen.add(plan := rng.choice(self.plans))
        return plan

    monkeypatch.setattr(Auto, "next", anything)
    return chosen


@pytest.mark.parametrize("mode", ["sd", "ssd"])
@pytest.mark.parametrize("cut", [True, False])
def test_no_choice_changes_the_text(pair, monkeypatch, mode, cut):
    truth = pair.generate(PROMPTS, mode="ar", **ROWS)
    chosen = restless(monkeypatch, 5)
    for _ in range(4):
        result = pair.generate(PROMPTS, mode=mode, cut=cut, **ROWS)
        assert result.token_ids == truth.token_ids and result.finish_reason == truth.finish_reason
        assert result.stats["auto"] == ["k", "fan_out"][: 2 if mode == "ssd" else 1]
    assert len(chosen) >= len(auto.KS)


@pytest.mark.parametrize("fallback", ["jit", "fast"])
def test_the_draft_has_read_everything_whenever_modes_change(monkeypatch, fallback):
    """A draft that is its own target is never rejected, unless its KV cache has a hole."""
    target = transformer(0)
    perfect = engine(target, target, warn=pytest.fail)
    chosen = restless(monkeypatch, 6)
    for _ in range(3):
        settings = {"mode": "ssd", "fallback": fallback, "cut": False} | ROWS
        _, decoding = play(perfect, PROMPTS, **settings)
        chains = [(r, b) for r in decoding.figures.rounds for b in r.live if r.kind[b] == CHAIN]
        assert sum(r.accepted[b] for r, b in chains) > 50
        assert not any(r.rejected(b) for r, b in chains)
    assert {mode_of(plan) for plan in chosen} == {AR, SD, SSD}


@pytest.mark.parametrize("mode", ["sd", "ssd"])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_the_target_goes_on_alone_and_the_next_turn_of_the_chat_knows(
    pair, monkeypatch, mode, after
):
    """Plans without the draft to the end of a turn; what it did not read it reads in the next."""
    calls, real = [], Auto.next

    def leave(self, done):
        calls.append(done)
        return Plan(0, 0) if len(calls) >= after else Plan(2, 6 * (mode == "ssd"), "jit")

    monkeypatch.setattr(Auto, "next", leave)
    settings = {"temperature": 1.0, "max_new_tokens": 40}
    prompt, target = PROMPTS[0], transformer(0)
    perfect = engine(target, target, warn=pytest.fail)
    for _ in range(2):
        calls.clear()
        result, decoding = play(perfect, [prompt], keep=True, mode=mode, **settings)
        assert result.token_ids == pair.generate([prompt], mode="ar", **settings).token_ids
        plans = [r.plan.k for r in decoding.figures.rounds]
        assert plans[after + 1 :] == [0] * (len(plans) - after - 1) and not decoding.lost
        rejected = [r.rejected(0) for r in decoding.figures.rounds if r.kind[0] == CHAIN]
        assert not any(rejected), "what the draft did not read is read before it drafts"
        prompt = prompt + result.token_ids[0] + [7]
    monkeypatch.setattr(Auto, "next", real)


def test_runs_of_one_kind_share_what_they_show(pair):
    pair.seen.clear()
    for number in (1, 2):
        for mode in ("sd", "ssd"):
            pair.generate(PROMPTS[:1], mode=mode, max_new_tokens=40)
        assert len(pair.seen) == 2 and all(seen.rounds > 3 * number for seen in pair.seen.values())
    pair.generate(PROMPTS[:1], mode="ssd", k=2, fan_out=6, max_new_tokens=8)
    assert len(pair.seen) == 2, "nothing to choose, nothing to learn"
    seen = next(seen for kind, seen in pair.seen.items() if kind[0] == "ssd")
    assert seen.beside.of and seen.prepare.of and seen.step.of and seen.misses[1] > 0


def test_n_grams_choose_k_too():
    one = engine(transformer(0), "ngram")
    result, decoding = play(one, [[5, 6, 7] * 8], mode="sd", max_new_tokens=60)
    assert result.stats["auto"] == ["k"] and not decoding.planner.seen.draft.of
    assert result.token_ids == one.generate([[5, 6, 7] * 8], max_new_tokens=60).token_ids


@pytest.mark.parametrize("where", ["decode", "extend", "chain_step"])
def test_a_draft_that_fails_is_forgotten_by_the_planner_too(monkeypatch, where):
    said, target = [], transformer(0)
    one = engine(target, transformer(2), warn=said.append)
    truth = one.generate(PROMPTS, mode="ar", **ROWS)

    def fail(*_):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Runner, where, fail)
    result, decoding = play(one, PROMPTS, mode="ssd", **ROWS)
    assert result.token_ids == truth.token_ids and decoding.lost
    assert isinstance(decoding.planner, SamePlan) and decoding.planner.first() == Plan(0, 0)
    lost = "the draft failed (the device is lost): the target goes on alone, the text stays right"
    assert said == [lost]
