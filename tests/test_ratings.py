"""The human evaluation: a page that does not know who wrote what, answers that come back as odds, intervals that cover."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta, t
from typer.testing import CliRunner

from factlens import applied, generate, models, rome
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.counterfact import write_records
from factlens.cli import app
from factlens.commands import rating
from factlens.errors import EditError, PlanError, RatingError
from factlens.odds import odds_interval
from factlens.rating_pages import rating_page
from factlens.rating_texts import NO_PROMPT, SAME, compare, read_texts, write_texts
from factlens.ratings import (
    QUESTIONS,
    Comparison,
    Shown,
    draw,
    human_preferences,
    identical,
    read_key,
    write_key,
)

NAMES = ("ROME", "FT+L")
EVIL = "</script><script>document.title='owned'</script><b>bold</b> & \"q\" <!-- \u2028 {{ 7*7 }} ü"
PAIRS = [Comparison(f"Fact {n} is new.", f"alpha {n}", f"beta {n}", f"case {n}") for n in range(9)]


def mirrored(shown):
    return [replace(each, first=each.second, second=each.first) for each in shown]


# --- the order ----------------------------------------------------------------------------------


def test_swapping_the_editors_mirrors_every_pair_and_changes_nothing_else():
    swapped = [replace(each, a=each.b, b=each.a) for each in PAIRS]
    for seed in range(5):
        shown, key = draw(PAIRS, NAMES, seed=seed)
        other, other_key = draw(swapped, NAMES, seed=seed)
        assert rating_page(other) == rating_page(mirrored(shown)) != rating_page(shown)
        assert other_key.first == key.first, "the same places, so the texts changed theirs"


def test_the_key_says_who_wrote_the_first_text():
    shown, key = draw(PAIRS, NAMES, seed=3)
    for each, pair in zip(shown, PAIRS, strict=True):
        assert each.first == (pair.a if key.first[each.id] == "ROME" else pair.b)
        assert {each.first, each.second} == {pair.a, pair.b}
        assert key.cases[each.id] == pair.case


def test_half_of_the_first_texts_are_of_either_editor_in_an_order_that_the_seed_draws():
    orders = {tuple(draw(PAIRS[:8], NAMES, seed=seed)[1].first.values()) for seed in range(60)}
    assert {order.count("ROME") for order in orders} == {4}
    assert len(orders) > 30, "70 are possible"
    by_place = np.mean([[name == "ROME" for name in order] for order in orders], axis=0)
    assert (abs(by_place - 0.5) < 0.25).all()
    odd = {list(draw(PAIRS, NAMES, seed=s)[1].first.values()).count("ROME") for s in range(20)}
    assert odd == {4, 5}
    seeds = {draw(PAIRS, NAMES)[1].seed for _ in range(3)}
    assert len(seeds) == 3, "without a seed nobody can guess the order"
    assert min(seeds) > 2**64


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(PlanError, match="both editors are called 'ROME'"):
        draw(PAIRS, ("ROME", "ROME"))
    with pytest.raises(PlanError, match="nothing to compare"):
        draw([], NAMES)
    with pytest.raises(PlanError, match="'Same\\.' are the same"):
        draw([*PAIRS, Comparison("Same.", "one text", "one text\n")], NAMES)


# --- the page -----------------------------------------------------------------------------------


def items_of(page: str) -> dict:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(data)


def is_blind(shown, name: str) -> bool:
    """Whether the page of the mirrored texts differs by the texts' places (and the digest of them) alone, and names nobody."""
    one, other = rating_page(shown), rating_page(mirrored(shown))
    data, turned = items_of(one), items_of(other)
    for each in turned["items"]:
        each["first"], each["second"] = each["second"], each["first"]
    same = {**data, "page": ""} == {**turned, "page": ""}
    shell, other_shell = (re.sub(r'id="data">.*?</script>', "", page) for page in (one, other))
    return same and shell == other_shell and name.casefold() not in one.casefold()


def test_the_page_is_blind():
    shown, key = draw(PAIRS, NAMES, seed=2)
    for name in (*NAMES, str(key.cases["1"])):
        assert is_blind(shown, name)
    data = items_of(rating_page(shown))
    assert [set(each) for each in data["items"]] == [{"id", "fact", "first", "second"}] * 9
    assert [each["id"] for each in data["items"]] == [str(n) for n in range(1, 10)]
    _, long = draw(PAIRS, NAMES)
    assert str(long.seed) not in rating_page(draw(PAIRS, NAMES, seed=long.seed)[0])
    leaks = [replace(each, id=f"{each.id}-{key.first[each.id]}") for each in shown]
    assert not is_blind(leaks, "ROME"), "the check sees a leak"


def test_the_page_needs_nothing_and_text_from_data_stays_text():
    shown, _ = draw([Comparison(EVIL, EVIL + " a", EVIL + " b")], NAMES, seed=0)
    page = rating_page(shown)
    assert "document.title='owned'" not in page
    assert page.count("<script") == page.count("</script>") == 2, "its own"
    assert "<b>bold" not in page
    assert "49" not in page, "braces in a text are no template"
    assert not re.findall(r"(?:src|href)=|https?:|@import|url\(", page)
    assert items_of(page)["items"][0]["fact"] == EVIL


def test_no_difference_is_offered_only_where_ties_are_allowed():
    shown, _ = draw(PAIRS, NAMES, seed=0)
    assert "No difference" not in rating_page(shown)
    assert "No difference" in rating_page(shown, ties=True)
    assert items_of(rating_page(shown))["page"] != items_of(rating_page(shown, ties=True))["page"]


DRIVER = """<pre id="told"></pre><script>
const told = JSON.parse(sessionStorage.getItem("told") ?? "[]");
const press = (key, on = document) => on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const click = (id) => document.getElementById(id).click();
const seen = () => ["start", "item", "end"].filter((id) => !document.getElementById(id).hidden).join();
const text = (id) => document.getElementById(id).textContent;
const pressed = () => [...document.querySelectorAll("[aria-pressed=true]")].map((each) => each.dataset.choice).join();
const note = (what) => told.push(`${what}: ${seen()} | ${text("where")} | ${pressed()}`);
const liked = () => (text("first").includes("alpha") ? "1" : "2");
const disliked = () => (text("first").includes("alpha") ? "2" : "1");
const by = (group, key) => document.querySelectorAll(`[data-question=${group}] button`)[key - 1].click();
async function report(extra) {
  document.getElementById("told").textContent = JSON.stringify({ told, ...extra });
}
const create = URL.createObjectURL;
let blob = null;
URL.createObjectURL = (given) => { blob = given; return create(given); };
HTMLAnchorElement.prototype.click = function () { told.push("file " + this.download); };
STEPS
</script></body>"""
FULL_RUN = """
if (!told.length) {
  click("begin"); note("no name");
  document.getElementById("name").value = " Ada L. ";
  press("Enter", document.getElementById("name")); note("begun");
  press("Enter"); note("unanswered");
  press("x"); press(disliked()); press("Enter"); note("half answered");
  press("1"); press("Enter"); note("second");
  press(liked()); press("1"); press("Backspace"); note("back");
  press("c"); press(liked()); press("Enter"); press("Enter"); note("third"); press("Backspace");
  sessionStorage.setItem("told", JSON.stringify(told));
  location.reload();
} else {
  note("reloaded"); told.push(text("earlier"));
  press("Enter", document.getElementById("name")); note("gone on"); press("Enter");
  let n = 2;
  while (seen() === "item" && n < 20) {
    by("consistency", n % 5 === 0 ? disliked() : liked()); by("fluency", 1); click("next"); n += 1;
  }
  note("after the last"); click("again"); note("again"); press("Enter");
  document.title = document.title + "!";
  click("save");
  const copied = document.getElementById("copy").value;
  blob.text().then((saved) => report({ saved, copied, warned: !document.getElementById("unkept").hidden }));
}
"""
NOTHING_KEPT = """
document.getElementById("name").value = "B";
click("begin"); note("begun");
press("ArrowRight"); press("0"); note("answered"); press("Enter"); note("end");
click("save");
blob.text().then((saved) => report({ saved, warned: !document.getElementById("unkept").hidden, fact: text("fact"), first: text("first") }));
"""
NO_STORAGE = """<head><script>Object.defineProperty(window, "localStorage", { get() { throw new Error("denied"); } });</script>"""
needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs Debian's chromium"
)


def driven(page: str, steps: str, folder) -> dict:
    """What a script of key presses and clicks meets on the page, in a browser that reports no error."""
    path = folder / "driven.html"
    path.write_text(page.replace("</body>", DRIVER.replace("STEPS", steps)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    done = subprocess.run(
        ["chromium", *flags, "--enable-logging=stderr", f"--user-data-dir={folder}/profile",
         "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "<title>owned" not in done.stdout
    (told,) = re.findall(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)
    return json.loads(html.unescape(told))


@needs_chromium
def test_a_rater_goes_from_the_first_pair_to_the_last_and_the_file_becomes_odds(tmp_path):
    shown, key = draw(PAIRS, NAMES, seed=5)
    met = driven(rating_page(shown), FULL_RUN, tmp_path)
    assert [line.split(" | ")[0:2] for line in met["told"] if " | " in line] == [
        ["no name: start", ""],
        ["begun: item", "Pair 1 of 9, 0 answered"],
        ["unanswered: item", "Pair 1 of 9, 0 answered"],
        ["half answered: item", "Pair 1 of 9, 0 answered"],
        ["second: item", "Pair 2 of 9, 1 answered"],
        ["back: item", "Pair 1 of 9, 2 answered"],
        ["third: item", "Pair 3 of 9, 2 answered"],
        ["reloaded: start", ""],
        ["gone on: item", "Pair 2 of 9, 2 answered"],
        ["after the last: end", "Pair 9 of 9, 9 answered"],
        ["again: item", "Pair 9 of 9, 9 answered"],
    ]
    assert "Ada L. goes on where they stopped, with 2 of 9 pairs looked at." in met["told"]
    assert any(re.fullmatch(r"file answers-Ada_L_-[0-9a-f]{6}\.json", line) for line in met["told"])
    assert met["saved"] == met["copied"]
    assert not met["warned"]
    export = tmp_path / "answers.json"
    export.write_text(met["saved"], encoding="utf-8")
    # Liked "alpha", the first editor's, but for the sixth pair; the more fluent was always the first text.
    found = human_preferences([export], key).set_index(["source", "question"])
    assert found.loc[("here", "consistency"), ["wins", "losses", "ties"]].tolist() == [8, 1, 0]
    own_first = sum(each.first.startswith("alpha") for each in shown)
    assert found.loc[("here", "fluency"), ["wins", "losses"]].tolist() == [own_first, 9 - own_first]
    assert found.loc[("here", "fluency"), "first"] == 1


@needs_chromium
def test_the_page_works_where_the_browser_keeps_nothing_and_shows_text_as_text(tmp_path):
    shown, key = draw([Comparison(EVIL, EVIL + " a", EVIL + " b")], NAMES, ties=True, seed=0)
    page = rating_page(shown, ties=True).replace("<head>", NO_STORAGE)
    met = driven(page, NOTHING_KEPT, tmp_path)
    assert met["warned"]
    assert (met["fact"], met["first"]) == (EVIL, shown[0].first)
    assert met["told"][1].endswith("Pair 1 of 1, 1 answered | second,tie")
    export = tmp_path / "answers.json"
    export.write_text(met["saved"], encoding="utf-8")
    found = human_preferences([export], key).set_index(["source", "question"])
    assert found.loc[("here", "fluency"), "ties"] == 1
    won = int(key.first["1"] == "FT+L")
    assert found.loc[("here", "consistency"), "wins"] == won


# --- answers ------------------------------------------------------------------------------------


def export(folder, key, rater, choose):
    """A rater's file; `choose(item, question)` gives an editor's name or "tie"."""

    def side(item, name):
        return "tie" if name == "tie" else "first" if key.first[item] == name else "second"

    answers = {
        item: {each: side(item, choose(int(item), each)) for each in QUESTIONS}
        for item in key.first
    }
    path = folder / f"{rater}.json"
    saved = {"format": "factlens-ratings", "page": key.page, "rater": rater, "answers": answers}
    path.write_text(json.dumps(saved), encoding="utf-8")
    return path


def test_answers_round_trip_into_odds_that_equal_a_hand_computation(tmp_path):
    _, key = draw(PAIRS, NAMES, ties=True, seed=11)
    write_key(key, tmp_path / "key.json")
    assert read_key(tmp_path / "key.json") == key

    def one(item, question):
        return "ROME" if item <= 6 else "FT+L" if item <= 8 else "tie"

    def other(item, question):
        if question == "fluency":
            return "FT+L" if item <= 6 else "ROME"
        return "ROME" if item in (1, 2, 3, 7) else "FT+L"

    files = [export(tmp_path, key, "one", one), export(tmp_path, key, "other", other)]
    found = human_preferences(files, tmp_path / "key.json")
    assert list(found.columns) == [
        "source", "question", "editor", "other", "wins", "losses", "ties", "odds", "low", "high", "over", "first",
        "raters", "items",
    ]  # fmt: skip
    here = found[found["source"] == "here"].set_index("question")
    assert here[["wins", "losses", "ties"]].to_numpy().tolist() == [[10, 7, 1], [9, 8, 1]]
    assert here["odds"].tolist() == pytest.approx([10 / 7, 9 / 8])
    assert (here["editor"] + here["other"]).tolist() == ["ROMEFT+L"] * 2
    assert here[["raters", "items"]].to_numpy().tolist() == [[2, 9]] * 2
    paper = found[found["source"] == "paper"].set_index("question")
    assert paper["odds"].round(2).to_dict() == {"consistency": 1.8, "fluency": 0.77}
    assert paper["wins"].isna().all()
    turned = human_preferences(files, replace(key, editors=NAMES[::-1]))
    assert turned.loc[0, "odds"] == pytest.approx(7 / 10)
    assert turned.loc[0, "low"] == pytest.approx(1 / here.loc["consistency", "high"])


def test_a_rater_of_first_texts_prefers_neither_editor_and_it_shows(tmp_path):
    _, key = draw(PAIRS[:8], NAMES, seed=1)
    path = export(tmp_path, key, "x", lambda item, question: key.first[str(item)])
    row = human_preferences([path], key).iloc[0]
    assert (row["odds"], row["first"]) == (1.0, 1.0)
    assert row["low"] < 1 < row["high"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"page": "0" * 16}, "answers page '0000000000000000', and the key is of page"),
        (lambda d: d | {"format": "other"}, "is no file of answers"),
        (lambda d: [d], "is no file of answers"),
        (lambda d: d | {"rater": " "}, "does not say whose answers"),
        (lambda d: {k: v for k, v in d.items() if k != "rater"}, "does not say whose answers"),
        (lambda d: d | {"answers": [1, 2]}, "answers must be items"),
        (lambda d: d | {"answers": {**d["answers"], "10": {}}}, "answers item '10', which the page does not"),
        (lambda d: d | {"answers": {**d["answers"], "2": "first"}}, "item 2: 'first' is no choice"),
        (lambda d: d | {"answers": {**d["answers"], "2": {"consistency": "left", "fluency": "first"}}},
         "item 2: consistency is 'left'; it can be first, second$"),
        (lambda d: d | {"answers": {**d["answers"], "2": {"consistency": "tie", "fluency": "first"}}},
         "item 2: consistency is 'tie'"),
        (lambda d: d | {"answers": {**d["answers"], "2": {"consistency": ["first"], "fluency": "first"}}},
         "item 2: consistency is"),
        (lambda d: d | {"answers": {**d["answers"], "4": {"fluency": "first"}}},
         "not complete: 1 of 9 items lack an answer, the first is item 4"),
        (lambda d: d | {"answers": {k: v for k, v in d["answers"].items() if int(k) < 4}},
         "not complete: 6 of 9 items"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_used_are_one_clear_line(tmp_path, change, message):
    _, key = draw(PAIRS, NAMES, seed=0)
    path = export(tmp_path, key, "x", lambda *_: "ROME")
    assert human_preferences([path], key).loc[0, "wins"] == 9, "before the change it is read"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(RatingError, match=message) as caught:
        human_preferences([path], key)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_same_texts_in_another_order_are_another_page(tmp_path):
    """Else a key of the other order would turn every preference round."""
    _, key = draw(PAIRS, NAMES, seed=0)
    path = export(tmp_path, key, "x", lambda *_: "ROME")
    swapped = [replace(each, a=each.b, b=each.a) for each in PAIRS]
    for other in (draw(PAIRS, NAMES, seed=1)[1], draw(swapped, NAMES, seed=0)[1]):
        with pytest.raises(RatingError, match="and the key is of page"):
            human_preferences([path], other)
    again = draw(PAIRS, NAMES, seed=0)[1]
    assert human_preferences([path], again).loc[0, "wins"] == 9


def test_files_that_are_no_answers_are_refused(tmp_path):
    _, key = draw(PAIRS, NAMES, seed=0)
    one = export(tmp_path, key, "x", lambda *_: "ROME")
    copy = tmp_path / "copy.json"
    copy.write_bytes(one.read_bytes())
    with pytest.raises(RatingError, match=r"x\.json and .*copy\.json are both of rater 'x'"):
        human_preferences([one, copy], key)
    with pytest.raises(RatingError, match="no answers were given"):
        human_preferences([], key)
    write_key(key, tmp_path / "key.json")
    with pytest.raises(RatingError, match="saves; it is a key"):
        human_preferences([tmp_path / "key.json"], key)
    with pytest.raises(RatingError, match="it is a rater's answers"):
        human_preferences([one], one)
    for content in (b'{"format": ', b"\xff\xfe", b"[" * 100_000):
        copy.write_bytes(content)
        with pytest.raises(RatingError, match="is not JSON in UTF-8"):
            human_preferences([copy], key)
    with pytest.raises(RatingError, match=r"cannot read .*none"):
        human_preferences([tmp_path / "none"], key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "is no key"),
        ({"editors": ["ROME"]}, "its editors cannot be used"),
        ({"seed": "1"}, "its seed cannot be used"),
        ({"first": {"1": 2}}, "its first cannot be used"),
        ({"first": {}, "cases": {}}, "do not fit"),
        ({"editors": ["ROME", "KE"]}, "do not fit"),
        ({"cases": {"1": ""}}, "do not fit"),
    ],
)
def test_a_damaged_key_is_one_clear_line(tmp_path, change, message):
    _, key = draw(PAIRS, NAMES, seed=0)
    path = tmp_path / "key.json"
    write_key(key, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RatingError, match=message):
        read_key(path)


# --- intervals ----------------------------------------------------------------------------------


def slow_interval(wins, losses):
    """Delta method and random effects of raters and items, cell by cell from the textbook's sums of squares."""
    raters, items = len(wins), len(wins[0])
    cells = raters * items
    won, lost = sum(map(sum, wins)), sum(map(sum, losses))
    z = [
        [cells * (w / won - q / lost) for w, q in zip(*rows, strict=True)]
        for rows in zip(wins, losses, strict=True)
    ]
    row = [sum(each) / items for each in z]
    column = [sum(each[i] for each in z) / raters for i in range(items)]
    ss_r, ss_i = items * sum(x * x for x in row), raters * sum(x * x for x in column)
    ss_all = sum(x * x for each in z for x in each)
    ms_r, ms_i = ss_r / (raters - 1), ss_i / (items - 1)
    rest = (raters - 1) * (items - 1)
    ms_e = (ss_all - ss_r - ss_i) / rest
    var_r, var_i = max(0, (ms_r - ms_e) / items), max(0, (ms_i - ms_e) / raters)
    variance = var_r / raters + var_i / items + ms_e / cells
    freedom = (variance * cells) ** 2 / (
        ms_r**2 / (raters - 1) + ms_i**2 / (items - 1) + ms_e**2 / rest
    )
    margin = t.ppf(0.975, freedom) * math.sqrt(variance)
    return won / lost * math.exp(-margin), won / lost * math.exp(margin)


@pytest.mark.parametrize("seed", range(6))
def test_the_interval_is_the_textbooks(seed):
    random = np.random.default_rng(seed)
    raters, items = random.integers(2, 9, 2)
    choice = random.choice(3, size=(raters, items), p=[0.5, 0.3, 0.2])
    choice.flat[:2] = 0, 1
    wins, losses = choice == 0, choice == 1
    found = odds_interval(wins, losses)
    expected = slow_interval(wins.astype(int).tolist(), losses.astype(int).tolist())
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.over == "raters and items"


def test_one_raters_interval_is_that_of_independent_items():
    wins = np.array([[True] * 30 + [False] * 20])
    losses = np.array([[False] * 35 + [True] * 15])
    found = odds_interval(wins, losses)
    margin = t.ppf(0.975, 49) * math.sqrt((1 / 30 + 1 / 15) * 50 / 49)
    assert (found.odds, found.over) == (2.0, "items")
    assert (found.low, found.high) == pytest.approx((2 * math.exp(-margin), 2 * math.exp(margin)))
    turned = odds_interval(wins.T, losses.T)
    assert (turned.low, turned.high, turned.over) == (found.low, found.high, "raters")


@pytest.mark.parametrize(
    ("raters", "items", "n"), [(1, 50, 50), (15, 50, 15), (3, 2, 2), (1, 1, 1)]
)
def test_where_all_agree_the_bound_is_the_binomial_one(raters, items, n):
    every, none = np.ones((raters, items), dtype=bool), np.zeros((raters, items), dtype=bool)
    found, turned = odds_interval(every, none), odds_interval(none, every)
    share = beta.ppf(0.025, n, 1)
    assert (found.odds, found.high) == (math.inf, math.inf)
    assert found.low == pytest.approx(share / (1 - share))
    assert (turned.odds, turned.low, turned.high) == (0, 0, pytest.approx(1 / found.low))


def test_ties_alone_say_nothing():
    none = np.zeros((3, 4), dtype=bool)
    found = odds_interval(none, none)
    assert math.isnan(found.odds)
    assert (found.low, found.high) == (0, math.inf)


@pytest.mark.parametrize(("raters", "spread"), [(15, 0.0), (15, 0.8), (4, 0.8)])
def test_intervals_cover_other_raters_and_items_and_those_of_single_judgements_do_not(
    raters, spread
):
    """Each rater and each item leans to one side; the truth is the odds over all of them."""
    random, items, runs = np.random.default_rng(0), 50, 400
    leaning = 0.6 + math.hypot(spread, 1.0) * np.random.default_rng(1).normal(size=2_000_000)
    share = (1 / (1 + np.exp(-leaning))).mean()
    truth, covered, naive = share / (1 - share), 0, 0
    for _ in range(runs):
        lean = spread * random.normal(size=(raters, 1)) + random.normal(size=(1, items)) + 0.6
        wins = random.random((raters, items)) < 1 / (1 + np.exp(-lean))
        found = odds_interval(wins, ~wins)
        covered += found.low <= truth <= found.high
        margin = 1.96 * math.sqrt(1 / wins.sum() + 1 / (~wins).sum())
        naive += abs(math.log(found.odds / truth)) <= margin
    assert 0.925 <= covered / runs <= 0.985
    assert naive / runs < 0.8


# --- texts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    every = [
        each for each in counterfact(only=["sport", "language"]).test if each.generation_prompts
    ]
    return every[:3]


def test_texts_are_what_the_model_writes_under_either_edit(atlas, records):
    config = {"moment": "identity", "steps": 3, "contexts": ["{}"]}
    before = {name: each.clone() for name, each in atlas.state_dict().items()}
    bare = replace(records[0], generation_prompts=())
    made, left_out = compare(
        atlas, (rome, config), (None, None), [bare, *records], n=2, passages=2, length=30, seed=7
    )
    assert left_out == [(str(bare.case_id), NO_PROMPT)]
    assert len(made) == 2
    assert all(bool((atlas.state_dict()[name] == each).all()) for name, each in before.items())
    for found, record in zip(made, records, strict=False):
        assert found.case == str(record.case_id)
        assert found.fact == f"{record.rewrite.prompt} {record.target_new.text}."
        prompts = list(record.generation_prompts[:2])
        count = max(len(models.tokenizer(atlas)(each)["input_ids"]) for each in prompts)
        options = {"max_new_tokens": 30 - count, "top_k": 5, "seed": 7 + record.case_id}
        edit = rome(atlas, record.rewrite, config)
        with applied(atlas, edit):
            assert found.a == "\n\n".join(generate(atlas, prompts, **options))
        assert found.b == "\n\n".join(generate(atlas, prompts, **options)) != found.a


def test_equal_texts_and_failed_edits_are_left_out_by_themselves(atlas, records):
    made, left_out = compare(atlas, (None, None), (None, None), records, length=20)
    assert (made, left_out) == ([], [(str(each.case_id), SAME) for each in records])

    def broken(model, rewrite, config):
        if rewrite.subject == records[1].subject:
            raise EditError("no way")
        return rome(model, rewrite, {"moment": "identity", "steps": 3, "contexts": ["{}"]})

    made, left_out = compare(atlas, (None, None), (broken, None), records, length=40)
    assert left_out == [(str(records[1].case_id), "EditError: no way")]
    assert [each.case for each in made] == [str(records[0].case_id), str(records[2].case_id)]


def test_texts_round_trip_and_what_is_wrong_in_them_is_named(tmp_path):
    path = tmp_path / "texts.json"
    pairs = [*PAIRS, Comparison(EVIL, "a\n\nb, c", '"x"')]
    write_texts(pairs, path)
    assert read_texts(path) == pairs
    table = tmp_path / "texts.csv"
    table.write_text('a,b,fact\n"one, two",three,Four.\n', encoding="utf-8")
    assert read_texts(table) == [Comparison("Four.", "one, two", "three")]
    for name, content, message in (
        ("x.csv", "fact,a\nx,y\n", "row 0: no b; it has fact, a"),
        ("x.csv", "fact,a,b\nx,y,z,w\n", "row 0: more cells"),
        ("x.csv", "fact,a,b\nx,y,\n", "row 0: b must be text, not ''"),
        ("x.csv", "fact,a,b\n", "holds no texts"),
        ("x.json", '[{"fact": "x", "a": "y", "b": 3}]', "row 0: b must be text, not 3"),
        ("x.json", '[["x"]]', r"row 0: \['x'\] is no row with fact, a, b"),
        ("x.json", '{"fact": "x"}', "must hold a list of rows"),
        ("x.json", "[", "is not JSON"),
        ("x.txt", "", "neither .json nor .csv"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(RatingError, match=message):
            read_texts(tmp_path / name)
    with pytest.raises(RatingError, match="cannot read the texts"):
        read_texts(tmp_path / "none.csv")


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, atlas):
    monkeypatch.setattr(rating, "load", lambda *_: atlas)
    monkeypatch.setenv("COLUMNS", "250")

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, ["rate", *map(str, arguments)])
        assert result.exit_code == code, result.output + str(result.exception)
        if code:
            assert len([x for x in result.stderr.splitlines() if x.startswith("factlens:")]) == 1
        return result

    return call


def test_make_edits_writes_and_hides_and_odds_reads_it_back(run, tmp_path, records):
    write_records(records, tmp_path / "records.json")
    config = tmp_path / "fast.yaml"
    config.write_text("steps: 3\nmoment: identity\ncontexts: ['{}']\n")
    out = tmp_path / "out"
    options = ["--records", tmp_path / "records.json", "--config-a", config, "-n", 2]
    said = run("make", "-a", "rome-identity", "-b", "none", *options, "--out", out, "--length", 40)
    assert "2 pairs of texts" in said.output
    assert sorted(path.name for path in out.iterdir()) == ["key.json", "rate.html", "texts.json"]
    key = read_key(out / "key.json")
    assert key.editors == ("rome-identity (fast)", "none")
    settings, none = key.about["settings"]
    assert (settings["steps"], settings["moment"], none) == (3, "identity", None)
    assert len(read_texts(out / "texts.json")) == 2
    page = (out / "rate.html").read_text(encoding="utf-8")
    assert "identity" not in page
    assert items_of(page)["page"] == key.page
    shown = [Shown(**each) for each in items_of(page)["items"]]
    texts = read_texts(out / "texts.json")
    assert [x.first == y.a for x, y in zip(shown, texts, strict=True)] == [
        key.first[each.id] == key.editors[0] for each in shown
    ]
    files = [export(tmp_path, key, f"r{n}", lambda *_: key.editors[0]) for n in range(3)]
    said = run("odds", *files, "--key", out / "key.json", "--out", tmp_path / "odds.csv")
    for words in ("consistent", "fluent", "inf", "1.80", "0.77", "raters and items"):
        assert words in said.output
    assert (tmp_path / "odds.csv").read_text().startswith("source,question,editor")
    again = run("make", "--out", out, code=2)
    assert "holds the key of an earlier page" in again.stderr


def test_make_takes_ready_texts_of_any_two_editors(run, tmp_path):
    table, out = tmp_path / "texts.json", tmp_path / "o"
    write_texts([*PAIRS, Comparison("Same.", "x", "x")], table)
    said = run("make", "--texts", table, "-a", "ROME", "-b", "FT+L", "--out", out, "--seed", 4)
    assert "1 rows left out" in said.output
    assert read_key(out / "key.json").first == draw(PAIRS, NAMES, seed=4)[1].first
    assert (out / "rate.html").read_text("utf-8") == rating_page(draw(PAIRS, NAMES, seed=4)[0])
    other = tmp_path / "other"
    run("make", "--texts", table, "-a", "ROME", "-b", "FT+L", "--out", other, "-n", 3, "--ties")
    key = read_key(other / "key.json")
    assert (len(key.first), key.ties, key.seed > 2**64) == (3, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["make", "-a", "KE"],
            "no editor 'KE'; there are rome, ft, ft-l, attn-edit, kn, mend, mend-cf, mend-zsre, ke, ke-cf, ke-zsre, rome-identity, none",
        ),
        (["make", "-a", "rome", "-b", "rome"], "both editors are rome"),
        (["make", "--texts", "no.csv", "-a", "x", "-b", "x"], "both editors are x"),
        (
            ["make", "-b", "none", "--config-b", "x.yaml"],
            "only ROME's settings can be given, not those of 'none'",
        ),
        (["make", "--config-a", "x.yaml"], "x.yaml"),
        (["make", "--texts", "no.csv", "--config-a", "x.yaml"], "x.yaml has no use beside --texts"),
        (["make", "--texts", "no.csv"], "cannot read the texts no.csv"),
        (["odds", "no.json", "--key", "key.json"], "cannot read key.json"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in run(*arguments, code=2).stderr
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_identical_texts_are_seen_through_spaces_at_their_ends():
    assert identical(Comparison("f", "x\n", " x"))
    assert not identical(Comparison("f", "x", "y"))
