"""scripts/simulate.py: the clock against closed forms and brute force, and the committed fit of the paper's numbers."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from speed import expected_tokens, sd_rate, ssd_rate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import published  # noqa: E402
import simulate  # noqa: E402
from clock import Plan, Play, Profile, Times, fan_out_list, hit_chance, miss_curve, play, power_law  # noqa: E402

TIMES = Times(verify=0.020, step=0.002, handover=0.001)
SURE = Profile(0.8, (0.0,), (0.0,))  # every outcome is prepared


def chances(hit: float, acceptance: float = 0.8) -> Profile:
    """The same chance to hit whatever the outcome."""
    return Profile(acceptance, (1 - hit,), (1 - hit,))


def speed(plan: Plan, times: Times = TIMES, profile: Profile = SURE) -> float:
    """Tokens a second and sequence."""
    return play(plan, times, profile)["tokens_per_s"] / plan.batch


# ---- closed forms


def test_plain_decoding_is_the_verification_alone():
    assert speed(Plan("ar")) == pytest.approx(1 / 0.021)
    assert speed(Plan("ar", batch=8), replace(TIMES, verify_token=0.001)) == pytest.approx(1 / 0.029)


@pytest.mark.parametrize("a, k, batch", [(0.8, 4, 1), (0.5, 7, 3), (0.0, 2, 1), (1.0, 5, 2)])
def test_sd_is_the_speed_model(a, k, batch):
    want = sd_rate(expected_tokens(a, k), k * TIMES.step, TIMES.verify + TIMES.handover)
    assert speed(Plan("sd", k, batch=batch), TIMES, chances(0.0, a)) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("k, length, late", [(4, 4, 0.0), (12, 9, 0.0), (12, 12, 0.006)])
def test_ssd_without_misses_is_the_speed_model(k, length, late):
    """Extending takes a step, so nine more fit behind a verification of ten; waiting for twelve is 6 ms late."""
    tokens = expected_tokens(0.8, length)
    want = ssd_rate(1.0, tokens, 0, TIMES.verify + TIMES.handover + late, 0)
    played = play(Plan("ssd", k, cut=not late), TIMES, SURE)
    assert played["tokens_per_s"] == pytest.approx(want, rel=0.02)
    assert (played["hit_rate"], played["chain_length"]) == (1, length)
    assert played["exposed_ms"] == pytest.approx(1 + late * 1e3)


@pytest.mark.parametrize("hit, batch", [(0.7, 1), (0.9, 4), (0.0, 2)])
def test_ssd_that_drafts_on_a_miss_is_the_speed_model(hit, batch):
    k, t_hit = 5, TIMES.verify + TIMES.handover
    t_miss = t_hit + k * TIMES.step + TIMES.handover
    want = ssd_rate(hit, *[expected_tokens(0.8, k)] * 2, t_hit, t_miss, batch)
    for whole in (False, True):
        assert speed(Plan(k=k, batch=batch, whole_batch=whole), TIMES, chances(hit)) == pytest.approx(want, rel=0.02)


def test_ssd_that_does_not_wait_on_a_miss_is_the_speed_model():
    """The long-run hit rate is h_b / (1 - h_p + h_b), h_p after a hit and h_b after a miss."""
    k = 5
    profile = Profile(0.8, (0.5,), (0.1,))  # an empty proposal is followed by a bonus token: h_b = 0.9
    after_hit = 0.5 * (1 - 0.8**k) + 0.9 * 0.8**k
    h = 0.9 / (1 - after_hit + 0.9)
    played = play(Plan(k=k, fallback="fast"), TIMES, profile)
    assert played["hit_rate"] == pytest.approx(h, abs=0.01)
    want = ssd_rate(h, expected_tokens(0.8, k), 1, *[TIMES.verify + TIMES.handover] * 2)
    assert played["tokens_per_s"] == pytest.approx(want, rel=0.02)


def test_random_tokens_cost_no_time_and_hold_never():
    profile = Profile(1.0, (0.0,), (1.0,))  # accepted chains miss, useless ones hit: every other round has one token
    played = play(Plan(k=3, fallback="random"), TIMES, profile)
    assert played["tokens_per_round"] == pytest.approx((4 + 1) / 2, rel=0.01)
    assert played["round_ms"] == pytest.approx(21)


def test_pearl_hits_when_everything_was_accepted():
    plan = Plan(k=4, fan_out=1, lists="last")
    profile = Profile(0.8, power_law(0.3, 1.0, 1), power_law(0.3, 1.0, 1))
    assert fan_out_list(plan, profile, 4) == [0, 0, 0, 0, 1]
    assert play(plan, TIMES, profile)["hit_rate"] == pytest.approx(0.8**4 * 0.7, abs=0.01)


def test_auto_is_no_slower_than_both_fallbacks():
    for step, batch in itertools.product((0.0002, 0.004), (1, 8)):
        plans = [Plan(k=4, fallback=how, batch=batch) for how in ("jit", "fast", "auto")]
        jit, fast, auto = (speed(plan, replace(TIMES, step=step), chances(0.7)) for plan in plans)
        assert auto > 0.98 * max(jit, fast)


# ---- what must hold whatever the numbers are


def test_waiting_for_too_large_a_k_loses_and_cutting_does_not():
    waited, cut = ([speed(Plan(k=k, cut=way)) for k in (9, 12, 16)] for way in (False, True))
    assert waited[0] > waited[1] > waited[2]
    assert cut[0] == cut[1] == cut[2] == pytest.approx(waited[0])


def test_a_step_that_has_begun_delays_the_next_round_and_one_that_hardly_fits_is_not_begun():
    """Verification 10, extending 4, steps of 3.2. Most of the second step fits: it ends 0.4 late, and so does the next
    extending; then 0.8 late, and then too little of it would fit."""
    run = Play(Plan(k=4), Times(verify=10.0, step=3.2, extend=4.0), SURE, seed=0)
    seen = []
    for _ in range(3):
        run.round()
        seen.append((run.now, pytest.approx(run.draft_free), run.length))
    assert seen == [(10, 10.4, [1]), (20, 20.8, [1]), (30, 28.0, [1])]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_more_of_anything_good_is_no_slower(devices):
    times = replace(TIMES, step_token=0.0001, verify_token=0.0001)
    profile = published.small_pair_profile("shared", 0.8, 64)
    plan = Plan(k=5, fan_out=32, devices=devices, batch=2)
    base = speed(plan, times, profile)
    assert speed(replace(plan, devices=devices * 2), times, profile) >= base
    assert speed(plan, replace(times, step=0.001), profile) >= base
    assert speed(plan, times, replace(profile, acceptance=0.9)) > base
    free = replace(times, step_token=0.0)
    assert speed(replace(plan, fan_out=64), free, profile) > 0.99 * speed(plan, free, profile)


def test_the_same_seed_plays_the_same_run():
    plan = Plan(k=5, batch=3, fallback="auto")
    assert play(plan, TIMES, chances(0.6), seed=1) == play(plan, TIMES, chances(0.6), seed=1)
    assert play(plan, TIMES, chances(0.6), seed=1) != play(plan, TIMES, chances(0.6), seed=2)


# ---- lists


@pytest.mark.parametrize("M", [1, 4, 7])
def test_no_list_hits_more_often_than_the_best(M):
    profile, k = Profile(0.7, power_law(0.6, 0.5, M), power_law(0.3, 1.0, M)), 3
    best = hit_chance(Plan(k=k, fan_out=M), profile, k)
    for F in itertools.product(range(M + 1), repeat=k + 1):
        if sum(F) == M:
            hits = sum(P * (1 - profile.miss(j, k, F_j)) for j, (P, F_j) in enumerate(zip(profile.outcomes(k), F)))
            assert hits <= best + 1e-12
    for lists in ("uniform", "geometric", "last"):
        F = fan_out_list(Plan(k=k, fan_out=M, lists=lists), profile, k)
        assert sum(F) == M and min(F) >= 0 and len(F) == k + 1
        assert fan_out_list(Plan(k=k, fan_out=M, lists=lists), profile, 0) == [M]


def test_the_geometric_list_is_the_papers():
    a, b, k, M = 0.7, 0.5, 5, 4800
    F = fan_out_list(Plan(k=k, fan_out=M, lists="geometric"), Profile(a, exponent=b), k)
    assert [F[j + 1] / F[j] for j in range(k - 1)] == pytest.approx([a ** (1 / (1 + b))] * (k - 1), rel=0.01)
    assert F[k] / F[0] == pytest.approx(a ** (k / (1 + b)) * (1 - a) ** (-1 / (1 + b)), rel=0.01)


def test_curves_go_through_their_points():
    curve = miss_curve({1: 0.6, 2: 0.4, 8: 0.1}, 20)
    assert (curve[0], curve[1], curve[2], curve[8]) == pytest.approx((1, 0.6, 0.4, 0.1))
    assert curve[4] == pytest.approx(0.2) and curve[16] == pytest.approx(0.05)
    assert all(x - y >= y - z - 1e-12 >= -1e-12 for x, y, z in zip(curve, curve[1:], curve[2:]))


# ---- the paper


@pytest.fixture(scope="module")
def fresh():
    return simulate.simulate(simulate.parser().parse_args(["--paper", "--ask"]))


def same(got, want, where=""):
    """Equal but for the last digit written."""
    if isinstance(want, dict):
        assert list(got) == list(want), where
        for key in want:
            same(got[key], want[key], f"{where} {key}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for n, (x, y) in enumerate(zip(got, want)):
            same(x, y, f"{where} {n}")
    else:
        assert got == want or math.isclose(got, want, rel_tol=2e-3, abs_tol=1e-5), where


def test_the_committed_results_are_what_it_gives(fresh):
    same(fresh, json.loads((ROOT / "results" / "simulated_paper.json").read_text()))


def test_every_published_cell_is_in_the_error_table(fresh):
    cells = fresh["paper"]["cells"]
    shown = {cell["published"] for cell in cells}
    for row in (*published.TEMPERATURES.values(), *published.BATCHES.values()):
        assert set(row[1:]) <= shown
    assert {97, 141, 211, 159} <= shown
    for cell in cells:
        assert cell["error"] == pytest.approx(cell["predicted"] / cell["published"] - 1, abs=2e-3)
        if cell["role"] == "fitted":
            assert abs(cell["error"]) < 0.01, "a fitted cell is met, up to the noise of the draws"
    for row in fresh["paper"]["summary"]:
        errors = [abs(c["error"]) for c in cells if (c["group"], c["role"]) == (row["group"], "predicted")]
        assert row["cells"] == len(errors)
        assert row["worst_error"] == max(errors)
        assert row["mean_error"] == pytest.approx(sum(errors) / len(errors), rel=0.01)


def test_a_fit_finds_numbers_that_made_the_cells(monkeypatch):
    pair = {"ar": 50.0, "target": 7e10, "draft": 1e9}
    known = published.times_for(pair | {"sd": 150.0}, 0.85)
    rate = published.waited_rate(known, 0.85, published.TEMPERATURES[0.0][2], published.SSD_K, published.M)
    monkeypatch.setitem(published.PAIRS, "made", pair | {"sd": 150.0, "ssd": rate})
    found = published.fit("made")
    assert found["acceptance"] == pytest.approx(0.85, abs=1e-6)
    assert found["times"].step == pytest.approx(known.step)
    monkeypatch.setitem(published.PAIRS, "made", pair | {"sd": 150.0, "ssd": 900.0})
    with pytest.raises(ValueError, match="cannot be met"):
        published.fit("made")


def test_the_small_pairs_are_met_at_their_own_acceptance():
    for coupling, (better, worse) in published.REJECTED.items():
        for place, ranks in enumerate((better, worse)):
            profile = published.small_pair_profile(coupling, published.ACCEPTANCE["maximal"][place], 16)
            assert profile.acceptance == pytest.approx(published.ACCEPTANCE[coupling][place])
            for F, found in ranks.items():
                assert 1 - profile.rejected[F] == pytest.approx(found, abs=0.005)


# ---- measured runs


def results_file(tmp_path, hit: float = 0.7) -> Path:
    """Cells whose tokens per second follow from their parts by the speed model."""
    around = lambda rate: {"median": rate, "low": 0.98 * rate, "high": 1.02 * rate}  # noqa: E731
    tokens = expected_tokens(0.8, 4)
    base = {"model": "m", "device": "cpu:0", "acceptance_rate": 0.8, "k": 4}
    ar = {"model": "m", "name": "AR", "peer": "ar", "verify_ms": 10.0, "round_ms": 10.5}
    ar["tokens_per_s"] = around(1 / 10.5e-3)
    sd = base | {"name": "SD", "peer": "sd", "verify_ms": 11.0, "draft_ms": 6.0, "exposed_ms": 6.5}
    sd["tokens_per_s"] = around(sd_rate(tokens, 6.5e-3, 11e-3))
    ssd = base | {"name": "SSD", "peer": "ssd", "fan_out": 8, "verify_ms": 12.0, "exposed_ms": 0.5, "extend_ms": 2.0}
    ssd |= {"chain_step_ms": 2.0, "hit_rate": hit, "fallback": "jit"}
    ssd["tokens_per_s"] = around(ssd_rate(hit, tokens, tokens, 12.5e-3, 19e-3))
    cells = [ar, sd, ssd, {"name": "other", "peer": "transformers", "tokens_per_s": around(1.0)}]
    cells.append(ssd | {"name": "no hits", "extend_ms": None})
    tuned = sd | {"name": "SD auto", "k": "auto", "k_used": 4.0}
    path = tmp_path / "cells.json"
    path.write_text(json.dumps({"parts": {"overlap": {"cells": cells}, "modes": {"cells": [tuned]}}}))
    return path


def test_a_measured_run_is_predicted_from_its_parts(tmp_path, capsys):
    path, out = results_file(tmp_path), tmp_path / "out.json"
    assert simulate.main(["--run", str(path), "--out", str(out)]) == 0
    run = json.loads(out.read_text())["run"]
    assert {c["name"]: (c["k"], c["inside"]) for c in run["cells"]} == {
        "AR": (None, True), "SD": (4, True), "SSD": (4, True), "SD auto": (4, True),
    }  # fmt: skip
    assert run["left_out"] == ["m no hits has no extend_ms"]
    printed = capsys.readouterr().out
    assert "| m | SSD | cpu:0 |  |  | 4 | 8 |" in printed and "has no extend_ms" in printed
    assert str(tmp_path) not in printed
    wrong = json.loads(path.read_text())
    wrong["parts"]["overlap"]["cells"][0]["verify_ms"] = 20.0
    path.write_text(json.dumps(wrong))
    assert [cell["inside"] for cell in simulate.reproduce(str(path))["cells"]] == [False, True, True, True]


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("cpu_overlap*.json")), ids=lambda path: path.name)
def test_our_own_runs_can_be_read(path):
    run = simulate.reproduce(str(path))
    assert {"ar", "sd", "ssd"} <= {cell["peer"] for cell in run["cells"]} and not run["left_out"]


@pytest.mark.parametrize("cells", [[], [{"peer": "ar", "tokens_per_s": 5}], [7], {"peer": "ar"}, "ar"])
def test_cells_that_say_nothing_are_refused(cells, tmp_path, capsys):
    path = tmp_path / "cells.json"
    path.write_text(json.dumps({"parts": {"overlap": {"cells": cells}}}))
    assert simulate.main(["--run", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_given_times_show_every_mode_under_every_coupling(capsys):
    assert simulate.main(["--verify-ms", "18", "--step-ms", "2", "--k", "5", "--fan-out", "24", "--batch", "2"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    speeds = {(row[0].strip(), row[1].strip()): float(row[2]) for row in rows}
    assert len(speeds) == 16
    for coupling in ("any (temperature 0)", "maximal", "shared", "independent"):
        assert speeds[coupling, "AR"] < speeds[coupling, "SD"] < speeds[coupling, "SSD"]


def test_measured_profiles_are_played_at_given_times(tmp_path, capsys):
    path, a, k, hit = tmp_path / "profiles.json", 0.7, 4, 0.6
    cell = {"k": k, "fan_out": 8, "temperature": 1.0, "coupling": "shared", "acceptance_rate": a, "hit_rate": hit}
    path.write_text(json.dumps({"parts": {"predict": {"cells": [cell]}}}))
    flags = ["--verify-ms", "20", "--step-ms", "2", "--fallback", "jit", "--profiles", str(path)]
    assert simulate.main(flags) == 0
    sd, ssd = [line for line in capsys.readouterr().out.splitlines() if "measured at T=1.0 K=4 M=8" in line]
    tokens = expected_tokens(a, k)
    assert float(sd.split("|")[3]) == pytest.approx(sd_rate(tokens, 8e-3, 20e-3), rel=0.02)
    assert float(ssd.split("|")[3]) == pytest.approx(ssd_rate(hit, tokens, tokens, 20e-3, 28e-3), rel=0.02)
    path.write_text(json.dumps({"parts": {"predict": {"cells": [cell | {"hit_rate": None}]}}}))
    assert simulate.main(flags) == 2 and "lacks its hits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), ("nothing was asked",)),
        (("--run", "/nowhere.json"), ("/nowhere.json", "bench.py")),
        (("--run", "README.md"), ("no measured cells",)),
        (("--run", "results/cpu_plain.json"), ("overlap",)),
        (("--paper", "--profiles", "results/cpu_predict.json"), ("--verify-ms",)),
        (("--verify-ms", "3", "--step-ms", "1", "--profiles", "/nowhere.json"), ("/nowhere.json", "predict")),
        (("--verify-ms", "3"), ("--step-ms",)),
        (("--verify-ms", "-3", "--step-ms", "1"), ("--verify-ms is -3.0",)),
        (("--verify-ms", "nan", "--step-ms", "1"), ("--verify-ms is nan",)),
        (("--verify-ms", "3", "--step-ms", "1", "--acceptance", "1"), ("--acceptance is 1.0",)),
        (("--verify-ms", "3", "--step-ms", "1", "--k", "0"), ("--k is 0",)),
        (("--verify-ms", "3", "--step-ms", "1", "--fallback", "none"), ("--fallback",)),
        (("--paper", "--out", "/nowhere/x.json"), ("create it",)),
        (("--papers",), ("--papers",)),
    ],
)
def test_mistakes_are_one_sentence(flags, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert simulate.main(list(flags)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize("wrong", [{"mode": "pearl"}, {"lists": "all"}, {"fallback": "wait"}, {"k": 0}, {"devices": 0}])
def test_a_plan_that_cannot_be_played_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Plan(**wrong)
