"""From questions to sampled answers to train on."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config import SHORTEST_CUT, PMCConfig
from ..data import Encoder, is_text
from ..distributed import Ranks
from ..rollout import Rollouts, add_counters
from .reward import Reward, judged
from .selection import select

Pick = tuple[list[list[Any]], float]  # [[answer, weight], ...] and their score


class Sampler:
    """Samples answers to questions, scores them, and selects those to keep.

    Parameters
    ----------
    config : PMCConfig
    encoder : Encoder
    ranks : Ranks
        All of them call together, each with its own questions, or with none.
    questions : list
    prompts : list of int lists
    positions : list of int list or None
    keeps_text : bool
        Keep answers as text, but for those to texts to be continued: how these go on is trained as it was drawn, since only
        ids say whether it ended, and with which white space it began.
    """

    def __init__(
        self,
        config: PMCConfig,
        encoder: Encoder,
        ranks: Ranks,
        questions: Sequence[Any],
        prompts: Sequence[list[int]],
        positions: Sequence[list[int] | None],
        keeps_text: bool,
    ) -> None:
        self.config, self.encoder, self.ranks = config, encoder, ranks
        self.questions, self.prompts, self.positions, self.keeps_text = questions, prompts, positions, keeps_text

    def __call__(
        self,
        engine: Callable[..., Rollouts],
        asked: Sequence[int],
        visits: Sequence[int],
        initial: Sequence[tuple[str, list[int]]],
        reward: Reward,
    ) -> tuple[dict[int, Pick], dict[str, float]]:
        """Visit questions.

        Parameters
        ----------
        engine : RolloutEngine
        asked : sequence of int
            Numbers of questions.
        visits : sequence of int
            How often each was visited before.
        initial : sequence of (str, list of int)
            Their initial answers, as text and as it was generated.
        reward : callable
            As of `PMC`.

        Returns
        -------
        picks : dict
            Of each question.
        counters : dict
            The rollout's, and cut_samples: how many did not end before they were cut, or before max_length.
        """
        c = self.config
        room = [c.max_length - len(self.prompts[i]) for i in asked]
        most = [self.most_new(i, ids, n) for i, (_, ids), n in zip(asked, initial, room, strict=True)]

        def rollout(rows: Sequence[int], longest: Sequence[int]) -> Rollouts:
            own, ids = [asked[row] for row in rows], [initial[row][1] for row in rows]
            biased = c.answer_penalty > 0
            return engine(
                [self.prompts[i] for i in own], num_samples=c.num_samples, temperature=c.temperature, top_k=c.top_k,
                top_p=c.top_p, max_new_tokens=[longest[row] for row in rows], seed=c.seed, stop_ids=self.encoder.stops,
                stream_ids=[(visits[row] << 32) + asked[row] for row in rows],
                drafts=None if biased else [[answer] for answer in ids], positions=[self.positions[i] for i in own],
                logit_bias=[self.penalty(answer) for answer in ids] if biased else None, as_generate=True,
                rollout_dtype=c.rollout_dtype,
            )  # fmt: skip

        made = rollout(range(len(asked)), most)
        counters: dict[str, float] = {"cut_samples": sum(reasons.count("length") for reasons in made.finish_reason)}
        add_counters(counters, made.counters)
        if c.max_length_ratio:
            lost = [row for row in range(len(asked)) if not _whole(made.tokens[row], most[row], room[row])]
            if any(self.ranks.gather(bool(lost))):  # of a sharded model all processes sample together
                longer = rollout(lost, room)
                add_counters(counters, longer.counters)
                for name in ("tokens", "logps", "finish_reason"):
                    for row, of in zip(lost, getattr(longer, name), strict=True):
                        getattr(made, name)[row] = of
                most = [room[row] if row in lost else most[row] for row in range(len(asked))]
        picks: dict[int, Pick] = {}
        if asked:
            texts = [self.encoder.samples(s, self.questions[i]) for i, s in zip(asked, made.tokens, strict=True)]
            scores = judged(reward, [said for said, _ in initial], texts, c.min_len)
            for row, i in enumerate(asked):
                candidates: list[Any] = texts[row] if self.as_text(i) else made.tokens[row]
                kept = _whole(made.tokens[row], most[row], room[row])
                nlls = self.nlls(i, made, row) if c.selection == "likeliest" else np.zeros(c.num_samples)
                key = c.seed, i, visits[row]
                picks[i] = select(c, [candidates[n] for n in kept], scores[row][kept], nlls[kept], key)
        return picks, {name: float(n) for name, n in counters.items()}

    def as_text(self, index: int) -> bool:
        """Return whether a question's answers are kept as text, not as token ids."""
        return self.keeps_text and not is_text(self.questions[index])

    def nlls(self, index: int, rollouts: Rollouts, row: int) -> np.ndarray:
        """Return each sample's nll a token behind the answer's tag; inf if it did not end, as one that repeats itself for ever."""
        sampled = zip(rollouts.tokens[row], rollouts.logps[row], rollouts.finish_reason[row], strict=True)
        if is_text(self.questions[index]):  # goes on as long as it likes, without a tag
            return np.array([-logps.mean() for _, logps, _ in sampled])
        ended = ((logps[self.encoder.tag_length(ids) :], reason == "stop") for ids, logps, reason in sampled)
        return np.array([-logps.mean() if ends else np.inf for logps, ends in ended])  # its end, at least

    def penalty(self, initial: Sequence[int]) -> dict[int, float]:
        """Return what is added to the logits of tokens where a question of this initial answer is sampled."""
        tag = self.encoder.tag_length(initial)  # no word of the answer: samples begin with it, too
        said = self.encoder.tokens_alike(initial[tag:]) - set(initial[:tag])
        return dict.fromkeys(said, -self.config.answer_penalty)

    def most_new(self, index: int, initial: Sequence[int], room: int) -> int:
        """Return the tokens at which a question's samples are cut, unless all of them take more: at most `room`."""
        if not self.config.max_length_ratio or is_text(self.questions[index]):  # a text goes on as long as it likes
            return room
        return min(room, max(SHORTEST_CUT, math.ceil(self.config.max_length_ratio * len(initial))))


def _whole(samples: Sequence[list[int]], most: int, room: int) -> list[int]:
    """Return which samples max_length_ratio did not cut: the others are half a sentence, whose end may be forced."""
    return [n for n, ids in enumerate(samples) if len(ids) < most or most == room]
