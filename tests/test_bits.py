"""scripts/bits.py on the small pair, in this process: its figures, and the table made of them."""

import json
import math

import pytest
from laws import one_thread  # noqa: F401

from scripts import bits, render
from ssd import load


class Here:
    """A Worker that is no process of its own."""

    def __init__(self, cores, build, *given):
        self.peer = build(*given)

    def ask(self, name, **how):
        return getattr(self.peer, name)(**how)

    def close(self):
        pass


@pytest.fixture
def measured(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(bits, "Worker", Here)
    pair = ["--target", str(demo / "target"), "--draft", str(demo / "draft")]
    flags = ["--formats", "none,int8", "--runs", "1", "--tokens", "4", "--count", "1"]
    assert bits.main([*pair, *flags, "--out", str(tmp_path / "bits.json")]) == 0
    (found,) = json.loads((tmp_path / "bits.json").read_text())["bits"]["groups"].values()
    return found


def test_formats_are_measured_and_shown(measured):
    target, draft = measured["target"], measured["draft"]
    assert target["int8"]["quantize"] == "int8" and target["none"]["dtype"] == "float32"
    assert target["int8"]["step_bytes"] < 0.5 * target["none"]["step_bytes"]
    assert draft["int8"]["name"] == "draft" and 0 <= draft["int8"]["accepted"] <= 1
    table = render.view({"bits": {"groups": {"pair": measured}}}, "bits").splitlines()
    assert len(table) == 2 + 4 and "perplexity of code" in table[0] and "acceptance" in table[0]


def test_perplexity_is_that_of_the_engines_own_steps(measured, demo):
    """Token by token, in float64: the chance of each next token of the text."""
    engine = load(str(demo / "target"), "ngram", "cpu", dtype="float64")
    texts, total, count = bits.human(None, 1)["code"][:1], 0.0, 0
    ids = engine.tokenizer.encode(texts[0])[: bits.CHUNK]
    for end in range(1, len(ids)):
        run = engine.start([ids[:end]], mode="ar", max_new_tokens=1, ignore_eos=True)
        logits, real = [], run.target._logits
        run.target._logits = lambda *given: logits.append(real(*given)) or logits[-1]
        for _ in run.rounds():
            pass
        total -= float(logits[-1][0, -1].log_softmax(-1)[ids[end]])
        count += 1
    pair = bits.Pair(str(demo / "target"), "ngram", ("none", "float32"), (None, None))
    nats, tokens = pair.loss(texts)
    assert tokens == count and math.isclose(nats, total, rel_tol=1e-4)


def test_a_wrong_format_is_one_sentence(capsys):
    assert bits.main(["--formats", "int3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bits.py: --formats names 'int3', wanted some of")
