"""Exports: plain `transformers` computes what the edited model computes, and a folder is there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import FAMILIES
from safetensors import safe_open
from test_edits import edit_of, hashes, random_change
from test_hooked_transformer import REPOS, HookedTransformer, build  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from factlens import exports, fingerprint, load_model, models, runs
from factlens.changes import RankOne
from factlens.edits import Edit, applied
from factlens.errors import EditError, ModelUnsupported, OutputError
from factlens.exports import export
from factlens.generation import generate

TOKENS = torch.tensor([[5, 9, 20, 31, 7], [3, 3, 60, 2, 1]])


def small_edit(model, layer: int = 1) -> Edit:
    """A change that moves the logits well above rounding without drowning everything else."""
    edit = edit_of(model, layer)
    name = models.W_out_name(layer)
    change = edit.changes[name]
    return Edit({name: RankOne(change.left * 0.2, change.right * 0.2)}, edit.info)


def plain_logits(folder) -> torch.Tensor:
    plain, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return plain.eval()(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_the_edited_model_computes(family_model, tmp_path, family):
    model = family_model(family)
    edit, before = small_edit(model), hashes(model)
    unedited = runs.logits_of(model, TOKENS)
    assert export(model, tmp_path / "out", edit) == tmp_path / "out"
    assert hashes(model) == before
    with applied(model, edit):
        wanted, text, whole = (
            runs.logits_of(model, TOKENS),
            generate(model, "abc"),
            fingerprint(model),
        )
    found = plain_logits(tmp_path / "out")
    assert (found - wanted).abs().max() < 1e-5
    assert (found - unedited).abs().max() > 0.01, "the check sees whether the edit is in it"
    again = load_model(tmp_path / "out")
    note = json.loads((tmp_path / "out" / exports.NOTE).read_text())
    assert fingerprint(again) == whole == note["fingerprint"] != edit.info["fingerprint"]
    assert note["edit"] == edit.info
    assert generate(again, "abc") == text
    assert torch.equal(runs.logits_of(model, TOKENS), unedited)


def test_the_folder_holds_what_a_hub_model_has_and_names_no_place(family_model, tmp_path):
    model = family_model("gpt2")
    export(model, tmp_path / "out")
    files = {each.name: each for each in (tmp_path / "out").iterdir()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    } < set(files)  # fmt: skip
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    for name, path in files.items():
        if name.endswith(".json"):
            assert "/models" not in path.read_text(), name
    assert json.loads(files["config.json"].read_text())["architectures"] == ["GPT2LMHeadModel"]
    with safe_open(str(files["model.safetensors"]), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys(), "tied: stored once"  # noqa: SIM118
    own = models.tokenizer(model)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("a b é")["input_ids"]
        == own("a b é")["input_ids"]
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]


def test_a_narrow_model_stays_narrow(family_folder, tmp_path):
    model = load_model(family_folder("llama"), dtype=torch.bfloat16)
    edit = small_edit(model)
    export(model, tmp_path / "out", edit)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {each.dtype for each in plain.parameters()} == {torch.bfloat16}
    with applied(model, edit):
        wanted = models.W_out(model, 1).detach().clone()
    assert torch.equal(plain.model.layers[1].mlp.down_proj.weight.T, wanted)


def test_large_models_are_written_in_several_files(family_model, tmp_path, monkeypatch):
    import huggingface_hub

    real = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(
        huggingface_hub,
        "save_torch_state_dict",
        lambda *a, **k: real(*a, **k, max_shard_size="40KB"),
    )
    model = family_model("qwen3")
    edit = small_edit(model)
    export(model, tmp_path / "out", edit)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    with applied(model, edit):
        assert (plain_logits(tmp_path / "out") - runs.logits_of(model, TOKENS)).abs().max() < 1e-5


def test_a_weight_that_is_not_written_as_it_is_is_found(family_model, tmp_path, monkeypatch):
    import huggingface_hub

    real = huggingface_hub.save_torch_state_dict

    def wrong(tensors, *args, **more):
        name = next(each for each in tensors if "mlp.c_proj.weight" in each)
        real({**tensors, name: tensors[name] + 1e-6}, *args, **more)

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", wrong)
    with pytest.raises(OutputError, match="was not written"):
        export(family_model("gpt2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays_and_what_was_there_stays(
    family_model, tmp_path, monkeypatch, error
):
    model = family_model("gpt2")
    before = hashes(model)
    export(model, tmp_path / "out")
    kept = {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()}

    def fail(*args, **more):
        raise error

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    for folder in ("out", "new"):
        with pytest.raises(expected):
            export(model, tmp_path / folder, small_edit(model), overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()} == kept
    assert hashes(model) == before


def test_if_the_new_folder_cannot_be_put_in_place_the_old_one_is_back(
    family_model, tmp_path, monkeypatch
):
    model = family_model("gpt2")
    export(model, tmp_path / "out")
    kept = {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()}
    real = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="Permission denied"):
        export(model, tmp_path / "out", small_edit(model), overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()} == kept


def test_only_an_earlier_model_is_overwritten_and_only_when_asked(family_model, tmp_path):
    model = family_model("gpt2")
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    with pytest.raises(OutputError, match="is not empty"):
        export(model, tmp_path / "empty", small_edit(model))
    export(model, tmp_path / "empty", small_edit(model), overwrite=True)
    with applied(model, small_edit(model)):
        assert (plain_logits(tmp_path / "empty") - runs.logits_of(model, TOKENS)).abs().max() < 1e-5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds no model"):
        export(model, tmp_path / "mine", overwrite=True)
    with pytest.raises(OutputError, match="is no folder"):
        export(model, tmp_path / "mine" / "thesis.tex", overwrite=True)
    with pytest.raises(OutputError, match="cannot write the folder"):
        export(model, tmp_path / "mine" / "thesis.tex" / "out")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    family_model, tmp_path, monkeypatch
):
    model = family_model("gpt2")
    with pytest.raises(EditError, match="other weights"):
        export(model, tmp_path / "out", edit_of(family_model("gptj")))
    elsewhere = Edit({"blocks.1.attn.W_O": random_change(4, 4)}, edit_of(model).info)
    with pytest.raises(EditError):
        export(model, tmp_path / "out", elsewhere)
    monkeypatch.setattr(models, "processing", lambda model: "layer norm folded")
    with pytest.raises(ModelUnsupported, match="from_pretrained_no_processing"):
        export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- HookedTransformer -----------------------------------------------------------------------------

lens = [
    pytest.mark.skipif(HookedTransformer is None, reason="HookedTransformer was removed"),
    pytest.mark.filterwarnings("ignore:HookedTransformer.*is deprecated"),
]


def marked(test):
    for mark in lens:
        test = mark(test)
    return test


@marked
@pytest.mark.parametrize("family", REPOS)
def test_an_unprocessed_hooked_transformer_is_exported_with_its_base(
    build,  # noqa: F811
    family,
    family_folder,
    tmp_path,
):
    model, folder = build(family, folder=family_folder(family)), family_folder(family)
    edit, before = small_edit(model), hashes(model)
    export(model, tmp_path / "out", edit, base=folder)
    with applied(model, edit):
        wanted = runs.logits_of(model, TOKENS)
    assert (plain_logits(tmp_path / "out") - wanted).abs().max() < 2e-5
    assert hashes(model) == before
    bridge = load_model(folder)
    assert edit.info["fingerprint"] == fingerprint(bridge)
    with applied(bridge, edit):
        assert (runs.logits_of(bridge, TOKENS) - wanted).abs().max() < 2e-5


@marked
def test_a_hooked_transformer_without_its_base_or_with_another_is_refused(
    build,  # noqa: F811
    family_folder,
    tmp_path,
):
    model = build("gpt2", folder=family_folder("gpt2"))
    with pytest.raises(ModelUnsupported, match="base='gpt2-xl'"):
        export(model, tmp_path / "out")
    for other in ("gptj", "gpt_neox"):
        with pytest.raises(ModelUnsupported, match="not what this model was made from"):
            export(model, tmp_path / "out", base=family_folder(other))
    # Alike in all that is compared name by name: the values' matrix shows in what the two compute.
    sibling = load_model(family_folder("gpt2"))
    with torch.no_grad():
        sibling.original_model.transformer.h[2].attn.c_attn.weight[:, 64:].mul_(1.1)
    export(sibling, tmp_path / "sibling")
    with pytest.raises(ModelUnsupported, match="not what this model was made from"):
        export(model, tmp_path / "out", base=tmp_path / "sibling")
    export(model, tmp_path / "out", base=family_folder("gpt2"))


@marked
def test_a_processed_hooked_transformer_is_refused_and_so_is_its_edit_elsewhere(
    build,  # noqa: F811
    family_folder,
    tmp_path,
):
    folder = family_folder("gpt2")
    processed, plain = build("gpt2", processed=True, folder=folder), build("gpt2", folder=folder)
    edit, before = edit_of(processed), hashes(processed)
    with pytest.raises(ModelUnsupported, match="from_pretrained_no_processing"):
        export(processed, tmp_path / "out", edit, base=folder)
    with applied(processed, edit):
        assert hashes(processed) != before
    assert hashes(processed) == before
    for other in (plain, load_model(folder)):
        with pytest.raises(EditError, match=r"processed differently \(layer norm folded"):
            export(other, tmp_path / "out", edit, base=folder)
