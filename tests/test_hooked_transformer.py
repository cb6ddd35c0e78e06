"""A user's own HookedTransformer (TransformerLens 3.9) is traced and edited as a bridge is. Run by `make test-hooked-transformer`."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import lay_in_cache, save_model
from conftest import ORACLE
from test_engines import CUTS, PROMPT, SUBJECT, assert_engines_agree, problem_of
from test_gradients import relative_gap, shortfall
from test_metrics import one_by_one
from test_rome import moment_of, quick, relative, rewrite_of
from test_tails import assert_tails_agree

from factlens import Edit, Fact, applied, export, fingerprint, load_model, models, runs, trace
from factlens.editors.attention import attn_edit
from factlens.editors.fine_tuning import ft
from factlens.editors.hypernetworks import (
    batch_of,
    changed,
    edited_maps,
    gradients_of,
    logprobs_of,
    row_of,
)
from factlens.editors.knowledge_neurons import kn
from factlens.editors.rome import rome
from factlens.engines.one_pass import run_one_pass
from factlens.engines.plain import run_plain
from factlens.errors import EditError
from factlens.gradients import attribution_patching, integrated_gradients
from factlens.metrics import score

try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

pytestmark = [
    pytest.mark.skipif(
        HookedTransformer is None, reason="HookedTransformer was removed in TransformerLens 4"
    ),
    pytest.mark.filterwarnings("ignore:HookedTransformer.*is deprecated"),
    pytest.mark.filterwarnings("ignore:the edit of .* did not take"),
]

REPOS = {
    "gpt2": "gpt2",
    "gptj": "EleutherAI/gpt-j-6B",
    "gpt_neox": "EleutherAI/pythia-70m",
    "gpt_neo": "EleutherAI/gpt-neo-125M",
    "qwen2": "Qwen/Qwen2-0.5B",
    "qwen3": "Qwen/Qwen3-0.6B",
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A HookedTransformer over a small random model, converted by TransformerLens itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache = tmp_path_factory.mktemp("hub")
    made: dict[tuple[str, bool], object] = {}

    def make(family: str, *, processed: bool = False, folder=None):
        key = (f"{family}{folder or ''}", processed)
        if key in made:
            return made[key]
        where = folder or cache / "models" / family
        if not (where / "config.json").exists():
            save_model(where, family)
        hub = cache / f"{key[0]}-{processed}".replace("/", "-")
        lay_in_cache(where, REPOS[family], hub)
        for config in hub.rglob("config.json"):  # TransformerLens 3.9 reads the old name.
            given = json.loads(config.read_text())
            config.write_text(json.dumps({"n_ctx": given.get("n_positions"), **given}))
        load = HookedTransformer.from_pretrained
        options = {"fold_ln": processed, "center_writing_weights": processed}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
            patch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub), raising=False)
            made[key] = load(
                REPOS[family],
                hf_model=AutoModelForCausalLM.from_pretrained(where),
                tokenizer=AutoTokenizer.from_pretrained(where),
                center_unembed=False,
                fold_value_biases=False,
                device="cpu",
                cache_dir=str(hub),
                **options,
            )
        return made[key]

    return make


@pytest.mark.parametrize("family", REPOS)
def test_one_pass_equals_plain_on_a_hooked_transformer(build, family):
    model = build(family)
    expected = assert_engines_agree(model, problem_of(model, more=(1, 10)))
    probs = expected.restored[..., 0]
    assert probs.max() - probs.min() >= 0.05


def test_processed_weights_are_traced_as_given_and_recorded(build):
    model = build("gpt2", processed=True)
    assert_engines_agree(model, problem_of(model, severed=CUTS))
    assert models.processing(model) == "layer norm folded, weights centred"
    assert models.processing(build("gpt2")) == "none"


@pytest.mark.parametrize("family", REPOS)
def test_it_is_traced_by_one_pass_with_prefix_reuse(build, family):
    traced = trace(build(family), PROMPT, subject=SUBJECT, samples=1, noise_level=1.0)
    assert (traced.engine, traced.prefix_reuse, traced.fallback_reason) == ("one-pass", True, None)


def test_bfloat16_is_traced_within_its_rounding(build):
    model = deepcopy(build("gpt2")).to(torch.bfloat16)
    problem = problem_of(model, severed=("none",))
    fast, slow = run_one_pass(model, problem), run_plain(model, problem)
    assert models.dtype_of(model) == torch.bfloat16
    assert (fast.restored[..., 0] - slow.restored[..., 0]).abs().max() < 0.05


def test_token_ids_are_hugging_faces_although_the_model_prepends_a_bos(build):
    model = build("gpt2")
    assert model.to_tokens("abc").shape[1] == 4, "its own string path prepends one"
    traced = trace(model, PROMPT, subject=SUBJECT, samples=1, noise_level=1.0, kinds="state")
    assert traced.frame["position"].max() + 1 == len(PROMPT)


def test_the_oracle_is_reproduced_and_the_fingerprint_is_the_bridges(build):
    model = build("gpt2", folder=ORACLE / "model")
    arrays = np.load(ORACLE / "tracing.npz")
    traced = trace(
        model,
        Fact(str(arrays["c0.prompt"]), str(arrays["c0.subject"])),
        kinds="state",
        noise="rome",
        noise_level=float(arrays["noise_level"]),
        include_embedding=False,
    )
    grid = traced.frame.pivot(index="position", columns="layer", values="prob_restored")
    np.testing.assert_allclose(grid.to_numpy(), arrays["c0.states"], atol=1e-5)
    bridge = models.load_model(ORACLE / "model")
    assert fingerprint(model) == fingerprint(bridge)
    weight = model.blocks[2].mlp.W_out
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 0.1
    try:
        assert fingerprint(model) != fingerprint(bridge)
    finally:
        weight.data.copy_(before)


def test_both_engines_sever_alike_on_processed_weights(build):
    model = build("gptj", processed=True)
    problem = problem_of(model, severed=("both",))
    gap = run_one_pass(model, problem).restored[..., 0] - run_plain(model, problem).restored[..., 0]
    assert gap.abs().max() < 1e-5


@pytest.mark.parametrize("family", REPOS)
def test_gradients_are_complete_and_of_first_order(build, family):
    model, fact = build(family), Fact(PROMPT, SUBJECT)
    far = trace(model, fact, samples=2, noise_level=0.05, kinds="state")
    found = integrated_gradients(model, far, steps=24)
    total = far.totals()["total_effect"].abs().iloc[0]
    assert shortfall(found).abs().max() < 0.02 * total + 1e-6
    near = trace(model, fact, samples=2, noise_level=0.001, window=1)
    assert (relative_gap(near, attribution_patching(model, near)) < 0.1).all()


def test_gradients_are_those_of_the_bridge(build):
    arrays = np.load(ORACLE / "tracing.npz")
    both = build("gpt2", folder=ORACLE / "model"), load_model(ORACLE / "model")
    fact = Fact(str(arrays["c0.prompt"]), str(arrays["c0.subject"]))
    noise = {"samples": 2, "noise": "rome", "noise_level": float(arrays["noise_level"])}
    for method in (integrated_gradients, attribution_patching):
        one, other = (method(model, fact, **noise)["attribution"] for model in both)
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.abs(one).max() > 0.1


def test_gradients_of_processed_and_narrow_weights(build):
    fact, noise = Fact(PROMPT, SUBJECT), {"samples": 2, "noise_level": 0.05}
    found = integrated_gradients(build("gpt2", processed=True), fact, steps=24, **noise)
    assert shortfall(found).abs().max() < 1e-3
    narrow = deepcopy(build("gpt2")).to(torch.bfloat16)
    for method in (integrated_gradients, attribution_patching):
        assert method(narrow, fact, **noise)["attribution"].notna().all()


# -- editing ---------------------------------------------------------------------------------------

PROCESSED = [*((family, False) for family in REPOS), ("gpt2", True), ("gptj", True)]
TOKENS = torch.randint(1, 90, (2, 15), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", REPOS)
def test_the_fingerprint_is_the_bridges(build, family, family_folder):
    model = build(family, folder=family_folder(family))
    bridge = load_model(family_folder(family))
    assert fingerprint(model) == fingerprint(bridge)
    assert fingerprint(build(family, processed=True)) != fingerprint(bridge)
    # Of all that is read differently, a change shows: shared heads, norms, output matrices.
    names = ["ln1.w", "mlp.W_out", "attn._W_K" if family.startswith("qwen") else "attn.W_K"]
    for name in names:
        weight = models.weight(model, f"blocks.3.{name}")
        before = weight.detach().clone()
        weight.data.view(-1)[5] += 0.1
        assert fingerprint(model) != fingerprint(bridge)
        weight.data.copy_(before)
    assert fingerprint(model) == fingerprint(bridge)


@pytest.mark.parametrize(("family", "processed"), PROCESSED)
def test_runs_that_begin_at_the_changed_output_are_whole_runs(build, family, processed):
    model = build(family, processed=processed)
    for layer in (1, 3):
        assert_tails_agree(model, layer)


@pytest.mark.parametrize("family", REPOS)
def test_an_edit_is_the_bridges_and_each_fits_the_other(build, family, family_folder, tmp_path):
    model = build(family, folder=family_folder(family))
    bridge = load_model(family_folder(family))
    moment, before = moment_of(bridge, 1), {n: t.clone() for n, t in model.state_dict().items()}
    # Both raise if the edited model does not do what was optimised.
    edit, wanted = (rome(each, rewrite_of(), quick(), moment=moment) for each in (model, bridge))
    (change,), (other,) = edit.changes.values(), wanted.changes.values()
    assert relative(change.dense(), other.dense()) < 1e-3
    assert edit.info["results"][0]["engine"] == "tails"
    loaded = Edit.load(wanted.save(tmp_path / "edit"))
    clean = runs.logits_of(model, TOKENS).log_softmax(-1)
    with applied(model, loaded), applied(bridge, edit):
        ours, theirs = (runs.logits_of(each, TOKENS).log_softmax(-1) for each in (model, bridge))
    assert (ours - theirs).abs().max() < 1e-3 < 1e-2 < (ours - clean).abs().max()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "editor"), [("gpt2", ft), ("gpt2", attn_edit), ("gptj", attn_edit)]
)
def test_fine_tuning_is_the_bridges(build, family, family_folder, tmp_path, editor):
    # GPT-2 with biases that are not zero; GPT-J's attention has none.
    folder = ORACLE / "model" if family == "gpt2" else family_folder(family)
    lens, bridge = build(family, folder=folder), load_model(folder)
    numbers = {"layer": 1, "steps": 3, "learning_rate": 1e-3}
    one, other = (editor(model, rewrite_of(), numbers) for model in (lens, bridge))
    assert set(one.changes) == set(other.changes)
    before = one.info["results"][0]["loss_first"]
    assert one.info["results"][0]["loss_last"] < before - 0.05
    losses = (edit.info["results"][0]["losses"]["loss"] for edit in (one, other))
    np.testing.assert_allclose(*losses, atol=1e-4)
    for name, change in one.changes.items():
        if not name.endswith("b_K"):  # Its gradient is rounding.
            assert relative(change.dense(), other.changes[name].dense()) < 1e-2, name
    tokens = torch.tensor([[5, 9, 2, 7]])
    with applied(lens, one), applied(bridge, one):
        wanted = runs.logits_of(bridge, tokens)
        torch.testing.assert_close(runs.logits_of(lens, tokens), wanted, atol=1e-4, rtol=1e-4)
    exported = load_model(export(lens, tmp_path / "out", one, base=folder))
    torch.testing.assert_close(runs.logits_of(exported, tokens), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "processed"), [("gpt2", False), ("gpt2", True), ("gptj", False), ("gptj", True)]
)
def test_knowledge_neurons_are_the_bridges(build, family, processed, family_folder):
    lens, bridge = build(family, processed=processed), load_model(family_folder(family))
    one, other = (kn(each, rewrite_of(), {"steps": 5}) for each in (lens, bridge))
    assert one.info["results"][0]["neurons"] == other.info["results"][0]["neurons"]
    clean = runs.logits_of(bridge, TOKENS).log_softmax(-1)
    with applied(lens, one), applied(bridge, other):
        ours, theirs = (runs.logits_of(each, TOKENS).log_softmax(-1) for each in (lens, bridge))
    assert (ours - theirs).abs().max() < 1e-3 < 1e-2 < (theirs - clean).abs().max()


@pytest.mark.parametrize("family", ["gpt2", "gptj", "qwen2"])
def test_gradients_as_pairs_and_what_is_added_are_those_of_the_bridge(
    build, family, tmp_path_factory
):
    folder = save_model(tmp_path_factory.mktemp("pairs") / family, family)
    lens, bridge = build(family, folder=folder), load_model(folder)
    found = []
    for model in (lens, bridge):
        maps = edited_maps(model)
        batch = batch_of(model, [row_of(model, "Mount Olga is in", "abc")])
        pairs = gradients_of(model, maps, batch)
        steps = {name: replace(each, left=-0.1 * each.left) for name, each in pairs.items()}
        with torch.no_grad(), changed(maps, steps, batch.owners):
            found.append((pairs, logprobs_of(model, batch)))
    (one, moved), (other, wanted) = found
    assert set(one) == set(other)
    for name, each in one.items():
        assert relative(each.dense(), other[name].dense()) < 1e-3, name
    torch.testing.assert_close(moved, wanted, atol=1e-3, rtol=1e-3)


def test_heads_that_share_keys_are_refused_where_they_are_stored_repeated(build):
    with pytest.raises(EditError, match=r"attn\.W_K .* computed from other weights"):
        attn_edit(build("qwen2"), rewrite_of(), {"layer": 1, "steps": 1})
    ft(build("gpt2", processed=True), rewrite_of(), {"layer": 1, "steps": 1})


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_an_edit_of_processed_weights_belongs_to_them_only(build, family):
    model, plain = build(family, processed=True), build(family)
    edit = rome(model, rewrite_of(), quick(), moment=moment_of(model, 1))
    before = models.W_out(model, 1).detach().clone()
    with applied(model, edit):
        assert (
            relative(models.W_out(model, 1) - before, edit.changes["blocks.1.mlp.W_out"].dense())
            < 1e-5
        )
    assert models.W_out(model, 1).equal(before)
    with pytest.raises(EditError) as caught, applied(plain, edit):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "processed"), PROCESSED)
def test_targets_are_scored_as_one_by_one(build, family, processed, monkeypatch):
    model = build(family, processed=processed)
    prompts = ("Ab", "A much longer prompt than", "The one of x is")
    pairs = [(prompt, target) for prompt in prompts for target in ("q", "zo")]
    expected = torch.tensor([one_by_one(model, *pair)[0] for pair in pairs])
    for side in ("right", "left"):
        monkeypatch.setattr(model.tokenizer, "padding_side", side)
        found = score(model, pairs).nll
        torch.testing.assert_close(found.double(), expected.double(), atol=5e-5, rtol=0)
