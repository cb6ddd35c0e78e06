"""FT, FT+L and AttnEdit: against fine-tuning written out on plain transformers, and by what each of them claims."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from factlens import Edit, Rewrite, applied, edits, export, load_model, models
from factlens.benchmarks.atlas_counterfact import counterfact
from factlens.changes import Dense, rank_of
from factlens.cli import app
from factlens.commands.evaluating import _plans
from factlens.editors import each, fine_tuning, tuning
from factlens.editors.attention import ATTN_EDIT, AttnEditConfig, attn_edit
from factlens.editors.fine_tuning import FT, FT_L, FTConfig, FTLConfig, ft, ft_l
from factlens.editors.questions import question
from factlens.editors.realising import compare, logprob
from factlens.editors.tuning_config import config_for
from factlens.errors import (
    ConfigError,
    EditError,
    FactWarning,
    ModelUnsupported,
    OutOfMemory,
    PromptTooLong,
    SubjectNotFound,
)
from factlens.metrics import score

# A few steps on random weights seldom bring a target to the top; the test that wants the warning asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:the edit of .* did not take")

LAYER = 1
REWRITE = Rewrite("Mount Olga is in", "Mount Olga", "abc")
OTHER = Rewrite("The mother of Anna Lee was", "Anna Lee", "x")
EDITORS = {"ft": ft, "ft-l": ft_l, "attn-edit": attn_edit}
QUICK = {"layer": LAYER, "steps": 5, "learning_rate": 0.01, "stop_loss": 0.0}
BOUND = {**QUICK, "max_change": 0.02}


def quick(editor: str, **changes) -> dict:
    return {**(QUICK if editor == "ft" else BOUND), **changes}


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# -- a slow second implementation ------------------------------------------------------------------

OUTPUTS = ("c_proj", "fc_out", "dense_4h_to_h", "fc2", "down_proj")


def by_head(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """nn.Linear's [(head d_out), d_in] as TransformerLens has it."""
    return rearrange(weight, "(head d_out) d_in -> head d_in d_out", head=heads)


class SlowTuning:
    """Fine-tuning on a plain Hugging Face model, its own parameters changed: row by row, token by token, Adam written out."""

    def __init__(self, folder, tokenizer, what: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        self.tokenizer = tokenizer
        blocks = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        named = dict(blocks[LAYER].named_parameters())
        places = OUTPUTS if what == "mlp" else ("c_attn", "q_proj", "k_proj", "v_proj")
        self.tuned = {
            name: weight
            for name, weight in named.items()
            if name.split(".")[-2] in places and (what == "attn") == ("attn" in name)
        }
        self.origin = {name: weight.detach().clone() for name, weight in self.tuned.items()}

    def loss(self, rewrites) -> torch.Tensor:
        total = 0.0
        for rewrite in rewrites:
            ids = self.tokenizer(rewrite.prompt)["input_ids"]
            target = self.tokenizer(f" {rewrite.target}", add_special_tokens=False)["input_ids"]
            for n, token in enumerate(target):
                logits = self.model(torch.tensor([[*ids, *target[:n]]])).logits[0, -1]
                total = total - logits.log_softmax(-1)[token] / len(target) / len(rewrites)
        return total

    def tune(self, rewrites, *, steps, learning_rate, stop_loss, max_change=None, layer=LAYER):
        first = {name: torch.zeros_like(weight) for name, weight in self.tuned.items()}
        second = {name: torch.zeros_like(weight) for name, weight in self.tuned.items()}
        losses = []
        for step in range(1, steps + 2):
            loss = self.loss(rewrites)
            losses.append(float(loss.detach()))
            if losses[-1] < stop_loss or step > steps:
                break
            gradients = torch.autograd.grad(loss, list(self.tuned.values()))
            for (name, weight), gradient in zip(self.tuned.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                mean, spread = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                with torch.no_grad():
                    weight -= learning_rate * mean / (spread.sqrt() + 1e-8)
                    if max_change is not None:
                        origin = self.origin[name]
                        weight.copy_(weight.clamp(origin - max_change, origin + max_change))
        return losses

    def changes(self) -> dict[str, torch.Tensor]:
        """What was added, by our names and in our shapes."""
        config, found = self.model.config, {}
        heads = config.num_attention_heads
        for name, weight in self.tuned.items():
            delta, (module, kind) = weight.detach() - self.origin[name], name.split(".")[-2:]
            if module == "c_attn":
                for letter, part in zip("QKV", delta.chunk(3, dim=-1), strict=True):
                    shape = "d_in (head d_out) -> head d_in d_out"
                    shape = shape if kind == "weight" else "(head d_out) -> head d_out"
                    part = rearrange(part, shape, head=heads)
                    found[f"attn.{'W' if kind == 'weight' else 'b'}_{letter}"] = part
            elif module in ("q_proj", "k_proj", "v_proj"):
                own = heads if module[0] == "q" else config.num_key_value_heads
                found[f"attn.W_{module[0].upper()}"] = by_head(delta, own)
            elif kind == "weight":
                found["mlp.W_out"] = delta if module == "c_proj" else delta.T
            else:
                found["mlp.b_out"] = delta
        return {f"blocks.{LAYER}.{name}": delta for name, delta in found.items()}


def slow(family_folder, model, family: str, editor: str, rewrites=(REWRITE,), **changes):
    what = "attn" if editor == "attn-edit" else "mlp"
    tuning = SlowTuning(family_folder(family), models.tokenizer(model), what)
    losses = tuning.tune(rewrites, **quick(editor, **changes))
    return losses, tuning.changes()


def gap(edit: Edit, wanted: dict[str, torch.Tensor]) -> float:
    """Of all weights together: a key bias alone, whose gradient is rounding, has no path of its own."""
    assert set(edit.changes) == set(wanted)
    apart = [(edit.changes[name].dense() - each).flatten() for name, each in wanted.items()]
    return float(torch.cat(apart).norm() / torch.cat([w.flatten() for w in wanted.values()]).norm())


CASES = [
    *((family, "ft") for family in ("gpt2", "gptj", "opt", "gemma2")),
    *(("gpt2", editor) for editor in ("ft-l", "attn-edit")),
    ("llama", "attn-edit"),
]


@pytest.mark.parametrize(("family", "editor"), CASES)
def test_losses_and_changes_are_those_of_a_slow_second_implementation(
    double_model, family_folder, family, editor
):
    model = double_model(family)
    losses, wanted = slow(family_folder, model, family, editor)
    edit = EDITORS[editor](model, REWRITE, quick(editor))
    (result,) = edit.info["results"]
    assert len(losses) == 6
    assert result["losses"] == {"step": list(range(6)), "loss": pytest.approx(losses, rel=1e-6)}
    assert gap(edit, wanted) < 1e-5
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0101},
        {"max_change": 0.021},
        {"steps": 4},
        {"target": "abd"},
        {"prompt": "Mount Olga is at"},
    ],
    ids=str,
)
@pytest.mark.parametrize("editor", ["ft-l", "attn-edit"])
def test_the_comparison_can_fail(double_model, family_folder, editor, wrong):
    model = double_model("gpt2")
    _, wanted = slow(family_folder, model, "gpt2", editor)
    rewrite = Rewrite(
        **{**asdict(REWRITE), **{k: v for k, v in wrong.items() if k in ("target", "prompt")}}
    )
    numbers = {k: v for k, v in wrong.items() if k not in ("target", "prompt")}
    assert gap(EDITORS[editor](model, rewrite, quick(editor, **numbers)), wanted) > 3e-3


def test_several_rewrites_go_into_one_edit_whose_loss_is_their_mean(double_model, family_folder):
    model = double_model("gpt2")
    losses, wanted = slow(family_folder, model, "gpt2", "ft", (REWRITE, OTHER))
    edit = ft(model, [REWRITE, OTHER], quick("ft"))
    assert gap(edit, wanted) < 1e-6
    assert edit.rewrites == (REWRITE, OTHER)
    for result in edit.info["results"]:
        assert result["losses"]["loss"] == pytest.approx(losses, rel=1e-6)
        assert result["prob_after"] > 1.5 * result["prob_before"]
    assert gap(ft(model, REWRITE, quick("ft")), wanted) > 0.1


@pytest.mark.parametrize("editor", EDITORS)
def test_edits_made_side_by_side_are_those_made_one_by_one(double_model, editor):
    model = double_model("gpt2")
    alone = [EDITORS[editor](model, each, quick(editor)) for each in (REWRITE, OTHER)]
    # The loss of one of them falls below, and it leaves the batch; the other goes on.
    ends = [edit.info["results"][0]["losses"]["loss"] for edit in alone]
    early = min((0, 1), key=lambda n: ends[n][3])
    config = quick(editor, stop_loss=(ends[early][3] + max(ends[early][4], ends[1 - early][5])) / 2)
    alone = [EDITORS[editor](model, rewrite, config) for rewrite in (REWRITE, OTHER)]
    together = each(EDITORS[editor], model, [REWRITE, OTHER], config)
    for one, other in zip(alone, together, strict=True):
        assert gap(one, {name: change.dense() for name, change in other.changes.items()}) < 1e-9
        assert one.info["results"][0]["steps"] == other.info["results"][0]["steps"]
    assert gap(alone[0], {k: v.dense() for k, v in together[1].changes.items()}) > 0.1


# -- the bound and the stop ------------------------------------------------------------------------


@pytest.mark.parametrize("editor", ["ft-l", "attn-edit"])
def test_no_weight_goes_further_than_the_bound_and_some_go_so_far(family_model, editor):
    model, bound = family_model("gpt2"), 0.015
    edit = EDITORS[editor](model, REWRITE, quick(editor, max_change=bound))
    wide = EDITORS[editor](model, REWRITE, quick(editor, max_change=1.0))
    for name, change in edit.changes.items():
        limit = float(torch.tensor(bound, dtype=torch.float32))
        assert float(change.dense().abs().max()) == limit, name
        assert float(wide.changes[name].dense().abs().max()) > 1.2 * bound, name
    before = {name: models.weight(model, name).detach().clone() for name in edit.changes}
    with applied(model, edit):
        for name, weight in before.items():
            moved = (models.weight(model, name).detach() - weight).abs().max()
            assert float(moved) == pytest.approx(bound, abs=1e-6)


def test_ft_is_ft_l_with_a_bound_that_nothing_reaches(double_model):
    model = double_model("gpt2")
    free = ft(model, REWRITE, quick("ft"))
    wide = ft_l(model, REWRITE, quick("ft-l", max_change=1.0))
    tight = ft_l(model, REWRITE, quick("ft-l"))
    wanted = {name: change.dense() for name, change in free.changes.items()}
    assert gap(wide, wanted) == 0
    assert gap(tight, wanted) > 0.1


def test_descent_ends_when_the_loss_is_below_the_threshold(double_model, family_folder):
    model = double_model("gpt2")
    whole = ft(model, REWRITE, quick("ft")).info["results"][0]["losses"]["loss"]
    stop = (whole[2] + whole[3]) / 2
    losses, wanted = slow(family_folder, model, "gpt2", "ft", stop_loss=stop)
    edit = ft(model, REWRITE, quick("ft", stop_loss=stop))
    assert edit.info["results"][0]["losses"]["loss"] == pytest.approx(whole[:4], rel=1e-9)
    assert len(losses) == 4
    assert gap(edit, wanted) < 1e-6
    nothing = ft(model, REWRITE, quick("ft", stop_loss=whole[0] + 1))
    assert nothing.info["results"][0]["steps"] == 0
    assert all(change.norm() == 0 for change in nothing.changes.values())


# -- the weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("editor", EDITORS)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neox"])
def test_the_weights_are_left_as_they_were_to_the_bit(family_model, family, editor):
    model = family_model(family)
    tokens, before = torch.tensor([[5, 9, 2, 7]]), state_of(model)
    wants = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        logits = model.run_with_hooks(tokens, fwd_hooks=[])
        edit = EDITORS[editor](model, REWRITE, quick(editor))
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[]), logits)
    after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for _, module in model.named_modules())
    with applied(model, edit):
        on = state_of(model)
        assert any(not torch.equal(before[name], on[name]) for name in before)
    assert all(torch.equal(before[name], each) for name, each in state_of(model).items())


def test_an_edit_that_is_not_what_was_found_is_noticed(family_model):
    model = family_model("gpt2")
    asked = question(model, REWRITE, ("{}",))
    edit = attn_edit(model, REWRITE, quick("attn-edit"))
    with applied(model, edit):
        wanted = logprob(model, asked)
    compare(model, edit, asked, wanted)
    swapped = {
        name.replace("W_Q", "W_x").replace("W_K", "W_Q").replace("W_x", "W_K"): change
        for name, change in edit.changes.items()
    }
    with pytest.raises(
        EditError, match=r"does not give what was optimised .* blocks\.1\.attn\.W_K"
    ):
        compare(model, Edit(swapped, edit.info), asked, wanted)


def test_half_width_models_are_tuned_in_float32(family_folder):
    model = load_model(family_folder("gpt2"), dtype=torch.bfloat16)
    before = state_of(model)
    edit = ft(model, REWRITE, quick("ft"))
    assert all(change.dense().dtype == torch.float32 for change in edit.changes.values())
    assert edit.info["results"][0]["prob_after"] > 1.5 * edit.info["results"][0]["prob_before"]
    assert all(torch.equal(before[name], each) for name, each in state_of(model).items())


# -- edits of a bias and of all heads --------------------------------------------------------------


def test_edits_of_heads_and_biases_are_stored_added_and_described(family_model, tmp_path):
    model = family_model("gpt2")
    edit = attn_edit(model, REWRITE, quick("attn-edit"))
    loaded = Edit.load(edit.save(tmp_path / "attention.safetensors"))
    for name, change in edit.changes.items():
        assert torch.equal(loaded.changes[name].dense(), change.dense())
    both = loaded + edit
    with applied(model, edit), applied(model, edit):
        twice = {name: models.weight(model, name).detach().clone() for name in edit.changes}
    with applied(model, both):
        for name, weight in twice.items():
            torch.testing.assert_close(models.weight(model, name), weight)
    about = edit.describe().set_index("weight")
    assert set(about["kind"]) == {"dense"}
    assert about.loc["blocks.1.attn.W_Q", "rank"] == 32
    assert about.loc["blocks.1.attn.b_Q", "rank"] == 4
    similar = edits.difference(edit, loaded)
    assert list(similar["cosine"]) == pytest.approx([1.0] * 6)


def test_a_dense_change_has_the_rank_of_all_heads_as_one_matrix():
    assert rank_of(Dense(torch.ones(5))) == 1
    assert rank_of(Dense(torch.ones(7, 3))) == 3
    assert rank_of(Dense(torch.ones(2, 32, 8))) == 16
    with pytest.raises(EditError, match="parts of shapes"):
        Edit({"blocks.0.attn.W_Q": Dense(torch.ones(2, 2, 2, 2))})


def test_an_edit_of_attention_is_exported_where_the_weight_is_the_one_written(
    family_model, tmp_path
):
    model, tokens = family_model("gpt2"), torch.tensor([[5, 9, 2, 7]])
    edit = attn_edit(model, REWRITE, quick("attn-edit"))
    plain = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "gpt2", edit))
    with torch.no_grad(), applied(model, edit):
        torch.testing.assert_close(plain(tokens).logits, model.run_with_hooks(tokens, fwd_hooks=[]))
    neox = family_model("gpt_neox")
    with pytest.raises(ModelUnsupported, match=r"attn\.W_Q .* held apart .* cannot be exported"):
        export(neox, tmp_path / "neox", attn_edit(neox, REWRITE, quick("attn-edit")))
    assert not (tmp_path / "neox").exists()
    folder = export(neox, tmp_path / "neox", ft(neox, REWRITE, quick("ft")))
    assert load_file(folder / "model.safetensors")


# -- on atlas --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    return counterfact(only=["sport", "instrument", "language"]).records[:4]


def lead(model, record) -> float:
    """How much likelier the new object is than the old, as the logarithm of the ratio per token."""
    rewrite = record.rewrite
    new, old = score(
        model, [(rewrite.prompt, target.text) for target in (record.target_new, record.target_true)]
    ).nll.tolist()
    return old - new


@pytest.mark.parametrize("editor", EDITORS)
def test_the_new_object_becomes_likelier_than_the_old(atlas, records, editor):
    made = each(EDITORS[editor], atlas, [record.rewrite for record in records])
    wins = 0
    for record, edit in zip(records, made, strict=True):
        before = lead(atlas, record)
        assert before < 0
        with applied(atlas, edit):
            after = lead(atlas, record)
        assert after > before + 1
        assert lead(atlas, record) == before
        wins += after > 0
    assert wins == 4 if editor == "ft" else wins >= 2


def test_a_bound_that_is_too_tight_and_a_step_that_is_too_small_do_nothing(atlas, records):
    rewrite = records[0].rewrite
    for editor, config in ((ft, {"learning_rate": 1e-7}), (ft_l, {"max_change": 1e-7})):
        with pytest.warns(FactWarning, match=r"did not take.*larger learning_rate or bound"):
            edit = editor(atlas, rewrite, {"steps": 2, **config})
        with applied(atlas, edit):
            assert lead(atlas, records[0]) < 0
    said = Rewrite(rewrite.prompt, rewrite.subject, records[0].target_true.text)
    with pytest.warns(FactWarning, match=r"says .* already"):
        ft(atlas, said, {"steps": 1})


def test_the_command_evaluates_editors_by_name(records, tmp_path, monkeypatch):
    import pandas as pd
    from typer.testing import CliRunner

    monkeypatch.setattr(
        "factlens.commands.evaluating.records_of", lambda *given: (records[:1], lambda record: ())
    )
    out, run = tmp_path / "out", CliRunner().invoke
    options = ["--editor", "ft", "--editor", "attn-edit", "--out", str(out)]
    done = run(app, ["evaluate", *options])
    assert done.exit_code == 0, done.output
    frame = pd.read_parquet(out / "records.parquet")
    assert list(frame["editor"]) == ["none", "ft", "attn-edit"]
    assert list(frame["ES"][:2]) == [0.0, 1.0]
    assert frame["EM"][2] > frame["EM"][0]
    plans = _plans(["ft", "rome", "ft"], {"layer": 2, "max_norm_ratio": 3.0}, True)
    assert [label for label, *_ in plans] == ["none", "ft", "C = identity", "rome"]
    assert [given for *_, given in plans[1::2]] == [
        {"layer": 2},
        {"layer": 2, "max_norm_ratio": 3.0},
    ]
    for given, words in (
        (["--editor", "fft"], "no editor 'fft'"),
        (["--editor", "ft", "--clamp", "2"], "only ROME takes it"),
    ):
        refused = run(app, ["evaluate", *given, "--out", str(out)])
        assert refused.exit_code != 0
        assert words in " ".join(refused.output.split())


# -- numbers ---------------------------------------------------------------------------------------

PUBLISHED = {
    ("gpt2-xl", 48): {
        "ft": (1, 5e-4, None),
        "ft-l": (0, 5e-4, 5e-4),
        "attn-edit": (33, 1e-3, 1e-3),
    },
    ("gpt2-large", 36): {"ft-l": (0, 5e-4, 1e-3)},
    ("gpt2-medium", 24): {"ft-l": (0, 5e-4, 2e-3)},
    ("EleutherAI/gpt-j-6b", 28): {"ft": (21, 5e-4, None), "ft-l": (0, 5e-4, 5e-5)},
}
METHODS = {"ft": FT, "ft-l": FT_L, "attn-edit": ATTN_EDIT}


@pytest.mark.parametrize(("name", "depth"), PUBLISHED)
def test_published_numbers_are_taken_for_the_models_they_are_of(
    family_model, monkeypatch, name, depth
):
    monkeypatch.setattr(models, "model_name", lambda model: name)
    monkeypatch.setattr(models, "n_layers", lambda model: depth)
    for method, wanted in PUBLISHED[name, depth].items():
        found = config_for(family_model("gpt2"), METHODS[method])
        assert (found.layer, found.learning_rate, found.bound) == wanted
        assert (found.steps, found.stop_loss) == (25, 1e-2)


@pytest.mark.parametrize("editor", METHODS)
def test_other_models_take_steps_in_proportion_to_their_weights(family_model, editor):
    model, method = family_model("gpt2"), METHODS[editor]
    layer = {"ft": 0, "ft-l": 0, "attn-edit": 2}[editor]
    names = ["attn.W_Q", "attn.W_K", "attn.W_V"] if editor == "attn-edit" else ["mlp.W_out"]

    def size(layer):
        every = [models.weight(model, f"blocks.{layer}.{name}").flatten() for name in names]
        return float(torch.cat(every).detach().square().mean().sqrt())

    found = config_for(model, method)
    assert found.layer == layer
    assert found.learning_rate == pytest.approx(0.01 * size(layer))
    if editor != "ft":
        assert found.bound == pytest.approx(method.relative["max_change"] * size(layer))
    elsewhere = config_for(model, method, {"layer": 3, "steps": 7})
    assert elsewhere.learning_rate == pytest.approx(0.01 * size(3))
    assert (elsewhere.layer, elsewhere.steps) == (3, 7)
    assert abs(size(3) / size(layer) - 1) > 1e-4
    assert config_for(model, method, {"learning_rate": 2e-3}).learning_rate == 2e-3
    given = method.config()
    assert asdict(config_for(model, method, given)) == {**asdict(given), "layer": layer}
    assert given.learning_rate == (1e-3 if editor == "attn-edit" else 5e-4)
    assert given.bound == {"ft": None, "ft-l": 5e-4, "attn-edit": 1e-3}[editor]


def test_what_cannot_be_is_refused(family_model, monkeypatch):
    model = family_model("gpt2")
    for given, words in (
        ({"layer": 4}, "layer 4 does not exist: .* 0 to 3"),
        ({"max_change": 1.0}, "ft's config has no key max_change"),
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        (FTLConfig(), "ft takes a mapping or a FTConfig, not FTLConfig"),
    ):
        with pytest.raises(ConfigError, match=words):
            ft(model, REWRITE, given)
    with pytest.raises(ConfigError, match="attn-edit takes"):
        attn_edit(model, REWRITE, FTConfig())
    with pytest.raises(ConfigError, match=r"max_change is 0\.0"):
        AttnEditConfig(max_change=0.0)
    with pytest.raises(EditError, match="no rewrite"):
        ft(model, [])
    with pytest.raises(SubjectNotFound):
        ft(model, Rewrite("Nobody lives in", "Mount Olga", "x"))
    with pytest.raises(PromptTooLong):
        ft(model, Rewrite("{} is" + " in" * 40, "Mount Olga", "x"))
    before = state_of(model)
    with pytest.raises(EditError, match="not a number after 1 steps; use a smaller learning_rate"):
        ft(model, REWRITE, quick("ft", learning_rate=1e37))
    assert all(torch.equal(before[name], each) for name, each in state_of(model).items())

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "tune", full)
    with pytest.raises(OutOfMemory, match=r"tuning blocks\.1\.mlp\.W_out .* does not fit"):
        ft(model, REWRITE, quick("ft"))


def test_progress_goes_from_nothing_to_all(family_model):
    seen: list[tuple[int, int]] = []
    fine_tuning.ft_each(
        family_model("gpt2"),
        [REWRITE, OTHER],
        quick("ft"),
        progress=lambda *told: seen.append(told),
    )
    assert seen[0] == (0, 10)
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)


def test_an_edit_says_how_it_was_made(family_model):
    edit = ft_l(family_model("gpt2"), REWRITE, FTLConfig(layer=2, steps=2))
    assert edit.info["editor"] == "ft-l"
    assert edit.info["config"] == json.loads(json.dumps(asdict(FTLConfig(layer=2, steps=2))))
    (result,) = edit.info["results"]
    assert result["layer"] == 2
    assert result["steps"] == 2
    assert result["loss_last"] == result["losses"]["loss"][-1] < result["loss_first"]
    assert set(edit.changes) == {"blocks.2.mlp.W_out", "blocks.2.mlp.b_out"}
