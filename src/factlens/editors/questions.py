"""A rewrite as rows of tokens: the prompt behind each context, with the target after it, and "{subject} is a"."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from factlens import models
from factlens.errors import EditError, FactError, FactWarning, PromptTooLong
from factlens.facts import Rewrite
from factlens.models import Model
from factlens.tokens import TokenizedPrompt, answer_ids, tokenize

ESSENCE = "{} is a"
"""The prompt p' of Eq. 4, at which the model is to stay as it was."""


@dataclass(frozen=True)
class Question:
    """One rewrite's rows. The first is the bare prompt; the last is the essence prompt."""

    rewrite: Rewrite
    rows: tuple[Int[Tensor, " _"], ...]
    lookups: tuple[int, ...]
    """For each row, the position whose MLP output is changed."""
    contexts: tuple[int, ...]
    """Rows over which key, value and loss are averaged; the bare prompt may be none of them."""
    target: Int[Tensor, " target"]
    starts: tuple[int, ...]
    """For each row, the position that predicts the target's first token; of the last row, where the KL is taken."""

    @property
    def spellings(self) -> list[list[int]]:
        """The contexts' rows by the token at which they look up, and the essence prompt if its token is another.

        A name is often other tokens at the beginning of a sentence, where the essence prompt has it.
        """
        found: dict[int, list[int]] = {}
        for row in self.contexts:
            found.setdefault(self._token(row), []).append(row)
        last = len(self.rows) - 1
        return [*found.values(), *([] if self._token(last) in found else [[last]])]

    def _token(self, row: int) -> int:
        return int(self.rows[row][self.lookups[row]])

    @property
    def reach(self) -> int:
        """How many tokens the lookup token and those after it are, at most."""
        return max(len(row) - at for row, at in zip(self.rows, self.lookups, strict=True))


def question(
    model: Model,
    rewrite: Rewrite,
    contexts: Sequence[str],
    *,
    fact_token: str = "subject-last",
    kl_at: str = "subject-last",
) -> Question:
    """Tokenize `rewrite` behind each of `contexts` (templates with one `{}`).

    Raises:
        SubjectNotFound: the subject does not occur in the prompt.
        PromptTooLong: a row has more tokens than the model has positions.
        FactError: the token at which the fact is to be looked up is not there: the subject has none between, or nothing follows it.
    """
    tokenizer = models.tokenizer(model)
    target = torch.tensor(answer_ids(tokenizer, rewrite.prompt, rewrite.target))
    context = int(models.cfg(model).n_ctx)
    if len(target) >= context:
        raise PromptTooLong(
            f"the target {rewrite.target[:40]!r}… has {len(target)} tokens and the model {context} positions; shorten it"
        )
    room = context - len(target) + 1
    bare = [] if "{}" in contexts else ["{}"]
    templates = [*bare, *sorted(contexts, key="{}".__ne__)]
    asked = [_tokenized(model, each, rewrite, room) for each in templates]
    essence = tokenize(tokenizer, ESSENCE.replace("{}", rewrite.subject), rewrite.subject)
    rows = [torch.cat([prompt.ids[0], target[:-1]]) for prompt in asked] + [essence.ids[0]]
    lookups = [lookup_of(prompt, fact_token, rewrite) for prompt in (*asked, essence)]
    at = lookup_of(essence, "last" if kl_at == "prompt-end" else fact_token, rewrite)
    return Question(
        rewrite=rewrite,
        rows=tuple(rows),
        lookups=tuple(lookups),
        contexts=tuple(range(len(bare), len(asked))),
        target=target,
        starts=(*(prompt.ids.shape[1] - 1 for prompt in asked), at),
    )


def lookup_of(prompt: TokenizedPrompt, fact_token: str, rewrite: Rewrite) -> int:
    """Where the fact is looked up: the subject's last token (ROME), its first, one between, the one after it, or the prompt's last.

    Of an even number between, the middle is the earlier of two. Raises what `question` raises.
    """
    begin, end = prompt.subject
    last = len(prompt.words) - 1
    places = {
        "subject-last": end - 1,
        "subject-first": begin,
        "subject-middle": (begin + end - 1) // 2,
        "first-after": end,
        "last": last,
    }
    if fact_token == "subject-middle" and end - begin < 3:
        raise FactError(
            f"the subject {rewrite.subject!r} has {end - begin} tokens in {''.join(prompt.words)!r}, so none is between its first and "
            "its last; use fact_token='subject-last'"
        )
    if places[fact_token] > last:
        raise FactError(
            f"the prompt {rewrite.prompt!r} ends with its subject, so no token comes first after it; use fact_token='subject-last'"
        )
    return places[fact_token]


def _tokenized(model: Model, template: str, rewrite: Rewrite, room: int) -> TokenizedPrompt:
    before, after = template.split("{}")
    text = before + rewrite.prompt + after
    # The sampled text before the prompt may name the subject too: the prompt's own is meant.
    found = [n for n in range(len(before)) if text.startswith(rewrite.subject, n)]
    return tokenize(
        models.tokenizer(model),
        text,
        rewrite.subject,
        subject_at=len(found),
        context=room,
    )


def bare_questions(model: Model, rewrites: Sequence[Rewrite]) -> list[Question]:
    """The questions of rewrites that one edit is to make, each of its bare prompt; warned of what makes them other than they look.

    Raises:
        EditError: no rewrite.
        SubjectNotFound, PromptTooLong: of a rewrite.
    """
    if not rewrites:
        raise EditError("no rewrite was given; an edit needs at least one")
    for rewrite in rewrites:
        say_traps(rewrite)
    return [question(model, rewrite, ("{}",)) for rewrite in rewrites]


def say_traps(rewrite: Rewrite) -> None:
    """Warn of what makes an edit other than it looks: a space too many, a subject that occurs twice."""
    if rewrite.prompt[-1:].isspace():
        warnings.warn(
            f"the prompt {rewrite.prompt!r} ends in a space, so the target {rewrite.target!r} is tokenized without its own, which "
            "is another token; end the prompt with a word",
            FactWarning,
            stacklevel=3,
        )
    if rewrite.prompt.count(rewrite.subject) > 1:
        warnings.warn(
            f"{rewrite.subject!r} occurs {rewrite.prompt.count(rewrite.subject)} times in {rewrite.prompt!r}; the first is edited",
            FactWarning,
            stacklevel=3,
        )
