"""studies/: the speed model against brute force, the paper's fan-out, the table of errors."""

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from figures import ssd_ceiling
from studies import paper, simulate, speed

ROOT = Path(__file__).resolve().parent.parent
PAIR = simulate.Pair(verify=0.020, step=0.002, acceptance=0.8, c=0.4, b=0.6)


# ---- where a budget goes


@pytest.mark.parametrize("budget", [1, 4, 7])
def test_no_list_hits_more_often_than_the_best(budget):
    chances, curve = speed.outcomes(0.7, 3), speed.power_law(0.6, 0.5, budget)
    hits = lambda F: sum(P * (1 - curve[F_j]) for P, F_j in zip(chances, F))  # noqa: E731
    best = speed.allocate(chances, [curve] * 4, budget)
    assert sum(best) == budget
    lists = itertools.product(range(budget + 1), repeat=4)
    assert max(hits(F) for F in lists if sum(F) == budget) == pytest.approx(hits(best))


def test_the_geometric_series_is_the_papers_and_the_optimum():
    a, b, L, M = 0.7, 0.5, 5, 4800
    F = speed.geometric(a, b, L, M)
    assert sum(F) == pytest.approx(M)
    ratios = [F[j + 1] / F[j] for j in range(L - 1)]
    assert ratios == pytest.approx([a ** (1 / (1 + b))] * (L - 1))
    assert F[L] / F[0] == pytest.approx(a ** (L / (1 + b)) * (1 - a) ** (-1 / (1 + b)))
    greedy = speed.allocate(speed.outcomes(a, L), [speed.power_law(0.5, b, M)] * (L + 1), M)
    assert greedy == pytest.approx(F, abs=1)


def test_every_kind_of_list_spends_the_budget():
    for lists in simulate.LISTS:
        F = simulate.shares(lists, PAIR, 4, 11)
        assert sum(F) == 11 and min(F) >= 0 and len(F) == 5
        assert simulate.shares(lists, PAIR, 0, 11) == [11]


# ---- rates


def played(pair, k: int, budget: int, batch: int, fallback: str, rounds: int = 20_000) -> float:
    """Tokens a second and row of SSD whose chains are waited for, round by round."""
    rng, now, tokens, length = random.Random(0), 0.0, 0, [k] * batch
    F = simulate.shares("best", pair, k, budget)
    curve = speed.power_law(pair.c, pair.b, budget)
    for _ in range(rounds):
        now += max(pair.verifying(0), pair.extending(0) + k * pair.stepping(0))
        hit = []
        for b in range(batch):
            draws = itertools.takewhile(lambda _: rng.random() < pair.acceptance, range(length[b]))
            j = len(list(draws))
            prepared = F[j] if length[b] else budget
            hit.append(rng.random() >= curve[prepared])
            tokens += j + 1
        if fallback == "jit":
            now += 0 if all(hit) else k * pair.stepping(0)
        else:
            length = [k if found else 0 for found in hit]
    return tokens / now / batch


@pytest.mark.parametrize(
    "k, budget, batch, fallback", [(4, 12, 1, "jit"), (3, 8, 3, "jit"), (5, 12, 2, "fast")]
)
def test_ssd_is_what_playing_its_rounds_gives(k, budget, batch, fallback):
    model = simulate.ssd(PAIR, k, budget, batch, fallback=fallback, cut=False)
    assert model.tokens_per_s == pytest.approx(played(PAIR, k, budget, batch, fallback), rel=0.01)


def test_ssd_that_always_hits_reaches_its_ceiling_over_sd():
    sure, k = replace(PAIR, c=0.0), 4
    sd, ssd = simulate.sd(sure, k), simulate.ssd(sure, k, 8)
    assert ssd.tokens_per_s / sd.tokens_per_s == pytest.approx(ssd_ceiling(k * 0.002, 0.020))
    assert simulate.ar(sure).tokens_per_s == pytest.approx(50)


def test_waiting_for_too_large_a_k_loses_and_cutting_does_not():
    """Extending takes a step, so nine more fit into a verification of ten."""
    waited, cut = (
        [simulate.ssd(PAIR, k, 8, cut=way) for k in (9, 12, 16)] for way in (False, True)
    )
    assert waited[0].tokens_per_s > waited[1].tokens_per_s > waited[2].tokens_per_s
    assert [found.chain_length for found in cut] == [9, 9, 9]


def test_pearl_hits_when_everything_was_accepted():
    pearl = simulate.simulate(PAIR, 4, 16)["PEARL"]
    assert pearl.hit_rate == pytest.approx(0.8**4 * 0.6)


@pytest.mark.parametrize("batch", [2, 8, 32])
@pytest.mark.parametrize("fixed", [0.001, 0.004, 0.012])
def test_halves_pay_where_drafting_takes_longer_than_the_fixed_part_of_a_verification(fixed, batch):
    pair = simulate.Pair(verify=fixed, step=0.002, verify_token=0.01)
    gain = (
        simulate.sd_halves(pair, 4, batch).tokens_per_s / simulate.sd(pair, 4, batch).tokens_per_s
    )
    assert (gain > 1) == (4 * 0.002 > fixed)
    both = simulate.ssd_halves(pair, 4, 8, batch)
    assert 0 < both.hit_rate < 1 and 1 <= both.chain_length <= 4


# ---- the paper


def test_the_committed_table_is_what_it_gives():
    """If this fails: python -m studies.paper > studies/README.md."""
    assert (ROOT / "studies" / "README.md").read_text() == paper.report() + "\n"


def test_every_published_cell_is_in_the_table():
    shown = set(re.findall(r"\| ([\d.]+) \|", paper.report()))
    rows = [row[1:] for row in paper.TEMPERATURES.values()] + list(paper.BATCHES.values())
    rows += [pair[:3] for pair in paper.PAIRS.values()] + [(97, 141, 211, 159)]
    assert {f"{float(value):.4g}" for row in rows for value in row} <= shown


def test_a_fit_finds_the_numbers_that_made_the_cells(monkeypatch):
    made = (50.0, 150.0, None, 7e10, 1e9)
    monkeypatch.setitem(paper.PAIRS, "made", made)
    known = paper.with_acceptance("made", 0.85)
    rate = paper.published_ssd(known).tokens_per_s
    monkeypatch.setitem(paper.PAIRS, "made", (*made[:2], rate, *made[3:]))
    assert paper.fit("made").acceptance == pytest.approx(0.85)
    assert paper.fit("made").step == pytest.approx(known.step)
    monkeypatch.setitem(paper.PAIRS, "made", (*made[:2], 900.0, *made[3:]))
    with pytest.raises(ValueError, match="cannot be met"):
        paper.fit("made")


# ---- the command


def test_the_command_shows_the_modes(capsys):
    simulate.main("--verify-ms 18 --step-ms 2 --k 5 --fan-out 24 --batch 2".split())
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()][2:]
    rates = {row[0].strip(): float(row[1]) for row in rows}
    names = ["AR", "SD", "PEARL", "SSD", "SD in halves", "SSD in halves"]
    assert list(rates) == names and rates["AR"] < rates["SD"] < rates["SSD"]


@pytest.mark.parametrize("flags", [
    "", "--verify-ms 3", "--verify-ms -3 --step-ms 1", "--verify-ms nan --step-ms 1",
    "--verify-ms 3 --step-ms 1 --k 0", "--verify-ms 3 --step-ms 1 --fallback none",
])  # fmt: skip
def test_mistakes_end_with_exit_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        simulate.main(flags.split())
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err


def test_ranks_share_the_work_and_wait_for_sums(capsys):
    """By hand: 161 sums at 10 us, then 15 us halfway between two sizes, 40 us past the last."""
    ranks = simulate.Ranks(4, 161, 1000, ((1000, 10e-6), (3000, 20e-6)))
    assert [ranks.waiting(n) for n in (1, 2, 3, 6)] == pytest.approx(
        [161 * us * 1e-6 for us in (10, 15, 20, 40)]
    )
    pair = simulate.Pair(verify=0.060, step=0.002, ranks=ranks)
    assert simulate.ar(pair).tokens_per_s == pytest.approx(1 / (0.015 + 161 * 10e-6))
    flags = "--verify-ms 60 --step-ms 2 --ranks 4 --layers 80"
    simulate.main(flags.split())
    assert "161 sums over the ranks, assumed, not measured" in capsys.readouterr().out
    simulate.main([*flags.split(), "--all-reduce", "16384:8", "131072:12"])
    assert "161 sums over the ranks, as given: 1.29 ms a token" in capsys.readouterr().out
