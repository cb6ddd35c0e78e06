"""`make bench-edits`: choosing a value against a straightforward reading of the official procedure, in one process.

Of each step `straightforward` runs all layers over all positions, makes all logits, and has the gradient of δ only: what
the official code does (ROME, Section 3.1), on the plain Hugging Face model, one rewrite at a time. Ours runs what the
value reaches. A ratio of two ways measured beside each other means something on any machine; seconds do not.
"""

import contextlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, cast

import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor, nn

from factlens import atlas, models
from factlens.benchmark import SHAPES, _now, matrix_rate
from factlens.editors.questions import Question, question
from factlens.editors.rome import rome
from factlens.editors.rome_config import ROMEConfig
from factlens.editors.values import optimise
from factlens.engines.passes import block_weights
from factlens.facts import Rewrite, bundled_subjects
from factlens.models import Model
from factlens.moments import KeyMoment
from factlens.statistics_costs import measure_throughput
from factlens.tokens import token_ids

LAYERS = {"atlas": 1, "gpt2-small": 5, "gpt2-medium": 8}
TOGETHER = {"atlas": 16, "gpt2-small": 4, "gpt2-medium": 4}
"""Rewrites of one batch; of wide models fewer, whose activations would leave a CPU's caches."""
PROMPT, TARGET, STEPS = "So {} is on the continent that is called", "France", 20
"""12 tokens of the bundled tokenizer with a subject of 3, which then stands at tokens 2-4; and 1."""
WORDS = ("the", "country", "was", "music", "city", "that", "euro", "tennis", "which", "and", "home")
LENGTHS = (4,) * 10 + (9,) * 10
"""Words of the twenty prefixes, each of one token: as many as the official code samples."""
STATISTICS_TOKENS = {"atlas": 20_000, "gpt2-small": 2_000}


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds, medians over the rounds."""

    shape: str
    layer: int
    together: int
    straightforward: float
    """Key and value of one rewrite."""
    ours: float
    """The same."""
    batched: float
    """The same for each of `together` rewrites that are optimised in one batch."""
    edit: float
    """All of `rome` with C given: key and value, the Cholesky factor of C, the insertion, and the check of the edited model."""
    flops: float
    """FLOPs by `needed_flops` of one rewrite."""
    rate: float
    """FLOP per second of this machine in a matrix product of the model's size, measured beside it."""
    difference: float
    """Largest ‖v* - v‖ / ‖v‖ of ours alone and in the batch, v being the straightforward one."""

    @property
    def share(self) -> float:
        """The part of its time that ours would need for one rewrite if it were nothing but matrix products."""
        return self.flops / self.rate / self.ours


# -- what is run -----------------------------------------------------------------------------------


def build(shape: str, device: str) -> tuple[Model, nn.Module]:
    """The bundled model, or random weights of a GPT-2 shape: hooked, and as plain `transformers` has it."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    if shape == models.BUNDLED:
        # The checkpoint is stored in half width.
        plain = AutoModelForCausalLM.from_pretrained(str(atlas.CHECKPOINT), dtype=torch.float32)
        return models.load_model(device=device), plain.eval().to(device)
    config = GPT2Config(**SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        plain, taken = (GPT2LMHeadModel(config).eval() for _ in range(2))
    taken.load_state_dict(plain.state_dict())
    taken.set_attn_implementation("eager")
    return models.wrap_model(taken, models.tokenizer(models.load_model()), shape), plain


def contexts() -> tuple[str, ...]:
    """The bare prompt and twenty prefixes of fixed words, with the official ones' numbers of tokens."""
    around = WORDS * 2
    texts = (" ".join(around[n % len(WORDS) :][:words]) for n, words in enumerate(LENGTHS))
    return ("{}", *(f" {text}. {{}}" for text in texts))


def rewrites(model: Model, count: int) -> list[Rewrite]:
    """Of bundled subjects with three tokens."""
    tokenizer = models.tokenizer(model)
    fitting = [each for each in bundled_subjects() if len(token_ids(tokenizer, f" {each}")) == 3]
    return [Rewrite(PROMPT, each, TARGET) for each in fitting[:count]]


def needed_flops(config: Any, asked: Question, layer: int, steps: int) -> float:
    """FLOPs of the matrix products of one value when nothing is run twice: 2 for each weight and token, and again backwards.

    Counts one whole run, which is the first step's too; then for each further step the blocks above `layer` over the
    positions from the lookup token on, and for all but the last step the way back through them; in the last block the
    MLP, and then the unembedding, at the positions that are read. Attention scores, norms and activations are left
    out. `config` is a TransformerLens configuration, or anything with its numbers.
    """
    depth, d_model, block = int(config.n_layers), int(config.d_model), block_weights(config)
    mlp = block - 4 * d_model * int(config.d_head) * int(config.n_heads)
    reads = len(asked.contexts) * len(asked.target) + 1
    tokens = sum(map(len, asked.rows))
    after = sum(len(row) - at for row, at in zip(asked.rows, asked.lookups, strict=True))
    spared = mlp if layer < depth - 1 else 0
    unembed = reads * d_model * int(config.d_vocab)
    whole = depth * tokens * block - (tokens - reads) * spared + unembed
    above = (depth - 1 - layer) * after * block - (after - reads) * spared + unembed
    return 2.0 * (whole + 2 * (steps - 1) * above)


# -- the straightforward way -----------------------------------------------------------------------


def straightforward(
    plain: nn.Module, asked: Question, config: ROMEConfig
) -> tuple[Float[Tensor, " d_mlp"], Float[Tensor, " d_model"]]:
    """k* and v* of one rewrite as the official code finds them, by whole runs of a plain GPT-2 with all logits."""
    device = next(plain.parameters()).device
    module = cast(Any, plain).transformer.h[int(str(config.layer))].mlp.c_proj
    tokens = nn.utils.rnn.pad_sequence(list(asked.rows), batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in asked.rows], device=device)
    mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long()
    row, at = torch.arange(len(tokens)), torch.tensor(asked.lookups)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen[:] = [args[0][row, at], output[row, at]]

    plain.requires_grad_(False)
    with torch.no_grad(), _hooked(module, look):
        plain(tokens, attention_mask=mask)
    keys, outputs = seen
    size, delta = outputs[0].norm(), torch.zeros_like(outputs[0]).requires_grad_()

    def move(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.index_put((row, at), output[row, at] + delta)

    adam, essence = torch.optim.Adam([delta], lr=config.learning_rate), None
    for step in range(config.steps):
        with _hooked(module, move):
            logprob = plain(tokens, attention_mask=mask).logits.log_softmax(-1)
        essence = logprob[-1, asked.starts[-1]].detach().clone() if essence is None else essence
        loss = _loss(logprob, asked, essence, config) + config.weight_decay * delta.norm() / size**2
        if step == config.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= (config.max_norm_ratio * size / delta.norm()).clamp(max=1)
    own = list(asked.contexts)
    return keys[own].mean(dim=0), outputs[own].mean(dim=0) + delta.detach()


def _loss(
    logprob: Float[Tensor, "row pos d_vocab"],
    asked: Question,
    essence: Float[Tensor, " d_vocab"],
    config: ROMEConfig,
) -> Tensor:
    target = asked.target.to(logprob.device)
    told = []
    for row in asked.contexts:
        at = asked.starts[row]
        told.append(logprob[row, at : at + len(target)].gather(1, target[:, None]).mean())
    now = logprob[-1, asked.starts[-1]]
    return config.kl_weight * (now.exp() * (now - essence)).sum() - torch.stack(told).mean()


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# -- measuring -------------------------------------------------------------------------------------


def measure(shape: str, model: Model, plain: nn.Module, rounds: int, steps: int) -> Row:
    """All ways in turn, `rounds` times, after one that does not count."""
    layer, count = LAYERS[shape], TOGETHER[shape]
    config = ROMEConfig(layer=layer, contexts=contexts(), steps=steps, stop_loss=0.0)
    asked = [question(model, each, config.contexts) for each in rewrites(model, count)]
    width = models.W_out(model, layer).shape[0]
    moment = KeyMoment(torch.eye(width, dtype=torch.float64), 1)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: optimise(model, asked[:1], config)[0].vector,
        "edit": lambda: rome(model, asked[0].rewrite, config, moment=moment),
        "straightforward": lambda: straightforward(plain, asked[0], config)[1],
        "batched": lambda: optimise(model, asked, config)[0].vector,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    rates, found, device = [], {}, models.device_of(model)
    ways["ours"]()
    for _ in range(rounds):
        for name, way in ways.items():
            rates.append(matrix_rate(model))
            begun = _now(device)
            found[name] = way()
            times[name].append(_now(device) - begun)
    middle: dict[str, Any] = {name: statistics.median(each) for name, each in times.items()}
    middle["batched"] /= count
    wanted = found["straightforward"]
    gaps = [float((found[name] - wanted).norm() / wanted.norm()) for name in ("ours", "batched")]
    flops = needed_flops(models.cfg(model), asked[0], layer, steps)
    rate = statistics.median(rates)
    return Row(shape, layer, count, **middle, flops=flops, rate=rate, difference=max(gaps))


def measure_statistics(shape: str, model: Model, rounds: int) -> pd.DataFrame:
    """The columns of `measure_throughput`, medians over the rounds."""
    layers = range(models.n_layers(model))
    tokens = STATISTICS_TOKENS[shape]
    found = pd.concat([measure_throughput(model, layers, tokens) for _ in range(rounds)])
    return found.groupby("way", sort=False).median().reset_index()


HEADER = (
    "| shape | layer | straightforward, s | one edit, s | straightforward / one | batch | batch, s an edit | one / batch "
    "| whole edit, s | TFLOP needed | share of matrix rate | max rel. diff. v* |"
)
STATISTICS_HEADER = "| shape | layers | tokens | one pass, tokens/s | a pass per layer, tokens/s | ratio | rel. diff. C |"


def show(row: Row) -> str:
    """One row as Markdown."""
    return (
        f"| {row.shape} | {row.layer} | {row.straightforward:.2f} | {row.ours:.2f} "
        f"| **{row.straightforward / row.ours:.1f}x** | {row.together} | {row.batched:.2f} "
        f"| **{row.ours / row.batched:.2f}x** | {row.edit:.2f} | {row.flops / 1e12:.3f} | {row.share:.0%} "
        f"| {row.difference:.0e} |"
    )


def show_statistics(shape: str, found: pd.DataFrame) -> str:
    """One row as Markdown."""
    once, each = found["tokens_per_second"]
    return (
        f"| {shape} | {found['layers'].iloc[0]:.0f} | {found['tokens'].iloc[0]:.0f} | {once:.0f} | {each:.0f} "
        f"| **{once / each:.1f}x** | {found['difference'].max():.0e} |"
    )


def main(
    shapes: Annotated[
        list[str] | None, typer.Option("--shape", help="atlas, gpt2-small, gpt2-medium.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Alternations per row.")] = 3,
    quick: Annotated[bool, typer.Option(help="atlas only, one round.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Compare ROME's value by shortened runs with the straightforward way; prints Markdown tables."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    if threads:
        torch.set_num_threads(threads)
    if wrong := [each for each in shapes or [] if each not in LAYERS]:
        raise typer.BadParameter(f"no shape {wrong[0]!r}; there are {', '.join(LAYERS)}")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen, rounds = (["atlas"], 1) if quick else (shapes or list(LAYERS), rounds)
    console.print(
        f"12 tokens, subject at tokens 2-4, {len(LENGTHS) + 1} contexts, {STEPS} steps, float32, {where}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    _print_header(console, HEADER)
    lines = []
    for shape in chosen:
        model, plain = build(shape, where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Random weights take no edit, and say so.
            console.print(show(measure(shape, model, plain, rounds, STEPS)))
        if shape in STATISTICS_TOKENS:
            lines.append(show_statistics(shape, measure_statistics(shape, model, rounds)))
        del model, plain
    if lines:
        console.print()
        _print_header(console, STATISTICS_HEADER)
        console.print("\n".join(lines))


def _print_header(console: Any, header: str) -> None:
    console.print(header)
    console.print("|---" * header.count(" | ") + "|---|")


if __name__ == "__main__":
    typer.run(main)
