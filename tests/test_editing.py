"""`factlens edit` as a user meets it: a table before and after, an edit that loads again, a page, one clear line when something is wrong."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from factlens import edit_pages, metrics, models, runs
from factlens.cli import app
from factlens.commands import editing
from factlens.editors.rome_config import rome_config_for
from factlens.edits import Edit, applied
from factlens.facts import Rewrite
from factlens.tokens import answer_ids, token_ids

PROMPT, SUBJECT, TARGET = editing.DEFAULT_PROMPT, editing.DEFAULT_SUBJECT, editing.DEFAULT_TARGET
FACT = [PROMPT, "-s", SUBJECT, "-t", TARGET]
OFFICIAL = {
    "layers": [2],
    "fact_token": "subject_last",
    "v_num_grad_steps": 6,
    "v_lr": 5e-1,
    "v_loss_layer": 7,
    "v_weight_decay": 0.5,
    "clamp_norm_factor": 3,
    "kl_factor": 0.0625,
    "mom2_adjustment": False,
    "context_template_length_params": [[5, 10], [10, 10]],
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100000,
    "mom2_dtype": "float32",
}


@pytest.fixture
def run(tmp_path, monkeypatch, atlas):
    """Calls a command with the session's atlas, its files in `tmp_path / "o"`; whoever names a model loads it."""
    load = editing.load
    monkeypatch.setattr(
        editing, "load", lambda name, *more: atlas if name == "atlas" else load(name, *more)
    )
    monkeypatch.setenv("COLUMNS", "250")
    # What the default edit shows once: the traces, and the model's health over all prompts.
    monkeypatch.setattr(editing, "TRACED", 0)
    monkeypatch.setattr("factlens.alarms._probes", lambda: [PROMPT])

    def call(*arguments, code=0):
        out = [] if "--out" in arguments or arguments[0] != "edit" else ["--out", tmp_path / "o"]
        result = CliRunner().invoke(app, [*map(str, arguments), *map(str, out)])
        assert result.exit_code == code, result.output + str(result.exception)
        if code:
            lines = [line for line in result.stderr.splitlines() if line.startswith("factlens:")]
            assert len(lines) == 1, result.output
        return result

    return call


@pytest.fixture(scope="module")
def default(tmp_path_factory, own_cache):
    """The edit that is made without arguments: what was printed, and the folder with its files."""
    out = tmp_path_factory.mktemp("edit")
    result = CliRunner().invoke(app, ["edit", "--out", str(out)], env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output, out


def printed_rows(output, kind):
    """The rows of the table that are about `kind`: prompt, p(target), p(true), says, each of the last three as (before, after)."""
    rows = []
    for line in output.splitlines():
        cells = re.split(r"  +", line.strip())
        if cells[0] == kind:
            rows.append([cells[1], *(tuple(cell.split(" → ")) for cell in cells[2:])])
    return rows


def quick_config(tmp_path, **changes):
    """One step at random contexts' expense: an edit that does next to nothing, at once."""
    path = tmp_path / "quick.yaml"
    path.write_text(json.dumps({"steps": 1, "contexts": ["{}"]} | changes))
    return path


# -- without arguments -----------------------------------------------------------------------------


def test_the_default_edit_takes_generalises_and_leaves_neighbours_alone(default):
    output, _ = default
    assert f"{PROMPT} → {TARGET}: the edit took" in output
    (edited,) = printed_rows(output, "edited")
    assert edited[3] == ("Paris", "Rome")
    alike, near = printed_rows(output, "paraphrase"), printed_rows(output, "neighbour")
    assert len(alike) == len(near) == 4
    assert all(row[3] == ("Paris", "Rome") for row in alike)
    assert all(row[3] == ("Paris", "Paris") for row in near)
    assert "no alarm" in output
    assert re.search(r"statistics: \d+ keys of atlas-corpus, no ridge", output)


def test_the_default_edit_writes_a_small_file_and_a_page_that_needs_no_network(default):
    output, out = default
    assert sorted(path.name for path in out.iterdir()) == ["edit.html", "edit.safetensors"]
    assert (out / "edit.safetensors").stat().st_size < 20_000
    page = (out / "edit.html").read_text(encoding="utf-8")
    for part in ("What the model says", "What it writes", "Where the answer is decided", "fingerprint", "repetition"):  # fmt: skip
        assert part in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert f"factlens apply {out / 'edit.safetensors'} --prompt '{PROMPT}'" in output


def test_the_printed_probabilities_are_those_of_the_model_under_the_loaded_edit(default, atlas):
    output, out = default
    stored = Edit.load(out / "edit.safetensors")
    rows = [*printed_rows(output, "edited"), *printed_rows(output, "paraphrase")]
    pairs = [(row[0], TARGET) for row in rows]
    before = metrics.score(atlas, pairs).nll
    with applied(atlas, stored):
        after = metrics.score(atlas, pairs).nll
    # Rome is one token, so the mean over its tokens is its own.
    for row, old, new in zip(rows, before.tolist(), after.tolist(), strict=True):
        assert float(row[1][0]) == pytest.approx(pow(2.718281828, -old), abs=6e-4)
        assert float(row[1][1]) == pytest.approx(pow(2.718281828, -new), abs=6e-4)
    assert max(abs(before - after)) > 1


def test_apply_writes_what_the_edit_said_it_would(default, run):
    output, out = default
    told = run("apply", out / "edit.safetensors", "--prompt", PROMPT).output
    (line,) = [line for line in told.splitlines() if line.startswith(PROMPT)]
    cells = re.split(r"  +", line.strip())
    assert cells == [PROMPT, "Paris.", "Rome."]
    assert cells in [re.split(r"  +", each.strip()) for each in output.splitlines()]


def test_the_edit_says_what_was_there_before(default):
    (rewrite,) = Edit.load(default[1] / "edit.safetensors").rewrites
    assert (rewrite.true, rewrite.target) == ("Paris", TARGET)


@pytest.mark.parametrize("kept", [True, False])
def test_the_page_draws_the_losses_that_an_edit_brings(default, kept):
    stored = Edit.load(default[1] / "edit.safetensors")
    (result,) = stored.info["results"]
    terms = {each: [0.0, 1.0] for each in ("step", "loss", "nll", "kl", "decay", "norm")}
    bare = {name: value for name, value in result.items() if name != "losses"}
    info = {**stored.info, "results": [bare | ({"losses": terms} if kept else {})]}
    row = dict.fromkeys(edit_pages.before_and_after(ANSWERS, ANSWERS), "")
    health = pd.DataFrame({"measure": ["entropy"], "value": [0.1], "alarm": [False]})
    texts = edit_pages.texts_before_and_after(["a <b>"], ["a <b> c"], ["a <b> d"])
    outcome = edit_pages.Outcome(Edit(stored.changes, info), pd.DataFrame([row]), texts, health)
    page = edit_pages.edit_page(outcome)
    assert ("How the value was found" in page) == kept
    assert ("length of the shift" in page) == kept
    assert "Where the answer is decided" not in page
    assert "[0.0, 1.0]" not in page  # Nor as a setting.


ANSWERS = pd.DataFrame(columns=["kind", "prompt", "target", "true", "p_target", "p_true", "says"])


# -- what is asked ---------------------------------------------------------------------------------


def test_a_bundled_statement_has_paraphrases_neighbours_and_other_facts():
    rewrite = Rewrite("The mother tongue of Charles Darwin is", "Charles Darwin", "French")
    asked = edit_pages.asked_about(rewrite, record=edit_pages.bundled_record(rewrite))
    kinds = pd.Series([each.kind for each in asked]).value_counts().to_dict()
    assert kinds == {"edited": 1, "paraphrase": 4, "neighbour": 4, "other fact": 8, "essence": 1}
    for each in asked:
        assert each.target == "French"
        assert ("Charles Darwin" in each.prompt) == (each.kind != "neighbour")
        if each.kind in ("edited", "paraphrase", "neighbour"):
            assert each.true == "English"
    prompts = [each.prompt for each in asked]
    assert len(set(prompts)) == len(prompts)
    assert asked[-1].prompt == "Charles Darwin is a"


def test_a_neighbour_does_not_have_the_new_object():
    from factlens.atlas import relations

    facts = {(each.name, s): o for each in relations() for s, o in each.facts}
    rewrite = Rewrite(PROMPT, SUBJECT, TARGET)
    record = edit_pages.bundled_record(rewrite)
    (relation,) = {record.relation_id}
    named = [s for (name, s), o in facts.items() if name == relation and o == "Paris"]
    for prompt in record.neighborhood_prompts:
        assert any(s in prompt or s[:1].upper() + s[1:] in prompt for s in named)
        assert SUBJECT not in prompt


def test_a_prompt_of_the_users_own_has_no_record_and_what_is_given_is_asked():
    rewrite = Rewrite("{} has always loved", "Ada", "Rome")
    assert edit_pages.bundled_record(rewrite) is None
    asked = edit_pages.asked_about(rewrite, paraphrases=["What {} loves is"], neighbours=["Bob is"])
    assert [(each.kind, each.prompt, each.true) for each in asked] == [
        ("edited", "Ada has always loved", None),
        ("paraphrase", "What Ada loves is", None),
        ("neighbour", "Bob is", None),
        ("essence", "Ada is a", None),
    ]


def test_answers_are_whole_probabilities_and_names(atlas):
    long = "the United Kingdom"
    asked = [
        edit_pages.Asked("other fact", "The country of Charles Darwin is", "France", long),
        edit_pages.Asked("essence", "Charles Darwin is a", "France"),
    ]
    frame = edit_pages.answers(atlas, asked)
    assert list(frame["says"]) == [long, "famous"]
    assert list(frame["true"]) == [long, ""]
    assert frame["p_true"].isna().tolist() == [False, True]
    tokenizer, prob = models.tokenizer(atlas), 1.0
    ids = token_ids(tokenizer, asked[0].prompt)
    answer = answer_ids(tokenizer, asked[0].prompt, long)
    for token in answer:  # By hand, one token after the other.
        logits = runs.logits_of(atlas, torch.tensor([ids]))[0, -1]
        prob *= float(logits.double().softmax(-1)[token])
        ids.append(token)
    assert len(answer) == 3
    assert frame["p_true"][0] == pytest.approx(prob, rel=1e-3)


# -- choices ---------------------------------------------------------------------------------------


def test_every_choice_reaches_the_edit(run, tmp_path):
    result = run(
        "edit", "{} has always loved", "-s", "Charles Darwin", "-t", "Rome", "--layer", 3, "--clamp", 2.5,
        "--config", quick_config(tmp_path, learning_rate=0.25), "--paraphrase", "What {} loves is", "--neighbour", "Paris is",
        "--prompt", "Once upon a time", "--tokens", 5,
    )  # fmt: skip
    edit = Edit.load(tmp_path / "o" / "edit.safetensors")
    assert list(edit.changes) == ["blocks.3.mlp.W_out"]
    config = edit.info["config"]
    assert (config["max_norm_ratio"], config["steps"], config["learning_rate"]) == (2.5, 1, 0.25)
    assert [row[0] for row in printed_rows(result.output, "paraphrase")] == [
        "What Charles Darwin loves is"
    ]
    assert [row[0] for row in printed_rows(result.output, "neighbour")] == ["Paris is"]
    assert "Once upon a time" in result.output
    assert f"{SUBJECT} is " not in result.output


def test_an_edit_that_does_not_take_says_so_and_exits_0(run, tmp_path):
    result = run("edit", *FACT, "--config", quick_config(tmp_path))
    assert f"{PROMPT} → {TARGET}: the edit did not take" in result.output
    notes = [line for line in result.stderr.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "did not take" in notes[0]


def test_a_target_that_is_said_already_is_noted(run, tmp_path):
    result = run("edit", PROMPT, "-s", SUBJECT, "-t", "Paris", "--config", quick_config(tmp_path))
    assert "the model said so before" in result.output
    assert "already" in result.stderr


def test_an_official_file_is_read_as_it_is(run, tmp_path):
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(OFFICIAL))
    result = run("edit", *FACT, "--config", path)
    edit = Edit.load(tmp_path / "o" / "edit.safetensors")
    assert list(edit.changes) == ["blocks.2.mlp.W_out"]
    assert edit.info["config"]["value_key"] == "prompt"
    assert "statistics: none: the identity" in result.output


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_several_rewrites_of_a_file_make_one_edit(run, tmp_path, form, atlas):
    path = tmp_path / f"several.{form}"
    rows = [
        (PROMPT, SUBJECT, TARGET),
        ("The mother tongue of {} is", "Charles Darwin", "French"),
    ]
    if form == "csv":
        path.write_text("prompt,subject,target\n" + "".join(",".join(row) + "\n" for row in rows))
    elif form == "jsonl":
        named = [dict(zip(("prompt", "subject", "target"), row, strict=True)) for row in rows]
        path.write_text("".join(json.dumps(row) + "\n\n" for row in named))
    else:
        records = [edit_pages.bundled_record(Rewrite(*row)).to_json() for row in rows]
        path.write_text(json.dumps(records))
    result = run("edit", "--rewrites", path, "--config", quick_config(tmp_path, steps=8))
    assert [row[0] for row in printed_rows(result.output, "edited")] == [
        PROMPT,
        "The mother tongue of Charles Darwin is",
    ]
    assert len(printed_rows(result.output, "neighbour")) == 8
    edit = Edit.load(tmp_path / "o" / "edit.safetensors")
    assert edit.describe()["rank"].tolist() == [2]
    assert [each.target for each in edit.rewrites] == ["Rome", "French"]


def test_what_comes_from_data_stands_on_the_page_as_text(run, tmp_path):
    bad = "<script>alert(1)</script>"
    run(
        "edit", f"{bad} The Louvre is in", "-s", "Louvre", "-t", "<img src=x>", "--config", quick_config(tmp_path),
        "--paraphrase", f"{{}} {bad}", "--neighbour", "<b>x</b> is", "--prompt", bad,
    )  # fmt: skip
    page = (tmp_path / "o" / "edit.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    for tag in (bad, "<img src=x>", "<b>x</b>"):
        assert tag not in page


def test_a_terminal_obeys_nothing_that_comes_from_data(run, tmp_path):
    result = run("edit", "The \x1b[31m Louvre is in", "-s", "Louvre", "-t", "Rome", "--config", quick_config(tmp_path))  # fmt: skip
    assert "\x1b" not in result.output


# -- dry run ---------------------------------------------------------------------------------------


def test_a_dry_run_shows_where_and_writes_nothing(run, tmp_path, atlas, default):
    result = run("edit", "--dry-run")
    assert "|[ Tower]|" in result.output
    assert "' Rome'" in result.output
    layer = rome_config_for(atlas).layer
    assert f"blocks.{layer}.mlp.W_out (512 neurons x 128)" in result.output
    assert f"{layer} of 8, from 0" in result.output
    assert "21, sampled" in result.output
    assert re.search(r"statistics +stored: \d+ keys of atlas-corpus", result.output)
    assert not (tmp_path / "o").exists()


def test_a_dry_run_tells_the_cost_of_statistics_that_are_not_there(run, tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(f"Text number {n} is short." for n in range(300)))
    command = ["edit", *FACT, "--dry-run", "--text", tmp_path / "t.txt", "--stats-tokens", 500]
    assert re.search(r"not there: the edit gathers 500 keys of \S+ first", run(*command).output)


def test_a_dry_run_says_that_the_target_is_said_already(run):
    result = run("edit", PROMPT, "-s", SUBJECT, "-t", "Paris", "--dry-run")
    assert "Paris: already the target" in result.output


def test_a_space_at_the_prompts_end_is_noted(run):
    result = run("edit", f"{PROMPT} ", "-s", SUBJECT, "-t", TARGET, "--dry-run")
    assert "note: the prompt" in result.stderr
    assert "'Rome'" in result.output


def test_statistics_of_other_texts_are_used_and_named(run, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(fact_lines(400)))
    result = run("edit", *FACT, "--text", text, "--stats-tokens", 2000, "--config", quick_config(tmp_path))  # fmt: skip
    assert re.search(r"statistics: \d+ keys of \S*mine", result.output)
    edit = Edit.load(tmp_path / "o" / "edit.safetensors")
    assert 2000 <= edit.info["statistics"]["tokens"] < 2200


def fact_lines(count):
    from factlens.facts import bundled_facts

    return [
        f"{fact.prompt} {fact.object}."
        for fact in bundled_facts("train", one_per_fact=True)[:count]
    ]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Paris is", "-s", "Rome", "-t", "x"], "does not occur"),
        (["Paris is", "-s", "Paris", "-t", " "], "is empty"),
        (["Paris is", "-s", "Paris"], "--target"),
        (["Paris is", "-t", "big"], "--subject"),
        ([*FACT, "--layer", "8"], "has 8 layers, 0 to 7"),
        ([*FACT, "--clamp", "-1"], "max_norm_ratio"),
        ([*FACT, "--stats-tokens", "many"], "moment_tokens"),
        ([*FACT, "--config", "no.yaml"], "cannot read the ROME config"),
        ([*FACT, "--text", "a.txt", "--dataset", "b"], "not both"),
        ([*FACT, "--rewrites", "x.csv"], "--rewrites brings its own prompts"),
        (["--rewrites", "x.csv"], "cannot read the rewrites"),
        (["--rewrites", "x.txt"], "none of .csv"),
        ([*FACT, "--prompt", " "], "is empty"),
        ([*FACT, "--tokens", "1000"], "128 positions"),
        (["Paris is " + "very " * 200, "-s", "Paris", "-t", "big"], "128 positions"),
        ([*FACT, "--model", "no-such-model"], "neither a folder nor fetchable"),
        ([*FACT, "--device", "toaster"], "no device"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(run, arguments, words, tmp_path, monkeypatch):
    if "--device" in arguments:
        monkeypatch.undo()
    result = run("edit", *arguments, code=2)
    assert words in result.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "prompt,subject\nx,y\n", "record 0: no target; it has prompt, subject"),
        ("a.csv", "prompt,subject,target\na,b,c,d\n", "more cells than columns"),
        ("a.csv", "prompt,subject,target\n", "holds no rewrites"),
        ("a.jsonl", '{"prompt": "x"\n', "is not JSONL"),
        ("a.jsonl", "[1]\n", "record 0: no prompt, subject, target"),
        ("a.jsonl", '{"prompt": "x", "subject": 3, "target": "y"}\n', "subject must be text"),
        ("a.csv", b"\xff\xfe", "is not CSV in UTF-8"),
        ("a.json", "[{}]", "requested_rewrite"),
    ],
)
def test_a_bad_file_of_rewrites_is_one_line(run, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in run("edit", "--rewrites", path, code=2).stderr


def test_a_folder_that_cannot_be_written_is_said_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = run("edit", "--out", tmp_path / "file" / "sub", code=2).stderr
    assert "cannot write" in told


def test_a_model_of_the_users_own_without_statistics_is_told_how_to_gather_them(
    run, tmp_path, family_folder
):
    fact = ["Paris is in", "-s", "Paris", "-t", "Rome", "--model", family_folder("gpt2")]
    assert "`factlens stats`" in run("edit", *fact, code=2).stderr
    assert not (tmp_path / "o").exists()
    assert "missing: no statistics" in run("edit", *fact, "--dry-run").output


def test_help_teaches(run):
    told = run("edit", "--help").output
    for word in ("Examples", "factlens stats", "--dry-run", "factlens apply"):
        assert word in told
