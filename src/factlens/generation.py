"""Text that a model writes, by the `generate` of its own class: greedy, or seeded draws from the top k."""

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast, overload

import torch
from jaxtyping import Int
from torch import Tensor

from factlens import models
from factlens.errors import FactError, PlanError, PromptTooLong
from factlens.models import Model
from factlens.tokens import token_ids

BATCH = 64
"""Prompts that are continued together."""


@overload
def generate(
    model: Model,
    prompts: str,
    *,
    max_new_tokens: int = ...,
    max_tokens: int | None = ...,
    top_k: int | None = ...,
    temperature: float = ...,
    seed: int = ...,
    prepend_bos: bool | None = ...,
) -> str: ...
@overload
def generate(
    model: Model,
    prompts: list[str] | tuple[str, ...],
    *,
    max_new_tokens: int = ...,
    max_tokens: int | None = ...,
    top_k: int | None = ...,
    temperature: float = ...,
    seed: int = ...,
    prepend_bos: bool | None = ...,
) -> list[str]: ...
def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 50,
    max_tokens: int | None = None,
    top_k: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> str | list[str]:
    """Let the model go on from each prompt until it ends the text, or for `max_new_tokens`.

    Args:
        model: a hooked model; under `applied(model, edit)` the edited one.
        prompts: one, or several, which are then continued in batches.
        max_new_tokens: at most this many tokens are added.
        max_tokens: at most this many tokens has a text with its prompt, instead of `max_new_tokens`, and at least one is added.
        top_k: None takes the likeliest token each time; a number draws from that many likeliest ones.
        temperature: divides the logits before a draw; without `top_k` it changes nothing.
        seed: of the draws. The same prompts in the same call with the same seed give the same text; torch's own random
            state is left as it was.
        prepend_bos: force a start token in, or take it out; None does what the tokenizer does (`tokens.token_ids`).

    Returns:
        The prompt and what follows it, as text; a list where several prompts were given.

    Raises:
        FactError: an empty prompt.
        PromptTooLong: a prompt and its new tokens do not fit the model's positions.
        PlanError: a number that is not positive.
    """
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    given |= {
        "top_k": 1 if top_k is None else top_k,
        "max_tokens": 1 if max_tokens is None else max_tokens,
    }
    _check_numbers(**given)
    tokenizer = models.tokenizer(model)
    ids = [_ids(model, prompt, prepend_bos) for prompt in several]
    rooms = [
        _room(model, *each, max_new_tokens, max_tokens) for each in zip(several, ids, strict=True)
    ]
    ends = _end_ids(model)
    texts = [""] * len(several)
    with _seeded(model, seed):
        for numbers in _batches(model, ids, rooms):
            rows, most = [ids[number] for number in numbers], max(rooms[n] for n in numbers)
            longer = _continue(model, rows, most, top_k, temperature, ends)
            for number, new in zip(numbers, longer, strict=True):
                said = _until(new[: rooms[number]], ends)
                texts[number] = _text(tokenizer, several[number], ids[number], said)
    return texts[0] if isinstance(prompts, str) else texts


def sample(
    model: Model, start: Int[Tensor, "row pos"], new: int, *, top_k: int, seed: int
) -> Int[Tensor, "row longer"]:
    """Go on from each row of token ids by exactly `new` draws from the `top_k` likeliest tokens, as ROME's contexts are made.

    The token that ends a text is never drawn. The result holds `start` and lies on the CPU; the same `seed` gives the same
    rows, and torch's own random state is left as it was.

    Raises:
        PromptTooLong: `start` and `new` tokens do not fit the model's positions.
        PlanError: a number that is not positive, or rows without tokens.
    """
    _check_numbers(new=new, top_k=top_k, rows=start.shape[0], positions=start.shape[1])
    _check_fits(model, start.shape[1], new, "the rows begin with")
    with _seeded(model, seed):
        drawn = _continue(model, start.tolist(), new, top_k, 1.0, ())
    return torch.cat([start.cpu(), torch.tensor(drawn, dtype=start.dtype)], dim=1)


# -- checks ----------------------------------------------------------------------------------------


def _check_numbers(**given: float | int) -> None:
    for name, value in given.items():
        if not 0 < value < float("inf"):
            raise PlanError(f"{name} is a number above 0, not {value}")


def _ids(model: Model, prompt: str, prepend_bos: bool | None) -> list[int]:
    if not prompt.strip():
        raise FactError(f"the prompt {prompt!r} is empty; give the beginning of a text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise FactError(f"the prompt {prompt!r} is not valid text; give it as UTF-8") from None
    ids = token_ids(models.tokenizer(model), prompt, prepend_bos)
    if not ids:
        raise FactError(f"the prompt {prompt!r} has no tokens; give the beginning of a text")
    return ids


def _room(model: Model, prompt: str, ids: list[int], new: int, whole: int | None) -> int:
    """How many tokens the prompt is to get."""
    room = new if whole is None else max(1, whole - len(ids))
    _check_fits(model, len(ids), room, f"the prompt {prompt[:40]!r} has")
    return room


def _check_fits(model: Model, length: int, new: int, what: str) -> None:
    context = int(models.cfg(model).n_ctx)
    if length + new > context:
        raise PromptTooLong(
            f"{what} {length} tokens, which with {new} new ones are more than the model's {context} positions; "
            f"ask for at most {max(0, context - length)} new tokens, or shorten it"
        )


def _end_ids(model: Model) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's, and those that the model's own settings name (Llama 3 has several)."""
    found = [models.tokenizer(model).eos_token_id]
    if models.is_bridge(model):
        settings = getattr(cast(Any, model).original_model, "generation_config", None)
        named = getattr(settings, "eos_token_id", None)
        found += named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(int(each) for each in found if each is not None))


@contextlib.contextmanager
def _seeded(model: Model, seed: int) -> Iterator[None]:
    """torch's random state from `seed` for the length of a `with` block, on every device that the model is on."""
    gpus = sorted({each.device.index for each in model.parameters() if each.is_cuda})
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


# -- batches ---------------------------------------------------------------------------------------


def _batches(model: Model, ids: Sequence[list[int]], rooms: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of prompts of like length; of equal length for a HookedTransformer, which guesses what is padding.

    All of a batch get as many tokens as its first, the shortest, has room for, so the longest must have positions for them.
    """
    context = int(models.cfg(model).n_ctx)
    batch: list[int] = []
    for number in sorted(range(len(ids)), key=lambda each: len(ids[each])):
        length = len(ids[number])
        alike = not batch or (
            length + rooms[batch[0]] <= context
            if models.is_bridge(model)
            else length == len(ids[batch[0]])
        )
        if not alike or len(batch) == BATCH:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _until(new: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends the text."""
    stop = next((place for place, each in enumerate(new) if each in ends), len(new))
    return list(new[:stop])


def _text(tokenizer: Any, prompt: str, ids: list[int], new: list[int]) -> str:
    """The prompt as it was given, then what the new tokens add to its decoding: decoded alone, they may lose a space."""
    whole, start = (tokenizer.decode(each, skip_special_tokens=True) for each in (ids + new, ids))
    return prompt + whole[len(start) :] if whole.startswith(start) else whole


# -- the models' own -------------------------------------------------------------------------------


def _continue(
    model: Model,
    rows: Sequence[list[int]],
    new: int,
    top_k: int | None,
    temperature: float,
    ends: Sequence[int],
) -> list[list[int]]:
    """The tokens that follow each row. Without `ends` there are exactly `new`, and none of them ends a text."""
    own = _by_hugging_face if models.is_bridge(model) else _by_lens
    draw = (
        {"top_k": min(top_k, int(models.cfg(model).d_vocab)), "temperature": temperature}
        if top_k
        else {}
    )
    return own(model, rows, new, draw, list(ends))


def _by_hugging_face(
    model: Model, rows: Sequence[list[int]], new: int, draw: dict[str, Any], ends: list[int]
) -> list[list[int]]:
    from transformers import GenerationConfig

    longest, place = max(map(len, rows)), models.device_of(model)
    # Padded on the left, where the mask hides it and shifts the positions: the new tokens join the prompts' ends.
    padded = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=bool(draw),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        suppress_tokens=None if ends else list(_end_ids(model)) or None,
        **draw,
    )
    hf_model = cast(Any, model).original_model
    # Its own settings would fill what is not set here: Llama 2 comes with a temperature and top_p.
    before, hf_model.generation_config = hf_model.generation_config, settings
    try:
        out = hf_model.generate(
            torch.tensor(padded, device=place), attention_mask=torch.tensor(mask, device=place)
        )
    finally:
        hf_model.generation_config = before
    return out[:, longest:].tolist()


def _by_lens(
    model: Model, rows: Sequence[list[int]], new: int, draw: dict[str, Any], ends: list[int]
) -> list[list[int]]:
    lens, barred = cast(Any, model), [] if ends else list(_end_ids(model))

    def bar(module: object, inputs: object, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., barred] = -torch.inf
        return logits

    handle = lens.unembed.register_forward_hook(bar)
    # It masks what looks like padding, a start token too, and without a tokenizer it loses count of positions.
    unpadded = SimpleNamespace(pad_token_id=-1, padding_side="right", eos_token_id=None)
    before, lens.tokenizer = lens.tokenizer, unpadded
    try:
        out = lens.generate(
            torch.tensor(rows, device=models.device_of(model)),
            max_new_tokens=new,
            stop_at_eos=bool(ends),
            eos_token_id=ends or None,
            do_sample=bool(draw),
            verbose=False,
            **draw,
        )
    finally:
        lens.tokenizer = before
        handle.remove()
    return out[:, len(rows[0]) :].tolist()
