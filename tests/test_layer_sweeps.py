"""Figure 5: ROME at layers and tokens, its means, its correlation with causal tracing, the figure, and the command."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from builders import Killed, save_model
from scipy import stats
from typer.testing import CliRunner

import factlens as fl
from factlens import (
    Fact,
    averages,
    counterfact_scores,
    key_statistics,
    load_model,
    metrics,
    plots,
    trace,
)
from factlens.benchmarks.counterfact import Record, Target, write_records
from factlens.cli import app
from factlens.corpora import Corpus
from factlens.editors.questions import question
from factlens.editors.rome import choose_value, rome
from factlens.errors import ConfigError, FactError, PlanError, RunError
from factlens.evaluation import evaluate
from factlens.facts import Rewrite
from factlens.layer_sweeps import METHODS, SCORES, by_layer, correlation, layer_sweep
from factlens.sweep_runs import sweep_run
from factlens.sweeps import sweep_records, tabulated
from factlens.traces import Trace

NAN = math.nan
EVIL = "<i>owned</i>"
QUICK = {"contexts": ("{}",), "steps": 2, "moment": "identity"}
LAYERS, FACTS = 5, 12


def record(case_id: int, subject: str) -> Record:
    return Record(
        case_id=case_id,
        pararel_idx=0,
        prompt="{} is in",
        relation_id="P1",
        target_new=Target("abc", ""),
        target_true=Target("de", ""),
        subject=subject,
        paraphrase_prompts=(f"So {subject} is in",),
        neighborhood_prompts=("Mount Ida is in",),
        attribute_prompts=(),
        generation_prompts=(),
    )


RECORDS = [record(0, "Mount Olga"), record(1, "Ox")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three layers, records and settings."""
    folder = tmp_path_factory.mktemp("command")
    save_model(folder / "model", "gpt2", n_layer=3)
    subjects = [
        f"Mount {each}" for each in ("Olga", "Ida", "Tabor", "Etna", "Fuji", "Kenya", "Cook")
    ]
    write_records([record(n, each) for n, each in enumerate(subjects)], folder / "records.json")
    (folder / "rome.yaml").write_text("contexts: ['{}']\nsteps: 2\nmoment: identity\n")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "model")


@pytest.fixture(scope="module")
def swept(model):
    where = {"layers": (0, 2), "tokens": ("subject-middle", "subject-last")}
    return layer_sweep(model, RECORDS, config=QUICK, others=lambda r: (), **where)


def made_up(seed: int = 0, n: int = 20, token: str = "subject-last") -> pd.DataFrame:
    """Rows of a sweep with random scores, more of them at some layers than at others."""
    draw = np.random.default_rng(seed)
    frames = [
        pd.DataFrame(
            {
                "layer": layer,
                "fact_token": token,
                "case_id": range(n),
                "editor": "rome",
                "measured_after": 1,
                **dict.fromkeys([*counterfact_scores.SCORES, "KL"], 0.5),
                **{name: draw.random(n) ** (1 + layer % 3) for name in ("ES", "PS", "NS")},
                "retention": np.where(draw.random(n) < 0.3, NAN, draw.random(n)),
                "n_other": 1,
                "protocol": metrics.PROTOCOL,
                "reason": "",
            }
        )
        for layer in range(LAYERS)
    ]
    return pd.concat(frames, ignore_index=True)


def traced(seed: int = 1, facts: int = FACTS, effects: np.ndarray | None = None) -> pd.DataFrame:
    """The frame of a trace of MLP windows at a last subject token, and of what a correlation must leave out."""
    draw = np.random.default_rng(seed)
    chosen = draw.random((facts, LAYERS)) if effects is None else effects
    frames = []
    for kind, window, role, position in [
        ("mlp", 3, "last subject", 1),
        ("mlp", 3, "last", 2),
        ("mlp", 1, "last subject", 1),
        ("state", 1, "last subject", 1),
    ]:
        own = (kind, window, role) == ("mlp", 3, "last subject")
        effect = chosen if own else draw.random((facts, LAYERS))
        fact, layer = (each.ravel() for each in np.indices(effect.shape))
        frames.append(
            pd.DataFrame(
                {"fact": fact, "kind": kind, "window": window, "severed": "none", "layer": layer}
            ).assign(position=position, token="t", role=role, effect=effect.ravel())
        )
    return pd.concat(frames, ignore_index=True)


# -- the middle token ------------------------------------------------------------------------------


@pytest.mark.parametrize(("subject", "at"), [("Abc", 1), ("Abcd", 1), ("Abcde", 2), ("Abcdef", 2)])
def test_the_middle_token_lies_between_first_and_last(model, subject, at):
    rewrite = Rewrite(f"{subject} is in", subject, "abc")
    asked = question(model, rewrite, ("{}", "So. {}"), fact_token="subject-middle")
    assert asked.lookups == (at, at + len("So. "), at)
    value = choose_value(model, rewrite, {**QUICK, "layer": 1, "fact_token": "subject-middle"})
    assert value.question.lookups[0] == at


def test_a_subject_of_two_tokens_has_no_middle(model):
    with pytest.raises(FactError, match="'Ox' has 2 tokens in 'Ox is in', so none is between"):
        question(model, Rewrite("Ox is in", "Ox", "abc"), ("{}",), fact_token="subject-middle")


# -- the sweep -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the edit of .* did not take")
def test_every_row_is_that_of_an_evaluation_at_its_layer_and_token(model, swept):
    assert len(swept) == 2 * 2 * len(RECORDS)
    assert list(swept.columns[:2]) == ["layer", "fact_token"]
    for (layer, token), rows in swept.groupby(["layer", "fact_token"]):
        config = {**QUICK, "layer": layer, "fact_token": token}
        alone = evaluate(model, rome, RECORDS, config=config, others=lambda r: ())
        found = rows.drop(columns=["layer", "fact_token"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(found, alone, atol=1e-6)
    assert swept["EM"].nunique() > 3, "layers and tokens matter"


def test_records_without_the_token_are_rows_with_their_reason(swept):
    missing = swept[swept["reason"] != ""]
    assert set(zip(missing["fact_token"], missing["subject"], strict=True)) == {
        ("subject-middle", "Ox")
    }
    assert missing["reason"].str.startswith("FactError: the subject 'Ox' has 2 tokens").all()
    found = by_layer(swept)
    assert found.groupby("fact_token")[["n", "failed"]].max().to_dict("index") == {
        "subject-middle": {"n": 1, "failed": 1},
        "subject-last": {"n": 2, "failed": 0},
    }


def test_a_sweep_of_nothing_or_of_what_is_not_there_is_refused(model):
    with pytest.raises(PlanError, match="a sweep needs records"):
        layer_sweep(model, [], config=QUICK)
    with pytest.raises(PlanError, match="at least one value"):
        layer_sweep(model, RECORDS, layers=[], config=QUICK)
    with pytest.raises(ConfigError, match="layer 3 does not exist"):
        layer_sweep(model, RECORDS, layers=[1, 3], config=QUICK)
    with pytest.raises(ConfigError, match="fact_token is 'subject-second'"):
        layer_sweep(model, RECORDS, tokens=["subject-second"], config=QUICK)


@pytest.mark.filterwarnings("ignore:the edit of .* did not take", "ignore:few ends after")
def test_statistics_of_all_layers_are_gathered_in_one_pass(model, monkeypatch):
    text = [
        " ".join(f"{n * m % 97} lies {chr(97 + n * m % 26)}" for n in range(9)) for m in range(90)
    ]
    corpus = Corpus("few", lambda start: iter(text[start:]))
    monkeypatch.setattr(key_statistics, "default_corpus", lambda model: corpus)
    passes, gather_pass = [], key_statistics.gather_pass

    def counted(wanted, *rest):
        passes.append(list(wanted.layers))
        return gather_pass(wanted, *rest)

    monkeypatch.setattr(key_statistics, "gather_pass", counted)
    config = {**QUICK, "moment": "statistics"}
    once = layer_sweep(model, RECORDS[:1], tokens=["last"], config=config)
    assert passes == [[0, 1, 2]]
    again = layer_sweep(model, RECORDS[:1], tokens=["last"], config=config)
    assert passes == [[0, 1, 2]]
    pd.testing.assert_frame_equal(once, again)


def test_settings_that_are_lists_can_be_swept(model):
    grid = {"contexts": [["{}"], ["{}", "So. {}"]], "layer": [1, 0]}
    config = {"steps": 1, "moment": "identity"}
    measured = sweep_records(model, rome, RECORDS[:1], grid, config=config, others=lambda r: ())
    found = tabulated(measured, list(grid))
    assert sorted(zip(map(len, found["contexts"]), found["layer"], strict=True)) == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]


def test_a_sweep_that_was_stopped_goes_on_and_is_the_same(model, swept, tmp_path):
    grid = {"layer": [0, 2], "fact_token": ["subject-middle", "subject-last"]}
    given = {"config": QUICK, "others": lambda r: (), "batch": 1, "out": tmp_path}

    def kill(done: int, total: int, label: str) -> None:
        if label == "layer 2, fact_token subject-middle":
            raise Killed

    with pytest.raises(Killed):
        sweep_run(model, rome, RECORDS, grid, progress=kill, **given)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*.parquet")}
    assert len(kept) == 4
    found = sweep_run(model, rome, RECORDS, grid, **given)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pd.testing.assert_frame_equal(found, swept, atol=1e-4)
    with pytest.raises(RunError, match="another"):
        sweep_run(model, rome, RECORDS, {**grid, "layer": [0, 1]}, **given)
    with pytest.raises(PlanError, match="at least one value of each setting"):
        sweep_run(model, rome, RECORDS, {"layer": []}, **given)


# -- means -----------------------------------------------------------------------------------------


def test_means_in_closed_form():
    rows = made_up(n=4)[:4].assign(
        ES=[1.0, 1.0, 0.0, NAN],
        PS=[0.5, 0.5, 0.5, NAN],
        NS=[1.0, 0.9, 0.8, NAN],
        retention=[NAN, 1.0, 0.0, NAN],
        reason=["", "", "", "EditError: no"],
    )
    (row,) = by_layer(rows).to_dict("records")
    s = 3 / (3 / 2 + 2 + 1 / 0.9)
    assert (row["ES"], row["S"], row["retention"]) == pytest.approx((200 / 3, 100 * s, 50))
    moved = s**2 / 3 * (np.array([1, 1, 0]) / (2 / 3) ** 2 + np.array([1, 0.9, 0.8]) / 0.9**2)
    assert row["S_margin"] == pytest.approx(196 * moved.std(ddof=1) / math.sqrt(3))
    assert row["NS_margin"] == pytest.approx(1.96 * 10 / math.sqrt(3))
    assert (row["n"], row["n_retention"], row["failed"]) == (3, 2, 1)
    assert (row["layer"], row["fact_token"]) == (0, "subject-last")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns="layer"), "no column layer"),
        (lambda f: pd.concat([f, f]), "record 0 is there twice at layer 0, subject-last"),
        (lambda f: f.assign(protocol=["x", *f["protocol"][1:]]), "numbers of 2 protocols"),
    ],
)
def test_frames_that_are_no_sweep_are_refused(change, says):
    with pytest.raises(PlanError, match=says):
        by_layer(change(made_up()))


# -- correlation -----------------------------------------------------------------------------------


def test_correlations_are_those_of_scipy_over_the_means():
    rows, cells = made_up(), traced()
    rows.loc[3, ["ES", "PS", "NS", "retention", "reason"]] = [NAN, NAN, NAN, NAN, "EditError: no"]
    found = correlation(rows, cells, window=3, resamples=50).set_index(["score", "method"])
    own = cells[(cells["window"] == 3) & (cells["role"] == "last subject")]
    aie = own.groupby("layer")["effect"].mean()
    means = by_layer(rows).set_index("layer")
    assert list(found.index) == [(score, method) for score in SCORES for method in METHODS]
    for score in SCORES:
        assert found.loc[(score, "pearson"), "r"] == pytest.approx(
            stats.pearsonr(means[score], aie)[0]
        )
        assert found.loc[(score, "spearman"), "r"] == pytest.approx(
            stats.spearmanr(means[score], aie)[0]
        )
    assert set(found["n_layers"]) == {LAYERS}
    assert (set(found["n_records"]), set(found["n_facts"])) == ({20}, {FACTS})
    assert (found["low"] <= found["high"]).all()
    assert found[["low", "high"]].abs().max(axis=None) <= 1


def exact(r: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A sweep and a trace whose records and facts are all alike, with correlation `r` of ES and AIE."""
    one = np.array([2.0, -1, -2, -1, 2])
    other = np.array([-1.0, 2, 0, -2, 1])
    one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    rows = made_up()
    rows["ES"] = 0.5 + 0.1 * one[rows["layer"]]
    aie = 0.1 * (r * one + math.sqrt(1 - r**2) * other)
    return rows, traced(effects=np.tile(aie, (FACTS, 1)))


@pytest.mark.parametrize("r", [-1.0, 0.0, 0.6, 1.0])
def test_without_noise_the_interval_is_the_correlation_itself(r):
    found = correlation(*exact(r), window=3, resamples=20).iloc[0]
    assert (found["score"], found["method"]) == ("ES", "pearson")
    assert found[["r", "low", "high"]].tolist() == pytest.approx([r, r, r], abs=1e-9)


def test_a_score_that_is_the_same_at_all_layers_has_no_correlation():
    rows = made_up().assign(ES=0.3)
    found = correlation(rows, traced(), resamples=20).set_index("score")
    assert found.loc["ES", ["r", "low", "high"]].isna().all(axis=None)
    assert found.loc["PS", ["r", "low", "high"]].notna().all(axis=None)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_layers_and_the_units_of_effects_do_not_matter(seed):
    rows, cells = made_up(seed), traced(seed)
    found = correlation(rows, cells, window=3, resamples=30)
    order = dict(enumerate(np.random.default_rng(seed).permutation(LAYERS)))
    moved = [frame.assign(layer=frame["layer"].map(order)) for frame in (rows, cells)]
    moved[1]["effect"] = 3 * moved[1]["effect"] - 1
    pd.testing.assert_frame_equal(correlation(*moved, window=3, resamples=30), found, atol=1e-9)


def test_the_interval_covers_the_true_correlation_where_means_are_noisy():
    covered, draw, r = [], np.random.default_rng(0), 0.8
    rows, cells = exact(r)
    for _ in range(25):
        noisy, effects = (
            frame.assign(**{name: frame[name] + draw.normal(0, 0.1, len(frame))})
            for frame, name in ((rows, "ES"), (cells, "effect"))
        )
        found = correlation(noisy, effects, window=3, resamples=100).iloc[0]
        covered.append(found["low"] <= r <= found["high"])
    assert np.mean(covered) > 0.8


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"fact_token": "last"}, "no edits at the token last; there are some at subject-last"),
        ({"window": 7}, "no MLP windows of width 7; it has 3, 1"),
        ({"resamples": 1}, "two resamples"),
    ],
)
def test_correlations_that_cannot_be_had_are_refused(asked, says):
    with pytest.raises(PlanError, match=says):
        correlation(made_up(), traced(), **asked)


def test_too_few_layers_records_or_facts_are_refused():
    rows, cells = made_up(), traced()
    with pytest.raises(PlanError, match="2 layers in common, and a correlation needs 3"):
        correlation(rows[rows["layer"] < 2], cells)
    with pytest.raises(PlanError, match="no MLP windows; it has none"):
        correlation(rows, cells[cells["kind"] == "state"])
    with pytest.raises(PlanError, match="two records"):
        correlation(made_up(n=1), cells)
    with pytest.raises(PlanError, match="two facts"):
        correlation(rows, cells[cells["fact"] == 0])


# -- the figure ------------------------------------------------------------------------------------


def averaged() -> pd.DataFrame:
    cells = [(layer, role) for layer in range(LAYERS) for role in ("last subject", "last")]
    frame = pd.DataFrame(cells, columns=["layer", "role"])
    aie = np.linspace(0.1, 0.2, len(frame))
    return frame.assign(
        kind="mlp", window=3, severed="none", aie=aie, low=aie - 0.01, high=aie + 0.01, n_facts=40
    )


def test_the_figure_holds_the_means_their_bands_and_the_aie():
    rows = pd.concat([made_up(), made_up(1, n=15, token="last")], ignore_index=True)
    found, aie = by_layer(rows), averaged()
    figure = plots.sweep(found, aie=aie, correlations=correlation(rows, traced(), resamples=20))
    curves = [line for line in figure.data if line.mode == "lines+markers"]
    assert len(curves) == 5 * 2 + 1
    last = found[found["fact_token"] == "last"]
    assert list(curves[1].y) == list(last["ES"])
    band = next(line for line in figure.data if line.legendgroup == "last" and line.fill)
    expected = [*(last["ES"] + last["ES_margin"]), *(last["ES"] - last["ES_margin"])[::-1]]
    assert list(band.y) == pytest.approx(expected)
    assert list(curves[-1].y) == list(aie.loc[aie["role"] == "last subject", "aie"])
    assert [line.name for line in curves if line.showlegend] == ["last subject", "last"]
    titles = [each.text for each in figure.layout.annotations]
    assert titles[:2] == ["efficacy (ES)", "generalisation (PS)"]
    assert titles[-2] == "restoring MLP outputs, 3 layers, last subject token"
    caption = titles[-1]
    assert "last subject 20, last 15" in caption
    assert "Hase et al., 2023" in caption
    assert "Pearson's r over layers" in caption


def test_a_score_without_a_value_has_no_panel_and_empty_places_no_axes():
    found = by_layer(made_up()).assign(retention=NAN, S=NAN)
    figure = plots.sweep(found)
    assert len(figure.data) == 3 * 2
    assert "Pearson" not in figure.layout.annotations[-1].text
    hidden = [axis for axis in figure.select_xaxes() if axis.visible is False]
    assert len(hidden) == 1


def test_the_figure_escapes_and_refuses():
    found = by_layer(made_up()).assign(fact_token=EVIL)
    assert EVIL not in plots.sweep(found).to_json()
    with pytest.raises(PlanError, match="no column retention"):
        plots.sweep(found.drop(columns="retention"))
    with pytest.raises(PlanError, match="no role last subject"):
        plots.sweep(found, aie=averaged().query("role == 'last'"))


# -- the command -----------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def arguments(folder):
    given = ["--model", folder / "model", "--records", folder / "records.json"]
    return ["sweep", *given, "--config", folder / "rome.yaml", "--n", 2]


def have_run(monkeypatch, fingerprint: str, main: Trace | None = None) -> None:
    """Have every folder hold a run with this trace, of weights with this fingerprint."""
    config = {"model": {"model": "tiny", "fingerprint": fingerprint}}
    held = SimpleNamespace(main=main, config=config)
    monkeypatch.setattr(averages, "read_run", lambda folder: held)


def test_tokens_are_swept_drawn_and_correlated_with_a_run_of_the_model(
    model, arguments, monkeypatch, tmp_path
):
    facts = [Fact("Mount Olga is in", "Mount Olga"), Fact("Mount Ida is in", "Mount Ida")]
    main = trace(model, facts, kinds=("mlp",), samples=1, noise_level=0.5)
    have_run(monkeypatch, fl.fingerprint(model), main)
    tokens = ["--token", "middle-subject", "--token", "last-subject"]
    out = run(*arguments, *tokens, "--average", "anywhere", "--out", tmp_path / "s")
    assert out.exit_code == 0, out.output
    table = pd.read_csv(tmp_path / "s" / "sweep.csv")
    assert sorted(zip(table["layer"], table["fact_token"], strict=True)) == [
        (layer, token) for layer in range(3) for token in ("subject-last", "subject-middle")
    ]
    rows = pd.read_parquet(tmp_path / "s" / "records.parquet")
    found = pd.read_csv(tmp_path / "s" / "correlation.csv")
    pd.testing.assert_frame_equal(found, correlation(rows, main), check_dtype=False)
    assert "Hase et al., 2023" in (tmp_path / "s" / "layers.html").read_text(encoding="utf-8")
    assert sum(line.startswith("*") for line in out.stdout.splitlines()) == 1


def test_a_run_of_other_weights_is_refused(arguments, monkeypatch, tmp_path):
    have_run(monkeypatch, "0" * 64)
    out = run(*arguments, "--token", "last", "--average", "anywhere", "--out", tmp_path / "x")
    assert out.exit_code == 2
    assert "the run in anywhere is of other weights (tiny)" in out.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--token", "second"), "fact_token is 'second'"),
        (("--token", "last", "--clamp", 1, "--clamp", 2), "of one clamp"),
        (("--average", "nowhere"), "give --token last-subject"),
        (("--token", "last", "--average", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_swept_is_one_line(arguments, more, says, tmp_path):
    out = run(*arguments, *more, "--out", tmp_path / "x")
    assert out.exit_code == 2, out.output
    (line,) = [each for each in out.stderr.splitlines() if each.startswith("factlens:")]
    assert says in line
    assert not (tmp_path / "x").exists()
