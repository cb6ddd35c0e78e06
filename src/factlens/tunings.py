"""An editor's numbers chosen on a model: the same number of settings for every editor, on the same records, none of which is tested on.

Many settings are tried on few records, the better ones on more (successive halving; Karnin et al., 2013), and others near them: `rounds`.

runs/tuning/
  ft/2/, ft/8/, ft/8-near/, ...   one evaluation for each editor and round, called by its records, each setting under a name of its own;
                                  the same call goes on there
  tuning.csv                      all settings with their scores, and which are taken
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from factlens import configs, models
from factlens.benchmarks.atlas_counterfact import other_facts
from factlens.config_files import Entries, with_entries
from factlens.counterfact_scores import Others
from factlens.errors import ConfigError, PlanError
from factlens.evaluation import BATCH, table
from factlens.evaluation_runs import Contestant, RunProgress, evaluate_run
from factlens.executors import Executor, InProcess
from factlens.metrics import PARTS_OF_S, harmonic_half_width
from factlens.models import Model
from factlens.tunables import NUMBERS, Numbers, settings_near, settings_of, tunable

SETTINGS = 32
"""Of each editor, the default among them."""
FACTOR = 4
"""One of so many settings goes on, to so many times the records."""
TABLE = "tuning.csv"
BENCHMARK = "atlas-CounterFact"
DIGITS = 9
"""Decimals of scores that count: rounding must not tell settings apart."""


def tune(
    model: Model | Executor,
    editors: Sequence[str],
    records: Iterable[Any],
    *,
    out: str | Path,
    settings: int = SETTINGS,
    seed: int = 0,
    others: Others = other_facts,
    of: str = BENCHMARK,
    batch: int = BATCH,
    progress: RunProgress = lambda done, total, label: None,
) -> pd.DataFrame:
    """Evaluate the same number of settings of each editor on the same records, and take the best of each.

    One row for each setting: `editor, setting` (0 is the default), `taken`, the numbers that are chosen, NaN where an editor has no
    such, `how` it was done, then the columns of `evaluation.table` with `S_margin`, over the records of the last round that the setting
    was in (`n`). The default is in every round. What is chosen here is to be reported on other records. The same call goes on where
    an earlier one stopped.

    Args:
        model: a hooked model without edits, or an `executors.OnRay` for several workers.
        editors: names of `tunables.TUNABLE`; of those that are trained the model must have a network.
        records: of CounterFact's form.
        out: the run's folder.
        settings: how many of each editor; `tunables.settings_of` says which.
        seed: of the draw of settings.
        others: as in `evaluate`, as is `batch`.
        of: what the records are of, in words.
        progress: told (steps done, steps in all, the setting at work).

    Raises:
        PlanError: no records, no editor or one that is not known, no setting, or an editor of which no edit succeeds.
        What `evaluate_run` raises.
    """
    executor = InProcess(model) if isinstance(model, models.Model) else model
    asked, names = list(records), list(dict.fromkeys(editors))
    if not names or not asked:
        raise PlanError("tuning needs an editor, and records to choose by")
    planned = executor.call(_planned, (names, settings, seed))
    rule = rounds(settings, len(asked))
    total = sum(each.steps for each in rule)
    more: dict[str, Any] = {"others": others, "batch": batch}
    frames = []
    for place, name in enumerate(names):

        def tell(done: int, label: str, before: int = place * total) -> None:
            progress(before + done, len(names) * total, label)

        trial = _Trial(executor, name, planned[name], asked, Path(out) / name, more, tell)
        frames.append(_chosen(trial, rule, seed))
    how = f"{_in_words(rule)} of {of} that are not tested on, seed {seed}"
    return _in_order(pd.concat(frames, ignore_index=True).assign(how=how))


# -- the rounds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """A part of the tuning of one editor."""

    settings: int
    """How many are tried: all, then the best of those before."""
    records: int
    near: int = 0
    """How many more are tried on the same records, near the best of them."""
    around: int = 2
    """Near how many of the best; the layers next to a single one are not tried."""

    @property
    def steps(self) -> int:
        """How many edits are made."""
        return (self.settings + self.near) * self.records


def rounds(settings: int, records: int) -> list[Round]:
    """How many settings of an editor are tried on how many of the records, round by round.

    While there are eight or more, one of `FACTOR` goes on, beside the default, on `FACTOR` times the records; the last round is on all.
    Before it as many as a `FACTOR`th of the settings are tried near the best two, and in it half as many near the best, at its layer.
    """
    tried = [settings]
    while tried[-1] >= 2 * FACTOR:
        tried.append(1 + tried[-1] // FACTOR)
    found: list[Round] = []
    for left, count in zip(reversed(range(len(tried))), tried, strict=True):
        n = max(1, records // FACTOR**left)
        if not found or n > found[-1].records:  # Else there is nothing more to see.
            found.append(Round(count, n))
    if len(found) > 1:
        half = settings // FACTOR // 2
        found[-2] = replace(found[-2], near=2 * half)
        found[-1] = replace(found[-1], near=half, around=1)
    return found


def _in_words(rule: Sequence[Round]) -> str:
    who = ["settings of each editor", *["of them"] * (len(rule) - 1)]
    more = [f" and {each.near} near the best" if each.near else "" for each in rule]
    said = [
        f"{each.settings} {of}{others} on {each.records}"
        for each, of, others in zip(rule, who, more, strict=True)
    ]
    return ", ".join(said) + " records"


class _Trial:
    """The settings of one editor that were tried, and what they scored."""

    def __init__(
        self,
        executor: Executor,
        name: str,
        settings: Sequence[Numbers],
        records: Sequence[Any],
        out: Path,
        more: Mapping[str, Any],
        tell: Callable[[int, str], None],
    ) -> None:
        self.executor, self.name, self.records, self.out = executor, name, records, out
        self.tried = dict(enumerate(settings))
        self.found = pd.DataFrame()
        self._more, self._tell, self._done, self._draws = more, tell, 0, 0

    def score(self, settings: Sequence[int], n: int, folder: str) -> None:
        """Evaluate some settings on the first `n` records; what they scored on fewer is forgotten."""
        of = {each: self.tried[each] for each in settings}
        editor, before = tunable(self.name).editor, self._done
        frame = evaluate_run(
            self.executor,
            [
                Contestant(label_of(self.name, each), editor, numbers)
                for each, numbers in of.items()
            ],
            self.records[:n],
            out=self.out / folder,
            progress=lambda done, total, label: self._tell(before + done, label),
            **self._more,
        )
        both = pd.concat([_tabulated(self.name, of, frame), self.found])
        self.found = both.drop_duplicates("setting").reset_index(drop=True)
        self._done += len(of) * n

    def add_near(self, settings: Sequence[int], count: int, seed: int) -> list[int]:
        """Plan `count` more settings, near the given ones in turn; their numbers."""
        first, further = len(self.tried), min(1, len(settings) - 1)
        for each in settings:
            plan = (self.name, self.tried[each], count // len(settings), seed, self._draws, further)
            self.tried |= dict(enumerate(self.executor.call(_near, plan), start=len(self.tried)))
            self._draws += 1
        return list(range(first, len(self.tried)))

    def ranked(self, settings: Sequence[int]) -> list[int]:
        """Some settings, best first."""
        some = self.found[self.found["setting"].isin(settings)]
        return [int(each) for each in _ranked(some)["setting"]]


def _chosen(trial: _Trial, rule: Sequence[Round], seed: int) -> pd.DataFrame:
    """One row for each setting of an editor that was tried, and which is taken."""
    alive = list(trial.tried)
    for number, each in enumerate(rule):
        if number:  # The default goes on whatever it scored.
            alive = [0, *(n for n in trial.ranked(alive) if n)][: each.settings]
        trial.score(alive, each.records, str(each.records))
        if each.near:
            more = trial.add_near(trial.ranked(alive)[: each.around], each.near, seed)
            trial.score(more, each.records, f"{each.records}-near")
            alive += more
    found = trial.found
    taken = found["setting"][best(found[found["setting"].isin(alive)])]
    return found.assign(taken=found["setting"] == taken).sort_values("setting")


def _near(model: Model, plan: tuple[str, Numbers, int, int, int, int]) -> list[Numbers]:
    return settings_near(model, *plan)


def label_of(name: str, setting: int) -> str:
    """A setting's name in the evaluation of its editor: "ft 3"."""
    return f"{name} {setting}"


def _planned(model: Model, plan: tuple[Sequence[str], int, int]) -> dict[str, list[Numbers]]:
    names, settings, seed = plan
    return {name: settings_of(model, name, settings, seed) for name in names}


# -- the table, and the choice ---------------------------------------------------------------------


def _tabulated(name: str, planned: Mapping[int, Numbers], frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each of these settings of an editor."""
    rows = []
    for number, numbers in planned.items():
        found = frame[frame["editor"] == label_of(name, number)]
        parts = found.loc[found["reason"] == "", [*PARTS_OF_S]].to_numpy(float)
        rows.append(
            {
                "setting": number,
                **{each: numbers[each] for each in tunable(name).space.names},
                **table(found).iloc[0],
                "editor": name,
                "S_margin": 100 * harmonic_half_width(parts),
            }
        )
    return pd.DataFrame(rows)


def _in_order(found: pd.DataFrame) -> pd.DataFrame:
    numbers = [name for name in NUMBERS if name in found]
    first = ["editor", "setting", "taken", *numbers, "how", "S", "S_margin"]
    return found[[*first, *(name for name in found if name not in first)]]


def best(found: pd.DataFrame) -> Any:
    """Which row to take of the settings of one editor: the highest S.

    Of those that S does not tell apart it is the one that changes the model least, by the KL on unrelated text; of those alike in that
    too the first, so the default before any other. A record whose edit fails has no scores, so only the settings with the fewest of
    those compare.

    Raises:
        PlanError: no setting has scores.
    """
    fair = found[(found["failed"] == found["failed"].min()) & found["S"].notna()]
    if fair.empty:
        raise PlanError(
            f"of {found['editor'].iloc[0]} no edit succeeded under any setting; records.parquet in its folder says why"
        )
    return _ranked(fair).index[0]


def _ranked(found: pd.DataFrame) -> pd.DataFrame:
    """Best first."""
    ranked = found.assign(S=-found["S"].round(DIGITS), KL=found["KL"].round(DIGITS))
    return ranked.sort_values(["failed", "S", "KL", "setting"], kind="stable")


def summary(found: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
    """Of each editor the row that is taken, and that of its default."""
    return [
        (group[group["taken"]].iloc[0], group[group["setting"] == 0].iloc[0])
        for _, group in found.groupby("editor", sort=False)
    ]


def numbers_of(row: pd.Series) -> dict[str, int | float]:
    """The numbers of a row's setting."""
    names = tunable(str(row["editor"])).space.names
    return {name: int(row[name]) if name == "layer" else float(row[name]) for name in names}


def in_words(row: pd.Series) -> str:
    """The numbers of a row's setting: "layer 3, learning_rate 0.0012"."""
    return ", ".join(f"{name} {number:.4g}" for name, number in numbers_of(row).items())


# -- into a model's config -------------------------------------------------------------------------


def check_config(model: Model, path: Path) -> None:
    """Find out, before the work, that choices for the model can be written into a config.

    Raises:
        ConfigError: no config, one of another model, or one for another depth.
    """
    config, name = configs.read_config(path), models.model_name(model)
    if not (config.is_named(name) or config.is_built(models.architecture(model))):
        raise ConfigError(f"{path} is not the config of {name}; its models do not name it")
    _check_depth(path, config, models.n_layers(model))


def with_choices(path: Path, found: pd.DataFrame, depth: int) -> str:
    """The text of a model's config with what was taken in place of what is there, and where it comes from; the rest as it is.

    Args:
        path: the config.
        found: the frame of `tune`.
        depth: how many layers the model has.

    Raises:
        ConfigError: no config, one for another depth, or a section that also has numbers from elsewhere, which one source cannot be said of.
    """
    config = configs.read_config(path)
    _check_depth(path, config, depth)
    entries: Entries = {("layers",): depth} if config.layers is None else {}
    source = f"{configs.CHOSEN} tune, {found['how'].iloc[0]} (docs/editing.md)"
    sections: dict[str, Entries] = {}
    for row, _ in summary(found):
        section = tunable(row["editor"]).section
        _check_section(config, section, source, set(found["editor"]))
        numbers = {(*section, name): number for name, number in numbers_of(row).items()}
        sections[section[0]] = {**sections.get(section[0], {}), **numbers}
    for name, its_own in sections.items():
        entries = {**entries, **its_own, (f"{name}_source",): source}
    return with_entries(path.read_bytes().decode("utf-8"), entries)


def _check_depth(path: Path, config: configs.ModelConfig, depth: int) -> None:
    if config.layers not in (None, depth):
        raise ConfigError(
            f"{path} is for a model of {config.layers} layers, and this one has {depth}; give the model's own config"
        )


def _check_section(
    config: configs.ModelConfig, section: Sequence[str], source: str, tuned: set[str]
) -> None:
    """Refuse a section of several editors with numbers of one that has another source."""
    held: Mapping[str, object] = getattr(config, section[0])
    before = getattr(config, f"{section[0]}_source")
    foreign = [name for name in held if name not in tuned] if len(section) > 1 else []
    if foreign and before != source:
        raise ConfigError(
            f"{section[0]} of {config.name}.yaml also has {', '.join(foreign)}, whose source is another ({before}); tune it too, or "
            "take it out"
        )
