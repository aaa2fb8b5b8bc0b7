"""From captions to candidates: what is done with answers, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence

from milan_ray.labelers.dnd.summaries import FrequentPhrases, Prompted, phrases, tidy, variants


def test_answers_become_labels():
    for answer, label in {
        'Label: "Dog Faces."': "dog faces",
        "Sure! Here it is:\nStriped shirts\n": "striped shirts",
        "the concept is: wheels": "wheels",
        "Wheels:": "wheels",
        "  \n": "",
        "*green grass*": "green grass",
        "- dogs\n- two-tailed cats": "two-tailed cats",
        "-": "",
    }.items():
        assert tidy(answer) == label


def test_designs_and_graphics_are_also_tried_as_backgrounds_and_doubles_count_once():
    found = variants(["dogs", "floral design", "dogs", "", "Graphic tees"])
    assert found == ["dogs", "floral design", "floral design background", "Graphic tees"]


class Scripted:
    """Answers by rules that can be read off the question, as a very small model might."""

    name = "scripted"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def identity(self) -> dict[str, object]:
        return {"scripted": 1}

    def to(self, device: object) -> Scripted:
        return self

    def answers(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        return [self._answer(list(conversation)) for conversation in conversations]

    def _answer(self, conversation: list[dict[str, str]]) -> str:
        assert conversation[0]["role"] == "system" and conversation[-1]["role"] == "user"
        question = conversation[-1]["content"]
        self.asked.append(question)
        if question.startswith("Caption:"):
            return question.split()[-1].title() + "."
        if question.startswith("- "):
            first = question.splitlines()[0][2:]
            return f"Label: {first}, and more" if first == "cat" else first
        return "pets"


def test_a_language_model_simplifies_then_summarises_and_narrows_lists_down():
    chat = Scripted()
    captions = ["a photo of a dog", "the cat", "a big dog", "sofa and cat"]
    found = Prompted(chat, rounds=8).candidates(captions)
    assert set(found) == {"dog", "pets"} and len(found) == 2
    assert len(chat.asked) > 4 + 8  # and the lists once more
    summaries = [asked for asked in chat.asked if asked.startswith("- ")]
    assert len(set(summaries)) > 1 and all(sorted(one.split()) == sorted(summaries[0].split()) for one in summaries)
    again = Prompted(Scripted(), rounds=8)
    assert again.candidates(captions) == found
    assert again.identity() != Prompted(Scripted(), rounds=3).identity()


def test_a_model_that_says_nothing_leaves_the_commonest_phrase():
    class Silent(Scripted):
        def _answer(self, conversation: list[dict[str, str]]) -> str:
            return "..."

    assert Prompted(Silent()).candidates(["two dogs", "a dog on grass"]) == ["dog"]


def test_phrases_neither_begin_nor_end_with_small_words_and_know_one_number():
    assert phrases("The roofs of red houses, grass") == {
        ("roof",): "roofs",
        ("roof", "of", "red"): "roofs of red",
        ("red",): "red",
        ("red", "house"): "red houses",
        ("house",): "houses",
        ("grass",): "grass",
    }
    assert set(phrases("buses, boxes, ladies, a lens")) == {("buse",), ("box",), ("lady",), ("len",)}


def test_the_commonest_phrases_are_proposed_and_longer_ones_win_ties():
    captions = ["a red house", "red houses, sky", "the red house and a tree", "a tree", "sky"]
    found = FrequentPhrases().candidates(captions)
    assert found[0] == "red house"  # in three captions, and says more than either word
    assert set(found) == {"red house", "sky", "tree"}
    assert FrequentPhrases().candidates(list(reversed(captions))) == found
    assert FrequentPhrases(1).candidates(captions) == found[:1]
    assert FrequentPhrases().candidates(["of the", ""]) == ["something"]
