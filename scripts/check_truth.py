"""Is the engine's greedy text what transformers computes from the same file?

Knows: how two programs read one file, and what counts as a tie. Does not know: how either computes.
Read next: pass_at_1.py, whether the text is any good.

    pip install accelerate                      transformers needs it to read .gguf files
    python scripts/check_truth.py --target MODEL.gguf --prompts DIR --out results/truth.json

transformers is not asked to write: it reads prompt and text in one pass, and its best token must be
the next one at every place. By induction that is its own greedy text. Where another token is best,
the gap between the two is reported; below 1e-3 rounding decides between them, and it counts as a
tie.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench import prompts as read_prompts  # noqa: E402
from runner import check_out, keep  # noqa: E402

from ssd import load  # noqa: E402

TIE = 1e-3


def written(args) -> tuple[list[list[int]], list[list[int]], str]:
    """Prompts and the engine's greedy texts as token ids, and the target's name."""
    engine = load(args.target, "ngram", "cpu", dtype="float32", quantize="none")
    kinds, prompts = read_prompts(args.prompts, -(-args.count // 3)), []
    for kind, texts in kinds.items():
        for text in texts:
            chat = [{"role": "user", "content": text}]
            encode = engine.tokenizer.encode_chat if kind == "chat" else engine.tokenizer.encode
            prompts.append(encode(chat if kind == "chat" else text)[: args.longest])
    prompts = prompts[: args.count]
    texts = []
    for at in range(0, len(prompts), 8):
        result = engine.generate(prompts[at : at + 8], max_new_tokens=args.new_tokens)
        texts += result.token_ids
    return prompts, texts, engine.target.name


def reader(name: str):
    """transformers' model of a folder or a .gguf file, in float32."""
    from transformers import AutoModelForCausalLM

    folder, file = os.path.split(name)
    where = {"gguf_file": file} if file.endswith(".gguf") else {}
    load = AutoModelForCausalLM.from_pretrained
    return load(folder if where else name, dtype=torch.float32, **where).eval()


@torch.inference_mode()
def disagreements(model, prompt: list[int], text: list[int]) -> list[dict]:
    """Places of a text where transformers' best token is another, with the gap in logits."""
    logits_TV = model(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    best_T, text_T = logits_TV.argmax(-1), torch.tensor(text)
    found = []
    for at in (best_T != text_T).nonzero().flatten().tolist():
        gap = logits_TV[at, best_T[at]] - logits_TV[at, text_T[at]]
        found.append({"position": at, "gap": float(gap)})
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--target", help="folder or .gguf file (the default model)")
    add("--prompts", metavar="DIR", help="as in bench.py (its built-in prompts)")
    add("--count", type=int, default=20, help="prompts of three kinds (20)")
    add("--new-tokens", type=int, default=64, help="of each text (64)")
    add("--longest", type=int, default=256, help="tokens of a prompt, the rest is cut off (256)")
    add("--out", metavar="FILE", help="JSON; what it holds of other models is kept")
    args = parser.parse_args(argv)
    try:
        check_out(args.out)
        prompts, texts, name = written(args)
        model = reader(name)
    except (ValueError, ImportError) as error:
        print(f"check_truth.py: {error}", file=sys.stderr)
        return 2
    found = []
    for number, (prompt, text) in enumerate(zip(prompts, texts)):
        for where in disagreements(model, prompt, text):
            found.append({"prompt": number, **where})
            print(f"  prompt {number}: {where}", flush=True)
    worst = max((where["gap"] for where in found), default=0.0)
    result = {"texts": len(texts), "tokens": sum(map(len, texts))}
    result |= {"ties": sum(where["gap"] < TIE for where in found)}
    result |= {"differences": len(found) - result["ties"], "largest_gap": worst, "where": found}
    if args.out:
        keep(args.out, Path(name).name, result)
    print(f"{Path(name).name}: {result['texts']} greedy texts, {result['tokens']} tokens, "
          f"{result['ties']} ties, {result['differences']} differences")  # fmt: skip
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
