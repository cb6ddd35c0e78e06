"""Claims on invented effects whose truth is known: seen, opposite, undecided, and when there is nothing to say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from factlens import claims
from factlens.facts import Fact
from factlens.intervals import Estimate
from factlens.traces import Trace

DEPTH, FACTS = 8, 80
ROLES = ("first subject", "middle subject", "last subject", "first after", "last")


def invented(
    *, early=0.4, early_layer=3, identity=0.05, mlp=0.3, attn=0.05, late=0.6, late_attn=0.5,
    cut_mlp=0.3, cut_attn=0.0, cut_falls=True, seed=0,
):  # fmt: skip
    """A main trace and a severed one with the paper's picture, or with another by the arguments."""
    generator = np.random.default_rng(seed)
    rows, severed = [], []
    for fact in range(FACTS):
        scale = generator.gamma(2.0, 0.5)  # Skewed, as facts are.
        for position, role in enumerate(ROLES):
            for layer in range(-1, DEPTH):
                near = np.exp(-((layer - early_layer) ** 2) / 4)
                state = {"last subject": early * near, "last": late * layer / DEPTH}.get(role, 0.02)
                if role == "last subject" and layer == -1:
                    state = identity
                noise = generator.normal(0, 0.02, 3)
                rows.append(
                    (fact, "state", 1, "none", layer, position, role, scale * state + noise[0])
                )
                if layer < 0:
                    continue
                parts = {"last subject": (mlp * near, attn * near), "last": (0.1, late_attn)}
                for kind, value, e in zip(
                    ("mlp", "attn"), parts.get(role, (0.01, 0.01)), noise[1:], strict=True
                ):
                    rows.append((fact, kind, 3, "none", layer, position, role, scale * value + e))
                if role == "last subject":
                    low = max(0.0, 1 - layer / 4) if cut_falls else 1.0
                    for kind, cut in (("mlp", cut_mlp), ("attn", cut_attn)):
                        value = scale * (state - cut * low) + noise[0]
                        severed.append((fact, "state", 1, kind, layer, position, role, value))
    return {"main": trace_of(rows), "severed": trace_of(severed)}


def trace_of(rows):
    columns = ["fact", "kind", "window", "severed", "layer", "position", "role", "effect"]
    frame = pd.DataFrame(rows, columns=columns).assign(token="x", prob_corrupted=0.0)
    frame["prob_restored"] = frame["effect"]
    facts = tuple(Fact(f"prompt {n}", "prompt") for n in range(FACTS))
    info = {"metric": "prob", "metrics": ["prob"], "model": "invented"}
    return Trace(frame, facts, ("x",) * FACTS, ((0, 3),) * FACTS, (5,) * FACTS, info)


def verdicts(**options):
    table = claims.section_2(invented(**options))
    return table.set_index("claim")["verdict"]


def test_the_papers_picture_is_seen_in_full():
    assert set(verdicts()) == {claims.SEEN}
    assert len(verdicts()) == 9


@pytest.mark.parametrize(
    ("claim", "changed", "expected"),
    [
        ("early site at the last subject token", {"early": -0.2}, claims.OPPOSITE),
        ("the early site says more than the token's identity", {"identity": 0.6}, claims.OPPOSITE),
        ("the early site says more than the token's identity", {"identity": 0.4}, claims.UNDECIDED),
        ("the early site is stronger in the middle layers than at the first", {"early_layer": 0}, claims.OPPOSITE),
        ("MLPs over attention at the early site", {"mlp": 0.05, "attn": 0.3}, claims.OPPOSITE),
        ("MLPs over attention at the early site", {"mlp": 0.1, "attn": 0.1}, claims.UNDECIDED),
        ("late site at the last token", {"late": -0.5}, claims.OPPOSITE),
        ("attention over MLPs at the late site", {"late_attn": 0.0}, claims.OPPOSITE),
        ("severing MLPs takes the effect of low layers", {"cut_mlp": -0.3}, claims.OPPOSITE),
        ("severing MLPs takes the effect of low layers", {"cut_mlp": 0.0}, claims.UNDECIDED),
        ("no similar gap when attention is severed", {"cut_attn": 0.6}, claims.OPPOSITE),
        ("severing MLPs takes less of upper layers", {"cut_falls": False}, claims.UNDECIDED),
        ("severing MLPs takes less of upper layers", {"cut_mlp": -0.3}, claims.OPPOSITE),
    ],
)  # fmt: skip
def test_another_picture_is_called_by_its_name(claim, changed, expected):
    assert verdicts(**changed)[claim] == expected


def test_a_peak_is_measured_on_the_facts_that_did_not_choose_it():
    """Of pure noise the largest mean of many layers is far from zero; the cross-fitted one is not."""
    noise = pd.DataFrame(np.random.default_rng(0).standard_normal((400, 200)))
    naive = noise.mean().max()
    crossed = claims.peak(noise).mean()
    assert naive > 0.1
    assert abs(crossed) < 0.1
    table = pd.DataFrame({0: np.ones(10), 1: np.full(10, 3.0)})
    assert claims.peak(table).tolist() == [3.0] * 10
    assert claims.peak_layers(table) == "1"


def test_verdicts_follow_the_rule():
    assert claims.verdict(Estimate(1.0, 0.1, 0.8, 1.2, 100)) == "seen"
    assert claims.verdict(Estimate(-1.0, 0.1, -1.2, -0.8, 100)) == "opposite"
    assert claims.verdict(Estimate(0.1, 0.1, -0.1, 0.3, 100)) == "undecided"
    assert claims.verdict(Estimate(1.0, 0.1, 0.8, 1.2, 5)) == "not testable here"
    assert claims.verdict(Estimate(1.0, np.nan, np.nan, np.nan, 100)) == "not testable here"


def test_what_was_not_traced_is_not_testable_and_says_why():
    traces = invented()
    only_states = traces["main"].frame[traces["main"].frame["kind"] == "state"]
    main = replace(traces["main"], frame=only_states)
    table = claims.section_2({"main": main}).set_index("claim")
    row = table.loc["MLPs over attention at the early site"]
    assert row["verdict"] == claims.UNTESTABLE
    assert "no mlp at last subject" in row["how"]
    assert table.loc["early site at the last subject token", "verdict"] == claims.SEEN


def test_gaps_are_paired_within_facts():
    traces = invented()
    gaps = claims.gaps(traces["main"], traces["severed"])
    mlp = gaps[(gaps["severed"] == "mlp") & (gaps["layer"] == 0)].iloc[0]
    of, cut = claims.grids(traces["main"]), claims.grids(traces["severed"])
    difference = (of.blocks("state", "last subject") - cut.blocks("state", "last subject", "mlp"))[
        0
    ]
    assert mlp["difference"] == pytest.approx(difference.mean())
    assert mlp["high"] - mlp["low"] == pytest.approx(2 * 1.99 * difference.sem(), rel=0.01)
    assert (gaps[gaps["severed"] == "attn"]["difference"].abs() < 1e-9).all()


def test_tracing_is_compared_with_gradients_by_where_they_point():
    main = invented()["main"]
    flat = main.frame[main.frame["kind"] == "state"].rename(columns={"effect": "attribution"})
    flat["attribution"] = 1.0
    gradients = replace(main, frame=flat, info=dict(main.info))
    for each, samples in ((main, 10), (gradients, 2)):
        each.info.update(samples=samples, method_samples=samples)
    values, how = claims.over_gradients(main, gradients)
    assert values.mean() > 0.3
    assert "gradients 0.25" in how
    assert claims.concentration(flat, "attribution").iloc[0] == pytest.approx(8 / 32)


def test_attentions_own_gap_is_said_whatever_the_verdict():
    table = claims.section_2(invented(cut_attn=0.1)).set_index("claim")
    row = table.loc["no similar gap when attention is severed"]
    assert row["verdict"] == claims.SEEN
    assert "is not compatible with none" in row["how"]
    clear = claims.section_2(invented(cut_attn=0.0)).set_index("claim")
    assert "is compatible with none" in clear.loc[row.name, "how"]


def test_a_token_with_two_roles_is_no_rival_of_itself():
    """Where the token after the subject is the last, or the subject has one token, only the later role counts."""
    traces = invented()
    frame = traces["main"].frame
    adjacent = frame[~frame["role"].isin(["first after", "middle subject", "first subject"])]
    adjacent = adjacent.assign(position=adjacent["role"].map({"last subject": 0, "last": 1}))
    with pytest.raises(LookupError, match="no other role"):
        claims.early_site(claims.grids(replace(traces["main"], frame=adjacent)))
    doubled = claims.grids(replace(traces["main"], frame=adjacent)).table
    assert {"first subject", "first after"} <= set(doubled.index.get_level_values("role"))
    table = claims.section_2({"main": replace(traces["main"], frame=adjacent)}).set_index("claim")
    assert table.loc["early site at the last subject token", "verdict"] == claims.UNTESTABLE


def test_one_fact_is_too_few_and_no_crash():
    traces = invented()
    one = replace(traces["main"], frame=traces["main"].frame.query("fact == 0"))
    cut = replace(traces["severed"], frame=traces["severed"].frame.query("fact == 0"))
    table = claims.section_2({"main": one, "severed": cut})
    assert set(table["verdict"]) == {claims.UNTESTABLE}
    assert table["how"].str.contains("too few|no other role").all()


def test_facts_are_paired_by_what_they_are_not_by_their_number():
    traces = invented()
    order = np.random.default_rng(1).permutation(FACTS)
    place = {int(old): new for new, old in enumerate(order)}
    frame = traces["severed"].frame
    moved = replace(
        traces["severed"],
        frame=frame.assign(fact=frame["fact"].map(place)).sort_values("fact", kind="stable"),
        facts=tuple(traces["severed"].facts[old] for old in order),
    )
    one, other = (claims.gaps(traces["main"], each) for each in (traces["severed"], moved))
    pd.testing.assert_frame_equal(one, other)
