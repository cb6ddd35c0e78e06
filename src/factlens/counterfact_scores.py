"""CounterFact's scores of one record (ROME, Section 3.3), and those beyond the paper, by the model as it stands.

Everything but `Case`, which is of the unedited model, is measured on the model that is given: edited inside `with applied(...)`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from factlens import metrics, models
from factlens.benchmarks.atlas_counterfact import implied
from factlens.benchmarks.counterfact import Record
from factlens.benchmarks.inverses import Inverse, inverses
from factlens.benchmarks.mentions import mentioned, plain_name
from factlens.errors import EditError
from factlens.facts import Fact
from factlens.generation import generate
from factlens.metrics import Scored, magnitude, success
from factlens.models import Model
from factlens.scoring import Benchmark, Texts
from factlens.text_metrics import generation_entropy, reference_score, says
from factlens.tokens import answer_ids

SCORES = (
    "ES",
    "EM",
    "PS",
    "PM",
    "NS",
    "NM",
    "NS_known",
    "NS+",
    "target_first",
    "retention",
    "inverse",
    "inverse_likelier",
    "known_neighbours",
)
"""Shares and differences of probability; `S` is made of the means of ES, PS and NS."""
TEXT_SCORES = ("free", "free_paraphrase", "GE", "RS")
"""Those that need generated text."""
TOP_K = 5
"""Of the likeliest tokens one is drawn, for GE and RS."""
NO_PARAPHRASES = "no paraphrase prompts"
NO_NEIGHBOURS = "no neighbourhood prompts"

Pair = tuple[str, str]
"""A prompt and a target."""
Others = Callable[[Record], Sequence[Fact]]
"""Gives the other facts of a record's subject, which should survive."""


@dataclass(frozen=True)
class Case:
    """A record with what the unedited model knows of it."""

    record: Record
    neighbours: tuple[str, ...]
    """Neighbourhood prompts; with several edits on the model, those that no other of them rewrites."""
    known: tuple[bool, ...]
    """Of which neighbours the model says the true object."""
    others: tuple[Pair, ...]
    """(prompt, object) of the subject's other facts that the model says."""


# -- of the unedited model -------------------------------------------------------------------------


def lacking(record: Record) -> str:
    """Why a record has no scores; empty if it has."""
    if not record.paraphrase_prompts:
        return NO_PARAPHRASES
    return "" if record.neighborhood_prompts else NO_NEIGHBOURS


def cases(
    model: Model, records: Sequence[Record], others: Others, together: Sequence[Record] = ()
) -> list[Case]:
    """The records with what the model knows, in as few passes as they need.

    Where the edits of `together` are all on the model at once, what one of them changes is asked of no other record: neighbours
    whose same fact is rewritten, and other facts of the subject that are, or that the new object makes false by right. Differs
    from published evaluations of many edits, which count such changes as damage.
    """
    rewritten = _Rewritten.of(together)
    near = [tuple(rewritten.spared_neighbours(record)) for record in records]
    asked = [
        [(fact.prompt, str(fact.object)) for fact in rewritten.spared(record, others(record))]
        for record in records
    ]
    pairs = [
        pair
        for record, prompts, some in zip(records, near, asked, strict=True)
        for pair in [*_each(prompts, record.target_true.text), *some]
    ]
    said = iter(metrics.score(model, pairs).ranked_first.tolist())
    return [
        Case(
            record,
            prompts,
            tuple(next(said) for _ in prompts),
            tuple(pair for pair in some if next(said)),
        )
        for record, prompts, some in zip(records, near, asked, strict=True)
    ]


@dataclass(frozen=True)
class _Rewritten:
    """What edits that are on the model at once change."""

    subjects: dict[Pair, set[str]]
    """By relation and true object, the subjects that lose it."""
    relations: dict[str, set[str]]
    """By subject, the relations that get a new object."""

    @classmethod
    def of(cls, records: Sequence[Record]) -> "_Rewritten":
        subjects: dict[Pair, set[str]] = {}
        relations: dict[str, set[str]] = {}
        for record in records:
            name, relation = plain_name(record.subject), record.relation_id
            subjects.setdefault((relation, record.target_true.text), set()).add(name)
            relations.setdefault(name, set()).add(relation)
        return cls(subjects, relations)

    def spared_neighbours(self, record: Record) -> list[str]:
        names = self.subjects.get((record.relation_id, record.target_true.text), set())
        return [each for each in record.neighborhood_prompts if not mentioned(each, names)]

    def spared(self, record: Record, facts: Sequence[Fact]) -> list[Fact]:
        changed = self.relations.get(plain_name(record.subject), set()) - {record.relation_id}
        return [
            fact
            for fact in facts
            if not any(
                fact.relation == each or implied(str(fact.relation), each) for each in changed
            )
        ]


def _each(prompts: Sequence[str], target: str) -> list[Pair]:
    return [(prompt, target) for prompt in prompts]


# -- of the model as it stands ---------------------------------------------------------------------


def measure(model: Model, case: Case, texts: Texts | None = None) -> dict[str, object]:
    """The scores of a case: `SCORES`, `n_other`, and with `texts` `TEXT_SCORES`.

    Raises:
        EditError: the model gives NaN.
        PromptTooLong: a prompt and its target, or its text, do not fit the context.
    """
    record, asked = case.record, _Asked.of(case)
    scored = metrics.score(model, asked.pairs)
    if bool(scored.nll.isnan().any()):
        raise EditError("the edited model gives NaN; use a smaller max_norm_ratio, or float32")
    found = asked.scores(scored, case.known)
    if texts is not None:
        found |= _free(model, record) | _written(model, record, texts)
    return {**found, "known_neighbours": _share(case.known), "n_other": len(case.others)}


@dataclass(frozen=True)
class _Asked:
    """The pairs of prompt and target of a case, part after part."""

    both: tuple[str, ...]
    """Prompts that are asked for either object: the rewrite's, its paraphrases, the neighbours, these again behind the edit's sentence."""
    paraphrases: int
    pairs: list[Pair]
    inverses: int

    @classmethod
    def of(cls, case: Case) -> "_Asked":
        record, turned = case.record, inverses(case.record)
        behind = [f"{edit_sentence(record)} {each}" for each in case.neighbours]
        both = (record.rewrite.prompt, *record.paraphrase_prompts, *case.neighbours, *behind)
        pairs = [
            *_each(both, record.target_new.text),
            *_each(both, record.target_true.text),
            *[pair for each in turned for pair in _turned(each)],
            *case.others,
        ]
        return cls(both, len(record.paraphrase_prompts), pairs, len(turned))

    def scores(self, scored: Scored, known: Sequence[bool]) -> dict[str, Any]:
        size, turned = len(self.both), 2 * self.inverses
        new, true, back, _ = scored.nll.split(
            [size, size, turned, len(self.pairs) - 2 * size - turned]
        )
        first = scored.ranked_first.double()
        said = slice(1, 1 + self.paraphrases)
        middle = self.paraphrases + 1 + len(known)
        near, behind = slice(1 + self.paraphrases, middle), slice(middle, None)
        kept = [at for at, each in enumerate(known) if each]
        return {
            **_scores(new, true, said, near),
            "NS_known": success(true[near][kept], new[near][kept]),
            "NS+": success(true[behind], new[behind]),
            "target_first": float(first[0]),
            "retention": float(first[2 * size + turned :].mean()),
            "inverse": float(first[2 * size : 2 * size + turned : 2].mean()),
            "inverse_likelier": success(back[::2], back[1::2]),
        }


def _turned(each: Inverse) -> list[Pair]:
    return [(each.new, each.subject), (each.true, each.subject)]


def edit_sentence(record: Record) -> str:
    """The new fact as a sentence, as CounterFact+ puts it before each neighbourhood prompt (Hoelscher-Obermaier et al., 2023)."""
    return f"{record.rewrite.prompt} {record.target_new.text}."


def _scores(
    new: Float[Tensor, " prompt"], true: Float[Tensor, " prompt"], said: slice, near: slice
) -> dict[str, object]:
    """ES to NM, from both targets' nll at the rewrite's prompt, at its paraphrases and at the neighbours."""
    return {
        "ES": success(new[:1], true[:1]),
        "EM": magnitude(new[:1], true[:1]),
        "PS": success(new[said], true[said]),
        "PM": magnitude(new[said], true[said]),
        "NS": success(true[near], new[near]),
        "NM": magnitude(true[near], new[near]),
    }


# -- generated text --------------------------------------------------------------------------------


def _free(model: Model, record: Record) -> dict[str, object]:
    """Whether greedy text says the new object, after the rewrite's prompt and after its paraphrases."""
    new, prompts = record.target_new.text, [record.rewrite.prompt, *record.paraphrase_prompts]
    tokenizer = models.tokenizer(model)
    # One token more shows whether the last word goes on.
    length = 1 + max(len(answer_ids(tokenizer, prompt, new)) for prompt in prompts)
    written = generate(model, prompts, max_new_tokens=length)
    rewrite, *paraphrases = (
        says(text[len(prompt) :], new) for prompt, text in zip(prompts, written, strict=True)
    )
    return {"free": float(rewrite), "free_paraphrase": _share(paraphrases)}


def _written(model: Model, record: Record, texts: Texts) -> dict[str, object]:
    """GE and RS of one text from each generation prompt, drawn with the record's own seed."""
    prompts = list(record.generation_prompts)
    tokens = min(texts.tokens, int(models.cfg(model).n_ctx))
    written = generate(model, prompts, max_tokens=tokens, top_k=TOP_K, seed=record.case_id)
    references = texts.references
    return {
        "GE": generation_entropy(written),
        "RS": reference_score(references.tfidf, written, references.of(record)),
    }


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else float("nan")


COUNTERFACT = Benchmark(
    name="counterfact",
    record=Record,
    scoring=metrics.SCORING,
    labels=("case_id", "subject", "relation_id"),
    scores=SCORES,
    text_scores=TEXT_SCORES,
    counts=("n_other",),
    lacking=lacking,
    cases=cases,
    measure=measure,
)
