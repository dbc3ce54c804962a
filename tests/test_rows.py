"""A row's own text as a draft: the n-gram guess against a search through the whole text."""

import random

import pytest

from rows import LONGEST_NGRAM, Row, Settings


def row(ids):
    return Row(0, ids, 1000, 10_000, frozenset(), None, ())


def naive_guess(ids: list[int], k: int) -> list[int]:
    """What stood behind the last earlier occurrence of the longest suffix, repeating at the end of
    the text."""
    for n in range(min(LONGEST_NGRAM, len(ids)), 1, -1):
        places = [end for end in range(n, len(ids)) if ids[end - n : end] == ids[-n:]]
        if places:
            text = list(ids)
            for i in range(k):
                text.append(text[places[-1] + i])
            return text[len(ids) :]
    return []


@pytest.mark.parametrize("vocabulary", [2, 3, 8])
def test_a_guess_is_what_followed_the_longest_suffix(vocabulary):
    rng = random.Random(vocabulary)
    ids = [rng.randrange(vocabulary) for _ in range(3)]
    growing, guessed = row(ids), 0
    for step in range(300):
        if step % 3:  # the index catches up over several tokens, as after a round
            growing.ids.append(rng.randrange(vocabulary))
            continue
        k = 1 + step % 5
        guess = growing.guess(k)
        assert guess == naive_guess(growing.ids, k), growing.ids
        assert len(guess) in (0, k)
        guessed += bool(guess)
    assert guessed > 20


def test_nothing_to_guess_from():
    assert (
        row([1]).guess(4) == [] and row([1, 2]).guess(4) == [] and row([1, 2, 3, 4]).guess(4) == []
    )
    assert row([7, 7, 7]).guess(4) == [7] * 4


def test_a_guess_goes_on_from_what_was_drafted():
    assert row([1, 2, 3, 4, 9, 8]).guess(2, [2, 3]) == [4, 9]
    assert row([1, 2, 3, 9, 2, 3, 8, 7]).guess(3, [1, 2, 3]) == [9, 2, 3]  # the longest
    assert row([1, 2, 3]).guess(4, [4, 5]) == []
    assert row([1, 2, 9]).guess(4, [1, 2]) == [9, 1, 2, 9]


def test_room_leaves_the_last_place_to_the_target():
    assert [Row(0, [1, 2], m, 100, frozenset(), None, ()).room(4) for m in (1, 2, 3, 9)] == [
        0,
        1,
        2,
        4,
    ]
    assert Row(0, [1, 2], 9, 5, frozenset(), None, ()).room(4) == 2, "the context ends first"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ignore_eos": "false"}, "ignore_eos is 'false', wanted True or False"),
        ({"cut": 0}, "cut is 0, wanted True or False"),
        ({"stop": None}, "stop is None, wanted a text or a list of them"),
        ({"stop": 5}, "stop is 5, wanted a text or a list of them"),
    ],
)
def test_a_setting_of_another_type_is_one_sentence(given, said):
    with pytest.raises(ValueError, match=said):
        Settings(**given)
