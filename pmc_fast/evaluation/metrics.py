"""The paper's two numbers (arXiv 2507.04219, section 5), and what keeps them honest."""

from collections.abc import Sequence

from ..config import RewardName
from ..pmc.reward import Scorer, choose_scorer
from ..utils import words

SHORT_ANSWER = 3  # words; an answer of fewer says nothing
LONG_ANSWER, DISTINCT = 12, 0.25  # so does one of at least so many words of which so small a share is distinct


def unlearn_quality(*forget_recalls: float) -> float:
    """Return 0 to 100 from mean ROUGE-L recalls: 50 * (2 - R(forget) - R(paraphrased)).

    With one recall alone it is 100 * (1 - R(forget)).
    """
    return 100.0 * (1.0 - sum(forget_recalls) / len(forget_recalls))


def utility(*kept_recalls: float) -> float:
    """Return 0 to 100 from mean recalls: 100/3 * (R(retain) + R(world facts) + R(real authors)).

    With other sets than these three, the mean over what is given.
    """
    return 100.0 * sum(kept_recalls) / len(kept_recalls)


def mean_words(answers: Sequence[str], reward: RewardName = "auto") -> float:
    """Return the answers' mean number of words, as the reward counts them."""
    count = choose_scorer(reward, answers).count_words
    return sum(map(count, answers)) / len(answers)


def degenerate_share(answers: Sequence[str], reward: RewardName = "auto") -> float:
    """Return the share of answers of under 3 words: they have recall 0 and so feign forgetting."""
    count = choose_scorer(reward, answers).count_words
    return sum(count(a) < SHORT_ANSWER for a in answers) / len(answers)


def is_no_answer(answer: str, truth: str, scorer: Scorer) -> bool:
    """Return whether an answer is none: under 3 words where the truth has more, or a few words over and over."""
    if scorer.count_words(answer) < SHORT_ANSWER <= scorer.count_words(truth):
        return True
    said = words.unicode_units(answer, False)
    return len(said) >= LONG_ANSWER and len(set(said)) < DISTINCT * len(said)
