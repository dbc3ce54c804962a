"""Tiny random models and engines in memory, for the tests: no files, no tokenizer, exact in
float64."""

import dataclasses
import random

import torch
from torch import nn

from checkpoint.config import Config
from engine import Engine, Model, Result
from model import Transformer
from runtime import Devices, available_cores, one_thread
from ssd import Decoding, Plan

SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# One pair of lanes for all tests: the target on the first core, the draft on the last.
DEVICES = Devices(f"cpu:{available_cores()[0]}", f"cpu:{available_cores()[-1]}")


def transformer(
    seed=0,
    vocab=50,
    positions=256,
    sharpness=6.0,
    dtype=torch.float64,
    base=None,
    noise=0.0,
    **shape,
):
    """A random model; `sharpness` scales its logits. With `base`: that model's weights plus
    `noise`, a draft of it."""
    generator = torch.Generator().manual_seed(seed)
    config = Config.from_dict(
        SHAPE | {"vocab_size": vocab, "max_position_embeddings": positions} | shape
    )
    model = Transformer(config if base is None else base.config).to(dtype).requires_grad_(False)
    if base is not None:
        model.load_state_dict(base.state_dict())
    for weight in model.parameters():
        random = torch.randn(weight.shape, generator=generator, dtype=dtype)
        if base is not None:
            weight.add_(random, alpha=noise)
        elif weight.dim() == 2:
            weight.copy_(random * (1 if weight is model.embed.weight else weight.shape[1] ** -0.5))
    if base is None:
        model.head.weight.mul_(sharpness)
    return model


def cut_head(base, ids) -> Transformer:
    """A draft that is `base`, but can say nothing except these tokens. It reads them all."""
    model = Transformer(base.config).to(base.embed.weight.dtype).requires_grad_(False)
    model.load_state_dict(base.state_dict())
    model.config, ids_V = dataclasses.replace(base.config, head_tokens=len(ids)), torch.tensor(ids)
    model.head = nn.Linear(
        base.config.hidden_size, len(ids), bias=False, dtype=base.head.weight.dtype
    )
    model.head.weight = nn.Parameter(base.head.weight[ids_V], requires_grad=False)
    model.token_ids_V = ids_V
    return model


def resized(base, vocab: int) -> Transformer:
    """A draft that is `base` with fewer tokens, or with more, which it would love to say."""
    model = Transformer(dataclasses.replace(base.config, vocab_size=vocab)).to(
        base.embed.weight.dtype
    )
    state, more = base.state_dict(), max(0, vocab - base.config.vocab_size)
    for name in ("embed.weight", "head.weight"):
        rows = state[name][:vocab]
        state[name] = torch.cat((rows, 3.0 * rows[:1].expand(more, -1)))
    model.load_state_dict(state)
    return model.requires_grad_(False)


class Words:
    """As much of a tokenizer as a pair is checked by. Texts of them are empty."""

    eos_ids = ()

    def __init__(self, *tokens):
        self.tokens, self.vocab_size = tokens, len(tokens)

    def token_bytes(self, id):
        return self.tokens[id]

    def stream(self):
        return self

    def push(self, token):
        return ""

    def flush(self):
        return ""


def engine(target, draft=None, eos=(), warn=None, devices=DEVICES, words: int = 0) -> Engine:
    """draft: a model, None, or "ngram". words: how many tokens the tokenizer of both has, 0: there
    is none."""
    tokenizer = Words(*(b"%d" % i for i in range(words))) if words else None
    draft = Model.of(draft, "draft", tokenizer) if isinstance(draft, Transformer) else draft
    return Engine(Model.of(target, "target", tokenizer, frozenset(eos)), draft, devices, warn)


class Restless:
    """A planner that plays another plan every round: the draft is left out, takes turns, or speaks
    ahead."""

    def __init__(self, seed: int, k: int, m: int):
        self.rng, self.k, self.m, self.kinds = random.Random(seed), k, m, []

    def first(self) -> Plan:
        return self.next(None)

    def next(self, done) -> Plan:
        k, m = self.rng.choice((0, 0, 1, 2, self.k)), self.rng.choice((0, 0, 0, 1, self.m))
        fallback = self.rng.choice(("auto", "jit", "jit", "fast"))
        self.kinds.append((k > 0, m > 0))
        return Plan(k, m, fallback, cut=self.rng.random() < 0.7)


def play(engine: Engine, prompts, planner=None, **settings) -> tuple[Result, Decoding]:
    """generate(), but with the inside of the run as well, and perhaps with a planner of the test's
    own."""
    decoding = engine.start(prompts, **settings)
    decoding.planner = planner or decoding.planner
    for _ in decoding.rounds():
        pass
    return engine.finish(decoding), decoding


def settle(decoding: Decoding) -> None:
    """Wait until the draft's lane has done all it was given."""
    decoding.draft_lane.start(lambda: None).result(60)


def log_probs(model, ids: list[int]) -> torch.Tensor:
    """(T, V): the model's own log probabilities behind every token, by one pass without any cache:
    the slow truth."""
    model.set_positions(len(ids))
    with torch.inference_mode(), one_thread():
        return model(torch.tensor([ids]))[0].log_softmax(-1)
