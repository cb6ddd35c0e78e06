"""Evaluation: numbers equal those of plain Hugging Face, one prompt at a time; the model is left as it was; failures are rows."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from factlens import counterfact_scores, editors, metrics, models, runs, zsre_scores
from factlens.atlas import CHECKPOINT, relations
from factlens.atlas.books import fact_book
from factlens.atlas.paragraphs import reference
from factlens.atlas.tables import capitalised
from factlens.benchmarks import mentions, zsre
from factlens.benchmarks.atlas_counterfact import counterfact, other_facts
from factlens.benchmarks.references import unrelated
from factlens.changes import RankOne
from factlens.counterfact_scores import SCORES, TEXT_SCORES, cases
from factlens.edits import Edit, applied, info_for
from factlens.errors import ConfigError, EditError, PlanError
from factlens.evaluation import NONE, evaluate, table
from factlens.facts import Fact
from factlens.metrics import MODES, PROTOCOL
from factlens.tokens import answer_ids, token_ids

LABELS = ["case_id", "subject", "relation_id", "editor", "measured_after"]
COLUMNS = [*LABELS, *SCORES, "n_other", "KL", "protocol", "reason"]
TEXTS = [*TEXT_SCORES, "text_protocol"]
LAYER = 7
CONTROLS = 12


@pytest.fixture(scope="module")
def records():
    return counterfact(only=["sport", "instrument", "language"]).records


def push(model, rewrites, config=None) -> Edit:
    """A crude editor: at the key of a prompt's last token, the last MLP writes the target's first unembedding."""
    first, *others = (_pushed(model, each, config) for each in editors.several(rewrites))
    for other in others:
        first = first + other
    return first


def _pushed(model, rewrite, config=None) -> Edit:
    tokenizer = models.tokenizer(model)
    ids = torch.tensor([token_ids(tokenizer, rewrite.prompt)])
    _, stored = runs.run_with_cache(model, ids, [models.key_site(LAYER)])
    key = stored[models.key_site(LAYER)][0, -1].clone()
    target = answer_ids(tokenizer, rewrite.prompt, rewrite.target)[0]
    right = models.weight(model, "unembed.W_U")[:, target].detach().clone()
    size = (config or {"size": 40.0})["size"]
    change = RankOne(left=key / (key @ key), right=right * size / right.norm())
    name = models.W_out_name(LAYER)
    return Edit({name: change}, info_for(model, "push", {"size": size}, [rewrite]))


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# --- independent numbers ----------------------------------------------------------------------


class Plain:
    """The checkpoint by itself, asked for one token at a time."""

    def __init__(self) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].double()

    def ask(self, prompt: str, target: str) -> tuple[float, bool]:
        ids, total, first = self.tokenizer(prompt)["input_ids"], 0.0, True
        tokens = self.tokenizer(f" {target}")["input_ids"]
        for token in tokens:
            logits = self.logits(ids)[-1]
            total -= float(logits.log_softmax(-1)[token])
            first = first and int(logits.argmax()) == token
            ids = [*ids, token]
        return total / len(tokens), first

    def says(self, prompt: str, new: int) -> str:
        """What greedy goes on with."""
        ids = start = self.tokenizer(prompt)["input_ids"]
        for _ in range(new):
            token = int(self.logits(ids)[-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
        return self.tokenizer.decode(ids)[len(self.tokenizer.decode(start)) :]


def mean(values) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def slow_scores(plain: Plain, edited: Plain, record) -> dict[str, float]:
    """The scores of one record, as REFERENCE 3 words them."""
    new, true = record.target_new.text, record.target_true.text
    filled = record.prompt.replace("{}", record.subject)
    groups = {
        "E": ([filled], new, true),
        "P": (record.paraphrase_prompts, new, true),
        "N": (record.neighborhood_prompts, true, new),
    }
    found: dict[str, float] = {}
    for letter, (prompts, wanted, other) in groups.items():
        wins, gaps = [], []
        for prompt in prompts:
            right, wrong = edited.ask(prompt, wanted)[0], edited.ask(prompt, other)[0]
            wins.append(wrong > right)
            gaps.append(math.exp(-right) - math.exp(-wrong))
        found[f"{letter}S"], found[f"{letter}M"] = sum(wins) / len(wins), sum(gaps) / len(gaps)
    found["target_first"] = float(edited.ask(filled, new)[1])
    known = [f for f in other_facts(record) if plain.ask(f.prompt, f.object)[1]]
    found["n_other"] = len(known)
    found["retention"] = mean(edited.ask(f.prompt, f.object)[1] for f in known)
    near = record.neighborhood_prompts
    said = [prompt for prompt in near if plain.ask(prompt, true)[1]]
    found["known_neighbours"] = len(said) / len(near)
    found["NS_known"] = mean(edited.ask(p, true)[0] < edited.ask(p, new)[0] for p in said)
    behind = [f"{filled} {new}. {prompt}" for prompt in near]
    found["NS+"] = mean(edited.ask(p, true)[0] < edited.ask(p, new)[0] for p in behind)
    found["KL"] = slow_kl(plain, edited, record)
    return found | slow_inverse(edited, record)


def slow_kl(plain: Plain, edited: Plain, record) -> float:
    gaps = []
    for text in unrelated([mentions.plain_name(record.subject)]):
        ids = plain.tokenizer(text)["input_ids"]
        before, after = (each.logits(ids).log_softmax(-1) for each in (plain, edited))
        gaps += [float((b.exp() * (b - a)).sum()) for b, a in zip(before, after, strict=True)]
    return mean(gaps)


def slow_inverse(edited: Plain, record) -> dict[str, float]:
    (relation,) = (each for each in relations() if each.name == record.relation_id)
    named = [s for s, _ in relation.facts if s.casefold() == record.subject.casefold()]
    asked = [r.split(" {s}")[0] for r in relation.reverse if named and r.endswith(" {s}")]
    name = named[0] if named else ""
    new, true = (
        [capitalised(each.replace("{o}", target.text)) for each in asked]
        for target in (record.target_new, record.target_true)
    )
    pairs = zip(new, true, strict=True)
    return {
        "inverse": mean(edited.ask(prompt, name)[1] for prompt in new),
        "inverse_likelier": mean(edited.ask(a, name)[0] < edited.ask(b, name)[0] for a, b in pairs),
    }


def edited_by_push(atlas, record, size: float) -> Plain:
    edited = Plain()
    change = push(atlas, record.rewrite, {"size": size}).changes[models.W_out_name(LAYER)]
    with torch.no_grad():
        edited.model.transformer.h[LAYER].mlp.c_proj.weight += change.dense()
    return edited


@pytest.mark.parametrize("size", [15.0, 60.0])
def test_the_numbers_are_those_of_plain_transformers_one_prompt_at_a_time(atlas, records, size):
    some = [records[0], replace(records[1], subject="Nobody at all")]
    assert not other_facts(some[1])
    frame = evaluate(atlas, push, some, config={"size": size})
    plain = Plain()
    for record, (_, row) in zip(some, frame.iterrows(), strict=True):
        expected = slow_scores(plain, edited_by_push(atlas, record, size), record)
        assert set(expected) == {*SCORES, "n_other", "KL"}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=1e-5, nan_ok=True), name


def slow_entropy(text: str, n: int) -> float:
    words = re.findall(r"\w+(?:'\w+)*|[^\w\s]", text)
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    shares = [grams.count(each) / len(grams) for each in set(grams)]
    return -sum(share * math.log2(share) for share in shares)


def slow_cosine(texts: list[str], one: str, other: str) -> float:
    """scikit-learn's TfidfVectorizer with its defaults, fitted on the texts, as its documentation words it."""
    sets = [set(re.findall(r"\b\w\w+\b", text.lower())) for text in texts]

    def weights(text: str) -> dict[str, float]:
        counts = Counter(re.findall(r"\b\w\w+\b", text.lower()))
        seen = {term: sum(term in each for each in sets) for term in counts}
        return {
            term: count * (math.log((1 + len(sets)) / (1 + seen[term])) + 1)
            for term, count in counts.items()
            if seen[term]
        }

    a, b = weights(one), weights(other)
    lengths = [math.sqrt(sum(x * x for x in each.values())) for each in (a, b)]
    return sum(a[term] * b.get(term, 0) for term in a) / math.prod(lengths)


def test_texts_are_scored_as_plain_transformers_writes_them_one_prompt_at_a_time(
    atlas, records, monkeypatch
):
    monkeypatch.setattr(counterfact_scores, "TOP_K", 1)  # No draw depends on what shares its batch.
    record, tokens = records[0], 40
    frame = evaluate(atlas, push, [record], config={"size": 15.0}, generations=tokens)
    assert list(frame.columns) == [*COLUMNS[:-2], *TEXTS, *COLUMNS[-2:]]
    edited = edited_by_push(atlas, record, 15.0)
    texts = []
    for prompt in record.generation_prompts:
        length = len(edited.tokenizer(prompt)["input_ids"])
        texts.append(prompt + edited.says(prompt, tokens - length))
    row = frame.iloc[0]
    entropies = [slow_entropy(text, 2) / 3 + 2 * slow_entropy(text, 3) / 3 for text in texts]
    assert row["GE"] == pytest.approx(mean(entropies))
    about = [reference(each) for each in fact_book().subjects]
    having = [
        text
        for text, subject in zip(about, fact_book().subjects, strict=True)
        if (record.relation_id, record.target_new.text)
        in {(fact.relation.name, fact.object) for fact in subject.facts}
    ]
    assert len(having) >= 1
    assert row["RS"] == pytest.approx(slow_cosine(about, " ".join(texts), " ".join(having)))
    new = record.target_new.text
    prompts = [record.rewrite.prompt, *record.paraphrase_prompts]
    said = [
        bool(re.match(rf" {re.escape(new)}\b", edited.says(prompt, 1 + len(new))))
        for prompt in prompts
    ]
    assert row["free"] == said[0]
    assert row["free_paraphrase"] == mean(said[1:])
    assert row["text_protocol"] == "entropy-tfidf/top-5-of-40/independent/1"


# --- controls ---------------------------------------------------------------------------------


def test_the_unedited_model_fails_the_rewrite_and_keeps_the_rest(atlas, records):
    frame = evaluate(atlas, None, records[:CONTROLS])
    assert list(frame.columns) == COLUMNS
    assert (frame["editor"] == NONE).all()
    assert (frame["reason"] == "").all()
    (row,) = table(frame).to_dict("records")
    assert row["ES"] < 5
    assert row["target_first"] == 0
    assert row["PS"] < 10
    assert row["NS"] > 95
    assert row["retention"] == 100
    assert row["S"] < 10
    assert row["KL"] == pytest.approx(0, abs=1e-6)
    assert (frame["measured_after"] == 0).all()
    assert frame["EM"].mean() < -0.8
    assert frame["NM"].mean() > 0.8


def test_an_edit_that_works_is_seen_to_and_one_of_nothing_is_not(atlas, records):
    frame = evaluate(atlas, push, records[:CONTROLS])
    assert frame["target_first"].mean() > 0.6
    assert frame["ES"].mean() > 0.9
    nothing = evaluate(atlas, push, records[:CONTROLS], config={"size": 0.0})
    control = evaluate(atlas, None, records[:CONTROLS])
    pd.testing.assert_frame_equal(
        nothing.drop(columns=LABELS[3:]), control.drop(columns=LABELS[3:]), atol=1e-5
    )


def test_an_edit_that_breaks_the_model_loses_neighbours_and_other_facts(atlas, records):
    frame = evaluate(atlas, push, records[:8], config={"size": 3000.0})
    assert frame["NS"].mean() < 0.6
    assert frame["retention"].mean() < 0.5


# --- the model, failures, batches -------------------------------------------------------------


def test_the_model_is_left_as_it_was_to_the_bit_also_after_failures(atlas, records):
    def sometimes(model, rewrite, config=None):
        if rewrite.id == str(records[1].case_id):
            raise EditError("cannot be done")
        return push(model, rewrite)

    before, seen = state_of(atlas), []
    frame = evaluate(
        atlas,
        sometimes,
        records[:4],
        batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    after = state_of(atlas)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(frame["reason"]) == ["", "EditError: cannot be done", "", ""]
    assert frame.loc[1, list(SCORES)].isna().all()
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (row,) = table(frame).to_dict("records")
    assert (row["n"], row["failed"]) == (3, 1)


def test_a_record_that_does_not_fit_the_model_is_a_row_with_its_reason(atlas, records):
    long = replace(records[0], paraphrase_prompts=("word " * 2000,))
    frame = evaluate(atlas, push, [long, records[1]])
    assert frame["reason"][0].startswith("PromptTooLong: ")
    assert frame["reason"][1] == ""


def test_what_every_record_would_die_of_is_raised(atlas, records):
    def misled(model, rewrite, config=None):
        raise ConfigError("no such key")

    with pytest.raises(ConfigError, match="no such key"):
        evaluate(atlas, misled, records[:3])


def test_an_edit_of_another_model_is_refused(atlas, records):
    def foreign(model, rewrite, config=None):
        edit = push(model, rewrite)
        return Edit(edit.changes, {**edit.info, "fingerprint": "0" * 64})

    frame = evaluate(atlas, foreign, records[:1])
    assert frame["reason"][0].startswith("EditError: ")


def test_nan_is_a_failure_and_no_score(atlas, records, monkeypatch):
    true_score = metrics.score

    def broken(model, pairs):
        scored = true_score(model, pairs)
        return replace(scored, nll=scored.nll * math.nan)

    monkeypatch.setattr(metrics, "score", broken)
    frame = evaluate(atlas, push, records[:1])
    assert "NaN" in frame["reason"][0]
    assert frame[list(SCORES)].isna().all(axis=None)


def test_other_facts_can_be_given(atlas, records):
    known = Fact("The capital of France is", "France", "Paris")
    unknown = Fact("The capital of France is", "France", "Rome")
    frame = evaluate(atlas, None, records[:2], others=lambda record: [known, unknown])
    assert list(frame["n_other"]) == [1, 1]
    assert list(frame["retention"]) == [1.0, 1.0]


def test_no_records_give_an_empty_frame(atlas):
    assert list(evaluate(atlas, None, []).columns) == COLUMNS


def test_editors_that_can_work_side_by_side_are_let_to(atlas, records):
    sizes = []

    def one(model, rewrite, config=None):
        return push(model, rewrite, config)

    def many(model, rewrites, config=None):
        sizes.append(len(rewrites))
        if any(rewrite.id == str(records[4].case_id) for rewrite in rewrites):
            raise EditError("one of them is bad")
        return [push(model, rewrite, config) for rewrite in rewrites]

    alone = evaluate(atlas, one, records[:6])
    editors.register_each(one, many)
    try:
        together = evaluate(atlas, one, records[:6], batch=3)
        edits = editors.each(one, atlas, [r.rewrite for r in records[:2]])
        editors.register_each(one, lambda model, rewrites, config: [])
        with pytest.raises(EditError, match="2 rewrites gave 0 edits"):
            editors.each(one, atlas, [r.rewrite for r in records[:2]])
    finally:
        del editors.EACH[one]
    assert sizes == [3, 3, 1, 1, 1, 2], "a bad batch is done again one by one"
    assert [edit.rewrites[0].id for edit in edits] == [str(r.case_id) for r in records[:2]]
    assert "one of them is bad" in together["reason"][4]
    pd.testing.assert_frame_equal(together.drop(index=4), alone.drop(index=4))


def test_a_record_without_prompts_is_left_out_with_its_reason(atlas, records):
    some = [
        replace(records[0], neighborhood_prompts=()),
        replace(records[1], paraphrase_prompts=()),
        records[2],
    ]
    made = []

    def seen(model, rewrites, config=None):
        made.append(rewrites)
        return push(model, rewrites)

    for mode in MODES:
        frame = evaluate(atlas, seen, some, mode=mode)
        assert list(frame["reason"]) == ["no neighbourhood prompts", "no paraphrase prompts", ""]
        assert frame[list(SCORES)].iloc[:2].isna().all(axis=None)
        assert set(frame["measured_after"]) == {1}
        (row,) = table(frame).to_dict("records")
        assert (row["n"], row["failed"]) == (1, 2)
    assert [len(editors.several(each)) for each in made] == [1, 1, 1]


def test_whatever_an_editor_raises_is_its_records_reason(atlas, records):
    def fragile(model, rewrite, config=None):
        if rewrite.id == str(records[1].case_id):
            raise KeyError("a slip of somebody's own")
        return push(model, rewrite)

    for mode, after in (("independent", 1), ("sequential", 2)):
        frame = evaluate(atlas, fragile, records[:3], mode=mode)
        assert list(frame["reason"]) == ["", 'KeyError: "a slip of somebody\'s own"', ""]
        assert frame["ES"].isna().tolist() == [False, True, False]
        assert set(frame["measured_after"]) == {after}

    def full(model, rewrite, config=None):
        raise MemoryError

    with pytest.raises(MemoryError):
        evaluate(atlas, full, records[:1])


# --- several edits ----------------------------------------------------------------------------


def weights_after(model, edits) -> torch.Tensor:
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(applied(model, edit))
        return models.weight(model, models.W_out_name(LAYER)).clone()


def test_a_sequence_is_measured_with_all_its_edits_on_each_made_on_top_of_those_before(
    atlas, records
):
    seen, measured = [], []

    def watched(model, rewrite, config=None):
        seen.append(models.weight(model, models.W_out_name(LAYER)).clone())
        return push(model, rewrite)

    def tell(done: int, total: int) -> None:
        measured.append((done, total))

    before, some = state_of(atlas), records[:3]
    frame = evaluate(atlas, watched, some, mode="sequential", every=2, progress=tell)
    after = state_of(atlas)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(frame["measured_after"]) == [2, 2, 3, 3, 3]
    assert list(frame["case_id"]) == [r.case_id for r in (*some[:2], *some)]
    assert set(frame["protocol"]) == {"mean-token-nll/teacher-forced/sequential/1"}
    assert measured == [(n, 8) for n in range(1, 9)]
    edits: list[Edit] = []
    for record, weight in zip(some, seen, strict=True):
        torch.testing.assert_close(weight, weights_after(atlas, edits))
        with contextlib.ExitStack() as stack:
            for edit in edits:
                stack.enter_context(applied(atlas, edit))
            edits.append(push(atlas, record.rewrite))
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(applied(atlas, edit))
        new, true = (
            metrics.score(atlas, [(r.rewrite.prompt, target(r)) for r in some]).nll
            for target in (lambda r: r.target_new.text, lambda r: r.target_true.text)
        )
    last = frame[frame["measured_after"] == 3]
    assert last["EM"].to_numpy() == pytest.approx(((-new).exp() - (-true).exp()).numpy(), abs=1e-4)
    alone = evaluate(atlas, push, some)
    assert (last["EM"].to_numpy() - alone["EM"]).abs().max() > 0.01, "edits disturb one another"
    rows = table(frame)
    assert list(rows["measured_after"]) == [2, 3]
    assert list(rows["n"]) == [2, 3]


def test_a_batch_is_one_edit_of_all_records(atlas, records):
    given = []

    def watched(model, rewrites, config=None):
        given.append(rewrites)
        return push(model, rewrites)

    before, some = state_of(atlas), records[:3]
    frame = evaluate(atlas, watched, some, mode="batch")
    after = state_of(atlas)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert given == [[record.rewrite for record in some]]
    assert list(frame["measured_after"]) == [3, 3, 3]
    with applied(atlas, push(atlas, given[0])):
        first = metrics.score(atlas, [(r.rewrite.prompt, r.target_new.text) for r in some])
    assert list(frame["target_first"]) == first.ranked_first.double().tolist()

    def cannot(model, rewrites, config=None):
        raise EditError("too many")

    failed = evaluate(atlas, cannot, some, mode="batch")
    assert set(failed["reason"]) == {"EditError: too many"}
    assert set(failed["measured_after"]) == {0}
    with pytest.raises(PlanError, match=r"of one protocol, not of .*batch/1 and .*independent/1"):
        table(pd.concat([frame, evaluate(atlas, None, some[:1])]))


def test_the_unedited_model_is_the_same_in_every_mode(atlas, records):
    alone, *others = (evaluate(atlas, None, records[:2], mode=mode) for mode in MODES)
    for each in others:
        assert (each["measured_after"] == 0).all()
        same = ["protocol", "KL"]
        pd.testing.assert_frame_equal(each.drop(columns=same), alone.drop(columns=same))


def test_what_other_edits_change_by_right_is_not_asked(atlas):
    every = counterfact(only=["sport"]).records
    one = every[0]
    (near,) = [
        r
        for r in every
        if r.subject in one.neighborhood_prompts[0] and r.target_true == one.target_true
    ]
    same = replace(one, relation_id="language", case_id=1)
    other = replace(one, subject="Nobody At All", target_true=near.target_new, case_id=2)
    others = [
        Fact("a", one.subject, "b", "language"),
        Fact("c", one.subject, "d", "field"),
        Fact("e", one.subject, "f", "landmark_city"),
    ]
    monkey = {"model": atlas, "records": [one], "others": lambda record: others}
    assert cases(**monkey)[0].neighbours == one.neighborhood_prompts
    (case,) = cases(**monkey, together=[one, near, same, other])
    assert set(one.neighborhood_prompts) - set(case.neighbours) >= {one.neighborhood_prompts[0]}
    assert len(case.neighbours) >= len(one.neighborhood_prompts) - 2
    assert len(case.known) == len(case.neighbours)
    spared = counterfact_scores._Rewritten.of([one, near, same, other]).spared(one, others)
    assert [fact.relation for fact in spared] == ["field", "landmark_city"]
    place = replace(one, relation_id="landmark_country")
    spared = counterfact_scores._Rewritten.of([one, place]).spared(one, others)
    assert [fact.relation for fact in spared] == ["language", "field"]


def test_what_cannot_be_evaluated_is_refused(atlas, records):
    question = zsre.Record(0, "A", "Is A?", "A?", ("b",), "c", "d")
    for given, words in (
        ({"mode": "both"}, "no mode 'both'; there are independent, sequential, batch"),
        ({"every": 2}, "use mode='sequential'"),
        ({"every": 0, "mode": "sequential"}, "every is a number from 1 up"),
        ({"generations": 0}, "generations is a number from 1 up"),
        ({"records": [question], "generations": 5}, "no prompts for texts"),
        ({"records": [records[0], question]}, "evaluate each kind by itself"),
        ({"records": [3]}, r"not builtins\.int"),
    ):
        with pytest.raises(PlanError, match=words):
            evaluate(**{"model": atlas, "editor": None, "records": records[:1], **given})


def test_questions_of_zsre_go_the_same_way(atlas, records):
    some = [
        zsre.Record(
            case_id=number,
            subject=record.subject,
            src=record.rewrite.prompt,
            rephrase=record.paraphrase_prompts[0],
            answers=(record.target_new.text,),
            loc=record.neighborhood_prompts[0],
            loc_ans=record.target_true.text,
        )
        for number, record in enumerate(records[:3])
    ]
    frame = evaluate(atlas, push, some)
    about = ["case_id", "subject", "editor", "measured_after"]
    assert list(frame.columns) == [*about, *zsre_scores.SCORES, "KL", "protocol", "reason"]
    assert set(frame["protocol"]) == {zsre_scores.PROTOCOL}
    for record, (_, row) in zip(some, frame.iterrows(), strict=True):
        with applied(atlas, push(atlas, record.rewrite)):
            alone = zsre_scores.measure(atlas, [record]).iloc[0]
        assert [row[name] for name in zsre_scores.SCORES] == [
            alone[name] for name in zsre_scores.SCORES
        ]
    assert frame["efficacy"].mean() > 0.6 > evaluate(atlas, None, some)["efficacy"].mean()
    (row,) = table(frame).to_dict("records")
    assert row["efficacy"] == 100 * frame["efficacy"].mean()
    assert "S" not in row
    several = [some[0], replace(some[1], loc=f"Who is {some[0].subject}")]
    found = evaluate(atlas, push, several, mode="batch")
    assert found["specificity"].isna().tolist() == [False, True], "another edit is about it"
    assert set(found["protocol"]) == {"token-argmax/teacher-forced/batch/1"}


# --- tables -----------------------------------------------------------------------------------


def frame_of(**columns) -> pd.DataFrame:
    n = len(next(iter(columns.values())))
    rest = {name: [0.0] * n for name in SCORES}
    fixed = {"editor": ["x"] * n, "protocol": [PROTOCOL] * n, "reason": [""] * n}
    fixed |= {"measured_after": [1] * n, "KL": [0.5] * n}
    return pd.DataFrame({**rest, **fixed, **columns})


def test_a_table_in_closed_form():
    nan = math.nan
    frame = frame_of(
        ES=[1.0, 1.0, 0.0, nan],
        PS=[0.5, 0.5, 0.5, nan],
        NS=[1.0, 0.9, 0.8, nan],
        retention=[nan, 1.0, 0.0, nan],
        reason=["", "", "", "EditError: no"],
    )
    (row,) = table(frame).to_dict("records")
    assert (row["ES"], row["PS"], row["NS"]) == pytest.approx((200 / 3, 50, 90))
    assert row["S"] == pytest.approx(3 / (3 / 200 + 1 / 50 + 1 / 90))
    assert row["NS_margin"] == pytest.approx(1.96 * 10 / math.sqrt(3))
    assert row["PS_margin"] == 0
    assert (row["retention"], row["n_retention"]) == (50, 2)
    assert (row["KL"], row["KL_margin"]) == (0.5, 0)
    assert (row["n"], row["failed"], row["protocol"]) == (3, 1, PROTOCOL)


def test_a_table_has_a_row_for_each_editor_and_refuses_to_mix_protocols():
    frame = frame_of(ES=[1.0, 0.0, 1.0], editor=["b", "a", "b"])
    assert list(table(frame)["editor"]) == ["b", "a"]
    mixed = frame.assign(protocol=[PROTOCOL, PROTOCOL, "first-token/teacher-forced/independent/1"])
    with pytest.raises(PlanError, match=r"not of first-token/.* and mean-token-nll"):
        table(mixed)
    with pytest.raises(PlanError, match="of none"):
        table(frame.iloc[:0])
    lengths = [
        "entropy-tfidf/top-5-of-100/independent/1",
        "entropy-tfidf/top-5-of-50/independent/1",
    ]
    texts = frame.assign(text_protocol=[*lengths, lengths[0]], **dict.fromkeys(TEXT_SCORES, 1.0))
    with pytest.raises(PlanError, match="top-5-of-100/independent/1 and entropy-tfidf"):
        table(texts)
    assert list(table(texts.assign(text_protocol=lengths[0]))["GE"]) == [100, 100]
