"""PEARL in this loop (arXiv 2408.11850): the draft prepares for one outcome, "all accepted".

    post-verify  While the target verifies a proposal, the draft goes on after it. If all of the
                 proposal holds and the target's bonus token is the draft's next token, then what
                 the draft wrote after that token is the next proposal.
    pre-verify   If not, the target does not wait for a proposal. It reads the pending token
                 alone, and so verifies the draft's first token while the draft writes the rest.

Both are SSD with one outcome, and without drafting while the target waits: two methods.

What differs from the paper: the target draws a bonus token, which must be the draft's own token.
At temperature 0 that is the paper's test; at others it accepts with a probability of its own.
Chains end by the clock; in the paper their length is the ratio of the two models' speeds. The draft
reads a proposal a second time, one pass a round, since this loop does not keep the KV of chains.

    python examples/pearl.py [--prompt TEXT] [--target DIR --draft DIR] [--k 4] [--temperature 0]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ssd
from figures import figures_line
from steps import Fork

FLAGS = {"target": None, "draft": None, "prompt": None}
FLAGS |= {"k": 4, "temperature": 0.0, "max_new_tokens": 128, "turns": 3}
SSD = {"mode": "ssd", "fan_out": 12}


class Pearl(ssd.Decoding):
    def predict(self, scores_BTV, feed, plan) -> Fork:
        """One outcome a row: all accepted, then the token that the draft itself draws there."""
        drawn_BT = self.draft.by_place(self.draft.ids_V[scores_BTV.argmax(-1)].tolist(), feed)
        last = [max(count - 1, 0) for count in feed.count]  # a row that has ended has a count of 0
        tokens = [row and [row[j]] for row, j in zip(drawn_BT, last)]
        return Fork(tokens, [[j] for j in last], [1.0] * len(last))  # chances: only SSD reads them

    def draft_now(self, missed, plan, played) -> dict:
        """No tokens for the rows that missed: the next round pre-verifies."""
        return {b: ([], []) for b in missed}


PEARL = {"mode": "ssd", "decoding": Pearl, "fan_out": 1, "fallback": "jit"}


def side_by_side(ways: dict[str, dict]) -> None:
    """Print the last way's text, and for each way the figures of its run of median speed."""
    parser = argparse.ArgumentParser()
    for flag, usual in FLAGS.items():
        kind = str if usual is None else type(usual)
        parser.add_argument("--" + flag.replace("_", "-"), type=kind, default=usual)
    args = vars(parser.parse_args())
    engine, turns = ssd.load(args.pop("target"), args.pop("draft")), max(1, args.pop("turns"))
    asked = [{"role": "user", "content": "Why is the sky blue?"}]
    prompt, runs = args.pop("prompt") or engine.tokenizer.encode_chat(asked), {}
    for _ in range(turns):  # in turn, so that a slow minute of the machine falls on every way
        for way, settings in ways.items():
            runs.setdefault(way, []).append(engine.generate([prompt], **args | settings))
    print(runs[way][0].text[0], end="\n\n")
    for way, results in runs.items():
        results.sort(key=lambda result: result.stats["tokens_per_s"])
        print(figures_line(results[turns // 2].stats | {"mode": way}))
    texts = {tuple(result.token_ids[0]) for results in runs.values() for result in results}
    print("The texts are the same." if len(texts) == 1 else "The texts DIFFER.")


def main(ways: dict[str, dict]) -> None:
    try:
        side_by_side(ways)
    except ValueError as error:  # one sentence that says what to set right
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main({"AR": {}, "SD": {"mode": "sd"}, "SSD": SSD, "PEARL": PEARL})
