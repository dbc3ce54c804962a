"""The model computes what transformers computes, for every family; and its cache never changes what
it computes.
"""

import copy
import json
from typing import Optional  # TorchScript reads Optional

import pytest
import tiny
import torch
from families import (
    FAMILIES,
    LLAMA,
    LLAMA3_ROPE,
    feed,
    greedy,
    hugging_face,
    new_cache,
    random_text,
    raw_config,
    tiny_model,
    to_old_layout,
    whole,
)

import engine
from checkpoint.config import Config, rope_frequencies
from checkpoint.weights import load_config, load_model
from linear import finish_all, finisher
from model import Block, Location, Pair, Transformer

# transformers rounds RMSNorm and RoPE's angles to float32 even in float64 models.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-5}
WINDOWED = {"model_type": "mistral", "sliding_window": 5}
KINDS = {
    "llama": {},
    "windowed": WINDOWED,
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run ten times slower on two busy cores than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """(family, folder, transformers' model), written once for all tests of the family."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, hugging_face(request.param, folder, seed=len(request.param))


def theirs(model, text: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([text])).logits[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_equal_transformers(checkpoint, dtype):
    family, folder, reference = checkpoint
    model, reference = (
        load_model(folder, "cpu", dtype, Transformer),
        copy.deepcopy(reference).to(dtype),
    )
    model.set_positions(64)
    rows = [random_text(length, seed=length) for length in (41, 17, 30, 1)]
    wanted = [theirs(reference, row) for row in rows]
    assert wanted[0].std() > 0.3, "the random checkpoint must be able to show a difference"

    def check(got, wanted, what):
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=TOLERANCE[dtype], msg=lambda m: f"{family}, {what}: {m}"
        )

    check(whole(model, rows[0]), wanted[0], "a prompt")
    cache = new_cache(model, 1, 64)
    feed(model, cache, [rows[0][:11]], [0])
    for at in range(11, 41):
        check(feed(model, cache, [[rows[0][at]]], [at])[0, 0], wanted[0][at], f"cached step {at}")
    batch = feed(model, new_cache(model, 4, 64), rows, [0] * 4)
    for row, logits in enumerate(batch):
        check(logits[: len(rows[row])], wanted[row], f"row {row} of a padded batch")


def test_greedy_text_equals_transformers(checkpoint):
    family, folder, reference = checkpoint
    model, prompt = load_model(folder, "cpu", torch.float32, Transformer), random_text(12, seed=3)
    with torch.inference_mode():
        tokens = torch.tensor([prompt])
        wanted = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )[0, 12:]
    assert greedy(model, prompt, 64) == wanted.tolist(), family


def test_old_layout_of_config_reads_alike(checkpoint):
    family, folder, reference = checkpoint
    new_layout, config = json.loads((folder / "config.json").read_text()), load_config(folder)
    assert "rope_parameters" in new_layout and "rope_scaling" not in new_layout
    try:
        to_old_layout(folder, family)
        assert load_config(folder) == config
        text = random_text(20, seed=1)
        torch.testing.assert_close(
            whole(ready(load_model(folder, "cpu", torch.float32, Transformer)), text),
            theirs(reference, text),
            rtol=0,
            atol=1e-4,
        )
    finally:
        (folder / "config.json").write_text(json.dumps(new_layout))


def ready(model, positions: int = 64):
    model.set_positions(positions)
    return model


def test_half_precision_stays_close():
    model, text = tiny_model(dtype=torch.float32), random_text(30, seed=1)
    wanted = whole(model, text)
    for dtype in (torch.bfloat16, torch.float16):
        got = whole(ready(copy.deepcopy(model).to(dtype)), text)
        assert got.dtype == dtype
        # Rounding errors of a dozen operations in a row; a wrong one would be of the size of the
        # logits.
        assert (got.float() - wanted).norm() / wanted.norm() < 12 * torch.finfo(dtype).eps


# ---- configurations that must be refused, each by the name of what is wrong ----

ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]},
    "'su'": {"type": "su", "factor": 2.0},
    "factor = 0": {"rope_type": "linear", "factor": 0.0},
    "factor = None": {"rope_type": "linear"},
    "factor = '2'": {"rope_type": "linear", "factor": "2"},
    "factor = nan": {"rope_type": "linear", "factor": float("nan")},
    "factor = -1": {"rope_type": "yarn", "factor": -1},
    "factor = 1000": {"rope_type": "linear", "factor": 10**400},
    "low_freq_factor = None": {k: v for k, v in LLAMA3_ROPE.items() if k != "low_freq_factor"},
    "low_freq_factor >= high": LLAMA3_ROPE | {"low_freq_factor": 4.0},
    "rope_theta = 0, wanted a number above 1": {"rope_type": "default", "rope_theta": 0},
    "rope_theta = True": {"rope_type": "default", "rope_theta": True},
    "mrope_section": {"rope_type": "default", "mrope_section": [1, 2]},
    "full_attention": {"full_attention": {"rope_type": "linear", "factor": 2.0}},
    "partial_rotary_factor": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "truncate": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"},
}
OTHERS = {
    "gemma3": {"model_type": "gemma3"},
    "model_type = None": {"model_type": None},
    r"model_type = \[\]": {"model_type": []},
    "gelu": {"hidden_act": "gelu"},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "quantised": {"quantization_config": {"quant_method": "gptq"}},
    "chunked_attention": {"layer_types": ["chunked_attention"] * 2},
    "'sliding_attention'": {"layer_types": ["sliding_attention"] * 2},
    "one entry for each of 2": WINDOWED | {"layer_types": ["full_attention"]},
    r"layer type = \['x'\]": WINDOWED | {"layer_types": [["x"], "full_attention"]},
    "hidden_size = None": {"hidden_size": None},
    "vocab_size = -5": {"vocab_size": -5},
    "vocab_size = 4611686018427387904": {"vocab_size": 1 << 62},
    "num_hidden_layers = 100000": {"num_hidden_layers": 100000},
    "intermediate_size = 80.0": {"intermediate_size": 80.0},
    "num_attention_heads = True": {"num_attention_heads": True},
    "num_key_value_heads 3": {"num_key_value_heads": 3},
    "head_dim is 7": {"head_dim": 7},
    "rms_norm_eps = 'x'": {"rms_norm_eps": "x"},
    "sliding_window = -1": {"model_type": "mistral", "sliding_window": -1},
    "tie_word_embeddings = 'false'": {"tie_word_embeddings": "false"},
    "attention_bias = 1": {"attention_bias": 1},
    "wanted an object": {"rope_scaling": [1]},
    "wanted an object ": {"rope_parameters": "yarn"},
}


@pytest.mark.parametrize("match", ROPE)
def test_rope_that_is_not_understood_is_refused(match):
    for key in ("rope_parameters", "rope_scaling"):
        with pytest.raises(ValueError, match=match):
            Config.from_dict(LLAMA | {key: ROPE[match]})


@pytest.mark.parametrize("match", OTHERS)
def test_config_that_is_not_understood_is_refused(match):
    with pytest.raises(ValueError, match=match.strip()):
        Config.from_dict(LLAMA | OTHERS[match])


def test_what_config_leaves_out_is_as_in_transformers():
    bare = {
        key: value
        for key, value in LLAMA.items()
        if key
        in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    config = Config.from_dict(bare)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.rope_theta) == (
        4,
        12,
        1e-6,
        10000.0,
    )
    assert not config.tied and config.windows == (0, 0)
    assert Config.from_dict(bare | {"model_type": "mistral"}).windows == (4096, 4096)
    slides = {"model_type": "qwen2", "num_hidden_layers": 30, "use_sliding_window": True}
    assert Config.from_dict(bare | slides).windows == (0,) * 28 + (4096,) * 2


# ---- the cache, against the slow truth: float64, our own model ----


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module", params=["as written", "scripted"])
def model(request, kind):
    model = tiny_model(seed=5, **kind)
    if request.param == "scripted":
        script(model)
    return model


def script(model) -> None:
    model.script()
    assert isinstance(model.layers, torch.jit.ScriptModule), "it was not"


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_without_a_cache_equals_with_one(model):
    text = random_text(30, seed=1)
    if any(model.config.windows):
        pytest.skip("whole texts are for training, without windows")
    torch.testing.assert_close(
        model(torch.tensor([text]))[0], whole(model, text), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("sizes", [(1,) * 24, (24,), (5, 1, 7, 11), (16, 8), (2,) * 12])
@pytest.mark.parametrize("tight", [False, True])
def test_chunks_of_any_size_equal_the_whole(model, sizes, tight):
    text, cache, at = random_text(24, seed=2), new_cache(model, 1, 40), 0
    wanted = whole(model, text)
    for size in sizes:
        got = feed(
            model,
            cache,
            [text[at : at + size]],
            [at],
            extent=at + size if tight else 40,
            tight=tight,
        )
        same(got[0], wanted[at : at + size])
        at += size


def test_padding_and_rows_of_different_length_change_nothing(model):
    rows = [random_text(length, seed=length) for length in (3, 14, 9)]
    cache, at = new_cache(model, 3, 20), [0, 0, 0]
    # A row may have no token in a call, or fewer than the others.
    for take in ((2, 5, 0), (0, 4, 8), (1, 5, 1)):
        chunk = [row[a : a + n] for row, a, n in zip(rows, at, take, strict=True)]
        got = feed(model, cache, chunk, at, width=9)
        for b, row in enumerate(rows):
            same(got[b, : take[b]], whole(model, row)[at[b] : at[b] + take[b]])
        at = [a + n for a, n in zip(at, take, strict=True)]
        assert got.isfinite().all(), "padded queries see slot 0, so that no NaN arises"


def test_rolling_back_is_setting_a_length(model):
    text, other = random_text(20, seed=1), random_text(8, seed=9)
    cache = new_cache(model, 1, 30)
    feed(model, cache, [text[:12] + other], [0])
    same(feed(model, cache, [text[12:]], [12])[0], whole(model, text)[12:])


def poison(cache, used: list[int], chain=(), tight=False):
    """NaN in every slot but the `used` trunk slots of each row and the scratch slots in `chain`.
    tight: large numbers in the trunk.
    """
    for b, length in enumerate(used):
        dead = [s for s in range(length, cache.dead + 1) if s not in chain]
        for kv_LBGSD in (cache.k_LBGSD, cache.v_LBGSD):
            kv_LBGSD[:, b, :, dead] = float("nan")
            if tight:
                kv_LBGSD[:, b, :, length : cache.trunk] = 300.0


@pytest.mark.parametrize("tight", [False, True])
def test_what_lies_in_dead_slots_changes_nothing(model, tight):
    for rows in (
        [random_text(13, seed=1)],
        [random_text(length, seed=length) for length in (5, 13, 8)],
    ):
        cache = new_cache(model, len(rows), 30, branches=2, steps=3)
        start = [len(row) - 1 for row in rows]
        feed(model, cache, [row[:-1] for row in rows], [0] * len(rows))
        poison(cache, start, tight=tight)
        got = feed(
            model, cache, [row[-1:] for row in rows], start, extent=13 if tight else 30, tight=tight
        )
        for b, row in enumerate(rows):
            same(got[b, 0], whole(model, row)[-1])
        poison(cache, [len(row) for row in rows])
        padded = feed(
            model, cache, [[7], *[[]] * (len(rows) - 1)], [len(row) for row in rows], width=4
        )
        assert padded.isfinite().all()
        same(padded[0, 0], whole(model, [*rows[0], 7])[-1])


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_branch_equals_the_branch_run_alone(model, batch, tight, poisoned):
    """Chains off different trunk positions, step by step, against each branch as a text."""
    steps, K, rows = 4, 3, [random_text(length, seed=length) for length in (11, 6, 16)[:batch]]
    # The proposal behind the pending token rows[b][-1].
    drafts = [random_text(K, seed=100 + b) for b in range(batch)]
    depths = [[0, 0, 1, 3, 3, 2], [3, 2, 1, 0, 0, 3], [1, 1, 2, 2, 0, 3]][:batch]
    M = len(depths[0])
    chains = [[random_text(steps, seed=1000 + 10 * b + m) for m in range(M)] for b in range(batch)]
    texts = [row + draft for row, draft in zip(rows, drafts, strict=True)]
    cache = new_cache(model, batch, 40, M, steps)
    feed(model, cache, texts, [0] * batch)
    start_B, depth_BM = torch.tensor([len(row) for row in rows]), torch.tensor(depths)
    live_B, longest = torch.ones(batch, dtype=torch.bool), int((start_B[:, None] + depth_BM).max())
    for step in range(steps):
        if poisoned:
            used = range(cache.trunk, cache.trunk + step * M)
            poison(cache, [len(text) for text in texts], used, tight)
        tokens_BM = torch.tensor([[chain[step] for chain in row] for row in chains])
        where = cache.locate_chain(
            start_B,
            depth_BM,
            torch.full((batch,), step),
            live_B,
            extent=longest if tight else cache.trunk,
            tight=tight,
            steps=step + 1 if tight else None,
        )
        got = model(tokens_BM, where, cache)
        for b in range(batch):
            for m, depth in enumerate(depths[b]):
                alone = rows[b] + drafts[b][:depth] + chains[b][m][: step + 1]
                same(got[b, m], whole(model, alone)[-1])


def test_rows_at_different_chain_steps_and_ended_rows(model):
    """Rows need not be at the same step; a row that has ended writes to the dead slot and disturbs
    nobody.
    """
    rows, M = [random_text(7, seed=1), random_text(12, seed=2), random_text(9, seed=3)], 2
    chains = [[random_text(3, seed=50 + 2 * b + m) for m in range(M)] for b in range(3)]
    cache = new_cache(model, 3, 20, M, 3)
    feed(model, cache, rows, [0] * 3)
    start_B, depth_BM = torch.tensor([7, 12, 9]), torch.zeros(3, M, dtype=torch.long)
    before = cache.k_LBGSD[:, 2, :, :-1].clone()
    for step_B in ((0, 0, 0), (1, 1, 1), (2, 1, 2)):  # row 1 feeds its step 1 twice
        tokens_BM = torch.tensor([[chains[b][m][step_B[b]] for m in range(M)] for b in range(3)])
        where = cache.locate_chain(
            start_B, depth_BM, torch.tensor(step_B), torch.tensor([True, True, False]), 20
        )
        got = model(tokens_BM, where, cache)
        for b in range(2):
            for m in range(M):
                same(got[b, m], whole(model, rows[b] + chains[b][m][: step_B[b] + 1])[-1])
        assert got.isfinite().all()
    assert torch.equal(cache.k_LBGSD[:, 2, :, :-1], before), "the ended row left a trace"


def test_copy_of_a_trunk_goes_on_alike(model):
    text, wide = random_text(20, seed=4), new_cache(model, 1, 40, 3, 2)
    narrow = new_cache(model, 1, 15)
    assert not narrow.k_LBGSD.any() and not narrow.v_LBGSD.any(), "a fresh cache is zero"
    feed(model, narrow, [text[:12]], [0])
    wide.copy_trunk(narrow, 12)
    same(feed(model, wide, [text[12:]], [12])[0], whole(model, text)[12:])


def test_every_family_is_a_different_config():
    configs = {family: Config.from_dict(raw_config(family)) for family in FAMILIES}
    assert len({str(config) for config in configs.values()}) == len(FAMILIES)


# ---- one transformer: what is written in model.py is what runs, everywhere


def test_packed_blocks_in_float32_are_the_written_ones_in_float64(kind):
    """Trunk and chains of three rows, one of them ended, as the CPU's lanes run them."""
    exact = tiny_model(seed=5, **kind)
    quick = tiny_model(seed=5, dtype=torch.float32, **kind)
    finish_all(quick, finisher("none", pack=True))
    script(quick)
    start, live = torch.tensor([20, 9, 14]), torch.tensor([True, True, False])
    tokens = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
    depth = torch.tensor([[0, 1, 3, 3, 2]]).expand(3, -1)
    logits = []
    for model in (exact, quick):
        cache = new_cache(model, 3, 64, 5, 3)
        cache.k_LBGSD[..., :64, :] = cache.v_LBGSD[..., :64, :] = 300.0  # seen by nobody
        out = [model(tokens, cache.locate(start * 0, start, 20, 20, True), cache)[:, :9]]
        for T in (1, 4):
            where = cache.locate(torch.where(live, start, 0), live * T, T, 20 + T, True)
            out.append(model(tokens[:, :T], where, cache)[live])
        for step in range(3):
            where = cache.locate_chain(
                start + 1, depth, torch.full((3,), step), live, 24, True, step + 1
            )
            out.append(model(tokens[:, :5], where, cache)[live])
        logits.append(torch.cat([x.flatten() for x in out]).double())
    assert logits[0].isfinite().all()
    torch.testing.assert_close(*logits, rtol=0, atol=2e-4)


@torch.inference_mode()
def test_the_block_on_show_is_the_one_that_runs(monkeypatch):
    """The default way on a CPU, float32 and packed: who edits Block.forward changes its text."""
    model = lambda: tiny.transformer(dtype=torch.float32)  # noqa: E731
    prompt = random_text(9, seed=3, words=50)

    def run():
        loaded = engine.Model.of(model()).transformer
        return whole(ready(loaded), prompt), tiny.engine(model()).generate([prompt]).token_ids

    def edited(
        self, x_BTE, change_BTE, rope: Pair, where: Optional[Location], kv_BGSD: Optional[Pair]
    ):
        x_BTE = x_BTE + change_BTE
        return x_BTE, self.attention(self.attention_norm(x_BTE), rope, where, kv_BGSD)

    before = run()
    monkeypatch.setattr(Block, "forward", edited)
    after, wanted = run(), ready(model())(torch.tensor([prompt]))[0]
    assert (before[0] - after[0]).abs().max() > 0.1 and before[1] != after[1]
    torch.testing.assert_close(after[0], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_block_is_the_same(kind, batch):
    """With static limits, as torch.compile and CUDA graphs have them; aot_eager stops at breaks."""
    torch._dynamo.reset()
    model, rows = tiny_model(seed=5, **kind), [random_text(n, seed=n) for n in (7, 12, 3)[:batch]]
    wanted = [whole(model, row) for row in rows]
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    got = feed(model, new_cache(model, batch, 30, 2, 2), rows, [0] * batch, extent=30)
    for row, logits in zip(wanted, got, strict=True):
        same(logits[: len(row)], row)


def test_a_layer_can_be_learnt(kind):
    model, text = tiny_model(seed=5, **kind).requires_grad_(True), random_text(12, seed=1)
    model(torch.tensor([text])).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_rope_tables_are_replaced_not_rewritten():
    """Captured graphs of an earlier run read the old ones."""
    model = tiny_model()
    old = model.rope
    kept = old[0].clone(), old[1].clone()
    model.set_positions(200)
    assert model.rope is old
    model.set_positions(300)
    assert len(model.rope[0]) == 300 and all(map(torch.equal, old, kept))


def test_a_head_for_fewer_tokens():
    model = Transformer(Config.from_dict(LLAMA | {"head_tokens": 40, "tie_word_embeddings": True}))
    model.set_positions(8)
    assert model(torch.tensor([[95, 3]])).shape == (1, 2, 40) and model.token_ids_V is None


@pytest.mark.parametrize("numbers", [(1e299, 1e-299), (1e-299, 1e299)])
def test_yarn_of_extreme_numbers_stays_finite(numbers):
    rope = dict(zip(("original_max_position_embeddings", "beta_fast"), numbers))
    rope |= {"rope_type": "yarn", "factor": 4.0}
    frequency, _ = rope_frequencies(Config.from_dict(LLAMA | {"rope_scaling": rope}))
    assert frequency.isfinite().all()
