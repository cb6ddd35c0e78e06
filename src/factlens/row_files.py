"""Parts of an evaluation as files: a frame of rows, and what it belongs to."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from factlens.errors import RunError
from factlens.files import written_whole

FORMAT = "factlens-rows/1"
_KEY = b"factlens"


@dataclass(frozen=True)
class Rows:
    """Some rows, and a few words on what they are of."""

    frame: pd.DataFrame
    about: Mapping[str, str]

    def save(self, path: str | Path) -> None:
        """Write the frame as Parquet with the rest in its metadata; `load` reads it back.

        Raises:
            OutputError: the place cannot be written. Nothing half-written stays behind.
        """
        table = pa.Table.from_pandas(self.frame, preserve_index=False)
        own = {_KEY: json.dumps({"format": FORMAT, **self.about}).encode()}
        with written_whole(path) as partial:
            pq.write_table(
                table.replace_schema_metadata({**(table.schema.metadata or {}), **own}), partial
            )

    @classmethod
    def load(cls, path: str | Path) -> "Rows":
        """Read what `save` wrote.

        Raises:
            RunError: not there, cut short, or something else.
        """
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[_KEY])
            if about.pop("format", None) != FORMAT:
                raise RunError(f"{path} holds no rows of this version; expected {FORMAT!r}")
            return cls(table.to_pandas(), about)
        except (pa.ArrowException, OSError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, RunError):
                raise
            line = str(error).split("\n")[0][:120]
            raise RunError(f"{path} holds no rows, or is damaged ({line})") from None
