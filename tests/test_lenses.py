"""Looking inside an edit: against Hugging Face's own logits, closed forms, and one run per cell."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from builders import FAMILIES
from transformers import AutoModelForCausalLM

from factlens import Edit, Rewrite, applied, edits, lenses, models, runs
from factlens.changes import Dense, RankOne
from factlens.editors.rome import choose_key, insert
from factlens.errors import EditError, FactError, PlanError
from factlens.lenses import bleedover, key_similarity, next_tokens, readers, value_lens
from factlens.moments import KeyMoment

# One token a character, and behind a bracket an answer has no space: any token can be the target.
PROMPT, SUBJECT, LAYER = "Mount Olga is (", "Mount Olga", 1
OTHERS = [Rewrite("{} lies by", "Lake Oba", "x"), Rewrite("We saw {} in", "Ulm", "x")]

every_family = pytest.mark.parametrize("family", FAMILIES)


def rewrite_of(**changes) -> Rewrite:
    return Rewrite(**{"prompt": PROMPT, "subject": SUBJECT, "target": "x", **changes})


def tokens_of(model, text):
    return torch.tensor([models.tokenizer(model)(text)["input_ids"]])


def keys_of(model, text, layer=LAYER):
    """The MLP's keys at all positions of a text, as its output module gets them."""
    caught = []
    module = models.output_module(model, layer)
    site = models.key_site(layer)
    assert module is not None
    model.run_with_hooks(
        tokens_of(model, text), fwd_hooks=[(site, lambda act, hook=None: caught.append(act) or act)]
    )
    return caught[0].detach().reshape(tokens_of(model, text).shape[1], -1)


def outputs_of(model, text, layer=LAYER):
    """What `W_out` gives at all positions of a text, before any norm after it."""
    caught = []
    keep = lambda module, args, output: caught.append(output.detach().clone())  # noqa: E731
    handle = models.output_module(model, layer).register_forward_hook(keep)
    runs.logits_of(model, tokens_of(model, text))
    handle.remove()
    return caught[0].reshape(tokens_of(model, text).shape[1], -1)


def edit_of(model, *, only_at=None, seed=0, layer=LAYER, size=6.0) -> Edit:
    """A random rank-one edit; with `only_at` it moves nothing at the prompt's other positions."""
    generator = torch.Generator().manual_seed(seed)
    keys = keys_of(model, PROMPT, layer)
    left = torch.randn(keys.shape[1], generator=generator)
    if only_at is not None:
        rest = keys[[n for n in range(len(keys)) if n != only_at]].double()
        left = (left.double() - torch.linalg.pinv(rest) @ (rest @ left.double())).float()
        left = left / (keys[only_at] @ left)
    right = torch.randn(int(models.cfg(model).d_model), generator=generator)
    change = RankOne(left=left, right=size * right / right.norm())
    name, about = models.W_out_name(layer), edits.info_for(model, "by hand", {}, [rewrite_of()])
    with applied(model, Edit({name: change}, about)):
        after = probs_of(model)
    # The target is what the edit moves most, so that what is measured is not noise.
    moves = (after - probs_of(model)).abs()
    moves[[0, *tokens_of(model, " ")[0, -1:].tolist()]] = 0
    target = models.tokenizer(model).decode([int(moves.argmax())])
    return Edit({name: change}, {**about, "rewrites": [vars(rewrite_of(target=target))]})


def lookup_of(model) -> int:
    """The subject's last token: one token a character, and perhaps a start token."""
    return tokens_of(model, SUBJECT).shape[1] - 1


def probs_of(model, text=PROMPT):
    return runs.logits_of(model, tokens_of(model, text))[0, -1].softmax(-1)


def prob_of(model, target, text=PROMPT) -> float:
    """Of the target's first token, which is the space before it where there is one."""
    joined = target if text == PROMPT else " "
    (token,) = models.tokenizer(model)(joined, add_special_tokens=False)["input_ids"]
    return float(probs_of(model, text)[token])


# -- what is said next -----------------------------------------------------------------------------


@every_family
def test_next_tokens_are_those_of_hugging_face(family_model, family_folder, family):
    model, hf = (
        family_model(family),
        AutoModelForCausalLM.from_pretrained(family_folder(family)).eval(),
    )
    found = next_tokens(model, [PROMPT, "Ulm"], top=3)
    assert list(found.columns) == ["prompt", "rank", "token", "logit", "prob"]
    assert found["rank"].tolist() == [1, 2, 3, 1, 2, 3]
    for prompt, group in found.groupby("prompt"):
        with torch.no_grad():
            logits = hf(tokens_of(model, prompt)).logits[0, -1]
        best = logits.softmax(-1).topk(3)
        assert group["token"].tolist() == [
            models.tokenizer(model).decode([n]) for n in best.indices
        ]
        assert group["prob"].tolist() == pytest.approx(best.values.tolist(), abs=1e-5)
        assert group["logit"].tolist() == pytest.approx(
            logits[best.indices].tolist(), rel=1e-4, abs=1e-4
        )


def test_next_tokens_of_an_edited_model_are_its_own(family_model):
    model = family_model("gpt2")
    before = next_tokens(model, PROMPT)
    with applied(model, edit_of(model)):
        after = next_tokens(model, PROMPT)
    assert not after["prob"].equals(before["prob"])
    pd.testing.assert_frame_equal(next_tokens(model, PROMPT), before)


def test_more_tokens_than_there_are_is_all_of_them(family_model):
    model = family_model("gpt2")
    found = next_tokens(model, PROMPT, top=10_000)
    assert len(found) == models.cfg(model).d_vocab
    assert found["prob"].sum() == pytest.approx(1, abs=1e-5)


# -- values ----------------------------------------------------------------------------------------


@every_family
def test_the_lens_on_the_last_state_says_what_the_model_says(family_model, family):
    model = family_model(family)
    site = models.site(models.n_layers(model) - 1, "resid_post")
    _, acts = runs.run_with_cache(model, tokens_of(model, PROMPT), [site])
    found = value_lens(model, acts[site][0, -1], top=5)
    wanted = next_tokens(model, PROMPT, top=5).drop(columns="prompt")
    assert list(found.columns) == ["rank", "token", "logit", "prob"]
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-4, atol=1e-5)
    another = value_lens(model, acts[site][0, -2], top=5)
    assert another["prob"].tolist() != pytest.approx(wanted["prob"].tolist(), rel=1e-2)


def test_the_cap_on_logits_shows(family_model, monkeypatch):
    model = family_model("gemma2")
    vector = torch.linspace(-1, 1, int(models.cfg(model).d_model))
    capped = value_lens(model, vector)["logit"]
    monkeypatch.setattr(models.cfg(model), "output_logits_soft_cap", -1.0)
    free = value_lens(model, vector)["logit"]
    assert capped.tolist() == pytest.approx((30 * torch.tanh(torch.tensor(free) / 30)).tolist())
    assert (free - capped).abs().max() > 1e-3


@every_family
def test_twice_the_vector_says_the_same_and_less_than_nothing_says_the_opposite(
    family_model, family
):
    model = family_model(family)
    vector = 100 * torch.sin(torch.arange(1.0, 1 + int(models.cfg(model).d_model)))
    once, twice = value_lens(model, vector), value_lens(model, 2 * vector)
    pd.testing.assert_frame_equal(once, twice, rtol=1e-3, atol=1e-4)
    assert value_lens(model, -vector)["token"].tolist() != once["token"].tolist()


@every_family
def test_with_a_layer_a_value_says_what_it_says_in_the_stream(family_model, family):
    model = family_model(family)
    norm = getattr(model.blocks[LAYER], "ln2_post", torch.nn.Identity())
    weights = list(norm.parameters())
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:  # Fresh norms only scale, which the final one does anyway.
            weight.data += torch.linspace(-1, 1, len(weight))
        site = models.site(LAYER, "mlp_out")
        _, acts = runs.run_with_cache(model, tokens_of(model, PROMPT), [site])
        value = outputs_of(model, PROMPT)[-1]
        wanted = value_lens(model, acts[site][0, -1])
        found, bare = value_lens(model, value, layer=LAYER), value_lens(model, value)
    finally:
        for weight, own in zip(weights, before, strict=True):
            weight.data.copy_(own)
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-4, atol=1e-4)
    # Only Gemma 2 has a norm after W_out.
    same = bare["logit"].tolist() == pytest.approx(found["logit"].tolist(), rel=1e-3)
    assert same is (family != "gemma2")


# -- keys ------------------------------------------------------------------------------------------


def moment_of(model, layer=LAYER) -> KeyMoment:
    keys = torch.cat([keys_of(model, text, layer) for text in (PROMPT, "It was so.", "Lake Oba")])
    total = keys.T @ keys + 0.05 * len(keys) * torch.eye(keys.shape[1])
    return KeyMoment(total.double(), len(keys))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_similarity_is_the_cosine_of_the_keys_that_rome_edits(family_model, family):
    model = family_model(family)
    rewrites = [rewrite_of(), *OTHERS]
    keys = torch.stack([choose_key(model, each, {"layer": LAYER}) for each in rewrites])
    found = key_similarity(model, rewrites, LAYER)
    assert list(found.index) == list(found.columns) == [each.subject for each in rewrites]
    wanted = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    assert torch.tensor(found.to_numpy()).float().allclose(wanted, atol=1e-5)
    assert found.iloc[0, 1] < 0.999  # Not all alike.


@every_family
def test_a_subject_alone_has_its_last_tokens_key(family_model, family):
    model = family_model(family)
    names = [SUBJECT, "Ulm", "Lake Oba"]
    keys = torch.stack([keys_of(model, name)[-1] for name in names])
    wanted = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    found = torch.tensor(key_similarity(model, names, LAYER).to_numpy()).float()
    assert found.allclose(wanted, atol=1e-5)


def test_the_identity_whitens_nothing(family_model):
    model = family_model("gpt2")
    width = models.W_out(model, LAYER).shape[0]
    plain = key_similarity(model, [SUBJECT, "Ulm"], LAYER)
    same = key_similarity(model, [SUBJECT, "Ulm"], LAYER, moment=3 * torch.eye(width))
    pd.testing.assert_frame_equal(plain, same)


def test_the_whitened_similarity_decides_how_far_an_edit_reaches(family_model):
    model, moment = family_model("gpt2"), moment_of(family_model("gpt2"))
    names = [SUBJECT, "Ulm", "Lake Oba"]
    keys = torch.stack([keys_of(model, name)[-1] for name in names]).double()
    shift = torch.ones(int(models.cfg(model).d_model), dtype=torch.float64)
    across = torch.linalg.inv(moment.mean())
    lengths = torch.einsum("nd,de,ne->n", keys, across, keys).sqrt()
    whitened = key_similarity(model, names, LAYER, moment=moment)
    plain = key_similarity(model, names, LAYER)
    for one, name in enumerate(names):
        moved = keys @ insert(keys[one], shift, moment.mean()).dense()
        shares = moved[:, 0]  # The shift is all ones.
        ratio = lengths / lengths[one]
        assert (torch.tensor(whitened[name].to_numpy()) * ratio).tolist() == pytest.approx(
            shares.tolist(), abs=1e-6
        )
        assert (torch.tensor(plain[name].to_numpy()) * ratio).tolist() != pytest.approx(
            shares.tolist(), abs=1e-2
        )


@every_family
def test_the_share_is_how_far_the_output_moves_at_the_other_prompt(family_model, family):
    model, edit = family_model(family), edit_of(family_model(family))
    target = edit.rewrites[0].target
    found = bleedover(model, edit, OTHERS)
    assert found["subject"].tolist() == [SUBJECT, "Lake Oba", "Ulm"]
    moved = []
    for prompt, subject in [(PROMPT, SUBJECT), *((each.prompt, each.subject) for each in OTHERS)]:
        at = tokens_of(model, prompt[: prompt.index(subject)] + subject).shape[1] - 1
        before = outputs_of(model, prompt)[at]
        with applied(model, edit):
            moved.append((outputs_of(model, prompt)[at] - before).double())
    for share, vector in zip(found["share"], moved, strict=True):
        torch.testing.assert_close(share * moved[0], vector, atol=2e-4, rtol=1e-3)
    assert found["share"].iloc[0] == pytest.approx(1)
    assert found["share"].iloc[1:].abs().min() > 1e-3
    for name, prompt in zip(found["prompt"], (PROMPT, *(o.prompt for o in OTHERS)), strict=True):
        assert name == prompt
        row = found[found["prompt"] == prompt].iloc[0]
        assert row["prob_before"] == pytest.approx(prob_of(model, target, prompt), abs=1e-6)
        with applied(model, edit):
            assert row["prob_after"] == pytest.approx(prob_of(model, target, prompt), abs=1e-6)


def test_an_edit_that_moves_only_its_own_key_has_no_share_elsewhere(family_model):
    model = family_model("gpt2")
    edit = edit_of(model, only_at=lookup_of(model))
    longer = rewrite_of(subject="Mount Olga is")
    assert bleedover(model, edit, [longer])["share"].tolist() == pytest.approx([1, 0], abs=1e-4)


def test_of_an_edit_of_higher_rank_the_share_is_the_part_along_its_shift(family_model):
    model = family_model("gpt2")
    one, two = edit_of(model), edit_of(model, seed=1)
    both = Dense(
        next(iter(one.changes.values())).dense() + next(iter(two.changes.values())).dense()
    )
    edit = Edit({models.W_out_name(LAYER): both}, one.info)
    own, other = keys_of(model, PROMPT)[lookup_of(model)], keys_of(model, "Lake Oba")[-1]
    shift = own @ both.delta
    wanted = float((other @ both.delta) @ shift / (shift @ shift))
    found = bleedover(model, edit, [Rewrite("{} lies by", "Lake Oba", "x")])
    assert found["share"].iloc[1] == pytest.approx(wanted, abs=1e-5)


# -- where the new fact is read --------------------------------------------------------------------


@every_family
def test_cutting_below_the_edit_changes_nothing_and_cutting_at_the_end_undoes_it(
    family_model, family
):
    model, edit = family_model(family), edit_of(family_model(family))
    weight, target = models.W_out(model, LAYER).detach().clone(), edit.rewrites[0].target
    found = readers(model, edit)
    assert torch.equal(models.W_out(model, LAYER), weight)
    assert found["prob_unedited"].unique() == pytest.approx(prob_of(model, target), abs=1e-6)
    with applied(model, edit):
        assert found["prob_edited"].unique() == pytest.approx(prob_of(model, target), abs=1e-6)
    assert abs(found["prob_edited"][0] - found["prob_unedited"][0]) > 0.01
    assert found["effect"].tolist() == pytest.approx(
        (found["prob_edited"] - found["prob_severed"]).tolist()
    )
    below = found.query("layer < @LAYER or (layer == @LAYER and kind == 'attn')")
    assert below["effect"].abs().max() < 1e-5
    end = found[(found["kind"] == "state") & (found["layer"] == found["layer"].max())].iloc[-1]
    assert end["role"] == "last"
    assert end["prob_severed"] == pytest.approx(found["prob_unedited"][0], abs=1e-5)
    assert found.query("layer > @LAYER")["effect"].abs().max() > 1e-3


@every_family
def test_an_edit_of_one_token_goes_by_its_mlp_and_is_read_by_attention(family_model, family):
    model = family_model(family)
    at = lookup_of(model)
    edit, depth = edit_of(model, only_at=at, size=60.0), models.n_layers(model)
    found = readers(model, edit, window=1)
    whole = readers(model, edit, kinds="attn", window=2 * depth)
    unedited = found["prob_unedited"][0]
    own = found.query("kind == 'mlp' and layer == @LAYER and position == @at")
    assert own["prob_severed"].item() == pytest.approx(unedited, abs=1e-5)
    # At the last token nothing but attention brings it: with all of that frozen, the edit is not seen.
    last = whole[whole["role"] == "last"]
    assert last["prob_severed"].tolist() == pytest.approx([unedited] * depth, abs=1e-5)
    assert abs(found["prob_edited"][0] - unedited) > 0.01
    # Of an edit that changes other tokens as well, neither holds.
    anywhere = readers(model, edit_of(model), kinds=("mlp", "attn"), window=2 * depth)
    assert anywhere.query("kind == 'attn' and role == 'last'")["prob_severed"].tolist() != (
        pytest.approx([anywhere["prob_unedited"][0]] * depth, abs=1e-4)
    )


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt", "gemma2"])
@pytest.mark.parametrize("window", [1, 2])
def test_each_cell_is_a_run_of_its_own(family_model, family, window, monkeypatch):
    model, edit = family_model(family), edit_of(family_model(family))
    monkeypatch.setattr(lenses, "ROWS", 7)
    found = readers(model, edit, window=window)
    sites = {"state": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
    names = [models.site(n, each) for n in range(models.n_layers(model)) for each in sites.values()]
    _, unedited = runs.run_with_cache(model, tokens_of(model, PROMPT), names)
    target = edit.rewrites[0].target
    (token,) = models.tokenizer(model)(target, add_special_tokens=False)["input_ids"]

    def freezing(name, position):
        def freeze(act, hook=None):
            act = act.clone()
            act[:, position] = unedited[name][:, position]
            return act

        return name, freeze

    with applied(model, edit):
        for cell in found.iloc[::11].itertuples():
            layers = [cell.layer]
            if cell.kind != "state" and window == 2:
                layers = [n for n in (cell.layer - 1, cell.layer) if n >= 0]
            hooks = [freezing(models.site(n, sites[cell.kind]), cell.position) for n in layers]
            logits = runs.logits_of(model, tokens_of(model, PROMPT), hooks)
            assert cell.prob_severed == pytest.approx(
                float(logits[0, -1].softmax(-1)[token]), abs=1e-5
            )


def test_the_frame_names_each_cell_once(family_model):
    model = family_model("gpt2")
    found = readers(model, edit_of(model), kinds=["attn", "state"])
    assert list(found.columns) == [
        *("kind", "layer", "position", "token", "role"),
        *("prob_unedited", "prob_edited", "prob_severed", "effect"),
    ]
    assert not found.duplicated(["kind", "layer", "position"]).any()
    assert len(found) == 2 * 4 * len(PROMPT)  # From the subject on, which comes first here.
    later = readers(model, edit_of(model), rewrite_of(prompt="So, {} is in ("), kinds="attn")
    assert later["position"].min() == len("So, ")
    assert later["role"].unique().tolist() == [
        *("first subject", "middle subject", "last subject", "first after", "further", "last")
    ]


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_not_there_is_refused(family_model):
    model = family_model("gpt2")
    edit, vector = edit_of(model), torch.ones(int(models.cfg(model).d_model))
    two = Edit(edit.changes, {**edit.info, "rewrites": [*edit.info["rewrites"]] * 2})
    still = Edit({models.W_out_name(1): RankOne(torch.zeros(128), vector)}, edit.info)
    other = Edit({"blocks.0.mlp.W_in": Dense(torch.zeros(32, 128))}, edit.info)
    for error, words, call in [
        (PlanError, "no layer 4; the model has 0 to 3", lambda: key_similarity(model, ["a"], 4)),
        (PlanError, "no layer -1", lambda: value_lens(model, vector, layer=-1)),
        (PlanError, "no subject was given", lambda: key_similarity(model, [], 1)),
        (PlanError, "3 entries and the model's stream 32", lambda: value_lens(model, vector[:3])),
        (PlanError, "from 1 up, not 0", lambda: next_tokens(model, PROMPT, top=0)),
        (PlanError, "from 1 up, not 0", lambda: value_lens(model, vector, top=0)),
        (PlanError, "no kind 'head'", lambda: readers(model, edit, kinds="head")),
        (PlanError, "a window", lambda: readers(model, edit, window=0)),
        (FactError, "has no tokens", lambda: next_tokens(model, "")),
        (FactError, "no prompt was given", lambda: next_tokens(model, [])),
        (EditError, "2 rewrites; say which", lambda: readers(model, two)),
        (EditError, "2 rewrites; say which", lambda: bleedover(model, two, OTHERS)),
        (EditError, "moves nothing", lambda: bleedover(model, still, OTHERS)),
        (EditError, "W_in is no MLP's output", lambda: bleedover(model, other, OTHERS)),
    ]:
        with pytest.raises(error, match=words):
            call()
    assert len(readers(model, two, rewrite_of(), kinds="attn"))
