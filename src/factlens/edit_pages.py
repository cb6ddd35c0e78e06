"""What an edit did: the prompts that tell, what the model says at them before and after, and a page of it all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import exp
from typing import Any, get_args

import pandas as pd
import plotly.graph_objects as go

from factlens import edit_plots, metrics, models
from factlens.atlas import Relation, relations
from factlens.atlas.tables import Split, state
from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.counterfact import Record, Target
from factlens.editors.questions import ESSENCE
from factlens.edits import Edit
from factlens.facts import Rewrite
from factlens.generation import generate
from factlens.models import Model
from factlens.reports import SHOWN, Section, page
from factlens.tokens import answer_ids, token_ids
from factlens.traces import Trace

FOUND = 4
"""At most so many paraphrases and neighbours are taken from the bundled tables."""
WORD = 8
"""Tokens that are generated to read the next word or name from."""
CURVES = 5
"""Rewrites whose losses are drawn."""


@dataclass(frozen=True)
class Asked:
    """A prompt that shows what an edit did. `true` is its right object before the edit, where that is known."""

    kind: str
    """"edited", "paraphrase", "neighbour" (another subject), "other fact" (of the subject) or "essence" ("{subject} is a")."""
    prompt: str
    target: str
    """The edit's new object, wherever it is looked for."""
    true: str | None = None


# -- what is asked ---------------------------------------------------------------------------------


def asked_about(
    rewrite: Rewrite,
    *,
    record: Record | None = None,
    paraphrases: Sequence[str] = (),
    neighbours: Sequence[str] = (),
) -> list[Asked]:
    """The prompts that tell what an edit of `rewrite` did: itself, and those given or, where none are, those of `record`.

    In a paraphrase `{}` stands for the subject. Neighbours that are given have no `true`, since nothing says what it is.
    """
    new, true = rewrite.target, rewrite.true
    alike = [each.replace("{}", rewrite.subject) for each in paraphrases]
    near: list[tuple[str, str | None]] = [(each, None) for each in neighbours]
    if record is not None:
        true = record.target_true.text
        alike = alike or list(record.paraphrase_prompts[:FOUND])
        near = near or [(each, true) for each in record.neighborhood_prompts[:FOUND]]
    asked = [Asked("edited", rewrite.prompt, new, true)]
    asked += [Asked("paraphrase", each, new, true) for each in alike]
    asked += [Asked("neighbour", each, new, of) for each, of in near]
    facts = other_facts(record) if record is not None else []
    asked += [Asked("other fact", fact.prompt, new, fact.object) for fact in facts]
    return [*asked, Asked("essence", ESSENCE.replace("{}", rewrite.subject), new)]


def bundled_record(rewrite: Rewrite) -> Record | None:
    """The rewrite as a CounterFact record, if its prompt states a fact of the bundled tables: held-out paraphrases, and neighbours
    that have the same true object and not the new one."""
    found = _fact_stated(rewrite)
    if found is None or rewrite.subject not in rewrite.prompt:
        return None
    relation, spelled, object_ = found
    held = [state(relation.name, template, spelled, "").prompt for template in relation.held]
    alike = [s for s, o in relation.facts if o == object_ and s != spelled]
    apart = {s for s, o in relation.facts if o == rewrite.target}
    near = [
        state(relation.name, relation.train[at % len(relation.train)], name, "").prompt
        for at, name in enumerate(name for name in alike if name not in apart)
    ]
    return Record(
        case_id=0,
        pararel_idx=0,
        prompt=rewrite.prompt.replace(rewrite.subject, "{}", 1),
        relation_id=relation.name,
        target_new=Target(rewrite.target, ""),
        target_true=Target(object_, ""),
        subject=rewrite.subject,
        paraphrase_prompts=tuple([each for each in held if each != rewrite.prompt][:FOUND]),
        neighborhood_prompts=tuple(near[:FOUND]),
        attribute_prompts=(),
        generation_prompts=(),
    )


def _fact_stated(rewrite: Rewrite) -> tuple[Relation, str, str] | None:
    """The bundled fact that the rewrite's prompt states, with its subject as the tables spell it."""
    for relation in relations():
        for subject, object_ in relation.facts:
            if subject.casefold() == rewrite.subject.casefold() and any(
                state(relation.name, template, subject, object_).prompt == rewrite.prompt
                for split in get_args(Split)
                for template in relation.templates(split)
            ):
                return relation, subject, object_
    return None


# -- what the model says ---------------------------------------------------------------------------


def answers(model: Model, asked: Sequence[Asked]) -> pd.DataFrame:
    """What the model, as it is now, says: `kind, prompt, target, true, p_target, p_true, says`.

    Probabilities are of all tokens of an object. Where the true one is not known it is "", and its probability NaN; `says` is the first word or name of the greedy
    continuation.

    Raises:
        PromptTooLong: a prompt that leaves no room for its object.
    """
    pairs = [(each.prompt, each.target) for each in asked]
    pairs += [(each.prompt, each.true) for each in asked if each.true is not None]
    tokenizer = models.tokenizer(model)
    lengths = [len(answer_ids(tokenizer, *pair)) for pair in pairs]
    nll = metrics.score(model, pairs).nll.tolist()
    # The scores are means over tokens.
    prob = {pair: exp(-each * n) for pair, each, n in zip(pairs, nll, lengths, strict=True)}
    rows = [{**asdict(each), "true": each.true or ""} for each in asked]
    for row, each, said in zip(rows, asked, _said(model, asked), strict=True):
        row["p_target"] = prob[each.prompt, each.target]
        row["p_true"] = float("nan") if each.true is None else prob[each.prompt, each.true]
        row["says"] = said
    return pd.DataFrame(rows)


def _said(model: Model, asked: Sequence[Asked]) -> list[str]:
    prompts = [each.prompt for each in asked]
    tokenizer, context = models.tokenizer(model), int(models.cfg(model).n_ctx)
    room = context - max(len(token_ids(tokenizer, prompt)) for prompt in prompts)
    texts = generate(model, prompts, max_new_tokens=max(1, min(WORD, room)))
    return [
        _first_name(text[len(each.prompt) :].strip(), (each.target, each.true))
        for text, each in zip(texts, asked, strict=True)
    ]


def _first_name(text: str, names: Sequence[str | None]) -> str:
    """The one of `names` that the text begins with, or its first word."""
    for name in names:
        if name and text.startswith(name) and not text[len(name) : len(name) + 1].isalnum():
            return name
    word = next(iter(text.split()), "")
    return word.rstrip(".,;:!?") or word or "␣"


def before_and_after(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Two frames of `answers` side by side: `kind, prompt, target, true`, then each of the others with `_before` and `_after`."""
    named = before[["kind", "prompt", "target", "true"]]
    pairs = {
        f"{column}_{when}": frame[column]
        for column in ("p_target", "p_true", "says")
        for when, frame in (("before", before), ("after", after))
    }
    return named.assign(**pairs)


def texts_before_and_after(
    prompts: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> pd.DataFrame:
    """What `generate` added to each prompt: `prompt, before, after`."""
    rows = [
        (prompt, old[len(prompt) :].strip(), new[len(prompt) :].strip())
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    return pd.DataFrame(rows, columns=["prompt", "before", "after"])


# -- the page --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """An edit, and everything that was measured of it."""

    edit: Edit
    table: pd.DataFrame
    """From `before_and_after`."""
    texts: pd.DataFrame
    """`prompt, before, after`: what the model writes."""
    health: pd.DataFrame
    """From `alarms.edit_health`."""
    alarms: tuple[str, ...] = ()
    traces: tuple[Trace, Trace] | None = None
    """Of the first rewrite's prompt, before and after."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def results(self) -> list[dict[str, Any]]:
        """How each rewrite went, as the editor says."""
        return list(self.edit.info.get("results", []))  # type: ignore[call-overload]


def took(result: Mapping[str, Any]) -> str:
    """One rewrite's outcome as a sentence's end: whether the new object comes first now, and its probabilities."""
    change = f"p {result['prob_before']:.4f} → {result['prob_after']:.4f}"
    if not result["first_after"]:
        return f"the edit did not take: {change}, and it is not first"
    if result["first_before"]:
        return f"the model said so before: {change}"
    return f"the edit took: {change}, and it is first now"


def edit_page(outcome: Outcome) -> str:
    """The page of an edit: what it changed of what the model says, how it was found, where it acts, where it is from."""
    rewrites = outcome.edit.rewrites
    first = rewrites[0]
    title = f"Edit: {first.prompt} → {first.target}"
    if len(rewrites) > 1:
        title += f", and {len(rewrites) - 1} more"
    weight, _, rank, norm = outcome.edit.describe().iloc[0]
    name = outcome.edit.info.get("model")
    lead = f"{name}: {_taken(outcome)}. A change of rank {rank} and norm {norm:.2f} of {weight}."
    names = {"target": "new", "p_target_before": "p(new) before", "p_target_after": "p(new) after"}
    names |= {"p_true_before": "p(true) before", "p_true_after": "p(true) after"}
    names |= {"says_before": "says before", "says_after": "says after"}
    shown = outcome.table.rename(columns=names)
    sections = [
        Section("What the model says", _SAYS, table=shown),
        Section("What it writes", "Greedy continuations.", table=outcome.texts),
        *_curves(outcome),
    ]
    if outcome.traces is not None:
        figure = edit_plots.compared(*outcome.traces)
        sections.append(Section("Where the answer is decided", _WHERE, figure=figure))
    alarms = " ".join(f"Alarm: {each}." for each in outcome.alarms) or "No alarm."
    health = outcome.health.assign(alarm=outcome.health["alarm"].map({True: "yes", False: "no"}))
    sections.append(Section("Whether it broke the model", f"{alarms} {_HEALTH}", table=health))
    return page(title, lead, [*sections, Section("How it was made", table=_settings(outcome))])


_SAYS = (
    "Probabilities are of all tokens of an object. After an edit that holds, p(new) is high at the edited prompt and its paraphrases, and "
    "neighbours and the subject's other facts keep their true objects. The essence prompt is the one at which the edit was asked to change nothing."
)
_WHERE = (
    "Causal traces of the edited prompt before the edit and under it: how much each restored state brings back of the answer that the model then "
    "gives."
)

_HEALTH = (
    "Over the tokens of ordinary prompts, output is the root mean square of what the weight gives and of what its change adds, value their "
    "ratio; entropy (nats) is of the next token, repetition the share of trigrams said before. The norm alone says little: C spends it on keys "
    "that the model does not use."
)


def _taken(outcome: Outcome) -> str:
    if len(outcome.results) == 1:
        return took(outcome.results[0])
    count = sum(bool(result["first_after"]) for result in outcome.results)
    return f"{count} of {len(outcome.results)} edits took"


def _curves(outcome: Outcome) -> list[Section]:
    figures: list[tuple[Rewrite, go.Figure]] = [
        (rewrite, edit_plots.losses(pd.DataFrame(result["losses"]), title=""))
        for rewrite, result in zip(outcome.edit.rewrites, outcome.results, strict=False)
        if "losses" in result
    ]
    return [
        Section(
            "" if n else "How the value was found", f"{rewrite.prompt} → {rewrite.target}", figure
        )
        for n, (rewrite, figure) in enumerate(figures[:CURVES])
    ]


def _settings(outcome: Outcome) -> pd.DataFrame:
    info = {k: v for k, v in outcome.edit.info.items() if k not in ("rewrites", "results")}
    rows = list(_flat(info))
    for number, result in enumerate(outcome.results[:SHOWN]):
        kept = {k: v for k, v in result.items() if k != "losses"}
        rows += _flat(kept, f"rewrite {number}" if len(outcome.results) > 1 else "result")
    rows += [(f"seconds of {name}", f"{value:.2f}") for name, value in outcome.seconds.items()]
    return pd.DataFrame(rows, columns=["setting", "value"])


def _flat(values: object, name: str = "") -> list[tuple[str, str]]:
    if isinstance(values, Mapping):
        return [row for k, v in values.items() for row in _flat(v, f"{name}.{k}".lstrip("."))]
    return [] if values is None else [(name, str(values))]
