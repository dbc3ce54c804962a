"""Rows that wait, join a running batch, or are refused: each text is what the row has alone.
Tiny random models in float64."""

import pytest
from test_runtime import eager_backend, static_pair  # noqa: F401
from test_ssd import check, models, pair, part, patient, some, truth  # noqa: F401
from tiny import Restless, engine, play, transformer

import ssd
from sampling import COUPLINGS

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
    assert not run.waiting and run.draft is not None


@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("mode", ["ar", "sd", "ssd"])
def test_prompts_are_read_in_chunks_between_rounds(pair, monkeypatch, mode, chunk):  # noqa: F811
    monkeypatch.setattr(ssd, "JOIN_CHUNK", chunk)
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
    prompts, settings = some(part(2))
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
    """The KV of a slot has 2 models * 2 layers * 2 heads * 8 numbers * 8 bytes, twice."""
    import engine as module

    slot, said = 2 * 2 * 2 * 8 * 8, []
    monkeypatch.setattr(pair, "tell", said.append)
    monkeypatch.setattr(pair, "warn", lambda text: None)
    prompts, settings = [[1]] * 6 + [[2] * 60], {"max_new_tokens": 20, "ignore_eos": True}
    whole = pair.generate(prompts, **settings)
    monkeypatch.setattr(module, "available_bytes", lambda device: 3 * 83 * slot)
    said.clear()
    assert pair.generate(prompts, **settings).token_ids == whole.token_ids
    assert len(said) == 1 and "3 rows of 81 tokens" in said[0]
    got = pair.generate(prompts, batch=4, **settings)  # not so many with the long one
    assert got.finish_reason == ["length"] * 6 + ["refused"]
    assert got.token_ids[:6] == whole.token_ids[:6] and "4 rows of 22 tokens" in said[1]


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
