"""Tiny random models and engines in memory, for the tests: no files, no tokenizer, exact in float64."""

import torch

from checkpoint.config import Config
from model import Transformer
from engine import Engine, Model, Result
from runtime import Devices, available_cores, one_thread
from ssd import Decoding

SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# One pair of lanes for all tests: the target on the first core, the draft on the last.
DEVICES = Devices(f"cpu:{available_cores()[0]}", f"cpu:{available_cores()[-1]}")


def transformer(seed=0, vocab=50, positions=256, sharpness=6.0, dtype=torch.float64, base=None, noise=0.0, **shape):
    """A random model; `sharpness` scales its logits. With `base`: that model's weights plus `noise`, a draft of it."""
    generator = torch.Generator().manual_seed(seed)
    config = Config.from_dict(SHAPE | {"vocab_size": vocab, "max_position_embeddings": positions} | shape)
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


def engine(target, draft=None, eos=(), warn=None, devices=DEVICES) -> Engine:
    """draft: a model, None, or "ngram"."""
    draft = Model.of(draft, "draft") if isinstance(draft, Transformer) else draft
    return Engine(Model.of(target, "target", eos=frozenset(eos)), draft, devices, warn)


def play(engine: Engine, prompts, **settings) -> tuple[Result, Decoding]:
    """generate(), but with the inside of the run as well."""
    decoding = engine.start(prompts, **settings)
    for _ in decoding.rounds():
        pass
    return engine.finish(decoding), decoding


def settle(decoding: Decoding) -> None:
    """Wait until the draft's lane has done all it was given."""
    decoding.draft_lane.start(lambda: None).result(60)


def log_probs(model, ids: list[int]) -> torch.Tensor:
    """(T, V): the model's own log probabilities behind every token, by one pass without any cache: the slow truth."""
    model.set_positions(len(ids))
    with torch.inference_mode(), one_thread():
        return model(torch.tensor([ids]))[0].log_softmax(-1)
