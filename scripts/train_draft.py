"""Distil a small draft from any target, on text that the target writes itself.

Knows: the stages (texts, train, export), the loss. Does not know: how a model computes (model.py),
how a trained draft is loaded (checkpoint/weights.py). Read next: run().

    python scripts/train_draft.py --target TARGET --out DRAFT       # the same command resumes
    python scripts/train_draft.py --target TARGET --out DRAFT --prompts questions.jsonl

The draft is a few of the target's own layers and its final norm, trained. It shares the target's
embedding, and its head is the target's rows for the tokens that the target uses most: neither is in
the file. The target samples the texts, greedily and hot, and with every token its 32 most probable
ones are kept: training needs no pass of the target, but for one over held-out texts. Prompts are
those of files, some made up here, and --asked ones that the target makes up. Each sixth prompt of
a kind is held out.
A shard of texts depends on (seed, number) alone, a batch on (seed, epoch, texts) alone, so a run
that was stopped goes on to the same weights.

Shape letters: B rows, T tokens per row, N positions that are learnt, K most probable tokens,
V vocabulary, E hidden size.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from draft_prompts import read_prompts  # noqa: E402
from draft_texts import PIECE, Text, all_texts, ask, fetch, store, write_texts  # noqa: E402

from checkpoint.config import Config  # noqa: E402
from checkpoint.tokenizer import load_tokenizer, read_eos_ids  # noqa: E402
from checkpoint.weights import load_config, load_model, pieces, resolve  # noqa: E402
from engine import Model  # noqa: E402
from model import Transformer  # noqa: E402

STAGES = ("texts", "train", "export")
DIVERGENCE = 0.2  # its weight beside the share of tokens that is not accepted
Held = tuple[Text, torch.Tensor | None]  # of Distiller.expected


def most_used(texts: list[Text], vocab: int, count: int, eos) -> torch.Tensor:
    """The `count` ids that the target expects most, and those that end a text, in rising order."""
    mass_V = torch.zeros(vocab)
    for text in texts:
        mass_V.index_add_(0, text.ids_NK.flatten().long(), text.logp_NK.flatten().float().exp())
    mass_V[list(eos)] = float("inf")
    return mass_V.topk(min(count, vocab)).indices.sort().values


class Distiller:
    """The draft in training: weights, their running mean (measured and exported), optimizer."""

    def __init__(self, target: Transformer, texts: list[Text], eos, args):
        self.args, self.path, self.texts = args, args.work_dir / "draft.pt", texts
        device, config = target.embed.weight.device, target.config
        state = torch.load(self.path, map_location=device) if self.path.exists() else {}
        begin = args.begin and load_model(args.begin, device, torch.float32, Transformer, target)
        if begin:
            about = json.loads((args.begin / "config.json").read_text()).get("draft_of")
            if about is None:
                raise ValueError(f"{args.begin} is not a draft made by this script, wanted one")
            state = {"layers": about["layers"], "token_ids": begin.token_ids_V} | state
        self.layers = state.get("layers") or chosen_layers(args.layers, config.num_layers)
        self.token_ids_V = state.get("token_ids")
        if self.token_ids_V is None:
            self.token_ids_V = most_used(texts, config.vocab_size, args.vocab, eos).to(device)
        kept = len(self.token_ids_V)
        self.head_VE = target.head.weight.detach()[self.token_ids_V].float()
        self.slot_V = torch.full((config.vocab_size,), -1, device=device)
        self.slot_V[self.token_ids_V] = torch.arange(kept, device=device)
        self.config = draft_config(config, self.layers, kept)
        self.model = Transformer(self.config).to(device)
        self.model.embed = nn.Embedding.from_pretrained(target.embed.weight.float())
        self.model.head = nn.Identity()  # ours is applied only where something is learnt
        first = begin.layers if begin else [target.layers[layer] for layer in self.layers]
        for mine, layer in zip(self.model.layers, first):  # float32, whatever --dtype is
            mine.load_state_dict(layer.state_dict())
        self.model.norm.load_state_dict((begin or target).norm.state_dict())
        self.model.set_positions(target.rope[0].shape[0])
        every = self.model.named_parameters()
        self.weights = {name: p.requires_grad_() for name, p in every if "embed" not in name}
        self.mean = {name: p.detach().clone() for name, p in self.weights.items()}
        self.adam = torch.optim.AdamW(
            self.weights.values(), args.rate, (0.9, 0.95), weight_decay=0, fused=True
        )
        self.step, self.epoch, self.batch, self.seconds = state.get("at", (0, 0, 0, 0.0))
        if "model" in state:
            self.put(state["model"])
            self.mean = state["mean"]
            self.adam.load_state_dict(state["adam"])

    def save(self) -> None:
        model = {name: p.detach() for name, p in self.weights.items()}
        at = (self.step, self.epoch, self.batch, self.seconds)
        state = {"model": model, "mean": self.mean, "adam": self.adam.state_dict(), "at": at}
        store(self.path, state | {"layers": self.layers, "token_ids": self.token_ids_V})

    def batches(self) -> list[list[Text]]:
        """This epoch's batches: texts of about one length, --batch tokens each with padding."""
        rng = torch.Generator().manual_seed(self.args.seed * 10**6 + self.epoch)
        order, found = torch.randperm(len(self.texts), generator=rng).tolist(), []
        for first in range(0, len(order), 128):
            some, batch = [self.texts[n] for n in order[first : first + 128]], []
            for text in sorted(some, key=lambda text: len(text.tokens)):
                if batch and (len(batch) + 1) * len(text.tokens) > self.args.batch:
                    found.append(batch)
                    batch = []
                batch.append(text)
            found.append(batch)
        return [found[n] for n in torch.randperm(len(found), generator=rng).tolist()]

    def log_q(self, texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The draft's log q (N, V) over its own tokens; the target's top as slots and p, (N, K)."""
        device, T = self.head_VE.device, max(len(text.tokens) for text in texts) - 1
        tokens_BT = torch.zeros(len(texts), T, dtype=torch.long)
        at = []  # where the positions lie that are learnt
        for row, text in enumerate(texts):
            tokens_BT[row, : len(text.tokens) - 1] = text.tokens[:-1]
            at.append(torch.arange(text.first - 1, len(text.tokens) - 1) + row * T)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.args.dtype == "bfloat16"):
            hidden_NE = self.model(tokens_BT.to(device)).flatten(0, 1)[torch.cat(at).to(device)]
            logits_NV = F.linear(hidden_NE, self.head_VE)
        slots_NK = self.slot_V[torch.cat([text.ids_NK for text in texts]).long().to(device)]
        p_NK = torch.cat([text.logp_NK for text in texts]).to(device).float().exp()
        return logits_NV.float().log_softmax(-1), slots_NK, p_NK

    def learn(self, texts: list[Text], rate: float) -> float:
        """One step towards a larger sum(min(p, q)), the share of tokens that is accepted.

        Where q is next to nothing its slope is, too, so a part of the divergence of q from p is
        added, with p renormalised over the draft's tokens.
        """
        logq_NV, slots_NK, p_NK = self.log_q(texts)
        p_NK = p_NK * (slots_NK >= 0)
        logq_NK = logq_NV.gather(1, slots_NK.clamp(min=0))
        missed = 1 - torch.minimum(p_NK, logq_NK.exp()).sum() / len(p_NK)
        sum_N1 = p_NK.sum(-1, keepdim=True)
        # Where the draft has next to none of what is expected, there is nothing to learn.
        p_NK = torch.where(sum_N1 > 0.1, p_NK / sum_N1.clamp(min=0.1), 0.0)
        divergence = (p_NK * (p_NK.clamp(min=1e-9).log() - logq_NK)).sum() / len(p_NK)
        loss = missed + DIVERGENCE * divergence
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate * self.args.rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.step += 1
        hold = min(0.998, self.step / (self.step + 10))
        for name, p in self.weights.items():
            self.mean[name].lerp_(p.detach(), 1 - hold)
        return loss.item()

    @torch.no_grad()
    def expected(self, target: Transformer, texts: list[Text]) -> list[Held]:
        """Held-out texts, the short ones first, with p (N, V) over the draft's tokens for those
        that were drawn: beyond a text's K tokens the target expects a tenth of what it draws.
        """
        found = []
        for text in sorted(texts, key=lambda text: len(text.tokens)):
            p_NV = None
            if text.heat:
                tokens_1T = text.tokens[None, :-1].long().to(self.slot_V.device)
                logits_NV = target(tokens_1T)[0, text.first - 1 :].float()
                p_NV = logits_NV.softmax(-1)[:, self.token_ids_V].half()
            found.append((text, p_NV))
        return found

    @torch.no_grad()
    def acceptance(self, held: list[Held]) -> dict[str, float]:
        """Kind and temperature of held-out texts -> share of tokens accepted, by the running mean.

        At temperature 0 the draft's best token must be the text's; at 1 it is sum(min(p, q)), what
        `maximal` coupling accepts.
        """
        now = {name: p.detach().clone() for name, p in self.weights.items()}
        self.put(self.mean)
        found = {}
        for some in (held[first : first + 8] for first in range(0, len(held), 8)):
            sizes = [len(text.ids_NK) for text, _ in some]
            each = self.log_q([text for text, _ in some])[0].split(sizes)
            for (text, p_NV), logq_NV in zip(some, each):
                true_N = text.tokens[text.first :].long().to(self.slot_V.device)
                share_N = (logq_NV.argmax(-1) == self.slot_V[true_N]).float()
                if p_NV is not None:
                    share_N = torch.minimum(p_NV, logq_NV.exp()).sum(-1)
                for kind in (text.kind, "all"):
                    found.setdefault(f"{kind}@{text.heat:g}", []).append(share_N)
        self.put(now)
        return {name: torch.cat(parts).mean().item() for name, parts in sorted(found.items())}

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, p in self.weights.items():
            p.data.copy_(weights[name])


def chosen_layers(wanted: str, count: int) -> list[int]:
    """Layers that the draft begins as: "0,1,28,29", or how many, half from each end."""
    if "," in wanted:
        layers = [int(part) for part in wanted.split(",")]
        if not all(0 <= layer < count for layer in layers):
            raise ValueError(f"--layers is {wanted}, wanted some of 0 to {count - 1}")
        return layers
    some = int(wanted) if wanted.isdecimal() else 0
    if not 1 <= some <= count:
        raise ValueError(f"--layers is {wanted}, wanted 1 to {count}, as many as the target has")
    return [*range((some + 1) // 2), *range(count - some // 2, count)]


def draft_config(config: Config, layers: list[int], head_tokens: int) -> Config:
    windows = tuple(config.windows[layer] for layer in layers)
    return replace(
        config, num_layers=len(layers), windows=windows, head_tokens=head_tokens, tied=False
    )


def raw_config(config: Config, draft_of: dict) -> dict:
    """config.json of a draft, in Hugging Face's terms and two of ours: head_tokens, draft_of."""
    rope = {"rope_type": config.rope["type"], "rope_theta": config.rope_theta}
    rope |= {key: value for key, value in config.rope.items() if key != "type"}
    if rope["rope_type"] == "factors":  # a list of them, as our config.json calls it
        rope["factors"] = rope.pop("factor")
    raw = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "head_tokens": config.head_tokens,
        "draft_of": draft_of,
    }
    if window := max(config.windows):
        kinds = ["sliding_attention" if size else "full_attention" for size in config.windows]
        raw |= {"sliding_window": window, "use_sliding_window": True, "layer_types": kinds}
    elif config.model_type == "mistral":  # where nothing is said, a window is meant
        raw["sliding_window"] = None
    return raw


def export(run: Distiller, target: Transformer, out: Path, figures: dict) -> None:
    """config.json and model.safetensors: layers and norm in bfloat16, what ties them to a target.

    embedding_sample: the target's embedding, in float16, of token_ids at 64 even steps.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for piece in pieces(run.config):
        if piece.ours in run.mean:  # all but the embedding and the head
            rows = run.mean[piece.ours][piece.start : piece.start + piece.shape[0]]
            tensors[piece.theirs] = rows.cpu().bfloat16().contiguous()
    ids_V = run.token_ids_V.cpu()
    sample_V = ids_V[torch.linspace(0, len(ids_V) - 1, min(64, len(ids_V))).long()]
    tensors["token_ids"] = ids_V.int()
    tensors["embedding_sample"] = target.embed.weight.detach().cpu()[sample_V].half()
    save_file(tensors, out / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")
    about = {"target": Path(run.args.target).name, "layers": run.layers, "steps": run.step}
    about["acceptance"] = {name: round(share, 4) for name, share in figures.items()}
    (out / "config.json").write_text(json.dumps(raw_config(run.config, about), indent=2) + "\n")


def train(run: Distiller, target: Transformer, held: list[Held], args) -> None:
    """Train for --epochs, or --minutes in all; the rate falls to nothing over the last third."""
    clock = stored = time.perf_counter()
    batches, shown, done = run.batches(), None, 0.0
    figures = report(run, held, args, "") if run.step == 0 else {}
    bar = tqdm(initial=run.step, desc="train", unit="step")
    while done < 1:
        if run.batch >= len(batches):
            run.texts = all_texts(args.work_dir / "texts")  # there may be more by now
            run.epoch, run.batch = run.epoch + 1, 0
            batches = run.batches()
        now = time.perf_counter()
        run.seconds, clock = run.seconds + now - clock, now
        done = (run.epoch + run.batch / len(batches)) / args.epochs
        done = run.seconds / 60 / args.minutes if args.minutes else done
        if done >= 1:
            break
        rate = min((run.step + 1) / 30, 3 * (1 - done) + 0.01, 1.0)
        loss = run.learn(batches[run.batch], rate)
        run.batch += 1
        shown = loss if shown is None else 0.95 * shown + 0.05 * loss
        bar.set_postfix(loss=f"{shown:.3f}", done=f"{done:.0%}", refresh=False)
        bar.update()
        if run.step % args.every == 0:
            figures = report(run, held, args, f" loss {shown:.3f}")
        if now - stored > args.save_seconds:
            run.save()
            export(run, target, args.out, figures)
            stored = now
    bar.close()
    run.save()
    export(run, target, args.out, report(run, held, args, " at the end"))


def report(run: Distiller, held: list[Held], args, what: str) -> dict[str, float]:
    """Held-out acceptance, printed above the progress bar and kept in the work folder's log."""
    figures = run.acceptance(held)
    shares = " ".join(f"{name} {share:.3f}" for name, share in figures.items())
    line = f"step {run.step}, epoch {run.epoch}{what}: {shares}"
    tqdm.write(line)
    with open(args.work_dir / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    return figures


def claim(args) -> None:
    """Note in the work folder what it is for. ValueError if it is for something else: texts and
    weights in it would be taken for those of this target and these numbers. ValueError for
    --layers that the target does not have.
    """
    path = args.work_dir / "about.json"
    there = Path(args.target).exists()
    about = {"target": str(Path(args.target).resolve()) if there else args.target}
    names = ["layers", "vocab", "new_tokens", "seed"]
    if args.stage in ("all", "texts"):  # what the texts are written from
        names += ["prompts", "text", "asked", "prompt_tokens", "rows"]
    about |= {name: json.loads(json.dumps(getattr(args, name), default=str)) for name in names}
    known = json.loads(path.read_text()) if path.exists() else {}
    if wrong := [name for name in about if known.get(name, about[name]) != about[name]]:
        raise ValueError(
            f"{args.work_dir} holds work with {wrong[0].replace('_', '-')} {known[wrong[0]]}, "
            f"wanted {about[wrong[0]]}: give what it was begun with, or name another --work-dir"
        )
    chosen_layers(args.layers, load_config(args.target).num_layers)  # now, not after hours of work
    about = known | about
    path.write_text(json.dumps(about) + "\n")


def read_arguments(argv=None):
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    add = (parser := argparse.ArgumentParser(**about)).add_argument
    add("--target", required=True, help="a folder, a .gguf file or a hub id")
    add("--out", type=Path, required=True, help="the folder for the draft")
    add("--work-dir", type=Path, default=ROOT / "build" / "draft", help="texts and checkpoints")
    add("--stage", choices=("all", *STAGES), default="all", help="one stage, or all in order")
    some = {"type": Path, "nargs": "*", "default": []}
    add("--prompts", **some, help='.jsonl with "turns" or "prompt" a line, or texts to go on with')
    add("--text", **some, help="texts to learn from as they are")
    add("--asked", type=int, default=2000, help="prompts that the target makes up itself (2000)")
    add("--tokens", type=float, default=500_000, help="tokens that the target writes (500000)")
    add("--new-tokens", type=int, default=160, help="of a text (160)")
    add("--prompt-tokens", type=int, default=1024, help="longer prompts are left out (1024)")
    add("--rows", type=int, default=128, help="texts written at a time (128)")
    add("--layers", default="4", help='how many of the target\'s layers, or which: "0,1,28,29"')
    add(
        "--begin",
        type=Path,
        help="a draft of this target to go on from, with its layers and tokens",
    )
    add("--vocab", type=int, default=8000, help="tokens that the draft can propose (8000)")
    add("--epochs", type=int, default=4, help="passes over the texts (4)")
    add("--minutes", type=float, default=0, help="of training in all, rather than --epochs")
    add("--batch", type=int, default=2048, help="tokens of a batch, padding included (2048)")
    add("--rate", type=float, default=1e-3, help="learning rate (0.001)")
    add("--save-seconds", type=float, default=300, help="between two checkpoints (300)")
    add("--every", type=int, default=100, help="steps between two looks at held-out texts (100)")
    add("--device", default="cpu")
    many = "of the products; bfloat16 is far quicker where a CPU or GPU has instructions for it"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=many)
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    counts = "tokens new_tokens prompt_tokens rows vocab epochs batch every"
    for name in counts.split():
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, wanted 1 or more")
    if args.minutes < 0:
        parser.error(f"--minutes is {args.minutes:g}, wanted 0 or more")
    try:
        torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device is {args.device}, wanted cpu or cuda:0")
    return args


def run(args) -> None:
    claim(args)
    folder, work = resolve(args.target), args.work_dir
    tokenizer = load_tokenizer(folder)
    if tokenizer is None and (args.prompts or args.text):
        raise ValueError(
            f"{args.target} has no tokenizer files, which --prompts and --text need: leave them out"
        )
    eos = set(tokenizer.eos_ids if tokenizer else read_eos_ids(folder))
    if args.stage in ("all", "texts"):
        # In floats on a CPU: what the engine would choose there hangs on the moment, and texts that
        # are gone on with must not. Not compiled, since shapes change at every step.
        device = torch.device(args.device)
        numbers = "float32" if device.type == "cpu" else args.dtype
        writer = Model.load(args.target, device, numbers, compile=False).transformer
        writer.set_positions(args.prompt_tokens + args.new_tokens + PIECE)
        asked = ask(writer, tokenizer, eos, args) if tokenizer and args.asked else []
        learn, held = read_prompts(args, tokenizer, writer.config.vocab_size, asked)
        write_texts(writer, tokenizer, learn, held, eos, args)
        del writer
    if args.stage == "texts":
        return
    dtype = getattr(torch, args.dtype)
    target = load_model(args.target, args.device, dtype, Transformer).requires_grad_(False)
    texts = all_texts(work / "texts")
    if not texts:
        raise ValueError(f"{work} holds no texts, wanted some: run --stage texts first")
    held = fetch(work / "held.pt")
    target.set_positions(max(len(text.tokens) for text in texts + held))
    distiller = Distiller(target, texts, eos, args)
    held = distiller.expected(target, held)
    if args.stage == "export":
        export(distiller, target, args.out, distiller.acceptance(held))
    else:
        train(distiller, target, held, args)


def main(argv=None) -> int:
    args = read_arguments(argv)
    try:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        (args.work_dir / "pid").write_text(f"{os.getpid()}\n")
        run(args)
    except (ValueError, OSError) as error:
        print(f"train_draft: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_draft: stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
