"""Train the demo pair of assets/demo: a 12M-parameter target and a 2.5M draft on Python's own standard library.

Knows: the stages (tokenizer, target, finish, draft, export, report), their losses and schedules. Does not know: how
the corpus is read or checkpoints are written (demo_files.py), how a model computes (model.py). Read next: main().

    python scripts/train_demo.py                          # everything; resumes where it was stopped
    python scripts/train_demo.py --stage target --steps 3000
    python scripts/train_demo.py --stage finish --steps 400 && python scripts/train_demo.py --stage draft
    python scripts/train_demo.py --report

The target's schedule is warm-up, then a constant rate for as long as you like ("target", target.pt), then a copy that
decays to zero ("finish", finish.pt). target.pt is never touched by "finish": a better pair later is more "target"
steps and another "finish". Every batch depends on (seed, stage, step) alone, so a killed run resumes exactly.

Shape letters: B rows, T tokens per row, V vocabulary.
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from demo_files import Corpus, from_hugging_face, measure, sample, write_json, write_pair  # noqa: E402

from checkpoint.config import Config  # noqa: E402
from model import Transformer  # noqa: E402

STAGES = ("target", "finish", "draft", "export", "report")


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, head_dim: int = 64) -> dict:
    """The part of config.json that differs between our models. A head size of 64 can be inflated to 128."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"num_key_value_heads": kv_heads, "intermediate_size": ffn, "head_dim": head_dim}


@dataclass(frozen=True)
class Recipe:
    # Eight narrow layers rather than six wide ones: a decode step of a small model costs by the layer, and the draft's
    # two are then a quarter of the target's. At most four query heads share a KV head, so that inflate.py can turn
    # the pair into any of its presets.
    target: dict = field(default_factory=lambda: llama(384, 8, 6, 2, 768))
    draft: dict = field(default_factory=lambda: llama(256, 2, 4, 1, 704))
    vocab: int = 4096
    positions: int = 1024
    # Tokens per row in "target"; "finish" and "draft" use rows of `positions`. On a CPU attention takes 46% of a step
    # at 512 and under a third at 256.
    window: int = 256
    batch_tokens: int = 8192
    corpus_bytes: int = 0  # 0 for everything
    samples: int = 1024  # rows of `window` tokens sampled from the target for the draft to learn from
    steps: dict = field(default_factory=lambda: {"target": 2400, "finish": 400, "draft": 1000})
    save_every: int = 20


TINY = Recipe(
    target=llama(64, 2, 2, 1, 96, 32), draft=llama(32, 1, 1, 1, 64, 32), vocab=512, positions=64, window=32,
    batch_tokens=256, corpus_bytes=200_000, samples=8, steps={"target": 12, "finish": 6, "draft": 8}, save_every=3,
)  # fmt: skip


def config_json(sizes: dict, recipe: Recipe) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": recipe.vocab, **sizes,
        "max_position_embeddings": recipe.positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def build(sizes: dict, recipe: Recipe, device, seed: int) -> Transformer:
    """A fresh model. Output projections start at zero, so that every block starts as the identity."""
    model = Transformer(Config.from_dict(config_json(sizes, recipe)))
    rng = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            torch.nn.init.zeros_(weight)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.02, generator=rng)
    model.to(device).set_positions(recipe.positions)
    return model


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: for matrices it learns clearly more per token than Adam.

    Method: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024). Five Newton-Schulz steps of
    an odd polynomial push all singular values towards 1; equal shapes go through it together, in bfloat16.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonal(x: torch.Tensor) -> torch.Tensor:
        tall = x.shape[-2] > x.shape[-1]
        x = (x.mT if tall else x).bfloat16()
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x  # the published coefficients
        return x.mT if tall else x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault(p.shape, []).append((p, p.grad.lerp(velocity, group["momentum"])))
            for (rows, columns), pairs in shapes.items():
                updates = self.orthogonal(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p.dtype), alpha=-scale)


def optimizers(model: Transformer) -> list[torch.optim.Optimizer]:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon([{"params": hidden, "full_lr": 0.02}], lr=0.02)
    groups = [{"params": rest, "full_lr": 3e-3}]
    adam = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return [muon, adam]


def save(path: Path, **state) -> None:
    """Whole or not at all: a run killed while writing keeps its last checkpoint."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load(path: Path, device="cpu") -> dict | None:
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def warm_up(step: int, warm: int = 30) -> float:
    return min(1.0, (step + 1) / warm)


def free_cores() -> int:
    """Cores that no other process wants now, at least 1 (Linux).

    Two threads on one free and one busy core wait for each other: measured 700 tokens/s, one thread alone 2,200.
    """
    total, wanted = os.cpu_count() or 1, []
    for _ in range(4):
        time.sleep(0.004)  # our own threads are asleep when the sleep ends, all but this one
        lines = Path("/proc/stat").read_text().splitlines()
        wanted.append(int(next(line for line in lines if line.startswith("procs_running")).split()[1]) - 1)
    return max(1, total - min(wanted))


@dataclass
class Run:
    """One training: where its checkpoint lies, how long it takes, what a batch and its loss are."""

    name: str
    path: Path
    steps: int
    save_every: int
    model: Transformer
    loss_of: callable  # batch -> loss
    batch_of: callable  # step -> tuple of tensors on the host
    rate_of: callable  # step -> factor on the learning rates
    base: str  # what this training started from, stored along
    polite: bool

    def go(self, state: dict | None, device) -> None:
        """`state` (or None) gives weights, optimizers (or None for fresh ones) and the step to go on from."""
        opts, first = optimizers(self.model), 0
        if state:
            first = state["step"]
            self.model.load_state_dict(state["model"])
            for opt, stored in zip(opts, state["optimizers"] or ()):
                opt.load_state_dict(stored)
        often = 1 if sys.stderr.isatty() else 20
        bar = tqdm(range(first, self.steps), self.name, self.steps, initial=first, unit="step", mininterval=often)
        smooth, clock = None, time.perf_counter()
        for step in bar:
            if self.polite:
                torch.set_num_threads(free_cores())
            batch = [x.to(device) for x in self.batch_of(step)]
            loss = self.loss_of(*batch)
            loss.backward()
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = group["full_lr"] * self.rate_of(step)
                opt.step()
                opt.zero_grad(set_to_none=True)
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"the loss became {value} at step {step}: resume from {self.path} with another --seed")
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            clock, before = time.perf_counter(), clock
            bar.set_postfix(loss=f"{smooth:.3f}", tok_s=f"{batch[0].numel() / (clock - before):.0f}", refresh=False)
            if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                stored = [opt.state_dict() for opt in opts]
                save(self.path, step=step + 1, model=self.model.state_dict(), optimizers=stored, base=self.base)


class Trainer:
    """The stages. Everything they share: recipe, corpus, work folder, device, the flags."""

    def __init__(self, args, recipe: Recipe):
        self.args, self.recipe, self.work, self.device = args, recipe, args.work_dir, torch.device(args.device)
        self.corpus = Corpus(args.work_dir, recipe.vocab, recipe.corpus_bytes)
        self.configs = {name: config_json(getattr(recipe, name), recipe) for name in ("target", "draft")}

    def compiled(self, function):
        return torch.compile(function, dynamic=False) if self.args.compile else function

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)

    def rng(self, stage: str, step: int) -> torch.Generator:
        """A batch is a function of seed, stage and step, so nothing but the step needs storing to resume exactly."""
        return torch.Generator().manual_seed((self.args.seed * len(STAGES) + STAGES.index(stage)) * 10**7 + step)

    def corpus_batch(self, stage: str, step: int, length: int, tests_share: float) -> tuple[torch.Tensor, ...]:
        count = self.recipe.batch_tokens // length
        rows = self.corpus.rows(count, length, self.rng(stage, step), tests_share)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def steps(self, stage: str) -> int:
        return self.args.steps if self.args.steps and self.args.stage == stage else self.recipe.steps[stage]

    def language_loss(self, model):
        def loss_of(x_BT, y_BT):
            with self.autocast():
                logits_BTV = model(x_BT)
            return F.cross_entropy(logits_BTV.flatten(0, 1).float(), y_BT.flatten())

        return self.compiled(loss_of)

    def target(self) -> None:
        model = build(self.recipe.target, self.recipe, self.device, self.args.seed)

        def batch_of(step):
            return self.corpus_batch("target", step, self.recipe.window, 0.2)

        self.start("target", model, self.language_loss(model), batch_of, warm_up, "")

    def finish(self) -> None:
        """A copy of the target goes on with longer rows, mostly of the library, at a rate that falls to zero."""
        source = self.need("target")
        model = build(self.recipe.target, self.recipe, self.device, self.args.seed)
        model.load_state_dict(source["model"])
        steps, base = self.steps("finish"), f"target {source['step']}"
        # Seeded by where it branches off, so that it does not see the batches of an earlier branch again.
        def batch_of(step):
            return self.corpus_batch("finish", source["step"] + step, self.recipe.positions, 0.15)

        begin = source | {"step": 0}
        self.start("finish", model, self.language_loss(model), batch_of, lambda step: 1 - step / steps, base, begin)

    def draft(self) -> None:
        """Distillation: the draft learns the target's whole distribution, on the corpus and on the target's texts."""
        teacher_state = self.need("finish")
        base = f"{teacher_state['base']}, finish {teacher_state['step']}"
        teacher = build(self.recipe.target, self.recipe, self.device, 0).requires_grad_(False)
        teacher.load_state_dict(teacher_state["model"])
        samples = self.samples(teacher, base)
        student = build(self.recipe.draft, self.recipe, self.device, self.args.seed)
        steps, length = self.steps("draft"), self.recipe.positions // 2  # a whole context costs a third more a token

        def batch_of(step):
            rng, count = self.rng("draft", step), self.recipe.batch_tokens // length
            chosen = torch.randint(len(samples), (max(1, count * 3 // 8), length // self.recipe.window), generator=rng)
            own = samples[chosen].flatten(1)
            rows = self.corpus.rows(count - len(own), length - 1, rng, 0.2)
            return (torch.cat((rows, own)),)

        def loss_of(x_BT):
            with self.autocast():
                with torch.no_grad():
                    p_BTV = teacher(x_BT).float().softmax(-1)
                log_q_BTV = student(x_BT).float().log_softmax(-1)
            return F.kl_div(log_q_BTV.flatten(0, 1), p_BTV.flatten(0, 1), reduction="batchmean")

        def rate_of(step):
            return min(warm_up(step), 1.6 * (1 - step / steps))

        # A new target's draft starts from the last one's: most of what it knows still holds.
        old = load(self.work / "draft.pt", self.device)
        begin = old | {"step": 0, "optimizers": None} if old else None
        self.start("draft", student, self.compiled(loss_of), batch_of, rate_of, base, begin)

    def start(self, stage, model, loss_of, batch_of, rate_of, base, begin=None) -> None:
        """Resume `stage` from its own checkpoint if that has the same base, else from `begin`, else from nothing."""
        path, steps = self.work / f"{stage}.pt", self.steps(stage)
        state = load(path, self.device)
        if state is None or state["base"] != base:
            state = begin
        Run(stage, path, steps, self.recipe.save_every, model, loss_of, batch_of, rate_of, base, self.args.polite).go(
            state, self.device
        )

    def need(self, stage: str) -> dict:
        state = load(self.work / f"{stage}.pt", self.device)
        if state is None:
            raise ValueError(f"{self.work} holds no {stage}.pt, wanted one to go on from: run --stage {stage} first")
        return state

    def samples(self, model, base: str) -> torch.Tensor:
        """(rows, window) tokens that the target wrote itself, greedily and sampled, after bits of the corpus."""
        path, rows = self.work / "samples.pt", self.recipe.samples
        stored = load(path)
        if stored is None or stored["base"] != base or len(stored["tokens"]) != rows:
            rng, size = self.rng("draft", 10**6), min(64, rows)
            heat = torch.tensor([0.0, 0.7, 1.0, 1.0]).repeat(size)[:size]
            blocks = []
            for _ in tqdm(range(rows // size), "samples", unit=f"x{size}"):
                if self.args.polite:
                    torch.set_num_threads(free_cores())
                prompt = self.corpus.rows(size, 15, rng, 0.15)
                blocks.append(sample(model, prompt, self.recipe.window - 16, heat, rng))
            save(path, tokens=torch.cat(blocks), base=base)
            stored = load(path)
        return stored["tokens"]

    def export(self) -> None:
        models = {}
        for name, stage in (("target", "finish"), ("draft", "draft")):
            models[name] = build(getattr(self.recipe, name), self.recipe, "cpu", 0)
            state = self.need(stage)
            models[name].load_state_dict(state["model"])
        manifest = self.corpus.manifest | {"trained": state["base"] + f", draft {state['step']}"}
        manifest |= {"recipe": asdict(self.recipe), "seed": self.args.seed}
        write_pair(self.args.out, self.work, models, self.configs, manifest)

    def report(self) -> None:
        """Figures of the pair as it lies in --out, written to report.json there."""
        models = {}
        for name in ("target", "draft"):
            if not (self.args.out / name / "model.safetensors").exists():
                raise ValueError(f"{self.args.out} holds no {name}, wanted a trained pair: run without --report first")
            models[name] = build(getattr(self.recipe, name), self.recipe, "cpu", 0)
            models[name].load_state_dict(from_hugging_face(self.args.out / name, models[name].config))
        figures = measure(models, self.corpus, self.recipe.positions)
        figures["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()}
        write_json(self.args.out / "report.json", figures)
        print(json.dumps({k: v for k, v in figures.items() if k != "texts"}, indent=1))


def read_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=("all", *STAGES), default="all", help="one stage, or all in order (default)")
    add("--report", action="store_const", const="report", dest="stage", help="same as --stage report")
    add("--steps", type=int, help="length of the stage named by --stage, in all, resumed steps included")
    add("--work-dir", type=Path, default=ROOT / "build" / "demo", help="checkpoints and caches (default build/demo)")
    add("--out", type=Path, default=ROOT / "assets" / "demo", help="where the pair goes (default assets/demo)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--seed", type=int, default=1)
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default unless --tiny)")
    add("--polite", action="store_true", help="on Linux: use only the CPU cores that no other process wants")
    add("--tiny", action="store_true", help="toy sizes, seconds in all: to try the script, not to get a pair")
    args = parser.parse_args(argv)
    args.compile = not args.tiny if args.compile is None else args.compile
    if args.steps is not None and (args.steps < 1 or args.stage not in ("target", "finish", "draft")):
        parser.error(f"--steps {args.steps} with --stage {args.stage}: wanted 1 or more, of target, finish or draft")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, wanted 0 or more: choose another")
    return args


def main(argv=None) -> int:
    args = read_arguments(argv)
    try:
        torch.zeros((), device=args.device)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        (args.work_dir / "pid").write_text(f"{os.getpid()}\n")
        trainer = Trainer(args, TINY if args.tiny else Recipe())
        for stage in STAGES if args.stage == "all" else (args.stage,):
            getattr(trainer, stage)()
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"train_demo: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_demo: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
