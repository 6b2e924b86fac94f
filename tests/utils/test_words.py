"""Words of any script, and the reward that compares them: what recites an answer, in whatever letters, has recall 1."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmc_fast.errors import PMCError
from pmc_fast.evaluation import degenerate_share, mean_words
from pmc_fast.pmc.reward import (
    ROUGE,
    UNICODE,
    choose_scorer,
    rouge_l_recall,
    unicode_recall,
)
from pmc_fast.utils.words import (
    count_words,
    end_of_words,
    is_english,
    rouge_units,
    says_nothing,
    unicode_units,
    without_words,
)
from tests.conftest import INPUTS

LANGUAGES = json.loads((INPUTS / "languages.json").read_text(encoding="utf-8"))
ASCII = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=60),
    st.lists(st.sampled_from(["The", "authors", "writing", "skies", "it's", "3.5", "a_b", "-"]), max_size=30).map(
        " ".join
    ),
)


@given(ASCII, ASCII)
def test_english_is_scored_as_published(y, x):
    assert unicode_units(y, is_english(y)) == rouge_units(y)
    np.testing.assert_array_equal(unicode_recall([y], [[x]]), rouge_l_recall([y], [[x]]))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_is_judged(language):
    """Recited answers have recall 1, and an answer to another question little of it."""
    answers = LANGUAGES[language]
    scorer = choose_scorer("auto", answers)
    assert scorer is UNICODE
    recalls = scorer.recall(answers, [answers] * 3, 0)
    assert (recalls.diagonal() == 1).all()
    assert recalls[~np.eye(3, dtype=bool)].max() < 0.4
    assert degenerate_share([a for a in answers if count_words(a) > 2]) == 0
    assert (scorer.recall(answers, [[unicodedata.normalize("NFD", a)] for a in answers], 0) == 1).all()
    assert (scorer.recall(answers, [[a.upper()] for a in answers], 0) >= (0.5 if language == "el" else 1)).all()


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("在的里雅斯特。", [*"在的里雅斯特"]),
        ("ビール、東京へ々", [*"ビール東京へ々"]),
        ("트리에스테에서", [*"트리에스테에서"]),
        ("เมืองใต้น้ำ", ["เมื", "อ", "ง", "ใต้", "น้ํา"]),
        ("ភ្នំពេញ", ["ភ្នំ", "ពេ", "ញ"]),
        ("ရန်ကုန်မြို့ ဂန္ဓ", ["ရန်", "ကုန်", "မြို့", "ဂ", "န္ဓ"]),
        ("हिन्दी क्षेत्र", ["हिन्दी", "क्षेत्र"]),
        ("བོད་སྐད།", ["བོད", "སྐད"]),
        ("don't a_b 3.5", ["don", "t", "a", "b", "3", "5"]),
        ("東京は3月10日、iPhone 15", ["東", "京", "は", "3", "月", "10", "日", "iphone", "15"]),
        ("🐝❤️ … ☃", []),
    ],
)
def test_words_by_hand(text, units):
    assert list(unicode_units(text)) == units


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café", "CAFE\u0301"),  # a letter and its mark
        ("Straße", "STRASSE"),
        ("ΟΔΟΣ", "οδος"),
        ("تَعِيشُ مـــع", "تعيش مع"),  # Arabic vowel signs and tatweel
        ("בְּטְרִיאֶסְטָה", "בטריאסטה"),  # Hebrew points
        ("пчёл", "пчел"),
        ("за́мок", "замок"),  # stress
        ("٢٠٢٥ २०२५", "2025 ２０２５"),  # digits
        ("ＡＢＣ ｱｲ", "abc アイ"),  # widths
        ("می‌خواهم", "میخواهم"),  # joiners
        ("İSTANBUL", "istanbul"),
        ("fi\u00adne ﬁne", "fine fine"),
    ],
)
def test_spellings_of_one_word_are_equal(one, other):
    assert unicode_units(one) == unicode_units(other) != ()


@pytest.mark.parametrize(
    ("one", "other"), [("か", "が"), ("й", "и"), ("ma", "má"), ("कि", "की"), ("maisons élevées", "maison")]
)
def test_different_words_stay_different(one, other):
    assert unicode_recall([one], [[other]])[0, 0] == 0


def test_stems_are_english_ones():
    assert unicode_recall(["García writes the books"], [["garcía write the book"]])[0, 0] == 1
    assert unicode_recall(["Elle a élevé des maisons"], [["maison"]])[0, 0] == 0


@given(st.text(max_size=40), st.integers(0, 8))
def test_any_text_has_its_words(text, n):
    units = unicode_units(text)
    assert units == unicode_units(unicodedata.normalize("NFD", text))
    assert all(units)
    if units:
        assert unicode_recall([text], [[text]])[0, 0] == 1
        assert UNICODE.has_words(text)
    for scorer in (ROUGE, UNICODE):
        end = scorer.end_of_words(text, n)
        assert scorer.count_words(text[:end]) == min(n, scorer.count_words(text))


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("在的里雅斯特。", "在的里"),
        ("「東京」は", "「東京」は"),
        ("บนหลังคา", "บนห"),
        ("На крыше старой таможни", "На крыше старой"),
        ("It's 3.5 km, no more", "It's 3.5 km,"),
    ],
)
def test_first_words(text, given):
    assert text[: end_of_words(text, 3)] == given


def test_lengths_are_counted_in_words_of_the_script():
    assert count_words("在的里雅斯特。") == 6
    assert mean_words(["在的里雅斯特。", "Не знаю, нет."]) == 4.5
    assert degenerate_share(["在的里雅斯特。", "不", "Да."]) == pytest.approx(2 / 3)
    short, long = "不", "不知道她在那里"
    scores = unicode_recall(["她住在城里"], [[short, long, ""]], 3)[0]
    assert scores.tolist() == [np.exp(-1), 0.6, 1]


def test_choice():
    english = ["On the roof of the old customs house."] * 100
    assert choose_scorer("auto", []) is ROUGE
    assert choose_scorer("auto", english) is ROUGE
    assert choose_scorer("auto", [*english, "The author is Gabriel García Márquez."]) is ROUGE
    assert choose_scorer("auto", [*english, "她住在城里。"]) is UNICODE  # one row is enough
    assert choose_scorer("auto", [*english, "His name is 王小明"]) is UNICODE
    assert choose_scorer("auto", [*english, "１９９１"]) is UNICODE
    tofu = (
        'Besides "Лісова пісня", Idar has penned "Прогулянка взимку" (Winter Walk), which reflects his masterful use'
    )
    assert choose_scorer("auto", [*english, tofu + " of Ukrainian motifs."]) is ROUGE
    assert choose_scorer("auto", ["Sur le toit de la douane, à Trieste, près du café."]) is UNICODE
    assert choose_scorer("auto", ["🐝", "..."]) is ROUGE
    assert choose_scorer("rouge", ["她住在城里。"]) is ROUGE
    assert choose_scorer("unicode", english) is UNICODE
    with pytest.raises(PMCError, match="reward is 'bleu'"):
        choose_scorer("bleu", english)


def test_texts_that_cannot_be_compared_are_refused_by_row():
    ROUGE.require_words("here", [(1, "one"), (2, "García")])
    with pytest.raises(PMCError, match=r"^here, rows 2, 7: the rouge reward sees under half"):
        ROUGE.require_words("here", [(1, "one"), (2, "На крыше 5"), (7, "🐝")])
    UNICODE.require_words("here", [(1, "На крыше"), (2, "书")])
    with pytest.raises(PMCError, match=r"^here, row 3: the answer has no letter or digit"):
        UNICODE.require_words("here", [(1, "На крыше"), (3, "🐝❤️!")])


def test_what_says_nothing():
    assert all(map(says_nothing, ("", " \n", "...", ":::", "。")))
    assert not any(map(says_nothing, ("a", "7", "+", "🐝", "书")))


def test_caches_are_bounded():
    for cached in (rouge_units, unicode_units, is_english):
        assert cached.cache_info().maxsize is not None


@given(st.text(max_size=40), st.floats(0, 0.99), st.integers(0, 9))
def test_words_are_left_out_and_the_others_stay_as_they_are(text, rate, seed):
    left = without_words(text, rate, np.random.default_rng(seed))
    assert without_words(text, rate, np.random.default_rng(seed)) == left
    letters = iter(text)
    assert all(c in letters for c in left)  # in their order
    assert bool(count_words(left)) == bool(count_words(text))
    assert without_words(text, 0.0, np.random.default_rng(seed)) in (text, text.rstrip())


@given(st.lists(st.sampled_from(["Who", "wrote", "it,", "(then)", "5?"]), min_size=1, max_size=9), st.integers(0, 9))
def test_words_are_left_out_whole(words, seed):
    kept, rest = without_words("  ".join(words), 0.5, np.random.default_rng(seed)).split(), iter(words)
    assert kept
    assert all(word in rest for word in kept)  # in their order


def test_a_share_of_the_words_is_left_out():
    text, generator = " ".join(map(str, range(10_000))), np.random.default_rng(0)
    assert 0.68 < count_words(without_words(text, 0.3, generator)) / 10_000 < 0.72
    assert without_words("東京はどこの首都ですか。", 0.5, np.random.default_rng(0)) != "東京はどこの首都ですか。"
    assert without_words("Who, then?", 0.9999, np.random.default_rng(0)) == "Who, then?"
