"""Training MEND and KE: what is practised, a run that goes on as if it had not been killed, and that it helps."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial
from random import Random

import pandas as pd
import pytest
import torch
from builders import Killed, save_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from factlens import Rewrite, applied, corpora, load_model, metrics, models
from factlens.benchmarks import atlas_counterfact, atlas_zsre, zsre
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.benchmarks.counterfact import write_records
from factlens.benchmarks.draws import is_tuned
from factlens.cli import app
from factlens.editors.checkpoints import Trained, load
from factlens.editors.hypernetworks import edited_maps
from factlens.editors.ke import KE, KEConfig, ke
from factlens.editors.lessons import Lesson, Lessons, first_words, lessons
from factlens.editors.mend import MEND, MENDConfig, mend
from factlens.editors.training import CURVE, STATE, begin, drill, losses_of, measure, train
from factlens.errors import ConfigError, EditError, FactFileError, RunError
from factlens.fingerprints import provenance

pytestmark = [
    pytest.mark.filterwarnings("ignore:the edit of .* did not take"),
    pytest.mark.filterwarnings("ignore:the model says .* already"),
]

METHODS = {"mend": MEND, "ke": KE}
EDIT = {"mend": mend, "ke": ke}
SMALL = {"steps": 4, "batch": 2, "check_every": 2, "held": 2, "text_tokens": 12, "first_step": 0.02}
CONFIGS = {
    "mend": MENDConfig(**SMALL, rank=3),
    "ke": KEConfig(**SMALL, lstm=4, condition=6, hidden=5),
}
WORDS = ["stone", "river", "lamp", "cloud", "paper", "green", "seven", "moon"]


def some_lessons(count: int, start: int = 0) -> tuple[Lesson, ...]:
    return tuple(
        Lesson(
            Rewrite(f"The {one} of {number} is", one, other, WORDS[number % 8]),
            (f"Its {one} {number} is", f"So {number} {one} is"),
            (),
        )
        for number in range(start, start + count)
        for one, other in [(WORDS[number % 8], WORDS[(number * 3 + 1) % 8])]
    )


GIVEN = Lessons(some_lessons(12), some_lessons(4, 50), ("a text of it", "and another one"), "tests")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model with fewer blocks than are edited where there are more."""
    return save_model(tmp_path_factory.mktemp("shallow") / "gpt2", "gpt2", n_layer=2)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def state_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_goes_on_bit_for_bit(model, tmp_path, method):
    config, before = CONFIGS[method], state_of(model)
    whole = train(model, METHODS[method], "cf", GIVEN, tmp_path / "whole", config)

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(model, METHODS[method], "cf", GIVEN, tmp_path / "parts", config, progress=kill)
    seen: list[int] = []
    parts = train(
        model, METHODS[method], "cf", GIVEN, tmp_path / "parts", config,
        progress=lambda done, total: seen.append(done),
    )  # fmt: skip
    assert seen == [2, 3, 4]
    assert same(state_of(whole.network), state_of(parts.network))
    for name in (f"{method}-cf.safetensors", STATE):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert same(one, other)
    lines = [(tmp_path / run / CURVE).read_text() for run in ("whole", "parts")]
    assert lines[0] == lines[1]
    curve = [json.loads(line) for line in lines[0].splitlines()]
    assert [line["step"] for line in curve] == [0, 2, 4]
    assert (curve[1]["multiplier"] == 1.0) == (method == "mend")
    assert same(state_of(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted(
        [f"{method}-cf.safetensors", STATE, CURVE]
    )


def test_a_finished_training_is_not_done_again_and_goes_on_with_more_steps(model, tmp_path):
    config = CONFIGS["mend"]
    first = train(model, MEND, "cf", GIVEN, tmp_path, config)
    seen: list[tuple[int, int]] = []
    again = train(
        model, MEND, "cf", GIVEN, tmp_path, config, progress=lambda *told: seen.append(told)
    )
    assert seen == [(4, 4)]
    assert same(state_of(first.network), state_of(again.network))
    train(
        model,
        MEND,
        "cf",
        GIVEN,
        tmp_path,
        replace(config, steps=6),
        progress=lambda *t: seen.append(t),
    )
    assert seen[-3:] == [(4, 6), (5, 6), (6, 6)]
    whole = train(model, MEND, "cf", GIVEN, tmp_path / "whole", replace(config, steps=6))
    assert same(load_file(tmp_path / STATE), load_file(tmp_path / "whole" / STATE))
    assert not same(state_of(whole.network), state_of(begin(model, MEND, config, GIVEN)))


@pytest.mark.parametrize("method", METHODS)
def test_training_helps_on_held_out_lessons(model, tmp_path, method):
    config = replace(CONFIGS[method], steps=12, check_every=6, held=4, learning_rate=5e-3)
    untrained = begin(model, METHODS[method], config, GIVEN)
    drills = [drill(model, GIVEN.held, GIVEN.texts, Random("held"))]
    maps = edited_maps(model)
    before = measure(model, maps, untrained, drills)
    trained = train(model, METHODS[method], "cf", GIVEN, tmp_path, config)
    after = measure(model, maps, trained.network, drills)

    def loss(found) -> float:
        return config.edit_weight * (found["edit"] + found["paraphrase"]) / 2 + found["kl"]

    assert loss(after) < loss(before) - 0.02
    assert trained.info["held_out"]["loss"] == pytest.approx(loss(after), rel=1e-4)
    kept = load(tmp_path / f"{method}-cf.safetensors", METHODS[method])
    for found in (trained, kept):
        edit = EDIT[method](model, GIVEN.held[0].rewrite, found)
        assert edit.info["config"]["trained"]["held_out"] == trained.info["held_out"]


def test_the_network_that_was_best_on_held_out_lessons_is_kept(model, tmp_path, monkeypatch):
    found = iter([4.0, 3.0, 1.0, 2.0])  # The first is the untrained network's.
    monkeypatch.setattr(
        "factlens.editors.training.measure", lambda *given: {"edit": next(found), "kl": 0.5}
    )
    config = replace(CONFIGS["mend"], steps=3, check_every=1)
    trained = train(model, MEND, "cf", GIVEN, tmp_path, config)
    kept = trained.info["held_out"]
    assert (kept["step"], kept["loss"]) == (2, pytest.approx(0.6))
    tensors = load_file(tmp_path / STATE)
    for part, is_kept in (("best.", True), ("network.", False)):
        own = {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
        assert same(own, state_of(trained.network)) == is_kept


def test_losses_are_those_of_their_definitions(model):
    maps, config = edited_maps(model), CONFIGS["mend"]
    network = begin(model, MEND, config, GIVEN).eval()
    chosen = [GIVEN.train[0], replace(GIVEN.train[1], paraphrases=())]
    given = drill(model, chosen, GIVEN.texts, Random(1))
    assert given.owners == (0,)
    with torch.no_grad():
        found = losses_of(model, maps, network, given)
    trained = Trained(MEND, network, config, {**_identity(model), "data": "cf"})
    for number, lesson in enumerate(chosen):
        text = models.tokenizer(model).decode(
            [*given.texts[number].ids, given.texts[number].target[-1]]
        )
        tokens = torch.tensor([models.tokenizer(model)(text)["input_ids"]])
        with torch.no_grad():
            before = model.run_with_hooks(tokens, fwd_hooks=[])[0, :-1].log_softmax(-1)
            with applied(model, mend(model, lesson.rewrite, trained)):
                after = model.run_with_hooks(tokens, fwd_hooks=[])[0, :-1].log_softmax(-1)
                nll = metrics.score(model, [(lesson.rewrite.prompt, lesson.rewrite.target)]).nll
                if number == 0:
                    prompt = next(
                        p for p in lesson.paraphrases
                        if tuple(models.tokenizer(model)(p)["input_ids"]) == given.again[0].ids[: given.again[0].start + 1]
                    )  # fmt: skip
                    again = metrics.score(model, [(prompt, lesson.rewrite.target)]).nll
        kl = (before.exp() * (before - after)).sum(dim=-1).mean()
        assert float(found.kl[number]) == pytest.approx(float(kl), rel=1e-3)
        assert float(found.kl[number]) > 0.001
        assert float(found.edit[number]) == pytest.approx(float(nll[0]), rel=1e-4)
    assert float(found.again[0]) == pytest.approx(float(again[0]), rel=1e-4)
    assert float(found.said) == pytest.approx(float(torch.cat([found.edit, found.again]).mean()))


def _identity(model) -> dict[str, object]:
    return {name: provenance(model)[name] for name in ("model", "fingerprint", "dtype")}


def test_another_training_and_a_damaged_state_are_refused(model, family_model, tmp_path):
    config = replace(CONFIGS["mend"], steps=2)
    train(model, MEND, "cf", GIVEN, tmp_path, config)
    for method, given, numbers, words in (
        (MEND, GIVEN, replace(config, rank=4), "rank was 3, now 4"),
        (MEND, replace(GIVEN, source="other"), config, "source was 'tests', now 'other'"),
        (KE, GIVEN, CONFIGS["ke"], "method was 'mend', now 'ke'"),
    ):
        with pytest.raises(RunError, match=words):
            train(model, method, "cf", given, tmp_path, numbers)
    with pytest.raises(RunError, match="model was 'gpt2', now 'gptj'; fingerprint was"):
        train(family_model("gptj"), MEND, "cf", GIVEN, tmp_path, config)
    with pytest.raises(EditError, match="not a number at step 0"):
        train(model, MEND, "cf", GIVEN, tmp_path / "nan", replace(config, first_step=1e30))
    state = tmp_path / STATE
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(RunError, match=r"no state of a training, or is cut short .* remove it"):
        train(model, MEND, "cf", GIVEN, tmp_path, config)
    with pytest.raises(ConfigError, match="rank is 0; it must be a whole number of at least 1"):
        MENDConfig(rank=0)


# -- what is practised -----------------------------------------------------------------------------


def test_first_words_are_whole_and_as_many_as_fit(model, atlas):
    tokenizer = models.tokenizer(model)  # One token a character.
    assert first_words(tokenizer, "one  two\nthree", 99) == "one two three"
    assert first_words(tokenizer, "one two three", 8) == "one two"
    assert first_words(tokenizer, "one two three", 7) == "one two"
    assert first_words(tokenizer, "one two three", 6) == "one"
    assert first_words(tokenizer, "one two", 2) == ""
    text = next(each for each in corpora.bundled().documents(0) if len(each) > 200)
    cut = first_words(models.tokenizer(atlas), text, 10)
    assert " ".join(text.split()).startswith(f"{cut} ")
    assert 1 <= len(models.tokenizer(atlas)(cut)["input_ids"]) <= 10


@pytest.fixture
def few(monkeypatch):
    """Fewer documents and draws than there are."""
    monkeypatch.setattr("factlens.editors.lessons.DOCUMENTS", 400)
    monkeypatch.setattr("factlens.editors.lessons.SEEDS", 2)


def test_lessons_of_records_are_of_other_subjects_than_what_is_tested(atlas, few, monkeypatch):
    some = {"only": ["sport", "instrument", "language"]}
    monkeypatch.setattr(atlas_counterfact, "counterfact", partial(counterfact, **some))
    given = lessons(atlas, "cf", corpora.bundled())
    subjects = {each.rewrite.subject.casefold() for each in given.train}
    held = {each.rewrite.subject.casefold() for each in given.held}
    assert not subjects & held
    assert all(is_tuned(subject) for subject in subjects | held)
    tested = counterfact(**some).test
    assert not {each.subject.casefold() for each in tested} & (subjects | held)
    assert len(given.train) > len(subjects) > 10
    assert all(
        each.paraphrases and each.rewrite.true and not each.unrelated for each in given.train
    )
    lengths = [len(models.tokenizer(atlas)(text)["input_ids"]) for text in given.texts]
    assert 8 <= min(lengths) <= max(lengths) <= 32


def test_lessons_of_questions_keep_the_answers_to_others(model, few, monkeypatch):
    records = tuple(
        zsre.Record(
            n, f"Ann {n}", f"Who is Ann {n}?", f"Ann {n}, who?", ("Bob",), "What is it", "tea"
        )
        for n in range(80)
    )

    def drawn(seed: int = 0):
        return atlas_zsre.Records(records if seed == 0 else records[:5], pd.DataFrame())

    monkeypatch.setattr(atlas_zsre, "zsre", drawn)
    given = lessons(model, "zsre", corpora.bundled(), text_tokens=16)
    made = (*given.train, *given.held)
    assert {each.rewrite for each in made} == {r.rewrite for r in records if is_tuned(r.subject)}
    assert {each.unrelated for each in made} == {("What is it? tea",)}
    assert all(each.paraphrases == (f"{each.rewrite.subject}, who?",) for each in made)


def test_lessons_of_plain_text_go_on_with_other_words(atlas, few):
    given = lessons(atlas, "generic", corpora.bundled())
    assert len(given.train) > 5 * len(given.held) > 20
    for each in given.held:
        rewrite, (paraphrase,) = each.rewrite, each.paraphrases
        assert rewrite.prompt.endswith(f" {paraphrase}")
        assert rewrite.target != rewrite.true
        assert len(models.tokenizer(atlas)(f" {rewrite.target}")["input_ids"]) <= 11
        assert len(rewrite.prompt.split()) >= 8


def test_records_of_a_file_are_taken_by_subject(model, tmp_path):
    records = counterfact(only=["sport"]).records
    file, texts = tmp_path / "records.json", tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"a text about {word} and more" for word in WORDS))
    corpus = corpora.text_files([texts])
    write_records(records, file)
    found = lessons(model, "cf", corpus, records=file)
    wanted = [each.rewrite for each in records if is_tuned(each.subject)]
    taken = [each.rewrite for each in (*found.train, *found.held)]
    assert sorted(each.prompt for each in taken) == sorted(each.prompt for each in wanted)
    assert lessons(model, "cf", corpus, records=file).source == found.source
    first = next(each for each in records if is_tuned(each.subject))
    write_records([each for each in records if each is not first], file)
    assert lessons(model, "cf", corpus, records=file).source != found.source
    write_records(records[:1], file)
    with pytest.raises(FactFileError, match=r"gives . records to train on, .*: too few"):
        lessons(model, "cf", corpus, records=file)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(folder, tmp_path):
    """Runs `factlens train-editor` on a small model of one's own, with texts of its own."""
    texts, numbers = tmp_path / "texts.txt", tmp_path / "numbers.yaml"
    texts.write_text(
        "\n\n".join(" ".join(Random(number).choices("abcdefgh", k=14)) for number in range(150))
    )
    numbers.write_text(json.dumps({**SMALL, "rank": 3}))
    options = ["--model", str(folder), "--config", str(numbers)]

    def go(*given: object, code: int = 0, text: bool = True):
        more = ["--text", str(texts)] if text else []
        done = CliRunner().invoke(app, ["train-editor", *map(str, given), *options, *more])
        assert done.exit_code == code, done.output
        return done

    return go


def test_the_command_trains_and_the_editor_is_found(run, model):
    # Of one model three files in one cache: this is the only test that fills it.
    done = run("mend", "--data", "generic", "--steps", 2)
    assert "efficacy" in done.stdout
    path = done.stdout.strip().splitlines()[-1]
    assert path.endswith("mend.safetensors")
    trained = load(path, MEND)
    assert trained.info["trained_steps"] == 2
    edit = mend(model, Rewrite("Mount Olga is in", "Mount Olga", "abc"))
    assert edit.info["config"]["trained"] == trained.info
    assert asdict(trained.config)["rank"] == 3
    assert "nothing was" not in run("mend", "--steps", 3).output
    assert load(path, MEND).info["trained_steps"] == 3
    assert math.isfinite(trained.info["held_out"]["loss"])


def test_the_commands_refusals_are_one_line(run, tmp_path):
    out = ["--out", tmp_path / "out"]
    for given, text, words in (
        (["memit"], True, "no editor 'memit' to train; there are mend, ke"),
        (
            ["mend", "--data", "wiki"],
            True,
            "no data 'wiki' to train on; there are generic, cf, zsre",
        ),
        (["mend", "--records", "x.json"], True, "generic trains on plain text"),
        (["ke"], True, "ke's training config has no key rank"),
        (["mend"], False, "does not say what text it was trained on; give some with --text"),
        (["mend", "--data", "cf", "--records", tmp_path / "none.json"], True, "cannot read"),
    ):
        done = run(*given, *out, code=2, text=text)
        assert words in done.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "out" / STATE).exists()


def test_a_stopped_command_says_how_to_go_on(run, tmp_path, monkeypatch):
    def stop(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("factlens.editors.training.train", stop)
    done = run("mend", "--out", tmp_path / "out", code=130)
    assert f"interrupted; the same command goes on from {tmp_path / 'out'}" in done.stderr
