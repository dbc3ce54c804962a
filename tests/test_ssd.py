"""AR, SD and SSD print the same text, and what they say about themselves is true. Tiny random
models in float64."""

import itertools
import time

import pytest
import torch
from tiny import DEVICES, Restless, cut_head, engine, log_probs, resized, settle, transformer

import runtime
from cache import SpeculationCache
from engine import NGRAM, Model
from rows import COUPLINGS, FALLBACKS
from runtime import Devices, Lane, Policy, one_thread
from sampling import CHAIN, FIXED, TOKEN, Foresight, Params, gumbel
from ssd import Decoding, Proposal
from steps import Feed, LogQ, Runner

# Every row has its own way to sample, so one call with many rows tries very many cases at once.
B = 240
PROMPTS = [[(7 * b + 11 * i * i + i) % 50 for i in range(1 + b % 13)] for b in range(B)]
ROWS = {
    "temperature": [(0.0, 0.7, 1.0, 1.4)[b % 4] for b in range(B)],
    "top_k": [(0, 0, 6)[b % 3] for b in range(B)],
    "top_p": [(1.0, 1.0, 0.9, 1.0, 0.5)[b % 5] for b in range(B)],
    "seed": [1000 + b for b in range(B - 2)] + [(1 << 64) - 1, 1 << 63],
    "max_new_tokens": [1 + (5 * b) % 37 for b in range(B)],
}


def some(rows, settings=ROWS):
    """The prompts and settings of these rows alone."""
    return [PROMPTS[b] for b in rows], {
        name: [values[b] for b in rows] for name, values in settings.items()
    }


def part(number: int) -> range:
    """Rows for the case of this number: the cases together use them all."""
    return range(number * 32 % 192, number * 32 % 192 + 48)


def check(pair, truth, rows, **settings):
    """The rows, decoded as the settings say, end up as in the truth. -> stats"""
    prompts, own = some(rows)
    result = pair.generate(prompts, **own | settings)
    assert result.token_ids == [truth.token_ids[b] for b in rows]
    assert result.finish_reason == [truth.finish_reason[b] for b in rows]
    return result.stats


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    # The cores are shared: a slow draft is not a broken one.
    monkeypatch.setattr(runtime, "PATIENCE_S", 60.0)


@pytest.fixture(scope="module")
def models():
    target = transformer(0)
    # Target, draft, useless draft.
    return (target, transformer(1, base=target, noise=0.03), transformer(2))


@pytest.fixture(scope="module")
def pair(models):
    return engine(*models[:2], eos={33}, warn=pytest.fail)


@pytest.fixture(scope="module")
def truth(pair):
    return pair.generate(PROMPTS, mode="ar", **ROWS)


# ---- the same text


def test_plain_decoding_is_right(models, truth):
    """AR itself against passes over whole texts without a cache: each row by its own temperature,
    filters and noise."""
    for b in range(0, B, 7):
        ids = PROMPTS[b] + truth.token_ids[b]
        logits = log_probs(models[0], ids)[len(PROMPTS[b]) - 1 : -1]
        T, top_k, top_p = (ROWS[name][b] for name in ("temperature", "top_k", "top_p"))
        if T > 0:
            p, order = (logits / T).softmax(-1).sort(-1, descending=True)
            if top_k:
                p[:, top_k:] = 0
                p = p / p.sum(-1, keepdim=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
            params = Params.make([T], [0], [1.0], [ROWS["seed"][b]], [0], "cpu")
            at = torch.arange(len(PROMPTS[b]), len(ids))[None]
            logits = (
                torch.zeros_like(p).scatter_(-1, order, p).log()
                + gumbel(params, at, TOKEN, 50, torch.float64)[0]
            )
        assert logits.argmax(-1).tolist() == truth.token_ids[b]
    assert {"eos", "length"} == set(truth.finish_reason)


@pytest.mark.parametrize("k", range(1, 9))
def test_sd_equals_ar(pair, truth, k):
    assert check(pair, truth, part(k), mode="sd", k=k)["acceptance_rate"] > 0.4


CASES = [
    (2, 49, "auto", True),
    *zip(
        itertools.chain(range(1, 9), range(1, 9)),
        itertools.cycle((1, 9, 6, 3, 12)),
        itertools.cycle(FALLBACKS),
        itertools.chain([True, False] * 4, [False, True] * 4),
    ),
]


@pytest.mark.parametrize(("k", "fan_out", "fallback", "cut"), CASES)
def test_ssd_equals_ar(pair, truth, k, fan_out, fallback, cut):
    rows = part(CASES.index((k, fan_out, fallback, cut)))
    stats = check(pair, truth, rows, mode="ssd", k=k, fan_out=fan_out, fallback=fallback, cut=cut)
    assert stats["hit_rate"] > (0.1 if fan_out == 1 else 0.4)


@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_a_row_is_the_same_alone_and_in_any_batch(pair, truth, mode):
    for rows in (
        [12],
        [B - 2],
        [51],
        [0, 13, 26, 39, 1, 2, 3, 4],
        [B - 1, 97, 64, 63, 62, 8, 71, 5],
    ):
        check(pair, truth, rows, mode=mode, fan_out=6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_value_for_all_rows(pair, temperature):
    """No lists: the shortcuts for greedy and unfiltered rows; a single seed, so rows draw by their
    number."""
    prompts = [[3, 1, 4]] * 6 + [[1], [5, 9]]
    settings = {"temperature": temperature, "seed": 11, "max_new_tokens": 32, "ignore_eos": True}
    texts = [
        pair.generate(prompts, mode=mode, k=3, fan_out=5, **settings).token_ids
        for mode in ("ar", "sd", "ssd")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(ids) for ids in texts[0][:6]}) == (1 if temperature == 0 else 6)


@pytest.mark.parametrize(
    ("coupling", "c"), [("maximal", 1.0), ("independent", 1.0), ("independent", 0.3)]
)
def test_greedy_rows_are_the_same_under_every_coupling(pair, truth, coupling, c):
    greedy = [b for b in part(3) if ROWS["temperature"][b] == 0]
    for mode in ("sd", "ssd"):
        check(pair, truth, greedy, mode=mode, coupling=coupling, saguaro_c=c, temperature=0.0)
        mixed = [*greedy, 1]  # one row that draws, and whose text may differ
        prompts, settings = some(mixed)
        result = pair.generate(prompts, mode=mode, coupling=coupling, saguaro_c=c, **settings)
        assert result.token_ids[:-1] == [truth.token_ids[b] for b in greedy]


def test_both_models_on_one_core(models, truth):
    """Both models on one core: for SD that is one lane."""
    both = engine(*models[:2], eos={33}, warn=pytest.fail, devices=Devices(DEVICES.given[0]))
    for mode in ("sd", "ssd"):
        check(both, truth, part(2), mode=mode, fan_out=4)


def test_guesses_from_the_text_alone(models, truth):
    check(engine(models[0], NGRAM, eos={33}, warn=pytest.fail), truth, part(3), mode="sd", k=6)


def test_float32_with_packed_weights():
    """As a user runs it on a CPU: linear layers in oneDNN's layout, and noise in float32."""
    target = transformer(0, dtype=torch.float32)
    draft = transformer(1, base=target, noise=0.03, dtype=torch.float32)
    pair = engine(target, draft, warn=pytest.fail)
    prompts, settings = some(range(24))
    texts = [
        pair.generate(prompts, mode=mode, fan_out=6, **settings).token_ids
        for mode in ("ar", "sd", "ssd")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_end_of_text_inside_an_accepted_proposal(models, monkeypatch):
    """With a draft that is always right: tokens behind the end are dropped, in every place of the
    proposal."""
    target = models[0]
    places, emit = set(), Decoding.emit

    def spy(self, live, proposal, accepted, bonus):
        for b in live:
            tokens = proposal.tokens[b][: accepted[b]]
            places.update(i for i, token in enumerate(tokens) if token in self.rows[b].eos)
        emit(self, live, proposal, accepted, bonus)

    monkeypatch.setattr(Decoding, "emit", spy)
    pair = engine(target, transformer(base=target), eos={33, 4, 40}, warn=pytest.fail)
    expected = pair.generate(PROMPTS, mode="ar", **ROWS)
    for mode in ("sd", "ssd"):
        places.clear()
        check(pair, expected, range(120), mode=mode, k=4, fan_out=4, cut=False)
        assert places == {0, 1, 2, 3}
    for ids, reason in zip(expected.token_ids, expected.finish_reason):
        assert not {33, 4, 40} & set(ids[:-1]) and (reason == "eos") == (ids[-1] in {33, 4, 40})


@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_a_full_context_ends_the_text_at_its_last_place(mode):
    target = transformer(0, positions=40)
    pair = engine(target, transformer(1, base=target, noise=0.02), warn=pytest.fail)
    prompts = [
        PROMPTS[0] * 39,
        *([i] * n for i, n in enumerate((38, 37, 36, 35, 34, 33, 20, 3, 3))),
    ]
    limits = [1000] * 9 + [12]
    expected = pair.generate(prompts, mode="ar", max_new_tokens=limits).token_ids
    for k, cut in ((1, True), (5, False), (8, True)):
        result = pair.generate(prompts, mode=mode, max_new_tokens=limits, k=k, cut=cut, fan_out=12)
        assert result.finish_reason == ["context"] * 9 + ["length"]
        assert [len(p) + len(ids) for p, ids in zip(prompts, result.token_ids)] == [40] * 9 + [15]
        assert result.token_ids == expected


def test_turns_of_a_chat_keep_the_same_text(pair):
    """keep=True starts from the KV of the call before: each turn's text equals that of a fresh
    start."""
    for mode in ("ar", "sd", "ssd"):
        ids = [5, 6, 7]
        for turn in range(3):
            kept = pair.generate(
                [ids], keep=True, mode=mode, temperature=0.7, max_new_tokens=25, ignore_eos=True
            )
            fresh = engine(pair.target.transformer).generate(
                [ids], temperature=0.7, max_new_tokens=25
            )
            assert kept.token_ids == fresh.token_ids
            ids = ids + kept.token_ids[0][: 25 - 9 * turn] + [turn, 8]


# ---- chains


def branch_chains(draft, prompts, proposals, settings, M, k):
    """A round of the draft on its own: extend, fork and k chain steps by Runner calls. -> the fork,
    the steps"""
    feed = Feed([], [], [])
    for prompt, proposal in zip(prompts, proposals):
        feed.tokens.append([prompt[-1], *proposal] + [0] * (k - len(proposal)))
        feed.start.append(len(prompt) - 1)
        feed.count.append(1 + len(proposal))
    n = len(prompts)
    runner = Model.of(draft).runner("draft", n, max(map(len, prompts)) + k + 1, k, M, 50)
    params = Params.make(
        [settings["temperature"]] * n, [settings["top_k"]] * n, [1.0] * n, [5] * n, range(n), "cpu"
    )
    runner.set_rows(params, settings["coupling"], 1.0)
    with torch.inference_mode(), one_thread():
        runner.prefill([prompt[:-1] for prompt in prompts], [0] * n)
        fork = runner.fork(runner.extend(feed), feed, M, Foresight())
        steps, branches = [], fork.tokens
        for step in range(k):
            branches, logq = runner.chain_step(feed, branches, fork.depths, step, 0)
            steps.append((branches, logq))
    return fork, steps


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (0.75, 3)])
def test_a_chain_is_ordinary_decoding_from_its_prefix(models, coupling, temperature, top_k):
    """Every chain of every branch against passes over the whole prefix without cache: tokens and
    log q.

    Branches of one row are all different, and none is the drafted token.
    """
    draft, k, M = models[1], 4, 11
    prompts, proposals = PROMPTS[3:9], [[4, 9, 2, 7], [3], [], [8, 8], [1, 2, 3], [40, 41, 42, 43]]
    settings = {"temperature": temperature, "top_k": top_k, "coupling": coupling}
    fork, steps = branch_chains(draft, prompts, proposals, settings, M, k)
    for b, (prompt, proposal) in enumerate(zip(prompts, proposals)):
        params = Params.make([temperature], [0], [1.0], [5], [b], "cpu")
        noise = gumbel(params, torch.arange(60)[None], TOKEN, 50, torch.float64)[0]
        branches = list(zip(fork.depths[b], fork.tokens[b]))
        assert len(set(branches)) == M and not set(branches) & set(enumerate(proposal))
        assert {depth for depth, _ in branches} <= set(range(len(proposal) + 1))
        for m, (depth, token) in enumerate(branches):
            prefix = prompt + proposal[:depth] + [token]
            chain = [tokens[b][m] for tokens, _ in steps]
            truth = log_probs(draft, prefix + chain)[len(prefix) - 1 : -1]
            if temperature > 0:
                truth = truth / temperature
                if top_k:
                    truth = truth.masked_fill(
                        truth < truth.topk(top_k).values[:, -1:], float("-inf")
                    )
                truth = truth.log_softmax(-1)
            assert chain == (truth + noise[len(prefix) : len(prefix) + k]).argmax(-1).tolist()
            if coupling == "shared":
                assert all(logq is None for _, logq in steps)
            elif temperature > 0:
                ours = torch.stack([logq.of(b, m).logq for _, logq in steps])
                torch.testing.assert_close(ours, truth, rtol=0, atol=1e-9)


def trunk_compared(decoding, rows) -> int:
    """How many tokens of the rows the draft has read. Fails unless their KV is a fresh one's."""
    settle(decoding)
    ids = [row.ids for row in decoding.rows]
    fresh = Model.of(decoding.draft.model).runner("draft", len(ids), max(map(len, ids)), 1, 0, 50)
    fresh.set_rows(decoding.draft.params, "shared", 1.0)
    with torch.inference_mode(), one_thread():
        fresh.prefill(ids, [0] * len(ids))
    ours, theirs = decoding.draft.cache, fresh.cache
    compared = 0
    for b in rows:
        N = min(decoding.rows[b].draft_read, len(ids[b]))
        for mine, truth in ((ours.k_LBGSD, theirs.k_LBGSD), (ours.v_LBGSD, theirs.v_LBGSD)):
            torch.testing.assert_close(mine[:, b, :, :N], truth[:, b, :, :N], rtol=0, atol=1e-9)
        compared += N
    return compared


@pytest.mark.parametrize(("mode", "fallback"), [("sd", "auto"), ("ssd", "jit"), ("ssd", "fast")])
def test_the_trunk_of_the_draft_is_repaired_every_round(pair, mode, fallback):
    """Whatever was accepted, missed or rolled back: up to the pending token the draft's KV is a
    fresh prefill's."""
    prompts, settings = some(
        range(12, 24), ROWS | {"max_new_tokens": [40 - b % 9 for b in range(B)]}
    )
    decoding = pair.start(prompts, mode=mode, fallback=fallback, k=3, fan_out=3, **settings)
    compared = 0
    for number, _ in enumerate(decoding.rounds()):
        live = decoding.live()
        if number % 4 == 3 and live:
            # The round in flight has read the pending token too. A row's last round needs no draft.
            live = [b for b in live if decoding.rows[b].room(1)]
            everything = sum(len(decoding.rows[b].ids) for b in live)
            assert trunk_compared(decoding, live) == everything
            compared += len(live)
    assert compared > 20


# ---- a planner that plays another plan every round


def play_restlessly(pair, prompts, plans, **settings):
    """generate() by a Restless planner; the draft's trunk is compared with the slow truth on the
    way and at the end."""
    decoding = pair.start(prompts, mode="ssd", k=4, fan_out=7, **settings)
    decoding.planner, every = Restless(plans, 4, 7), range(len(prompts))
    for number, _ in enumerate(decoding.rounds()):
        if number % 7 == 6:
            trunk_compared(decoding, every)
    assert trunk_compared(decoding, every) > 0.7 * sum(len(row.ids) for row in decoding.rows)
    steps = zip(decoding.planner.kinds, decoding.planner.kinds[1:])
    # How many rounds there are hangs on the clock, which cuts chains: 9 of 16 were seen once.
    assert len(set(steps)) >= 6, "many kinds of plan followed many others"
    return pair.finish(decoding)


@pytest.mark.parametrize("seed", range(4))
def test_another_plan_every_round_is_the_same_text(pair, truth, seed):
    """Ragged rows that end at different times; what the draft missed it reads when it is asked
    again."""
    rows = part(seed)
    prompts, settings = some(rows)
    result = play_restlessly(pair, prompts, seed, **settings)
    assert result.token_ids == [truth.token_ids[b] for b in rows]
    assert result.finish_reason == [truth.finish_reason[b] for b in rows]


@pytest.mark.parametrize(("coupling", "c"), [("maximal", 1.0), ("independent", 0.3)])
def test_another_plan_every_round_under_the_other_couplings(pair, truth, coupling, c):
    """Greedy rows keep their text; what the others draw is for test_distribution.py to judge."""
    rows = part(4)
    prompts, settings = some(rows)
    result = play_restlessly(pair, prompts, 5, coupling=coupling, saguaro_c=c, **settings)
    for ids, b in zip(result.token_ids, rows):
        assert ROWS["temperature"][b] > 0 or ids == truth.token_ids[b]


# ---- drafts with a vocabulary of their own


SOME_IDS = [t for t in range(50) if t % 10 not in (3, 7)]  # 33, the end of the text, is left out
OTHER_VOCABULARIES = {
    "cut head": (lambda base: cut_head(base, SOME_IDS), SOME_IDS),
    "fewer tokens": (lambda base: resized(base, 41), range(41)),
    "more tokens": (lambda base: resized(base, 60), range(50)),
}


@pytest.mark.parametrize("name", OTHER_VOCABULARIES)
def test_a_draft_with_a_vocabulary_of_its_own(models, truth, name, monkeypatch):
    """The same text; nothing is proposed that the draft cannot say or the target does not have."""
    make, ids = OTHER_VOCABULARIES[name]
    pair = engine(models[0], make(models[1]), eos={33}, warn=pytest.fail, words=41)
    proposed, put = set(), Proposal.put

    def spy(self, row, kind, tokens, logq=None):
        proposed.update(tokens if kind == CHAIN else ())
        put(self, row, kind, tokens, logq)

    monkeypatch.setattr(Proposal, "put", spy)
    # It reads every token that it does not have as one.
    least = 0.2 if name == "fewer tokens" else 0.35
    for settings in ({"mode": "sd"}, {"mode": "ssd", "fan_out": 6}):
        assert check(pair, truth, part(5), k=3, **settings)["acceptance_rate"] > least
    prompts, settings = some(part(0))
    result = play_restlessly(pair, prompts, 1, **settings)
    assert result.token_ids == [truth.token_ids[b] for b in part(0)]
    assert proposed <= set(ids) and len(proposed) > 30
    for coupling, c in (("maximal", 1.0), ("independent", 0.4)):
        greedy = [b for b in part(3) if ROWS["temperature"][b] == 0]
        for mode in ("sd", "ssd"):
            settings = {"mode": mode, "coupling": coupling, "saguaro_c": c, "fan_out": 6}
            check(pair, truth, greedy, **settings)
    assert proposed <= set(ids)


@pytest.mark.parametrize("coupling", ["maximal", "independent"])
def test_the_log_q_of_a_cut_head_is_that_of_its_own_tokens(models, coupling):
    """A chain of a draft with a cut head: its tokens in the target's ids, its log q over its own
    vocabulary."""
    whole, k, M = models[1], 3, 5
    draft = cut_head(whole, SOME_IDS)
    prompts, proposals = PROMPTS[3:6], [[4, 9, 2], [3], []]
    settings = {"temperature": 0.75, "top_k": 0, "coupling": coupling}
    fork, steps = branch_chains(draft, prompts, proposals, settings, M, k)
    for b, (prompt, proposal) in enumerate(zip(prompts, proposals)):
        for m, (depth, token) in enumerate(zip(fork.depths[b], fork.tokens[b])):
            assert token in SOME_IDS
            prefix = prompt + proposal[:depth] + [token]
            chain = [tokens[b][m] for tokens, _ in steps]
            truth = log_probs(whole, prefix + chain)[len(prefix) - 1 : -1, SOME_IDS]
            for step, (_, logq) in enumerate(steps):
                mine = logq.of(b, m)
                assert mine.ids_V.tolist() == SOME_IDS
                truth_V = (truth[step] / 0.75).log_softmax(-1)
                torch.testing.assert_close(mine.logq, truth_V, rtol=0, atol=1e-9)


def test_each_log_q_lands_where_its_token_was_drawn(models):
    """In the verification of rows whose chains two models drew, each over tokens of its own; -inf
    elsewhere, also in the padding and in rows without a chain."""

    class Given(Exception):
        pass

    def passes(step, feed, *tensors, **columns):
        raise Given(*tensors)

    V, drew = 50, [torch.tensor([4, 9, 40]), torch.arange(50)]
    runner = Runner("target", models[0], 5, 64, 3, 0, Policy(torch.device("cpu"), False), V)
    runner.by_draws, runner._pass = False, passes
    by_row = {1: (0, 3), 2: (1, 2), 4: (0, 1)}  # the model, and how many tokens it drew
    logq, truth = [None] * 5, torch.full((4, 3, V), -torch.inf, dtype=torch.float64)
    for b, (who, tokens) in by_row.items():
        rows = torch.randn(tokens, len(drew[who]), generator=torch.Generator().manual_seed(b))
        logq[b] = [LogQ(drew[who], row) for row in rows]
        for i, token in itertools.product(range(tokens), range(len(drew[who]))):
            truth[b - 1, i, drew[who][token]] = rows[i, token]
    logq[2].append(logq[2][0])  # past the end of what is fed
    feed = Feed([[1] * 4] * 5, [3] * 5, [0, 4, 3, 1, 2])
    with pytest.raises(Given) as given:
        runner.verify(feed, [CHAIN] * 5, logq)
    torch.testing.assert_close(given.value.args[0], truth, rtol=0, atol=0)


# ---- drafts that are always right, useless, or malicious


@pytest.mark.parametrize(
    ("temperature", "coupling"), [(0.0, "shared"), (1.0, "shared"), (1.0, "maximal")]
)
def test_a_perfect_draft_is_always_right(models, temperature, coupling):
    target = models[0]
    pair = engine(target, transformer(base=target), warn=pytest.fail)
    for mode, cut in (("sd", True), ("ssd", True), ("ssd", False)):
        settings = {
            "temperature": temperature,
            "coupling": coupling,
            "cut": cut,
            "max_new_tokens": 30,
        }
        settings |= {"k": 4, "fan_out": 8, "fallback": "jit"}
        stats = pair.generate(PROMPTS[:16], mode=mode, **settings).stats
        assert stats["acceptance_rate"] == stats["accepted_fraction"] == 1
        if mode == "sd":
            assert stats["hit_rate"] is None
        else:  # by scores the draft must first find out that it is never wrong
            assert stats["hit_rate"] == 1 or (
                coupling == "shared" and temperature and stats["hit_rate"] > 0.98
            )
        if not cut:
            # One token by the first round, then five by each: 29 more take 6.
            assert stats["rounds"] == 6


@pytest.mark.parametrize("mode", ["sd", "ssd"])
def test_a_useless_draft_does_no_harm(models, truth, mode):
    pair = engine(models[0], models[2], eos={33}, warn=pytest.fail)
    stats = check(pair, truth, part(1), mode=mode, fan_out=6, fallback="jit")
    assert stats["acceptance_rate"] < 0.3


def test_an_adversarial_draft_does_no_harm(models):
    """It proposes what the target likes least: nothing is ever accepted, and nothing hits."""
    target = models[0]
    contrary = transformer(base=target)
    contrary.head.weight.neg_()
    pair = engine(target, contrary, warn=pytest.fail)
    expected = pair.generate(PROMPTS[:24], mode="ar", max_new_tokens=30).token_ids
    for mode in ("sd", "ssd"):
        result = pair.generate(
            PROMPTS[:24], mode=mode, fallback="jit", fan_out=6, max_new_tokens=30
        )
        assert result.token_ids == expected
        assert result.stats["acceptance_rate"] == 0 and not result.stats["hit_rate"]
        assert result.stats["tokens_per_round"] == 1


# ---- what it says about itself


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_hit_rate_is_that_of_the_look_ups(pair, monkeypatch, coupling):
    """Hits counted from what was prepared and what came; foresight learns just that, and rates
    count just that."""
    hits, seen, told, counts = [], [], [], {CHAIN: [0, 0, 0], FIXED: [0, 0, 0]}
    propose, learn, emit = Decoding.propose, Foresight.learn, Decoding.emit

    def spy_propose(self, chains, accepted, bonus, plan, done):
        settle(self)
        found = {b: (b, accepted[b], bonus[b]) in chains.branch_of for b in self.live()}
        hits.extend(found.values())
        assert chains.moments and all(0 < chains.chance[b] <= 1 + 1e-9 for b in found)
        for of_row in (True, False):  # those that hit come first
            rows = [b for b in found if found[b] == of_row]
            rejected = [int(accepted[b] < done.length[b]) for b in rows]
            seen.extend(
                (chains.chance[b], found[b], accepted[b], r) for b, r in zip(rows, rejected)
            )
        fed = done.live[-1] + 1 - done.live[0]  # the places of the pass, from the first live one
        assert all(len(chains.branch_of) == 4 * fed for _ in found)
        return propose(self, chains, accepted, bonus, plan, done)

    def spy_emit(self, live, proposal, accepted, bonus):
        for b in live:
            if length := len(proposal.tokens[b]):
                drawn = accepted[b], int(accepted[b] < length), length
                counts[proposal.kind[b]] = list(map(sum, zip(counts[proposal.kind[b]], drawn)))
        emit(self, live, proposal, accepted, bonus)

    def spy_learn(self, *lesson):
        told.append(lesson)
        learn(self, *lesson)

    monkeypatch.setattr(Decoding, "propose", spy_propose)
    monkeypatch.setattr(Decoding, "emit", spy_emit)
    monkeypatch.setattr(Foresight, "learn", spy_learn)
    prompts, settings = some(part(2))
    settings |= {"mode": "ssd", "fallback": "fast", "fan_out": 4, "k": 3, "coupling": coupling}
    stats = pair.generate(prompts, **settings).stats
    assert stats["hit_rate"] == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    assert 0.3 < stats["hit_rate"] < 0.95
    assert told == seen
    accepted, rejected, drafted = (counts[CHAIN][i] + counts[FIXED][i] for i in range(3))
    assert stats["acceptance_rate"] == accepted / (accepted + rejected)
    assert stats["accepted_fraction"] == accepted / drafted and counts[FIXED][2] > 0


@pytest.mark.parametrize("fallback", FALLBACKS)
def test_a_miss_falls_back_by_itself(pair, truth, monkeypatch, fallback):
    """jit decodes for the rows that missed and no others; rows that hit keep their chains; auto
    waits for no row that hit."""
    missed, wanted, kinds = [], [], []
    propose, draft_now = Decoding.propose, Decoding.draft_now

    def spy_propose(self, chains, accepted, bonus, plan, done):
        asked = len(wanted)
        proposal, live = propose(self, chains, accepted, bonus, plan, done), self.live()
        hit = [b for b in live if (b, accepted[b], bonus[b]) in chains.branch_of]
        assert done.hit == hit and sorted(done.hit + done.missed) == live
        for b in live:
            if b in hit:
                assert proposal.kind[b] == CHAIN or not self.rows[b].room(3)
        drafted = fallback == "jit" or fallback == "auto" and not hit
        for b in done.missed:
            assert not drafted or proposal.kind[b] == CHAIN or not self.rows[b].room(3)
            assert drafted or proposal.kind[b] != CHAIN
        if done.missed:
            missed.append(done.missed)
            kinds.append(drafted)
        assert wanted[asked:] == [done.missed] * (drafted and bool(done.missed))
        return proposal

    def spy_draft_now(self, rows, plan, done):
        wanted.append(list(rows))
        return draft_now(self, rows, plan, done)

    monkeypatch.setattr(Decoding, "propose", spy_propose)
    monkeypatch.setattr(Decoding, "draft_now", spy_draft_now)
    check(pair, truth, part(4), mode="ssd", fallback=fallback, fan_out=3, k=3)
    assert 1 < min(map(len, missed[:4])) <= max(map(len, missed)) < 48
    if fallback == "auto":  # a batch whose every row misses is rare, a single row is not
        check(
            pair, truth, [B - 1], mode="ssd", fallback=fallback, fan_out=1, k=3, max_new_tokens=37
        )
        assert True in kinds and False in kinds


def test_chains_are_cut_by_the_clock(pair, truth, monkeypatch):
    """cut: no chain step begins once the verdict is in, but the first; otherwise all K are waited
    for."""
    monkeypatch.setattr(Lane, "has_time", lambda lane, verdict: False)
    lengths, trimmed = set(), set()
    look_up, checked, propose = SpeculationCache.look_up, Decoding.checked, Decoding.propose

    def spy(self, *args):
        found = look_up(self, *args)
        lengths.update((len(self.steps), len(tokens), len(logq)) for tokens, logq in found.values())
        return found

    def spy_checked(self, tokens, logq, room):
        kept = checked(self, tokens, logq, room)
        assert kept == (tokens[:room], logq[:room])
        trimmed.add(len(kept[0]))
        return kept

    monkeypatch.setattr(SpeculationCache, "look_up", spy)
    monkeypatch.setattr(Decoding, "checked", spy_checked)
    monkeypatch.setattr(
        Decoding, "propose", lambda self, *args: (settle(self), propose(self, *args))[1]
    )
    for cut, steps in ((True, 1), (False, 5)):
        lengths.clear()
        trimmed.clear()
        check(pair, truth, range(40), mode="ssd", cut=cut, k=5, fan_out=8, fallback="fast")
        assert lengths == {(steps,) * 3}
        assert max(trimmed) == steps and (cut or min(trimmed) < 5)


STATS = (
    "mode target draft device draft_device dtype k fan_out cut fallback coupling temperature seed "
    "prompts prompt_tokens new_tokens token_ids text finish_reason prefill_s decode_s tokens_per_s "
    "rounds tokens_per_round acceptance_rate accepted_fraction hit_rate distinct_4grams round_ms "
    "verify_ms draft_ms exposed_ms hidden speedup_ceiling bandwidth_fraction peak_memory_gb"
).split()
ONLY_SPECULATIVE = set(
    "k coupling draft draft_device acceptance_rate accepted_fraction draft_ms exposed_ms".split()
)
ONLY_SSD = {"fan_out", "cut", "fallback", "hit_rate", "hidden", "speedup_ceiling"}


@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_every_figure_is_there(pair, mode):
    prompts = [[1, 2, 3], [4]]
    result = pair.generate(
        prompts,
        mode=mode,
        max_new_tokens=[60, 50],
        ignore_eos=True,
        temperature=0.5,
        seed=3,
        k=2,
        fan_out=8,
    )
    stats = result.stats
    assert set(STATS) <= set(stats)
    absent = {"ar": ONLY_SPECULATIVE | ONLY_SSD, "sd": ONLY_SSD, "ssd": set()}[mode]
    assert {name for name in STATS if stats[name] is None} == absent
    assert (
        stats["mode"] == mode
        and stats["device"] == DEVICES.given[0]
        and stats["dtype"] == "float64"
    )
    assert stats["prompt_tokens"] == [3, 1] and stats["new_tokens"] == [60, 50] == [
        len(x) for x in stats["token_ids"]
    ]
    assert stats["token_ids"] == result.token_ids and stats["finish_reason"] == ["length"] * 2
    assert stats["tokens_per_s"] == pytest.approx((110 - 2) / stats["decode_s"])
    if mode == "ar":
        assert stats["rounds"] == 59 and stats["tokens_per_round"] == 1
    one = pair.generate([[1]], mode=mode, max_new_tokens=1).stats  # nothing to take a median of
    assert set(STATS) <= set(one) and one["new_tokens"] == [1]


@pytest.mark.parametrize("mode", ["ar", "ssd"])
def test_prompts_of_several_chunks_are_read_like_prompts_of_one(monkeypatch, mode):
    """Ragged ones, and a turn of a chat that begins in the middle of what the cache holds."""
    target = transformer(0)
    pair = engine(target, target, warn=pytest.fail)  # never rejected, unless its KV has a hole
    turn = {"mode": mode, "max_new_tokens": 8, "temperature": 1.0, "keep": True, "ignore_eos": True}
    turn |= {"k": 2, "fan_out": 6, "cut": False} if mode == "ssd" else {}

    def texts() -> list:
        ragged = pair.generate(PROMPTS[7:13], **turn | {"keep": False})
        first = pair.generate(PROMPTS[12:13], **turn)
        longer = PROMPTS[12] + first.token_ids[0] + list(range(11))
        results = ragged, first, pair.generate([longer], **turn)
        assert mode == "ar" or all(r.stats["acceptance_rate"] == 1 for r in results)
        return [result.token_ids for result in results]

    whole = texts()
    for module in ("ssd", "steps"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNKS", (2, 4))
    assert texts() == whole


def test_chains_that_nobody_will_look_up_are_not_made(models, monkeypatch):
    """After the last token of a run. Whole chains of many steps would hold up the next run, or the
    end of the program."""
    steps, chain_step = [], Runner.chain_step

    def slow(self, *args):
        steps.append(1)
        time.sleep(0.02)
        return chain_step(self, *args)

    monkeypatch.setattr(Runner, "chain_step", slow)
    pair = engine(*models[:2], warn=pytest.fail)
    pair.generate([[1, 2]], mode="ssd", k=60, fan_out=4, cut=False, max_new_tokens=1)
    pair.generate([[1, 2]], mode="ar", max_new_tokens=1)
    pair.devices.lanes("ssd")[1].start(lambda: None).result(60)
    assert len(steps) < 60
