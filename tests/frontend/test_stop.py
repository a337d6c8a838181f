"""Stop strings against a brute-force search of the whole text."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.stop import StopStrings


def brute_force(pieces, rest, stop, min_tokens):
    """(text, tokens, found): every occurrence of every stop string in the whole text; the rule picks one."""
    text = "".join(pieces) + rest
    matches = []
    for string in stop:
        for start in range(len(text) - len(string) + 1):
            if text.startswith(string, start):
                end, length, token = start + len(string), 0, 0
                while length < end and token < len(pieces):
                    length += len(pieces[token])
                    token += 1
                if token >= min_tokens:
                    matches.append((start, end, token))
    if not matches:
        return text, len(pieces), False
    start, _, token = min(matches)
    return text[:start], token, True


def stream(pieces, rest, stop, min_tokens):
    strings = StopStrings(stop, min_tokens)
    text = ""
    for piece in pieces:
        before = strings.num_tokens
        text += strings.add(piece)
        assert strings.num_tokens >= before  # what was said to belong to the output still does
        if strings.stopped:
            break
    else:
        text += strings.finish(rest)
    return text, strings.num_tokens, strings.stopped


TEXT = st.text("ab", max_size=4)


@given(
    pieces=st.lists(TEXT, max_size=12),
    rest=TEXT,
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    min_tokens=st.integers(0, 6),
)
def test_the_rule_holds_for_any_text_and_tokens(pieces, rest, stop, min_tokens):
    assert stream(pieces, rest, stop, min_tokens) == brute_force(pieces, rest, stop, min_tokens)


@given(pieces=st.lists(TEXT, max_size=12), stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces, stop):
    strings = StopStrings(stop)
    text = released = ""
    for piece in pieces:
        text += piece
        released += strings.add(piece)
        if strings.stopped:
            return
        held = text[len(released) :]
        if not any(string in text for string in stop):
            assert not held or any(string.startswith(held) for string in stop)


def test_a_stop_string_straddles_tokens():
    strings = StopStrings(["\n\n"])
    assert strings.add("one\n") == "one"
    assert strings.add("two\n") == "\ntwo"
    assert not strings.stopped
    assert strings.add("\nthree") == ""
    assert strings.stopped
    assert strings.num_tokens == 3


def test_a_longer_stop_string_that_starts_earlier_wins():
    strings = StopStrings(["X", "abXcd"])
    assert [strings.add(piece) for piece in ("ab", "X", "c")] == ["", "", ""]
    assert strings.num_tokens == 2  # tokens after the X are not known to belong to the output
    assert strings.add("d!") == ""
    assert strings.stopped
    assert strings.num_tokens == 4


def test_the_shorter_one_wins_when_the_longer_one_does_not_come():
    strings = StopStrings(["X", "abXcd"])
    assert [strings.add(piece) for piece in ("ab", "X", "c")] == ["", "", ""]
    assert strings.add("e") == "ab"
    assert (strings.stopped, strings.num_tokens) == (True, 2)


def test_the_shorter_one_wins_when_the_output_ends_first():
    strings = StopStrings(["X", "abXcd"])
    assert [strings.add(piece) for piece in ("ab", "X", "c")] == ["", "", ""]
    assert strings.finish() == "ab"
    assert (strings.stopped, strings.num_tokens) == (True, 2)


def test_of_two_that_start_together_the_one_complete_first_wins():
    strings = StopStrings(["aab", "aa"])
    assert strings.add("xaab") == "x"
    assert strings.stopped


def test_the_one_complete_first_also_wins_while_an_earlier_one_may_still_come():
    assert stream(["a", "b", "b", "b"], "", ["b", "bb", "abba"], 0) == ("a", 2, True)


@pytest.mark.parametrize(("min_tokens", "text", "tokens"), [(0, "", 1), (1, "", 1), (2, "ab", 2), (3, "abab", 3)])
def test_matches_complete_before_min_tokens_do_not_count(min_tokens, text, tokens):
    assert stream(["ab", "ab", "ab", "."], "", ["ab"], min_tokens) == (text, tokens, True)


def test_one_that_began_before_min_tokens_counts_when_it_is_complete_after():
    assert stream(["a", "b", "c"], "", ["ab", "abc"], 3) == ("", 3, True)


def test_without_stop_strings_everything_is_released_at_once():
    strings = StopStrings([])
    assert strings.add("abc") == "abc"
    assert strings.finish("�") == "�"
    assert (strings.stopped, strings.num_tokens) == (False, 1)


# ---- stop strings that are part of the text --------------------------------------------------------------------------


def plain_reference(text, stop):
    """The text up to the end of the stop string that starts first, and of those that start together ends first."""
    found = [(text.index(string), text.index(string) + len(string)) for string in stop if string in text]
    return text[: min(found)[1]] if found else text


@given(
    text=st.text("ab", max_size=16),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    data=st.data(),
)
def test_an_included_stop_string_ends_the_text_at_every_split(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    for divided in (pieces, list(text), [text]):
        strings, released = StopStrings(stop, include=True), ""
        for piece in divided:
            released += strings.add(piece)
            assert plain_reference(text, stop).startswith(released)
            if strings.stopped:
                break
        else:
            released += strings.finish()
        assert released == plain_reference(text, stop)
        assert strings.stopped == any(string in text for string in stop)
        # The same tokens belong to the output as where the stop string is left out.
        assert strings.num_tokens == stream(divided, "", stop, 0)[1]


def test_text_behind_an_included_stop_string_in_the_same_token_is_left_out():
    strings = StopStrings(["\n\n"], include=True)
    assert strings.add("one\n") == "one"
    assert strings.add("\ntwo") == "\n\n"
    assert (strings.stopped, strings.found) == (True, "\n\n")


def test_an_included_stop_string_counts_from_min_tokens_on():
    strings = StopStrings(["a"], min_tokens=3, include=True)
    assert [strings.add("ab"), strings.add("a"), strings.add("ba")] == ["ab", "a", "ba"]
    assert strings.stopped
