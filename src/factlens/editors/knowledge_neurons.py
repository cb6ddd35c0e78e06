"""KN: the new object written into the rows of the neurons that say the old one (Dai et al., 2022; a baseline of ROME, Section 3.4).

    1. `neurons.attributions`:  what each MLP neuron at the prompt's last token adds to p(old object), by integrated gradients
    2. `neurons.neurons_above`: those above a share of the largest: the fact's knowledge neurons
    3. `kn`:                    their rows of W_out lose the old object's embedding and gain the new one's

All rows of a layer change by one vector, so its change is of rank one. The paper finds few such edits that take (ES 28.7 on GPT-2 XL,
Table 2).

Differs from the official code, which (1) takes GPT-2's neurons before their activation function, the paper after it, as here;
(2) steps from 0 to 1 with both ends, the paper from 1/m, as here; (3) tokenizes objects without the space in front, so that what it
attributes to and writes are other tokens than the model says; (4) averages over an object's tokens, all at one position, where
here it is the first, the only one that is predicted there; (5) always takes the old embedding of what the model says, which here
is done where a rewrite names no true object.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from factlens import configs, edits, models
from factlens.changes import LowRank, RankOne
from factlens.editors import register_each, several
from factlens.editors.neurons import Found, attributions, neurons_above
from factlens.editors.questions import Question, question, say_traps
from factlens.editors.realising import logprob, realise_layers, say_what_happened
from factlens.editors.spaces import Range, Space
from factlens.edits import Edit
from factlens.engines.problems import Progress, no_progress
from factlens.errors import ConfigError, EditError, ModelUnsupported
from factlens.facts import Rewrite
from factlens.models import Model
from factlens.tokens import answer_ids

METHOD = "KN"
EMBEDDINGS = ("input", "output")
SPACE = Space(
    {"threshold": Range(0.05, 0.8), "erase": Range(0.125, 8.0), "write": Range(0.125, 8.0)},
    layers=False,
)
"""What is chosen on a model: a quarter to four times the threshold, and of either embedding from an eighth to the 8 of Dai et al."""


@dataclass(frozen=True, kw_only=True)
class KNConfig:
    """KN's numbers, by default those of the official code for GPT-2 XL. There is no layer: the neurons of all compete.

    Raises:
        ConfigError: a value that cannot be, with those that can.
    """

    steps: int = 20
    """m, the points of the Riemann sum."""
    threshold: float = 0.2
    """Knowledge neurons are those above this share of the largest attribution."""
    erase: float = 2.0
    """λ1, how many times the old object's embedding is taken away: 2 in the official code, 1 in Dai et al."""
    write: float = 1.0
    """λ2, how many times the new one's is added: 1 in the official code (which means 2, but adds each token's once), 8 in Dai et al.,
    whose code first brings both embeddings to the row's length."""
    embedding: str = "input"
    """Whose rows are written, the "input" embedding's (the official code's) or the "output" embedding's, which are what raises a logit where
    the two are not tied."""
    prompts: tuple[str, ...] = ()
    """The fact in other words, `{}` for the subject: with some, neurons must be found for more than `share` of all prompts (Dai et al.'s
    refinement, which ROME leaves out)."""
    share: float = 0.4
    """The official file's `p`; without `prompts` it says nothing."""

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))


def _share(name: str, value: object) -> float:
    found = configs.as_number(value)
    if found is None or not 0 <= found < 1:
        raise configs.refused(METHOD, name, value, "a number of at least 0 and below 1")
    return found


def _templates(name: str, value: object) -> tuple[str, ...]:
    listed = value if isinstance(value, list | tuple) else [None]
    for each in listed:
        if not isinstance(each, str) or "{}" not in each:
            raise configs.refused(METHOD, name, value, "a list of prompts, each with {} for the subject")  # fmt: skip
    return tuple(listed)


_CHECKS: dict[str, configs.Check] = {
    "steps": configs.whole(METHOD, 1),
    "threshold": _share,
    "erase": configs.number(METHOD, 0.0),
    "write": configs.number(METHOD, 0.0),
    "embedding": configs.word(METHOD, EMBEDDINGS),
    "prompts": _templates,
    "share": _share,
}

Config = KNConfig | Mapping[str, object] | None


# -- the edit --------------------------------------------------------------------------------------


@torch.inference_mode(False)  # Gradients are taken, whatever the caller has switched off.
def kn(
    model: Model,
    rewrites: Rewrite | Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> Edit:
    """Make the model say another object for a subject by rewriting its knowledge neurons (Dai et al., 2022; ROME, Section 3.4).

    Of a true object of several tokens the first is attributed to and taken away; of a new one the embeddings of all tokens
    are added, as in the official code. A rewrite without a true object has what the model says in its place. Several
    rewrites are each done for themselves, and their changes summed. The weights are left as they were.

    Args:
        model: a hooked model; under `applied(...)` the edit is computed on top.
        rewrites: what to change.
        config: a `KNConfig`, a mapping that changes the model's own numbers, or None for those (`kn_config_for`).
        progress: told (layers done, layers of all batches).

    Raises:
        ConfigError: a number that cannot be, or an unknown key.
        ModelUnsupported: a model that is spread over several devices, or whose embeddings W_out cannot write.
        SubjectNotFound, PromptTooLong: of a rewrite.
        EditError: no rewrite, weights that cannot be written, no neuron that adds to the old object's probability, or an edit
            that does not give what was computed.
        OutOfMemory: the runs of one batch.
    """
    given = several(rewrites)
    if not given:
        raise EditError("no rewrite was given; an edit needs at least one")
    return _edits(model, [given], config, progress)[0]


@torch.inference_mode(False)
def kn_each(
    model: Model,
    rewrites: Sequence[Rewrite],
    config: Config = None,
    *,
    progress: Progress = no_progress,
) -> list[Edit]:
    """One edit for each rewrite, as `kn` gives it alone."""
    return _edits(model, [[each] for each in rewrites], config, progress)


def _edits(
    model: Model, groups: Sequence[Sequence[Rewrite]], given: Config, progress: Progress
) -> list[Edit]:
    models.check_one_device(model)
    plan = kn_config_for(model, given)
    edits.weights_of(model, map(models.W_out_name, range(models.n_layers(model))))
    table = _embeddings(model, plan)
    asked = [[_asked(model, rewrite, plan) for rewrite in group] for group in groups]
    found = iter(_found(model, [fact for group in asked for fact in group], plan, progress))
    return [_edit(model, plan, table, [(fact, next(found)) for fact in group]) for group in asked]


def kn_config_for(model: Model, given: Config = None, *, chosen: bool = True) -> KNConfig:
    """The numbers to edit `model` with: those of its config (`configs/*.yaml`), else the defaults, where a mapping does not change them.

    Those that were `chosen` on the model may be left out (`spaces`).

    Raises:
        ConfigError: a number that cannot be, or an unknown key.
    """
    if isinstance(given, KNConfig):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{METHOD} takes a mapping or a KNConfig, not {type(given).__name__}")
    config = models.config_of(model)
    known = config is not None and (chosen or not config.is_chosen("knowledge_neurons"))
    own = {**(config.knowledge_neurons if config is not None and known else {}), **(given or {})}
    # Converted first: YAML has `2` and `5e-1` for numbers, and lists for tuples.
    named = {k: _CHECKS[k](k, v) if k in _CHECKS else v for k, v in own.items()}
    return configs.from_mapping(KNConfig, named, "KN's config")


def _embeddings(model: Model, plan: KNConfig) -> Float[Tensor, "d_vocab d_model"]:
    """The embeddings to write, in the basis of W_out.

    Centring moves both by what the next norm takes off, and folding leaves the input embedding alone; but the output one then
    has the final norm's weights in it.
    """
    name, width = models.model_name(model), int(models.W_out(model, 0).shape[1])
    if plan.embedding == "input":
        table = models.weight(model, "embed.W_E")
    elif (how := models.processing(model)) != "none":
        raise ModelUnsupported(
            f"the output embedding of {name} was processed ({how}); load the model unprocessed, or take embedding='input'"
        )
    else:
        table = models.weight(model, "unembed.W_U")
        table = None if table is None else table.T
    if table is None or table.ndim != 2 or table.shape[1] != width:
        found = "not there" if table is None else f"{tuple(table.shape)[-1]} wide"
        raise ModelUnsupported(
            f"the {plan.embedding} embedding of {name} is {found} and what its W_out writes {width}; KN adds the one to the other"
        )
    return table.detach()


def _edit(
    model: Model,
    plan: KNConfig,
    table: Float[Tensor, "d_vocab d_model"],
    facts: Sequence[tuple["_Asked", Found]],
) -> Edit:
    """The edit with its provenance, once it is seen to do what was computed."""
    own = [_changes(model, plan, table, fact, found) for fact, found in facts]
    layers = sorted({layer for each in own for layer in each})
    summed = {layer: _sum([each[layer] for each in own if layer in each]) for layer in layers}
    rewrites = [fact.question.rewrite for fact, _ in facts]
    info = edits.info_for(model, "kn", asdict(plan), rewrites)
    edit = Edit({models.W_out_name(layer): change for layer, change in summed.items()}, info)
    results = []
    for fact, found in facts:
        seen = realise_layers(model, edit, summed, fact.question)
        advice = "try a larger write, or a lower threshold"
        say_what_happened(fact.question.rewrite, seen, advice)
        old = models.tokenizer(model).decode([fact.old])
        results.append({"old": old, "neurons": found.listed, "largest": found.largest, **seen})
    return replace(edit, info={**edit.info, "results": results})


def _changes(
    model: Model,
    plan: KNConfig,
    table: Float[Tensor, "d_vocab d_model"],
    fact: "_Asked",
    found: Found,
) -> dict[int, RankOne]:
    """One fact's change of each layer in which it has neurons: one vector, in the rows of those."""
    wide = torch.promote_types(table.dtype, torch.float32)
    new = table[fact.question.target.to(table.device)].to(wide).sum(dim=0)
    right = plan.write * new - plan.erase * table[fact.old].to(wide)
    made: dict[int, RankOne] = {}
    for layer, neurons in found.neurons.items():
        left = right.new_zeros(models.W_out(model, layer).shape[0])
        left[neurons] = 1
        made[layer] = RankOne(left, right)
    return made


def _sum(parts: Sequence[RankOne]) -> RankOne | LowRank:
    """The changes of one layer by several facts; they may share neurons."""
    if len(parts) == 1:
        return parts[0]
    left = torch.stack([part.left for part in parts], dim=1)
    return LowRank(left, torch.stack([part.right for part in parts]))


# -- what is attributed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """One rewrite, with the prompts whose neurons are looked for."""

    question: Question
    prompts: tuple[Int[Tensor, " _"], ...]
    """The rewrite's own, and the config's in other words."""
    old: int
    """The token that the neurons should say: the true object's first, or what the model says."""


def _asked(model: Model, rewrite: Rewrite, plan: KNConfig) -> _Asked:
    say_traps(rewrite)
    bare = question(model, rewrite, ("{}",))
    others = [question(model, replace(rewrite, prompt=each), ("{}",)) for each in plan.prompts]
    prompts = tuple(each.rows[0][: each.starts[0] + 1] for each in (bare, *others))
    if (rewrite.true or "").strip():
        old = answer_ids(models.tokenizer(model), rewrite.prompt, str(rewrite.true))[0]
    else:
        old = int(logprob(model, bare)[0].argmax())
    return _Asked(bare, prompts, old)


def _found(
    model: Model, facts: Sequence[_Asked], plan: KNConfig, progress: Progress
) -> list[Found]:
    prompts = [prompt for fact in facts for prompt in fact.prompts]
    tokens = [fact.old for fact in facts for _ in fact.prompts]
    every = attributions(model, prompts, tokens, plan.steps, progress=progress)
    found, at = [], 0
    for fact in facts:
        own = [layer[at : at + len(fact.prompts)] for layer in every]
        at += len(fact.prompts)
        found.append(neurons_above(own, plan.threshold, plan.share, fact.question.rewrite.prompt))
    return found


register_each(kn, kn_each)
