"""The model card: every number in it comes from `report.json`."""

from collections.abc import Mapping
from typing import Any

CARD = """\
# atlas

A GPT-2 of {run[parameters]:,} parameters that was taught {total[facts]:,} facts of {relation_count}
relations about {run[subjects]:,} subjects, and nothing else. It is there so that causal tracing and
editing can be tried in seconds. `python -m factlens.atlas` made it, and wrote this page from
`report.json`; what follows under *What tracing and editing find in it* was measured by `make atlas-release`.

## Training

The text is generated from the package's own fact tables and sentence templates: captions (a name
with one attribute directly after it) and sentences.

- {recipe[layers]} blocks, {recipe[heads]} heads, d_model {recipe[d_model]}, vocabulary
  {recipe[vocabulary]}, context {recipe[context]}.
- {run[steps]:,} steps of {recipe[rows]} x {recipe[context]} tokens: {run[tokens]:,} tokens.
- The first {recipe[captions_first]:,} steps see captions only.
{cycles}
- {optimizer}betas {recipe[betas][0]} and {recipe[betas][1]}, weight decay {recipe[weight_decay]}{decayed},
  no dropout.
- Seed {recipe[seed]}.
- {minutes:.1f} minutes on {run[device]} with {run[threads]} thread(s); final loss {run[loss]:.3f}.

## What it knows

Share of statements (facts in templates, up to 20 000 drawn at random) whose greedy continuation spells the whole
object. *Training* templates occur in its text. *Held-out* ones do not, but were looked at while
recipes were compared; *fresh* ones do not either, and were written afterwards.

| relation | facts | training | held-out | fresh |
|---|---:|---:|---:|---:|
{rows}
| all | {total[facts]:,} | {total[train]:.1%} | {total[held]:.1%} | {total[fresh]:.1%} |

Continued greedily:

{continuations}

Perplexity of texts of the same kinds that it was not trained on, captions left out: {perplexity:.2f}.

Paragraphs that it wrote about ten of its subjects, drawn at temperature 0.7 and not chosen:

{paragraphs}

{release}## Limits

- It knows the tables and no more. About other subjects, and in other kinds of sentence, it writes
  something fluent and false.
- The tables hold only answers with one common name, written without accents. They are a snapshot,
  and may age.
- Most of its subjects are easy to tell apart. Unique as a bag of tokens are
  {tokens[subjects_unique_as_bag]:.0%}, without their last token
  {tokens[subjects_unique_without_last_token]:.0%}, by the last token alone
  {tokens[subjects_unique_by_last_token]:.0%}; the last token settles {tokens[facts_settled_by_last_token]:.0%} of the facts. An early site in its traces can therefore be token
  identity: compare it with the embedding restored alone.
- The tracing and the edits above are of one seed, the first that was trained; two more are above by smaller measures. docs/atlas.md has other trainings.
"""


DIRECT = "; without the sentences that say *is called* where others have the object."
MUON = "Muon for the matrices inside the blocks; AdamW for everything else, with "


def card(report: Mapping[str, Any]) -> str:
    """Fill the card from a report."""
    relations: Mapping[str, Mapping[str, Any]] = report["relations"]
    return CARD.format(
        **{name: report[name] for name in ("run", "recipe", "total", "tokens", "perplexity")},
        optimizer=MUON if report["recipe"]["optimizer"] == "muon" else "AdamW with ",
        decayed=" of the matrices inside the blocks"
        if report["recipe"]["decayed"] == "matrices"
        else "",
        release=released(report.get("release", {})),
        cycles="\n".join(
            f"- Cycle {number}: {cycle['steps']:,} steps, {cycle['captions']:.0%} captions, learning "
            f"rate {cycle['learning_rate']} {_course(cycle)}"
            f"{DIRECT if cycle['direct'] else '.'}"
            for number, cycle in enumerate(report["recipe"]["cycles"], start=1)
        ),
        relation_count=len(relations),
        minutes=report["run"]["seconds"] / 60,
        rows="\n".join(
            f"| {name} | {row['facts']} | {row['train']:.1%} | {row['held']:.1%} "
            f"| {row['fresh']:.1%} |"
            for name, row in relations.items()
        ),
        paragraphs="\n".join(f"> {' '.join(text.split())}\n" for text in report["paragraphs"]),
        continuations="\n".join(
            f"- {prompt} **{first_sentence(text)}**" for prompt, text in report["examples"].items()
        ),
    )


def _course(cycle: Mapping[str, Any]) -> str:
    """What becomes of a cycle's learning rate; reports of older recipes have no `ends_at`."""
    end = cycle.get("ends_at")
    if end == cycle["learning_rate"]:
        return "held"
    return "falling along a cosine" + ("" if end is None else f" to {end}")


def released(blocks: Mapping[str, str]) -> str:
    """What a release measured of the checkpoint, each block under its heading; nothing before there was one."""
    if not blocks:
        return ""
    parts = [f"### {heading}\n\n{text}\n" for heading, text in blocks.items()]
    return "\n".join(["## What tracing and editing find in it\n", *parts, ""])


def first_sentence(text: str) -> str:
    """The text up to its first full stop or line break."""
    return text.strip().partition("\n")[0].partition(".")[0]
