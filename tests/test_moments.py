"""The second moment: sums that add, files that are refused when they are wrong, and solving with it."""

from __future__ import annotations

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import ORACLE
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from factlens.errors import FactWarning, MomentError, OutputError, SingularMoment
from factlens.moment_files import (
    load_moment,
    packed,
    read_moment,
    read_official,
    save_moment,
    unpacked,
)
from factlens.moments import (
    KeyMoment,
    condition_number,
    factor,
    numerical_rank,
    silent_neurons,
    solve,
)

sizes, seeds = st.integers(1, 9), st.integers(0, 1000)


def keys_of(count: int, d_mlp: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        count, d_mlp, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def moment_of(keys: torch.Tensor, **about) -> KeyMoment:
    return KeyMoment(keys.T @ keys, len(keys), about)


@given(sizes, sizes, sizes, seeds)
def test_shards_add_to_the_moment_of_all_tokens(d_mlp, one, other, seed):
    keys = keys_of(one + other, d_mlp, seed)
    both = moment_of(keys[:one]) + moment_of(keys[one:])
    torch.testing.assert_close(both.mean(), (keys[:, :, None] * keys[:, None]).mean(0))
    assert both.count == one + other
    if one > 1:  # The mean of means is another matrix.
        halves = (moment_of(keys[:one]).mean() + moment_of(keys[one:]).mean()) / 2
        assert one == other or not torch.allclose(halves, both.mean(), rtol=1e-9)


def test_what_does_not_belong_together_does_not_add():
    keys = keys_of(8, 4)
    known = {"fingerprint": "f", "layer": 3, "context": 64, "corpus": "a", "digest": None}
    with pytest.raises(MomentError, match="4 and of 3 neurons"):
        moment_of(keys) + moment_of(keys[:, :3])
    for name, other in (("layer", 4), ("fingerprint", "g"), ("context", 32)):
        with pytest.raises(MomentError, match=f"of {name}"):
            moment_of(keys, **known) + moment_of(keys, **{**known, name: other})
    for one, other in (([], []), ([[1, 2]], [[1, 2]]), ([[1, 2]], []), ([[1, 2]], [[2, 3]])):
        with pytest.raises(MomentError, match="only different shards of one division add"):
            moment_of(keys, **known, shards=one) + moment_of(keys, **known, shards=other)
    sum_ = moment_of(keys, **known, shards=[[2, 2]], documents=3) + moment_of(
        keys, **known, shards=[[1, 2]], documents=4
    )
    assert (sum_.about["shards"], sum_.about["documents"]) == ([[1, 2], [2, 2]], 7)
    assert (moment_of(keys, **known) + moment_of(keys, **{**known, "corpus": "b"})).about[
        "corpus"
    ] == "a + b"


@given(sizes, seeds)
def test_solving_inverts_c(d_mlp, seed):
    moment = moment_of(keys_of(4 * d_mlp + 4, d_mlp, seed))
    factored, key = factor(moment), keys_of(1, d_mlp, seed + 1)[0]
    assert factored.ridge == 0.0
    torch.testing.assert_close(moment.mean() @ solve(factored, key), key)
    several = keys_of(6, d_mlp, seed).reshape(2, 3, d_mlp)
    torch.testing.assert_close(solve(factored, several)[1, 2], solve(factored, several[1, 2]))


def test_the_official_inverse_is_reproduced():
    stored = np.load(ORACLE / "rome.npz", allow_pickle=False)
    moment, inverse = torch.from_numpy(stored["C"]), torch.from_numpy(stored["C_inv"]).double()
    factored = factor(moment)
    assert factored.ridge == 0.0
    for name in ("e0.k_mean", "e0.k_raw"):
        key = torch.from_numpy(stored[name])
        theirs = inverse @ key.double()
        assert (solve(factored, key) - theirs).norm() < 1e-4 * theirs.norm()
        assert (key - theirs).norm() > 0.1 * theirs.norm()  # Control: C does something.
    u = solve(factored, torch.from_numpy(stored["e0.k_mean"]))
    torch.testing.assert_close(
        u / u.norm(), torch.from_numpy(stored["e0.u"]).double(), rtol=1e-4, atol=1e-6
    )


def test_a_neuron_that_never_fires_gets_a_ridge_that_is_said():
    keys = keys_of(50, 6)
    keys[:, [1, 4]] = 0
    with pytest.warns(
        FactWarning, match=r"2 of 6 neurons never fired\); 1e-08 of its mean diagonal"
    ):
        factored = factor(moment_of(keys))
    assert factored.ridge == 1e-8
    mean = moment_of(keys).mean()
    raised = mean + 1e-8 * mean.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(factored.lower @ factored.lower.T, raised)
    assert (silent_neurons(mean), numerical_rank(mean, factored)) == (2, 4)


def test_fewer_tokens_than_neurons_get_a_ridge_that_is_said():
    moment = moment_of(keys_of(5, 12))
    with pytest.warns(FactWarning, match="5 tokens for 12 neurons, gather more"):
        factored = factor(moment)
    assert numerical_rank(moment.mean(), factored) == 5
    with pytest.warns(FactWarning, match="linearly dependent"):
        factor(moment.mean())
    with warnings.catch_warnings():  # Control: enough of them get none, and no warning.
        warnings.simplefilter("error")
        assert factor(moment_of(keys_of(50, 12))).ridge == 0.0


def test_rounding_noise_does_not_pass_for_a_positive_pivot():
    keys = keys_of(4000, 3)
    twins = torch.cat([keys, keys[:, :1] * (1 + 1e-16)], dim=1)
    with pytest.warns(FactWarning, match="linearly dependent"):
        assert factor(moment_of(twins)).ridge > 0


def test_what_is_no_moment_is_refused():
    with pytest.raises(SingularMoment, match="none of the 3 neurons ever fired"):
        factor(torch.zeros(3, 3))
    with pytest.raises(SingularMoment, match="no second moment"):
        factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(MomentError, match="not finite"):
        factor(torch.full((3, 3), torch.nan))
    with pytest.raises(MomentError, match="0 tokens"):
        KeyMoment(torch.eye(2), 0).mean()


def test_the_condition_number_is_about_right():
    scales = torch.logspace(0, 3, 20, dtype=torch.float64)
    moment = moment_of(keys_of(400, 20) * scales)
    found = condition_number(moment.mean(), factor(moment))
    assert found == pytest.approx(float(torch.linalg.cond(moment.mean())), rel=0.1)


# -- files -----------------------------------------------------------------------------------------


@given(sizes, seeds)
def test_the_upper_triangle_is_the_matrix(d_mlp, seed):
    matrix = moment_of(keys_of(9, d_mlp, seed)).total
    assert torch.equal(unpacked(packed(matrix), d_mlp), matrix.triu() + matrix.triu(1).T)


def test_a_moment_comes_back_from_its_file_to_the_bit(tmp_path):
    keys = keys_of(9, 5)
    total = (keys.T @ keys).triu()
    moment = KeyMoment(total + total.triu(1).T, 9, {"layer": 2, "corpus": "ö", "shards": [[1, 2]]})
    back = read_moment(save_moment(moment, tmp_path / "m.safetensors"))
    assert torch.equal(back.total, moment.total)
    assert (back.count, dict(back.about)) == (9, dict(moment.about))
    with pytest.raises(OutputError, match=r"cannot write .*No such file"):
        save_moment(moment, tmp_path / "none" / "m.safetensors")


def stored(path, upper, **about):
    given = {"tokens": 3, "d_mlp": 2, **about}
    save_file({"upper": upper}, path, {"format": "factlens-moment/1", "about": json.dumps(given)})


@pytest.mark.parametrize(
    ("upper", "about", "words"),
    [
        ([1.0, torch.nan, 1.0], {}, "not finite"),
        ([1.0, 0.0, -1.0], {}, "negative diagonal"),
        ([1.0, 0.0], {}, "no moment of 2 neurons"),
        ([1.0, 0.0, 1.0], {"tokens": 0}, "counts 0 tokens"),
        ([1.0, 0.0, 1.0], {"tokens": -5}, "counts -5 tokens"),
        ([1.0, 0.0, 1.0], {"tokens": None}, "does not say"),
        ([1.0, 0.0, 1.0], {"d_mlp": 3}, "no moment of 3 neurons"),
    ],
)
def test_numbers_that_no_moment_has_are_refused_in_one_line(tmp_path, upper, about, words):
    path = tmp_path / "m.safetensors"
    stored(path, torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64))
    assert load_moment(path).total.tolist() == [[2.0, 1.0], [1.0, 2.0]]  # Control.
    stored(path, torch.tensor(upper, dtype=torch.float64), **about)
    with pytest.raises(MomentError, match=words) as error:
        load_moment(path)
    assert "\n" not in str(error.value)


def test_files_that_are_something_else_are_refused_in_one_line(tmp_path):
    path = save_moment(moment_of(keys_of(50, 30)), tmp_path / "m.safetensors")
    whole = path.read_bytes()
    contents = {
        "cut": whole[: len(whole) // 2],
        "header": whole[:20],
        "empty": b"",
        "pickle": pickle.dumps({"upper": [1, 2, 3]}),
        "text": b"{}" * 40,
    }
    for name, content in contents.items():
        for suffix in (".safetensors", ".npz"):
            wrong = tmp_path / f"{name}{suffix}"
            wrong.write_bytes(content)
            with pytest.raises(MomentError, match=name) as error:
                read_moment(wrong)
            assert "\n" not in str(error.value)
    save_file({"upper": torch.ones(3)}, path, {"format": "factlens-edit/1"})
    with pytest.raises(MomentError, match="factlens-edit/1"):
        load_moment(path)
    for suffix in (".safetensors", ".npz"):
        with pytest.raises(MomentError, match="no statistics at"):
            read_moment(tmp_path / f"none{suffix}")


def test_official_statistics_are_read(tmp_path):
    keys, path = keys_of(40, 6), tmp_path / "c_proj_float32_mom2_100000.npz"
    total = (keys.T @ keys).float().numpy()
    np.savez(
        path,
        **{
            "mom2.mom2": total,
            "mom2.count": 40,
            "mom2.constructor": "util.runningstats.SecondMoment()",
            "sample_size": np.array(None, dtype=object),  # Pickled there, and not touched here.
        },
    )
    moment = read_moment(path)
    assert moment.count == 40
    torch.testing.assert_close(moment.mean().float(), (keys.T @ keys / 40).float())
    assert "c_proj_float32_mom2_100000" in moment.about["corpus"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mom2.mom2": None}, "has no mom2.mom2"),
        ({"mom2.count": None}, "has no mom2.count"),
        ({"mom2.count": 0}, "counts 0 tokens"),
        ({"mom2.count": [1, 2]}, "no official statistics"),
        ({"mom2.count": "many"}, "no official statistics"),
        ({"mom2.mom2": np.ones((2, 3))}, r"shape \(2, 3\)"),
        ({"mom2.mom2": np.ones(4)}, "shape"),
        ({"mom2.mom2": np.zeros((0, 0))}, "shape"),
        ({"mom2.mom2": np.array([[1, 2.0], [0, 1]])}, "not symmetric"),
        ({"mom2.mom2": np.full((2, 2), np.nan)}, "not finite"),
        ({"mom2.mom2": np.array([[None]])}, "no official statistics"),
    ],
)
def test_wrong_official_statistics_are_refused(tmp_path, changed, words):
    content = {"mom2.mom2": np.eye(2, dtype=np.float32), "mom2.count": 3}
    np.savez(tmp_path / "right.npz", **content)
    assert read_official(tmp_path / "right.npz").count == 3  # Control.
    content = {key: value for key, value in {**content, **changed}.items() if value is not None}
    np.savez(tmp_path / "wrong.npz", **content)
    with pytest.raises(MomentError, match=words):
        read_official(tmp_path / "wrong.npz")
