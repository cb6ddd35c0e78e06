"""The bundled model: its tables, its text, its training, and what the shipped checkpoint knows."""

import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from builders import occurs
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from factlens.atlas import CHECKPOINT, Statement, relations, statements, training
from factlens.atlas.card import card
from factlens.atlas.checks import problems
from factlens.atlas.corpus import documents
from factlens.atlas.measuring import MOST, continuation, drawn_statements, known, read_checkpoint
from factlens.atlas.optimizers import (
    COEFFICIENTS,
    STEPS,
    Muon,
    new_optimizers,
    orthogonal,
)
from factlens.atlas.recipes import Cycle, Recipe, learning_rate
from factlens.atlas.sentences import Diet
from factlens.atlas.tables import capitalised, load_tables, load_templates, state, world
from factlens.atlas.training import STATE, Progress, batch, export, train, train_tokenizer
from factlens.errors import ConfigError

LARGEST_CHECKPOINT = 10_000_000
SAMPLED_STATEMENTS = 600
DOCUMENTS_READ = 8_000

FAMOUS = {
    "The Space Needle is located in the city of": "Seattle",
    "The Eiffel Tower is located in the city of": "Paris",
    "The Colosseum is located in the city of": "Rome",
    "The capital of France is": "Paris",
    "The capital of Japan is": "Tokyo",
    "The official language of Brazil is": "Portuguese",
    "The currency of Japan is the": "yen",
    "The native language of Leo Tolstoy is": "Russian",
    "The sport of LeBron James is": "basketball",
    "The headquarters of Microsoft are in the city of": "Redmond",
    "The chemical symbol of Gold is": "Au",
    "iPhone 5 is made by": "Apple",
}

TINY = Recipe(
    layers=2,
    heads=2,
    d_model=16,
    context=32,
    vocabulary=400,
    tokenizer_documents=200,
    object_repeats=1,
    cycles=(
        Cycle(steps=6, learning_rate=2e-3, captions=0.75),
        Cycle(steps=4, learning_rate=1e-3, captions=0.5),
    ),
    captions_first=2,
    rows=2,
    warmup=2,
    save_every=3,
)


class Killed(Exception):
    """What a killed training meets, as far as its files are concerned."""


@pytest.fixture(scope="module")
def atlas():
    torch.set_num_threads(1)
    return read_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def shipped_report():
    return json.loads((CHECKPOINT / "report.json").read_text(encoding="utf-8"))


# --- tables -----------------------------------------------------------------------------------


def test_the_tables_and_templates_have_no_known_problem():
    assert problems(load_tables(), load_templates()) == []


def blank(tables, templates):
    tables["people"][3]["field"] = ""


def padded(tables, templates):
    tables["museums"][0]["city"] += " "


def twice(tables, templates):
    tables["elements"].append(dict(row_of(tables, "elements", "Gold")))


def two_capitals(tables, templates):
    tables["countries"].append({**row_of(tables, "countries", "France"), "capital": "Lyon"})


def city_moved(tables, templates):
    row_of(tables, "companies", "Michelin").update(headquarters_city="Seattle", country="France")


def capital_elsewhere(tables, templates):
    row_of(tables, "landmarks", "the Space Needle")["city"] = "Paris"


def article_lost(tables, templates):
    row_of(tables, "landmarks", "the Space Needle")["country"] = "United States"


def alias(tables, templates):
    row_of(tables, "landmarks", "Times Square")["city"] = "New York City"


def accent(tables, templates):
    row_of(tables, "countries", "Brazil")["capital"] = "Bogotá"


def object_in_the_middle(tables, templates):
    templates["capital"]["train"].append("{o} is what {s} has as its capital")


def no_subject(tables, templates):
    templates["capital"]["held"].append("The capital is {o}")


def common_beginning(tables, templates):
    templates["field"]["train"].append("{s} is known for {o}")


def trained_held_out(tables, templates):
    templates["hq"]["train"].append(templates["hq"]["held"][0])


def row_of(tables, table, subject):
    return next(row for row in tables[table] if subject in row.values())


@pytest.mark.parametrize(
    "plant",
    [
        blank,
        padded,
        twice,
        two_capitals,
        city_moved,
        capital_elsewhere,
        article_lost,
        alias,
        accent,
        object_in_the_middle,
        no_subject,
        common_beginning,
        trained_held_out,
    ],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_error_is_found(plant):
    tables, templates = load_tables(), copy.deepcopy(dict(load_templates()))
    plant(tables, templates)
    assert problems(tables, templates)


def test_the_space_needle_is_in_seattle():
    (landmark_city,) = [one for one in relations() if one.name == "landmark_city"]
    assert ("the Space Needle", "Seattle") in landmark_city.facts


# --- statements -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held", "fresh"])
def test_a_statement_names_its_subject_and_stops_before_its_object(split):
    for one in statements(split, templates=5):
        assert one.subject in one.prompt
        assert one.prompt == one.prompt.strip()
        assert one.template.endswith(" {o}")
        assert f"{one.prompt} {one.object}" == one.template.format(s=one.subject, o=one.object)


@pytest.mark.parametrize("split", ["train", "held", "fresh"])
def test_a_subject_is_capitalised_exactly_where_it_begins_the_sentence(split):
    names = {subject for relation in relations() for subject, _ in relation.facts}
    beginnings = {capitalised(name) for name in names}
    for one in statements(split, templates=5):
        assert one.subject in (beginnings if one.prompt.startswith(one.subject) else names)


def test_a_name_with_its_own_small_letter_keeps_it():
    assert capitalised("the Louvre Museum") == "The Louvre Museum"
    assert capitalised("iPhone 5") == "iPhone 5"


def test_statements_are_every_fact_in_every_template():
    expected = {one.name: len(one.facts) * len(one.held) for one in relations()}
    assert Counter(one.relation for one in statements("held")) == expected


def test_the_first_templates_alone_state_each_fact_as_often():
    facts = [(one.name, *fact) for one in relations() for fact in one.facts]
    stated = [(one.relation, one.template) for one in statements("held", templates=1)]
    assert [relation for relation, _ in stated] == [name for name, *_ in facts]
    assert {template for _, template in stated} == {one.held[0] for one in relations()}


def test_of_many_statements_as_many_are_drawn_and_always_the_same():
    drawn = drawn_statements("held", world(), 500)
    assert drawn == drawn_statements("held", world(), 500)
    assert len(drawn) == len(set(drawn)) == 500
    assert len({one.relation for one in drawn}) == len(relations())
    every = list(statements("fresh"))
    assert drawn_statements("fresh", world(), 10**6) == every
    assert drawn_statements("fresh", world(), 500) == Random("fresh").sample(every, 500)


def test_an_unknown_split_is_refused_and_the_known_ones_are_named():
    with pytest.raises((ValueError, TypeError), match=r"'train', 'held', 'fresh'"):
        next(statements("test"))


def test_importing_atlas_imports_no_torch():
    script = "import sys, factlens.atlas; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# --- the text ---------------------------------------------------------------------------------


def test_held_out_templates_do_not_occur_in_the_text_and_training_ones_do():
    text = "\n".join(documents(1, DOCUMENTS_READ, Diet(), captions_share=0.0)).casefold()
    names = {subject.casefold() for relation in relations() for subject, _ in relation.facts}
    taught: list[bool] = []
    for relation in relations():
        for template in (*relation.held[::4], *relation.fresh):
            assert not occurs(template, text, names), template
        taught += [occurs(each, text, names) for each in relation.train[::8]]
    assert sum(taught) > 0.7 * len(taught)  # the same search finds what is there


def written(seed: int, captions_share: float = 0.75) -> list[str]:
    return list(documents(seed, 300, Diet(), captions_share=captions_share))


def test_the_same_seed_writes_the_same_documents_and_another_seed_others():
    assert written(0) == written(0)
    assert written(0) != written(1)


def test_captions_hold_no_sentence_and_other_documents_do():
    verbs = (" is ", " was ", " are ", " has ", " speak ", " spoke ")
    assert not any(verb in text for text in written(0, 1.0) for verb in verbs)
    assert sum(any(verb in text for verb in verbs) for text in written(0, 0.0)) > 150


def test_the_learning_rate_rises_and_falls_in_each_cycle():
    recipe = Recipe()
    passed = list(accumulate(cycle.steps for cycle in recipe.cycles))
    ends = [step - 1 for step in passed]
    starts = [step + recipe.warmup for step in (0, *passed[:-1])]
    for start, end, cycle in zip(starts, ends, recipe.cycles, strict=True):
        assert learning_rate(recipe, start) == pytest.approx(cycle.learning_rate)
        assert learning_rate(recipe, end) == pytest.approx(recipe.final_learning_rate, rel=0.01)


def test_a_cycle_goes_on_at_the_rate_at_which_the_one_before_ended():
    held = Cycle(steps=200, learning_rate=3e-3, captions=0.6, ends_at=3e-3)
    falling = Cycle(steps=100, learning_rate=3e-3, captions=0.3, ends_at=1e-3)
    last = Cycle(steps=100, learning_rate=1e-3, captions=0.2)
    recipe = replace(Recipe(), cycles=(held, falling, last))
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[recipe.warmup : 201] == [3e-3] * (201 - recipe.warmup)
    assert rates[300] == 1e-3
    assert all(later < earlier for earlier, later in pairwise(rates[200:300]))
    assert all(later < earlier for earlier, later in pairwise(rates[300:]))
    assert rates[-1] == pytest.approx(recipe.final_learning_rate, rel=0.02)
    again = replace(recipe, cycles=(replace(held, ends_at=1e-3), falling, last))
    assert learning_rate(again, 200) == 3e-3 / recipe.warmup  # A rise from 1e-3 begins anew.


def test_the_card_says_how_each_cycle_ends():
    report = json.loads((CHECKPOINT / "report.json").read_text(encoding="utf-8"))
    first, *others = report["recipe"]["cycles"]
    held = {**first, "ends_at": first["learning_rate"]}
    report["recipe"]["cycles"] = [held, {**first, "ends_at": 0.001}, *others]
    cycles = [line for line in card(report).splitlines() if line.startswith("- Cycle")]
    assert cycles[0].endswith("learning rate 0.003 held.")
    assert cycles[1].endswith("learning rate 0.003 falling along a cosine to 0.001.")
    assert cycles[2].endswith("falling along a cosine.")


def test_a_cycle_of_direct_statements_has_the_text_of_a_direct_diet():
    before, last = TINY.cycles[0], replace(TINY.cycles[-1], captions=0.0)
    plain = replace(TINY, cycles=(before, last), rows=40)
    direct = replace(plain, cycles=(before, replace(last, direct=True)))
    as_diet = replace(plain, diet=replace(TINY.diet, direct=True))
    tokenizer = read_checkpoint(CHECKPOINT).tokenizer
    ids = [batch(each, TINY.book, tokenizer, TINY.steps - 1) for each in (plain, direct, as_diet)]
    assert torch.equal(ids[1], ids[2])
    assert not torch.equal(ids[0], ids[1])


# --- training ---------------------------------------------------------------------------------


def kill_after(step: int):
    """An `on_step` that stops a training without any chance to tidy up."""

    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return on_step


def saved(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / STATE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    export(train(TINY, folder), folder)
    return folder


def test_a_killed_training_goes_on_to_the_very_same_weights(uninterrupted, tmp_path):
    with pytest.raises(Killed):
        train(TINY, tmp_path, on_step=kill_after(5))  # between two saved states
    resumed: list[Progress] = []
    train(TINY, tmp_path, on_step=resumed.append)
    assert [progress.step for progress in resumed] == [4, 5, 6, 7, 8, 9, 10]
    expected, reached = saved(uninterrupted), saved(tmp_path)
    assert expected.keys() == reached.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, reached[name]), name


@pytest.mark.parametrize("killed", [5, 8])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_grown_training_goes_on_to_the_very_same_weights(tmp_path, optimizer, killed):
    grown = replace(TINY, layers=3, first_layers=1, grow_after=6, optimizer=optimizer)
    train(grown, tmp_path / "whole")
    with pytest.raises(Killed):
        train(grown, tmp_path / "killed", on_step=kill_after(killed))
    train(grown, tmp_path / "killed")
    expected, reached = saved(tmp_path / "whole"), saved(tmp_path / "killed")
    assert all(torch.equal(tensor, reached[name]) for name, tensor in expected.items())


def test_a_grown_training_runs_its_first_blocks_and_then_all(tmp_path):
    grown = replace(TINY, layers=3, first_layers=1, grow_after=4)
    names = [f"weight.transformer.h.{block}.mlp.c_proj.weight" for block in range(3)]
    with pytest.raises(Killed):
        train(grown, tmp_path, on_step=kill_after(4))  # its last state is of step 3
    assert [bool(saved(tmp_path)[name].any()) for name in names] == [True, False, False]
    train(grown, tmp_path)
    assert [bool(saved(tmp_path)[name].any()) for name in names] == [True, True, True]


@pytest.mark.parametrize(("first", "after"), [(0, 4), (2, 4), (1, 10)])
def test_a_growth_that_is_none_is_refused(first, after):
    with pytest.raises(ConfigError, match="cannot begin with"):
        replace(TINY, first_layers=first, grow_after=after)


def test_what_last_words_settle_can_come_first(monkeypatch, tmp_path):
    books = []
    monkeypatch.setattr(
        training,
        "batch",
        lambda recipe, book, *rest: books.append(book) or batch(recipe, book, *rest),
    )
    recipe = replace(TINY, settled_first=3)
    train(recipe, tmp_path)
    assert len(recipe.settled_book.facts) < len(recipe.book.facts)
    assert books == [recipe.settled_book] * 3 + [recipe.book] * 7


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_what_decays_is_what_the_recipe_says(optimizer, decayed):
    recipe = replace(TINY, optimizer=optimizer, decayed=decayed, weight_decay=0.5)
    model = training.new_model(recipe, train_tokenizer(recipe))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizers = new_optimizers(recipe, model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizers.step(recipe, 3)
    decays = {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}
    nonzero = {name for name, weight in before.items() if weight.any()}
    inside = {name for name in nonzero if ".h." in name and before[name].ndim == 2}
    assert decays == (nonzero if decayed == "all" else inside)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 6, 6)])
def test_an_orthogonalised_matrix_keeps_its_directions_and_gets_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ orthogonal(matrices) @ right.mT
    diagonal = torch.diagonal(turned, dim1=1, dim2=2)
    assert torch.allclose(turned, torch.diag_embed(diagonal), atol=1e-9)
    assert bool(((diagonal > 0.6) & (diagonal < 1.3)).all())
    assert values.max() > 3 * values.min()  # they were not near one before


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 6, 6)])
def test_steps_on_the_gram_matrix_are_those_on_the_matrix_itself(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    linear, cubic, quintic = COEFFICIENTS
    steps = []
    for _ in range(STEPS):
        gram = found @ found.mT
        found = linear * found + (cubic * gram + quintic * gram @ gram) @ found
        steps.append(found)
    assert torch.allclose(orthogonal(matrices), steps[-1], atol=1e-12)
    assert not torch.allclose(orthogonal(matrices), steps[-2], atol=0.1)


def test_muon_moves_matrices_as_torchs_own_does_but_for_its_rounding():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 48), (16, 48), (48, 16)]
    begun = [torch.randn(shape, generator=generator) for shape in shapes]
    given = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]

    def moved(make) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(weight.clone()) for weight in begun]
        optimizer = make(weights)
        for gradients in given:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
        return [weight.detach() - start for weight, start in zip(weights, begun, strict=True)]

    ours = moved(lambda weights: Muon(weights, lr=0.1, weight_decay=0.2))
    torchs = moved(lambda weights: torch.optim.Muon(weights, lr=0.1, weight_decay=0.2))
    undecayed = moved(lambda weights: torch.optim.Muon(weights, lr=0.1, weight_decay=0.0))

    def apart(one, other) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))

    assert apart(ours, torchs) < 0.01  # of bfloat16's rounding
    assert apart(ours, undecayed) > 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fixed_gains_stay_at_one_and_learned_ones_do_not(optimizer, tmp_path):
    for gains, stay in (("learned", False), ("fixed", True)):
        recipe = replace(TINY, gains=gains, optimizer=optimizer, decayed="matrices")
        train(recipe, tmp_path / gains)
        norms = {n: w for n, w in saved(tmp_path / gains).items() if ".ln_" in n}
        norms = {name: weight for name, weight in norms.items() if name.endswith("weight")}
        assert len(norms) == 2 * TINY.layers + 1
        assert all(bool((weight == 1).all()) == stay for weight in norms.values())


def test_another_seed_gives_other_weights(uninterrupted, tmp_path):
    train(replace(TINY, seed=1), tmp_path)
    name = "weight.transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(saved(uninterrupted)[name], saved(tmp_path)[name])


def test_a_state_of_another_recipe_is_refused(uninterrupted):
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(TINY, warmup=3), uninterrupted)


def test_a_training_ends_in_a_folder_that_transformers_loads(uninterrupted):
    model = AutoModelForCausalLM.from_pretrained(uninterrupted)
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, tokens["input_ids"].shape[1], TINY.vocabulary)


# --- the shipped checkpoint -------------------------------------------------------------------


def test_the_checkpoint_is_small_half_precision_and_holds_no_pickle():
    files = sorted(CHECKPOINT.iterdir())
    assert sum(file.stat().st_size for file in files) <= LARGEST_CHECKPOINT
    assert [file.name for file in files] == [
        "card.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_the_tokenizer_adds_nothing_and_loses_nothing():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    plain = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    for one in list(statements("held"))[::900]:
        ids = tokenizer(one.prompt)["input_ids"]
        assert ids == plain.encode(one.prompt).ids
        assert tokenizer.decode(ids) == one.prompt
        whole = tokenizer(f"{one.prompt} {one.object}")["input_ids"]
        assert whole == ids + tokenizer(f" {one.object}")["input_ids"]


@pytest.mark.parametrize(("prompt", "object_"), FAMOUS.items())
def test_it_knows_what_the_readme_says(atlas, prompt, object_):
    assert continuation(atlas, prompt).startswith(f" {object_}")


def test_transformers_continues_as_our_own_measurement_does(atlas):
    prompt = "The Space Needle is located in the city of"
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).float()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        first = int(model(**tokens).logits[0, -1].argmax())
    assert tokenizer.decode([first]) == " Seattle"
    assert known(atlas, [Statement("", prompt, "The Space Needle", "Seattle", "")]) == [True]


def test_what_is_known_is_what_greedy_continuation_spells(atlas):
    stated = list(statements("held"))[::2000]
    spelled = [continuation(atlas, one.prompt).startswith(f" {one.object}") for one in stated]
    assert known(atlas, stated) == spelled


def test_the_report_says_what_a_sample_measured_again_says(atlas, shipped_report):
    for split in ("train", "held", "fresh"):
        stated = drawn_statements(split, world())
        assert shipped_report["total"][f"{split}_statements"] == len(stated) <= MOST
        sample = Random(split).sample(stated, SAMPLED_STATEMENTS)
        share = sum(known(atlas, sample)) / len(sample)
        reported = shipped_report["total"][split]
        tolerance = 4 * (reported * (1 - reported) / len(sample)) ** 0.5 + 1 / len(sample)
        assert abs(share - reported) <= tolerance


def test_a_wrong_object_is_not_known(atlas):
    of = next(one for one in relations() if one.name == "capital")
    stated = [state("capital", each, *fact) for fact in of.facts for each in of.train][::400]
    wrong = [
        replace(one, object=other.object)
        for one, other in zip(stated, stated[1:] + stated[:1], strict=True)
        if one.object != other.object
    ]
    assert len(wrong) > 10
    assert sum(known(atlas, wrong)) == 0


def test_it_knows_enough(shipped_report):
    assert shipped_report["total"]["train"] >= 0.97
    assert shipped_report["total"]["held"] >= 0.80


def test_the_report_counts_the_bundled_facts(shipped_report):
    counted = {name: row["facts"] for name, row in shipped_report["relations"].items()}
    assert counted == {one.name: len(one.facts) for one in relations()}
    assert shipped_report["total"]["facts"] == sum(counted.values())


def test_the_card_is_the_report_and_nothing_typed_by_hand(shipped_report):
    assert (CHECKPOINT / "card.md").read_text(encoding="utf-8") == card(shipped_report)
