"""What a training of atlas is measured by: where its facts are found, and how well they can be changed there.

The same numbers for every training, each over facts that the model knows: `site` is Section 2 of the paper in a dictionary,
`edits_by_layer` Section 3 at every layer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from factlens import claims, corpora, models
from factlens.atlas.books import fact_book, table_of_subjects
from factlens.atlas.recipes import Recipe
from factlens.atlas.tables import World, statements, world
from factlens.benchmarks.atlas_counterfact import counterfact, others_of
from factlens.editors.rome import rome
from factlens.effects import average_total_effects
from factlens.facts import Fact
from factlens.intervals import mean_interval
from factlens.key_statistics import gather
from factlens.knowledge import known_facts
from factlens.models import Model, n_layers
from factlens.patches import EMBEDDING
from factlens.plans import KINDS
from factlens.sweeps import sweep
from factlens.traces import Trace
from factlens.tracing import trace

WINDOW = 3
ROLES = ("last subject", "last")
CLAMP = 3.0
GroupsOf = Callable[[Fact], Sequence[str]]
FEWEST_FACTS = 20
"""Of a group, or it is left out."""
SETTLED, OPEN = "settled by the last token", "open after the last token"
HALF = 0.5
KINDS_OF_TABLES = {
    table: kind
    for kind, tables in {
        "people": ("people", "athletes", "musicians", "monarchs", "gods"),
        "places": (
            "countries",
            "cities",
            "us_cities",
            "us_states",
            "rivers",
            "lakes",
            "mountains",
            "islands",
            "parks",
            "landmarks",
            "museums",
        ),
        "events": ("events", "grand_slams", "battles"),
        "works": ("books", "films", "paintings", "compositions"),
        "institutions": ("companies", "universities", "clubs", "newspapers", "products"),
        "nature": ("animals", "breeds", "elements", "moons", "dishes", "languages"),
    }.items()
    for table in tables
}
KEYS = 20
"""Tokens of statistics for each neuron."""


def asked_facts(of: World, n: int) -> list[Fact]:
    """`n` facts in held-out sentences, evenly over the relations' order: one sentence of each fact."""
    seen: dict[tuple[str, str], Fact] = {}
    for each in statements("held", of):
        key = (each.relation, each.subject.casefold())
        identity = f"{each.relation}/{each.subject}"
        fact = Fact(each.prompt, each.subject, each.object, each.relation, identity)
        # The templates come in turn, so that subjects stand before and after their relation.
        if key not in seen or len(seen) % 2:
            seen[key] = fact
    facts = list(seen.values())
    step = max(1, len(facts) // n)
    return facts[::step][:n]


def site(model: Model, recipe: Recipe, n: int = 240) -> dict[str, Any]:
    """Where the model's facts are found: effects of single states, MLP and attention windows by layer.

    Every number is a share of probability, over known facts, 3 sigma of their subjects' embeddings, 10 samples. `beyond` is the
    effect of a block's state at the last subject token minus that of its embedding, paired within facts, with 95 % intervals.
    """
    facts = known_facts(model, asked_facts(world(*recipe.world), n))
    options: dict[str, Any] = {"noise_level": "facts", "samples": 10}
    main = trace(model, facts, kinds=KINDS, window=WINDOW, roles=ROLES, **options)
    cut = trace(
        model, facts, kinds="state", severed=("mlp", "attn"), roles="last subject", **options
    )
    return {**described(main, cut, groups(model, recipe)), "asked": n}


def groups(model: Model, recipe: Recipe) -> GroupsOf:
    """Which groups a fact is counted in: its subject's kind, and whether the subject's last token settles the object by itself.

    It does where all subjects of the relation that end in it have that object, and it does not where at most half of them have.
    """
    tables = table_of_subjects(recipe.world[0])
    kinds = {name.casefold(): KINDS_OF_TABLES.get(table, "other") for name, table in tables.items()}
    encode = models.tokenizer(model).encode
    objects: dict[tuple[str, int], Counter[str]] = {}
    ends: dict[str, int] = {}
    for fact in fact_book(*recipe.world).facts:
        end = ends.setdefault(fact.subject.casefold(), encode(f" {fact.subject}")[-1])
        objects.setdefault((fact.relation.name, end), Counter())[fact.object] += 1

    def groups_of(fact: Fact) -> list[str]:
        name = fact.subject.casefold()
        having = objects[str(fact.relation), ends[name]]
        share = having[str(fact.object)] / having.total()
        settled = [SETTLED] if share == 1 else [OPEN] if share <= HALF else []
        return [kinds[name], *settled]

    return groups_of


def described(main: Trace, cut: Trace, groups_of: GroupsOf) -> dict[str, Any]:
    """The numbers of `site` from its two traces."""
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
        name: {
            "facts": len(labels),
            "peak": _mean(claims.peak(own.loc[labels])),
            "beyond_at_peak": _mean(claims.peak(beyond.loc[labels])),
            "peak_layer": int(beyond.loc[labels].mean().idxmax()),
        }
        for name, labels in sorted(members.items())
        if len(labels) >= FEWEST_FACTS
    }


def edits_by_layer(
    model: Model,
    recipe: Recipe,
    *,
    n: int = 24,
    layers: Sequence[int] | None = None,
    clamps: Sequence[float] = (CLAMP,),
) -> pd.DataFrame:
    """ROME on records that are for choosing, at every layer: the columns of `sweeps.sweep`."""
    of = world(*recipe.world)
    chosen = list(layers if layers is not None else range(n_layers(model)))
    tokens = KEYS * (recipe.d_mlp or 4 * recipe.d_model)
    gather(model, chosen, corpora.of_recipe(recipe), tokens=tokens)
    records = counterfact(model, of=of).tune[:n]
    return sweep(
        model,
        rome,
        records,
        {"layer": chosen, "max_norm_ratio": list(clamps)},
        config={"value_key": "spellings"},
        others=others_of(of),
    )


def _by_layer(table: pd.DataFrame) -> list[list[float]]:
    """For each layer its mean over facts, and the ends of the 95 % interval."""
    return [_mean(table[layer]) for layer in table.columns]


def _mean(values: pd.Series) -> list[float]:
    found = mean_interval(values.dropna(), interval="bootstrap")
    return _three(found.mean, found.low, found.high)


def _three(mean: float, low: float, high: float) -> list[float]:
    return [round(float(value), 5) for value in (mean, low, high)]
