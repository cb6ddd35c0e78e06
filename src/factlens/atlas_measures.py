"""What a training of atlas is measured by: where its facts are found, and how well they can be changed there.

The same numbers for every training, each over facts that the model knows: `effects_by_layer` is Section 2 of the paper in a dictionary,
`edits_by_layer` Section 3 at every layer.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd

from factlens import claims, corpora, models
from factlens.atlas.books import table_of_subjects
from factlens.atlas.measuring import (
    HALF,
    SPLITS,
    Checkpoint,
    known,
    read_checkpoint,
    sharing_last_token,
    token_shares,
)
from factlens.atlas.recipes import Recipe
from factlens.atlas.tables import Statement, World, state, statements
from factlens.atlas_results import OPEN, SETTLED
from factlens.benchmarks.atlas_counterfact import counterfact, others_of
from factlens.corruption import noise_level
from factlens.editors.rome import rome
from factlens.effects import average_total_effects
from factlens.facts import Fact
from factlens.intervals import mean_interval
from factlens.key_passes import d_mlp
from factlens.key_statistics import BUNDLED_KEYS, gather
from factlens.knowledge import ask
from factlens.models import Model, load_model, n_layers
from factlens.patches import EMBEDDING
from factlens.plans import KINDS
from factlens.sweeps import sweep
from factlens.traces import Trace
from factlens.tracing import trace

WINDOW = 3
STATEMENTS = 2500
"""Statements of each split that are asked."""
COLUMNS = ("layer", "S", "ES", "PS", "NS", "retention", "n")
"""Kept of each layer's edits."""
ROLES = ("last subject", "last")
GroupsOf = Callable[[Fact], Sequence[str]]
FEWEST_FACTS = 20
"""Of a group, or it is left out."""
SUBJECTS = 240
"""Over whose embeddings the noise level is measured, whichever facts are traced."""
CLAMP = 3.0
KINDS_OF_TABLES = {
    table: kind
    for kind, tables in {
        "people": ("people", "athletes", "musicians"),
        "rulers": ("monarchs", "popes"),
        "places": ("countries", "rivers", "landmarks", "museums"),
        "events": (
            "events",
            "grand_slams",
            "formula_one",
            "european_finals",
            "elections",
            "battles",
        ),
        "works": ("books", "films", "paintings", "compositions"),
        "institutions": ("companies", "universities", "products"),
        "nature": ("animals", "elements", "languages"),
    }.items()
    for table in tables
}


def asked_facts(of: World, n: int) -> list[Fact]:
    """`n` facts, evenly over the tables, each in one held-out sentence of its relation; the sentences come in turn."""
    every = [(relation, *pair) for relation in of.relations for pair in relation.facts]
    count = min(n, len(every))
    chosen = [every[number * len(every) // count] for number in range(count)]
    asked = []
    for number, (relation, subject, object_) in enumerate(chosen):
        template = relation.held[number % len(relation.held)]
        stated = state(relation.name, template, subject, object_)
        identity = f"{relation.name}/{subject}"
        asked.append(Fact(stated.prompt, stated.subject, object_, relation.name, identity))
    return asked


def effects_by_layer(
    model: Model, recipe: Recipe, asked: Sequence[Fact], groups_of: GroupsOf
) -> dict[str, Any] | None:
    """Where the model's facts are found: effects of single states, MLP and attention windows by layer.

    None if it knows fewer than `FEWEST_FACTS` of those asked. Every number is a share of probability, over known facts, 3 sigma
    over the embeddings of `SUBJECTS` subjects, 10 samples. `beyond` is the effect of a block's state at the last subject token minus that of its embedding, paired within facts, with 95 % intervals.
    """
    facts = ask(model, asked).facts
    if len(facts) < FEWEST_FACTS:
        return None
    subjects = [fact.subject for fact in asked_facts(recipe.world, SUBJECTS)]
    level = noise_level(model, "facts", subjects).value
    options: dict[str, Any] = {"noise_level": level, "samples": 10}
    main = trace(model, facts, kinds=KINDS, window=WINDOW, roles=ROLES, **options)
    cut = trace(
        model, facts, kinds="state", severed=("mlp", "attn"), roles="last subject", **options
    )
    return {**described(main, cut, groups_of), "asked": len(asked)}


def groups(model: Model, recipe: Recipe) -> GroupsOf:
    """Which groups a fact is counted in: its subject's kind, and whether the subject's last token settles the object by itself.

    It does where all subjects of the relation that end in it have that object, and it does not where at most half of them have.
    """
    tables = table_of_subjects()
    kinds = {name.casefold(): KINDS_OF_TABLES.get(table, "other") for name, table in tables.items()}
    shares = sharing_last_token(models.tokenizer(model).encode, recipe.book)

    def groups_of(fact: Fact) -> list[str]:
        name = fact.subject.casefold()
        share = shares[str(fact.relation), name]
        settled = [SETTLED] if share == 1 else [OPEN] if share <= HALF else []
        return [kinds[name], *settled]

    return groups_of


def described(main: Trace, cut: Trace, groups_of: GroupsOf) -> dict[str, Any]:
    """The numbers of `effects_by_layer` from its two traces."""
    effects, severed = claims.grids(main), claims.grids(cut)
    own = effects.blocks("state", "last subject")
    embedding = effects.of("state", "last subject")[EMBEDDING]
    beyond = own.sub(embedding, axis=0)
    totals = average_total_effects(main, interval="bootstrap").iloc[0]
    return {
        "facts": int(totals["n_facts"]),
        "ate": _three(totals["ate"], totals["low"], totals["high"]),
        "embedding": _mean(embedding),
        "state": _by_layer(own),
        "beyond": _by_layer(beyond),
        "beyond_at_peak": _mean(claims.peak(beyond)),
        "mlp": _by_layer(effects.blocks("mlp", "last subject")),
        "attention": _by_layer(effects.blocks("attn", "last subject")),
        "mlps_severed": _by_layer(severed.blocks("state", "last subject", "mlp")),
        "attention_severed": _by_layer(severed.blocks("state", "last subject", "attn")),
        "late_state": _by_layer(effects.blocks("state", "last")),
        "late_mlp": _by_layer(effects.blocks("mlp", "last")),
        "late_attention": _by_layer(effects.blocks("attn", "last")),
        "groups": _by_group(main, own, beyond, groups_of),
    }


def _by_group(
    main: Trace, own: pd.DataFrame, beyond: pd.DataFrame, groups_of: GroupsOf
) -> dict[str, Any]:
    """The early site in each group of facts that is large enough to have one."""
    members: dict[str, list[str]] = {}
    for fact in main.facts:
        for name in groups_of(fact):
            members.setdefault(name, []).append(claims.fact_label(fact))
    return {
        name: _group(own.loc[labels], beyond.loc[labels])
        for name, labels in sorted(members.items())
        if len(labels) >= FEWEST_FACTS
    }


def _group(own: pd.DataFrame, beyond: pd.DataFrame) -> dict[str, Any]:
    return {
        "facts": len(own),
        "peak": _mean(claims.peak(own)),
        "beyond_at_peak": _mean(claims.peak(beyond)),
        "peak_layer": int(beyond.mean().idxmax()),
    }


def by_kind(main: Trace, groups_of: GroupsOf) -> pd.DataFrame:
    """The early site in each group of facts (`groups`), of `main`, which traced states: columns `group, facts, state, state_low,
    state_high, beyond, beyond_low, beyond_high, layer`.

    `state` is the largest effect of a single state at the last subject token, `beyond` what it has beyond its embedding's, each at
    a layer chosen on one half of the group's facts and measured on the other; `layer` is where the second is largest over all of them.
    """
    effects = claims.grids(main)
    own = effects.blocks("state", "last subject")
    beyond = own.sub(effects.of("state", "last subject")[EMBEDDING], axis=0)
    found = {"all": _group(own, beyond), **_by_group(main, own, beyond, groups_of)}
    columns = ("state", "state_low", "state_high", "beyond", "beyond_low", "beyond_high")
    return pd.DataFrame(
        [
            {
                "group": name,
                "facts": group["facts"],
                **dict(zip(columns, [*group["peak"], *group["beyond_at_peak"]], strict=True)),
                "layer": group["peak_layer"],
            }
            for name, group in found.items()
        ]
    )


def edits_by_layer(
    model: Model,
    recipe: Recipe,
    *,
    n: int = 24,
    layers: Sequence[int] | None = None,
) -> pd.DataFrame:
    """ROME on records that are for choosing, at every layer: the columns of `sweeps.sweep`."""
    chosen = list(layers if layers is not None else range(n_layers(model)))
    tokens = BUNDLED_KEYS * d_mlp(model, chosen[0])
    gather(model, chosen, corpora.of_recipe(recipe), tokens=tokens)
    records = list(counterfact(model, part="tune", first=n, of=recipe.world))
    return sweep(
        model,
        rome,
        records,
        {"layer": chosen},
        config={"value_key": "spellings", "max_norm_ratio": CLAMP},
        others=others_of(recipe.world),
    )


def _by_layer(table: pd.DataFrame) -> list[list[float]]:
    """For each layer its mean over facts, and the ends of the 95 % interval."""
    return [_mean(table[layer]) for layer in table.columns]


def _mean(values: pd.Series) -> list[float]:
    found = mean_interval(values.dropna(), interval="bootstrap")
    return _three(found.mean, found.low, found.high)


def _three(mean: float, low: float, high: float) -> list[float]:
    return [round(float(value), 5) for value in (mean, low, high)]


def measured(folder: Path, recipe: Recipe, *, n: int = 240, records: int = 24) -> dict[str, Any]:
    """Everything that is measured of the checkpoint in `folder`: what it knows, where, and how well it is edited.

    `open` is `site` over open facts alone, half as many; either is None where too few of them are known. `gains` are `gains`.
    """
    checkpoint = read_checkpoint(folder)
    model = load_model(folder)
    groups_of = groups(model, recipe)
    every = asked_facts(recipe.world, sum(len(each.facts) for each in recipe.world.relations))
    left_open = [fact for fact in every if OPEN in groups_of(fact)]
    left_open = left_open[:: max(1, 2 * len(left_open) // n)][: n // 2]
    edited = edits_by_layer(model, recipe, n=records)[[*COLUMNS]].sort_values("layer")
    return {
        "known": {name: _share_known(checkpoint, asked) for name, asked in _asked(recipe.world)},
        "gains": gains(checkpoint),
        "tokens_of_subjects": token_shares(checkpoint.tokenizer, recipe.book),
        "site": effects_by_layer(model, recipe, asked_facts(recipe.world, n), groups_of),
        "open": effects_by_layer(model, recipe, left_open, groups_of),
        "rome": json.loads(edited.round(2).to_json(orient="records")),
    }


def gains(checkpoint: Checkpoint) -> list[float]:
    """The mean absolute gain of the norm before each block's attention: near 0 the attention is switched off."""
    blocks = checkpoint.model.transformer.h
    return [round(float(block.ln_1.weight.detach().abs().mean()), 4) for block in blocks]


def _asked(of: World) -> Iterator[tuple[str, list[Statement]]]:
    """What is asked to see what is known: sentences of each split, questions of the text and others."""
    for split in SPLITS:
        yield split, list(statements(split, of))
    for name in ("questions", "held_questions"):
        yield (
            name,
            [
                Statement(
                    relation.name, question.replace("{s}", subject), subject, object_, question
                )
                for relation in of.relations
                for subject, object_ in relation.facts
                for question in getattr(relation, name)
            ],
        )


def _share_known(checkpoint: Checkpoint, asked: Sequence[Statement]) -> float | None:
    """The share that is known of a sample; None where nothing is asked."""
    some = Random(STATEMENTS).sample(asked, min(STATEMENTS, len(asked)))
    return round(sum(known(checkpoint, some)) / len(some), 4) if some else None
