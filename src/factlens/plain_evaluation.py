"""`evaluate` done the straightforward way, which `evaluation_benchmark` sets beside it.

One record at a time on the plain Hugging Face model. The edit is added to its weight, all prompts of the record are one padded batch
with all logits, what the unedited model says is asked anew for every record, and a text is written token by token, each by a run
over all of it.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from factlens import metrics
from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.benchmarks.counterfact import Record
from factlens.benchmarks.inverses import inverses
from factlens.benchmarks.mentions import plain_name
from factlens.benchmarks.references import unrelated
from factlens.counterfact_scores import Pair, edit_sentence
from factlens.edits import Edit
from factlens.metrics import magnitude, success
from factlens.models import W_out_name
from factlens.scoring import Texts
from factlens.text_metrics import generation_entropy, reference_score, says
from factlens.tokens import answer_ids, token_ids


@dataclass(frozen=True)
class Plain:
    """A Hugging Face GPT-2, and how texts become its tokens."""

    model: nn.Module
    tokenizer: Any

    def logits(self, rows: Sequence[list[int]]) -> Float[Tensor, "row pos d_vocab"]:
        """All logits of rows that are padded at the right, nothing kept between two calls."""
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            return self.model(padded.to(device), use_cache=False).logits.float().cpu()


def straightforward(
    plain: Plain,
    records: Sequence[Record],
    edits: Mapping[str, Edit],
    texts: Texts | None = None,
) -> pd.DataFrame:
    """The scores of `evaluate`, one record after another; `edits` are by the rewrite's id, with `texts` there are scores of texts."""
    return pd.DataFrame(
        [_measured(plain, each, edits[str(each.case_id)], texts) for each in records]
    )


def _measured(plain: Plain, record: Record, edit: Edit, texts: Texts | None) -> dict[str, float]:
    near, true = list(record.neighborhood_prompts), record.target_true.text
    others = [(fact.prompt, str(fact.object)) for fact in other_facts(record)]
    said = _ask(plain, [*((prompt, true) for prompt in near), *others])
    known = [said[prompt, true][1] for prompt in near]
    kept = [pair for pair in others if said[pair][1]]
    apart = [
        token_ids(plain.tokenizer, text)[: _context(plain)]
        for text in unrelated({plain_name(record.subject)})
    ]
    before = [plain.logits([ids])[0].log_softmax(-1) for ids in apart]
    with _edited(plain, edit):
        found = _scores(plain, record, known, kept)
        after = [plain.logits([ids])[0].log_softmax(-1) for ids in apart]
        if texts is not None:
            found |= _text_scores(plain, record, texts)
    return {**found, "KL": metrics.kl_per_token(torch.cat(before), torch.cat(after))}


def _scores(
    plain: Plain, record: Record, known: Sequence[bool], kept: Sequence[Pair]
) -> dict[str, float]:
    """The scores of the model as it stands; `known` neighbours and `kept` other facts are those that it said before."""
    new, true, asked = record.target_new.text, record.target_true.text, record.rewrite.prompt
    alike, near = list(record.paraphrase_prompts), list(record.neighborhood_prompts)
    behind = [f"{edit_sentence(record)} {prompt}" for prompt in near]
    pairs = [
        (prompt, target) for prompt in (asked, *alike, *near, *behind) for target in (new, true)
    ]
    turned = inverses(record)
    back, away = ([(getattr(each, of), each.subject) for each in turned] for of in ("new", "true"))
    answers = _ask(plain, [*pairs, *back, *away, *kept])

    def nll(prompts: Sequence[str], target: str) -> Float[Tensor, " prompt"]:
        return torch.tensor([answers[prompt, target][0] for prompt in prompts])

    likelier = [answers[one][0] < answers[other][0] for one, other in zip(back, away, strict=True)]
    some = [prompt for prompt, says_it in zip(near, known, strict=True) if says_it]
    return {
        "ES": success(nll([asked], new), nll([asked], true)),
        "EM": magnitude(nll([asked], new), nll([asked], true)),
        "PS": success(nll(alike, new), nll(alike, true)),
        "PM": magnitude(nll(alike, new), nll(alike, true)),
        "NS": success(nll(near, true), nll(near, new)),
        "NM": magnitude(nll(near, true), nll(near, new)),
        "NS_known": success(nll(some, true), nll(some, new)),
        "NS+": success(nll(behind, true), nll(behind, new)),
        "target_first": float(answers[asked, new][1]),
        "retention": _share([answers[pair][1] for pair in kept]),
        "inverse": _share([answers[pair][1] for pair in back]),
        "inverse_likelier": _share(likelier),
        "known_neighbours": _share(known),
        "n_other": len(kept),
    }


def _ask(plain: Plain, pairs: Sequence[Pair]) -> dict[Pair, tuple[float, bool]]:
    """Mean nll per token of each pair's target, and whether its tokens rank first, from one batch."""
    if not pairs:
        return {}
    prompts = [token_ids(plain.tokenizer, prompt) for prompt, _ in pairs]
    answers = [answer_ids(plain.tokenizer, *pair) for pair in pairs]
    logits = plain.logits([p + a[:-1] for p, a in zip(prompts, answers, strict=True)])
    found = {}
    for pair, each, prompt, answer in zip(pairs, logits, prompts, answers, strict=True):
        at = each[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
        wanted = torch.tensor(answer)
        told = at.log_softmax(-1).gather(1, wanted[:, None])
        first = bool((at.argmax(-1) == wanted).all())
        found[pair] = (-float(told.double().mean()), first)
    return found


def _text_scores(plain: Plain, record: Record, texts: Texts) -> dict[str, float]:
    new, prompts = record.target_new.text, [record.rewrite.prompt, *record.paraphrase_prompts]
    room = 1 + max(len(answer_ids(plain.tokenizer, prompt, new)) for prompt in prompts)
    said = [says(_written(plain, prompt, room), new) for prompt in prompts]
    length = min(texts.tokens, _context(plain))
    written = [
        prompt + _written(plain, prompt, max(1, length - len(token_ids(plain.tokenizer, prompt))))
        for prompt in record.generation_prompts
    ]
    return {
        "free": float(said[0]),
        "free_paraphrase": _share(said[1:]),
        "GE": generation_entropy(written),
        "RS": reference_score(texts.references.tfidf, written, texts.references.of(record)),
    }


def _written(plain: Plain, prompt: str, new: int) -> str:
    """What the likeliest tokens add to a prompt, each from a run over the whole text so far."""
    tokenizer, start = plain.tokenizer, token_ids(plain.tokenizer, prompt)
    ids = list(start)
    for _ in range(new):
        token = int(plain.logits([ids])[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(tokenizer.decode(ids))[len(tokenizer.decode(start)) :]


@contextlib.contextmanager
def _edited(plain: Plain, edit: Edit) -> Iterator[None]:
    """The plain model with an edit of MLP output matrices added to its weights."""
    blocks = cast(Any, plain.model).transformer.h
    weights = {W_out_name(layer): block.mlp.c_proj.weight for layer, block in enumerate(blocks)}
    before = {name: weights[name].detach().clone() for name in edit.changes}
    with torch.no_grad():
        for name, change in edit.changes.items():
            weights[name] += change.dense().to(weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                weights[name].copy_(weight)


def _context(plain: Plain) -> int:
    return int(cast(Any, plain.model).config.n_positions)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else math.nan
