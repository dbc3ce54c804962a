"""Hierarchical speculative decoding: the draft is itself a pair, n-grams under a small model.

    guess   what followed the same n-gram earlier in the text: no model at all
    draft   verifies a guess in one pass; what holds, and its own next token, goes on the chain
    target  verifies the chain, as always

Each level keeps its own accept rule. A guess holds while it is the token that the draft itself
draws, with the noise of that position. So a chain is, token by token, what the draft would have
written in as many passes, and the target's rule need not know how it came about. Only the number
of the draft's passes changes: one method, `decode`, which drafts while the target waits. In mode
"sd" that is in every round, in mode "ssd" it is after every miss.

Only the coupling `shared` is supported: under it the scores that `extend` returns are the draft's
own, and their argmax is its draw.

    python examples/hierarchical.py [--prompt TEXT] [--target DIR --draft DIR] [--k 4]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ssd
from steps import Feed


class Hierarchical(ssd.Decoding):
    def __init__(self, *args):
        super().__init__(*args)
        if self.draft is not None and self.draft.coupling != "shared":
            raise ValueError(
                f"the coupling is {self.draft.coupling}, wanted shared, the only one under which "
                "this draft verifies guesses: leave it at shared"
            )

    def decode(self, feed: Feed, skipped, most: int, top: int) -> list[tuple[list[int], None]]:
        """The steps that Decoding.decode returns, in fewer passes where guesses hold."""
        before, start = skipped
        if max(map(len, before)) > 1:  # the draft was left out of some rounds
            self.draft.prefill(before, start)
            before, start = [[]] * len(before), feed.start
        # What each row reads next, and from where on. A row that does not draft reads nothing.
        reads = [old + new if c else [] for old, new, c in zip(before, feed.tokens, feed.count)]
        start, chains = list(start), [[] for _ in reads]
        while short := [b for b, read in enumerate(reads) if read and len(chains[b]) < most]:
            guesses = [[] for _ in reads]
            for b in short:
                guesses[b] = self.rows[b].guess(most - len(chains[b]) - 1, chains[b])
            fed = [reads[b] + guesses[b] if b in short else [] for b in range(len(reads))]
            drawn = self.draw(fed, start)
            for b in short:
                own = drawn[b][len(reads[b]) - 1 :]
                held = accepted(guesses[b], own)
                start[b] += len(reads[b]) + held
                chains[b] += own[: held + 1]
                reads[b] = [own[held]]
        return [([chain[i] if chain else 0 for chain in chains], None) for i in range(most)]

    def draw(self, fed: list[list[int]], start: list[int]) -> list[list[int]]:
        """The token that the draft draws after each that it is fed, in one pass."""
        T = self.draft.fits(max(map(len, fed)))
        padded = [tokens + [0] * (T - len(tokens)) for tokens in fed]
        feed = Feed(padded, start, list(map(len, fed)))
        scores_BTV = self.draft.extend(feed)
        return self.draft.by_place(self.draft.ids_V[scores_BTV.argmax(-1)].tolist(), feed)


def accepted(guessed: list[int], own: list[int]) -> int:
    """How many guesses hold: those before the first that is not the draft's own draw."""
    return next((i for i, token in enumerate(guessed) if token != own[i]), len(guessed))


if __name__ == "__main__":
    from pearl import SSD, main

    sd, level = {"mode": "sd"}, {"decoding": Hierarchical}
    main({"AR": {}, "SD": sd, "SSD": SSD, "H-SSD": SSD | level, "H-SD": sd | level})
