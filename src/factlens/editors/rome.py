"""ROME: a rank-one edit of one MLP's output matrix (Meng et al., 2022, Section 3.1).

    W_out is an associative memory: key @ W_out + b_out = value.

    1. `choose_key`:   k*, what the layer's MLP is asked with at the subject's last token        (Eq. 3)
    2. `choose_value`: v*, the answer that makes the model say the new object                    (Eq. 4)
    3. `insert`:       the smallest change of W_out by which k* is answered with v*              (Eq. 2)

`rome` is the three together. Conventions are rows: `left [d_mlp]` is C⁻¹k* over k*C⁻¹k*, `right [d_model]` is v* less
the present answer, and W_out' = W_out + left ⊗ right.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from factlens import edits, models, moments
from factlens.changes import LowRank, RankOne
from factlens.editors import register_each, several
from factlens.editors.contexts import contexts_for
from factlens.editors.questions import Question, question, say_traps
from factlens.editors.realising import realise, say_what_happened
from factlens.editors.rome_config import ROMEConfig, as_mapping, rome_config_for
from factlens.editors.values import Value, optimise
from factlens.edits import Edit
from factlens.engines.problems import Progress, is_out_of_memory, no_progress
from factlens.errors import EditError, OutOfMemory
from factlens.facts import Rewrite
from factlens.key_statistics import moment_for
from factlens.models import Model
from factlens.moments import Factor, KeyMoment

Config = ROMEConfig | Mapping[str, object] | str | Path | None
TOGETHER, TOGETHER_WIDE, WIDE = 16, 4, 2048
"""Rewrites that are optimised in one batch; on a CPU fewer from so many neurons on."""


@torch.inference_mode(False)  # Gradients are taken, whatever the caller has switched off.
def rome(
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: Config = None,
    *,
    moment: KeyMoment | None = None,
    engine: str = "auto",
    progress: Progress = no_progress,
) -> Edit:
    """Make the model say another object for a subject, by the smallest change of one `W_out` (ROME, Section 3.1).

    Several rewrites go into one edit: each is optimised for itself, and the smallest change that answers all their keys is
    inserted, which for one is Eq. 2. (The official code inserts one after the other; so does
    `for r in rewrites: apply_permanently(model, rome(model, r))`.) The weights are left as they were.

    Args:
        model: a hooked model; under `applied(...)` the edit is computed on top.
        rewrites: what to change.
        config: a `ROMEConfig`, a mapping or a file that changes the model's own numbers, or None for those.
        moment: C, if not the layer's stored statistics.
        engine: "auto", "tails" (only what the value reaches is run) or "whole" (as the official code).
        progress: told (tokens read, tokens in all) while statistics are gathered, which are then kept, and afterwards
            (steps done, steps in all).

    Raises:
        ConfigError: a layer or a number that cannot be.
        ModelUnsupported: a model that is spread over several devices.
        SubjectNotFound, PromptTooLong: of a rewrite.
        MomentError: no statistics of the layer's keys, and no text to gather them from.
        EditError: two rewrites with one key, or an edit that does not give what was optimised.
    """
    given = several(rewrites)
    if not given:
        raise EditError("no rewrite was given; an edit needs at least one")
    plan = rome_config_for(model, config)
    asked = _questions(model, given, plan)
    memory = _memory(model, plan, moment, progress)
    values = _values(model, asked, plan, engine, progress)
    return _edit(model, values, plan, _change(values, plan, memory.factor), memory)


@torch.inference_mode(False)
def rome_each(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: Config = None,
    *,
    moment: KeyMoment | None = None,
    engine: str = "auto",
    together: int | None = None,
    progress: Progress = no_progress,
) -> list[Edit]:
    """One edit for each rewrite, as `rome` gives it alone; `together` of them are optimised in one batch.

    None takes 16 of them, or 4 of a wide model on a CPU, where more no longer fit its caches.
    """
    plan = rome_config_for(model, config)
    asked = _questions(model, rewrites, plan)
    memory = _memory(model, plan, moment, progress)
    values = _values(model, asked, plan, engine, progress, together)
    return [
        _edit(model, [each], plan, _change([each], plan, memory.factor), memory) for each in values
    ]


# -- the three steps -------------------------------------------------------------------------------


@torch.inference_mode(False)
def choose_key(model: Model, rewrite: Rewrite, config: Config = None) -> Float[Tensor, " d_mlp"]:
    """k*: the MLP's key at the lookup token, mean over the contexts (Eq. 3). Raises what `rome` raises."""
    plan = rome_config_for(model, config)
    (only,) = _values(model, _questions(model, [rewrite], plan), replace(plan, steps=1), "auto")
    return only.key


@torch.inference_mode(False)
def choose_value(
    model: Model, rewrite: Rewrite, config: Config = None, *, progress: Progress = no_progress
) -> Value:
    """v*, with its key and how its loss fell (Eq. 4); `Value.losses` is a frame to plot. Raises what `rome` raises."""
    plan = rome_config_for(model, config)
    (only,) = _values(model, _questions(model, [rewrite], plan), plan, "auto", progress)
    return only


def insert(
    key: Float[Tensor, " d_mlp"],
    shift: Float[Tensor, " d_model"],
    moment: Float[Tensor, "d_mlp d_mlp"],
) -> RankOne:
    """The smallest change to `W_out` that moves the MLP's output at `key` by `shift` (Eq. 2).

    Smallest in the metric of `moment`, the uncentred E[k kᵀ], so the keys that a model uses most move least.

    Raises:
        SingularMoment: `moment` cannot be inverted, even with a ridge.
    """
    direction = moments.solve(moments.factor(moment), key)  # C⁻¹ k*
    left = direction / (direction @ key.to(direction))
    return RankOne(left=left.to(shift.device), right=shift)


def insert_several(
    keys: Float[Tensor, "rewrite d_mlp"],
    shifts: Float[Tensor, "rewrite d_model"],
    factor: Factor,
    at: Float[Tensor, "rewrite d_mlp"] | None = None,
) -> LowRank:
    """The smallest change that moves the output at each of `keys` by its own of `shifts`: Eq. 2 with several constraints.

    `at` are the keys whose outputs move by exactly that, if not `keys`: the official code takes the direction from the mean
    key and the scale from the bare prompt's.

    Raises:
        EditError: keys that are not independent, as of two rewrites of one subject.
    """
    directions = moments.solve(factor, keys)  # C⁻¹ k*, one a row
    held = (keys if at is None else at).to(directions)
    answers = einsum(held, directions, "held d_mlp, rewrite d_mlp -> held rewrite")
    scale = answers.diagonal().abs().sqrt()
    if not bool((scale > 0).all()) or float(
        torch.linalg.svdvals(answers / scale[:, None] / scale)[-1]
    ) < torch.finfo(torch.float32).eps * len(keys):
        raise EditError(
            f"the keys of the {len(keys)} rewrites are not independent: two of them look the same subject up in the same words; "
            "apply their edits one after the other"
        )
    left = torch.linalg.solve(answers.T, directions).T
    return LowRank(left=left.float().to(shifts.device), right=shifts.float())


# -- together --------------------------------------------------------------------------------------


def _questions(model: Model, rewrites: Sequence[Rewrite], plan: ROMEConfig) -> list[Question]:
    """The rewrites as rows of tokens: what cannot be edited is refused here, before the work."""
    models.check_one_device(model)
    contexts = contexts_for(model, plan.contexts, plan.seed)
    places = {"fact_token": plan.fact_token, "kl_at": plan.kl_at}
    for rewrite in rewrites:
        say_traps(rewrite)
    return [question(model, rewrite, contexts, **places) for rewrite in rewrites]


def _values(
    model: Model,
    questions: Sequence[Question],
    plan: ROMEConfig,
    engine: str,
    progress: Progress = no_progress,
    together: int | None = None,
) -> list[Value]:
    together = _together(model) if together is None else together
    # Rows of a batch are padded to its longest: those that are alike go together.
    order = sorted(range(len(questions)), key=lambda n: questions[n].reach)
    found: dict[int, Value] = {}
    for begin in range(0, len(order), together):
        part = order[begin : begin + together]

        def tell(done: int, total: int, begin: int = begin, count: int = len(part)) -> None:
            progress(begin * total + done * count, len(questions) * total)

        asked = [questions[number] for number in part]
        found |= dict(zip(part, _that_fit(model, asked, plan, engine, tell), strict=True))
    return [found[number] for number in range(len(questions))]


def _that_fit(
    model: Model, asked: Sequence[Question], plan: ROMEConfig, engine: str, tell: Progress
) -> list[Value]:
    """The values of a batch; when memory runs out, of its halves."""
    try:
        return optimise(model, asked, plan, engine=engine, progress=tell)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(asked) == 1:
            raise OutOfMemory(
                f"the rows of {asked[0].rewrite.prompt!r} do not fit into memory; give fewer contexts, or a narrower dtype"
            ) from None
    torch.cuda.empty_cache()  # Not in the handler, whose traceback still holds the activations.
    middle = len(asked) // 2
    halves = asked[:middle], asked[middle:]
    return [value for half in halves for value in _that_fit(model, half, plan, engine, tell)]


def _together(model: Model) -> int:
    wide = int(models.W_out(model, 0).shape[0]) >= WIDE
    return TOGETHER_WIDE if wide and models.device_of(model).type == "cpu" else TOGETHER


def _change(values: Sequence[Value], plan: ROMEConfig, factor: Factor) -> RankOne | LowRank:
    keys = [
        value.spellings if plan.value_key == "spellings" else value.key[None] for value in values
    ]
    at = torch.stack([value.bare_key for value in values]) if plan.value_key == "prompt" else None
    shifts = torch.cat(
        [value.shift.expand(len(own), -1) for own, value in zip(keys, values, strict=True)]
    )
    change = insert_several(torch.cat(keys), shifts, factor, at)
    # All spellings of a subject move by one shift: their columns are one.
    lefts = torch.stack([part.sum(1) for part in change.left.split(list(map(len, keys)), 1)], 1)
    if len(values) > 1:
        return LowRank(left=lefts, right=torch.stack([value.shift for value in values]))
    return RankOne(left=lefts[:, 0], right=values[0].shift)


def _edit(
    model: Model,
    values: Sequence[Value],
    plan: ROMEConfig,
    change: RankOne | LowRank,
    memory: "_Memory",
) -> Edit:
    """The edit with its provenance, once it is seen to do what it should."""
    layer = values[0].layer
    results: list[dict[str, object]] = [
        {
            "layer": layer,
            "lookup": value.question.lookups[0],
            "steps": len(value.losses),
            "loss_first": float(value.losses["loss"].iloc[0]),
            "loss_last": float(value.losses["loss"].iloc[-1]),
            "shift_over_v0": float(value.shift.norm() / value.bare_output.norm()),
            "engine": value.engine,
            "losses": value.losses.to_dict("list"),
        }
        for value in values
    ]
    rewrites = [value.rewrite for value in values]
    info = edits.info_for(model, "rome", as_mapping(plan), rewrites, statistics=memory.about)
    edit = Edit({models.W_out_name(layer): change}, info)
    for value, result in zip(values, results, strict=True):
        seen = realise(model, edit, layer, change, value.question)
        say_what_happened(
            value.rewrite, seen, "try another layer, more steps, or a larger max_norm_ratio"
        )
        result.update(seen)
    return replace(edit, info={**edit.info, "results": results})


@dataclass(frozen=True)
class _Memory:
    """C of a layer, factorised, and where it is from."""

    factor: Factor
    about: Mapping[str, object]


_memories: "weakref.WeakKeyDictionary[Model, tuple[tuple, _Memory]]" = weakref.WeakKeyDictionary()


def _memory(
    model: Model, plan: ROMEConfig, moment: KeyMoment | None, progress: Progress
) -> _Memory:
    """C of the layer; the last one of each model is kept factorised, since a wide one takes seconds."""
    layer = int(str(plan.layer))
    if moment is not None:
        return _remember(moment)
    if plan.moment == "identity":
        width = torch.eye(models.W_out(model, layer).shape[0], dtype=torch.float64)
        return _Memory(Factor(width, 0.0), {"corpus": "none: the identity"})
    found = moment_for(model, layer, tokens=plan.moment_tokens, progress=progress)
    # Asked for each time: more may have been gathered, or imported, in the meantime.
    key = (layer, found.count, json.dumps(dict(found.about), sort_keys=True, default=str))
    if model not in _memories or _memories[model][0] != key:
        _memories[model] = (key, _remember(found))
    return _memories[model][1]


def _remember(moment: KeyMoment) -> _Memory:
    factor = moments.factor(moment)
    about = {name: moment.about.get(name) for name in ("corpus", "digest", "documents")}
    return _Memory(factor, {**about, "tokens": moment.count, "ridge": factor.ridge})


register_each(rome, rome_each)
