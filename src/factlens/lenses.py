"""Looking inside an edit: how alike keys are, what a value says, where the new fact is read, and what is said next.

Each function gives a frame, and leaves the model as it found it.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, cast

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from factlens import models, moments, runs
from factlens.changes import moved
from factlens.editors.questions import lookup_of
from factlens.editors.rome import choose_key
from factlens.edits import Edit, applied
from factlens.errors import EditError, FactError, PlanError, PromptTooLong
from factlens.facts import Rewrite
from factlens.models import Model
from factlens.moments import KeyMoment
from factlens.patches import substitute
from factlens.plans import KINDS, as_tuple, check_choices, window_layers
from factlens.tokens import TokenizedPrompt, answer_ids, token_ids, tokenize
from factlens.types import Act, Hooks, Tokens

ROWS = 64
"""Runs that share a forward pass."""
PARTS = {"state": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}


# -- keys ------------------------------------------------------------------------------------------


def key_similarity(
    model: Model,
    subjects: Sequence[str | Rewrite],
    layer: int,
    *,
    moment: KeyMoment | Float[Tensor, "d_mlp d_mlp"] | None = None,
) -> pd.DataFrame:
    """How alike the keys of several subjects are at `layer`: cosines, a square frame whose rows and columns are the subjects.

    With C, the whitened cosine k₁ᵀC⁻¹k₂ / √(k₁ᵀC⁻¹k₁ · k₂ᵀC⁻¹k₂). That one decides how far an edit of one subject reaches
    another: Eq. 2 moves the MLP's output at k₂ by (k₂ᵀC⁻¹k₁)/(k₁ᵀC⁻¹k₁) of the shift. The plain cosine is large between most
    subjects, since it counts the directions that all keys share, which C⁻¹ takes out.

    Args:
        model: a hooked model.
        subjects: a `Rewrite` has the key that ROME would edit (`choose_key`: its prompt's, mean over the contexts), a text its
            own, asked alone.
        layer: whose MLP.
        moment: C, as of `moment_for(model, layer)`.

    Raises:
        PlanError: no such layer, or no subject.
        FactError: of a subject.
        SingularMoment: `moment` cannot be inverted.
    """
    _check_layer(model, layer)
    if not subjects:
        raise PlanError("no subject was given; keys are compared between several")
    names = [each.subject if isinstance(each, Rewrite) else each for each in subjects]
    keys = torch.stack([_key(model, each, layer) for each in subjects]).double()
    across = keys if moment is None else moments.solve(moments.factor(moment), keys).to(keys.device)
    gram = einsum(keys, across, "one d_mlp, other d_mlp -> one other")
    length = gram.diagonal().sqrt()
    alike = (gram / length[:, None] / length).cpu().numpy()
    return pd.DataFrame(alike, index=pd.Index(names, name="subject"), columns=names)


def bleedover(
    model: Model, edit: Edit, others: Sequence[Rewrite], rewrite: Rewrite | None = None
) -> pd.DataFrame:
    """What an edit does at other prompts: how much of its shift arrives there, and what that does to the new object.

    One row for each prompt and changed matrix, the edited one first: `subject, prompt, weight, share, prob_before, prob_after`.
    `share` is that part of the edit's own shift by which the MLP's output moves at the prompt's own key (its component along that
    shift; of a rank-one edit k·left, all of it): 1 at the edited prompt, negative where it moves the other way. The
    probabilities are of the edit's target, its first token, after each prompt.

    Args:
        model: the model without the edit.
        edit: of MLP output matrices.
        others: prompts and their subjects; their targets are not used.
        rewrite: whose shift is meant; None takes the edit's only one.

    Raises:
        EditError: an edit of several rewrites and none of them named, or one that moves nothing at its own key.
        FactError: of a prompt.
    """
    own = _rewrite_of(edit, rewrite)
    rows = []
    for asked in (own, *others):
        prompt = _tokenized(model, asked)
        target = _first_token(model, asked.prompt, own.target)
        before = _prob(model, prompt.ids, target)
        with applied(model, edit):
            after = _prob(model, prompt.ids, target)
        for name, share in _shares(model, edit, own, asked).items():
            rows.append((asked.subject, asked.prompt, name, share, before, after))
    columns = ["subject", "prompt", "weight", "share", "prob_before", "prob_after"]
    return pd.DataFrame(rows, columns=columns)


def _shares(model: Model, edit: Edit, own: Rewrite, asked: Rewrite) -> dict[str, float]:
    """For each matrix, how much of the shift at the rewrite's key arrives at another prompt's."""
    found = {}
    for name, change in edit.changes.items():
        layer = _layer_of(name)
        keys = torch.stack([_asked_key(model, each, layer, edit) for each in (own, asked)])
        wide = moved(change, keys.device, torch.float32).dense()
        shift, other = einsum(keys, wide, "row d_mlp, d_mlp d_model -> row d_model").double()
        if not float(shift @ shift) > 0:
            raise EditError(
                f"the change of {name} moves nothing at the key of {own.prompt!r}, so there is no share of it"
            )
        found[name] = float(other @ shift / (shift @ shift))
    return found


def _layer_of(name: str) -> int:
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1
    if layer < 0 or name != models.W_out_name(layer):
        raise EditError(f"{name} is no MLP's output matrix, so it has no keys")
    return layer


def _key(model: Model, subject: str | Rewrite, layer: int) -> Float[Tensor, " d_mlp"]:
    if isinstance(subject, Rewrite):
        return choose_key(model, subject, {"layer": layer})
    prompt = tokenize(models.tokenizer(model), subject, subject)
    return _key_at(model, prompt.ids, layer, prompt.subject[1] - 1)


def _asked_key(model: Model, rewrite: Rewrite, layer: int, edit: Edit) -> Float[Tensor, " d_mlp"]:
    prompt = _tokenized(model, rewrite)
    return _key_at(model, prompt.ids, layer, _lookup(prompt, rewrite, edit))


def _key_at(model: Model, ids: Tokens, layer: int, position: int) -> Float[Tensor, " d_mlp"]:
    site = models.key_site(layer)
    _, acts = runs.run_with_cache(model, ids, [site])
    return acts[site].reshape(ids.shape[1], -1)[position].float()


# -- values ----------------------------------------------------------------------------------------


def value_lens(
    model: Model,
    vector: Float[Tensor, " d_model"],
    *,
    top: int = 10,
    layer: int | None = None,
) -> pd.DataFrame:
    """The logit lens on an MLP's value: the tokens that `vector` says, were it all there is in the residual stream.

    It goes through the final norm and the unembedding, and the cap on logits where the model has one. The norm brings a bare
    vector to the length of a whole stream, so twice the vector says the same, and adds its bias, whatever the vector. So the
    order of tokens means something and probabilities little: in the model a value is one term of many.

    Columns: `rank` (from 1), `token, logit, prob`.

    Args:
        model: a hooked model.
        vector: v0, δ or v*, or any state of the stream; -δ shows what the shift takes away.
        top: how many tokens.
        layer: whose `W_out` gave the vector, where a norm follows that (Gemma 2): it is applied first.

    Raises:
        PlanError: no such layer, a vector of another length, or no token asked for.
    """
    _check_top(top)
    width = int(models.cfg(model).d_model)
    if len(vector) != width:
        raise PlanError(f"the vector has {len(vector)} entries and the model's stream {width}")
    lens = cast(Any, model)
    stream = rearrange(vector.detach(), "d_model -> 1 1 d_model")
    stream = stream.to(models.device_of(model), models.dtype_of(model))
    after = None
    if layer is not None:
        _check_layer(model, layer)
        after = getattr(lens.blocks[layer], "ln2_post", None)
    with torch.inference_mode():
        stream = stream if after is None else after(stream)
        logits = lens.unembed(lens.ln_final(stream))[0, 0].float()
    # Both kinds of model cap after their unembedding; without a cap it is -1 or None.
    cap = getattr(models.cfg(model), "output_logits_soft_cap", None) or 0.0
    return _ranked(model, cap * torch.tanh(logits / cap) if cap > 0 else logits, top)


def next_tokens(model: Model, prompts: str | Sequence[str], top: int = 5) -> pd.DataFrame:
    """What the model would say next after each prompt: `prompt, rank` (from 1), `token, logit, prob`.

    Under `applied(model, edit)` it is the edited model that is asked.

    Raises:
        FactError: an empty prompt.
        PlanError: no token asked for.
    """
    _check_top(top)
    frames = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        ids = token_ids(models.tokenizer(model), prompt)
        if not ids:
            raise FactError(f"the prompt {prompt!r} has no tokens; give the beginning of a text")
        if len(ids) > (context := int(models.cfg(model).n_ctx)):
            raise PromptTooLong(
                f"the prompt {prompt[:40]!r}… has {len(ids)} tokens and the model {context} positions; shorten it"
            )
        frame = _ranked(model, runs.logits_of(model, torch.tensor([ids]), keep=1)[0, -1], top)
        frame.insert(0, "prompt", prompt)
        frames.append(frame)
    if not frames:
        raise FactError("no prompt was given; what comes next depends on one")
    return pd.concat(frames, ignore_index=True)


def _ranked(model: Model, logits: Float[Tensor, " d_vocab"], top: int) -> pd.DataFrame:
    logits = logits.float()
    best = logits.topk(min(top, len(logits)))
    tokenizer = models.tokenizer(model)
    return pd.DataFrame(
        {
            "rank": range(1, len(best.indices) + 1),
            "token": [tokenizer.decode([each]) for each in best.indices.tolist()],
            "logit": best.values.tolist(),
            "prob": logits.softmax(-1)[best.indices].tolist(),
        }
    )


# -- where the new fact is read --------------------------------------------------------------------


def readers(
    model: Model,
    edit: Edit,
    rewrite: Rewrite | None = None,
    *,
    kinds: str | Sequence[str] = KINDS,
    window: int = 1,
) -> pd.DataFrame:
    """Where the edited model reads the new fact: what p(new object) loses when one part is kept from seeing the edit.

    Two runs of the prompt, with the edit and without. Then, in the edited run, one part at one token (a state, or the MLP or
    attention outputs of `window` layers) is frozen at its value in the unedited run, as severing does in causal tracing
    (ROME, Figure 3). That undoes what the edit changed there and nothing else; attention weights set to zero would also take
    what the unedited model reads there, and show the layers above what they never meet.

    A frozen attention output cuts what its layer reads. A frozen state cuts all that arrived at its token so far: at the
    subject's last token what layers above still read, at the prompt's last token all that was read below. So a state's
    effect is 0 below the edited layer, and at the last token of the last layer it is all that the edit did.

    One row for each cell, tokens from the subject's first on: `kind, layer, position, token, role, prob_unedited, prob_edited,
    prob_severed, effect`, probabilities of the target's first token; `effect` is `prob_edited - prob_severed`.

    Args:
        model: the model without the edit.
        edit: any.
        rewrite: the prompt to ask and whose target to measure; None takes the edit's only one.
        kinds: "state", "attn", "mlp".
        window: layers whose outputs are frozen together, around each; states are always single.

    Raises:
        EditError: an edit of several rewrites and none of them named.
        PlanError: another kind, or a window that is no number of layers.
        FactError: of the prompt.
    """
    asked, chosen, depth = _rewrite_of(edit, rewrite), as_tuple(kinds), models.n_layers(model)
    check_choices(chosen, [window], ["none"])
    prompt, target = _tokenized(model, asked), _first_token(model, asked.prompt, asked.target)
    names = [models.site(layer, PARTS[kind]) for kind in chosen for layer in range(depth)]
    logits, unedited = runs.run_with_cache(model, prompt.ids, names)
    positions = range(prompt.subject[0], len(prompt.words))
    cells = list(product(chosen, range(depth), positions))
    severed: list[float] = []
    with applied(model, edit):
        edited = _prob(model, prompt.ids, target)
        for begin in range(0, len(cells), ROWS):
            part = cells[begin : begin + ROWS]
            hooks = _frozen(part, unedited, window, depth)
            rows = runs.logits_of(model, prompt.ids.repeat(len(part), 1), hooks, keep=1)
            severed += rows[:, -1].float().softmax(-1)[:, target].tolist()
    frame = pd.DataFrame(cells, columns=["kind", "layer", "position"])
    return frame.assign(
        token=[prompt.words[at] for at in frame["position"]],
        role=[prompt.roles[at] for at in frame["position"]],
        prob_unedited=float(logits[0, -1].float().softmax(-1)[target]),
        prob_edited=edited,
        prob_severed=severed,
        effect=edited - pd.Series(severed),
    )


def _frozen(
    cells: Sequence[tuple[str, int, int]], unedited: Mapping[str, Act], window: int, depth: int
) -> Hooks:
    """Hooks for one run a row, in which one cell is as it was without the edit."""
    where: dict[str, Tensor] = {}
    for row, (kind, layer, position) in enumerate(cells):
        for each in window_layers(layer, 1 if kind == "state" else window, depth):
            name = models.site(each, PARTS[kind])
            empty = torch.zeros(len(cells), unedited[name].shape[1], dtype=torch.bool)
            where.setdefault(name, empty)[row, position] = True
    return [
        (name, substitute(runs.rows_of(unedited[name], len(cells)), mask))
        for name, mask in where.items()
    ]


# -- together --------------------------------------------------------------------------------------


def _rewrite_of(edit: Edit, rewrite: Rewrite | None) -> Rewrite:
    if rewrite is not None:
        return rewrite
    if len(edit.rewrites) != 1:
        raise EditError(
            f"the edit has {len(edit.rewrites)} rewrites; say which is meant with rewrite="
        )
    return edit.rewrites[0]


def _tokenized(model: Model, rewrite: Rewrite) -> TokenizedPrompt:
    context = int(models.cfg(model).n_ctx)
    tokenizer = models.tokenizer(model)
    return tokenize(tokenizer, rewrite.prompt, rewrite.subject, context=context)


def _lookup(prompt: TokenizedPrompt, rewrite: Rewrite, edit: Edit) -> int:
    config = cast(dict[str, Any], edit.info.get("config") or {})
    return lookup_of(prompt, str(config.get("fact_token", "subject-last")), rewrite)


def _first_token(model: Model, prompt: str, target: str) -> int:
    return answer_ids(models.tokenizer(model), prompt, target)[0]


def _prob(model: Model, ids: Tokens, target: int) -> float:
    return float(runs.logits_of(model, ids, keep=1)[0, -1].float().softmax(-1)[target])


def _check_layer(model: Model, layer: int) -> None:
    if not 0 <= layer < models.n_layers(model):
        raise PlanError(f"no layer {layer}; the model has 0 to {models.n_layers(model) - 1}")


def _check_top(top: int) -> None:
    if top < 1:
        raise PlanError(f"top is a number of tokens from 1 up, not {top}")
