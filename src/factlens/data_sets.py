"""The paper's data, by name: the official files of ROME's authors, and the same records on the Hugging Face hub.

What is fetched is compared with a sha256 where one is pinned here; else it is read to its end and its records are counted.
A data set of the hub is pinned by its commit, and becomes one file of the official form.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from factlens.benchmarks import counterfact, zsre
from factlens.benchmarks.references import snippets
from factlens.errors import DownloadError, FactFileError
from factlens.facts import Fact, read_facts, write_facts
from factlens.hub_files import fetched, opened, parquet_files

OFFICIAL = "https://rome.baulab.info/data/dsets"
HUB = "https://huggingface.co/datasets"
Form = Literal["facts", "counterfact", "zsre", "snippets"]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One file of data, and where it comes from."""

    name: str
    what: str
    form: Form
    """Which reader reads it."""
    file: str
    """Its name in the folder."""
    url: str
    records: int | None = None
    """None where we know of no number; then any is taken."""
    sha256: str | None = None
    """None where it is not pinned here."""
    commit: str | None = None
    """Of a data set of the hub."""


def _official(name: str, form: Form, what: str, **more: Any) -> DataSet:
    file = f"{name}.json"
    return DataSet(name=name, what=what, form=form, file=file, url=f"{OFFICIAL}/{file}", **more)


def _of_hub(name: str, form: Form, what: str, **more: Any) -> DataSet:
    return DataSet(name=name, what=what, form=form, url=f"{HUB}/{name}", **more)


DATA_SETS = {
    each.name: each
    for each in (
        _official(
            "known_1000",
            "facts",
            "facts that GPT-2 XL knows, to trace (Section 2)",
            records=1209,
            sha256="4f8726c03a8fa5b1b4ee18cd0f3efd0554c3f5f72f019f00d5bb7d941d0d1d42",
        ),
        _official(
            "counterfact",
            "counterfact",
            "CounterFact (Section 3.3)",
            records=21919,
            sha256="d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f",
        ),
        _official(
            "zsre_mend_eval",
            "zsre",
            "zsRE, to evaluate on (Section 3.2)",
            records=19086,
            sha256="8a371d512f8a6ab175db4ef672181d5c0e52da23298cb51e5a2eeea2f89aa9cd",
        ),
        _official(
            "zsre_mend_train",
            "zsre",
            "zsRE, to train MEND and KE on",
            records=163196,
            sha256="4f3ac245e9c0baaf633f9e6cb765ffa8e83d594a74520a6cc3539497328c0722",
        ),
        _official(
            "attribute_snippets",
            "snippets",
            "Wikipedia's texts for RS; 0.9 GB",
        ),
        _of_hub(
            "azhx/counterfact",
            "counterfact",
            "CounterFact, its splits in the official order",
            file="azhx-counterfact.json",
            records=21919,
            commit="c01c413f856ee38f5c080c9fc5e87aff478e2ff9",
        ),
        _of_hub(
            "NeelNanda/counterfact-tracing",
            "facts",
            "CounterFact's true facts, to trace",
            file="counterfact-tracing.csv",
            records=21919,
            commit="c945b082ca08d0a8f3ba227fb78404a09614c36e",
        ),
    )
}
"""All of them, by name."""


def data_set(name: str) -> DataSet:
    """The data set with this name.

    Raises:
        DownloadError: there is none.
    """
    if name not in DATA_SETS:
        raise DownloadError(f"there is no data set {name!r}; there are {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


# -- what is in a file -----------------------------------------------------------------------------


def count(wanted: DataSet, path: Path) -> int:
    """How many records a file holds, those that cannot be used with them; all are read.

    Raises:
        DownloadError: it is of another form, or has another number of records than is known.
    """
    bad: list[str] = []
    ending = Path(wanted.file).suffix
    read: dict[str, Callable[[], int]] = {
        "facts": lambda: len(read_facts(path, ending=ending, on_bad_row=bad.append)),
        "counterfact": lambda: len(counterfact.read_records(path, on_bad_row=bad.append)),
        "zsre": lambda: len(zsre.read_records(path, on_bad_row=bad.append)),
        "snippets": lambda: sum(1 for _ in snippets(path)),
    }
    try:
        found = read[wanted.form]() + len(bad)
    except FactFileError as error:
        raise DownloadError(f"not {wanted.name} as of {wanted.url}: {error}") from None
    if found != (wanted.records or found) or not found:
        known = f"{wanted.records:,}" if wanted.records else "some"
        raise DownloadError(
            f"not {wanted.name} as of {wanted.url}: {path} has {found:,} records, expected {known}"
        )
    return found


# -- from the hub ----------------------------------------------------------------------------------


def from_hub(wanted: DataSet, target: Path, instead: str) -> None:
    """Fetch a data set's parquet files, and write its records in their official form, or its facts as CSV.

    `instead` ends the errors of a hub that cannot be reached: what else a user can do.

    Raises:
        DownloadError: no network, a file with another checksum, or one of another form.
        OutputError: the place cannot be written.
    """
    rows = list(enumerate(_rows(wanted, instead)))
    try:
        if wanted.form == "facts":
            made: list[Any] = [_fact(row, number) for number, row in rows]
        else:
            made = [counterfact.record_of(row, number, f"row {number}") for number, row in rows]
    except (KeyError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DownloadError(f"{wanted.url} is not of the known form ({why}); {instead}") from None
    if wanted.form == "facts":
        write_facts(made, target)
    else:
        # Its splits are drawn from the official file, whose order case_id is.
        counterfact.write_records(sorted(made, key=lambda each: each.case_id), target)


def _rows(wanted: DataSet, instead: str) -> Iterator[dict[str, Any]]:
    commit = str(wanted.commit)
    for file in parquet_files(wanted.name, None, commit, instead):
        table = opened(fetched(wanted.name, commit, file, instead), wanted.name)
        for batch in table.iter_batches():
            yield from batch.to_pylist()


def _fact(row: dict[str, Any], number: int) -> Fact:
    """A row of counterfact-tracing, where names have the space before them that their tokens have."""
    subject, object_ = row["subject"].strip(), row["target_true"].strip()
    return Fact(row["prompt"], subject, object_, row["relation_id"], str(number))
