"""Words of any script: the units of recalls and lengths, and how much of a text ROUGE sees."""

import itertools
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import regex
from nltk.stem.porter import PorterStemmer

_stem = lru_cache(maxsize=1 << 17)(PorterStemmer().stem)

# --- words as in rouge_score 0.1.2 with its stemmer

_ROUGE_WORD = re.compile("[a-z0-9]+")
_RUN = re.compile(r"\S+")


@lru_cache(maxsize=1 << 12)
def rouge_units(text: str) -> tuple[str, ...]:
    """Return the words that rouge_score compares: runs of a to z and 0 to 9, stemmed if longer than 3 characters."""
    return _stemmed(_ROUGE_WORD.findall(text.lower()))


def _stemmed(words: list[str]) -> tuple[str, ...]:
    words = [_stem(w) if len(w) > 3 and w.isascii() else w for w in words]
    return tuple(w for w in words if w)


def count_runs(text: str) -> int:
    """Return the number of words between white space."""
    return len(text.split())


def end_of_runs(text: str, words: int) -> int:
    """Return where the first `words` words between white space end."""
    return _end((found.end() for found in _RUN.finditer(text)), words)


def hidden_from_rouge(text: str) -> tuple[int, int]:
    """Return how many of a text's letters and digits ROUGE does not see, and how many there are."""
    seen = sum(map(len, _ROUGE_WORD.findall(text.lower())))
    count = seen if text.isascii() else len(_LETTER.findall(unicodedata.normalize("NFC", text)))
    return max(0, count - seen), count


def says_nothing(text: str) -> bool:
    """Return whether a text has no letter, digit or symbol (such as an emoji)."""
    return not _SAID.search(text)


# --- words of any script

_SAID = regex.compile(r"[\p{L}\p{N}\p{S}]")
_LETTER = regex.compile(r"[\p{L}\p{N}]")
# written without spaces between words, or (Korean) with particles joined to them: a character is a word
_CHARACTERS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{Yi}ー"
# likewise without spaces, but with few letters, which mean little alone: a cluster that readers don't split is a word
_CLUSTERS = (
    r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
_BASE = rf"(?=\p{{L}})[{_CLUSTERS}]"
_STACKS = "[\u17d2\u1039\u1a60\ua9c0\u1b44]"  # the letter after these is written under the one before
_CLUSTER = (
    rf"\p{{Logical_Order_Exception}}*{_BASE}\p{{M}}*(?:(?<={_STACKS}){_BASE}\p{{M}}*)*"  # vowels before, stacks
    rf"[ะาๅະາ]*(?:{_BASE}(?=\u1037?\u103a)\p{{M}}*)*"  # vowels after, consonants that end a Burmese syllable
)
_CHARACTER = rf"(?=[\p{{L}}\p{{N}}])(?=[{_CHARACTERS}])\X"
_SPACED = rf"(?![{_CHARACTERS}{_CLUSTERS}])"
_UNIT = regex.compile(rf"{_CLUSTER}|{_CHARACTER}|(?:{_SPACED}[\p{{L}}\p{{N}}]\p{{M}}*)+")
_WORD = regex.compile(
    rf"{_CLUSTER}|{_CHARACTER}|(?:{_SPACED}[^\s\u200b\u0f0b\u1361])+"
)  # Tibetan's, Ethiopic's spaces

# beside these no space is written; Korean has spaces, and its particles are no words of their own
_UNSPACED = regex.compile(
    rf"[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}\p{{Bopomofo}}\p{{Yi}}\p{{Tibetan}}ー{_CLUSTERS}\u3001-\u303f\uff01-\uff65]"
)
_CLOSES = regex.compile(r"[\p{Pe}\p{Pf},.;:!?…%‰،؛؟۔।॥։]")

# Optional in spelling: Hebrew points, Arabic vowel signs and tatweel, stress marks in Cyrillic, characters that are
# not shown (joiners, soft hyphens); not the zero-width space, which separates words.
_OPTIONAL = regex.compile(
    r"[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u0652\u0670\u06d6-\u06dc\u06df-\u06e8"
    r"\u06ea-\u06ed]|(?<=\p{Cyrillic})[\u0300\u0301]|(?!\u200b)\p{Default_Ignorable_Code_Point}"
)
_SAME = str.maketrans({"ё": "е", "ı": "i"})  # Russian writes either; Turkish capitals fold to i
_DIGIT = regex.compile(r"(?![0-9])\p{Nd}")
_ENGLISH = {"the", "of", "and", "with", "from", "which", "that", "their", "his"}


@lru_cache(maxsize=1 << 12)
def unicode_units(text: str, stem: bool = False) -> tuple[str, ...]:
    """Return a text's words by Unicode's properties, folded so that spellings of the same word are equal.

    Parameters
    ----------
    text : str
    stem : bool
        Stem words of a to z and 0 to 9 as ROUGE does: a text in ASCII then has the same words as in ROUGE.

    Notes
    -----
    NFKC and case folding; marks belong to their letter; digits of any script become ASCII digits.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _OPTIONAL.sub("", text.replace("i\u0307", "i")).translate(_SAME)
    found = _UNIT.findall(_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text))
    return _stemmed(found) if stem else tuple(found)


def share_beyond_ascii(text: str) -> float:
    """Return the share of a text's words that are mostly outside ASCII; names with one accent are not."""
    if text.isascii():
        return 0.0
    units = unicode_units(text)
    return sum(2 * sum(not c.isascii() for c in unit) > len(unit) for unit in units) / max(1, len(units))


@lru_cache(maxsize=1 << 12)
def is_english(text: str) -> bool:
    """Return whether a text counts as English: all in ASCII, or with words that only English has."""
    return text.isascii() or not _ENGLISH.isdisjoint(unicode_units(text))


def parted(before: str, after: str) -> bool:
    """Return whether white space stands between two parts of a text that were cut apart between words.

    There is none next to scripts without spaces and their punctuation, nor before punctuation that closes.
    """
    return not (_UNSPACED.match(before[-1:]) or _UNSPACED.match(after[:1]) or _CLOSES.match(after))


def without_words(text: str, rate: float, generator: np.random.Generator) -> str:
    """Leave out each word of a text, as `count_words` counts them, with probability `rate`.

    What follows a word goes with it. A text of which nothing would be left stays as it is.
    """
    begins = [found.start() for found in _WORD.finditer(text) if _LETTER.search(found[0])]
    kept = generator.random(len(begins)) >= rate
    if not kept.any():
        return text
    pieces = [text[begin:end] for begin, end in itertools.pairwise([*begins, len(text)])]
    return (text[: begins[0]] + "".join(itertools.compress(pieces, kept))).rstrip()


def _word_ends(text: str) -> Iterable[int]:
    return (found.end() for found in _WORD.finditer(text) if _LETTER.search(found[0]))


def count_words(text: str) -> int:
    """Return the number of words of a text: runs between white space; in scripts without it, characters."""
    return sum(1 for _ in _word_ends(text))


def end_of_words(text: str, words: int) -> int:
    """Return where the first `words` words end, as `count_words` counts them."""
    return _end(_word_ends(text), words)


def _end(ends: Iterable[int], words: int) -> int:
    return max(itertools.islice(ends, words), default=0)
