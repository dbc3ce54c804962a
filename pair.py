"""A loaded target and a draft that fits it: checkpoint, tokenizer, dtype and compile policy of each.

Knows: which pieces make a usable model, and what two models must share. Does not know: files' formats (weights.py,
tokenizer.py), rounds. Read next: weights.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint.config import Config
from checkpoint.tokenizer import Tokenizer, load_tokenizer, read_eos_ids, vocabulary_difference
from checkpoint.weights import available_bytes, load_model, resolve, weight_bytes
from model import Transformer
from rows import sampling_params
from runtime import Policy, one_thread, pack
from steps import Runner

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TRUNK_STEP = 256  # static shapes: capacities are rounded up to this, so that few are ever compiled


@dataclass
class Model:
    """A transformer ready to run. step_bytes: what one decode step has to read, the embedding table not counted."""

    name: str
    transformer: Transformer
    config: Config
    tokenizer: Tokenizer | None
    eos: frozenset[int]
    dtype: torch.dtype
    policy: Policy
    step_bytes: int
    runners: dict[tuple, Runner] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, device: torch.device, dtype: str | None = None, compile: bool | None = None) -> "Model":
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
        kind = DTYPES[dtype] if dtype else (torch.bfloat16 if device.type == "cuda" else torch.float32)
        with one_thread():
            transformer = load_model(name, device, kind)
        folder: Path = resolve(name)
        tokenizer = load_tokenizer(folder)
        return cls.of(transformer, str(name), tokenizer, frozenset(read_eos_ids(folder)), compile)

    @classmethod
    def of(cls, transformer: Transformer, name="model", tokenizer=None, eos=frozenset(), compile=None) -> "Model":
        """A model from a transformer that is already in memory."""
        config, weight = transformer.config, transformer.embed.weight
        if tokenizer is not None:
            eos = eos or frozenset(tokenizer.eos_ids)
            if tokenizer.vocab_size > config.vocab_size:
                raise ValueError(
                    f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, but the model only "
                    f"{config.vocab_size}: use the tokenizer files that belong to this checkpoint"
                )
        compile = weight.device.type == "cuda" if compile is None else compile
        step_bytes = weight_bytes(config, weight.dtype)
        if not config.tied:  # one row of the table is read a token; a tied table is read whole, as the head
            step_bytes -= weight.nbytes
        policy = Policy(weight.device, compile)
        if compile:
            policy.compile(transformer)
        else:
            with one_thread():
                pack(transformer)
        if weight.device.type == "cuda":  # the lanes' streams do not wait for the one that filled the weights
            torch.cuda.synchronize(weight.device)
        return cls(name, transformer, config, tokenizer, eos, weight.dtype, policy, step_bytes)

    def runner(self, batch: int, trunk: int, k: int, branches: int, vocab: int | None = None) -> Runner:
        """A runner with room for `trunk` tokens a row. A static one is kept: its graphs belong to its buffers."""
        if not self.policy.static:
            return Runner(self.transformer, batch, trunk, k, branches, self.policy, vocab)
        trunk = -(-trunk // TRUNK_STEP) * TRUNK_STEP
        key = (batch, trunk, k, branches, vocab)
        if key not in self.runners:
            self.runners.clear()  # one set of buffers at a time
            self.runners[key] = Runner(self.transformer, batch, trunk, k, branches, self.policy, vocab)
        return self.runners[key]

    def set_up(self, rows, settings, trunk: int, k: int, branches: int, vocab: int, before: Runner | None) -> Runner:
        """A runner that knows how these rows sample, with the KV of the tokens that an earlier runner has read."""
        runner = self.runner(len(rows), trunk, k, branches, vocab)
        runner.set_rows(sampling_params(rows, settings, runner.device), settings.coupling, settings.saguaro_c)
        if before is not None:
            runner.cache.copy_trunk(before.cache, rows[0].kept)
        return runner


def check_pair(target: Model, draft: Model) -> None:
    """Refuse a draft whose tokens are not the target's. Embeddings padded to different sizes are no difference."""
    if target.tokenizer is None or draft.tokenizer is None:
        if target.config.vocab_size != draft.config.vocab_size:
            raise ValueError(
                f"the target {target.name} has {target.config.vocab_size} tokens and the draft {draft.name} "
                f"{draft.config.vocab_size}: use a draft with the target's vocabulary"
            )
        return
    if difference := vocabulary_difference(target.tokenizer, draft.tokenizer):
        token, ours, theirs = difference
        raise ValueError(
            f"target and draft do not share a vocabulary: token {token} is {ours!r} in {target.name} and {theirs!r} "
            f"in {draft.name}: use a draft with the target's tokenizer"
        )


def check_memory(models: list[tuple[Model, int]], batch: int, trunk: int, k: int) -> None:
    """Refuse KV caches that would not fit, before they are allocated. models: each with its number of branches."""
    need: dict[torch.device, int] = {}
    for model, branches in models:
        c = model.config
        slots = trunk + branches * k + 1
        size = 2 * c.num_layers * batch * c.num_kv_heads * slots * c.head_dim * model.dtype.itemsize
        device = model.transformer.embed.weight.device
        need[device] = need.get(device, 0) + size
    for device, size in need.items():
        free = available_bytes(device)
        if free is not None and size > free:
            raise ValueError(
                f"the KV cache for {batch} rows of {trunk} tokens needs {size / 1e9:.1f} GB, but {device} has "
                f"{free / 1e9:.1f} GB free: use fewer or shorter prompts, or a smaller max_new_tokens"
            )
