"""The bundled model: a small GPT-2 of known facts, its fact tables, and how both were made.

Importing this package reads nothing and imports no torch; the tables are read when first asked for.
`python -m factlens.atlas` trains the model again.
"""

from factlens.atlas.tables import CHECKPOINT as CHECKPOINT
from factlens.atlas.tables import Relation as Relation
from factlens.atlas.tables import Source as Source
from factlens.atlas.tables import Statement as Statement
from factlens.atlas.tables import relations as relations
from factlens.atlas.tables import statements as statements

__all__ = ["CHECKPOINT", "Relation", "Source", "Statement", "relations", "statements"]
