"""Rows that wait, join a running batch, or are refused: each text is what the row has alone.
Tiny random models in float64."""

import dataclasses
import json
import time

import pytest
from test_runtime import eager_backend, static_pair  # noqa: F401
from test_ssd import check, models, pair, part, patient, some, truth  # noqa: F401
from tiny import Restless, engine, play, transformer

from figures import Round
from halves import Quicker
from rows import COUPLINGS
from runtime import Devices
from ssd import Plan, SamePlan
from steps import Runner

LONG = [[(3 * i + b) % 50 for i in range(1 + 37 * b % 90)] for b in range(18)]


@pytest.mark.parametrize("batch", [1, 2, 5, 47])
@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_rows_that_join_a_running_batch_write_what_they_write_alone(pair, truth, mode, batch):  # noqa: F811
    rows = part(batch)
    stats = check(pair, truth, rows, mode=mode, batch=batch, fan_out=6)
    assert stats["prompts"] == len(rows) and len(stats["new_tokens"]) == len(rows)


@pytest.mark.parametrize("seed", range(3))
def test_rows_join_whatever_plan_is_played(pair, truth, seed):  # noqa: F811
    rows = part(seed)
    prompts, settings = some(rows)
    planner = Restless(seed, 4, 7)
    result, run = play(pair, prompts, planner, mode="ssd", k=4, fan_out=7, batch=6, **settings)
    assert result.token_ids == [truth.token_ids[b] for b in rows]
    assert not run.seats.waiting and run.draft is not None


@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_prompts_are_read_in_chunks_between_rounds(pair, monkeypatch, mode, chunk):  # noqa: F811
    monkeypatch.setattr("rows.JOIN_CHUNK", chunk)
    settings = {"max_new_tokens": [3 + 5 * b % 11 for b in range(18)], "temperature": 0.8}
    expected = pair.generate(LONG, mode="ar", **settings)
    got = pair.generate(LONG, mode=mode, batch=4, fan_out=5, **settings)
    assert got.token_ids == expected.token_ids
    assert got.stats["prompt_tokens"] == [len(prompt) for prompt in LONG]


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("mode", ["sd", "ssd"])
def test_rows_join_under_every_coupling(pair, mode, coupling):  # noqa: F811
    """Where every proposal has K tokens, drafted now or before, a text is a function of the noise
    alone, and so the same whoever is in the batch."""
    prompts, settings = some(part(2)[::3])
    settings |= {"k": 3, "fan_out": 8, "cut": False, "fallback": "jit", "coupling": coupling}
    texts = [
        pair.generate(prompts, mode=mode, batch=batch, **settings).token_ids
        for batch in (None, 1, 7)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_one_seed_names_rows_by_their_number(pair):  # noqa: F811
    """Of one seed each prompt of a list has its own draws; some of the list, with their numbers,
    write the same."""
    prompts, settings = [[3, 1, 4]] * 9, {"temperature": 1.0, "seed": 5, "ignore_eos": True}
    whole = pair.generate(prompts, **settings).token_ids
    assert len(set(map(tuple, whole))) == 9
    decoding = pair.start(prompts[:3], numbers=[7, 2, 4], batch=2, **settings)
    for _ in decoding.rounds():
        pass
    assert pair.finish(decoding).token_ids == [whole[n] for n in (7, 2, 4)]
    with pytest.raises(ValueError, match="prompt 8 is \\[\\]"):
        pair.start([[3], []], numbers=[2, 7])


@pytest.mark.parametrize("mode", ["ar", "ssd"])
def test_a_prompt_that_cannot_fit_is_refused_by_itself(mode):
    target = transformer(0, positions=40)
    said = []
    small = engine(target, transformer(1, base=target, noise=0.03), warn=said.append)
    prompts = [[1, 2], [5] * 40, [7] * 39, [3], [8] * 77]
    got = small.generate(prompts, mode=mode, batch=2, max_new_tokens=9)
    assert got.finish_reason == ["length", "refused", "context", "length", "refused"]
    for b in (0, 2, 3):
        alone = small.generate([prompts[b]], mode=mode, max_new_tokens=9)
        assert got.token_ids[b] == alone.token_ids[0]
    assert got.token_ids[1] == got.token_ids[4] == []
    assert [text[:8] for text in said] == ["prompt 2", "prompt 5"]
    with pytest.raises(ValueError, match="prompt 1 has 40 tokens, but the context"):
        small.generate(prompts[1:2], mode=mode)


def test_as_many_rows_as_memory_holds_are_decoded_at_once(pair, monkeypatch):  # noqa: F811
    """The KV of a slot has 2 layers * 2 heads * 8 numbers * 8 bytes, twice. A row has whole blocks
    of 16 of them, and one that is never read; beside it there must be room for a pass.
    """
    import engine as module

    said, row = [], pair.target.row_bytes(96, 0, 0)
    logits = pair.target.row_bytes(96, 9999, 0) - pair.target.row_bytes(96, 0, 0)
    assert row > 97 * 2 * 2 * 2 * 8 * 8 + 256 * 4 * 96 and logits > 9999 * 50 * 4
    monkeypatch.setattr(pair, "tell", said.append)
    monkeypatch.setattr(pair, "warn", lambda text: None)
    prompts, settings = [[1]] * 6 + [[2] * 60], {"max_new_tokens": 20, "ignore_eos": True}
    whole = pair.generate(prompts, **settings)
    monkeypatch.setattr(module, "available_bytes", lambda device: 3.9 * row)
    said.clear()
    for batch, at_once in ((None, 3), (4, 3), (2, 2)):
        assert pair.generate(prompts, batch=batch, **settings).token_ids == whole.token_ids
        assert len(said) == 1 and f"{at_once} rows of 96 tokens" in said.pop()
    monkeypatch.setattr(module, "available_bytes", lambda device: 1.2 * row)
    got = pair.generate(prompts, batch=4, **settings)  # the long one does not fit by itself
    assert got.finish_reason == ["length"] * 6 + ["refused"]
    assert got.token_ids[:6] == whole.token_ids[:6] and "rows of 32 tokens" in said[0]


def test_memory_that_a_run_may_use_again_counts_as_free(pair, eager_backend, monkeypatch):  # noqa: F811
    """The KV of the text before, and static runners: the same call fits twice, in as many rows."""
    import engine as module

    kept = []
    room = lambda device: kept.append(pair.previous[0]) or 1 << 40  # noqa: E731
    monkeypatch.setattr(module, "available_bytes", room)
    for _ in range(2):
        pair.generate([[1, 2]], max_new_tokens=2)
    assert kept == [{}] * len(kept), "it is given back before memory is looked at"
    static, _ = static_pair([], num_hidden_layers=1)
    model, said = static.target, []
    held = lambda: sum(2 * r.cache.k_LBGSD.nbytes for r in model.runners.values())  # noqa: E731
    room = lambda device: 3.9 * model.row_bytes(32, 0, 0) - held()  # noqa: E731
    monkeypatch.setattr(module, "available_bytes", room)
    monkeypatch.setattr(static, "tell", said.append)
    for _ in range(2):
        static.generate([[1]] * 6, mode="ar", max_new_tokens=20)
    assert said[0] == said[1], said


def test_rows_of_one_length_are_refused_at_once(pair, monkeypatch):  # noqa: F811
    import engine as module

    asked, real = [], module.Model.row_bytes
    counted = lambda *given: asked.append(given) or real(*given)  # noqa: E731
    monkeypatch.setattr(module.Model, "row_bytes", counted)
    monkeypatch.setattr(module, "available_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="a row of"):
        pair.generate([[1, 2]] * 50, max_new_tokens=20)
    assert len(asked) <= 2


@pytest.mark.parametrize("coupling", ["shared", "maximal", "independent"])
def test_probabilities_that_chains_keep_are_counted(pair, monkeypatch, coupling):  # noqa: F811
    """Two rounds' chains: K steps of M branches that keep a number for each of 50 tokens."""
    import engine as module

    asked, real = [], module.Model.row_bytes
    counted = lambda *given: asked.append(given[1:]) or real(*given)  # noqa: E731
    monkeypatch.setattr(module.Model, "row_bytes", counted)
    how = {"mode": "ssd", "k": 3, "fan_out": 49, "coupling": coupling, "max_new_tokens": 2}
    pair.generate([[1, 2]], **how)
    trunk, _, _, kept = asked[-1]
    more = real(pair.draft, trunk, 3, 9999, kept) - real(pair.draft, trunk, 3, 9999)
    assert more == (0 if coupling == "shared" else 4 * 2 * 3 * 9999 * 50)


def test_static_steps_are_not_compiled_again_by_rows_that_join(eager_backend):  # noqa: F811
    from torch._dynamo.utils import counters

    static, eager = static_pair([])
    prompts = [[1, 2, 3], [4] * 40, [3], [5, 9], [7] * 9, [2]]
    for options in ({"mode": "ar"}, {"mode": "ssd", "k": 2, "fan_out": 6, "temperature": 1.0}):
        options |= {"batch": 2, "max_new_tokens": [5, 9, 3, 12, 7, 4]}
        for number, texts in enumerate((prompts, prompts[::-1])):
            got = static.generate(texts, **options)
            graphs = counters["stats"]["unique_graphs"]
            assert number == 0 or graphs == before, "compiled again"  # noqa: F821
            before = graphs  # noqa: F841
            assert got.token_ids == eager.generate(texts, **options).token_ids


# ---- halves


def check_halves(pair, prompts, expected, **settings):  # noqa: F811
    """-> the run, whose texts are as expected."""
    result, run = play(pair, prompts, mode=settings.pop("mode", "ssd"), **settings)
    assert result.token_ids == expected and run.draft is not None
    return run


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
@pytest.mark.parametrize("halves", ["on", "auto"])
def test_halves_write_the_same_texts(pair, truth, halves, mode, batch):  # noqa: F811
    """Mixed temperatures, filters, lengths and ends; rows join while others are verified."""
    rows = part(batch + len(mode))
    how = {"mode": mode, "batch": batch, "batch_halves": halves, "k": 3, "fan_out": 6}
    prompts, settings = some(rows)
    result, run = play(pair, prompts, **settings | how)
    assert result.token_ids == [truth.token_ids[b] for b in rows]
    assert result.finish_reason == [truth.finish_reason[b] for b in rows]
    assert run.draft is None or not run.lost
    if halves == "on" and mode != "ar" and batch > 1:
        played = [len(r.live) for r in run.figures.rounds]
        assert max(played) <= batch // 2 + 1, "at most half of the rows are verified at once"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fallback", ["auto", "jit", "fast"])
def test_while_one_half_is_verified_the_draft_works_for_the_other(pair, temperature, fallback):  # noqa: F811
    prompts, settings = LONG[:12], {"temperature": temperature, "ignore_eos": True}
    expected = pair.generate(prompts, mode="ar", **settings).token_ids
    settings |= {"k": 3, "fan_out": 6, "fallback": fallback, "batch_halves": "on"}
    for mode in ("sd", "ssd"):
        run = check_halves(pair, prompts, expected, mode=mode, **settings)
        rounds = run.figures.rounds
        both = [{*a.live} & {*b.live} for a, b in zip(rounds[1:9], rounds[2:10])]
        assert not any(both), "the halves take turns"
        assert all(a.begin <= b.begin for a, b in zip(rounds, rounds[1:]))


@pytest.mark.parametrize(("coupling", "c"), [("maximal", 1.0), ("independent", 0.3)])
@pytest.mark.parametrize("mode", ["sd", "ssd"])
def test_halves_under_the_other_couplings(pair, mode, coupling, c):  # noqa: F811
    """With whole proposals in every round a text is a function of the noise alone."""
    prompts, settings = some(part(1))
    settings |= {"k": 3, "fan_out": 8, "cut": False, "fallback": "jit", "coupling": coupling}
    settings |= {"saguaro_c": c, "mode": mode}
    texts = [
        pair.generate(prompts, batch_halves=halves, batch=batch, **settings).token_ids
        for halves, batch in (("off", None), ("on", None), ("on", 5))
    ]
    assert texts[0] == texts[1] == texts[2]


class RestlessHalves(Restless):
    def next(self, done):
        return dataclasses.replace(super().next(done), halves=self.rng.random() < 0.6)


@pytest.mark.parametrize("seed", range(4))
def test_halves_begin_and_end_at_any_time(pair, truth, seed):  # noqa: F811
    rows = part(seed)
    prompts, settings = some(rows)
    planner = RestlessHalves(seed, 4, 7)
    how = {"mode": "ssd", "k": 4, "fan_out": 7, "batch_halves": "on", "batch": (None, 8)[seed % 2]}
    result, run = play(pair, prompts, planner, **settings | how)
    assert result.token_ids == [truth.token_ids[b] for b in rows]
    assert not run.lost and {r.plan.halves for r in run.figures.rounds} == {True, False}


def test_halves_stay_even_while_rows_end(pair):  # noqa: F811
    """All rows of one half end early: the other half's rows are shared out anew."""
    prompts, limits = [[b + 1] for b in range(12)], [4] * 6 + [60] * 6
    settings = {"max_new_tokens": limits, "ignore_eos": True, "k": 2, "batch_halves": "on"}
    run = check_halves(
        pair,
        prompts,
        pair.generate(prompts, max_new_tokens=limits, ignore_eos=True).token_ids,
        mode="sd",
        **settings,
    )
    late = [len(r.live) for r in run.figures.rounds[16:24]]
    assert set(late) == {3}


def test_a_draft_that_is_lost_in_halves(models, monkeypatch):  # noqa: F811
    """The target goes on alone with all rows at once, and says so once."""
    from steps import Runner

    said, decode, calls = [], Runner.decode, []

    def fails(self, *args):
        calls.append(1)
        if len(calls) > 12:
            raise RuntimeError("broken")
        return decode(self, *args)

    monkeypatch.setattr(Runner, "decode", fails)
    pair = engine(*models[:2], warn=said.append)  # noqa: F811
    settings = {"max_new_tokens": 30, "temperature": 1.0}
    expected = pair.generate(LONG[:6], mode="ar", **settings).token_ids
    got = pair.generate(LONG[:6], mode="sd", k=3, batch_halves="on", **settings)
    assert got.token_ids == expected
    assert len(said) == 1 and "broken" in said[0]


@pytest.mark.parametrize("step", ["extend", "fork"])
def test_a_draft_that_is_lost_in_halves_before_it_forked(models, monkeypatch, step):  # noqa: F811
    """Both halves have work under way that prepared nothing when the draft is given up."""
    from steps import Runner

    calls, work = [], getattr(Runner, step)

    def fails(self, *args):
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("broken")
        return work(self, *args)

    monkeypatch.setattr(Runner, step, fails)
    said = []
    pair = engine(*models[:2], warn=said.append)  # noqa: F811
    settings = {"max_new_tokens": 30, "temperature": 1.0}
    expected = pair.generate(LONG[:6], mode="ar", **settings).token_ids
    more = {"mode": "ssd", "k": 3, "fan_out": 6, "batch_halves": "on"}
    assert pair.generate(LONG[:6], **settings, **more).token_ids == expected
    assert len(said) == 1 and "broken" in said[0]


def test_the_quicker_way_is_found_and_found_again():
    """A simulated machine on which halves are quicker at first, and later are not."""
    plan, clock = SamePlan(Plan(2, 0)), 0.0
    planner, played = Quicker({False: plan, True: plan}), []
    now = planner.first()
    for _ in range(3000):
        halves_win = len(played) < 1500
        took = (0.6 if halves_win else 1.4) if now.halves else 1.0  # for as many tokens
        rows = 4 if now.halves else 8
        took /= 1 + now.halves
        done = Round(now, list(range(rows)), [0] * 8, [2] * 8, [1] * 8, clock, clock + took)
        clock, now = clock + took, planner.next(done)
        played.append(now.halves)
    assert sum(played[200:1500]) > 0.8 * 1300 and sum(played[2200:]) < 0.2 * 800


@pytest.mark.parametrize("mode", ["sd", "ssd"])
def test_a_long_chunk_of_a_row_that_joins_does_not_lose_the_draft(monkeypatch, mode):
    """On one lane the draft waits for the target's chunk; on its own its next answer is late."""
    said, real = [], Runner.prefill
    own = engine(transformer(), transformer(1), warn=said.append)
    if mode == "sd":
        own.devices = Devices("cpu", "cpu")
    monkeypatch.setattr("runtime.PATIENCE_S", 0.3)
    monkeypatch.setattr("runtime.FIRST_PATIENCE_S", 0.3)
    monkeypatch.setattr("ssd.PREFILL_PATIENCE_S", 0.5)

    def slow(runner, ids, start):
        if max(map(len, ids)) > 20:
            time.sleep({("target", "sd"): 1.0, ("draft", "ssd"): 0.4}.get((runner.role, mode), 0))
        real(runner, ids, start)

    monkeypatch.setattr(Runner, "prefill", slow)
    own.generate([[1], [2], [3] * 30], mode=mode, k=2, batch=1, max_new_tokens=6, ignore_eos=True)
    assert not said


def test_the_bench_of_rows_that_join(demo, tmp_path, capsys):
    from scripts import bench_rows

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{n}"}) + "\n" for n in range(6)))
    flags = ["--target", str(demo / "target"), "--batch", "2", "--fixed", "2", "3", "--runs", "1"]
    flags += ["--new-tokens", "4", "--out", str(out)]
    assert bench_rows.main([str(prompts), *flags]) == 0
    found = json.loads(out.read_text())["rows"]
    assert found["prompts"] == 6 and len(found["runs"]) == 3 and found["different_texts"] == 0
    killed = found["killed"]
    assert killed["exit_code"] == killed["missing"] == killed["twice"] == 0
    assert killed["rows"] == 6 and killed["kept_ones_stay"]
    assert bench_rows.main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_rows_that_have_ended_keep_no_ngrams(pair):  # noqa: F811
    pair.ngram, draft, pair.draft = True, pair.draft, None
    try:
        run = pair.start([[1, 2, 1, 2]] * 6, mode="sd", k=2, batch=2, max_new_tokens=5)
        list(run.rounds())
    finally:
        pair.ngram, pair.draft = False, draft
    assert sum(bool(row.last_seen) for row in run.all_rows) <= 2
