"""train_draft.py on a random tiny target: acceptance rises, resuming is exact, the export loads."""

import argparse
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import SHAPE, transformer

from checkpoint.config import Config
from checkpoint.weights import load_model
from model import Transformer
from scripts.save import save_model

ROOT = Path(__file__).resolve().parent.parent
TINY = "--tokens 1500 --new-tokens 24 --rows 16 --layers 2 --vocab 40 --batch 256 --every 20"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    import train_draft

    threads = torch.get_num_threads()
    # On toy matrices, and beside other work, threads only wait for each other.
    torch.set_num_threads(1)
    yield train_draft
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts(script):
    import draft_prompts

    return draft_prompts


@pytest.fixture(scope="module")
def texts(script):
    import draft_texts

    return draft_texts


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    shape = {"vocab": 64, "num_hidden_layers": 3, "tie_word_embeddings": False}
    raw = SHAPE | {"vocab_size": 64, "max_position_embeddings": 256, "eos_token_id": 3} | shape
    model = transformer(3, dtype=torch.float32, sharpness=4.0, **shape)
    save_model(model, {key: value for key, value in raw.items() if key != "vocab"}, folder)
    return folder


def call(script, target, work, *more) -> int:
    command = f"--target {target} --out {work}/out --work-dir {work} {TINY} --rate 1e-2".split()
    return script.main([*command, *more])


def test_a_work_folder_is_for_one_target_and_one_set_of_numbers(script, target, tmp_path, capsys):
    """Another target's texts and weights would be taken for its own."""
    assert call(script, target, tmp_path, "--stage", "train") == 2  # no texts yet, but claimed
    capsys.readouterr()
    for flags in (("--vocab", "30"), ("--layers", "1"), ("--target", "another/model")):
        assert call(script, target, tmp_path, "--stage", "train", *flags) == 2
        told = capsys.readouterr().err
        assert f"holds work with {flags[0].strip('-')}" in told and "name another" in told


def figures(work) -> list[dict[str, float]]:
    """Held-out acceptance by kind and temperature, of each line of the log."""
    lines = (work / "log.txt").read_text().splitlines()
    return [{k: float(v) for k, v in re.findall(r"(\S+@\S+) ([\d.]+)", line)} for line in lines]


@pytest.fixture(scope="module")
def trained(script, target, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    assert call(script, target, work, "--epochs", "6") == 0
    return work


@pytest.mark.parametrize("flags", [("--asked", "7"), ("--prompts", "x.jsonl"), ("--rows", "99")])
def test_texts_are_gone_on_with_as_they_were_begun(script, target, trained, flags, capsys):
    """A shard's number stands for its prompts."""
    assert call(script, target, trained, "--stage", "texts", *flags) == 2
    assert f"holds work with {flags[0].strip('-')}" in capsys.readouterr().err


def test_the_loss_is_what_is_not_accepted_and_a_part_of_the_divergence(
    script, texts, target, trained
):
    """Token by token, in plain numbers: 1 - sum(min(p, q)), and .2 KL(p | q) over its tokens."""
    flags = f"--target {target} --out x --work-dir {trained} {TINY}".split()
    model = load_model(target, "cpu", torch.float32, Transformer).requires_grad_(False)
    model.set_positions(300)
    args, learnt = script.read_arguments(flags), texts.all_texts(trained / "texts")
    draft, loss, count = script.Distiller(model, learnt, {3}, args), 0.0, 0
    assert len(draft.token_ids_V) < 64, "some tokens are not the draft's"
    for logq_V, slots_K, p_K in zip(*(x.tolist() for x in draft.log_q(learnt[:3]))):
        pairs = [(p, logq_V[slot]) for p, slot in zip(p_K, slots_K) if slot >= 0]
        mass = sum(p for p, _ in pairs)
        loss += 1 - sum(min(p, math.exp(logq)) for p, logq in pairs)
        if mass > 0.1:
            loss += 0.2 * sum(p / mass * (math.log(p / mass) - logq) for p, logq in pairs if p > 0)
        count += 1
    assert math.isclose(draft.learn(learnt[:3], 0.0), loss / count, rel_tol=1e-3)


def test_held_out_acceptance_counts_every_token_of_the_target(script, texts, target, trained):
    """By both models' own logits. What is kept with a text, here 2 tokens, is a part of p only."""
    flags = f"--target {target} --out x --work-dir {trained} {TINY}".split()
    model = load_model(target, "cpu", torch.float32, Transformer).requires_grad_(False)
    draft = load_model(trained / "out", "cpu", torch.float32, Transformer, model)
    for each in (model, draft):
        each.set_positions(300)
    args, held = script.read_arguments(flags), texts.fetch(trained / "held.pt")
    held = [replace(t, ids_NK=t.ids_NK[:, :2], logp_NK=t.logp_NK[:, :2]) for t in held]
    run, found = script.Distiller(model, texts.all_texts(trained / "texts"), {3}, args), {}
    for text in held:
        tokens = text.tokens[None, :-1].long()
        p, q = (each(tokens)[0, text.first - 1 :].float() for each in (model, draft))
        p, place = p.softmax(-1)[:, draft.token_ids_V], draft.token_ids_V[q.argmax(-1)]
        greedy = (place == text.tokens[text.first :]).float()
        hot = torch.minimum(p, q.softmax(-1)).sum(-1)
        found.setdefault(text.heat, []).append(hot if text.heat else greedy)
    told = run.acceptance(run.expected(model, held))
    for heat, shares in found.items():
        assert told[f"all@{heat:g}"] == pytest.approx(torch.cat(shares).mean().item(), abs=0.005)


def test_acceptance_rises(trained):
    lines = figures(trained)
    assert lines[-1]["all@0"] > lines[0]["all@0"] + 0.05, lines
    assert lines[-1]["all@1"] > lines[0]["all@1"] + 0.05, lines


def test_a_stopped_run_goes_on_to_the_same_weights(script, texts, target, trained, tmp_path):
    """Stopped while texts are written, then in the middle of an epoch."""
    stops = {"store": 3, "learn": 20}

    def stop(name, function):
        def counted(*args):
            stops[name] -= 1
            if stops[name] == 0:
                raise KeyboardInterrupt
            return function(*args)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "store", stop("store", texts.store))
        assert call(script, target, tmp_path, "--epochs", "6") == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Distiller, "learn", stop("learn", script.Distiller.learn))
        assert call(script, target, tmp_path, "--epochs", "6", "--save-seconds", "0") == 130
    assert call(script, target, tmp_path, "--epochs", "6") == 0
    one, two = (torch.load(work / "draft.pt", weights_only=True) for work in (trained, tmp_path))
    assert one["at"][:3] == two["at"][:3] and torch.equal(one["token_ids"], two["token_ids"])
    for name, weight in one["mean"].items():
        assert torch.equal(weight, two["mean"][name]), name


def test_the_export_loads_as_a_draft_of_its_target(script, target, trained):
    whole = load_model(target, "cpu", torch.float32, Transformer)
    draft = load_model(trained / "out", "cpu", torch.float32, Transformer, target=whole)
    state = torch.load(trained / "draft.pt", weights_only=True)
    assert draft.embed.weight.data_ptr() == whole.embed.weight.data_ptr(), "the embedding is shared"
    assert torch.equal(draft.token_ids_V, state["token_ids"])
    assert torch.equal(draft.head.weight, whole.head.weight[state["token_ids"]])
    for name, weight in state["mean"].items():
        assert torch.equal(draft.get_parameter(name), weight.bfloat16().float()), name
    about = json.loads((trained / "out" / "config.json").read_text())["draft_of"]
    assert about["layers"] == [0, 2]
    last = figures(trained)[-1]
    assert about["acceptance"] == pytest.approx(last, abs=1e-3)


def test_a_draft_goes_on_from_one_that_is_there(script, target, trained, tmp_path):
    """Before it has learnt anything it is the one that it began as."""
    (tmp_path / "texts").symlink_to(trained / "texts")
    (tmp_path / "held.pt").symlink_to(trained / "held.pt")
    flags = ("--begin", str(trained / "out"), "--layers", "1", "--vocab", "9")
    assert call(script, target, tmp_path, "--stage", "export", *flags) == 0
    one, two = (load_file(work / "out" / "model.safetensors") for work in (trained, tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_target_makes_up_prompts(texts, target, tmp_path):
    """Whole questions between what the template puts around them, and beginnings; as many as asked
    for, and the first ones are the same however many that are.
    """

    class Letters:
        def encode(self, text, bos=True):
            return [1] * bos + [4 + ord(letter) % 60 for letter in text]

        def encode_chat(self, messages):
            return [1, 9, 8, *self.encode(messages[0]["content"], False), 5, 6]

    model = load_model(target, "cpu", torch.float32, Transformer)
    model.set_positions(256)
    model.requires_grad_(False)
    args = argparse.Namespace(work_dir=tmp_path / "a", seed=1, asked=300)
    found = [prompt.ids for prompt in texts.ask(model, Letters(), {3}, args)]
    questions = [ids for ids in found if ids[:3] == [1, 9, 8]]
    begun = [ids for ids in found if ids[:3] != [1, 9, 8]]
    assert len(found) == 300 and len(questions) > 20 and len(begun) > 20
    assert all(ids[-2:] == [5, 6] and len(ids) > 6 for ids in questions)
    assert not any(3 in ids for ids in found), "nothing goes on after its end"
    starts = [Letters().encode(text) for text in texts.BEGINNINGS]
    assert all(any(ids[: len(start)] == start for start in starts) for ids in begun)
    assert [p.ids for p in texts.ask(model, Letters(), {3}, args)] == found, "from the files"
    args = argparse.Namespace(work_dir=tmp_path / "b", seed=1, asked=100)
    assert [p.ids for p in texts.ask(model, Letters(), {3}, args)] == found[:100]


def test_rows_that_begin_alike_are_read_once(texts, target):
    """A text is the same, whatever rows stand beside it."""
    from draft_prompts import Prompt

    model = load_model(target, "cpu", torch.float64, Transformer).requires_grad_(False)
    model.set_positions(64)
    some = [[1, 9, 8, 7], [1, 9, 8, 7], [1, 9, 30, 31, 32, 33], [1, 9, 30, 31], [40], [1]]
    some = [Prompt(ids, "x") for ids in some]
    together = texts.sample(model, some, [0.0] * len(some), 12, {3}, torch.Generator())
    for prompt, text in zip(some, together):
        (alone,) = texts.sample(model, [prompt], [0.0], 12, {3}, torch.Generator())
        assert torch.equal(alone.tokens, text.tokens)
        assert torch.allclose(alone.logp_NK.float(), text.logp_NK.float(), atol=1e-2)


def test_a_text_of_no_tokens_is_none(texts, tmp_path):
    texts.store(tmp_path / "empty.pt", [])
    assert texts.fetch(tmp_path / "empty.pt") == []


class Letters:
    """An id a letter; a chat is put in brackets."""

    def encode(self, text, bos=True):
        return [1] * bos + [ord(letter) for letter in text]

    def encode_chat(self, messages):
        return self.encode("<" + messages[0]["content"] + ">", False)


def test_prompts_of_files(prompts, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"turns": ["Hi", "no"]}\n\n{"prompt": "x"}\n')
    rows = prompts.read_rows(path)
    assert prompts.encoded(rows, Letters()) == [[ord(letter) for letter in "<Hi>"], [1, ord("x")]]
    path.write_text('{"text": "x"}\n')
    with pytest.raises(
        ValueError, match='some.jsonl, line 1: got no "prompt" and no "turns", wanted'
    ):
        prompts.read_rows(path)
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8-sig")
    assert prompts.read_rows(path) == [{"prompt": "a\u2028b"}]
    for line, said in (("[1]", 'got no "prompt"'), ("{", "is not JSON"), ("[" * 9**5, "not JSON")):
        path.write_text(f'{{"prompt": "x"}}\n{line}\n')
        with pytest.raises(ValueError, match=f"some.jsonl, line 2.*{said}"):
            prompts.read_rows(path)


@pytest.mark.parametrize("names", [("a/q.jsonl", "b/q.jsonl"), ("made.jsonl",), ("asked.txt",)])
def test_files_of_one_name_are_refused(prompts, names):
    """The second would take the place of the first."""
    for flag, some in ("--prompts", names), ("--text", names * 2):
        files = {"prompts": [], "text": []} | {flag[2:]: [Path(name) for name in some]}
        args = argparse.Namespace(seed=1, **files)
        with pytest.raises(ValueError, match=f"two files of {flag} are called"):
            prompts.read_prompts(args, None, 50, [])


def test_prompts_that_are_all_too_long(prompts):
    args = argparse.Namespace(seed=1, prompts=[], text=[], prompt_tokens=1)
    with pytest.raises(ValueError, match="no prompt has 1 to 1 tokens"):
        prompts.read_prompts(args, None, 50)


def test_of_many_files_something_is_held_out(prompts, tmp_path, monkeypatch):
    """Files that shared 96 prompts out would have none each beyond 96."""
    monkeypatch.setattr(prompts, "HELD", 2)
    monkeypatch.setattr(prompts, "made_prompts", lambda seed: [])
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for path in files:
        path.write_text('{"prompt": "x"}\n' * 12)
    args = argparse.Namespace(seed=1, prompts=files, text=[], prompt_tokens=9)
    learn, held = prompts.read_prompts(args, Letters(), 128)
    assert [prompt.kind for prompt in held] == ["a", "b", "c"] and len(learn) == 30


@pytest.mark.parametrize("kind", ["factors", "mistral", "windows"])
def test_a_draft_has_the_positions_and_windows_of_its_target(script, kind):
    """What is written to config.json is read as it was."""
    raw = SHAPE | {"vocab_size": 64, "max_position_embeddings": 256}
    config = Config.from_dict({key: value for key, value in raw.items() if key != "vocab"})
    if kind == "factors":
        factors = tuple(1.0 + n for n in range(config.head_dim // 2))
        config = replace(config, rope={"type": "factors", "factor": factors})
    else:
        windows = (0, 8 * (kind == "windows"))
        config = replace(config, model_type="mistral", num_layers=2, windows=windows)
    draft = script.draft_config(config, [1], 40)
    written = json.loads(json.dumps(script.raw_config(draft, {"target": "x"})))
    read = Config.from_dict(written)
    assert (read.rope, read.windows) == (draft.rope, draft.windows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_texts_are_written_in_fixed_numbers_and_not_compiled(script, target, tmp_path, device):
    """What the engine chooses hangs on the moment, and each step has another shape."""
    asked = []

    def load(name, device, dtype, compile):
        asked.append((dtype, compile))
        raise ValueError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Model, "load", load)
        assert call(script, target, tmp_path, "--stage", "texts", "--device", device) == 2
    assert asked == [("float32", False)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--every", "0"), "--every is 0, wanted 1 or more"),
        (("--minutes", "-1"), "--minutes is -1, wanted 0 or more"),
        (("--device", "cpu:0-1"), "--device is cpu:0-1, wanted cpu or cuda:0"),
    ],
)
def test_a_wrong_flag_is_one_sentence(script, target, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        call(script, target, tmp_path, *flags)
    assert message in capsys.readouterr().err


def test_wrong_layers_are_found_before_the_texts(script, target, tmp_path):
    """Texts take hours, and the folder would have been for these layers."""
    assert call(script, target, tmp_path, "--layers", "9") == 2
    assert not (tmp_path / "texts").exists() and not (tmp_path / "about.json").exists()


def test_texts_are_learnt_however_long_they_are(script, target, tmp_path):
    """What the texts were written with need not be said again where they are only read."""
    flags = ("--prompt-tokens", "1", "--new-tokens", "24")
    long = ("--tokens", "300", "--stage", "texts", "--new-tokens", "24")
    (tmp_path / "work").mkdir()
    assert call(script, target, tmp_path / "work", *long) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "PIECE", 0)
        assert call(script, target, tmp_path / "work", "--stage", "export", *flags) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stage", "texts", "--text", "x"), "has no tokenizer files, which --prompts and --text"),
        (("--layers", "9"), "--layers is 9, wanted 1 to 3"),
        (("--layers", "0,7"), "--layers is 0,7, wanted some of 0 to 2"),
        (("--stage", "train", "--work-dir", "{empty}"), "holds no texts, wanted some"),
        (("--begin", "{target}"), "is not a draft made by this script, wanted one"),
    ],
)
def test_mistakes_end_in_a_sentence(script, target, trained, tmp_path, capsys, flags, message):
    (tmp_path / "texts").mkdir()
    for path in [] if "{empty}" in flags else (trained / "texts").iterdir():
        (tmp_path / "texts" / path.name).symlink_to(path)
    (tmp_path / "held.pt").symlink_to(trained / "held.pt")
    flags = [flag.format(empty=tmp_path, target=target) for flag in flags]
    assert call(script, target, tmp_path, "--stage", "train", *flags) == 2
    assert message in capsys.readouterr().err


def test_made_up_prompts_differ_and_are_seeded(prompts):
    rows = prompts.made_prompts(1, functions=0)
    assert rows == prompts.made_prompts(1, functions=0) != prompts.made_prompts(2, functions=0)
    assert len({json.dumps(row) for row in rows}) == len(rows) > 1500
    assert any(stub.startswith("def median(") for stub in prompts.library_stubs())
