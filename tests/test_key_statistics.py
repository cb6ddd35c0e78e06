"""Key statistics: against a second implementation on plain Hugging Face hooks; interrupted, sharded, damaged, the same C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
import typer
from builders import save_model
from conftest import ORACLE
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from factlens import key_gathering, key_passes, load_model, models
from factlens.commands.statistics import stats
from factlens.corpora import Corpus, bundled, text_files
from factlens.errors import FactWarning, MomentError, OutOfMemory
from factlens.key_passes import batches, padded
from factlens.key_statistics import (
    default_corpus,
    file_of,
    gather,
    import_moment,
    moment_for,
    shelf_of,
)
from factlens.moment_files import load_moment, read_tensors
from factlens.moments import KeyMoment, factor, solve
from factlens.statistics_costs import estimate, measure_throughput

TEXTS = [
    "To be, or not to be.",
    "x",
    "",
    "All the world's a stage " * 5,
    "and all the men",
    "a b c",
]
OUTPUTS = {
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
    "llama": "model.layers.{}.mlp.down_proj",
    "gemma2": "model.layers.{}.mlp.down_proj",
}


def few(texts=TEXTS, name="few"):
    return Corpus(name, lambda start: iter(texts[start:]))


def slow_moment(folder, output: str, layer: int, texts, context: int) -> torch.Tensor:
    """From the definition: every document alone, every token's outer product, the input of the MLP's output matrix."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    keys = []
    handle = model.get_submodule(output.format(layer)).register_forward_pre_hook(
        lambda module, args: keys.append(args[0].detach().reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text)["input_ids"][:context]
            if ids:
                model(torch.tensor([ids], dtype=torch.long))
    handle.remove()
    return torch.stack([torch.outer(key, key) for key in torch.cat(keys).double()]).mean(0)


def close(one, other, tolerance=1e-6):
    """Within `tolerance` of the largest entry."""
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.filterwarnings("ignore:few ends")
@pytest.mark.parametrize("family", OUTPUTS)
def test_c_is_what_plain_hooks_of_hugging_face_give(family, family_folder, family_model, tmp_path):
    model = family_model(family)
    hooks = [len(hook.fwd_hooks) for hook in model.hook_dict.values()]
    found = gather(model, [1, 3], few(), tokens=10**6, folder=tmp_path)
    for layer in (1, 3):
        slow = slow_moment(family_folder(family), OUTPUTS[family], layer, TEXTS, 64)
        assert close(found[layer].mean(), slow, 1e-5)
    assert not close(found[1].mean(), slow, 1e-2)  # Control: another layer has another C.
    lengths = [len(models.tokenizer(model)(text)["input_ids"][:64]) for text in TEXTS]
    assert found[3].count == sum(lengths)
    assert max(lengths) == 64  # One document is cut.
    assert [len(hook.fwd_hooks) for hook in model.hook_dict.values()] == hooks


def test_the_model_is_run_no_further_than_the_last_key(family_model, tmp_path):
    model, reached, handles = family_model("gpt2"), [], []
    names = [f"transformer.h.{layer}.mlp" for layer in range(4)]
    for name in [*names, "lm_head"]:
        module = model.original_model.get_submodule(name)
        module = getattr(module, "original_component", module)
        handle = module.register_forward_hook(lambda *_, name=name: reached.append(name))
        handles.append(handle)
    try:
        gather(model, [0, 2], few(), tokens=20, folder=tmp_path)
        assert reached
        assert set(reached) == set(names[:2])  # Block 2 stops at its key, before its output.
    finally:
        for handle in handles:
            handle.remove()


def test_batches_shards_and_layers_do_not_change_c(atlas, tmp_path):
    common = {"tokens": 3000, "folder": tmp_path / "a"}
    whole = gather(atlas, [2, 5], bundled(), **common)
    small = gather(atlas, [2, 5], bundled(), tokens=3000, folder=tmp_path / "b", batch=100)
    alone = gather(atlas, [5], bundled(), tokens=3000, folder=tmp_path / "c")
    parts = [gather(atlas, [5], bundled(), shard=(part, 3), **common)[5] for part in (3, 1, 2)]
    together = parts[0] + parts[1] + parts[2]
    for other in (small[5], alone[5], together):
        assert close(other.total, whole[5].total)
        assert (other.count, other.about["documents"]) == (
            whole[5].count,
            whole[5].about["documents"],
        )
    assert not close(parts[0].mean(), whole[5].mean())  # Control: a shard is not the whole.
    assert 3000 <= whole[5].count < 3200
    key = torch.randn(512, generator=torch.Generator().manual_seed(0))
    u, v = solve(factor(whole[5]), key), solve(factor(small[5]), key)
    assert (u - v).norm() < 1e-4 * u.norm()  # What float32 products would not give.
    with pytest.raises(MomentError, match="only different shards"):
        _ = parts[0] + parts[0]


class Killed(Exception):
    pass


def test_a_pass_that_was_stopped_goes_on_and_gives_the_same_c(atlas, tmp_path):
    options = {"tokens": 4000, "batch": 64, "save_every": 0.0}
    whole = gather(atlas, [1, 4], bundled(), folder=tmp_path / "a", **options)
    seen = []

    def stop(done, total):
        seen.append(done)
        if done > 2500:
            raise Killed

    with pytest.raises(Killed):
        gather(atlas, [1, 4], bundled(), folder=tmp_path / "b", progress=stop, **options)
    (partial,) = (tmp_path / "b").rglob("*.partial")
    before = len(seen)
    resumed = gather(
        atlas,
        [1, 4],
        bundled(),
        folder=tmp_path / "b",
        progress=lambda d, t: seen.append(d),
        **options,
    )
    assert seen[before] > 1000  # It did go on.
    assert not partial.exists()
    for layer in (1, 4):
        assert close(resumed[layer].total, whole[layer].total)
        assert resumed[layer].count == whole[layer].count
    assert len(list((tmp_path / "b").rglob("*.safetensors"))) == 2


def test_an_unfinished_pass_that_is_damaged_or_anothers_begins_again(atlas, tmp_path):
    options = {"tokens": 1500, "batch": 64, "save_every": 0.0}
    whole = gather(atlas, [3], bundled(), folder=tmp_path / "a", **options)

    def stopped(folder):
        def stop(done, total):
            if done > 1000:
                raise Killed

        with pytest.raises(Killed):
            gather(atlas, [3], bundled(), folder=folder, progress=stop, **options)
        (partial,) = folder.rglob("*.partial")
        return partial

    partial = stopped(tmp_path / "b")
    partial.write_bytes(partial.read_bytes()[:-100])
    with pytest.warns(FactWarning, match="cannot be gone on with"):
        again = gather(atlas, [3], bundled(), folder=tmp_path / "b", **options)
    assert torch.equal(again[3].total, whole[3].total)
    assert list((tmp_path / "b").rglob("*.damaged"))
    partial = stopped(tmp_path / "c")
    key_gathering.write_partial(
        partial,
        {3: torch.ones(512, 512, dtype=torch.float64)},
        key_gathering.Reached(9, 9, 9, 9),
        {"other": 1},
    )
    assert torch.equal(
        gather(atlas, [3], bundled(), folder=tmp_path / "c", **options)[3].total, whole[3].total
    )


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(atlas, tmp_path):
    code = (
        "import sys, torch; torch.set_num_threads(1); from factlens import load_model\n"
        "from factlens.corpora import bundled; from factlens.key_statistics import gather\n"
        f"gather(load_model(), [2], bundled(), tokens=60000, folder={str(tmp_path)!r}, batch=64, save_every=0.0)"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
    deadline = time.monotonic() + 60
    # Hidden ones are still being written.
    while not list(tmp_path.rglob("[!.]*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (partial,) = tmp_path.rglob("[!.]*.partial")
    total = {2: torch.zeros(512, 512, dtype=torch.float64)}
    about, _ = read_tensors(partial, "factlens-partial-moments/1")
    reached = key_gathering.read_partial(partial, total, about["belongs"])
    assert 0 < reached.tokens < 60000
    seen = []

    def stop(done, total):
        seen.append(done)
        raise Killed

    with pytest.raises(
        Killed
    ):  # The lock went with the process, and the pass begins where that one was.
        gather(atlas, [2], bundled(), tokens=60000, folder=tmp_path, batch=64, progress=stop)
    assert seen == [reached.read_tokens]
    exact = gather(
        atlas, [2], bundled(), tokens=reached.read_tokens, folder=tmp_path / "x", batch=64
    )
    assert close(total[2].triu(), exact[2].total.triu())


def test_what_is_stored_is_read_and_what_is_damaged_is_gathered_again(atlas, tmp_path, monkeypatch):
    options = {"tokens": 600, "folder": tmp_path}
    first = gather(atlas, [0, 3], bundled(), **options)
    path = file_of(atlas, 3, bundled(), **options)
    assert path.is_file()
    with monkeypatch.context() as patched:
        patched.setattr(key_gathering, "add_keys", None)  # Nothing may be run.
        again = gather(atlas, [0, 3], bundled(), **options)
    assert torch.equal(again[3].total, first[3].total)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.warns(FactWarning, match="set aside, and gathered again"):
        again = gather(atlas, [0, 3], bundled(), **options)
    assert torch.equal(again[3].total, first[3].total)
    assert load_moment(path).count == first[3].count


def test_a_folder_that_cannot_be_written_costs_a_warning(atlas, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(FactWarning, match="used but not kept"):
        found = gather(atlas, [1], bundled(), tokens=300, folder=tmp_path / "file" / "moments")
    assert close(
        found[1].total, gather(atlas, [1], bundled(), tokens=300, folder=tmp_path)[1].total
    )


def test_a_second_process_waits_and_says_so(atlas, tmp_path):
    shelf = shelf_of(atlas, tmp_path)
    with shelf.locked("x") as writable:
        assert writable
        with pytest.raises(Exception, match="lock"):
            FileLock(shelf.folder / "x.lock").acquire(timeout=0)
    code = f"import time; from filelock import FileLock\nwith FileLock({str(shelf.folder / 'x.lock')!r}): print(1, flush=True); time.sleep(1)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.read(1)
    with pytest.warns(FactWarning, match="another process gathers the same"), shelf.locked("x"):
        assert process.poll() is not None or process.wait(5) == 0
    process.stdout.close()


def test_the_bundled_models_moments_come_from_one_pass_and_then_from_the_cache(
    atlas, tmp_path, monkeypatch
):
    monkeypatch.setattr("factlens.key_statistics.BUNDLED_KEYS", 11)
    told = []
    moment = moment_for(
        atlas, 4, folder=tmp_path, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (11 * 512, 11 * 512)
    assert len(list(tmp_path.rglob("*.safetensors"))) == models.n_layers(atlas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert factor(moment).ridge == 0.0
    monkeypatch.setattr(key_gathering, "add_keys", None)
    assert torch.equal(moment_for(atlas, 4, folder=tmp_path).total, moment.total)
    more = KeyMoment(2 * moment.total, 10**6, {"corpus": "official x"})
    assert import_moment(atlas, 4, more, tmp_path).is_file()
    assert moment_for(atlas, 4, folder=tmp_path).count == 10**6  # The most tokens.
    assert moment_for(atlas, 4, folder=tmp_path, tokens=11 * 512).count == moment.count
    assert moment_for(atlas, 5, folder=tmp_path).count == moment.count


def test_a_few_tokens_tried_out_are_not_what_edits_get(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr("factlens.key_statistics.BUNDLED_KEYS", 11)
    gather(atlas, [4], bundled(), tokens=100, folder=tmp_path)
    assert moment_for(atlas, 4, folder=tmp_path).count >= 11 * 512


def test_a_model_of_the_users_own_needs_texts(family_model, tmp_path):
    model = family_model("gpt2")
    with pytest.raises(MomentError, match="--text FILE or --dataset NAME"):
        moment_for(model, 1, folder=tmp_path)
    given = moment_for(model, 1, corpus=few(), tokens=30, folder=tmp_path)
    assert torch.equal(moment_for(model, 1, folder=tmp_path).total, given.total)
    other = load_model(save_model(tmp_path / "model", "gpt2", seed=5))
    with pytest.raises(
        MomentError, match="--text FILE"
    ):  # Control: statistics belong to one model.
        moment_for(other, 1, folder=tmp_path)


def test_what_does_not_fit_the_model_is_not_imported(atlas, family_model, tmp_path):
    moment = gather(atlas, [2], bundled(), tokens=300, folder=tmp_path)[2]
    assert import_moment(atlas, 2, moment, tmp_path).is_file()
    with pytest.raises(MomentError, match="512 neurons and layer 2 of gpt2 has 128"):
        import_moment(family_model("gpt2"), 2, moment, tmp_path)
    with pytest.raises(MomentError, match="of layer 2, and this is layer 3"):
        import_moment(atlas, 3, moment, tmp_path)
    wrong = KeyMoment(moment.total, moment.count, {"fingerprint": "0" * 64})
    with pytest.raises(MomentError, match="fingerprint 0000"):
        import_moment(atlas, 2, wrong, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [8]}, "layer 8 does not exist: the model has 8"),
        ({"layers": [-1]}, "layer -1"),
        ({"layers": []}, "no layers"),
        ({"tokens": 0}, "from 1 up, not 0"),
        ({"tokens": "lots"}, "not 'lots'"),
        ({"shard": (3, 2)}, "not 3/2"),
        ({"shard": (0, 2)}, "not 0/2"),
    ],
)
def test_what_cannot_be_gathered_is_refused(atlas, tmp_path, options, words):
    given = {"layers": [1], "corpus": bundled(), "tokens": 100, **options}
    with pytest.raises(MomentError, match=words):
        gather(atlas, folder=tmp_path, **given)
    assert not any(tmp_path.iterdir())


def test_a_corpus_without_text_and_keys_that_are_not_finite_are_refused(
    atlas, tmp_path, monkeypatch
):
    with pytest.raises(MomentError, match="few has no text"):
        gather(atlas, [1], few(["", ""]), tokens=100, folder=tmp_path)
    with pytest.warns(FactWarning, match="few ends after 6 documents"):
        gather(atlas, [1], few(), tokens="auto", folder=tmp_path)
    monkeypatch.setattr(key_passes, "dsyrk", lambda *args, c, **more: c.fill(float("inf")))
    with pytest.raises(MomentError, match="not finite"):
        gather(atlas, [1], few(), tokens=5, folder=tmp_path)


def test_totals_that_do_not_fit_are_refused_before_the_work(atlas, tmp_path, monkeypatch):
    monkeypatch.setattr(key_passes, "_free", lambda device: 30_000_000)
    with pytest.raises(OutOfMemory, match=r"the sums of 8 layers need .* --layer"):
        gather(atlas, range(8), bundled(), tokens=100, folder=tmp_path)
    monkeypatch.undo()
    assert gather(atlas, [1], bundled(), tokens=100, folder=tmp_path)  # Control.


def test_keys_are_summed_wider_than_a_narrow_model_computes(tmp_path, family_folder):
    narrow = load_model(family_folder("gpt2"), dtype=torch.bfloat16)
    wide = load_model(family_folder("gpt2"))
    texts = ["the quick brown fox jumps over the lazy dog " * 3] * 40
    found = [
        gather(each, [0], few(texts), tokens=2000, folder=tmp_path)[0] for each in (narrow, wide)
    ]
    assert found[0].total.dtype == torch.float64
    assert close(found[0].mean(), found[1].mean(), 0.05)
    assert not torch.equal(found[0].total, found[1].total)


def test_every_row_is_in_one_batch_within_the_limit():
    rows = [[1] * length for length in (5, 1, 9, 9, 3, 30, 2)]
    cut = list(batches(rows, 18))
    assert sorted(len(row) for batch in cut for row in batch) == [1, 2, 3, 5, 9, 9, 30]
    assert [len(batch) * max(map(len, batch)) for batch in cut] == [30, 18, 15, 1]
    ids, real = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 8, 8]]
    assert real.tolist() == [[True] * 3, [True, False, False]]


def test_one_pass_and_one_per_layer_give_the_same(family_model):
    table = measure_throughput(family_model("gpt2"), [0, 1, 3], 500)
    assert table["way"].tolist() == ["one pass", "one pass per layer"]
    assert (table["difference"] < 1e-6).all()
    assert (table["tokens_per_second"] > 0).all()
    assert table["tokens"].tolist() == [448, 448]


def test_an_estimate_is_what_gathering_then_takes(atlas, tmp_path):
    found = estimate(atlas, range(8), bundled(), tokens=3000)
    moment = gather(atlas, [1], bundled(), tokens=3000, folder=tmp_path)[1]
    assert found.tokens == 3000
    assert found.documents == pytest.approx(moment.about["documents"], rel=0.15)
    sizes = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert found.disk / 8 == pytest.approx(sizes, rel=0.02)
    paper = estimate(atlas, [1], few(), tokens="paper", shard=(1, 2))
    assert paper.documents == 2  # Five that are not empty, in two parts.
    remote = Corpus("r", lambda start: pytest.fail("fetched"), remote=True)
    assert estimate(atlas, [1], remote, tokens="paper").seconds is None


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    app = typer.Typer()
    app.command()(stats)

    def call(*arguments, code=0):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == code, result.output + str(result.exception)
        if code:
            lines = [line for line in result.stderr.splitlines() if line.startswith("factlens:")]
            assert len(lines) == 1, result.output
        return result

    return call


def test_shards_are_gathered_added_and_imported(run, atlas, tmp_path):
    base = ["-l", 5, "--tokens", 1500, "--out", tmp_path / "o"]
    for part in ("1/2", "2/2"):
        assert "shard" in run(*base, "--shard", part).output
    files = sorted((tmp_path / "o").rglob("*shard*.safetensors"))
    run("--add", files[0], "--add", files[1], "--out", tmp_path / "sum.safetensors")
    whole = gather(atlas, [5], bundled(), tokens=1500, folder=tmp_path / "whole")[5]
    assert close(load_moment(tmp_path / "sum.safetensors").total, whole.total)
    run("--stats-from", tmp_path / "sum.safetensors", "--out", tmp_path / "i")
    assert close(shelf_of(atlas, tmp_path / "i").most(5).total, whole.total)
    assert shelf_of(atlas, tmp_path / "o").most(5) is None  # A shard alone is no edit's statistics.
    result = run("--add", files[0], "--add", files[0], "--out", tmp_path / "x", code=2)
    assert "only different shards" in result.stderr


def test_texts_are_gathered_and_a_ridge_is_said(run, tmp_path):
    (tmp_path / "t.txt").write_text("one two three\n\nfour five six")
    result = run("-l", 1, "--text", tmp_path / "t.txt", "--tokens", 10, "--out", tmp_path / "o")
    assert "gather more" in result.stderr
    assert "1e-08" in result.output
    assert len(text_files([tmp_path / "t.txt"]).digest) == 64


def test_a_dry_run_gathers_nothing(run, tmp_path):
    result = run("--dry-run", "--out", tmp_path / "o")
    for word in ("10240", "tokens per second", "GB", "atlas-corpus"):
        assert word in result.output
    assert not (tmp_path / "o").exists()


def test_bad_input_gets_one_line_and_exit_code_2(run, tmp_path):
    for arguments, words in (
        (["--tokens", "lots"], "auto, paper or a number"),
        (["--layer", 99], "layer 99 does not exist"),
        (["--shard", "two"], "such as 2/8"),
        (["--text", "none.txt"], "cannot read the texts"),
        (["--text", "a.txt", "--dataset", "x/y"], "not both"),
        (["--dataset", "x/y"], "cannot fetch the data set x/y"),
        (["--add", "none.safetensors", "--out", tmp_path / "s"], "no statistics at"),
        (["--add", "none.safetensors"], "needs a file"),
        (["--stats-from", ORACLE / "rome.npz", "-l", 1], "has no mom2.mom2"),
        (["--stats-from", "none.npz", "-l", 1], "no statistics at"),
    ):
        assert words in run(*arguments, code=2).stderr
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot write" in run("--out", tmp_path / "locked" / "o", code=2).stderr


def test_only_a_model_that_came_from_the_hub_reads_wikipedia_by_default(family_model, monkeypatch):
    model = family_model("gpt2")
    for name, origin, remote in (
        ("gpt2", "gpt2", True),
        ("someone/model", "someone/model", True),
        ("gpt2", str(ORACLE), False),  # A folder of that name.
        ("my-model", "my-model", False),
    ):
        monkeypatch.setattr(models, "model_name", lambda model, name=name: name)
        monkeypatch.setattr("factlens.key_statistics._origin", lambda model, origin=origin: origin)
        if remote:
            corpus = default_corpus(model)
            assert (corpus.name, corpus.remote) == ("wikimedia/wikipedia-20231101.en", True)
        else:
            with pytest.raises(MomentError, match="--text FILE or --dataset NAME"):
                default_corpus(model)


def test_imported_official_statistics_serve_an_official_config(oracle_model, tmp_path):
    """`hparams/ROME/*.json` asks for 100 000 documents, which is what the official files are of."""
    with np.load(ORACLE / "rome.npz") as official:
        moment = KeyMoment(torch.tensor(official["C"]).double(), 1)
    named = KeyMoment(moment.total, 1000, {"corpus": "official wikipedia.npz"})
    import_moment(oracle_model, 2, named, tmp_path)
    assert moment_for(oracle_model, 2, tokens="paper", folder=tmp_path).count == 1000
    other = KeyMoment(moment.total, 1000, {"corpus": "notes", "documents": 10})
    import_moment(oracle_model, 3, other, tmp_path)
    with pytest.raises(MomentError, match="no statistics"):
        moment_for(oracle_model, 3, tokens="paper", folder=tmp_path)
