"""The examples are lossless: with another way to predict or to draft, the text stays the same.

Tiny random models in float64, many rows, each with its own temperature and filters.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from tiny import engine, log_probs, play, transformer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import hierarchical  # noqa: E402
import pearl  # noqa: E402

from ssd import Decoding  # noqa: E402

B = 60
PROMPTS = [[(7 * b + 11 * i * i + i) % 50 for i in range(1 + b % 13)] for b in range(B)]
ROWS = {
    "temperature": [(0.0, 0.7, 1.0, 1.4)[b % 4] for b in range(B)],
    "top_k": [(0, 0, 6)[b % 3] for b in range(B)],
    "top_p": [(1.0, 1.0, 0.9, 1.0, 0.5)[b % 5] for b in range(B)],
    "seed": [1000 + b for b in range(B)],
    "max_new_tokens": [1 + (5 * b) % 37 for b in range(B)],
}
LEVEL = {"decoding": hierarchical.Hierarchical}
WAYS = {
    "pearl": pearl.PEARL,
    "pearl, whole chains": pearl.PEARL | {"cut": False},
    "hierarchical sd": {"mode": "sd"} | LEVEL,
    "hierarchical ssd": {"mode": "ssd", "fan_out": 3, "fallback": "jit"} | LEVEL,
    "hierarchical ssd, who hits does not wait": {"mode": "ssd", "fan_out": 6} | LEVEL,
}


@pytest.fixture(scope="module")
def pair():
    target = transformer(0)
    return engine(target, transformer(1, base=target, noise=0.03), eos={33}, warn=pytest.fail)


@pytest.fixture(scope="module")
def truth(pair):
    return pair.generate(PROMPTS, mode="ar", **ROWS)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_text(pair, truth, way, k):
    result = pair.generate(PROMPTS, k=k, **ROWS | WAYS[way])
    assert result.token_ids == truth.token_ids
    assert result.finish_reason == truth.finish_reason
    assert result.stats["acceptance_rate"] > 0.4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_text_of_one_row(pair, way, temperature):
    """Alone a row hits or misses by itself, and a draft is left out of whole rounds."""
    for seed in range(2):
        asked = {"temperature": temperature, "seed": seed, "max_new_tokens": 40, "ignore_eos": True}
        plain = pair.generate([PROMPTS[12]], mode="ar", **asked)
        assert pair.generate([PROMPTS[12]], k=4, **asked | WAYS[way]).token_ids == plain.token_ids


# ---- each does what it says


def test_pearl_prepares_for_one_outcome_and_never_lets_the_target_wait(pair):
    asked = {"k": 3, "temperature": 0.7, "max_new_tokens": 120, "ignore_eos": True, "cut": False}
    _, decoding = play(pair, [PROMPTS[12]], **pearl.PEARL | asked)
    rounds = decoding.figures.rounds
    assert len(rounds) > 20 and all(r.drafted is None for r in rounds)
    for r, after in zip(rounds, rounds[1:-2]):
        assert after.length[0] == (3 if r.hit else 0)  # post-verify, or pre-verify
        assert not (r.hit and r.rejected(0))  # "all accepted" is all that is foreseen
    hits = [bool(r.hit) for r in rounds]
    assert 0.2 < np.mean(hits) < 0.95
    assert any(not before and hit for before, hit in zip(hits, hits[1:]))  # pre-verified: it held


class Passes(hierarchical.Hierarchical):
    def draw(self, fed, start):
        self.passes = getattr(self, "passes", 0) + 1
        return super().draw(fed, start)


def rounds_of(pair, prompts, decoding, **settings):
    """What was tried and what held, in every round; the number of draft tokens one after another;
    the run.
    """
    _, run = play(pair, prompts, mode="sd", k=4, decoding=decoding, **settings)
    rounds = run.figures.rounds
    return [(r.length, r.accepted) for r in rounds], sum(max(r.length) for r in rounds), run


def test_the_draft_of_a_hierarchy_writes_the_chains_that_it_writes_alone(pair):
    usual, _, _ = rounds_of(pair, PROMPTS, Decoding, **ROWS)
    assert rounds_of(pair, PROMPTS, hierarchical.Hierarchical, **ROWS)[0] == usual


def test_on_a_text_that_repeats_itself_it_does_so_in_fewer_passes(pair):
    prompts, asked = [[5, 9, 2, 41, 7, 30] * 5], {"max_new_tokens": 150, "ignore_eos": True}
    usual, _, _ = rounds_of(pair, prompts, Decoding, **asked)
    same, drafted, run = rounds_of(pair, prompts, Passes, **asked)
    assert same == usual and len(usual) < run.passes < 0.8 * drafted


def test_a_guess_holds_while_it_is_the_draft_s_own_draw():
    assert hierarchical.accepted([4, 9, 1], [4, 9, 2, 5]) == 2
    assert hierarchical.accepted([], [4]) == 0


def test_a_hierarchy_refuses_other_couplings(pair):
    with pytest.raises(ValueError, match="the coupling is maximal, wanted shared"):
        pair.generate(PROMPTS[:2], mode="sd", k=2, coupling="maximal", **LEVEL)


# ---- PEARL under the other couplings draws from the target's distribution

V, NEW, MANY = 4, 24, 2000
SMALL = {
    "model_type": "mistral", "sliding_window": 2, "num_hidden_layers": 1, "hidden_size": 8,
    "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab": V,
    "positions": NEW + 8, "sharpness": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("coupling", ["maximal", "independent"])
def test_pearl_draws_from_the_target(coupling):
    """Chi-square: what comes next hangs on the last two tokens alone, and can be enumerated."""
    target = transformer(2, **SMALL)
    small = engine(target, transformer(7, base=target, noise=0.2), warn=pytest.fail)
    prompts = [[b % V, b // V % V] for b in range(MANY)]
    asked = {"k": 2, "temperature": 1.0, "max_new_tokens": NEW, "coupling": coupling, "seed": 5}
    result = small.generate(prompts, **pearl.PEARL | asked)
    assert 0.1 < result.stats["hit_rate"] < 0.9 and result.stats["acceptance_rate"] < 0.95
    ids = torch.tensor([p + new for p, new in zip(prompts, result.token_ids)])
    cells = ((ids[:, :-2] * V + ids[:, 1:-1]) * V + ids[:, 2:]).flatten()
    seen = torch.bincount(cells, minlength=V**3).reshape(V * V, V).double().numpy()
    law = np.stack([log_probs(target, [a, b])[-1].exp() for a in range(V) for b in range(V)])
    expected = law * seen.sum(1, keepdims=True)
    assert expected.min() > 5
    value = chi2.sf(((seen - expected) ** 2 / expected).sum(), V * V * (V - 1))
    assert value > 1e-3


# ---- in a terminal


@pytest.mark.parametrize("name", ["pearl", "hierarchical"])
def test_an_example_runs_in_a_terminal(name, demo):
    words = [f"--target={demo}/target", f"--draft={demo}/draft", "--prompt=def f", "--turns=1"]
    command = [sys.executable, f"{EXAMPLES}/{name}.py", *words, "--max-new-tokens=12", "--k=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ways = ["AR", "SD", "SSD", *(["PEARL"] if name == "pearl" else ["H-SSD", "H-SD"])]
    assert [line.split(":")[0] for line in lines if "tokens/s" in line] == ways
    assert lines[-1] == "The texts are the same."
    wrong = subprocess.run([*command, "--k=999"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "999" in wrong.stderr, wrong.stderr
    assert wrong.stderr.startswith("error: ")
