"""Configurations: published numbers stand where they are said to, foreign files load verbatim, and what cannot be is refused."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from builders import save_model
from conftest import ORACLE
from hypothesis import given
from hypothesis import strategies as st

from factlens import load_model
from factlens.configs import config_for, from_mapping, known_configs, read_config
from factlens.editors.rome_config import (
    DEPTH,
    ROMEConfig,
    as_mapping,
    read_rome_config,
    rome_config_for,
)
from factlens.errors import ConfigError

PUBLISHED = {  # layer, clamp, steps, weight decay: REFERENCE 2, and EasyEdit's llama-7b.yaml
    "gpt2-medium": (8, 3, 20, 0.5),
    "gpt2-large": (12, 4, 20, 0.5),
    "gpt2-xl": (17, 4, 20, 0.5),
    "gpt-j-6b": (5, 4, 20, 0.5),
    "llama": (5, 4, 25, 0.001),
}
EASYEDIT = """
alg_name: "ROME"
model_name: "./hugging_cache/llama-2-7b"
stats_dir: "./data/stats"
device: 1
layers: [5]
fact_token: "subject_last"
v_num_grad_steps: 25
v_lr: 5e-1
v_loss_layer: 31
v_weight_decay: 1e-3
clamp_norm_factor: 4
kl_factor: 0.0625
mom2_adjustment: false
context_template_length_params: [[5, 10], [10, 10]]
rewrite_module_tmp: "model.layers.{}.mlp.down_proj"
layer_module_tmp: "model.layers.{}"
mlp_module_tmp: "model.layers.{}.mlp"
attn_module_tmp: "model.layers.{}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
fp16: true
batch_size: 1
max_length: 40
"""


def official() -> dict:
    with np.load(ORACLE / "rome.npz", allow_pickle=False) as arrays:
        return json.loads(str(arrays["hparams_json"]))


def read(tmp_path, text: str, name: str = "rome.yaml") -> ROMEConfig:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_rome_config(path)


# --- bundled configs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(known_configs()))
def test_every_bundled_rome_section_parses_and_says_where_it_comes_from(name, tmp_path):
    config = known_configs()[name]
    text = json.dumps(dict(config.rome))
    parsed = read(tmp_path, text, "rome.json")
    assert config.rome_source
    assert (parsed.layer is None) == ("layer" not in config.rome) == (config.layers is None)
    if parsed.layer is not None:
        assert parsed.layer < config.layers


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_number_is_there(name, tmp_path):
    parsed = read(tmp_path, json.dumps(dict(known_configs()[name].rome)), "rome.json")
    layer, clamp, steps, decay = PUBLISHED[name]
    assert (parsed.layer, parsed.max_norm_ratio) == (layer, clamp)
    assert (parsed.steps, parsed.weight_decay) == (steps, decay)
    assert (parsed.learning_rate, parsed.kl_weight) == (0.5, 0.0625)


def test_gpt2_xls_layer_by_depth_gives_the_other_published_gpt2_layers():
    layer, of = DEPTH
    for name in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = known_configs()[name]
        assert layer * config.layers // of == config.rome["layer"]


def test_the_paper_is_what_the_defaults_say():
    assert from_mapping(ROMEConfig, {}) == ROMEConfig(
        steps=20, learning_rate=0.5, weight_decay=0.5, kl_weight=0.0625, max_norm_ratio=4.0
    )


def test_a_config_with_an_unknown_key_or_a_bad_section_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("layer: 3", "layer"),
        ("rome: 17", "'rome' of mine.yaml must hold keys and values"),
        ("knowledge_neurons: [1]", "'knowledge_neurons' of mine.yaml .* as in {threshold: 0.2}"),
        ("fine_tuning: {layer: 3}", "'fine_tuning' of mine.yaml .* of each editor, as in {ft: "),
        ("fine_tuning: {ftl: {layer: 3}}", "no editor 'ftl'; it has ft, ft-l, attn-edit"),
        ("trained_editors: {mend: 2}", "'trained_editors' of mine.yaml .* as in {mend: "),
        ("trained_editors: {ft: {scale: 2}}", "no editor 'ft'; it has mend, mend-cf"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_config(path)


# --- files ------------------------------------------------------------------------------------


def test_the_official_file_loads_verbatim(tmp_path):
    found = read(tmp_path, json.dumps(official()), "gpt2-xl.json")
    assert found == ROMEConfig(
        layer=2, value_key="prompt", moment_tokens="paper", loss_layer=5, contexts="rome"
    )


@pytest.mark.parametrize(
    ("extra", "value_key"), [("", "mean"), ("original_implementation: true", "prompt")]
)
def test_easyedits_file_loads_verbatim_with_its_own_rule_for_the_key(tmp_path, extra, value_key):
    found = read(tmp_path, EASYEDIT + extra)
    assert found == ROMEConfig(
        layer=5,
        steps=25,
        learning_rate=0.5,
        weight_decay=1e-3,
        value_key=value_key,
        moment="identity",
        moment_tokens="paper",
        loss_layer=31,
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("subject_first", "subject-first"),
        ("subject_first_after_last", "first-after"),
        ("last", "last"),
    ],
)
def test_official_fact_tokens_are_translated(tmp_path, theirs, ours):
    text = json.dumps({**official(), "fact_token": theirs})
    assert read(tmp_path, text, "x.json").fact_token == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_lrr": 1}, "no key v_lrr; .*v_lr,"),
        ({"layers": [1, 2]}, r"layers is \[1, 2\]"),
        ({"layers": 1}, "layers is 1"),
        ({"fact_token": "middle"}, "fact_token is 'middle'"),
        ({"v_num_grad_steps": 0}, "steps is 0"),
        ({"mom2_n_samples": 5}, "mom2_n_samples is 5"),
        ({"context_template_length_params": [[5, 5]]}, "context_template_length_params"),
        ({"rewrite_module_tmp": "transformer.h.{}.attn.c_proj"}, "attn.c_proj"),
        ({"alg_name": "MEMIT"}, "MEMIT"),
        ({"enable_prompt_keys": True}, "enable_prompt_keys"),
    ],
)
def test_an_official_file_that_would_mean_something_else_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, json.dumps({**official(), **changes}), "x.json")
    assert "\n" not in str(caught.value)


def test_our_own_yaml_is_read_and_what_it_holds_can_be_written_again(tmp_path):
    found = read(tmp_path, "layer: 3\nlearning_rate: 5e-1\ncontexts: ['{}', 'So, {}']\nsteps: 7.0")
    assert found == ROMEConfig(layer=3, learning_rate=0.5, contexts=("{}", "So, {}"), steps=7)
    assert read(tmp_path, json.dumps(as_mapping(found)), "again.json") == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("layer: é".encode("latin-1"), "not UTF-8"),
        (b"a: b: c", "not YAML"),
        (b"- 1\n- 2", "must hold keys and values"),
        (b"", "must hold keys and values"),
        (b"1: 2", "must hold keys and values"),
        (b"layers_: 3", "no key layers_; it has contexts, fact_token"),
        (b"layer: !!python/object:os.system {}", "not YAML"),
        (b"date: 2020-99-99", "not YAML|no key"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "rome.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_rome_config(path)
    assert "\n" not in str(caught.value)


def test_broken_json_names_its_line(tmp_path):
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        read(tmp_path, '{"layers": [2],\n oops}', "x.json")


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer", -1, "at least 0"),
        ("layer", "two", "at least 0"),
        ("steps", 0, "at least 1"),
        ("steps", True, "at least 1"),
        ("steps", 2.5, "at least 1"),
        ("learning_rate", 0.0, "above 0"),
        ("max_norm_ratio", 0, "above 0"),
        ("max_norm_ratio", "wide", "above 0"),
        ("kl_weight", -1, "at least 0"),
        ("weight_decay", float("nan"), "at least 0"),
        ("stop_loss", float("inf"), "at least 0"),
        ("fact_token", "subject_last", "'subject-last' or 'subject-first'"),
        ("kl_at", "end", "'prompt-end'"),
        ("value_key", "both", "'mean' or 'prompt'"),
        ("moment", "none", "'statistics' or 'identity'"),
        ("moment_tokens", 0, "'auto', 'paper'"),
        ("moment_tokens", "all", "'auto', 'paper'"),
        ("contexts", "official", "templates"),
        ("contexts", [], "templates"),
        ("contexts", ["{}", "no place"], "'no place'"),
        ("contexts", ["{} {}"], "one {}"),
        ("seed", -1, "at least 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_and_what_can(tmp_path, name, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, json.dumps({name: value}), "x.json")
    assert f"ROME's {name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_constructor_checks_too():
    with pytest.raises(ConfigError, match="steps is 0"):
        ROMEConfig(steps=0)


# --- a model's config -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "layer"),
    [("gpt2", 1), ("gptj", 0), ("gpt_neox", 1), ("opt", 1), ("llama", 0), ("qwen2", 1)],
)
def test_a_layer_is_found_by_architecture_and_depth(family_model, family, layer):
    model = family_model(family)  # 4 layers: 17 of 48, GPT-J's 5 of 28, Llama's 5 of 32.
    found = rome_config_for(model)
    assert found.layer == layer
    assert found.steps == (25 if family == "llama" else 20)


def test_another_depth_is_edited_at_the_same_share_of_it(tmp_path):
    model = load_model(save_model(tmp_path / "half", "gptj", n_layer=14))
    assert rome_config_for(model).layer == 2, "GPT-J's 5 of 28"
    assert rome_config_for(model, {"layer": 9}).layer == 9


def test_atlas_has_its_own_numbers_and_changes_are_laid_over_them(atlas, tmp_path):
    own = config_for("atlas").rome
    assert rome_config_for(atlas).layer == own["layer"]
    changed = rome_config_for(atlas, {"steps": 3})
    assert (changed.steps, changed.max_norm_ratio) == (3, own["max_norm_ratio"])
    path = tmp_path / "mine.yaml"
    path.write_text("layer: 5\nmax_norm_ratio: 2")
    assert rome_config_for(atlas, path) == rome_config_for(atlas, str(path))
    assert rome_config_for(atlas, path).layer == 5
    assert rome_config_for(atlas, {"layer": None}).layer == own["layer"]


def test_a_whole_config_keeps_its_numbers_and_gets_a_layer(family_model):
    given = ROMEConfig(steps=20, max_norm_ratio=1.5)
    found = rome_config_for(family_model("llama"), given)
    assert found == ROMEConfig(layer=0, steps=20, max_norm_ratio=1.5)
    assert rome_config_for(family_model("llama"), ROMEConfig(layer=3)).layer == 3


def test_the_oracles_file_serves_the_oracles_model(oracle_model, tmp_path):
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps(official()))
    found = rome_config_for(oracle_model, path)
    assert (found.layer, found.value_key, found.loss_layer) == (2, "prompt", None)


def test_a_layer_or_a_loss_layer_that_the_model_has_not_is_refused(oracle_model):
    with pytest.raises(ConfigError, match=r"layer 6 does not exist: model has 6 layers, 0 to 5"):
        rome_config_for(oracle_model, {"layer": 6})
    with pytest.raises(ConfigError, match=r"last layer, which is 5 of model, not at 47"):
        rome_config_for(oracle_model, {"loss_layer": 47})
    with pytest.raises(ConfigError, match="no key layers"):
        rome_config_for(oracle_model, {"layers ": 2})


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "layer": st.one_of(st.none(), st.integers(0, 200)),
            "steps": st.integers(1, 500),
            "learning_rate": st.floats(1e-6, 10),
            "kl_weight": st.floats(0, 100),
            "moment_tokens": st.sampled_from([None, "auto", "paper", 7]),
            "contexts": st.sampled_from(["rome", "paper", ("{}",), ("{}", "Then {}")]),
        },
    )
)
def test_a_config_survives_being_written_as_json(values):
    config = ROMEConfig(**values)
    again = json.loads(json.dumps(as_mapping(config)))
    assert set(again) == {field.name for field in fields(ROMEConfig)}
    assert ROMEConfig(**{**again, "contexts": config.contexts}) == config
