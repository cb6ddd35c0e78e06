"""What the corrupted runs start from: noise on the subject's token embeddings, and how strong it is.

Every rule gives an additive `Noise` in float64, `[sample, subject_pos, d_model]`: Gaussian (ROME, Section 2.1), the
official code's own draws, uniform (its appendix), and other names' embeddings instead (`replacements.py`).
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from factlens import models, runs
from factlens.configs import config_for
from factlens.errors import PlanError
from factlens.facts import Fact, bundled_subjects
from factlens.fingerprints import remembered_fingerprint
from factlens.models import Model
from factlens.replacements import replace_tokens, swap, swap_with
from factlens.types import Noise

RULES = ("gaussian", "uniform", "rome", "replace", "swap", "swap:<other subject>")
"""Noise; every subject token replaced by a random one of other names; another subject of equal length swapped in."""
WITHOUT_LEVEL = ("replace", "swap")
SIGMAS = 3.0
"""The noise level in standard deviations of the subjects' embeddings (ROME, footnote to Section 2.1)."""


@dataclass(frozen=True)
class NoiseLevel:
    """Standard deviation (Gaussian) or half width (uniform) of the noise, and where the number comes from."""

    value: float
    source: str


def fact_seed(seed: int, prompt: str, subject: str) -> int:
    """A seed for one fact's draws that depends on nothing else: sha256, not Python's salted `hash`."""
    text = f"{seed}\0{prompt}\0{subject}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def draw(
    rule: str, level: float, shape: tuple[int, int, int], seed: int
) -> Float[Tensor, "sample subject_pos d_model"]:
    """Noise of `shape` in float64.

    "rome" repeats the official code: a fresh `RandomState(1)` for every trace, sample-major, so every fact with as
    many subject tokens sees the same draws.

    Raises:
        PlanError: an unknown rule.
    """
    if rule == "rome":
        return torch.from_numpy(np.random.RandomState(1).randn(*shape) * level)
    generator = np.random.default_rng(seed)
    if rule == "gaussian":
        return torch.from_numpy(generator.standard_normal(shape) * level)
    if rule == "uniform":
        return torch.from_numpy(generator.uniform(-level, level, shape))
    raise PlanError(f"no noise rule {rule!r}; there are {', '.join(RULES)}")


def noise_for(
    model: Model,
    ids: Tensor,
    subject: tuple[int, int],
    fact: Fact,
    *,
    rule: str,
    level: float,
    samples: int,
    seed: int,
) -> Noise:
    """The noise of one tokenized fact under `rule`, drawn from the fact's own seed (`fact_seed`).

    Raises:
        PlanError: an unknown rule.
        FactError: no other subject of the same length to swap in.
    """
    own = fact_seed(seed, fact.prompt, fact.subject)
    if rule == "swap":
        return swap(model, ids, subject, fact, samples, own)
    if rule.startswith("swap:"):
        return swap_with(model, ids, subject, rule.removeprefix("swap:"))
    if rule == "replace":
        return replace_tokens(model, ids, subject, samples, own)
    return draw(rule, level, (samples, subject[1] - subject[0], models.cfg(model).d_model), own)


def spread(
    noise: Noise, subject: tuple[int, int], length: int, clean_rows: int
) -> Float[Tensor, "row pos d_model"]:
    """Noise for a whole batch: zero in the first `clean_rows` rows and outside the subject."""
    full = torch.zeros(clean_rows + noise.shape[0], length, noise.shape[2], dtype=noise.dtype)
    full[clean_rows:, subject[0] : subject[1]] = noise
    return full


# -- the level -------------------------------------------------------------------------------------


def measure_level(model: Model, subjects: Sequence[str]) -> float:
    """3 sigma over all entries of the token embeddings of `subjects`, each tokenized alone (ROME's code)."""
    tokenizer = models.tokenizer(model)
    ids = [i for s in subjects for i in tokenizer(s, add_special_tokens=False)["input_ids"]]
    # One embedding per distinct token, weighted by its count: subjects share most of theirs.
    tokens, counts = torch.tensor(ids).unique(return_counts=True)
    context = int(models.cfg(model).n_ctx)
    rows = torch.cat(
        [
            runs.token_embeddings(model, part[None])[0].double().cpu()
            for part in tokens.split(context)
        ]
    )
    weights = counts.double()[:, None] * torch.ones(rows.shape[1], dtype=torch.float64)
    total = weights.sum()
    mean = (weights * rows).sum() / total
    return SIGMAS * float(((weights * (rows - mean) ** 2).sum() / (total - 1)) ** 0.5)


def noise_level(
    model: Model, given: float | str | None = None, subjects: Sequence[str] = ()
) -> NoiseLevel:
    """The level that belongs to the model, so that a fact gets the same number alone as among a thousand.

    A number is taken as it is; "facts" measures 3 sigma over `subjects` (the paper's rule); None takes the config's
    number for this very name and unprocessed weights, else 3 sigma over the bundled subjects, kept by the model's fingerprint;
    "0.5x" is a multiple of that.

    Raises:
        PlanError: a negative number, or another word.
    """
    if given == "facts":
        return NoiseLevel(
            measure_level(model, subjects), f"3 sigma over the {len(subjects)} subjects given"
        )
    if isinstance(given, str):
        if not re.fullmatch(r"\d+(\.\d+)?x", given):
            raise PlanError(
                f"noise_level is a number, 'facts', a multiple such as '0.5x', or None, not {given!r}"
            )
        own = noise_level(model)
        return NoiseLevel(float(given[:-1]) * own.value, f"{given} of {own.source}")
    if given is not None:
        if not 0 <= given < float("inf"):
            raise PlanError(f"a noise level is a number from 0 up, not {given}")
        return NoiseLevel(float(given), "given")
    name = models.model_name(model)
    config = config_for(name) if models.processing(model) == "none" else None
    if config is not None and name in config.models and config.trace.noise_level is not None:
        source = config.trace.noise_source or "no source stated"
        return NoiseLevel(config.trace.noise_level, f"configs/{config.name}.yaml: {source}")
    return NoiseLevel(_bundled_level(model), "3 sigma over the bundled subjects")


def _bundled_level(model: Model) -> float:
    subjects = bundled_subjects()
    digest = hashlib.sha256(
        "\0".join([remembered_fingerprint(model), *subjects]).encode()
    ).hexdigest()
    cache = cache_folder() / "noise" / f"{digest[:32]}.json"
    with_cache = _read_level(cache)
    if with_cache is not None:
        return with_cache
    level = measure_level(model, subjects)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"noise_level": level}), encoding="utf-8")
        partial.replace(cache)
    except OSError:  # A cache that cannot be written costs a second each time, not the result.
        pass
    return level


def _read_level(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["noise_level"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cache_folder() -> Path:
    """Where small things that can be recomputed are kept: `$XDG_CACHE_HOME/factlens`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "factlens"
