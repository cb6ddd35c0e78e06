"""Loading, the hub's own path, configs, and fingerprints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import FAMILIES, lay_in_cache, save_model
from conftest import ORACLE
from transformers import AutoModelForCausalLM

import factlens
from factlens import fingerprint, load_model, models, runs
from factlens.configs import ModelConfig, config_for, from_mapping, known_configs, read_config
from factlens.errors import ConfigError, ModelNotFound, ModelUnsupported
from factlens.fingerprints import remembered_fingerprint

ROOT = Path(factlens.__file__).parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_hugging_faces(family_model, family_folder, family):
    tokens = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(family_folder(family)).eval()
    with torch.no_grad():
        expected = reference(tokens).logits.softmax(-1)
    found = runs.logits_of(family_model(family), tokens).softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    last = runs.logits_of(family_model(family), tokens, keep=1).softmax(-1)
    torch.testing.assert_close(last, expected[:, -1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_names_what_it_finds(family_model, family):
    model = family_model(family)
    models.check_model(model)
    assert models.architecture(model) == family
    assert models.is_parallel(model) == (family in ("gptj", "gpt_neox"))
    assert models.W_out(model, 1).shape[1] == 32
    assert models.processing(model) == "none"
    assert models.model_name(model) == family


@pytest.mark.parametrize(
    "name", ["gpt2-xl", pytest.param("EleutherAI/gpt-j-6b", marks=pytest.mark.slow)]
)
def test_make_trace_goes_through_the_hub_path(name, tmp_path):
    """A model under the repo id behind the name, in a cache, offline: the user's own command, and its page."""
    config = config_for(name)
    assert config is not None
    repo, family = {
        "gpt2-xl": (config.models[0], "gpt2"),
        "EleutherAI/gpt-j-6b": ("EleutherAI/gpt-j-6b", "gptj"),
    }[name]
    save_model(tmp_path / "model", family)
    lay_in_cache(tmp_path / "model", repo, tmp_path / "hub")
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    stamps = [ROOT / ".venv" / "installed"]
    command = [
        "make", "-s", "trace", f"MODEL={name}", "PROMPT=x abcd eft; $HOME 'q", "SUBJECT=abcd",
        f"OUT={tmp_path / 'out'}", "ARGS=--samples 1",
        f"BIN={Path(sys.executable).parent}",
        *(f"--assume-old={stamp.relative_to(ROOT)}" for stamp in stamps),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    traced = factlens.Trace.load(tmp_path / "out" / "trace.parquet")
    assert traced.info["model"] == name
    assert traced.facts[0].prompt == "x abcd eft; $HOME 'q"
    assert (traced.engine, traced.prefix_reuse) == ("one-pass", True)
    if name == "gpt2-xl":
        assert traced.info["noise_level"] == 0.1346
    assert (tmp_path / "out" / "trace.html").stat().st_size > 10**6


def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(ModelNotFound, match="there is no folder"):
        load_model(tmp_path / "nothing")


def test_an_unknown_name_offline_says_what_to_do():
    with pytest.raises(ModelNotFound, match="network, or use the bundled 'atlas'") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert "nobody/nothing" in str(caught.value)


def test_weights_that_lack_a_tensor_are_refused_not_filled_with_noise(family_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in family_folder("gpt2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    load_model(tmp_path)
    del weights["transformer.h.3.mlp.c_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFound, match=r"lack 1 of its tensors, such as .*h\.3\.mlp\.c_proj"):
        load_model(tmp_path)


def test_a_model_without_a_causal_architecture_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=96)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises((ModelNotFound, ModelUnsupported)) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_in_memory_is_wrapped_as_a_loaded_one(family_folder):
    from transformers import AutoTokenizer

    folder = family_folder("gpt2")
    wrapped = models.wrap_model(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), "mine"
    )
    assert models.model_name(wrapped) == "mine"
    assert fingerprint(wrapped) == fingerprint(load_model(folder))


def test_a_users_own_bridge_gets_hugging_faces_ids_back(family_folder):
    from transformer_lens.model_bridge import TransformerBridge

    for family, starts_with_bos in (("gpt2", False), ("llama", True)):
        bridge = TransformerBridge.boot_transformers(str(family_folder(family)))
        ids = models.tokenizer(bridge)("abc")["input_ids"]
        assert (ids[0] == 0) == starts_with_bos
        assert bridge.to_tokens("abc")[0, 0] == 0


# -- fingerprints --------------------------------------------------------------------------------------


def test_a_fingerprint_sees_any_change_of_w_out_and_comes_back():
    model = load_model(ORACLE / "model")
    before = fingerprint(model)
    assert fingerprint(load_model(ORACLE / "model")) == before
    assert remembered_fingerprint(model) == before
    weight = models.W_out(model, 3)
    with torch.no_grad():
        kept = weight[200, 60].clone()
        weight[200, 60] += 1e-3
        assert fingerprint(model) == remembered_fingerprint(model) != before
        weight[200, 60] = kept
    assert fingerprint(model) == remembered_fingerprint(model) == before


def test_fingerprints_tell_models_and_types_apart(family_model, family_folder):
    prints = {fingerprint(family_model(family)) for family in FAMILIES}
    assert len(prints) == len(FAMILIES)
    narrow = load_model(family_folder("gpt2"), dtype=torch.bfloat16)
    assert fingerprint(narrow) not in prints


# -- configs -------------------------------------------------------------------------------------------


def test_names_map_to_configs_then_architectures():
    assert set(known_configs()) >= {
        "atlas", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt-j-6b", "gpt-neox-20b", "pythia", "llama",
    }  # fmt: skip
    for name, config in [
        ("gpt2-xl", "gpt2-xl"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("EleutherAI/gpt-j-6B", "gpt-j-6b"),
        ("EleutherAI/pythia-160m", "pythia"),
    ]:
        found = config_for(name)
        assert found is not None
        assert found.name == config
    fallback = config_for("someone/tuned", "gpt_neox")
    assert fallback is not None
    assert fallback.name == "pythia"
    assert config_for("someone/tuned", "mamba") is None


def test_unknown_keys_are_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("trace: {windw: 3}")
    with pytest.raises(ConfigError, match=r"no key windw; it has .*window"):
        read_config(path)
    with pytest.raises(ConfigError, match="has no key"):
        from_mapping(ModelConfig, {"name": "x", "color": 1})
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_config(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="keys and values"):
        read_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path / "none.yaml")
