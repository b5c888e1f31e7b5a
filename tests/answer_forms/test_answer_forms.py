"""What every answer form must fulfil, and what each of them reads."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time

import pytest

from thrifty.core.resolve import all_names, method_class, resolve, summary

FORMS = all_names("answer")
OPTIONS = {"callable": {"function": "tests.answer_forms.test_answer_forms:last_word"}}
TEXTS = ["", " ", "42", "The answer is (B).", "#### 1,234", "Ünïcode ½", "-0.5", "so \\boxed{7}"]
ATTACKS = {
    "digits": "9" * 10**6,
    "words": "a " * 500_000,
    "braces": "{" * 20_000,
    "boxes": "\\boxed{" * 3_000,
    "brackets": "(A" * 100_000,
    "minuses": "-" * 300_000,
    "groups": "1,111" * 100_000 + "1",
    "marks": "a" + "\u0301\u0327" * 100_000,
    "announced": "the answer is " * 20_000,
    "spaces": "answer" + " " * 100_000,
    "zeros": "\0" * 1000,
    "half a pair": "\ud800 42",
}


def last_word(text: str, prompt: str) -> str | None:
    words = text.split()
    return words[-1] if words else None


def raising(text: str, prompt: str) -> str:
    raise RuntimeError("no")


def counting(text: str, prompt: str) -> int:
    return len(text)


def form_of(name: str):
    if name == "math":
        pytest.importorskip("math_verify")
    form = resolve("answer", {name: OPTIONS[name]} if name in OPTIONS else name)
    form.check()
    return form


@pytest.mark.parametrize("name", FORMS)
def test_options_have_defaults_and_it_is_described(name):
    cls = method_class("answer", name)
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))
    assert summary(cls).endswith(".")
    assert cls.source


@pytest.mark.parametrize("name", FORMS)
def test_pure_and_equal_to_itself(name):
    form = form_of(name)
    for text in TEXTS:
        answer = form.read(text, "how many?")
        assert answer is None or isinstance(answer, str)
        assert form.read(text, "how many?") == answer
        if answer is not None:
            assert form.same(answer, answer)
            assert form.read(answer, "how many?") in (answer, None)
    assert form.read("", "how many?") is None
    assert form.read(" \n", "how many?") is None


@pytest.mark.parametrize("name", [name for name in FORMS if name != "math"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_take_bounded_time(name, attack):
    form, text = form_of(name), ATTACKS[attack]
    start = time.process_time()
    answer = form.read(text, text)
    form.same(answer or "1", "2")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 + 7 = 12 apples", "12"),
        ("so $1,234.50.", "1234.5"),
        ("18.0", "18"),
        ("-0", "0"),
        ("#### none 5? #### 7", "7"),
        ("no digits", None),
        ("9" * 400, None),
        ("123456789012345678", "1.23456789012e+17"),
        ("1e5", "5"),
        ("0.30000000000000004", "0.3"),
    ],
)
def test_number(text, answer):
    assert resolve("answer", "number").read(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("18", "18", True),
        ("0.3333333333", "0.33333333333", True),
        ("18", "19", False),
        ("18", "eighteen", False),
        ("1.23456789012e+17", "123456789012345678", True),
    ],
)
def test_numbers_that_are_the_same(one, other, same):
    assert resolve("answer", "number").same(one, other) == same


def test_exact():
    form = resolve("answer", "exact")
    assert form.read(" Five  ﬁve.\n") == "five five."
    assert form.read("x" * 100_001) is None
    strict = resolve("answer", {"exact": {"ignore_case": False, "ignore_punctuation": True}})
    assert strict.read("Five, five!") == "Five five"


CITIES = "Where is the Louvre?\nA) London\nB) Paris\nC) New York\nD) York"
ESCAPED = "How far?\\nAnswer Choices:\\n(a) 5 km\\n(b) 6 km\\n(c) 7 km"
SHOTS = (
    "Q: x? Answer Choices: (A) one (B) two (C) three (D) four (E) five\nA: The answer is (E).\n\n"
    "Q: y? Answer Choices: (A) red (B) blue\nA:"
)


@pytest.mark.parametrize(
    ("text", "prompt", "letter"),
    [
        ("The answer is (B).", "", "B"),
        ("the answer is b", "", "B"),
        ("Answer: C", "", "C"),
        ("**Answer: D**", "", "D"),
        ("The correct answer is **E**", "", "E"),
        ("The correct option is B) Paris", "", "B"),
        ("The answer is option C", "", "C"),
        ("the answer is a car", "", None),
        ("The answer is A", "", "A"),
        ("the answer is A.", "", "A"),
        ("so \\boxed{C}", "", "C"),
        ("\\boxed{\\text{(D)}}", "", "D"),
        ("The final answer is $\\boxed{B}$", "", "B"),
        ("B", "", "B"),
        ("b.", "", "B"),
        ("a)", "", "A"),
        ("(B) Paris", "", "B"),
        ("B. Paris is it", "", "B"),
        ("I think so (C)", "", "C"),
        ("I would go with option D because", "", "D"),
        ("I choose B", "", "B"),
        ("Thus, A", "", "A"),
        ("I am a man", "", None),
        ("First the answer is A. Wait, no: the answer is C", "", "C"),
        ("A is wrong, since ...\nTherefore the answer is D.", "", "D"),
        ("The answer is F", "", None),
        ("The answer is Bob", "", None),
        ("The answer is D", SHOTS, None),
        ("The answer is B", SHOTS, "B"),
        ("The answer is Paris.", CITIES, "B"),
        ("The answer is New York", CITIES, "C"),
        ("It is in Paris.", CITIES, "B"),
        ("In York", CITIES, "D"),
        ("In London or Paris", CITIES, None),
        ("paris", CITIES, "B"),
        ("So it is 6 km", ESCAPED, "B"),
        ("The answer is (c)", ESCAPED, "C"),
    ],
)
def test_choice(text, prompt, letter):
    assert resolve("answer", "choice").read(text, prompt) == letter


def test_choice_of_more_letters():
    assert resolve("answer", {"choice": {"letters": "ABCDEFGHIJ"}}).read("Answer: J") == "J"
    with pytest.raises(ValueError, match="letters must be capital letters"):
        resolve("answer", {"choice": {"letters": "abc"}})


@pytest.fixture(scope="module")
def mathematics():
    return form_of("math")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}}", "1/2"),
        ("The answer is 0.5", "0.5"),
        ("it is 1,234", "1234"),
        ("thus $x^2+1$", "x^2+1"),
        ("no idea", None),
    ],
)
def test_math_reads(mathematics, text, answer):
    assert mathematics.read(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1/2", "0.5", True),
        ("\\frac{1}{2}", "1/2", True),
        ("x^2+1", "1+x^2", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("5", "x=5", True),
        ("1/2", "1/3", False),
        ("(1,2)", "(2,1)", False),
    ],
)
def test_math_compares(mathematics, one, other, same):
    assert mathematics.same(one, other) == same
    assert mathematics.same(other, one) == same


@pytest.mark.long
def test_math_is_bounded_off_the_main_thread_and_goes_on_afterwards():
    pytest.importorskip("math_verify")
    form = resolve("answer", {"math": {"seconds": 1.0}})
    found = []

    def work() -> None:
        found.append(form.read("{" * 20_000))
        found.append(form.same("10^{10^{10}}", "9^{9^{9^{9}}}"))
        found.append(form.read("\\boxed{7}"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert found == [None, False, "7"]


def test_math_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed\nhint: pip install 'thrifty\[math\]'"):
        resolve("answer", "math").check()


def test_a_function_of_the_users_own(monkeypatch, tmp_path):
    assert form_of("callable").read("it is 7") == "7"
    (tmp_path / "my_reader_of_answers.py").write_text(
        "def read(text, prompt):\n    return text[:1]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = resolve("answer", {"callable": {"function": "my_reader_of_answers:read"}})
    own.check()
    assert own.read("yes") == "y"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("", r"answer callable has no function to call: ''\nhint: "),
        ("no_such_module:f", r"cannot be imported: ModuleNotFoundError[^\n]*\nhint: "),
        ("tests.answer_forms.test_answer_forms:TEXTS", r"is no function, but \[[^\n]*\nhint: "),
    ],
)
def test_no_function(function, says):
    with pytest.raises(ValueError, match=says):
        resolve("answer", {"callable": {"function": function}}).check()


@pytest.mark.parametrize(
    ("name", "says"),
    [("raising", "raised RuntimeError: no\nhint: "), ("counting", "must return a text, or None")],
)
def test_a_function_that_does_not_keep_to_it(name, says):
    function = f"tests.answer_forms.test_answer_forms:{name}"
    with pytest.raises(ValueError, match=says):
        resolve("answer", {"callable": {"function": function}}).read("text")
