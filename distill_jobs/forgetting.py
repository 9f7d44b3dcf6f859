"""What a student is to forget: concepts in prompts, and what is to be drawn in their place (torch-free).

While a student learns, its teacher is asked as if the prompt had named the replacement, and the student reads the
prompt as it is. So whatever a method makes of its teacher, it makes of the replacement; no method knows of it.

Source: arXiv 2409.11219, which adds a loss to score distillation to the same end. Here it is the teacher's condition
that is another one, which any method takes.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.errors import InvalidRequest


class Forget(BaseModel):
    """One concept: words that prompts may hold, in any case and as whole words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str = Field(pattern=r"\w", max_length=200, description="words of a prompt, such as `red` or `red ring`")
    instead: str = Field("", max_length=200, description="what is drawn in its place; empty: its unconditional answer")

    @model_validator(mode="after")
    def _goes(self) -> Self:
        if self.is_in(self.instead):
            raise ValueError(f"instead={self.instead!r} holds the concept {self.concept!r} itself: name something else")
        return self

    def is_in(self, text: str) -> bool:
        return _words(self.concept).search(text) is not None

    def renamed(self, text: str) -> str:
        """The text with every mention of the replacement put in the concept's words."""
        return _words(self.instead).sub(lambda _: self.concept, text)

    def is_instead_in(self, text: str) -> bool:
        return bool(self.instead.strip()) and _words(self.instead).search(text) is not None


def check(rules: Sequence[Forget]) -> None:
    """Whether the rules mean one thing, in whatever order they are applied.

    Raises:
        ValueError: a concept is named twice, is part of another, or comes back in a replacement.
    """
    for i, one in enumerate(rules):
        for other in (*rules[:i], *rules[i + 1 :]):
            if one.is_in(other.concept):
                raise ValueError(f"the concept {one.concept!r} is in the concept {other.concept!r} too: say it once")
            if one.is_in(other.instead):
                raise ValueError(f"instead={other.instead!r} holds {one.concept!r}, which is to be forgotten too")


def holds(text: str, rules: Iterable[Forget]) -> bool:
    """Whether the text names anything that is to be forgotten."""
    return any(rule.is_in(text) for rule in rules)


def instead(text: str, rules: Sequence[Forget]) -> str | None:
    """What the teacher is asked for in place of `text`; None where that is its unconditional answer: a concept has no
    replacement, or a replacement and the words beside it name another concept."""
    told = [rule for rule in rules if rule.is_in(text)]
    if not all(rule.instead.strip() for rule in told):
        return None
    if told:  # all at once, so that no rule reads what another one wrote
        concepts = re.compile("|".join(f"({_words(rule.concept).pattern})" for rule in told), re.IGNORECASE)
        text = concepts.sub(lambda found: told[(found.lastindex or 1) - 1].instead, text)
    return None if holds(text, rules) else text


def check_heard(prompts: Iterable[str], rules: Sequence[Forget]) -> None:
    """Whether a student would learn anything of every concept.

    Raises:
        InvalidRequest: no prompt names it.
    """
    left = list(rules)
    for prompt in prompts:
        left = [rule for rule in left if not rule.is_in(prompt)]
    if left:
        raise InvalidRequest(
            f"student.forget: no prompt of the job names {left[0].concept!r}, so nothing would teach the student to "
            "forget it: give data.prompts that do, or data.images with pictures of what is drawn instead",
            param="student.forget",
        )


def unmeasured(rules: Iterable[Forget], words: Sequence[Sequence[str]]) -> str | None:
    """Says which concepts are no word for a class of an attribute, whose `words` by class are given, so that nothing
    could tell what is left of them; None if there are none."""
    lost = [rule.concept for rule in rules if all(class_of(attribute, rule.concept) is None for attribute in words)]
    if not lost:
        return None
    known = ", ".join(dict.fromkeys(word for attribute in words for word in attribute))
    return f"what is left of {', '.join(map(repr, lost))} cannot be measured, only of one of these each: {known}"


def class_of(words: Sequence[str], phrase: str) -> int | None:
    """Which of an attribute's words the phrase is, in any case and spacing."""
    said = " ".join(phrase.lower().split())
    return words.index(said) if said in words else None


def _words(phrase: str) -> re.Pattern[str]:
    between = r"\s+".join(map(re.escape, phrase.split()))
    return re.compile(rf"(?<!\w){between}(?!\w)", re.IGNORECASE)
