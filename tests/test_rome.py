"""ROME's three steps, against the official code's arrays, a slow second implementation, and its own closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import FAMILIES
from conftest import ORACLE
from hypothesis import given
from hypothesis import strategies as st
from oracles import SlowROME
from transformers import AutoModelForCausalLM

from factlens import Rewrite, edits, models, moments, runs
from factlens.changes import RankOne
from factlens.editors import each, realising
from factlens.editors.contexts import contexts_for
from factlens.editors.questions import question
from factlens.editors.rome import choose_key, choose_value, insert, insert_several, rome, rome_each
from factlens.editors.rome_config import ROMEConfig
from factlens.editors.values import optimise
from factlens.errors import (
    ConfigError,
    EditError,
    FactError,
    FactWarning,
    PlanError,
    PromptTooLong,
    SubjectNotFound,
)
from factlens.moments import KeyMoment
from factlens.tails import run_whole

# A few steps on random weights seldom bring a target to the top; the tests that want the warning ask for it.
pytestmark = pytest.mark.filterwarnings("ignore:the edit of .* did not take")

PROMPT, SUBJECT, TARGET = "Mount Olga is in", "Mount Olga", "abc"
CONTEXTS = ("{}", "It was so. {}", "Olga. {}")


def relative(found, wanted) -> float:
    found, wanted = (torch.as_tensor(each).detach().double() for each in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def rewrite_of(**changes) -> Rewrite:
    return Rewrite(**{"prompt": PROMPT, "subject": SUBJECT, "target": TARGET, **changes})


def keys_of(model, layer, seed=0, tokens=600):
    """Keys of random text, enough of them to invert their moment."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, int(models.cfg(model).d_vocab), (tokens // 30, 30), generator=generator)
    _, acts = runs.run_with_cache(model, ids, [models.key_site(layer)])
    return acts[models.key_site(layer)].flatten(0, 1)


def moment_of(model, layer) -> KeyMoment:
    """A second moment with an inverse, also where neurons never fire."""
    keys = keys_of(model, layer)
    return KeyMoment(keys.T @ keys + 0.01 * len(keys) * torch.eye(keys.shape[1]), len(keys))


def quick(**changes) -> dict:
    return {
        "layer": 1,
        "contexts": CONTEXTS,
        "steps": 6,
        "weight_decay": 0.5,
        "learning_rate": 0.5,
        "kl_weight": 0.0625,
        "max_norm_ratio": 4.0,
        **changes,
    }


# -- the official arrays ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    return np.load(ORACLE / "rome.npz")


def official_case(official):
    rewrite = Rewrite(
        *(str(official[f"e0.{name}"]) for name in ("prompt", "subject")),
        str(official["e0.target"]).strip(),
    )
    config = ROMEConfig(
        layer=2, value_key="prompt", contexts=tuple(map(str, official["context_templates"]))
    )
    return rewrite, config


@pytest.mark.parametrize("engine", ["tails", "whole"])
def test_the_official_edit_is_reproduced(oracle_model, official, engine):
    rewrite, config = official_case(official)
    asked = question(oracle_model, rewrite, config.contexts)
    assert list(asked.lookups[:-1]) == list(official["e0.u_lookup_idx"])
    assert asked.target.tolist() == list(official["e0.target_ids"])
    (value,) = optimise(oracle_model, [asked], config, engine=engine)
    assert relative(value.key, official["e0.k_mean"]) < 1e-5
    assert relative(value.bare_key, official["e0.k_raw"]) < 1e-5
    assert relative(value.bare_output, official["e0.c_proj_out_raw"]) < 1e-5
    assert relative(value.shift, official["e0.latent_delta"]) < 1e-4
    losses = value.losses[["loss", "nll", "kl", "decay"]].to_numpy()
    np.testing.assert_allclose(losses, official["e0.losses_total_nll_kl_wd"], atol=1e-4)

    moment = KeyMoment(torch.tensor(official["C"]), 1)
    edit = rome(oracle_model, rewrite, config, moment=moment, engine=engine)
    (change,) = edit.changes.values()
    assert list(edit.changes) == ["blocks.2.mlp.W_out"]
    assert relative(change.left / change.left.norm(), official["e0.u"]) < 1e-4
    assert relative(change.right * change.left.norm(), official["e0.v"]) < 1e-4
    assert relative(change.dense(), official["e0.weight_delta"]) < 1e-4
    with edits.applied(oracle_model, edit):
        assert relative(models.W_out(oracle_model, 2), official["e0.W_after"]) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [{"value_key": "mean"}, {"kl_at": "prompt-end"}, {"kl_weight": 0.07}, {"weight_decay": 0.4}],
    ids=str,
)
def test_the_comparison_with_the_official_edit_can_fail(oracle_model, official, wrong):
    rewrite, config = official_case(official)
    config = ROMEConfig(**{**vars(config), **wrong})
    edit = rome(oracle_model, rewrite, config, moment=KeyMoment(torch.tensor(official["C"]), 1))
    (change,) = edit.changes.values()
    assert relative(change.dense(), official["e0.weight_delta"]) > 1e-3


# -- a slow second implementation ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "llama", "gemma2"])
def test_key_and_value_are_those_of_a_slow_second_implementation(
    family_model, family_folder, family
):
    model, tokenizer = family_model(family), models.tokenizer(family_model(family))
    slow = SlowROME(AutoModelForCausalLM.from_pretrained(family_folder(family)), tokenizer, 1)
    value = choose_value(model, rewrite_of(), quick(steps=5, stop_loss=0.0))
    texts = [each.replace("{}", PROMPT) for each in CONTEXTS]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    # One token a character, and perhaps a start token.
    ats = [row_length(row) for row in map(len, rows)]
    essence = tokenizer(f"{SUBJECT} is a")["input_ids"]
    target = tokenizer(" " + TARGET, add_special_tokens=False)["input_ids"]
    assert len(target) == 4
    delta, losses = slow.value(rows, ats, target, essence, len(essence) - 6, steps=4)
    keys = torch.stack([slow.run(row, at)[1] for row, at in zip(rows, ats, strict=True)])
    assert relative(value.key, keys.mean(0)) < 1e-5
    np.testing.assert_allclose(value.losses["loss"], losses, rtol=1e-4)
    assert relative(value.shift, delta) < 1e-3
    assert losses[0] - losses[-1] > 0.01  # It went somewhere.


def row_length(length: int) -> int:
    """Position of the subject's last character: the prompt goes on with ' is in' after it."""
    return length - len(" is in") - 1


def test_the_essence_can_be_kept_at_the_end_of_its_prompt_as_the_paper_says(
    family_model, family_folder
):
    model, tokenizer = family_model("gpt2"), models.tokenizer(family_model("gpt2"))
    slow = SlowROME(AutoModelForCausalLM.from_pretrained(family_folder("gpt2")), tokenizer, 1)
    value = choose_value(
        model, rewrite_of(), quick(contexts=("{}",), kl_at="prompt-end", steps=3, stop_loss=0.0)
    )
    rows = [tokenizer(PROMPT)["input_ids"]]
    essence = tokenizer(f"{SUBJECT} is a")["input_ids"]
    at = row_length(len(rows[0]))
    # The slow one changes and reads at one position; here it reads at the end.
    delta = value.steps[1].clone()
    with torch.no_grad():
        before = slow.run(essence, at)[0][-1]
        now = slow.run(essence, at, delta)[0][-1]
    drift = float((now.exp() * (now - before)).sum())
    assert value.losses["kl"][1] == pytest.approx(0.0625 * drift, rel=1e-3, abs=2e-8)


# -- laws of the edit ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_mlp_answers_the_key_with_the_value_and_nothing_else_changes(
    family_model, family
):
    model = family_model(family)
    moment = moment_of(model, 1)
    value = choose_value(model, rewrite_of(), quick())
    edit = rome(model, rewrite_of(), quick(), moment=moment)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight = models.W_out(model, 1).detach().clone()
    bias = models.weight(model, "blocks.1.mlp.b_out")
    with edits.applied(model, edit):
        edited = models.W_out(model, 1).detach().clone()
        said = value.key @ edited + (bias if bias is not None else 0)
        assert relative(said, value.vector) < 1e-5
        ranks = torch.linalg.svdvals((edited - weight).double())
        assert ranks[1] < 1e-5 * ranks[0]
        changed = [
            name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])
        ]
        storage = models.W_out(model, 1).untyped_storage().data_ptr()
        own = [
            n for n, t in model.state_dict().items() if t.untyped_storage().data_ptr() == storage
        ]
        assert changed
        assert set(changed) <= set(own)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_model_gives_the_logits_of_the_optimised_run(family_model, family):
    """With a moment in which the prompt's other keys are heavy, so that the edit moves the lookup token's output alone."""
    model = family_model(family)
    config = quick(value_key="prompt", contexts=("{}",))
    value = choose_value(model, rewrite_of(), config)
    row = value.question.rows[0][None]
    _, acts = runs.run_with_cache(model, row, [models.key_site(1)])
    keys = acts[models.key_site(1)][0].double()
    others = keys[torch.arange(len(keys)) != value.question.lookups[0]]
    moment = torch.eye(keys.shape[1], dtype=torch.float64) + 1e9 * others.T @ others
    edit = rome(model, rewrite_of(), config, moment=KeyMoment(moment, 1))
    start = value.question.starts[0]
    with edits.applied(model, edit):
        found = runs.logits_of(model, row)[0, start:]
    at = torch.tensor(value.question.lookups[:1])
    with torch.no_grad():
        wanted = run_whole(model, 1, [row[0]], at, value.shift[None])[0, start:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    still = run_whole(model, 1, [row[0]], at, 0 * value.shift[None])[0, start:]
    assert (found - still).abs().max() > 1e-2
    told = found.log_softmax(-1).gather(1, value.question.target[:, None])
    # The last evaluation was of the δ that is inserted.
    assert -float(told.mean()) == pytest.approx(value.losses["nll"].iloc[-1], abs=1e-4)


sizes, seeds = st.integers(2, 12), st.integers(0, 1000)


def problem(d_mlp, d_model, seed, count=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    keys = draw(3 * d_mlp, d_mlp)
    return draw(count, d_mlp), draw(count, d_model), keys.T @ keys / len(keys), draw


def size(change, moment):
    """tr(Δᵀ C Δ): how much the outputs move, averaged over keys."""
    return float(torch.trace(change.T @ moment @ change))


@given(sizes, sizes, seeds)
def test_insert_moves_the_output_at_the_key_by_the_shift(d_mlp, d_model, seed):
    (key,), (shift,), moment, _ = problem(d_mlp, d_model, seed)
    change = insert(key, shift, moment)
    torch.testing.assert_close(key @ change.dense(), shift)
    assert torch.linalg.matrix_rank(change.dense()) == 1


def test_no_other_change_that_does_so_is_smaller():
    (key,), (shift,), moment, draw = problem(12, 7, 0)
    ours = insert(key, shift, moment).dense()
    smallest = size(ours, moment)
    for _ in range(1000):
        wander = draw(12, 7)
        wander -= torch.outer(key, key @ wander) / (key @ key)  # Invisible at the key.
        torch.testing.assert_close(key @ (ours + wander), shift)
        assert size(ours + 0.01 * wander, moment) > smallest
    identity = insert(key, shift, torch.eye(12, dtype=torch.float64)).dense()
    assert size(identity, moment) > smallest  # Without C one pays more.


@given(st.integers(6, 12), sizes, st.integers(1, 4), seeds)
def test_several_keys_are_all_answered(d_mlp, d_model, count, seed):
    keys, shifts, moment, _ = problem(d_mlp, d_model, seed, count)
    factor = moments.factor(moment)
    change = insert_several(keys, shifts, factor)
    torch.testing.assert_close(keys.float() @ change.dense(), shifts.float(), atol=1e-3, rtol=1e-3)
    alone = insert_several(keys[:1], shifts[:1], factor)
    torch.testing.assert_close(
        alone.dense(), insert(keys[0], shifts[0], moment).dense().float(), atol=1e-4, rtol=1e-4
    )


def test_two_rewrites_with_one_key_are_refused(family_model):
    model = family_model("gpt2")
    twice = [rewrite_of(), rewrite_of(target="xyz")]
    with pytest.raises(EditError, match=r"not independent.*one after the other"):
        rome(model, twice, quick(), moment=moment_of(model, 1))


# -- many at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "opt", "mistral"])
def test_in_one_batch_every_rewrite_takes_the_path_it_takes_alone(family_model, family):
    model = family_model(family)
    rewrites = [
        rewrite_of(),
        Rewrite("The mother of Anna Lee was", "Anna Lee", "x"),
        Rewrite("{} plays", "Bob", "the flute"),
    ]
    asked = [question(model, rewrite, CONTEXTS) for rewrite in rewrites]
    config = ROMEConfig(layer=1, contexts=CONTEXTS, steps=8)
    together = optimise(model, asked, config)
    assert [value.engine for value in together] == ["tails"] * 3
    for number, value in enumerate(together):
        (alone,) = optimise(model, asked[number : number + 1], config, engine="whole")
        assert len(value.losses) == len(alone.losses)
        assert relative(value.shift, alone.shift) < 1e-3


def test_a_rewrite_whose_loss_is_small_leaves_the_batch(atlas):
    rewrites = [
        Rewrite("The capital of {} is", "France", "Rome"),
        Rewrite("The mother tongue of {} is", "Charles Darwin", "French"),
        Rewrite("{} is located in the city of", "The Space Needle", "Rome"),
    ]
    config = ROMEConfig(layer=0, contexts=CONTEXTS, steps=12, stop_loss=0.4, max_norm_ratio=4.0)
    asked = [question(atlas, rewrite, CONTEXTS) for rewrite in rewrites]
    together = optimise(atlas, asked, config)
    assert len({len(value.losses) for value in together}) > 1
    for number, value in enumerate(together):
        (alone,) = optimise(atlas, asked[number : number + 1], config, engine="whole")
        assert len(value.losses) == len(alone.losses)
        assert relative(value.shift, alone.shift) < 1e-3


def test_rome_each_gives_the_edits_of_rome(family_model):
    model = family_model("gpt2")
    rewrites = [rewrite_of(), Rewrite("The mother of Anna Lee was", "Anna Lee", "x")]
    moment = moment_of(model, 1)
    for edit, rewrite in zip(
        rome_each(model, rewrites, quick(), moment=moment), rewrites, strict=True
    ):
        alone = rome(model, rewrite, quick(), moment=moment)
        assert edit.rewrites == (rewrite,)
        name = "blocks.1.mlp.W_out"
        assert relative(edit.changes[name].dense(), alone.changes[name].dense()) < 1e-3


def test_an_editor_that_works_side_by_side_is_asked_to(atlas):
    rewrites = [
        Rewrite("The capital of {} is", "France", "Rome"),
        Rewrite("The capital of {} is", "Japan", "Rome"),
    ]
    several = each(rome, atlas, rewrites, {"moment": "identity", "steps": 2, "contexts": ["{}"]})
    assert [edit.rewrites[0].subject for edit in several] == ["France", "Japan"]


# -- options ---------------------------------------------------------------------------------------


def test_the_fact_token_says_where_the_value_goes(family_model):
    model = family_model("gpt2")
    places = {
        option: choose_value(model, rewrite_of(), quick(steps=1, fact_token=option))
        for option in ("subject-first", "subject-last", "first-after", "last")
    }
    assert [value.question.lookups[0] for value in places.values()] == [0, 9, 10, 15]
    keys = torch.stack([value.bare_key for value in places.values()])
    assert torch.pdist(keys).min() > 0.1


def test_contexts_are_the_bare_prompt_and_twenty_prefixes_the_same_for_a_seed(atlas):
    contexts = contexts_for(atlas, "rome", 0)
    assert contexts[0] == "{}"
    assert len(contexts) == 21
    assert len(set(contexts)) > 15
    assert all(each.endswith(". {}") and each.count("{}") == 1 for each in contexts[1:])
    assert contexts_for(atlas, "rome", 1) != contexts
    assert contexts_for(atlas, "rome", 0) == contexts
    paper = contexts_for(atlas, "paper", 0)
    assert len(paper) == 50
    assert "{}" not in paper
    words = [len(models.tokenizer(atlas)(each)["input_ids"]) for each in contexts[1:]]
    assert sorted(words)[:10] < sorted(words)[10:]


def test_contexts_without_the_bare_prompt_leave_it_out_of_key_and_loss(family_model):
    model = family_model("gpt2")
    with_bare = choose_value(model, rewrite_of(), quick(steps=1))
    without = choose_value(model, rewrite_of(), quick(steps=1, contexts=CONTEXTS[1:]))
    assert relative(without.bare_output, with_bare.bare_output) < 1e-5
    assert relative(with_bare.key, (2 * without.key + with_bare.bare_key) / 3) < 1e-5


def test_the_key_of_a_context_that_names_the_subject_is_the_prompts_own(family_model):
    model = family_model("gpt2")
    asked = question(model, rewrite_of(), ("{}", f"{SUBJECT}. {{}}"))
    assert asked.lookups == (9, 9 + len(f"{SUBJECT}. "), 9)


def test_the_clamp_bounds_the_shift(family_model):
    model = family_model("gpt2")
    value = choose_value(model, rewrite_of(), quick(max_norm_ratio=0.25, steps=10))
    assert value.shift.norm() <= 0.2501 * value.bare_output.norm()
    free = choose_value(model, rewrite_of(), quick(max_norm_ratio=50.0, steps=10))
    assert free.shift.norm() > 0.5 * value.bare_output.norm()


def test_choose_key_is_the_values_key(family_model):
    model = family_model("gpt2")
    key = choose_key(model, rewrite_of(), quick())
    assert relative(key, choose_value(model, rewrite_of(), quick()).key) < 1e-6


# -- what must not pass in silence -----------------------------------------------------------------


def test_an_edit_of_what_the_model_says_already_is_announced(atlas):
    said = Rewrite("The capital of {} is", "France", "Paris")
    with pytest.warns(FactWarning, match="says 'Paris'.*already"):
        rome(atlas, said, {"moment": "identity", "contexts": ["{}"]})


def test_an_edit_that_does_not_take_is_announced(atlas):
    weak = Rewrite("The capital of {} is", "France", "Tokyo")
    with pytest.warns(FactWarning, match="did not take.*max_norm_ratio"):
        rome(atlas, weak, {"moment": "identity", "contexts": ["{}"], "steps": 1})


def test_a_target_without_its_space_is_announced(family_model):
    model = family_model("gpt2")
    with pytest.warns(FactWarning, match="ends in a space"):
        choose_value(model, rewrite_of(prompt=f"{PROMPT} "), quick(steps=1))


@pytest.mark.parametrize(
    ("changes", "config", "error", "says"),
    [
        ({"subject": "Uluru"}, {}, SubjectNotFound, "Uluru"),
        ({"prompt": "x" * 70 + SUBJECT}, {}, PromptTooLong, "64 positions|positions"),
        ({}, {"layer": 4}, ConfigError, "4 layers, 0 to 3"),
        ({}, {"layer": -1}, ConfigError, "-1"),
        ({"prompt": SUBJECT}, {"fact_token": "first-after"}, FactError, "ends with its subject"),
        ({}, {"max_norm": 3}, ConfigError, "max_norm_ratio"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_line(family_model, changes, config, error, says):
    with pytest.raises(error, match=says) as caught:
        rome(family_model("gpt2"), rewrite_of(**changes), quick(**config))
    assert "\n" not in str(caught.value)


def test_an_empty_target_and_no_rewrites_are_refused(family_model):
    with pytest.raises(FactError, match="empty"):
        rewrite_of(target=" ")
    with pytest.raises(EditError, match="no rewrite"):
        rome(family_model("gpt2"), [], quick())
    with pytest.raises(PlanError, match="no engine 'fast'"):
        optimise(family_model("gpt2"), [], ROMEConfig(layer=1), engine="fast")


def mutants(change: RankOne):
    return {
        "another layer": {"blocks.2.mlp.W_out": change},
        "the wrong sign": {"blocks.1.mlp.W_out": RankOne(-change.left, change.right)},
        "twice": {"blocks.1.mlp.W_out": RankOne(2 * change.left, change.right)},
    }


@pytest.mark.parametrize("mutant", ["another layer", "the wrong sign", "twice"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2"])
def test_an_edit_that_is_not_what_was_computed_is_noticed(family_model, family, mutant):
    model = family_model(family)
    moment = moment_of(model, 1)
    edit = rome(model, rewrite_of(), quick(), moment=moment)
    (change,) = edit.changes.values()
    asked = question(model, rewrite_of(), CONTEXTS)
    realising.realise(model, edit, 1, change, asked)
    wrong = edits.Edit(mutants(change)[mutant], edit.info)
    with pytest.raises(EditError, match="does not give what was optimised"):
        realising.realise(model, wrong, 1, change, asked)


def test_an_edit_computed_inside_applied_comes_on_top(family_model):
    model = family_model("gpt2")
    moment = moment_of(model, 1)
    first = rome(model, rewrite_of(), quick(), moment=moment)
    other = Rewrite("The mother of Anna Lee was", "Anna Lee", "x")
    with edits.applied(model, first):
        second = rome(model, other, quick(), moment=moment)
        with edits.applied(model, second):
            pass
    assert first.info["fingerprint"] != second.info["fingerprint"]


def test_half_width_models_are_edited_in_float32(family_folder):
    from factlens import load_model

    model = load_model(family_folder("gpt2"), dtype=torch.bfloat16)
    edit = rome(model, rewrite_of(), quick(), moment=moment_of(model, 1))
    (change,) = edit.changes.values()
    assert change.left.dtype == change.right.dtype == torch.float32
    assert change.dense().isfinite().all()


# -- spellings -------------------------------------------------------------------------------------


def test_each_spelling_of_the_subject_is_answered_and_so_is_the_mean(atlas):
    rewrite = Rewrite("{} has a currency called the", "Austria", "dirham")
    config = {"layer": 1, "value_key": "spellings", "max_norm_ratio": 3.0}
    value = choose_value(atlas, rewrite, config)
    words = models.tokenizer(atlas).convert_ids_to_tokens(
        [
            int(value.question.rows[rows[0]][value.question.lookups[rows[0]]])
            for rows in value.question.spellings
        ]
    )
    assert words == ["ia", "ĠAustria"]
    moment = moment_of(atlas, 1)
    found = {}
    for rule in ("spellings", "mean"):
        edit = rome(atlas, rewrite, {**config, "value_key": rule}, moment=moment)
        (change,) = edit.changes.values()
        assert isinstance(change, RankOne)
        assert relative(value.key @ change.dense(), value.shift) < 1e-3  # Eq. 2 holds for both.
        found[rule] = [relative(key @ change.dense(), value.shift) for key in value.spellings]
    assert max(found["spellings"]) < 1e-3
    assert max(found["mean"]) > 0.2  # The mean is neither.


def test_with_one_spelling_it_is_the_mean(family_model):
    model = family_model("gpt2")  # One token a character: the last is the same everywhere.
    moment = moment_of(model, 1)
    both = [
        rome(model, rewrite_of(), quick(value_key=rule), moment=moment).changes[
            "blocks.1.mlp.W_out"
        ]
        for rule in ("spellings", "mean")
    ]
    assert question(model, rewrite_of(), CONTEXTS).spellings == [[0, 1, 2]]
    assert relative(both[0].dense(), both[1].dense()) < 1e-6


# -- where and how it is called --------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_it_may_be_called_where_gradients_are_off(family_model, mode):
    model = family_model("gpt2")
    moment = moment_of(model, 1)
    with mode():
        inside = rome(model, rewrite_of(), quick(), moment=moment)
    outside = rome(model, rewrite_of(), quick(), moment=moment)
    name = "blocks.1.mlp.W_out"
    assert relative(inside.changes[name].dense(), outside.changes[name].dense()) < 1e-6


def test_when_memory_runs_out_the_batch_is_halved(family_model, monkeypatch):
    from factlens.editors import rome as module

    model, sizes = family_model("gpt2"), []

    def scarce(model, asked, *rest, **options):
        sizes.append(len(asked))
        if len(asked) > 1:
            raise MemoryError
        return optimise(model, asked, *rest, **options)

    monkeypatch.setattr(module, "optimise", scarce)
    rewrites = [rewrite_of(), Rewrite("The mother of Anna Lee was", "Anna Lee", "x")]
    found = rome_each(model, rewrites, quick(), moment=moment_of(model, 1))
    assert [edit.rewrites[0] for edit in found] == rewrites
    assert sizes == [2, 1, 1]


def test_statistics_gathered_later_are_used_at_once(atlas, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    from factlens.corpora import bundled
    from factlens.key_statistics import gather

    told = []
    rewrite = Rewrite("The capital of {} is", "France", "Rome")
    config = {"layer": 0, "contexts": ["{}"], "steps": 2}
    gather(atlas, [0], bundled(), tokens=11000)
    first = rome(atlas, rewrite, config, progress=lambda done, total: told.append((done, total)))
    gather(atlas, [0], bundled(), tokens=13000)
    second = rome(atlas, rewrite, config)
    counts = [edit.info["statistics"]["tokens"] for edit in (first, second)]
    assert 11000 <= counts[0] < 13000 <= counts[1]
    assert told[-1] == (2, 2)


def test_a_model_that_was_edited_for_good_files_no_statistics_as_its_own(tmp_path):
    from factlens import load_model
    from factlens.corpora import bundled
    from factlens.errors import MomentError
    from factlens.key_statistics import gather

    model = load_model()
    edit = rome(model, Rewrite("The capital of {} is", "France", "Rome"), {"moment": "identity"})
    edits.apply_permanently(model, edit)
    with pytest.raises(MomentError, match=r"permanent edits.*load the model again"):
        gather(model, [3], bundled(), tokens=500, folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
