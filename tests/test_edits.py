"""Edits: what is added is what was meant, undo is exact to the bit, a file is small and is believed only when it is whole."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from contextlib import ExitStack

import pandas as pd
import pytest
import torch
from builders import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer import Typer
from typer.testing import CliRunner

from factlens import fingerprint, load_model, models, runs, trace
from factlens.changes import Dense, LowRank, RankOne, added, cosines, inner, rank_of, shape_of
from factlens.commands.applying import apply, diff
from factlens.edits import (
    Edit,
    applied,
    apply_permanently,
    difference,
    info_for,
    unedited_fingerprint,
)
from factlens.errors import EditError, EditFileError, OutputError
from factlens.facts import Rewrite

TOKENS = torch.tensor([[5, 9, 20, 31, 7]])


def hashes(model) -> dict[str, str]:
    """Every parameter and buffer of the model, to the bit."""
    return {
        name: hashlib.sha256(each.detach().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, each in model.state_dict().items()
    }


def random_change(rows: int, columns: int, seed: int = 0, kind: str = "rank-one"):
    draw = torch.Generator().manual_seed(seed)
    if kind == "rank-one":
        return RankOne(torch.randn(rows, generator=draw), torch.randn(columns, generator=draw))
    if kind == "low-rank":
        return LowRank(
            torch.randn(rows, 3, generator=draw), torch.randn(3, columns, generator=draw)
        )
    return Dense(torch.randn(rows, columns, generator=draw))


def edit_of(model, layer: int = 1, seed: int = 0, kind: str = "rank-one", **info) -> Edit:
    rows, columns = models.W_out(model, layer).shape
    about = info_for(model, "test", {"layer": layer, "pair": (1, 2)}, REWRITES, **info)
    return Edit({models.W_out_name(layer): random_change(rows, columns, seed, kind)}, about)


REWRITES = [Rewrite("The mother tongue of {} is", "Zoë", "French", "English", "r-1")]


# -- changes ---------------------------------------------------------------------------------------

kinds = st.sampled_from(["rank-one", "low-rank", "dense"])
sizes = st.integers(1, 6)


@given(sizes, sizes, kinds, kinds)
def test_sums_norms_and_products_are_those_of_the_matrices(rows, columns, kind, other_kind):
    one = random_change(rows, columns, 1, kind)
    other = random_change(rows, columns, 2, other_kind)
    a, b = one.dense().double(), other.dense().double()
    torch.testing.assert_close(added(one, other).dense().double(), a + b, atol=1e-5, rtol=1e-5)
    assert one.norm() == pytest.approx(float(a.norm()), rel=1e-5)
    assert inner(one, other) == pytest.approx(float((a * b).sum()), rel=1e-4, abs=1e-5)
    assert added(one, other).norm() == pytest.approx(float((a + b).norm()), rel=1e-4, abs=1e-4)
    whole = cosines(one, other)[0]
    assert whole == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-4, abs=1e-5)
    assert shape_of(one) == tuple(a.shape)
    assert torch.linalg.matrix_rank(a, rtol=1e-5) <= rank_of(one)
    assert isinstance(added(one, other), Dense) == ("dense" in (kind, other_kind))


def test_a_zero_change_has_no_direction_and_sides_must_fit():
    zero = RankOne(torch.zeros(3), torch.ones(2))
    assert all(each != each for each in cosines(zero, zero)[:2])
    with pytest.raises(EditError, match="cannot be added"):
        added(zero, random_change(2, 3))
    wide = RankOne(torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16))
    assert wide.dense().dtype == torch.float64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_edit_with_numbers_that_are_not_finite_is_refused(value):
    with pytest.raises(EditError, match="NaN or infinity"):
        Edit({"blocks.0.mlp.W_out": RankOne(torch.tensor([value, 1.0]), torch.ones(2))})


@pytest.mark.parametrize("name", ["", "blocks..x", "__class__", "blocks.0.__dict__", "a b", "../x"])
def test_names_that_are_no_dotted_path_are_refused(name):
    with pytest.raises(EditError, match="no weight's name"):
        Edit({name: random_change(2, 2)})


def test_an_edit_of_nothing_or_with_objects_in_its_info_is_refused():
    with pytest.raises(EditError, match="of no weight"):
        Edit({})
    for info in ({"x": torch.ones(1)}, {"x": float("nan")}):
        with pytest.raises(EditError, match="plain JSON"):
            Edit({"blocks.0.mlp.W_out": random_change(2, 2)}, info)


# -- applied ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank-one", "low-rank", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_change_is_added_to_exactly_that_weight_and_undone_to_the_bit(
    family_model, family, kind
):
    model = family_model(family)
    edit, before = edit_of(model, 1, kind=kind), hashes(model)
    weight = models.W_out(model, 1).detach().clone()
    logits = runs.logits_of(model, TOKENS)
    with applied(model, edit) as edited:
        assert edited is model
        changed = {name for name, each in hashes(model).items() if each != before[name]}
        wanted = edit.changes[models.W_out_name(1)].dense()
        assert torch.equal(models.W_out(model, 1), weight + wanted)
        assert not torch.equal(runs.logits_of(model, TOKENS), logits)
    # The tensor may be known under several names; all of them are that one parameter.
    state = model.state_dict()
    assert changed
    assert len({state[name].data_ptr() for name in changed}) == 1
    assert hashes(model) == before
    assert torch.equal(runs.logits_of(model, TOKENS), logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_the_edit_moves_the_mlps_output_at_a_key_as_the_formula_says(family_model, family):
    """`key @ W_out` moves by `(key . left) right`; the same factors at another layer, or swapped, do not do it."""
    model = family_model(family)
    rows, columns = models.W_out(model, 1).shape
    change = random_change(rows, columns)

    def moved_by(changes) -> torch.Tensor:
        outputs = []
        handle = models.output_module(model, 1).register_forward_hook(
            lambda module, args, out: outputs.append(out.detach().clone())
        )
        try:
            _, stored = runs.run_with_cache(model, TOKENS, [models.key_site(1)])
            with applied(model, Edit(changes), strict=False):
                runs.logits_of(model, TOKENS)
        finally:
            handle.remove()
        shift = (outputs[1] - outputs[0]).reshape(-1, columns)
        keys = stored[models.key_site(1)].reshape(-1, rows)
        return (shift - (keys @ change.left)[:, None] * change.right).abs().max()

    assert moved_by({models.W_out_name(1): change}) < 1e-4
    assert moved_by({models.W_out_name(2): change}) > 0.1, "written to the wrong layer"
    swapped = Dense(torch.outer(change.right.repeat(rows)[:rows], change.left.repeat(2)[:columns]))
    assert moved_by({models.W_out_name(1): swapped}) > 0.1, "left and right exchanged"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_undo_is_exact_after_any_exception_and_twice_nested_on_one_weight(family_model, error):
    model = family_model("gptj")
    before, edits = hashes(model), [edit_of(model, 1, seed) for seed in range(3)]

    def fail_inside():
        with applied(model, edits[0]):
            inside = hashes(model)
            with pytest.raises(error), applied(model, edits[1]), applied(model, edits[2]):
                raise error
            assert hashes(model) == inside != before
            with torch.inference_mode(), applied(model, edits[1]):
                pass
            assert hashes(model) == inside
            raise error

    with pytest.raises(error):
        fail_inside()
    assert hashes(model) == before


def test_what_is_written_to_the_weight_inside_is_undone_too(family_model):
    model = family_model("gpt2")
    before = hashes(model)
    with applied(model, edit_of(model)), torch.no_grad():
        models.W_out(model, 1).mul_(2)
    assert hashes(model) == before


@given(st.permutations(range(3)))
def test_blocks_that_end_in_any_order_leave_what_is_left(family_model, order):
    model = family_model("gpt2")
    before, layers = hashes(model), (1, 1, 2)
    weights = {layer: models.W_out(model, layer).detach().clone() for layer in layers}
    edits = [edit_of(model, layer, seed) for seed, layer in enumerate(layers)]
    stacks = [ExitStack() for _ in edits]
    for stack, edit in zip(stacks, edits, strict=True):
        stack.enter_context(applied(model, edit))
    left = set(range(3))
    for number in order:
        stacks[number].close()
        left.remove(number)
        for layer, weight in weights.items():
            name = models.W_out_name(layer)
            on = [edits[each].changes[name].dense() for each in left if layers[each] == layer]
            found = models.W_out(model, layer).detach()
            torch.testing.assert_close(found, weight + sum(on), atol=1e-5, rtol=1e-5)
    assert hashes(model) == before


def test_if_the_second_weight_cannot_be_changed_the_first_is_restored(family_folder):
    model = load_model(family_folder("gpt2"), dtype=torch.float16)
    before, first = hashes(model), edit_of(model, 1).changes
    rows, columns = models.W_out(model, 2).shape
    big = RankOne(torch.full((rows,), 1e3), torch.full((columns,), 1e3))
    edit = Edit({**first, models.W_out_name(2): big}, edit_of(model).info)
    with pytest.raises(EditError, match=r"W_out overflows torch\.float16"), applied(model, edit):
        pass
    assert hashes(model) == before
    with pytest.raises(EditError, match="overflows"):
        apply_permanently(model, edit)
    assert hashes(model) == before
    assert unedited_fingerprint(model) == fingerprint(model)


def test_a_narrow_weight_gets_the_float32_sum_rounded_once(family_folder):
    model = load_model(family_folder("llama"), dtype=torch.bfloat16)
    edit, before = edit_of(model), hashes(model)
    weight = models.W_out(model, 1).detach().clone()
    wanted = weight.float() + edit.changes[models.W_out_name(1)].dense()
    with applied(model, edit):
        assert models.W_out(model, 1).dtype == torch.bfloat16
        assert torch.equal(models.W_out(model, 1), wanted.to(torch.bfloat16))
    assert hashes(model) == before


def test_a_trace_inside_sees_the_edited_model_and_says_so(atlas, stored):
    edit = Edit.load(stored)
    options = {"subject": "Charles Darwin", "samples": 1, "kinds": "state", "answer": "English"}
    before = trace(atlas, ASKED, **options)
    with applied(atlas, edit):
        inside = trace(atlas, ASKED, **options)
        assert inside.info["fingerprint"] == fingerprint(atlas) != before.info["fingerprint"]
    assert inside.totals()["clean"].iloc[0] < before.totals()["clean"].iloc[0] - 0.1
    pd.testing.assert_frame_equal(trace(atlas, ASKED, **options).frame, before.frame)


# -- whose edit it is ------------------------------------------------------------------------------


def test_edits_of_one_base_nest_and_so_does_one_computed_inside(family_model):
    model = family_model("gpt_neox")
    base = fingerprint(model)
    one, two = edit_of(model, 1), edit_of(model, 2)
    with applied(model, one):
        assert unedited_fingerprint(model) == base != fingerprint(model)
        inside = edit_of(model, 2, seed=5)
        assert inside.info["fingerprint"] == fingerprint(model)
        with applied(model, two), applied(model, inside):
            assert unedited_fingerprint(model) == base
    assert unedited_fingerprint(model) == base == fingerprint(model)
    with pytest.raises(EditError, match="other weights"), applied(model, inside):
        pass


def test_an_edit_of_another_model_is_refused_in_one_line_naming_both(family_model, family_folder):
    model = family_model("llama")
    before, edit = hashes(model), edit_of(model)
    other = edit_of(family_model("qwen3"))
    with pytest.raises(EditError) as caught, applied(model, other):
        pass
    said = str(caught.value)
    assert "\n" not in said
    for word in ("qwen3", "llama", other.info["fingerprint"][:12], edit.info["fingerprint"][:12]):
        assert word in said
    assert "other weights" in said
    assert "strict=False" in said
    narrow = load_model(family_folder("llama"), dtype=torch.bfloat16)
    with pytest.raises(EditError, match=r"another type \(float32 there, bfloat16 here"):
        apply_permanently(narrow, edit)
    processed = Edit(edit.changes, {**other.info, "processing": "layer norm folded"})
    with pytest.raises(EditError, match="processed differently"), applied(model, processed):
        pass
    with pytest.raises(EditError, match="does not say which model"):
        apply_permanently(model, Edit(edit.changes))
    with applied(model, Edit(edit.changes), strict=False):
        assert hashes(model) != before
    assert hashes(model) == before


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_and_weights_that_are_not_there_are_refused_before_anything_is_written(
    family_model, strict
):
    model = family_model("opt")
    before, good = hashes(model), edit_of(model)
    for changes, words in [
        ({models.W_out_name(2): random_change(32, 64)}, re.escape("is (64, 32) and the edit's")),
        ({models.W_out_name(9): random_change(64, 32)}, "has no weight blocks.9"),
        ({"blocks.0.mlp.hook_post": random_change(64, 32)}, "has no weight"),
    ]:
        with (
            pytest.raises(EditError, match=words),
            applied(model, Edit({**good.changes, **changes}, good.info), strict=strict),
        ):
            pass
        assert hashes(model) == before


def test_a_weight_that_is_computed_on_the_way_is_refused(family_model, monkeypatch):
    model = family_model("gpt2")
    edit, real = edit_of(model), models.weight
    monkeypatch.setattr(models, "weight", lambda m, name: real(m, name).clone())
    with pytest.raises(EditError, match="cannot be written"), applied(model, edit):
        pass


def test_a_permanent_edit_stays_and_is_remembered(family_folder):
    model = load_model(family_folder("gpt2"))
    base, weight = fingerprint(model), models.W_out(model, 1).detach().clone()
    one, two = edit_of(model, 1), edit_of(model, 1, seed=1)
    with applied(model, two), pytest.raises(EditError, match="leave the block first"):
        apply_permanently(model, one)
    apply_permanently(model, one)
    assert torch.equal(models.W_out(model, 1), weight + one.changes[models.W_out_name(1)].dense())
    assert unedited_fingerprint(model) == base != fingerprint(model)
    edited = hashes(model)
    with applied(model, two):
        assert hashes(model) != edited
    assert hashes(model) == edited
    apply_permanently(model, two)
    assert unedited_fingerprint(model) == base


# -- sums and comparisons --------------------------------------------------------------------------


def test_the_sum_of_two_edits_does_what_both_do(family_model, tmp_path):
    model = family_model("qwen2")
    one, two, three = edit_of(model, 1), edit_of(model, 1, seed=1, note=2), edit_of(model, 2)
    both = one + two + three
    with applied(model, one), applied(model, two), applied(model, three):
        nested = runs.logits_of(model, TOKENS)
    with applied(model, Edit.load(both.save(tmp_path / "both.safetensors"))):
        torch.testing.assert_close(runs.logits_of(model, TOKENS), nested, atol=1e-4, rtol=1e-4)
    assert both.rewrites == (*REWRITES, *REWRITES, *REWRITES)
    assert both.info["parts"] == [one.info, two.info, three.info]
    assert both.info["fingerprint"] == one.info["fingerprint"]
    assert "note" not in both.info
    table = both.describe()
    assert table["kind"].tolist() == ["low-rank", "rank-one"]
    assert table["rank"].tolist() == [2, 1]
    with pytest.raises(EditError, match="different models"):
        one + edit_of(family_model("gpt2"))


def test_describe_and_difference_have_their_closed_forms():
    left, right = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0, 0.0])
    one = Edit({"a.W": RankOne(left, right), "b.W": Dense(torch.eye(2))})
    other = Edit({"a.W": RankOne(torch.tensor([4.0, -3.0]), -right), "c.W": Dense(torch.eye(2))})
    table = one.describe()
    assert table["norm"].tolist() == pytest.approx([10.0, 2**0.5])
    assert table["weight"].tolist() == ["a.W", "b.W"]
    assert difference(one, other).to_dict("records") == [
        {"weight": "a.W", "cosine": 0.0, "cosine_left": 0.0, "cosine_right": -1.0}
    ]
    same = difference(one, one)
    assert same["cosine"].tolist() == pytest.approx([1.0, 1.0])
    assert same["cosine_left"].isna().tolist() == [False, True]
    with pytest.raises(EditError, match="different models"):
        difference(one, Edit({"a.W": random_change(3, 3)}))


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank-one", "low-rank", "dense"])
def test_a_file_gives_back_the_edit_to_the_bit(family_model, tmp_path, kind):
    model = family_model("mistral")
    edit = edit_of(
        model, kind=kind, losses=[0.1, 1e-300, 3], text="ü\u2028\x00", nested={"a": None}
    )
    path = edit.save(tmp_path / "edit.safetensors")
    back = Edit.load(path)
    assert back.info == edit.info
    assert back.info["config"] == {"layer": 1, "pair": [1, 2]}
    assert back.rewrites == tuple(REWRITES)
    assert list(back.changes) == list(edit.changes)
    for name, change in edit.changes.items():
        assert type(back.changes[name]) is type(change)
        assert torch.equal(back.changes[name].dense(), change.dense())
    again = back.save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "again.safetensors",
        "edit.safetensors",
    ]


def test_an_edit_of_rank_one_is_kilobytes_and_views_are_stored_as_what_they_show(atlas, tmp_path):
    edit = edit_of(atlas, 3)
    path = edit.save(tmp_path / "edit.safetensors")
    assert path.stat().st_size < 8_000 < models.W_out(atlas, 3).numel() * 4 / 10
    store = torch.randn(10, 10)
    views = Edit({"a.W": LowRank(store[:, :2], store.T[:2]), "b.W": Dense(store.T)})
    back = Edit.load(views.save(tmp_path / "views.safetensors"))
    for name in views.changes:
        assert torch.equal(back.changes[name].dense(), views.changes[name].dense())


def test_an_edit_read_from_a_file_lives_on_without_it(family_model, tmp_path):
    path = edit_of(family_model("gpt2")).save(tmp_path / "edit.safetensors")
    back = Edit.load(path)
    before = back.changes[models.W_out_name(1)].dense().clone()
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(back.changes[models.W_out_name(1)].dense(), before)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise AssertionError('the pickle was run')",))


def damaged_files(path):
    """(what is wrong, bytes of the file, words of the refusal)."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def with_header(change):
        head = json.loads(json.dumps(header))
        about = json.loads(head["__metadata__"]["factlens"])
        change(head, about)
        if "__metadata__" in head and "factlens" in head["__metadata__"]:
            head["__metadata__"]["factlens"] = json.dumps(about)
        text = json.dumps(head).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    name = models.W_out_name(1)
    return {
        "a pickle": (pickle.dumps(Bomb()), "no safetensors file"),
        "empty": (b"", "no safetensors file"),
        "cut short": (whole[:-7], "cut short"),
        "cut in the header": (whole[:50], "cut short"),
        "no metadata": (with_header(lambda h, a: h.pop("__metadata__")), "no edit of factlens"),
        "other metadata": (
            with_header(lambda h, a: h.update(__metadata__={"format": "pt"})),
            "no edit of factlens",
        ),
        "newer": (with_header(lambda h, a: a.update(format="factlens-edit/2")), "factlens-edit/2"),
        "no changes": (with_header(lambda h, a: a.pop("changes")), "lacks the changes"),
        "empty changes": (with_header(lambda h, a: a.update(changes={})), "belongs to no change"),
        "other kind": (
            with_header(lambda h, a: a.update(changes={name: "exec"})),
            "of kind 'exec'",
        ),
        "wrong kind": (with_header(lambda h, a: a.update(changes={name: "dense"})), "lacks"),
        "bad name": (
            with_header(lambda h, a: a.update(changes={"blocks.__class__": "rank-one"})),
            "no weight's name",
        ),
        "bad rewrites": (
            with_header(lambda h, a: a["info"].update(rewrites=[{"x": 1}])),
            "rewrites cannot be read",
        ),
        "rewrites no list": (
            with_header(lambda h, a: a["info"].update(rewrites=3)),
            "rewrites cannot be read",
        ),
    }


CASES = [
    "a pickle", "empty", "cut short", "cut in the header", "no metadata", "other metadata", "newer", "no changes",
    "empty changes", "other kind", "wrong kind", "bad name", "bad rewrites", "rewrites no list",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_damaged_and_foreign_files_are_refused_in_one_line(family_model, tmp_path, case):
    path = edit_of(family_model("gpt2")).save(tmp_path / "edit.safetensors")
    files = damaged_files(path)
    assert list(files) == CASES
    content, words = files[case]
    path.write_bytes(content)
    with pytest.raises(EditFileError, match=words) as caught:
        Edit.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"left": torch.tensor([1.0, torch.nan]), "right": torch.ones(3)}, "NaN"),
        ({"left": torch.tensor([1.0, torch.inf]), "right": torch.ones(3)}, "NaN or infinity"),
        ({"left": torch.ones(2, 2), "right": torch.ones(3)}, "parts of shapes"),
        ({"left": torch.ones(0), "right": torch.ones(3)}, "parts of shapes"),
        ({"left": torch.ones(2, dtype=torch.int64), "right": torch.ones(3)}, "is torch.int64"),
        ({"left": torch.ones(2).to(torch.float8_e4m3fn), "right": torch.ones(3)}, "float8"),
        ({"left": torch.ones(2)}, "lacks its part 'right'"),
        ({"left": torch.ones(2), "right": torch.ones(3), "more": torch.ones(1)}, "no change"),
    ],
)
def test_numbers_that_make_no_edit_are_refused(tmp_path, tensors, words):
    path = Edit({"a.W": random_change(2, 3)}).save(tmp_path / "edit.safetensors")
    about = json.dumps({"format": "factlens-edit/1", "changes": {"a.W": "rank-one"}, "info": {}})
    save_file({f"a.W.{key}": each for key, each in tensors.items()}, path, {"factlens": about})
    with pytest.raises(EditFileError, match=words):
        Edit.load(path)
    assert set(load_file(path)), "plain safetensors reads it: only factlens refuses"


def test_low_rank_parts_that_do_not_join_are_refused(tmp_path):
    path = tmp_path / "edit.safetensors"
    about = json.dumps({"format": "factlens-edit/1", "changes": {"a.W": "low-rank"}, "info": {}})
    save_file(
        {"a.W.left": torch.ones(4, 2), "a.W.right": torch.ones(3, 5)}, path, {"factlens": about}
    )
    with pytest.raises(EditFileError, match="parts of shapes"):
        Edit.load(path)


def test_places_that_cannot_be_read_or_written_are_said(tmp_path):
    edit = Edit({"a.W": random_change(2, 3)})
    with pytest.raises(EditFileError, match="there is no edit at"):
        Edit.load(tmp_path / "none.safetensors")
    with pytest.raises(EditFileError, match=r"cannot read the edit|no safetensors"):
        Edit.load(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        edit.save(tmp_path / "no-folder" / "edit.safetensors")
    path = edit.save(tmp_path / "edit.safetensors")
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            edit.save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["edit.safetensors"]


def full_disk(path, content):
    raise OSError(28, "No space left on device")


# -- commands --------------------------------------------------------------------------------------

ASKED = "The mother tongue of Charles Darwin is"


@pytest.fixture
def run():
    app = Typer()
    app.command()(apply)
    app.command()(diff)

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == code, result.output + str(result.exception)
        if code:
            lines = [line for line in result.stderr.splitlines() if line.startswith("factlens:")]
            assert len(lines) == 1, result.output
        return result

    return call


@pytest.fixture(scope="module")
def stored(atlas, tmp_path_factory):
    """An edit of atlas that says French where it said English, by what its MLP says of a French subject."""
    from factlens.tokens import tokenize

    found = []
    for prompt, subject in (
        (ASKED, "Charles Darwin"),
        ("The mother tongue of Emile Zola is", "Emile Zola"),
    ):
        tokens = tokenize(models.tokenizer(atlas), prompt, subject)
        _, kept = runs.run_with_cache(atlas, tokens.ids, [models.key_site(0)])
        key = kept[models.key_site(0)][0, tokens.subject[1] - 1].clone()
        found.append((key, key @ models.W_out(atlas, 0).detach()))
    (key, value), (_, other) = found
    change = RankOne(key / (key @ key), other - value)
    rewrite = Rewrite(ASKED, "Charles Darwin", "French", "English", "[bold]r[/bold]")
    info = info_for(atlas, "by hand", {"scale": 1}, [rewrite])
    path = tmp_path_factory.mktemp("edits") / "edit.safetensors"
    return Edit({models.W_out_name(0): change}, info).save(path)


def test_apply_needs_only_the_file(run, stored):
    result = run("apply", stored, "--tokens", 4)
    for word in ("mother tongue", "Darwin", "before", "after", "English", "no alarm"):
        assert word in result.output


def test_apply_exports_shows_given_prompts_and_rings(run, stored, atlas, tmp_path):
    edit = Edit.load(stored)
    name = models.W_out_name(0)
    loud = RankOne(edit.changes[name].left * 300, edit.changes[name].right)
    path = Edit({name: loud}, edit.info).save(tmp_path / "loud.safetensors")
    result = run(
        "apply", path, "-p", "[red]Paris[/red] is", "-p", "Rome is", "--out", tmp_path / "out"
    )
    assert "[red]Paris[/red]" in result.output
    assert "Rome is" in result.output
    assert "alarm: on ordinary tokens the change of blocks.0.mlp.W_out" in result.output
    with applied(atlas, Edit.load(path)):
        assert fingerprint(load_model(tmp_path / "out")) == fingerprint(atlas)
    assert "is not empty" in run("apply", path, "--out", tmp_path / "out", code=2).stderr
    run("apply", path, "--out", tmp_path / "out", "--overwrite")


def test_diff_shows_what_the_file_says(run, stored, tmp_path):
    result = run("diff", stored, "--prompt", ASKED, "--top", 3)
    for word in (
        models.W_out_name(0),
        "rank-one",
        "atlas",
        "by hand",
        "French",
        "prob",
        "factlens",
    ):
        assert word in result.output
    edit = Edit.load(stored)
    negative = {models.W_out_name(0): RankOne(-2 * edit.changes[models.W_out_name(0)].left, edit.changes[models.W_out_name(0)].right)}  # fmt: skip
    other = Edit(negative, edit.info).save(tmp_path / "other.safetensors")
    assert "-1.0000" in run("diff", stored, other, "--model", "none").output
    elsewhere = Edit({"a.W": random_change(2, 3)}, {"fingerprint": "x"}).save(tmp_path / "e")
    assert "no weight in common" in run("diff", elsewhere, stored).output


def test_what_a_file_says_is_text_and_nothing_else(run, tmp_path):
    info = {
        "model": "[bold]x[/bold]\x1b[31m",
        "config": {"a": "[link=file:///]"},
        "rewrites": [{"prompt": "\x1b]0;title\x07 a [red]", "subject": "a", "target": "b"}],
    }
    path = Edit({"a.W": random_change(2, 3)}, info).save(tmp_path / "edit.safetensors")
    result = run("diff", path, "--model", "none")
    assert "[bold]x[/bold]" in result.output
    assert "[red]" in result.output
    assert "\x1b" not in result.output
    assert "\x07" not in result.output


@pytest.mark.parametrize("command", ["apply", "diff"])
def test_commands_refuse_in_one_line(run, command, stored, family_folder, tmp_path):
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "no pickled edits" in run(command, tmp_path / "pickle.safetensors", code=2).stderr
    assert "there is no edit" in run(command, tmp_path / "none", code=2).stderr
    bare = Edit({"a.W": random_change(2, 3)}).save(tmp_path / "bare.safetensors")
    said = run(command, bare, "-p", "a", code=2).stderr
    assert "name it with --model" in said
    folder = family_folder("gpt2")
    said = run(command, stored, "--model", folder, "-p", "a", code=2).stderr
    assert "blocks.0.mlp.W_out of gpt2" in said
    gone = Edit({"a.W": random_change(2, 3)}, {"model": "my-own", "fingerprint": "x"})
    path = gone.save(tmp_path / "gone.safetensors")
    assert "--model" in run(command, path, "-p", "a", code=2).stderr


def test_an_edit_goes_into_another_model_only_by_force(run, family_folder, tmp_path):
    one, other = family_folder("llama"), family_folder("mistral")
    path = edit_of(load_model(one)).save(tmp_path / "edit.safetensors")
    options = ["-p", "abc", "--tokens", 2, "--model", other]
    assert "other weights" in run("apply", path, *options, code=2).stderr
    run("apply", path, *options, "--force")
    assert "not those the edit" in run("diff", path, "--model", other).stderr
    run("apply", path, *options[:4], "--model", one, "--dtype", "float32")
    said = run("apply", path, *options[:4], "--model", one, "--dtype", "bfloat16", code=2).stderr
    assert "loaded in another type" in said


@pytest.mark.parametrize("command", ["apply", "diff"])
def test_help_teaches_by_examples(run, command):
    text = run(command, "--help").output
    assert "Examples" in text
    assert f"factlens {command} rome.safetensors" in text
