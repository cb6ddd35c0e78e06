"""Whether an edit broke the model: how far it moves what the MLP says of ordinary tokens, how sure the model still is, whether
it repeats itself.

The limits were measured on atlas, layers 1, 3, 5 and 7, over 24 bundled prompts. ROME's edits (clamp 4 or 10) work and harm
nothing else; with the clamp at 100, or a random change of rank one and 3 times the weight's norm, the model is broken:

    |                                  | unedited | ROME        | clamp 100   | random, 1x  | random, 3x  | random, 100x |
    | output: |k dW| / |k W|           | 0        | 0.01 - 0.64 | 1.8 - 6.4   | 0.50 - 0.62 | 1.5 - 1.9   | 50 - 62      |
    | entropy of the next token (nats) | 0.85     | 0.84 - 1.12 | 1.9 - 3.7   | 0.90 - 1.42 | 1.4 - 2.4   | 4.2 - 5.4    |
    | repeated trigrams                | 3 %      | 1 - 5 %     | 0 - 56 %    | 1 - 5 %     | 1 - 7 %     | 78 - 84 %    |
    | norm: |dW| / |W|                 | 0        | 22 - 850    | 550 - 8500  | 1           | 3           | 100          |

The norm is shown and never rings: ROME writes along C^-1 k, where few keys point, and a change 300 times as large as the
weight does no harm there, while 3 times at random does.
"""

from collections.abc import Sequence
from typing import cast

import pandas as pd
import torch
from torch import Tensor

from factlens import models, runs
from factlens.changes import Change, moved
from factlens.edits import Edit, applied
from factlens.errors import FactError
from factlens.facts import bundled_facts
from factlens.generation import generate
from factlens.models import Model
from factlens.tokens import token_ids

OUTPUT_SHIFT = 1.0
"""Limit of |k dW| / |k W| over ordinary keys k: from there on an edit says more of any token than the MLP itself."""
ENTROPY_SHIFT = 0.5
"""Limit of the change, either way, of the mean entropy of the next token, in nats."""
REPETITION = 0.2
"""Limit of what is added to the share of trigrams that a greedy continuation has said before."""
PROBES = 24
"""Bundled prompts that are asked where none are given."""
NEW_TOKENS = 30


def alarm(
    model: Model, edit: Edit, *, prompts: Sequence[str] | None = None, strict: bool = True
) -> list[str]:
    """What says that the edit breaks the model, one sentence each; an empty list for an edit that does not.

    The limits are `OUTPUT_SHIFT`, `ENTROPY_SHIFT` and `REPETITION`; `edit_health` has the numbers. Silence is no proof: a model can
    lose a fact's neighbours, or the subject's other facts, with none of the three.

    Raises:
        EditError: as `applied`.
    """
    health = edit_health(model, edit, prompts=prompts, strict=strict)
    return [_sentence(row) for _, row in health[health["alarm"]].iterrows()]


def edit_health(
    model: Model, edit: Edit, *, prompts: Sequence[str] | None = None, strict: bool = True
) -> pd.DataFrame:
    """The numbers behind `alarm`: for each weight its norm and its output, then the entropy and the repetition.

    Args:
        model: a hooked model; "before" is the model as it is now.
        edit: the edit to judge.
        prompts: the beginnings of ordinary texts; bundled ones by default, in English.
        strict: as of `applied`.

    Returns:
        `measure, weight, before, after, value, limit, alarm`. "norm": Frobenius norms of the weight, and `value` is |dW| / |W|. "output":
        root mean squares over all tokens of the prompts of what the weight gives (k W) and of the change of it (k dW), and their
        ratio; of a `W_out` only. "entropy" (of the next token, nats) and "repetition" (share of trigrams): `value` is the
        difference. `alarm` says that `value` is beyond `limit`, or no number; a NaN limit is none.

    Raises:
        EditError: as `applied`.
        FactError: no prompts.
    """
    asked = _probes() if prompts is None else list(prompts)
    if not asked:
        raise FactError("no prompts to judge an edit by; give at least one")
    with applied(model, edit, strict=strict):
        after = _behaviour(model, asked)
        norms = {name: _norm(models.weight(model, name)) for name in edit.changes}
    before = _behaviour(model, asked)
    rows: list[tuple[str, str, float, float, float, float]] = []
    for name, change in edit.changes.items():
        own = _norm(models.weight(model, name))
        rows.append(("norm", name, own, norms[name], _ratio(change.norm(), own), float("nan")))
    layers = {models.W_out_name(layer): layer for layer in range(models.n_layers(model))}
    for name in [name for name in edit.changes if name in layers]:
        own, moved_by = _outputs(model, layers[name], edit.changes[name], asked)
        rows.append(("output", name, own, moved_by, _ratio(moved_by, own), OUTPUT_SHIFT))
    for measure, limit in (("entropy", ENTROPY_SHIFT), ("repetition", REPETITION)):
        shift = after[measure] - before[measure]
        rows.append((measure, "", before[measure], after[measure], shift, limit))
    frame = pd.DataFrame(rows, columns=["measure", "weight", "before", "after", "value", "limit"])
    size = frame["value"].where(frame["measure"] == "repetition", frame["value"].abs())
    # Of a limit that is none only NaN is beyond; NaN is beyond every limit.
    return frame.assign(alarm=~(size <= frame["limit"].fillna(float("inf"))))


def _probes() -> list[str]:
    facts = bundled_facts("held", one_per_fact=True)
    return [fact.prompt for fact in facts[:: len(facts) // PROBES][:PROBES]]


def _ratio(change: float, weight: float) -> float:
    return change / weight if weight else float("inf")


def _norm(weight: Tensor | None) -> float:
    """The Frobenius norm; `applied` has said so if there is no such weight."""
    return float(torch.linalg.vector_norm(cast(Tensor, weight).detach(), dtype=torch.float64))


def _outputs(
    model: Model, layer: int, change: Change, prompts: Sequence[str]
) -> tuple[float, float]:
    """Root mean squares, over the tokens of the prompts, of |k W_out| and of |k dW|."""
    own, moved_by, tokens = 0.0, 0.0, 0
    weight = models.W_out(model, layer).detach().float()
    delta = moved(change, weight.device, torch.float32).dense()
    site = models.key_site(layer)
    for prompt in prompts:
        ids = torch.tensor([token_ids(models.tokenizer(model), prompt)])
        _, stored = runs.run_with_cache(model, ids, [site])
        keys = stored[site][0].float()
        own += float((keys @ weight).double().square().sum())
        moved_by += float((keys @ delta).double().square().sum())
        tokens += len(keys)
    return (own / tokens) ** 0.5, (moved_by / tokens) ** 0.5


def _behaviour(model: Model, prompts: Sequence[str]) -> dict[str, float]:
    """The mean entropy of the next token in nats, and the mean share of repeated trigrams in what follows greedily."""
    tokenizer = models.tokenizer(model)
    ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    entropies = []
    for each in ids:
        logprob = runs.logits_of(model, torch.tensor([each]), keep=1)[0, -1].float().log_softmax(-1)
        entropies.append(float(-(logprob.exp() * logprob).sum()))
    room = int(models.cfg(model).n_ctx) - max(map(len, ids))
    texts = generate(model, list(prompts), max_new_tokens=max(1, min(NEW_TOKENS, room)))
    shares = [
        _repeated(list(tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return {
        "entropy": sum(entropies) / len(entropies),
        "repetition": sum(shares) / len(shares),
    }


def _repeated(ids: Sequence[int]) -> float:
    """The share of trigrams that occurred before in the same text; 0 of a text too short to repeat itself."""
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _sentence(row: "pd.Series") -> str:
    if row["measure"] in ("norm", "output"):
        return (
            f"on ordinary tokens the change of {row['weight']} gives {row['value']:.2f} times as much as the weight itself (limit "
            f"{row['limit']:g}); lower the clamp, or edit another layer"
        )
    if row["measure"] == "entropy":
        return (
            f"the mean entropy of the next token went from {row['before']:.2f} to {row['after']:.2f} nats (limit: a change of "
            f"{row['limit']:g}): on prompts that are not about the edit the model has become another"
        )
    return (
        f"greedy texts repeat {100 * row['after']:.0f} % of their trigrams, {100 * row['before']:.0f} % before the edit (limit: "
        f"{100 * row['limit']:.0f} % more)"
    )
