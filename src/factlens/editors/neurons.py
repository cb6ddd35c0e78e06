"""Knowledge neurons: what each MLP neuron at a prompt's last token adds to the probability of the object, by integrated gradients.

After Dai et al. (2022), Sections 3.2 and 3.3. The run from scaled neurons on is moved at W_out's output, behind which it is the same:
only the blocks above and one token are run (`tails`), and the gradient is taken back through W_out by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from factlens import models, tails
from factlens.derivatives import differentiable
from factlens.editors.values import agrees, runs_of
from factlens.engines.problems import Progress, is_out_of_memory, no_progress
from factlens.errors import EditError, OutOfMemory
from factlens.models import Model
from factlens.tails import Reads

TOGETHER = 16
"""Prompts that are attributed in one batch."""
ROWS = 128
"""Runs (prompts x steps) in one forward and backward pass, each of one token behind its prompt's keys and values."""


@torch.inference_mode(False)
def attributions(
    model: Model,
    prompts: Sequence[Int[Tensor, " _"]],
    tokens: Sequence[int],
    steps: int = 20,
    *,
    progress: Progress = no_progress,
) -> list[Float[Tensor, "prompt d_mlp"]]:
    """What each neuron at a prompt's last token adds to the probability of a token there (Dai et al., 2022, Section 3.2).

        Attr(w_i) = w_i / m  sum of dP(k/m w) / dw_i  over k = 1 .. m

    where w are a layer's activations behind the activation function, the input of `W_out`, and P is run with k/m of them; all other layers answer
    as they do. So a layer's attributions sum to p - p(with the layer's neurons at zero) as m grows. One layer is scaled at a time, all its
    steps in one pass.

    Args:
        model: a hooked model.
        prompts: token ids, each row without padding.
        tokens: for each prompt the token whose probability it is.
        steps: m.
        progress: told (layers done, layers of all batches).

    Returns:
        One tensor for each layer, in probability; without prompts none.

    Raises:
        OutOfMemory: the runs of one batch.
    """
    depth, batches = models.n_layers(model), range(0, len(prompts), TOGETHER)
    found: list[list[Tensor]] = [[] for _ in range(depth)]
    with differentiable(model):
        for number, start in enumerate(batches):
            part = slice(start, start + TOGETHER)
            for layer in range(depth):
                found[layer].append(_that_fit(model, layer, prompts[part], tokens[part], steps))
                progress(number * depth + layer + 1, len(batches) * depth)
    return [torch.cat(each) for each in found if each]


def _that_fit(model: Model, layer: int, *rest: Any) -> Tensor:
    try:
        return _of_layer(model, layer, *rest)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise OutOfMemory(
        f"attributing to layer {layer} of {models.model_name(model)} does not fit into memory, which takes the gradients of {ROWS} runs; "
        "use a narrower dtype"
    )


def _of_layer(
    model: Model, layer: int, prompts: Sequence[Tensor], tokens: Sequence[int], steps: int
) -> Float[Tensor, "prompt d_mlp"]:
    device, last = models.device_of(model), [len(prompt) - 1 for prompt in prompts]
    every, ends, said = (torch.tensor(x, device=device) for x in (range(len(last)), last, tokens))
    cut = tails.cut_tails(model, layer, prompts, last, Reads(every, ends))
    shortened, whole = runs_of(model, cut, prompts)
    run = shortened if agrees(model, cut, every, Reads(every, ends), shortened) else whole
    W_out = models.W_out(model, layer).detach().float()
    outputs = einsum(cut.keys, W_out, "prompt d_mlp, d_mlp d_model -> prompt d_model")
    total = torch.zeros_like(outputs)
    for part in torch.arange(len(last) * steps, device=device).split(ROWS):
        of, points = part // steps, (part % steps + 1) / steps
        shifts = ((points - 1)[:, None] * outputs[of]).requires_grad_()
        logits = run(shifts, of, Reads(torch.arange(len(of), device=device), ends[of]))
        prob = logits.float().softmax(dim=-1).gather(1, said[of][:, None])
        total.index_add_(0, of, torch.autograd.grad(prob.sum(), shifts)[0])
    gradient = einsum(total / steps, W_out, "prompt d_model, d_mlp d_model -> prompt d_mlp")
    return cut.keys * gradient


# -- which of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The knowledge neurons of one fact."""

    neurons: Mapping[int, Int[Tensor, " neuron"]]
    """By layer; layers without any are left out."""
    largest: float
    """The largest attribution of the rewrite's own prompt, in probability."""

    @property
    def listed(self) -> list[list[int]]:
        """Pairs of a layer and a neuron."""
        return [[layer, n] for layer, each in self.neurons.items() for n in each.tolist()]


def neurons_above(
    attributed: Sequence[Float[Tensor, "prompt d_mlp"]], threshold: float, share: float, name: str
) -> Found:
    """The neurons above `threshold` times their prompt's largest attribution, for more than `share` of the prompts.

    `attributed` has one tensor for each layer; the largest is of all layers. `name` is for messages.

    Raises:
        EditError: none adds to the probability, or none is found for so many prompts.
    """
    largest = torch.stack([layer.amax(dim=1) for layer in attributed]).amax(dim=0)
    if not bool((largest > 0).all()):
        raise EditError(
            f"no neuron adds to the probability of the old object of {name!r}, so there is none to rewrite; name another true object"
        )
    neurons = {}
    for number, layer in enumerate(attributed):
        above = (layer > threshold * largest[:, None]).double().mean(dim=0) > share
        if bool(above.any()):
            neurons[number] = above.nonzero()[:, 0]
    if not neurons:
        raise EditError(
            f"no neuron is found for more than {share:g} of the prompts of {name!r}; lower the share, or give other prompts"
        )
    return Found(neurons, float(largest[0]))
