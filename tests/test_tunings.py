"""Editors' numbers chosen on a model: as many settings for each, on records that are not tested on, and what is done with the choice."""

from __future__ import annotations

import difflib
import math
import re
import shutil
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import tuning_rows
import yaml
from builders import Killed
from hypothesis import given
from hypothesis import strategies as st
from test_hypernetworks import trained_of
from typer.testing import CliRunner

from factlens import Rewrite, configs, plots
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.counterfact import Record, Target, write_records
from factlens.benchmarks.draws import is_of, is_tuned
from factlens.cli import app
from factlens.commands.shared import EDITORS, editor_named
from factlens.config_files import with_entries
from factlens.configs import FINE_TUNED, config_folder, known_configs, read_config
from factlens.editors import lessons, spaces
from factlens.editors.knowledge_neurons import KNConfig
from factlens.editors.spaces import Range, Space, draw
from factlens.errors import ConfigError, PlanError
from factlens.evaluation import evaluate, table
from factlens.tunables import TUNABLE, settings_near, settings_of
from factlens.tunings import Round, best, label_of, numbers_of, rounds, tune, with_choices

pytestmark = [
    pytest.mark.filterwarnings("ignore:the edit of .* did not take"),
    pytest.mark.filterwarnings("ignore:the model says .* already"),
]

ROOT = Path(__file__).parents[1]
REWRITE = Rewrite("Mount Olga is in", "Mount Olga", "abc", "xyz")
SPACE = Space({"one": Range(0.01, 10.0), "two": Range(3.0, 4.0)})
NONE = ("mend", "mend-zsre", "ke", "ke-cf", "ke-zsre", "mend-cf")


def record(number: int, subject: str) -> Record:
    """A record of a small random model's characters."""
    return Record(
        *(number, number, "{} is in", "r", Target("x", ""), Target("y", "")),
        *(subject, (f"So {subject} is in",), ("Bob Lee is in", "Ann Oz is in"), (), ()),
    )


def held_subjects(count: int) -> list[str]:
    names = (f"Mount {a}{b}" for a in "ABCDEFGHIJKLMNOP" for b in "abcdefghijklmnop")
    return [name for name in names if is_of("held", name)][:count]


RECORDS = [record(number, name) for number, name in enumerate(held_subjects(2))]


@pytest.fixture(autouse=True, scope="module")
def quickly():
    """Fine-tuning in two steps: what is tried matters here, not how well it does."""

    def quick(of):
        return replace(of, config=lambda *given: {**of.config(*given), "steps": 2})

    with pytest.MonkeyPatch.context() as patch:
        for name in FINE_TUNED:
            patch.setitem(TUNABLE, name, quick(TUNABLE[name]))
        yield


# -- what is tried ---------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 14), st.integers(0, 10**6))
def test_every_part_of_every_range_is_tried_once(depth, count, seed):
    drawn = draw(SPACE, depth, count, str(seed), "ft")
    assert drawn == draw(SPACE, depth, count, str(seed), "ft")
    assert [set(each.numbers) for each in drawn] == [{"one", "two"}] * count
    for name, between in SPACE.numbers.items():
        width = math.log(between.high / between.low) / count
        places = [math.log(each.numbers[name] / between.low) / width for each in drawn]
        assert sorted(int(place) for place in places) == list(range(count))
        assert all(between.low < each.numbers[name] < between.high for each in drawn)
    layers = sorted(each.layer for each in drawn)
    assert layers == [int((number + 0.5) / count * depth) for number in range(count)]


def test_other_seeds_and_editors_have_other_draws_and_no_draw_is_crowded(monkeypatch):
    first = draw(SPACE, 8, 11, "0", "ft")
    assert first != draw(SPACE, 8, 11, "1", "ft")
    assert first != draw(SPACE, 8, 11, "0", "rome")
    assert draw(SPACE, 8, 0, "0", "ft") == []
    plane = Space({"one": Range(1.0, math.e), "two": Range(1.0, math.e)}, layers=False)

    def nearest(drawn) -> float:
        points = [[math.log(x) for x in each.numbers.values()] for each in drawn]
        return min(math.dist(*pair) for pair in combinations(points, 2))

    # In most single draws some of eleven points are neighbours in both numbers.
    crowded = math.sqrt(2) / 11 + 1e-9
    assert all(nearest(draw(plane, 8, 11, str(seed))) > crowded for seed in range(5))
    monkeypatch.setattr(spaces, "SQUARES", 1)
    assert not all(nearest(draw(plane, 8, 11, str(seed))) > crowded for seed in range(5))


def test_every_editor_of_the_commands_is_tuned():
    assert set(TUNABLE) == set(EDITORS)
    assert all(each.editor is editor_named(name) for name, each in TUNABLE.items())
    assert {each.section[0] for each in TUNABLE.values()} == {
        *("rome", "fine_tuning", "knowledge_neurons", "trained_editors")
    }


@pytest.mark.parametrize("count", [1, 2, 12])
def test_every_editor_has_as_many_settings_and_its_default_is_the_first(family_model, count):
    model = family_model("gpt2")
    tried = {name: settings_of(model, name, count) for name in TUNABLE}
    assert {len(each) for each in tried.values()} == {count}
    assert tried == {name: settings_of(model, name, count) for name in TUNABLE}
    for name, settings in tried.items():
        names = TUNABLE[name].space.names
        assert settings[0] == TUNABLE[name].config(model, {})
        looks = {tuple(setting[number] for number in names) for setting in settings}
        assert len(looks) == count, "no setting is tried twice"
        for setting in settings:  # What is not chosen is the default's.
            assert all(setting[n] == settings[0][n] for n in setting if n not in names)
    assert tried["kn"][0] == asdict(KNConfig())
    assert {each["layer"] for each in tried["rome"]} <= set(range(4))
    if count == 12:
        assert settings_of(model, "ft", 12, 1)[1:] != tried["ft"][1:]


@pytest.mark.parametrize("depth", [1, 8, 48])
@pytest.mark.parametrize("name", [name for name in TUNABLE if name not in NONE])
def test_the_ends_of_every_range_are_numbers_that_can_be(family_model, name, depth):
    """`config` refuses what cannot be: here also beyond the middles that are drawn."""
    space, model = TUNABLE[name].space, family_model("gpt2")
    for end in (0.0, 1.0):
        changes = {number: between.at(end) for number, between in space.numbers.items()}
        assert TUNABLE[name].config(model, changes).items() >= changes.items()
    assert all(setting.layer in (None, *range(depth)) for setting in draw(space, depth, 11))


def test_the_documents_table_of_ranges_is_what_is_drawn_from():
    text = (ROOT / "docs/editing.md").read_text("utf-8")
    _, text = text.split("## Every editor's numbers")
    named = {"FT": "ft", "FT+L": "ft-l", "AttnEdit": "attn-edit", "KN": "kn", "MEND, KE": "mend"}
    for row, name in {**named, "ROME": "rome"}.items():
        line = next(line for line in text.split("\n") if line.startswith(f"| {row} | "))
        space = TUNABLE[name].space
        assert ("| any |" in line) == space.layers
        for number, between in space.numbers.items():
            ends = f"{between.low:g} to {between.high:g}"
            borrowed = number == "learning_rate" and name != "ft"
            words = rf"`{number}` (of the proposed change, )?"
            assert re.search(words + ("as FT's" if borrowed else re.escape(ends)), line), number


@pytest.mark.parametrize(
    ("settings", "records", "expected"),
    [
        (32, 32, [(32, 2), (9, 8, 8), (3, 32, 4, 1)]),
        (8, 5, [(8, 1, 2), (3, 5, 1, 1)]),
        (7, 5, [(7, 5)]),
        (32, 3, [(32, 1, 8), (3, 3, 4, 1)]),
        (32, 1, [(32, 1)]),
    ],
)
def test_rounds_are_of_fewer_settings_on_more_records(settings, records, expected):
    assert rounds(settings, records) == [Round(*each) for each in expected]


def test_what_cannot_be_tried_is_refused(family_model, tmp_path):
    model = family_model("gpt2")
    with pytest.raises(PlanError, match="no editor 'memit'; there are ft, ft-l, attn-edit, kn"):
        settings_of(model, "memit", 12)
    with pytest.raises(PlanError, match="at least one setting is tried, the default, not 0"):
        settings_of(model, "ft", 0)
    for editors, records in (([], RECORDS), (["ft"], [])):
        with pytest.raises(PlanError, match="needs an editor, and records"):
            tune(model, editors, records, out=tmp_path)


# -- what it is tried on ---------------------------------------------------------------------------


def test_records_to_choose_by_are_of_no_subject_that_is_tested_or_trained_on():
    only = ["sport", "instrument", "language", "native_language"]
    whole, held = counterfact(only=only), counterfact(only=only, part="held")
    assert held.records == whole.held
    subjects = {each.subject.casefold() for each in held}
    assert len(subjects) > 3
    assert not subjects & {each.subject.casefold() for each in whole.test}
    practised = [not lessons._is_held(lessons._of_counterfact(each)) for each in whole.tune]
    assert any(practised)
    assert all(lessons._is_held(lessons._of_counterfact(each)) for each in held)
    # Without the split they would share some: the same subjects stand among all records and all to choose by.
    assert subjects < {each.subject.casefold() for each in whole.tune}
    assert subjects < {each.subject.casefold() for each in whole}
    assert {*whole.tune, *whole.test} == {*whole}
    assert not {*whole.tune} & {*whole.test}


# -- the run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(family_folder, tmp_path_factory):
    """A run of two editors, stopped after some settings and gone on with."""
    from factlens import load_model

    model, out = load_model(family_folder("gpt2")), tmp_path_factory.mktemp("tuned")
    given = {"out": out, "settings": 3, "batch": 1}

    def kill(done: int, total: int, label: str) -> None:
        if done == 9:
            raise Killed

    with pytest.raises(Killed):
        tune(model, ["ft", "ft-l"], RECORDS, progress=kill, **given)
    parts = {path: path.stat().st_mtime_ns for path in out.glob("*/*/parts/*.parquet")}
    told: list[tuple] = []
    found = tune(model, ["ft", "ft-l"], RECORDS, progress=lambda *each: told.append(each), **given)
    return model, out, found, parts, told


def test_a_setting_is_the_evaluation_of_its_editor_with_its_numbers(tuned):
    model, _, found, _, _ = tuned
    assert list(found["editor"]) == ["ft"] * 3 + ["ft-l"] * 3
    assert list(found["setting"]) == [0, 1, 2] * 2
    assert found.groupby("editor")["taken"].sum().tolist() == [1, 1]
    assert found["max_change"].notna().tolist() == [False] * 3 + [True] * 3
    for _, row in found.iloc[[0, 2, 4]].iterrows():
        of = TUNABLE[row["editor"]]
        settings = settings_of(model, row["editor"], 3)[row["setting"]]
        assert numbers_of(row) == {name: settings[name] for name in of.space.names}
        alone = table(evaluate(model, of.editor, RECORDS, config=settings)).iloc[0]
        for name in ("S", "ES", "PS", "NS", "NM", "KL"):
            assert row[name] == pytest.approx(alone[name], abs=1e-4), name
    assert found["NM"].nunique() > 2  # The settings matter.


def test_a_run_that_was_stopped_goes_on_and_gives_the_same(tuned, tmp_path):
    model, _, found, parts, told = tuned
    assert 0 < len(parts) < 12
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert told[-1] == (12, 12, label_of("ft-l", 2))
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    whole = tune(model, ["ft", "ft-l"], RECORDS, out=tmp_path, settings=3)
    pd.testing.assert_frame_equal(found, whole, atol=1e-4)


def test_the_better_settings_go_on_to_more_records_beside_the_default(family_model, tmp_path):
    model, records = (
        family_model("gpt2"),
        [record(number, name) for number, name in enumerate(held_subjects(4))],
    )
    found = tune(model, ["ft-l"], records, out=tmp_path, settings=8).set_index("setting")
    folders = sorted(each.name for each in (tmp_path / "ft-l").iterdir() if each.is_dir())
    assert folders == ["1", "1-near", "4", "4-near"]
    said = "8 settings of each editor and 2 near the best on 1, 3 of them and 1 near the best on 4 records"
    assert found["how"].iloc[0].startswith(said)
    last = found[found["n"] == 4]
    assert len(found) == 11
    assert {0, 10} < {*last.index}
    assert len(last) == 4
    assert found["taken"].sum() == last["taken"].sum() == 1
    # Who goes on is decided on the first record alone, and none that stayed behind did better there.
    of, tried = TUNABLE["ft-l"], settings_of(model, "ft-l", 8)
    keys: list[tuple[float, float, int]] = []

    def score(settings):
        for each in settings:
            row = table(evaluate(model, of.editor, records[:1], config=each)).iloc[0]
            keys.append((-round(row["S"], 9), round(row["KL"], 9), len(keys)))

    score(tried)
    for place, best_one in enumerate(sorted(range(8), key=keys.__getitem__)[:2]):
        tried += settings_near(model, "ft-l", tried[best_one], 1, 0, place)
    score(tried[8:])
    gone_on = [0, *sorted(range(1, 10), key=keys.__getitem__)[:2]]
    assert {*last.index} == {*gone_on, 10}
    # Once all records have spoken, another is tried near the best of these, at its layer.
    first = found.loc[gone_on].assign(S=-found["S"].round(9), KL=found["KL"].round(9))
    (best_one, *_) = first.sort_values(["S", "KL", "setting"]).index
    tried += settings_near(model, "ft-l", tried[best_one], 1, 0, 2, further=0)
    assert tried[10]["layer"] == tried[best_one]["layer"]
    for number, row in found.iterrows():
        assert numbers_of(row) == {name: tried[number][name] for name in of.space.names}


@given(st.integers(1, 12), st.integers(0, 99), st.floats(1e-3, 100.0), st.integers(1, 8))
def test_near_a_setting_is_half_of_each_range_and_the_next_layers(depth, layer, number, count):
    around = spaces.Setting(layer % depth, {"one": number, "two": 3.5})
    found = spaces.near(SPACE, depth, count, around, "x")
    middle = min(max(number, 0.01), 10.0)
    for each in found:
        assert abs(each.layer - layer % depth) <= 1
        assert 0 <= each.layer < depth
        low, high = max(0.01, middle / 1000**0.25), min(10.0, middle * 1000**0.25)
        assert low <= each.numbers["one"] <= high
        assert 3.0 <= each.numbers["two"] <= 4.0
    assert len({each.numbers["one"] for each in found}) == count
    same = spaces.near(SPACE, depth, count, around, "x", further=0)
    assert {each.layer for each in same} == {layer % depth}


# -- the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ([{"S": 50}, {"S": 70}, {"S": 60}], 1),
        ([{"S": 70, "KL": 0.2}, {"S": 70, "KL": 0.1}, {"S": 60, "KL": 0.0}], 1),
        ([{"S": 70, "KL": 0.1}, {"S": 70, "KL": 0.2}], 0),
        ([{"S": 60}, {"S": 70}, {"S": 70}], 1),  # The first of those alike in all.
        ([{"S": 70, "KL": 0.1}, {"S": 70 + 1e-12, "KL": 0.3}], 0),  # Rounding.
        ([{"S": 50}, {"S": 90, "failed": 1}], 0),
        ([{"S": 50, "failed": 1}, {"S": float("nan"), "failed": 3}], 0),
    ],
)
def test_the_highest_S_is_taken_and_of_those_alike_the_smaller_change(settings, taken):
    assert best(tuning_rows.table("ft", settings)) == taken


def test_an_editor_without_any_edit_is_said():
    frame = tuning_rows.table("kn", [{"S": 1}]).assign(S=float("nan"), failed=3)
    with pytest.raises(PlanError, match="of kn no edit succeeded under any setting"):
        best(frame)


# -- into a config ---------------------------------------------------------------------------------

PLAIN = """# What it is.
models: [mine]   # two words
layers: 4

rome: { value_key: spellings, layer: 1 } # kept
rome_source: by hand
fine_tuning:      # by editor
    ft: {layer: 0, learning_rate: 5e-4}   # Adam
    # ft-l has none
note: 'a: b'"""
WRITTEN = """# What it is.
models: [mine]   # two words
layers: 4

rome: { value_key: spellings, layer: 3, max_norm_ratio: 2.5 } # kept
rome_source: 'new: one'
fine_tuning:      # by editor
    ft: {layer: 2, learning_rate: 0.00005}   # Adam
    ft-l: {layer: 1}
    # ft-l has none
note: 'a: b'
knowledge_neurons: {threshold: 0.3, write: 1}
trained_editors:
  mend-cf: {scale: 0.25}"""
ENTRIES = {
    ("rome", "layer"): 3,
    ("rome", "max_norm_ratio"): 2.5,
    ("rome_source",): "new: one",
    ("fine_tuning", "ft", "layer"): 2,
    ("fine_tuning", "ft", "learning_rate"): 5e-05,
    ("fine_tuning", "ft-l", "layer"): 1,
    ("knowledge_neurons", "threshold"): 0.3,
    ("knowledge_neurons", "write"): 1.0,
    ("trained_editors", "mend-cf", "scale"): 0.25,
}


def test_entries_are_written_in_their_place_and_every_other_byte_stays():
    assert with_entries(PLAIN, ENTRIES) == WRITTEN
    assert with_entries(WRITTEN, ENTRIES) == WRITTEN
    windows = PLAIN.replace("\n", "\r\n")
    assert with_entries(windows, ENTRIES) == WRITTEN.replace("\n", "\r\n")
    assert with_entries(PLAIN, {}) == PLAIN


@given(st.floats(1e-9, 1e9), st.integers(0, 99), st.text(max_size=20))
def test_what_was_written_is_read_back_exactly(number, layer, words):
    entries = {("rome", "max_norm_ratio"): number, ("rome", "layer"): layer, ("note",): words}
    found = yaml.safe_load(with_entries(PLAIN, entries))
    assert (found["rome"]["max_norm_ratio"], found["rome"]["layer"]) == (number, layer)
    assert found["note"] == words


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_of_every_bundled_config_only_the_lines_of_the_entries_change(path):
    text = path.read_text("utf-8")
    lines = difflib.ndiff(text.split("\n"), with_entries(text, ENTRIES).split("\n"))
    changed = [line for line in lines if line[0] in "+-"]
    sections = "rome|fine_tuning|knowledge_neurons|trained_editors"
    ours = re.compile(rf"[+-] ({sections})(_source)?:|[+-]   (ft|ft-l|mend-cf):|\+ $|- $")
    assert changed
    assert not [line for line in changed if not ours.match(line)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rome: 3", "rome must hold keys and values, as in {layer: ...}"),
        ("- 1", "the config must hold keys and values"),
        ("a: &x {layer: 1}\nrome: *x", "cannot be changed in place"),
        ("rome: {layer: 1}\nrome: {layer: 2}", "cannot be changed in place"),
    ],
)
def test_a_config_that_would_not_stay_what_it_is_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        with_entries(text, {("rome", "layer"): 3})


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A folder of configs to write to; gpt2.yaml serves the small random model."""
    folder = tmp_path / "configs"
    shutil.copytree(config_folder(), folder)
    monkeypatch.setattr(configs, "config_folder", lambda: folder)
    known_configs.cache_clear()
    yield folder
    known_configs.cache_clear()


CHOSEN = {
    "ft": {"layer": 3, "learning_rate": 0.0123},
    "ft-l": {"layer": 2, "learning_rate": 0.0234, "max_change": 0.0345},
    "attn-edit": {"layer": 1, "learning_rate": 0.0456, "max_change": 0.0567},
    "kn": {"threshold": 0.123, "erase": 0.75, "write": 3.5},
    "mend": {"scale": 0.25},
    "ke-cf": {"scale": 3.0},
    "rome": {"layer": 2, "max_norm_ratio": 2.33},
}


def write_choices(folder: Path, chosen=CHOSEN) -> None:
    frames = [
        tuning_rows.table(name, [{"S": 10}, {"S": 20, **numbers}])
        for name, numbers in chosen.items()
    ]
    path = folder / "gpt2.yaml"
    path.write_text(with_choices(path, pd.concat(frames), 4), encoding="utf-8")
    known_configs.cache_clear()


def test_what_was_chosen_reaches_every_editor_and_is_no_default(own, family_model, tmp_path):
    model = family_model("gpt2")
    before = {name: settings_of(model, name, 3) for name in TUNABLE}
    write_choices(own)
    config = read_config(own / "gpt2.yaml")
    assert config.layers == 4
    assert all(config.is_chosen(TUNABLE[name].section[0]) for name in CHOSEN)
    assert config.rome_source == f"chosen by factlens tune, {tuning_rows.HOW} (docs/editing.md)"
    path = trained_of(model, "mend").save(tmp_path / "mend.safetensors")
    more = {
        "rome": {"moment": "identity", "contexts": ["{}"], "steps": 2},
        "mend": {"checkpoint": str(path)},
        **{name: {"steps": 2} for name in FINE_TUNED},
    }
    for name in ("ft", "ft-l", "attn-edit", "kn", "mend", "rome"):
        edit = TUNABLE[name].editor(model, REWRITE, more.get(name))
        assert edit.info["config"].items() >= CHOSEN[name].items(), name
        *_, key = CHOSEN[name]
        named = {key: 1.5 * CHOSEN[name][key]}
        other = TUNABLE[name].editor(model, REWRITE, {**more.get(name, {}), **named})
        assert other.info["config"].items() >= {**CHOSEN[name], **named}.items(), name
    # The same command gives the same settings once its choices are written...
    assert {name: settings_of(model, name, 3) for name in TUNABLE} == before
    # ... but published numbers are where it begins.
    text = (own / "gpt2.yaml").read_text("utf-8")
    (own / "gpt2.yaml").write_text(text.replace("chosen by factlens", "published by them with"))
    known_configs.cache_clear()
    for name, numbers in CHOSEN.items():
        assert settings_of(model, name, 1)[0].items() >= numbers.items()


def test_a_config_of_another_depth_or_with_numbers_from_elsewhere_is_refused(own):
    path, found = own / "gpt2-xl.yaml", tuning_rows.table("ft", [{"S": 1}])
    with pytest.raises(ConfigError, match="for a model of 48 layers, and this one has 4"):
        with_choices(path, found, 4)
    with pytest.raises(ConfigError, match="also has ft-l, attn-edit, whose source is another"):
        with_choices(path, found, 48)
    assert with_choices(path, tuning_rows.table("rome", [{"S": 1}]), 48)
    write_choices(own, {"ft": CHOSEN["ft"]})
    write_choices(own, {"ft-l": CHOSEN["ft-l"]})  # Of the same command.
    found = read_config(own / "gpt2.yaml").fine_tuning
    assert found == {name: CHOSEN[name] for name in ("ft", "ft-l")}


def test_a_bad_number_of_a_config_is_one_line(own, family_model):
    model = family_model("gpt2")
    for section, words in (
        ("knowledge_neurons: {threshold: 3}", "KN's threshold is 3"),
        ("knowledge_neurons: {layer: 3}", "KN's config has no key layer"),
        ("trained_editors: {mend: {scale: 0}}", "a trained editor's scale is 0"),
        ("trained_editors: {mend: {size: 1}}", "mend's config has no key size"),
        ("layers: 4\nfine_tuning: {ft: {learning_rate: 1}}", "ft of gpt2.yaml has no layer"),
    ):
        (own / "gpt2.yaml").write_text(f"architectures: [gpt2]\n{section}\n")
        known_configs.cache_clear()
        name = {"k": "kn", "t": "mend", "l": "ft"}[section[0]]
        with pytest.raises(ConfigError, match=words):
            TUNABLE[name].config(model, {})


def test_the_scale_of_a_config_can_be_a_word_of_yaml(own, family_model):
    (own / "gpt2.yaml").write_text("architectures: [gpt2]\ntrained_editors: {ke: {scale: 5e-1}}\n")
    known_configs.cache_clear()
    assert TUNABLE["ke"].config(family_model("gpt2"), {})["scale"] == 0.5


# -- figure and command ----------------------------------------------------------------------------


def test_the_figure_marks_the_default_and_what_was_taken():
    settings = [{"S": 40.0}, {"S": 90.0, "layer": 3}, {"S": 60.0}]
    found = pd.concat([tuning_rows.table(name, settings) for name in ("ft", "rome")])
    figure = plots.tuning(found)
    assert [each.text for each in figure.layout.annotations] == ["ft", "rome"]
    tried, default, taken = figure.data[:3]
    assert (list(tried.x), list(tried.y)) == ([1, 2, 3], [90.0, 60.0, 40.0])
    assert list(tried.error_y.array) == [2.0] * 3
    assert (list(default.x), list(taken.x), list(taken.y)) == ([3], [1], [90.0])
    assert "layer 3, learning_rate 0.001" in taken.text[0]
    assert [each.showlegend for each in figure.data] == [True] * 3 + [False] * 3
    with pytest.raises(PlanError, match="no column KL"):
        plots.tuning(found.drop(columns="KL"))


@pytest.fixture
def run(family_folder, tmp_path):
    """Runs `factlens tune` on a small model."""
    tested = record(9, next(name for name in map(str, range(99)) if not is_tuned(name)))
    write_records([tested, *RECORDS], tmp_path / "records.json")
    options = ["--model", family_folder("gpt2"), "--records", tmp_path / "records.json"]

    def go(*given: object, code: int = 0):
        words = ["tune", *options, "--out", tmp_path / "out", *given]
        done = CliRunner().invoke(app, [str(each) for each in words])
        assert done.exit_code == code, done.output
        return done

    return go


def test_the_command_writes_table_page_and_config_and_goes_on(run, own, tmp_path):
    config = own / "gpt2.yaml"
    before = config.read_text("utf-8")
    given = ["--editor", "ft", "--editor", "ft-l", "--settings", 2, "--write", config]
    first = run(*given)
    found = pd.read_csv(tmp_path / "out" / "tuning.csv")
    assert found.groupby("editor").size().tolist() == [2, 2]
    assert set(found["n"] + found["failed"]) == {2}, "the record to be tested on is left out"
    said = "2 settings of each editor on 2 records of records.json that are not tested on, seed 0"
    assert said in " ".join(first.stdout.split())
    assert re.search(
        r"^ft-l: layer \d, learning_rate [\d.]+, max_change [\d.]+", first.stdout, re.M
    )
    page = (tmp_path / "out" / "tuning.html").read_text("utf-8")
    assert "Every setting" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    text = config.read_text("utf-8")
    assert text.startswith(before.rstrip("\n"))
    known_configs.cache_clear()
    taken = found[found["taken"]].set_index("editor")
    for name, numbers in read_config(config).fine_tuning.items():
        assert numbers["layer"] == taken.loc[name, "layer"]
        assert numbers["learning_rate"] == pytest.approx(taken.loc[name, "learning_rate"])
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/parts/*")}
    again = run(*given)
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert config.read_text("utf-8") == text
    other = run(*given, "--seed", 1, code=2)
    assert "holds measurements of another seed" in other.stderr


def test_the_commands_refusals_are_one_line(run, own, tmp_path):
    for words_given, words in (
        (["--editor", "memit"], "no editor 'memit'; there are rome, ft, ft-l"),
        (["--editor", "ke-zsre"], "there is no trained ke-zsre; `factlens train-editor ke"),
        (["--editor", "ft", "--write", tmp_path / "none.yaml"], "cannot read the config"),
        (
            ["--editor", "ft", "--write", own / "llama.yaml"],
            "is not the config of gpt2; its models",
        ),
    ):
        done = run("--settings", 2, *words_given, code=2)
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("factlens:")
        assert words in line
        assert not (tmp_path / "out").exists()
