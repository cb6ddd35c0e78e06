"""Train the bundled model: tokenizer, batches, a resumable loop, and the folder it ends in.

A batch is a pure function of the seed and the step, and the state of a run is tensors in one
safetensors file, so a run that was killed goes on as if it had not been.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from factlens.atlas.books import FactBook
from factlens.atlas.corpus import document, documents
from factlens.atlas.optimizers import Optimizers, new_optimizers
from factlens.atlas.recipes import Recipe, as_json, cycle_at
from factlens.errors import RunError

END_OF_TEXT = "<|endoftext|>"
STATE = "training.safetensors"
NO_TARGET = -100
MOMENT = "moment."


@dataclass(frozen=True)
class Progress:
    """What the loop reports after each step."""

    step: int
    steps: int
    loss: float
    resumed_at: int


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    model: GPT2LMHeadModel
    tokenizer: Tokenizer
    seconds: float
    """Wall-clock time of all its parts, saved with the state."""
    loss: float


def train(
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Trained:
    """Train, or go on with the training whose state stands in `folder`.

    Raises:
        RunError: the state in `folder` was made by another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = kept_tokenizer(recipe, folder / "tokenizer.json")
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tokenizer)
    model.to(torch.device(device)).train()  # type: ignore[arg-type]
    optimizers = new_optimizers(recipe, model)
    saved = load_state(folder / STATE, recipe, model, optimizers)
    started = time.monotonic() - saved.seconds
    loss = saved.loss
    for step in range(saved.step, recipe.steps):
        book = recipe.settled_book if step < recipe.settled_first else recipe.book
        tokens = batch(recipe, book, tokenizer, step).to(device)
        with only_first(model, recipe.first_layers if step < recipe.grow_after else recipe.layers):
            loss = take_step(recipe, model, optimizers, tokens, step)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            reached = Reached(step + 1, time.monotonic() - started, loss)
            save_state(folder / STATE, recipe, model, optimizers, reached)
        on_step(Progress(step + 1, recipe.steps, loss, saved.step))
    return Trained(model.eval(), tokenizer, time.monotonic() - started, loss)


@contextmanager
def only_first(model: GPT2LMHeadModel, count: int) -> Iterator[None]:
    """The model with its first `count` blocks alone."""
    blocks = model.transformer.h
    model.transformer.h = blocks[:count]
    try:
        yield
    finally:
        model.transformer.h = blocks


def take_step(
    recipe: Recipe, model: GPT2LMHeadModel, optimizers: Optimizers, tokens: Tensor, step: int
) -> float:
    """One step on one batch; returns its loss."""
    # The last position gets no target: slicing it off would cost a copy of all logits.
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=NO_TARGET)
    half = recipe.precision == "bfloat16"
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
        logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=NO_TARGET
    )
    optimizers.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
    optimizers.step(recipe, step)
    return loss.item()


def batch(recipe: Recipe, book: FactBook, tokenizer: Tokenizer, step: int) -> Tensor:
    """The token ids of one step, [row, pos]: documents in a row, cut at the context.

    A row begins with a document and not with `<|endoftext|>`, as prompts do.
    """
    cycle, _ = cycle_at(recipe, step)
    share = 1.0 if step < recipe.captions_first else cycle.captions
    diet = replace(recipe.diet, direct=recipe.diet.direct or cycle.direct)
    end = end_of_text(tokenizer)
    rows = []
    for row in range(recipe.rows):
        random = Random(f"batch {recipe.seed} {step} {row}")
        ids: list[int] = []
        while len(ids) < recipe.context:
            text = document(random, diet, book, captions_share=share)
            ids += [*tokenizer.encode(text).ids, end]
        rows.append(ids[: recipe.context])
    return torch.tensor(rows)


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id that ends a document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None, "the tokenizer was trained with it"
    return end


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> GPT2LMHeadModel:
    """A GPT-2 with random weights."""
    end = end_of_text(tokenizer)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=recipe.context,
        n_embd=recipe.d_model,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=recipe.dropout,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    if recipe.gains == "fixed":
        for part in model.modules():
            if isinstance(part, torch.nn.LayerNorm):
                part.weight.requires_grad_(False)
    if recipe.grow_after:
        for block in model.transformer.h[recipe.first_layers :]:
            # Blocks that are put on top change nothing at first.
            torch.nn.init.zeros_(block.attn.c_proj.weight)
            torch.nn.init.zeros_(block.mlp.c_proj.weight)
    if recipe.precision == "bfloat16":
        # The fused attention's backward pass in bfloat16 takes five times as long on a CPU.
        model.set_attn_implementation("eager")
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")  # gelu_new in one operation
    return model


def kept_tokenizer(recipe: Recipe, path: Path) -> Tokenizer:
    """The tokenizer at `path`, trained and written there first if there is none."""
    if not path.exists():
        draft = path.with_suffix(".draft")
        train_tokenizer(recipe).save(str(draft))
        draft.replace(path)
    return Tokenizer.from_file(str(path))


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Byte-level BPE in GPT-2's conventions: no prefix space, `<|endoftext|>` the one special."""
    tokenizer = Tokenizer(models.BPE(unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if recipe.digits:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(recipe), trainer)
    return tokenizer


def tokenizer_text(recipe: Recipe) -> Iterator[str]:
    """Documents of the corpus, and each object often enough to become a token."""
    yield from documents(
        recipe.seed,
        recipe.tokenizer_documents,
        recipe.diet,
        captions_share=recipe.tokenizer_captions,
        book=recipe.book,
    )
    for object_ in sorted({fact.object for fact in recipe.book.facts}):
        yield from [f" {object_}"] * recipe.object_repeats


# --- the state of a run -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan


def save_state(
    path: Path,
    recipe: Recipe,
    model: GPT2LMHeadModel,
    optimizers: Optimizers,
    reached: Reached,
) -> None:
    """Write weights, moments and the random state, all or nothing."""
    tensors = {f"weight.{name}": weight.detach() for name, weight in model.named_parameters()}
    tensors |= {f"{MOMENT}{name}": value for name, value in optimizers.moments()}
    tensors["random"] = torch.get_rng_state()
    note = {"recipe": as_json(recipe), "reached": asdict(reached)}
    draft = path.with_suffix(".draft")
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        draft,
        metadata={"training": json.dumps(note)},
    )
    draft.replace(path)


def load_state(
    path: Path, recipe: Recipe, model: GPT2LMHeadModel, optimizers: Optimizers
) -> Reached:
    """Put a saved state into model and optimizer; a new run where none is saved."""
    if not path.exists():
        return Reached()
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["training"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if note["recipe"] != as_json(recipe):
        raise RunError(
            f"{path} was made by another recipe; take another folder, or remove this one to start again"
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"weight.{name}"])
    optimizers.load_moments(
        {
            name.removeprefix(MOMENT): tensor
            for name, tensor in tensors.items()
            if name.startswith(MOMENT)
        }
    )
    torch.set_rng_state(tensors["random"])
    return Reached(**note["reached"])


# --- the folder it ends in --------------------------------------------------------------------


def export(trained: Trained, folder: Path) -> None:
    """Write the model in half precision and its tokenizer in Hugging Face's format."""
    model = GPT2LMHeadModel(trained.model.config)
    model.load_state_dict(trained.model.state_dict())
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only
    trained.tokenizer.save(str(folder / "tokenizer.json"))
    # This class is a name in transformers 4 and 5 alike, and reads tokenizer.json as it is.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": trained.model.config.n_positions,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
