"""The quizzes: one right choice, every choice explained, and choosing shows why."""

import pytest

from peftlab.course import quiz
from peftlab.course.quizzes import lessons, questions
from peftlab.course.quizzes._frame import Question, no, yes

ALL = [(lesson, number, one) for lesson in lessons() for number, one in enumerate(questions(lesson), start=1)]


def test_the_first_lessons_have_a_quiz():
    assert {"00_start_here", "01_why_peft", "02_lora"} <= set(lessons())
    for lesson in lessons():
        assert 4 <= len(questions(lesson)) <= 6


@pytest.mark.parametrize(("lesson", "number", "question"), ALL, ids=[f"{lesson}-{n}" for lesson, n, _ in ALL])
def test_choosing_shows_why(lesson, number, question):
    assert sum(choice.right for choice in question.choices) == 1
    assert len(question.choices) >= 3
    assert len({choice.why for choice in question.choices}) == len(question.choices)
    asked = quiz(lesson)
    radio, explanation = asked.radios[number - 1], asked.explanations[number - 1]
    assert radio.value is None and explanation.value == ""
    import html

    for choice in question.choices:
        assert len(choice.why) > 20
        radio.value = choice.text  # what a click or an arrow key does
        assert html.escape(choice.why) in explanation.value
        assert ("✔ Right" in explanation.value) == choice.right
        assert asked.right == choice.right
        assert asked.score.value == f"<b>{int(choice.right)} of {len(asked.questions)} right</b>"
    radio.value = None
    assert explanation.value == ""


def test_the_right_choice_is_not_always_in_the_same_place():
    for lesson in lessons():
        places = {next(i for i, choice in enumerate(one.choices) if choice.right) for one in questions(lesson)}
        assert len(places) >= 2


def test_answering_from_code():
    asked = quiz("02_lora")
    assert asked.choose(1, "b") == questions("02_lora")[0].choices[1].why
    assert asked.right == 1
    with pytest.raises(ValueError, match="no question 9; they are numbered from 1 to"):
        asked.choose(9, "a")
    with pytest.raises(ValueError, match="question 1 has no choice 'z'; it has a, b, c"):
        asked.choose(1, "z")


@pytest.mark.parametrize("lesson", lessons())
def test_the_stored_text_asks_everything_and_tells_nothing(lesson):
    asked = quiz(lesson)
    text = repr(asked)
    flat = " ".join(text.split())
    assert asked._repr_mimebundle_()["text/plain"] == text == repr(quiz(lesson))
    for one in asked.questions:
        assert one.text in flat
        for choice in one.choices:
            assert choice.text in flat and choice.why not in flat
    assert max(map(len, text.split("\n"))) <= 100
    asked.choose(1, "a")
    assert repr(asked) == text


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        ("02_lorra", "no quiz for lesson '02_lorra'; did you mean '02_lora'"),
        ("lora", "did you mean '02_lora'"),
        ("", "there are 00_start_here"),
        ("xyz", "there are 00_start_here"),
    ],
)
def test_unknown_lessons_are_refused_with_a_cure(lesson, message):
    with pytest.raises(ValueError, match=message):
        quiz(lesson)


def test_a_question_has_exactly_one_right_choice():
    with pytest.raises(ValueError, match="0 right choices"):
        Question("Q?", (no("a", "because"), no("b", "because")))
    with pytest.raises(ValueError, match="2 right choices"):
        Question("Q?", (yes("a", "because"), yes("b", "because")))
    with pytest.raises(ValueError, match="same choice twice"):
        Question("Q?", (yes("a", "because"), no("a", "because")))
