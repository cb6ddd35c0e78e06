"""A slow second implementation of causal tracing, written from the paper on plain Hugging Face forward hooks.

It knows nothing of TransformerLens, of patches, or of either engine: one GPT-2, one forward pass for each cell and
each noise sample, states as the tuple entries that blocks return.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def hooked(pairs: list[tuple[nn.Module, object]]) -> Iterator[None]:
    handles = [module.register_forward_hook(function) for module, function in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output(value):
    return value[0] if isinstance(value, tuple) else value


def _with(value, changed):
    return (changed, *value[1:]) if isinstance(value, tuple) else changed


class SlowTracer:
    """Traces one prompt on a Hugging Face GPT-2."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, subject: tuple[int, int], noise):
        self.model, self.ids, self.subject, self.noise = model, ids, subject, noise
        self.blocks = model.transformer.h
        self.clean = self._record(None)
        self.corrupted = [self._record(sample) for sample in range(len(noise))]

    def _parts(self, kind: str) -> list[nn.Module]:
        if kind == "state":
            return list(self.blocks)
        return [block.mlp if kind == "mlp" else block.attn for block in self.blocks]

    def _corruption(self, sample: int | None):
        def corrupt(module, args, output):
            if sample is None:
                return output
            begin, end = self.subject
            changed = output.clone()
            changed[0, begin:end] = (changed[0, begin:end].double() + self.noise[sample]).float()
            return changed

        return [(self.model.transformer.wte, corrupt)]

    def _record(self, sample: int | None) -> dict:
        store: dict = {}

        def keeper(key):
            def keep(module, args, output):
                store[key] = _output(output).detach().clone()

            return keep

        pairs = self._corruption(sample)
        for kind in ("state", "mlp", "attn"):
            pairs += [(m, keeper((kind, layer))) for layer, m in enumerate(self._parts(kind))]
        with hooked(pairs), torch.no_grad():
            logits = self.model(self.ids).logits
        store["prob"] = logits[0, -1].softmax(-1)
        return store

    def restored(self, kind: str, layers: list[int], position: int, severed: str, answer: int):
        """Mean over samples of p(answer) with `kind` restored at `layers` and one position."""
        probs = []
        for sample in range(len(self.noise)):
            pairs = self._corruption(sample)
            for cut in ("mlp", "attn"):
                if severed in (cut, "both"):
                    for layer, module in enumerate(self._parts(cut)):
                        source = self.corrupted[sample][cut, layer]
                        pairs.append((module, self._writer(source, position)))
            for layer in layers:
                module = self._parts(kind)[layer]
                pairs.append((module, self._writer(self.clean[kind, layer], position)))
            with hooked(pairs), torch.no_grad():
                probs.append(self.model(self.ids).logits[0, -1].softmax(-1)[answer].item())
        return sum(probs) / len(probs)

    def _writer(self, source, position):
        def write(module, args, output):
            changed = _output(output).clone()
            changed[:, position] = source[:, position]
            return _with(output, changed)

        return write


class SlowROME:
    """ROME's steps 1 and 2 on a plain Hugging Face model: row by row, whole runs, one rewrite (Section 3.1, REFERENCE 2)."""

    OUTPUTS = ("c_proj", "fc_out", "dense_4h_to_h", "fc2", "down_proj")

    def __init__(self, hf_model, tokenizer, layer: int) -> None:
        self.model, self.tokenizer = hf_model.eval(), tokenizer
        blocks = next(m for m in hf_model.modules() if isinstance(m, torch.nn.ModuleList))
        named = dict(blocks[layer].named_modules())
        mlps = [n for n in named if n.split(".")[-1] in self.OUTPUTS and "attn" not in n]
        (self.output,) = (named[name] for name in mlps)

    def run(self, ids, at, delta=None):
        """(log-probabilities, key, output) of one row, with `delta` added to the output at position `at`."""
        seen = {}

        def hook(module, args, output):
            width = output.shape[-1]
            seen["key"] = args[0].reshape(len(ids), -1)[at].detach()
            seen["output"] = output.reshape(len(ids), width)[at].detach()
            if delta is not None:
                add = torch.zeros(len(ids), width)
                add[at] = 1.0
                return output + (add * delta).reshape(output.shape)
            return None

        handle = self.output.register_forward_hook(hook)
        try:
            logits = self.model(torch.tensor([ids])).logits[0]
        finally:
            handle.remove()
        return logits.log_softmax(-1), seen["key"], seen["output"]

    def value(self, rows, ats, target, essence, essence_at, steps, clamp=4.0):
        """δ after `steps` updates; `rows` are prompts as ids, the bare one first."""
        full = [[*row, *target[:-1]] for row in rows]
        with torch.no_grad():
            *_, v0 = self.run(full[0], ats[0])
            before = self.run(essence, essence_at)[0][essence_at]
        delta = torch.zeros_like(v0).requires_grad_()
        adam = torch.optim.Adam([delta], lr=0.5)
        losses = []
        for step in range(steps + 1):
            nll = 0.0
            for row, at, short in zip(full, ats, rows, strict=True):
                logprob, *_ = self.run(row, at, delta)
                told = [logprob[len(short) - 1 + n, each] for n, each in enumerate(target)]
                nll = nll - sum(told) / len(target) / len(rows)
            now = self.run(essence, essence_at, delta)[0][essence_at]
            kl = (now.exp() * (now - before)).sum()
            loss = nll + 0.0625 * kl + 0.5 * delta.norm() / v0.norm() ** 2
            losses.append(float(loss.detach()))
            if step == steps:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                delta *= min(1.0, clamp * float(v0.norm()) / float(delta.norm()))
        return delta.detach(), losses
