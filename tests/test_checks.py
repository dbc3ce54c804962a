"""scripts/check_truth.py and pass_at_1.py: they find what is wrong, and contain what runs wild."""

import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import transformer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_truth  # noqa: E402
import pass_at_1  # noqa: E402

TASK = {"prompt": "def double(x):\n", "entry_point": "double"}
TASK["test"] = "def check(f):\n    assert f(3) == 6\n"


def test_a_token_that_is_not_the_best_is_reported_with_its_gap():
    tiny = transformer(3)
    tiny.set_positions(32)
    prompt, text = [1, 2, 3], []
    for _ in range(6):
        text.append(int(tiny(torch.tensor([prompt + text]))[0, -1].argmax()))

    def model(ids):
        return SimpleNamespace(logits=tiny(ids))

    assert check_truth.disagreements(model, prompt, text) == []
    wrong = [*text[:4], (text[4] + 1) % tiny.config.vocab_size, text[5]]
    found = check_truth.disagreements(model, prompt, wrong)
    assert found[0]["position"] == 4 and found[0]["gap"] > 0


@pytest.mark.parametrize("body", ["    return 2 * x\n", "    return x + x"])
def test_a_right_function_passes(body):
    assert pass_at_1.passes(TASK, body)


@pytest.mark.parametrize(
    "body",
    [
        "    return x",
        "    return 2 * x)",
        "    while True: pass",
        "    return len('a' * 10**11)",
        "    open('f', 'wb').write(b'0' * 10**7)\n    return 2 * x",
    ],
    ids=["wrong", "no Python", "endless", "too large", "fills the disk"],
)
def test_what_is_wrong_or_runs_wild_does_not_pass(body, monkeypatch):
    monkeypatch.setitem(pass_at_1.LIMITS, resource.RLIMIT_CPU, 1)
    assert not pass_at_1.passes(TASK, body)
