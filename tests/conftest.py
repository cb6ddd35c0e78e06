"""Fixtures: small models, made once a session; a cache and a home of the tests' own; no network."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch
from shapes import check_shapes

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # The same numbers everywhere.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # Small models: a second thread costs more than it brings.

hypothesis.settings.register_profile("factlens", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("factlens")
check_shapes()

HERE = Path(__file__).parent
ORACLE = HERE / "oracle"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing of the user's is read or written."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def oracle_model():
    from factlens import load_model

    return load_model(ORACLE / "model")


@pytest.fixture(scope="session")
def atlas():
    from factlens import load_model

    return load_model()


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """A folder with a small random model of the family asked for, made once."""
    from builders import save_model

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def double_model(family_folder):
    """A small random model of the family asked for, in float64: rounding does not hide what differs."""
    from factlens import load_model

    loaded: dict[str, torch.nn.Module] = {}

    def model(family: str):
        if family not in loaded:
            loaded[family] = load_model(family_folder(family), dtype=torch.float64)
        return loaded[family]

    return model


@pytest.fixture(scope="session")
def family_model(family_folder):
    """A loaded small random model of the family asked for."""
    from factlens import load_model

    loaded: dict[str, torch.nn.Module] = {}

    def model(family: str):
        if family not in loaded:
            loaded[family] = load_model(family_folder(family))
        loaded[family].zero_grad(set_to_none=True)  # What a test before took is not this one's.
        return loaded[family]

    return model
