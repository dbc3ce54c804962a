"""Write a checkpoint grown to a larger shape that computes the same.

    python scripts/inflate.py SMALL llama-3.1-8b /tmp/big --dtype bfloat16
    python scripts/inflate.py SMALL hidden=1024,layers=12,heads=16,kv_heads=4 /tmp/mid

The tokenizer is copied: its words are all that the grown model ever writes. To run a grown model
without writing it, give `inflate:SHAPE:FOLDER` as the name of a target or a draft.
checkpoint/inflation.py does the work.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint.inflation import NAMES, SHAPES, grown  # noqa: E402
from checkpoint.weights import TEXT_FILES, pieces, resolve  # noqa: E402
from model import Transformer  # noqa: E402
from scripts.save import save_model, weight_bytes  # noqa: E402


def inflate(
    source: str, shape: str, out: Path, dtype: torch.dtype, device: str, seed: int, shard_bytes: int
) -> str:
    """What was written to the folder `out`, in a sentence. One shard at a time is in memory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: give the name of a new one")
    folder = resolve(source)
    if folder.is_file():
        raise ValueError(
            f"{source} is one file, whose tokenizer cannot be copied to a folder: give a folder, "
            f"or use it at once, as --target inflate:{shape}:{source}"
        )
    raw, config, fill = grown(shape, folder, device, dtype, Transformer, seed)
    parent = next(path for path in out.absolute().parents if path.exists())
    needed, free = weight_bytes(config, dtype), shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"the folder needs {needed / 1e9:.2f} GB, but {parent} has {free / 1e9:.2f} GB free: "
            "free some"
        )
    with tqdm(total=needed, unit="B", unit_scale=True, desc=str(out)) as bar:

        def fill_and_show(piece, tensor):
            fill(piece, tensor)
            bar.update(tensor.nbytes)

        files = save_model(fill_and_show, raw, out, dtype, shard_bytes)
    for path in {path for pattern in TEXT_FILES for path in folder.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, out / path.name)
    parameters = sum(math.prod(piece.shape) for piece in pieces(config))
    return (
        f"{out}: {parameters / 1e6:,.1f}M parameters, {needed / 1e9:.2f} GB in {len(files)} file(s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Grow a checkpoint to a larger shape without changing what it computes."
    )
    parser.add_argument("source", help="folder or hub id of a small checkpoint")
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or sizes: {'=N,'.join(NAMES)}=N")
    parser.add_argument("out", type=Path, help="the folder to write, new or empty")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "float64")
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random numbers that change nothing (default 0)"
    )
    parser.add_argument(
        "--shard-gb", type=float, default=2.0, help="size of one weights file (default 2)"
    )
    args = parser.parse_args()
    try:
        if not 0 < args.shard_gb <= 1000:
            raise ValueError(
                f"--shard-gb is {args.shard_gb}, wanted above 0 and at most 1000: leave it out"
            )
        if not 0 <= args.seed < 1 << 63:
            raise ValueError(
                f"--seed is {args.seed}, wanted a whole number from 0 to 2^63 - 1: leave it out"
            )
        shard_bytes = int(args.shard_gb * 1e9)
        dtype = getattr(torch, args.dtype)
        print(inflate(args.source, args.shape, args.out, dtype, "cpu", args.seed, shard_bytes))
    except (ValueError, OSError) as error:
        print(f"inflate.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
