"""The public surface, and imports that point down."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import factlens

SOURCE = Path(factlens.__file__).parent
LAYERS = [
    ["cli", "panels", "scaling", "evaluation_benchmark", "atlas_search", "atlas_release"],
    ["atlas_measures", "edit_benchmark", "plain_evaluation"],
    ["atlas_blocks"],
    ["atlas_results"],
    ["benchmark"],
    [
        "commands.tracing",
        "commands.averaging",
        "commands.listing",
        "commands.fetching",
        "commands.editing",
        "commands.applying",
        "commands.statistics",
        "commands.evaluating",
        "commands.sweeping",
        "commands.tuning",
        "commands.rating",
        "commands.papering",
        "commands.training_editors",
    ],
    ["commands.edit_plans", "commands.layer_figures", "commands.measuring"],
    ["commands.shared", "commands.options"],
    ["paper_pages"],
    ["paper_tables", "edit_claims"],
    ["table_texts", "paper_numbers"],
    ["terminal"],
    ["edit_pages", "rating_pages"],
    ["reports"],
    ["plots"],
    ["sweep_plots", "tuning_plots"],
    ["line_plots", "edit_plots"],
    ["average_plots", "trace_plots", "scatter_plots", "images"],
    ["styles"],
    ["paper_results"],
    ["summaries"],
    ["averages"],
    ["tunings", "sweep_runs"],
    ["parts", "evaluation_runs"],
    ["store", "executors"],
    ["studies"],
    ["claims"],
    ["peaks"],
    ["layer_sweeps"],
    ["effects", "gradients", "tracing"],
    ["sweeps", "rewrites", "rating_texts"],
    ["evaluation", "lenses", "ratings"],
    ["evaluation_rows", "zsre_scores"],
    ["counterfact_scores"],
    ["scoring"],
    ["tunables"],
    ["editors.attention", "editors.mend", "editors.ke", "editors.training"],
    ["editors.trained_edits"],
    ["editors.checkpoints"],
    ["editors.rome", "editors.fine_tuning", "editors.knowledge_neurons"],
    ["editors.tuning", "editors.neurons"],
    ["editors.values", "editors.realising"],
    ["editors.questions", "editors.hypernetworks", "editors.lessons"],
    ["editors.contexts", "editors.rome_config", "editors.tuning_config", "editors.training_config"],
    ["editors.spaces"],
    ["editors"],
    ["benchmarks.atlas_counterfact", "benchmarks.atlas_zsre", "benchmarks.composition"],
    ["data_folder"],
    ["data_sets"],
    ["benchmarks.inverses", "benchmarks.references"],
    ["benchmarks.counterfact", "benchmarks.zsre", "metrics"],
    ["benchmarks.record_files", "benchmarks.draws", "benchmarks.mentions"],
    ["statistics_costs"],
    ["key_statistics"],
    ["key_gathering"],
    ["moment_store", "key_passes"],
    ["moment_files", "hub_corpora"],
    ["moments", "corpora"],
    ["alarms", "exports"],
    ["edits"],
    ["edit_files"],
    ["changes", "generation"],
    ["tails"],
    ["odds"],
    ["intervals", "measurements", "text_metrics"],
    ["derivatives"],
    ["preparations"],
    ["settings"],
    ["knowledge"],
    ["traces", "row_files"],
    ["engines.choosing"],
    ["engines.plain", "engines.one_pass"],
    ["engines.base_runs"],
    ["engines.passes"],
    ["engines.problems"],
    ["plans"],
    ["patches"],
    ["corruption"],
    ["replacements"],
    ["fingerprints"],
    ["runs", "linear_maps"],
    ["models"],
    ["prefixes"],
    ["tokens", "facts"],
    ["downloads", "hub_files"],
    ["files"],
    ["config_files"],
    ["configs"],
    ["atlas", "types"],
    ["errors"],
]
RANK = {name: len(LAYERS) - depth for depth, row in enumerate(LAYERS) for name in row}
MODULES = sorted(RANK)


def path_of(name: str) -> Path:
    path = SOURCE / (name.replace(".", "/") + ".py")
    return path if path.exists() else SOURCE / name / "__init__.py"


def factlens_imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path_of(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("factlens"):
            inside = (node.module or "").removeprefix("factlens").lstrip(".")
            names = [inside] if inside else [alias.name for alias in node.names]
            found |= {each.split(".")[0] if each.startswith("atlas") else each for each in names}
    return found - {name, "engines", "commands", "benchmarks"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "atlas"])
def test_imports_point_down(name):
    for imported in factlens_imports(name):
        assert RANK[imported] < RANK[name], f"{name} may not import {imported}"


def test_every_module_has_its_layer():
    modules = {
        str(path.relative_to(SOURCE).with_suffix("")).replace("/", ".")
        for path in SOURCE.rglob("*.py")
        if "atlas" not in path.parts and path.name != "__init__.py"
    }
    assert modules == {name for name in MODULES if name not in ("atlas", "editors")}


def test_only_models_imports_transformer_lens():
    importers = {
        path.name
        for path in SOURCE.rglob("*.py")
        if "import transformer_lens" in path.read_text(encoding="utf-8")
        or "from transformer_lens" in path.read_text(encoding="utf-8")
    }
    assert importers == {"models.py"}


def test_the_public_names_are_pinned_documented_and_load():
    assert factlens.__all__ == sorted(factlens.__all__)
    assert factlens.__all__ == [
        "Edit",
        "Fact",
        "FactWarning",
        "FactlensError",
        "Rewrite",
        "Summary",
        "Trace",
        "alarm",
        "applied",
        "apply_permanently",
        "average",
        "average_effects",
        "average_total_effects",
        "bundled_facts",
        "claims",
        "counterfact",
        "editors",
        "effects",
        "evaluate",
        "executors",
        "explore",
        "export",
        "fingerprint",
        "generate",
        "gradients",
        "known_facts",
        "lenses",
        "load_model",
        "moment_for",
        "patches",
        "peaks",
        "plots",
        "read_facts",
        "read_run",
        "reports",
        "rome",
        "trace",
    ]
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    for name in factlens.__all__:
        assert getattr(factlens, name).__doc__, f"{name} has no docstring"
        assert f"`{name}" in readme or f"fl.{name}" in readme, f"{name} is not in the README"


def test_the_readmes_python_runs(tmp_path, monkeypatch, atlas):
    monkeypatch.chdir(tmp_path)
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL):
        exec(block, names)
    assert names["trace"].engine == "one-pass"
    assert len(names["figure"].data) == 4
    assert set(names["severed"].frame["severed"]) == {"none", "mlp", "attn"}
    assert (tmp_path / "trace.parquet").is_file()
    assert names["edit"].info["results"][0]["first_after"]
    assert (tmp_path / "space-needle.safetensors").stat().st_size < 10_000
    assert (tmp_path / "edited-model" / "model.safetensors").is_file()
    assert names["scores"]["ES"].mean() > 0.9


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="load_model"):
        _ = factlens.nothing


def test_importing_factlens_and_asking_for_help_loads_nothing_heavy():
    code = (
        "import sys, factlens, factlens.cli; "
        "print([m for m in ('torch', 'pandas', 'plotly', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
