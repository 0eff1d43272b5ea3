from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edge_llm.engine.text import TextStream

texts = st.text(alphabet="abAB <>|é東🙂\n", max_size=40)
stops = st.lists(st.text(alphabet="abAB <>|é", min_size=1, max_size=4), max_size=3).map(tuple)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(borders)]


def stream(parts: list[bytes], stop: tuple[str, ...]) -> tuple[str, bool]:
    out = TextStream(stop)
    text = ""
    for part in parts:
        more, is_stopped = out.push(part)
        text += more
        if is_stopped:
            return text, True
    return text + out.flush(), False


@given(texts, stops, st.lists(st.integers(0, 200), max_size=12))
def test_how_the_bytes_are_cut_does_not_show(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    data = text.encode()
    one_by_one = stream([bytes([byte]) for byte in data], stop)
    assert stream(pieces(data, cuts), ()) == (text, False)
    if one_by_one[1]:
        # a coarser cut may find another stop string first only if both are complete in the same piece
        assert stream(pieces(data, cuts), stop)[1]
    else:
        assert one_by_one == (text, False)
        assert stream(pieces(data, cuts), stop) == (text, False)


@given(texts, stops)
def test_no_part_of_a_stop_string_is_ever_shown(text: str, stop: tuple[str, ...]) -> None:
    shown, is_stopped = stream([char.encode() for char in text], stop)
    assert not any(word in shown for word in stop)
    assert text.startswith(shown)
    assert is_stopped == any(word in text for word in stop)


def test_a_character_is_shown_only_when_all_its_bytes_are_there() -> None:
    out = TextStream()
    assert [out.push(bytes([byte]))[0] for byte in "🙂".encode()] == ["", "", "", "🙂"]


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    out = TextStream()
    assert out.push(b"a\xff\xf0\x9f")[0] == "a�"
    assert out.flush() == ""


def test_an_answer_that_ends_within_a_character_ends_before_it() -> None:
    out = TextStream(("stop",))
    assert out.push("日本".encode() + "語".encode()[:2]) == ("日本", False)
    assert out.flush() == ""
    held = TextStream(("stop",))
    assert held.push(b"st" + "語".encode()[:1]) == ("", False)
    assert held.flush() == "st", "the beginning of a stop string was none"


def test_a_false_start_of_a_stop_string_is_shown_as_soon_as_it_is_one() -> None:
    out = TextStream(("<|end|>",))
    assert out.push(b"x<|e") == ("x", False)
    assert out.push(b"lse") == ("<|else", False)
    assert out.push(b"<|end|>tail") == ("", True)
    assert out.push(b"more") == ("", True)
    assert out.flush() == ""
