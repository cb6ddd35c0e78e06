"""MEND and KE: gradients as pairs against autograd, the networks against their papers' equations written out, and their edits."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from builders import save_model
from transformers import AutoModelForCausalLM

from factlens import Edit, Rewrite, applied, apply_permanently, export, load_model, models
from factlens.changes import Dense
from factlens.cli import app
from factlens.commands.shared import EDITORS, editor_named
from factlens.editors import each
from factlens.editors.checkpoints import (
    Trained,
    load,
    own_folder,
    packaged,
    trained_for,
)
from factlens.editors.hypernetworks import (
    Asked,
    ask,
    batch_of,
    changed,
    edited_maps,
    logprobs_of,
    nll_of,
    row_of,
    shapes_of,
    text_row,
)
from factlens.editors.ke import KE, KEConfig, ke
from factlens.editors.lessons import Lesson
from factlens.editors.mend import FLOOR, MEND, MENDConfig, Normaliser, mend, mend_cf
from factlens.editors.trained_edits import edit_with
from factlens.editors.training import drill, losses_of
from factlens.edits import info_for
from factlens.errors import (
    ConfigError,
    EditError,
    EditorError,
    FactWarning,
    PromptTooLong,
    SubjectNotFound,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:the edit of .* did not take"),
    pytest.mark.filterwarnings("ignore:the model says .* already"),
]

REWRITES = (
    Rewrite("Mount Olga is in", "Mount Olga", "abc", "xyz"),
    Rewrite("The mother of Anna Lee was", "Anna Lee", "x"),
)
CONFIGS = {
    "mend": MENDConfig(rank=3),
    "ke": KEConfig(lstm=4, condition=6, hidden=5),
}
METHODS = {"mend": MEND, "ke": KE}
EDIT = {"mend": mend, "ke": ke}


def asked_of(model, rewrites=REWRITES) -> Asked:
    rows = [row_of(model, each.prompt, each.target) for each in rewrites]
    return ask(model, edited_maps(model), rows, rewrites)


def network_of(model, method: str, *, seed: int | None = 0):
    """A network whose every parameter is random, as after training; with `seed=None` an untrained one."""
    torch.manual_seed(7)
    network = METHODS[method].network(shapes_of(model, edited_maps(model)), CONFIGS[method])
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.to(torch.promote_types(models.dtype_of(model), torch.float32)).eval()


def trained_of(model, method: str, **changes) -> Trained:
    network = network_of(model, method, **changes)
    with torch.no_grad():
        network.scales.fill_(0.02)
        network.sizes.fill_(0.02)
    info = {**info_for(model, method, {}, ()), "data": "generic"}
    keep = ("model", "fingerprint", "dtype", "data")
    return Trained(METHODS[method], network, CONFIGS[method], {k: info[k] for k in keep})


def state_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# -- the gradient ----------------------------------------------------------------------------------

NAMES = {
    "W_in": ("c_fc", "fc_in", "dense_h_to_4h", "fc1", "up_proj"),
    "W_gate": ("gate_proj",),
    "W_out": ("c_proj", "fc_out", "dense_4h_to_h", "fc2", "down_proj"),
}


@cache
def plain_model(folder):
    """The model as Hugging Face has it, in float64."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return plain.double().eval()


def autograd(folder, model, rewrite: Rewrite) -> dict[str, torch.Tensor]:
    """The gradient of one rewrite's loss by the weights of a plain Hugging Face model, token by token."""
    plain = plain_model(folder)
    plain.zero_grad()
    tokenizer, loss = models.tokenizer(model), 0.0
    ids = tokenizer(rewrite.prompt)["input_ids"]
    target = tokenizer(f" {rewrite.target}", add_special_tokens=False)["input_ids"]
    for n, token in enumerate(target):
        logits = plain(torch.tensor([[*ids, *target[:n]]])).logits[0, -1]
        loss = loss - logits.log_softmax(-1)[token] / len(target)
    loss.backward()
    found = {}
    blocks = next(m for m in plain.modules() if isinstance(m, torch.nn.ModuleList))
    for layer, block in enumerate(blocks):
        for name, module in block.named_modules():
            for ours, theirs in NAMES.items():
                if name.split(".")[-1] in theirs and not name.startswith("attn"):
                    linear = isinstance(module, torch.nn.Linear)
                    gradient = module.weight.grad.T if linear else module.weight.grad
                    found[f"blocks.{layer}.mlp.{ours}"] = gradient.clone()
    return found


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt", "llama"])
def test_pairs_add_up_to_autograds_gradient_of_each_edit(double_model, family_folder, family):
    model = double_model(family)
    found = asked_of(model).gradients
    sides = ("W_in", "W_gate", "W_out") if family == "llama" else ("W_in", "W_out")
    assert set(found) == {f"blocks.{n}.mlp.{side}" for n in (1, 2, 3) for side in sides}
    for number, rewrite in enumerate(REWRITES):
        wanted = autograd(family_folder(family), model, rewrite)
        for name, pairs in found.items():
            scale = float(wanted[name].abs().max())
            torch.testing.assert_close(
                # Some families keep parts of their attention in float32.
                pairs.dense()[number],
                wanted[name],
                atol=1e-6 * scale,
                rtol=1e-5,
            )
            norm = wanted[name].norm()
            torch.testing.assert_close(pairs.norms()[number], norm, atol=0.0, rtol=1e-5)
            other = found[name].dense()[1 - number]
            assert float((other - wanted[name]).norm()) > 0.1 * float(norm)


def test_only_tokens_that_the_loss_depends_on_are_there(double_model):
    model = double_model("gpt2")
    found = asked_of(model).gradients
    lengths = [len(row_of(model, each.prompt, each.target).ids) for each in REWRITES]
    read = found["blocks.3.mlp.W_out"].there.sum(dim=1).tolist()
    assert read == [len(" abc"), len(" x")]
    assert found["blocks.1.mlp.W_in"].there.sum(dim=1).tolist() == lengths
    assert lengths[0] != lengths[1]


def test_a_change_that_is_on_no_weight_is_as_if_it_were(double_model):
    model = double_model("gpt2")
    maps, owners = edited_maps(model), [0, 1, 1, 0]
    gradients = asked_of(model).gradients
    changes = {name: replace(pairs, left=-0.3 * pairs.left) for name, pairs in gradients.items()}
    rows = [row_of(model, each.prompt, each.target) for each in REWRITES]
    batch = batch_of(model, [*rows, *rows], owners)
    with torch.no_grad():
        with changed(maps, changes, batch.owners):
            found = nll_of(batch, logprobs_of(model, batch))
        bare = nll_of(batch, logprobs_of(model, batch))
    assert (found[:2] < bare[:2]).all()
    for number, owner in enumerate(owners):
        edit = Edit({name: Dense(pairs.dense()[owner]) for name, pairs in changes.items()})
        alone = batch_of(model, [rows[number % 2]])
        with applied(model, edit, strict=False), torch.no_grad():
            wanted = nll_of(alone, logprobs_of(model, alone))[0]
        torch.testing.assert_close(found[number], wanted, atol=1e-9, rtol=1e-9)


def test_rows_predict_a_target_or_a_whole_text(double_model):
    model = double_model("gpt2")
    row = row_of(model, "a b", "cd")
    tokens = models.tokenizer(model)("a b cd")["input_ids"]
    assert (list(row.ids), list(row.target), row.start) == (tokens[:-1], tokens[-3:], 2)
    text = text_row(model, "a b cd")
    assert (list(text.ids), list(text.target), text.start) == (tokens[:-1], tokens[1:], 0)
    with pytest.raises(PromptTooLong, match="64 positions"):
        row_of(model, "a" * 63, "bcd")
    with pytest.raises(PromptTooLong, match="fewer than two tokens"):
        text_row(model, "a")


# -- MEND ------------------------------------------------------------------------------------------


def test_an_untrained_mend_gives_exactly_a_step_along_the_plain_gradient(
    double_model, family_folder
):
    model = double_model("gpt2")
    network, asked = network_of(model, "mend", seed=None), asked_of(model)
    with torch.no_grad():
        network.train()(asked)  # Statistics that would show if they did not cancel.
        network.eval()
        network.steps.copy_(torch.linspace(0.5, 2, len(network.steps)))
        changes = network(asked)
    for step, (name, pairs) in zip(network.steps, asked.gradients.items(), strict=True):
        assert torch.equal(changes[name].left, -step * pairs.left)
        assert torch.equal(changes[name].right, pairs.right)
        wanted = autograd(family_folder("gpt2"), model, REWRITES[0])[name]
        torch.testing.assert_close(changes[name].dense()[0], -step * wanted, atol=1e-10, rtol=1e-7)
    other = network_of(model, "mend")(asked)
    assert all(not torch.equal(other[n].right, p.right) for n, p in asked.gradients.items())


def written_out(network, name: str, u: torch.Tensor, delta: torch.Tensor):
    """MEND's equations for one token, entry by entry."""
    state = network.state_dict()
    shape = network.shapes[name]
    place = [n for n, kind in network.shapes.items() if kind == shape].index(name)
    own = f"transforms.{shape[0]}x{shape[1]}."
    z, spreads = [], []
    for part, vector in (("inputs", u), ("deltas", delta)):
        variance = state[f"{own}{part}.squares"] / (state[f"{own}{part}.count"] - 1)
        spread = variance.sqrt()
        spread = torch.maximum(spread, FLOOR * spread.mean())
        z += ((vector - state[f"{own}{part}.mean"]) / spread).tolist()
        spreads += spread.tolist()
    entries, start = list(z), list(z)
    for layer in ("first", "second"):
        U, V, b, s, o = (
            state[f"{own}{layer}.{part}"].tolist() for part in ("U", "V", "bias", "scale", "shift")
        )
        inner = [sum(x * V[i][k] for i, x in enumerate(entries)) for k in range(len(U))]
        entries = [
            x + max(0.0, s[place][j] * (sum(h * U[k][j] for k, h in enumerate(inner)) + b[j]) + o[place][j])
            for j, x in enumerate(entries)
        ]  # fmt: skip
    moved = [s * (g - z) for s, g, z in zip(spreads, entries, start, strict=True)]
    return u + torch.tensor(moved[: len(u)]), delta + torch.tensor(moved[len(u) :])


def test_mend_is_its_papers_equations(double_model):
    model = double_model("gpt2")
    network, asked = network_of(model, "mend"), asked_of(model)
    with torch.no_grad():
        network.train()(asked)
        changes = network.eval()(asked)
    for number, (name, pairs) in enumerate(asked.gradients.items()):
        token = int(pairs.there[1].nonzero()[-1])
        u, delta = written_out(network, name, pairs.left[1, token], pairs.right[1, token])
        step = float(network.steps[number].detach())
        torch.testing.assert_close(changes[name].left[1, token], -step * u)
        torch.testing.assert_close(changes[name].right[1, token], delta)
        assert float((delta - pairs.right[1, token]).norm()) > 0.01 * float(delta.norm())


def test_weights_of_one_shape_share_a_transform_but_not_scale_and_shift(double_model):
    model = double_model("gpt2")
    network, asked = network_of(model, "mend"), asked_of(model)
    assert set(network.transforms) == {"32x128", "128x32"}
    assert network.transforms["32x128"].first.scale.shape == (3, 160)
    one, other = "blocks.1.mlp.W_in", "blocks.2.mlp.W_in"
    swapped = replace(asked, gradients={**asked.gradients, other: asked.gradients[one]})
    with torch.no_grad():
        network.steps.fill_(1.0)
        apart = network(swapped)
        for layer in (network.transforms["32x128"].first, network.transforms["32x128"].second):
            layer.scale[1], layer.shift[1] = layer.scale[0], layer.shift[0]
        alike = network(swapped)
    assert not torch.equal(apart[one].right, apart[other].right)
    assert torch.equal(alike[one].right, alike[other].right)


def test_running_statistics_are_those_of_all_vectors_in_whatever_portions():
    torch.manual_seed(0)
    vectors = torch.randn(50, 4).double() * torch.tensor([1.0, 1e-4, 30.0, 0.0]) + 5
    whole, parts = Normaliser(4).double(), Normaliser(4).double()
    whole.gather(vectors)
    for part in (vectors[:1], vectors[1:1], vectors[1:20], vectors[20:]):
        parts.gather(part)
    for each_ in (whole, parts):
        torch.testing.assert_close(each_.mean, vectors.mean(dim=0))
        torch.testing.assert_close(each_.spread[[0, 2]], vectors.std(dim=0)[[0, 2]])
        floor = FLOOR * float(vectors.std(dim=0).mean())
        torch.testing.assert_close(each_.spread[1:4:2], torch.full((2,), floor).double())
        assert each_(vectors).isfinite().all()
    assert torch.equal(Normaliser(4).spread, torch.ones(4))


def test_edits_leave_the_normalisation_as_it_was_and_training_does_not(double_model):
    model = double_model("gpt2")
    trained = trained_of(model, "mend")
    asked = asked_of(model)
    with torch.no_grad():
        trained.network.train()(asked)
    before = state_of(trained.network)
    first = mend(
        model, REWRITES[0], trained
    )  # Left in training mode: edits are in evaluation mode.
    for rewrite in REWRITES:
        mend(model, rewrite, trained)
    assert same(state_of(trained.network), before)
    again = mend(model, REWRITES[0], trained)
    for name, change in first.changes.items():
        assert torch.equal(change.left, again.changes[name].left)
    with torch.no_grad():
        trained.network.train()(asked)
    moved = state_of(trained.network)
    assert not same(moved, before)
    assert all("transforms" in name for name in moved if not torch.equal(moved[name], before[name]))


# -- KE --------------------------------------------------------------------------------------------


def test_ke_is_its_papers_equations(double_model):
    model = double_model("gpt2")
    network, asked = network_of(model, "ke"), asked_of(model)
    with torch.no_grad():
        network.scales.copy_(torch.linspace(1, 2, 6))
        network.sizes.copy_(torch.linspace(3, 1, 6))
        changes = network(asked)
    table = models.weight(model, "embed.W_E").detach()
    sentences = ("xyz >> abc || Mount Olga is in", " >> x || The mother of Anna Lee was")
    for number, sentence in enumerate(sentences):
        ids = models.tokenizer(model)(sentence)["input_ids"]
        with torch.no_grad():
            _, (ends, _) = network.lstm(table[ids][None] / table.square().mean().sqrt())
            said = torch.tanh(network.condition(torch.cat([ends[0], ends[1]], dim=-1)))[0]
        for place, (name, pairs) in enumerate(asked.gradients.items()):
            d_in, d_out = network.shapes[name]
            layers = network.conditioners[place].layers
            with torch.no_grad():
                hidden = torch.tanh(layers[0].weight @ said + layers[0].bias)
                out = layers[2].weight @ hidden + layers[2].bias
            alpha, beta, gamma, delta, eta = out.split([d_in, d_in, d_out, d_out, 1])
            kept = torch.outer(d_in * torch.softmax(alpha, 0), 1 + gamma)
            added = torch.outer(torch.softmax(beta, 0), delta)
            gradient = pairs.dense()[number]
            scale, size = network.scales[place], network.sizes[place]
            wanted = torch.sigmoid(eta) * (kept * scale * gradient + size * added)
            wanted = -float(network.steps[place].detach()) * wanted
            torch.testing.assert_close(changes[name].dense()[number], wanted)


def test_an_untrained_ke_gives_half_of_the_plain_gradient(double_model):
    model = double_model("gpt2")
    network, asked = network_of(model, "ke", seed=None), asked_of(model)
    changes = network(asked)
    for name, pairs in asked.gradients.items():
        torch.testing.assert_close(changes[name].dense(), -0.5 * pairs.dense())


# -- how parameters are reached --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_the_parameters_are_those_of_finite_differences(tmp_path, method):
    folder = save_model(tmp_path / "gpt2", "gpt2", n_layer=2)
    model = load_model(folder, dtype=torch.float64)
    maps, network = edited_maps(model), network_of(model, method)
    lessons = [Lesson(each, (f"So, {each.prompt}",), ()) for each in REWRITES]
    given = drill(model, lessons, ["some other text", "and one more"], Random(0))
    with torch.no_grad():
        network.scales.fill_(0.05)
        network.sizes.fill_(0.05)
        network.train()(ask(model, maps, given.edits, REWRITES))
    network.eval()

    def loss() -> torch.Tensor:
        found = losses_of(model, maps, network, given)
        return 0.1 * found.said + found.kl.mean()

    loss().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(3)
    chosen = {
        "mend": ("steps", "transforms.32x128.first", "transforms.128x32.second.V"),
        "ke": ("steps", "lstm.weight_ih_l0", "condition.w", "conditioners.1.layers.2"),
    }
    for name, parameter in network.named_parameters():
        if not name.startswith(chosen[method]):
            continue
        direction = torch.randn_like(parameter)
        told = float((parameter.grad * direction).sum())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * direction)
            ends.append(float(loss().detach()))
            with torch.no_grad():
                parameter.sub_(sign * 1e-6 * direction)
        measured = (ends[0] - ends[1]) / 2e-6
        assert measured == pytest.approx(told, rel=2e-3, abs=2e-7), name
    reached = [float(each.grad.abs().max()) for each in network.parameters()]
    assert min(reached) > 0


# -- edits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_edits_are_stored_exported_and_leave_the_model_to_the_bit(
    family_model, tmp_path, method, family
):
    model = family_model(family)
    trained, tokens = trained_of(model, method), torch.tensor([[5, 9, 2, 7]])
    before = state_of(model)
    with torch.inference_mode():
        edit = EDIT[method](model, REWRITES[0], trained)
    assert same(state_of(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(edit.describe()["kind"]) == {"low-rank"}
    loaded = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "model", loaded))
    with torch.no_grad(), applied(model, edit):
        torch.testing.assert_close(
            plain(tokens).logits, model.run_with_hooks(tokens, fwd_hooks=[]), atol=1e-4, rtol=1e-4
        )
    assert same(state_of(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_is_how_many_times_the_proposed_change_is_made(double_model, tmp_path, method):
    model = double_model("gpt2")
    path = str(trained_of(model, method).save(tmp_path / "network.safetensors"))
    plain = EDIT[method](model, REWRITES, {"checkpoint": path})
    for scale in (1.0, 0.25, 3.0):
        edit = EDIT[method](model, REWRITES, {"checkpoint": path, "scale": scale})
        assert edit.info["config"]["scale"] == scale
        for name, change in edit.changes.items():
            wanted = scale * plain.changes[name].dense()
            assert float(wanted.norm()) > 0
            torch.testing.assert_close(change.dense(), wanted, rtol=1e-9, atol=1e-12)
    assert plain.info["config"]["scale"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_several_rewrites_add_and_edits_side_by_side_are_those_made_one_by_one(
    double_model, method
):
    model = double_model("gpt2")
    trained = trained_of(model, method)
    alone = [EDIT[method](model, rewrite, trained) for rewrite in REWRITES]
    both = EDIT[method](model, REWRITES, trained)
    together = each(EDIT[method], model, REWRITES, trained)
    assert both.rewrites == REWRITES
    for name in both.changes:
        parts = [edit.changes[name].dense() for edit in alone]
        torch.testing.assert_close(both.changes[name].dense(), parts[0] + parts[1])
        for one, edit in zip(parts, together, strict=True):
            torch.testing.assert_close(edit.changes[name].dense(), one, atol=1e-12, rtol=1e-9)
        assert float((parts[0] - parts[1]).norm()) > 0.1 * float(parts[0].norm())


def test_an_untrained_network_makes_the_new_object_likelier(double_model):
    model = double_model("gpt2")
    for method in METHODS:
        edit = EDIT[method](model, REWRITES[0], trained_of(model, method, seed=None))
        (result,) = edit.info["results"]
        assert result["prob_after"] > 1.05 * result["prob_before"]


def test_an_edit_says_how_it_was_made(family_model):
    model = family_model("gpt2")
    edit = mend(model, REWRITES[0], trained_of(model, "mend"))
    assert edit.info["editor"] == "mend"
    assert edit.info["config"]["rank"] == 3
    assert edit.info["config"]["trained"]["fingerprint"] == edit.info["fingerprint"]
    assert set(edit.info["results"][0]) == {
        "prob_before", "prob_after", "first_before", "first_after",
    }  # fmt: skip
    small = trained_of(model, "mend", seed=None)
    with torch.no_grad():
        small.network.steps.fill_(1e-6)
    with pytest.warns(FactWarning, match=r"did not take.*train the editor for longer"):
        mend(model, REWRITES[0], small)


def test_a_network_is_of_the_model_without_the_edits_that_are_on_it(family_folder):
    model = load_model(family_folder("gpt2"))
    trained = trained_of(model, "mend")
    edit = mend(model, REWRITES[0], trained)
    with applied(model, edit):
        second = mend(model, REWRITES[1], trained)
        with applied(model, second):
            pass
    apply_permanently(model, edit)
    third = mend(model, REWRITES[1], trained)
    for name, change in second.changes.items():
        torch.testing.assert_close(change.dense(), third.changes[name].dense())


def test_half_width_models_are_edited_in_float32(family_folder):
    model = load_model(family_folder("gpt2"), dtype=torch.bfloat16)
    edit = mend(model, REWRITES[0], trained_of(model, "mend"))
    assert all(change.dense().dtype == torch.float32 for change in edit.changes.values())


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_stored_network_is_read_back_rounded_and_with_its_statistics_whole(
    family_model, tmp_path, method
):
    model = family_model("gpt2")
    trained = trained_of(model, method)
    with torch.no_grad():
        trained.network.train()(asked_of(model))
    found = load(trained.save(tmp_path / "own.safetensors"), METHODS[method])
    assert (found.config, found.info) == (trained.config, trained.info)
    assert not found.network.training
    before, after = state_of(trained.network), state_of(found.network)
    parameters = {name for name, _ in trained.network.named_parameters()} - {"steps"}
    assert parameters
    for name in before:
        if name in parameters:
            assert torch.equal(after[name], before[name].half().float())
        else:
            assert torch.equal(after[name], before[name])
    edit = EDIT[method](model, REWRITES[0], {"checkpoint": str(tmp_path / "own.safetensors")})
    other = EDIT[method](model, REWRITES[0], found)
    for name, change in edit.changes.items():
        assert torch.equal(change.dense(), other.changes[name].dense())


def test_the_models_own_trained_network_is_found(family_folder):
    model = load_model(family_folder("gpt2"))
    with pytest.raises(
        EditorError,
        match=r"no trained mend-cf; `factlens train-editor mend --model gpt2 --data cf` trains one",
    ):
        mend_cf(model, REWRITES[0])
    trained = trained_of(model, "mend")
    place = own_folder(model, MEND, "cf")
    place.mkdir(parents=True)
    trained.save(place / "mend-cf.safetensors")
    assert trained_for(model, MEND, "cf").info["fingerprint"] == trained.info["fingerprint"]
    assert mend_cf(model, REWRITES[0]).info["editor"] == "mend"


def test_what_cannot_be_is_refused_in_one_line(family_model, tmp_path):
    model, other = family_model("gpt2"), family_model("gptj")
    trained = trained_of(model, "mend")
    path = trained.save(tmp_path / "mend.safetensors")
    with pytest.raises(
        EditorError,
        match=r"was trained for gpt2 in float32 .* this is gptj .* train-editor mend --model gptj",
    ):
        mend(other, REWRITES[0], trained)
    with pytest.raises(EditorError, match="was trained for gpt2"):
        mend(other, REWRITES[0], {"checkpoint": str(path)})
    for given, error, words in (
        ({"layer": 3}, ConfigError, "mend's config has no key layer; it has checkpoint, scale"),
        ({"scale": 0}, ConfigError, "a trained editor's scale is 0; it must be a number above 0"),
        (
            trained_of(model, "ke"),
            ConfigError,
            "mend takes a mapping with a checkpoint or a trained mend",
        ),
        ({"checkpoint": str(tmp_path / "none")}, EditorError, "there is no trained editor at"),
        ({"checkpoint": str(tmp_path)}, EditorError, "cannot read the trained editor"),
    ):
        with pytest.raises(error, match=words):
            mend(model, REWRITES[0], given)
    with pytest.raises(EditorError, match="is a trained mend, not a ke"):
        ke(model, REWRITES[0], {"checkpoint": str(path)})
    with pytest.raises(EditError, match="no rewrite"):
        mend(model, [], trained)
    with pytest.raises(SubjectNotFound):
        mend(model, Rewrite("Nobody lives in", "Mount Olga", "x"), trained)
    with pytest.raises(PromptTooLong):
        mend(model, Rewrite("{} is" + " in" * 40, "Mount Olga", "x"), trained)


def damaged(path, how: str) -> bytes:
    whole = path.read_bytes()
    if how == "cut short":
        return whole[:-100]
    if how == "a pickle":
        return b"\x80\x02}q\x00."
    if how == "another format":
        return whole.replace(b"factlens-editor/1", b"factlens-editor/9")
    if how == "other sizes":
        return whole.replace(b'\\"rank\\": 3', b'\\"rank\\": 4')
    return (
        whole[: len(whole) - 64] + b"\xff" * 64
    )  # "not finite": ends in the steps' or a statistic's bytes.


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut short", "no safetensors file, or is cut short"),
        ("a pickle", "no safetensors file, or is cut short"),
        ("another format", "no trained editor of this factlens"),
        ("other sizes", "is damaged: .*size mismatch"),
        ("not finite", "holds NaN or infinity"),
    ],
)
def test_damaged_files_are_refused(family_model, tmp_path, how, words):
    path = trained_of(family_model("gpt2"), "mend").save(tmp_path / "mend.safetensors")
    content = damaged(path, how)
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(EditorError, match=words):
        load(path, MEND)


def test_edits_that_are_not_what_was_found_are_noticed(family_model, monkeypatch):
    model = family_model("gpt2")
    trained = trained_of(model, "mend")
    monkeypatch.setattr(
        "factlens.editors.trained_edits.changed", lambda *given: contextlib.nullcontext()
    )
    with pytest.raises(EditError, match=r"does not give what was optimised"):
        edit_with(model, MEND, "generic", [[REWRITES[0]]], trained)


# -- by name ---------------------------------------------------------------------------------------


def test_editors_are_known_by_name_and_a_missing_one_is_said_in_one_line(family_folder, tmp_path):
    from typer.testing import CliRunner

    for name in ("mend", "mend-cf", "mend-zsre", "ke", "ke-cf", "ke-zsre"):
        assert name in EDITORS
        editor = editor_named(name)
        assert editor.__name__ == name
        assert name in editor.__doc__
    record = {
        "case_id": 0, "pararel_idx": 0,
        "requested_rewrite": {
            "prompt": "{} is in", "relation_id": "r", "subject": "Mount Olga",
            "target_new": {"str": "abc", "id": "a"}, "target_true": {"str": "xyz", "id": "x"},
        },
        "paraphrase_prompts": ["x"], "neighborhood_prompts": ["y"], "attribute_prompts": [],
        "generation_prompts": [],
    }  # fmt: skip
    subjects = [f"Mount {n}" for n in range(12)]
    records = [
        {**record, "case_id": n, "requested_rewrite": {**record["requested_rewrite"], "subject": s}}
        for n, s in enumerate(subjects)
    ]
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    options = ["--model", str(family_folder("gpt2")), "--records", str(file), "--no-control"]
    out = ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["evaluate", "--editor", "ke-cf", *options, *out])
    assert done.exit_code == 2
    said = done.stderr.strip().splitlines()
    assert "no trained ke-cf; `factlens train-editor ke" in said[-1]


def test_the_documents_table_of_trained_networks_is_their_curves():
    root = Path(__file__).parents[1] / "docs"
    table = (root / "editing.md").read_text("utf-8")
    curves = sorted((root / "editor-training").glob("*.jsonl"))
    assert len(curves) == 6
    for path in curves:
        curve = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        method, _, data = path.stem.partition("-")
        first, kept = curve[0], min(curve, key=lambda line: line["loss"])
        shipped = load(packaged(METHODS[method], data or "generic"), METHODS[method])
        assert first["step"] == 0
        assert shipped.info["held_out"]["step"] == kept["step"]
        assert shipped.info["held_out"]["edit"] == pytest.approx(kept["edit"], abs=1e-6)
        label = method.upper() + {"": "", "cf": "-CF", "zsre": "-zsRE"}[data]
        (row,) = re.findall(rf"^\| {label} \|.* → .*$", table, re.MULTILINE)
        step, edit, efficacy, kl = (cell.strip() for cell in row.strip("|").split("|")[2:])
        assert step.replace(" ", "") == str(kept["step"])
        assert edit == f"{first['edit']:.2f} → {kept['edit']:.2f}"
        assert efficacy == f"{100 * first['efficacy']:.0f} → {100 * kept['efficacy']:.0f} %"
        assert kl == f"{first['kl']:.3f} → {kept['kl']:.3f}"
