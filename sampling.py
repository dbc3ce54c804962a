"""Sampling as pure functions of tensors: noise, warping, draws, outcomes, acceptance, Saguaro.

Knows: logits, distributions, the noise that all randomness comes from. Does not know: models,
caches, devices' queues, texts. Read next: cache.py.

A draw from a distribution f is argmax over tokens of log f + G, where the Gumbel noise G is a pure
function of (seed, row, position, purpose, token). It needs no generator and no state, so the draft
can ask for the very noise that the target will draw with. That makes outcomes predictable and,
under `shared`, the text the same in every mode, to the extent that the logits are the same.

Shape letters: B rows, T positions, K draft tokens, M branches, V vocabulary. p is the target, q the
draft.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Optional  # TorchScript reads Optional

import torch
import torch.nn.functional as F

from kernels import scripted

# Purposes of noise: the target's or draft's own draw, the accept test, the residual's draw.
TOKEN, ACCEPT, RESIDUAL = 1, 2, 3
# Kinds of a proposal: nothing; drawn from q; found in the row's own text, so drawn from no q.
NONE, CHAIN, FIXED = 0, 1, 2
# With F guesses of r' after one j, the chance of a miss is proportional to F^-MISS_POWER. For the
# paper's pairs the power is .54 at temperature 0 and .41 at 1; for the default pair .28 to .47
# (shared, temperature 1).
MISS_POWER = 0.5
ARGMAX_BLOCK = 256  # tokens that one block of a GPU compares
SPREAD_STEP, HOLD_STEP = 0.05, 0.02  # how fast Foresight learns
# With 50,000 tokens and a spread above 2 no drafted token seems likely to hold. All outcomes that
# are prepared then begin with a rejection and rarely hit, so a high spread would sustain itself.
WIDEST_SPREAD = 1.5


class Params(NamedTuple):
    """How each row samples: tensors of B rows on the model's device. row_B is the number of the
    sequence, which stays the same wherever in the batch it sits.

    greedy says that every temperature is 0, filtered that some row has a top-k or top-p. The host
    knows both, and so skips filters that change nothing.
    """

    temperature_B: torch.Tensor
    top_k_B: torch.Tensor
    top_p_B: torch.Tensor
    seed_B: torch.Tensor
    row_B: torch.Tensor
    key_B2: torch.Tensor  # row_keys(seed_B, row_B)
    greedy: bool
    filtered: bool

    @classmethod
    def make(cls, temperature, top_k, top_p, seed, row, device) -> "Params":
        """Params from lists with one value per row. top_k 0 and top_p 1 mean off. A seed is any
        64-bit whole number.
        """
        signed = [s - (1 << 64) if s >= 1 << 63 else s for s in seed]

        def tensor(values, dtype):
            return torch.tensor(values, dtype=dtype, device=device)

        seed_B, row_B = tensor(signed, torch.int64), tensor(row, torch.int64)
        return cls(
            tensor(temperature, torch.float32),
            tensor([k or 1 << 30 for k in top_k], torch.int64),
            tensor(top_p, torch.float32),
            seed_B,
            row_B,
            row_keys(seed_B, row_B),
            greedy=not any(temperature),
            filtered=any(top_k) or any(p < 1 for p in top_p),
        )

    @property
    def tensors(self) -> tuple:
        return self[:6]

    @property
    def flags(self) -> tuple:
        return self[6:]

    def to(self, device) -> "Params":
        return Params(*(x_B.to(device) for x_B in self.tensors), *self.flags)

    def narrow(self, part: range) -> "Params":
        """Views of these rows alone."""
        return Params(*(x_B[part.start : part.stop] for x_B in self.tensors), *self.flags)


# ---- noise


def _mix(x: torch.Tensor) -> torch.Tensor:  # compiled together with its callers
    """int32 words, scrambled so that flipping an input bit flips each output bit half the time.

    Shifts, multiplications and constants are those of Wellons' "lowbias32" (bias 0.17 of a bit in
    2^32, public domain).
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846ca68b as a signed word
    return x ^ ((x >> 16) & 0xFFFF)


def row_keys(seed_B: torch.Tensor, row_B: torch.Tensor) -> torch.Tensor:
    """Two independent 32-bit keys for each row, (B, 2) int32. They are made once a run, so that a
    draw hashes only its position and token.
    """
    parts = seed_B, seed_B >> 32, row_B
    # This wraps to the signed words with the same bits.
    first, *others = ((part & 0xFFFFFFFF).to(torch.int32) for part in parts)
    key1, key2 = _mix(first + 0x2545F491), _mix(first ^ 0x5851F42D)
    for word in others:
        key1, key2 = _mix(word + key1 * 5), _mix((word ^ key2) * 3 + 0x14057B7F)
    return torch.stack((key1, key2), -1)


def hash_words(
    params: Params, positions_BT: torch.Tensor, purpose: int, words_V=None
) -> torch.Tensor:
    """31-bit hash words, int32 >= 0: (B, T), or (B, T, V) with one for each token. They are the
    same on every device.

    words_V: token ids, int32; or a count V, for the ids 0 to V - 1.
    """
    if isinstance(words_V, int):
        words_V = torch.arange(words_V, dtype=torch.int32, device=positions_BT.device)
    return _hash(params.key_B2, positions_BT, purpose, words_V)


@scripted
def _hash(
    key_B2: torch.Tensor, positions_BT: torch.Tensor, purpose: int, words_V: Optional[torch.Tensor]
) -> torch.Tensor:
    """hash_words from two keys per position: two positions of one row never share their noise."""
    word_BT1 = (positions_BT & 0xFFFFFFFF).to(torch.int32)[..., None]
    key_BT2 = _mix(_mix(word_BT1 + key_B2[:, None] * 5) * 5 + purpose)
    key1, key2 = key_BT2[..., 0], key_BT2[..., 1]
    if words_V is None:
        return _mix(key1 ^ _mix(key2)) & 0x7FFFFFFF
    return _mix(_mix(words_V + key1[..., None]) ^ key2[..., None]) & 0x7FFFFFFF


def uniform(params, positions_BT, purpose, words_V=None, dtype=torch.float32) -> torch.Tensor:
    """Uniform noise in (0, 1) for each position, or for each position and token."""
    return _to_unit(hash_words(params, positions_BT, purpose, words_V), dtype)


@scripted
def _to_unit(words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # In float32 the largest words would round to 1 exactly; the nearest number below it keeps the
    # interval open.
    return (words.to(dtype) * 2.0**-31 + 2.0**-32).clamp_(max=1 - 2.0**-24)


def gumbel(
    params: Params, positions_BT, purpose: int, words_V, dtype=torch.float32
) -> torch.Tensor:
    """Gumbel noise (B, T, V), which is 0 for rows of temperature 0. words_V is as in hash_words.

    -log(-log(1 - u)): the large values that decide a draw come from u near 0, where floats are
    dense.
    """
    noise = _double_log(uniform(params, positions_BT, purpose, words_V, dtype))
    return noise * (params.temperature_B > 0).to(dtype)[:, None, None]


@scripted
def _double_log(u: torch.Tensor) -> torch.Tensor:
    return u.neg_().log1p_().neg_().log_().neg_()


def bonus_noise(params: Params, positions_BT, rejected_BT, words_V, dtype) -> torch.Tensor:
    """The noise (B, T, V) that draws the bonus token: RESIDUAL noise after a rejection, TOKEN noise
    if all was accepted.
    """
    token, residual = (
        gumbel(params, positions_BT, use, words_V, dtype) for use in (TOKEN, RESIDUAL)
    )
    return torch.where(rejected_BT[..., None], residual, token)


# ---- distributions


def warp(logits_BTV: torch.Tensor, params: Params, penalty: float = float("-inf")) -> torch.Tensor:
    """Unnormalised log probabilities after temperature, then top-k, then top-p; -inf where a token
    is out. float32 or wider.

    Rows of temperature 0 keep their logits: they take the argmax, which no filter changes. Tokens
    that tie with the last one kept are kept too, so the result does not depend on the order in
    which a device sorts. A finite penalty lowers the tokens that are out by that much instead:
    the draft ranks them after those that are in.
    """
    x = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    if params.greedy:
        return x
    temperature_B11 = params.temperature_B.to(x.dtype)[:, None, None]
    x = x / torch.where(temperature_B11 > 0, temperature_B11, 1.0)
    if not params.filtered:
        return x
    sorted_BTV = x.sort(-1, descending=True).values
    kth_B11 = (params.top_k_B.clamp(max=x.shape[-1]) - 1)[:, None, None]
    bound = sorted_BTV.take_along_dim(kth_B11, -1)
    probs = sorted_BTV.masked_fill(sorted_BTV < bound, float("-inf")).softmax(-1)
    before = probs.cumsum(-1) - probs
    top_p = params.top_p_B.to(x.dtype)[:, None, None]
    kept = ((before < top_p) | (top_p >= 1)).sum(-1, keepdim=True).clamp(min=1)
    bound = torch.maximum(bound, sorted_BTV.gather(-1, kept - 1))
    return torch.where((x < bound) & (temperature_B11 > 0), x + penalty, x)


def log_probs(warped_BTV: torch.Tensor, params: Params) -> torch.Tensor:
    """Normalised log probabilities; a row of temperature 0 has all mass on its argmax."""
    x = warped_BTV.log_softmax(-1)
    token_V = torch.arange(x.shape[-1], device=x.device)
    is_best_BTV = token_V == highest(warped_BTV)[1][..., None]
    certain = torch.where(is_best_BTV, 0.0, float("-inf")).to(x.dtype)
    return torch.where((params.temperature_B > 0)[:, None, None], x, certain)


def noisy(warped_BTV, params: Params, positions_BT, words_V) -> torch.Tensor:
    """Warped logits plus TOKEN noise. Their argmax is the draw; a draft ranks draws by its own."""
    if params.greedy:
        return warped_BTV
    return warped_BTV + gumbel(params, positions_BT, TOKEN, words_V, warped_BTV.dtype)


def pick(x_BTV: torch.Tensor, which_BN: torch.Tensor) -> torch.Tensor:
    """Some entries of each row along T, (B, N, V): x[b, which[b, n]].

    take_along_dim would build and check an index for each of the V numbers.
    """
    return x_BTV[torch.arange(len(which_BN), device=which_BN.device)[:, None], which_BN]


def highest(scores_BTV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest score of each position and its first index, (B, T) each.

    When compiled for a GPU, a plain argmax would give all tokens of a position to one processor. So
    there it is the highest of each block first, and then the highest of those.
    """
    if not torch.compiler.is_compiling():
        return scores_BTV.amax(-1), scores_BTV.argmax(-1)
    padding = 0, -scores_BTV.shape[-1] % ARGMAX_BLOCK
    blocks = F.pad(scores_BTV, padding, value=float("-inf")).unflatten(-1, (-1, ARGMAX_BLOCK))
    best_BTN, at_BTN = blocks.max(-1)
    best_BT, block_BT = best_BTN.max(-1)
    return best_BT, block_BT * ARGMAX_BLOCK + at_BTN.gather(-1, block_BT[..., None])[..., 0]


def saguaro(logq_BTV: torch.Tensor, params: Params, top_BT: torch.Tensor, c: float) -> torch.Tensor:
    """log q' of Saguaro: the probability of the top_BT likeliest tokens of each position is
    multiplied by c, 0 < c <= 1, and all are renormalised. Rows of temperature 0 stay as they are.

    The target's residual then has its mass where the draft looks for it (Kumar, Dao, May 2026).
    """
    rank_BTV = logq_BTV.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    lowered = torch.where(
        rank_BTV < top_BT[..., None], logq_BTV + math.log(c), logq_BTV
    ).log_softmax(-1)
    return torch.where((params.temperature_B > 0)[:, None, None], lowered, logq_BTV)


# ---- outcomes: what a round may decide, as the draft foresees it


@dataclass
class Foresight:
    """Two numbers that a run learns about its draft, for `outcomes` and `share_out`.

    spread: how far the draft's scores are from the target's, as the scale of a Gumbel distribution.
    hold: the chance that a drafted token is accepted.
    """

    spread: float = 0.7  # where the pairs measured here settle: 0.6 at temperature 0, 0.8 at 1
    hold: float = 0.8

    def learn(self, chance: float, hits: bool, accepted: int, rejected: int) -> None:
        """Learn from one row's round. At the right spread, as many hits come as were expected.

        chance: of a hit, as the fork foresaw it; hits: whether it hit.
        """
        spread = self.spread * math.exp(SPREAD_STEP * (chance - hits))
        self.spread = min(max(spread, 0.02), WIDEST_SPREAD)
        self.hold += HOLD_STEP * (accepted - self.hold * (accepted + rejected))
        self.hold = min(max(self.hold, 0.02), 0.98)


@scripted
def outcomes(
    scores_BTV: torch.Tensor,
    drafted_BT: torch.Tensor,
    length_B: torch.Tensor,
    spread_B: torch.Tensor,
    hold_B: Optional[torch.Tensor],
) -> torch.Tensor:
    """The log probability of every outcome (j, t), -inf where it cannot be, (B, T, V).

    scores_BTV[:, j] are those of steps.score: log q_j, plus the noise that will draw t, if the
    draft looks at it. drafted_BT[:, j] is d_{j+1}, for j < length_B, or V for a token that the
    draft does not know. If log p - log q, token by token, is itself like Gumbel noise of the scale
    `spread`, the target draws t with the probability softmax(scores / spread) at t.

    hold_B is None under `shared`: there d_{j+1} holds if the target draws it, so the scores say how
    likely that is. They say nothing of a token outside the draft's vocabulary, which is taken to
    hold half of the time. Under the other couplings a token holds with the probability hold_B, and
    what is drawn after a rejection is another token.
    """
    index_T1 = torch.arange(scores_BTV.shape[1], device=length_B.device)[:, None]
    tried_BT1 = index_T1 < length_B[:, None, None]
    known_BT1 = (drafted_BT < scores_BTV.shape[2])[..., None]
    drafted_BT1 = drafted_BT[..., None].clamp(max=scores_BTV.shape[2] - 1)
    logp_BTV = (scores_BTV / spread_B[:, None, None]).log_softmax(-1)
    own_BT1 = logp_BTV.gather(-1, drafted_BT1)
    # Had d_{j+1} been right, the outcome would not be j.
    out_BT1 = own_BT1.masked_fill(tried_BT1 & known_BT1, float("-inf"))
    logp_BTV = logp_BTV.scatter(-1, drafted_BT1, out_BT1)
    if hold_B is None:
        held_BT1 = torch.where(known_BT1, own_BT1, math.log(0.5))
        unknown_BT1 = tried_BT1 & ~known_BT1
        logp_BTV = torch.where(unknown_BT1, logp_BTV + math.log(0.5), logp_BTV)
    else:
        held_BT1 = hold_B.log()[:, None, None].expand_as(own_BT1)
        failed_B11 = torch.log1p(-hold_B)[:, None, None]
        logp_BTV = logp_BTV.log_softmax(-1) + torch.where(tried_BT1, failed_B11, 0.0)
    before_BT1 = torch.cat((torch.zeros_like(held_BT1[:, :1]), held_BT1[:, :-1].cumsum(1)), 1)
    return torch.where(index_T1 <= length_B[:, None, None], logp_BTV + before_BT1, float("-inf"))


def share_out(hold: float, length: int, m: int) -> list[int]:
    """F_0..F_L, which sum to m: the share of the budget that "exactly j accepted" gets. The paper
    calls F_j the fan-out; here fan-out is the command-line flag, and means m.

    It is the paper's geometric series, optimal if F guesses miss with a probability in proportion
    to F^-MISS_POWER. The couplings other than `shared` need it. There, the scores of a later j
    depend on draft tokens that were drawn with the same noise as the chain after an earlier j. Were
    the outcomes of all j ranked together, a hit would say something about the tokens of its chain.
    """
    power = 1 / (1 + MISS_POWER)
    weights = [hold ** (j * power) for j in range(length + 1)]
    weights[-1] *= (1 - hold) ** -power
    shares = [m * weight / sum(weights) for weight in weights]
    out = [int(share) for share in shares]
    by_remainder = sorted(range(length + 1), key=lambda j: out[j] - shares[j])
    for j in by_remainder[: m - sum(out)]:
        out[j] += 1
    return out


def within(joint_BTV: torch.Tensor, share_BT: torch.Tensor, m: int) -> torch.Tensor:
    """The outcomes that are among the share_BT[:, j] likeliest of their j, the others at -inf."""
    best_BTM = joint_BTV.topk(m, -1)
    kept_BTM = torch.arange(m, device=joint_BTV.device) < share_BT[..., None]
    values_BTM = best_BTM.values.masked_fill(~kept_BTM, float("-inf"))
    return torch.full_like(joint_BTV, float("-inf")).scatter(-1, best_BTM.indices, values_BTM)


# ---- acceptance: what a round decides


@scripted
def accept_shared(draws_BT: torch.Tensor, tokens_BK: torch.Tensor, length_B: torch.Tensor):
    """The number of draft tokens accepted, and the bonus token, (B,) each, under `shared`.

    A draft token is accepted if it and all before it are the target's own draws. draws_BT are those
    draws, x_0 .. x_K, T = K + 1, and d_{i+1} is compared with x_i; tokens_BK is the proposal, valid
    up to length_B.
    """
    K = tokens_BK.shape[1]
    same_BK = (draws_BT[:, :K] == tokens_BK) & (
        torch.arange(K, device=length_B.device) < length_B[:, None]
    )
    accepted_B = same_BK.cumprod(1).sum(1)
    return accepted_B, draws_BT.gather(1, accepted_B[:, None])[:, 0]


def accept_exact(warped_BTV, logq_BKV, tokens_BK, length_B, kind_B, params: Params, first_B):
    """The number of draft tokens accepted, and the bonus token, (B,) each, under `maximal` and
    `independent`.

    The rule is the exact one for each kind of proposal: p / q for a CHAIN, p for a FIXED one.

    warped_BTV are the target's warped logits, T = K + 1, index i for position first_B + i; logq_BKV
    the normalised log distribution that each CHAIN token was really drawn from (ignored for FIXED).
    A token that is out of range, or whose q is not a distribution, ends the proposal before it, as
    if it had never been made.
    """
    K, V = tokens_BK.shape[1], warped_BTV.shape[-1]
    logp_BTV = log_probs(warped_BTV, params)
    index_K = torch.arange(K, device=length_B.device)
    is_chain_B1 = (kind_B == CHAIN)[:, None]
    safe_BK = tokens_BK.clamp(0, V - 1)
    logq_d = logq_BKV.gather(-1, safe_BK[..., None])[..., 0]
    sound_BK = (tokens_BK == safe_BK) & (
        ~is_chain_B1 | (logq_BKV.exp().sum(-1) - 1).abs().lt(1e-3) & logq_d.isfinite()
    )
    valid_BK = sound_BK.cumprod(1).bool() & (index_K < length_B[:, None])
    length_B = valid_BK.sum(1)

    # u < ratio strictly, so a token of probability 0 never passes.
    ratio_BK = (
        logp_BTV[:, :K].gather(-1, safe_BK[..., None])[..., 0]
        - torch.where(is_chain_B1, logq_d, 0.0)
    ).exp()
    u_BK = uniform(params, first_B[:, None] + index_K, ACCEPT, dtype=ratio_BK.dtype)
    accepted_B = ((u_BK < ratio_BK) & valid_BK).cumprod(1).sum(1)

    rejected_B1 = (accepted_B < length_B)[:, None]
    logp_BV = pick(logp_BTV, accepted_B[:, None])[:, 0]
    p_BV = logp_BV.exp()
    at_B1 = accepted_B.clamp(max=K - 1)[:, None]
    q_BV = pick(logq_BKV, at_B1)[:, 0].exp()
    without_BV = p_BV.scatter(1, safe_BK.gather(1, at_B1), 0.0)  # p without the rejected token
    left_BV = torch.where(is_chain_B1, (p_BV - q_BV).clamp_(min=0), without_BV)
    left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)
    scores_BV = torch.where(rejected_B1, left_BV.log(), logp_BV)
    if not params.greedy:
        position_B1 = (first_B + accepted_B)[:, None]
        noise_B1V = bonus_noise(params, position_B1, rejected_B1, V, p_BV.dtype)
        scores_BV = scores_BV + noise_B1V[:, 0]
    return accepted_B, highest(scores_BV)[1]
