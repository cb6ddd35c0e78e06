"""`factlens edit --dry-run`: where an edit would go, and what it would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from factlens.terminal import console, plain, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from factlens.corpora import Corpus
    from factlens.editors.questions import Question
    from factlens.editors.rome_config import ROMEConfig
    from factlens.facts import Rewrite
    from factlens.models import Model

SHOWN = 40
"""Rewrites of the table."""


def show_plan(
    model: Model, rewrites: Sequence[Rewrite], plan: ROMEConfig, corpus: Corpus | None
) -> None:
    """Print each prompt with its lookup token, the weight, and which statistics are there or what they cost."""
    from factlens import models
    from factlens.editors.contexts import contexts_for
    from factlens.editors.questions import say_traps

    for rewrite in rewrites:
        say_traps(rewrite)
    layer, contexts = int(str(plan.layer)), contexts_for(model, plan.contexts, plan.seed)
    asked = questions_of(model, rewrites, plan, contexts)
    columns = ("tokens, the lookup in [ ]", "target", "p(target)", "says now")
    print_table(columns, _planned(model, asked[:SHOWN]))
    if len(asked) > SHOWN:
        console().print(f"… and {len(asked) - SHOWN} more rewrites")
    console().print()
    sides = models.W_out(model, layer).shape
    kind = "sampled" if isinstance(plan.contexts, str) else "given"
    size = 4 * len(rewrites) * sum(sides) / 1e3
    rows = [
        ("weight", f"{models.W_out_name(layer)} ({sides[0]} neurons x {sides[1]})"),
        ("layer", f"{layer} of {models.n_layers(model)}, from 0"),
        ("contexts", f"{len(contexts)}, {kind}"),
        ("steps", f"at most {plan.steps}, to a shift of at most {plan.max_norm_ratio:g} |v0|"),
        ("statistics", _statistics(model, layer, plan, corpus)),
        ("file", f"{size:.0f} kB; a dry run writes nothing"),
    ]
    print_table(("what", "how"), rows)


def questions_of(
    model: Model, rewrites: Sequence[Rewrite], plan: ROMEConfig, contexts: Sequence[str] = ("{}",)
) -> list[Question]:
    """The rewrites tokenised behind each context; what cannot be edited is refused here, before the work."""
    from factlens.editors.questions import question

    places = {"fact_token": plan.fact_token, "kl_at": plan.kl_at}
    return [question(model, rewrite, contexts, **places) for rewrite in rewrites]


def _planned(model: Model, asked: Sequence[Question]) -> list[tuple[Any, ...]]:
    """The tokens of each prompt with the lookup marked, its target's with their spaces, and what the model says now."""
    from factlens import models
    from factlens.edit_pages import Asked, answers

    decode, rows = models.tokenizer(model).decode, []
    now = answers(model, [Asked("edited", q.rewrite.prompt, q.rewrite.target) for q in asked])
    for each, said in zip(asked, now.itertuples(index=False), strict=True):
        words = [decode([token]) for token in each.rows[0].tolist()[: each.starts[0] + 1]]
        words[each.lookups[0]] = f"[{words[each.lookups[0]]}]"
        target = " ".join(repr(decode([token])) for token in each.target.tolist())
        already = ": already the target" if said.says == each.rewrite.target else ""
        rows.append(
            (
                plain("|".join(words)),
                plain(target),
                float(said.p_target),
                plain(said.says) + already,
            )
        )
    return rows  # fmt: skip


def _statistics(model: Model, layer: int, plan: ROMEConfig, corpus: Corpus | None) -> str:
    """Which statistics are there, or what gathering them takes."""
    from factlens import key_statistics, models
    from factlens.errors import MomentError
    from factlens.statistics_costs import estimate

    if plan.moment == "identity":
        return "none: C is the identity"
    bundled, tokens = key_statistics.is_bundled(model), plan.moment_tokens
    stored = key_statistics.stored_moment(model, layer, tokens) if corpus is None else None
    if stored is not None:
        return f"stored: {stored.count} keys of {stored.about.get('corpus')}"
    try:
        corpus = corpus or key_statistics.default_corpus(model)
    except MomentError as error:
        return f"missing: {error}"
    amount = key_statistics.default_tokens(model, corpus) if tokens is None else tokens
    if key_statistics.file_of(model, layer, corpus, tokens=amount).exists():
        return f"stored: keys of {corpus.name}"
    with console(stderr=True).status("measuring"):
        layers = range(models.n_layers(model)) if bundled else [layer]
        cost = estimate(model, layers, corpus, tokens=amount)
    keys = f"{cost.tokens or 'all'} keys of {corpus.name}"
    rate = f"{cost.tokens_per_second:.0f} keys a second"
    time = rate if cost.seconds is None else f"about {cost.seconds:.0f} s"
    return (
        f"not there: the edit gathers {keys} first ({time}, {cost.memory / 1e9:.2f} GB of memory)"
    )
