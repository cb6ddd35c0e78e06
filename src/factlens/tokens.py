"""From a prompt to what the engine needs: token ids, the subject's span, each position's role.

Ids are what the model's own tokenizer gives for the text, with the BOS it adds and no other (GPT-2 has none, Llama
has one): TransformerLens's string path prepends one by default, which the paper's numbers do not have.
"""

from dataclasses import dataclass
from typing import Any

import torch

from factlens.errors import FactError, ModelUnsupported, PromptTooLong, SubjectNotFound
from factlens.types import Tokens

ROLES = (
    "before subject",
    "first subject",
    "middle subject",
    "last subject",
    "first after",
    "further",
    "last",
)
"""In the order of the paper's Figure 2, which leaves the first one out: its effect is zero."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as a model sees it; `subject` is half-open."""

    ids: Tokens
    words: tuple[str, ...]
    """Each token as text, for people."""
    subject: tuple[int, int]
    occurrences: int
    """How often the subject occurs in the prompt."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each position (`role_of`)."""
        return tuple(role_of(p, self.subject, len(self.words)) for p in range(len(self.words)))


def role_of(position: int, subject: tuple[int, int], length: int) -> str:
    """The role of a position: where it stands relative to the subject's half-open span and to the end.

    A position with two roles shows the later: the only subject token is its last, and the token after the subject that
    ends the prompt is the last. A prompt that ends with its subject has a last subject token and no last token.
    """
    begin, end = subject
    if position < begin:
        return "before subject"
    if position == end - 1:
        return "last subject"
    if position < end:
        return "first subject" if position == begin else "middle subject"
    if position == length - 1:
        return "last"
    return "first after" if position == end else "further"


def token_ids(tokenizer: Any, text: str, prepend_bos: bool | None = None) -> list[int]:
    """The tokenizer's own ids; `prepend_bos` forces the start token in, or takes it out."""
    ids = list(tokenizer(text)["input_ids"])
    bos = tokenizer.bos_token_id
    if prepend_bos is None or bos is None:
        return ids
    bare = ids[1:] if ids[:1] == [bos] else ids
    return [bos, *bare] if prepend_bos else bare


def tokenize(
    tokenizer: Any,
    prompt: str,
    subject: str,
    *,
    subject_at: int = 0,
    prepend_bos: bool | None = None,
    context: int | None = None,
) -> TokenizedPrompt:
    """Tokenize `prompt` and find the tokens of `subject` by their character offsets.

    Offsets, not decoding token by token, because a character may be spread over several byte-level tokens. A token
    that holds any character of the subject belongs to it, as in the paper's code. `subject_at` counts occurrences.

    Raises:
        FactError: an empty prompt or subject.
        SubjectNotFound: the subject does not occur, or not often enough for `subject_at`.
        PromptTooLong: more than `context` tokens.
    """
    if not prompt.strip():
        raise FactError(
            f"the prompt {prompt!r} is empty; give a sentence that ends before the object"
        )
    if not subject.strip():
        raise FactError(f"the subject {subject!r} of {prompt!r} is empty; name what it is about")
    subject = subject.strip()  # A space at its end would take in the next token.
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise FactError(f"the prompt {prompt!r} is not valid text; give it as UTF-8") from None
    begin, occurrences = _find(prompt, subject, subject_at)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelUnsupported(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets; load the fast one"
        )
    ids = token_ids(tokenizer, prompt, prepend_bos)
    if context is not None and len(ids) > context:
        raise PromptTooLong(
            f"the prompt has {len(ids)} tokens and the model {context} positions; shorten it "
            f"(it begins {prompt[:40]!r})"
        )
    offsets = _offsets(tokenizer, prompt, len(ids))
    inside = [
        position
        for position, (start, stop) in enumerate(offsets)
        if start < begin + len(subject) and stop > begin
    ]
    if not inside:
        raise FactError(
            f"the tokenizer drops the subject {subject!r} from {prompt!r}; name another"
        )
    words = tuple(tokenizer.decode([each]) for each in ids)
    span = (inside[0], inside[-1] + 1)
    return TokenizedPrompt(torch.tensor([ids]), words, span, occurrences)


def _find(prompt: str, subject: str, subject_at: int) -> tuple[int, int]:
    """Where the chosen occurrence starts, and how many there are."""
    starts, at = [], prompt.find(subject)
    while at >= 0:
        starts.append(at)
        at = prompt.find(subject, at + 1)
    if not starts:
        raise SubjectNotFound(
            f"subject {subject!r} does not occur in {prompt!r}; spans are matched verbatim, "
            "check case and spaces"
        )
    if not 0 <= subject_at < len(starts):
        raise SubjectNotFound(
            f"subject {subject!r} occurs {len(starts)} times in {prompt!r}, so subject_at={subject_at} "
            f"does not exist; it counts from 0"
        )
    return starts[subject_at], len(starts)


def _offsets(tokenizer: Any, prompt: str, length: int) -> list[tuple[int, int]]:
    """Character offsets of `length` tokens; special ones in front have the empty span (0, 0)."""
    found = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    offsets = [(int(start), int(stop)) for start, stop in found]
    while len(offsets) > length:
        offsets.pop(0)
    return [(0, 0)] * (length - len(offsets)) + offsets


_OPENING = ("“", "‘", "«", "(", "[", "-", "—", "/")


def answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """The ids of `answer` as it continues `prompt`, with the space that separates words.

    A leading space is added unless the answer brings one, the prompt ends in one or in an opening quote or bracket, or
    the answer is Chinese or Japanese, which have none. The ids are those of the answer
    alone, so a byte-level tokenizer and one with word-start marks (Llama) both give what the model would say next.

    Raises:
        FactError: an answer without tokens.
    """
    joined = answer[:1].isspace() or prompt[-1:].isspace() or prompt.endswith(_OPENING)
    text = answer if joined or "\u2e80" <= answer[:1] <= "\u9fff" else f" {answer}"
    whole, start = token_ids(tokenizer, prompt + text), token_ids(tokenizer, prompt)
    ids = whole[len(start) :] if whole[: len(start)] == start else []
    ids = ids or list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise FactError(f"the answer {answer!r} has no tokens; give a word")
    return ids
