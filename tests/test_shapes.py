"""The tests' own check of shapes sees a wrong one."""

import pytest
import torch
from jaxtyping import TypeCheckError
from shapes import shaped_modules

from factlens.editors.rome import insert


def test_a_wrong_shape_is_refused():
    key, moment = torch.ones(4), torch.eye(4, dtype=torch.float64)
    insert(key, torch.ones(3), moment)
    with pytest.raises(TypeCheckError, match="moment"):
        insert(key, torch.ones(3), torch.eye(5, dtype=torch.float64))


def test_engines_metrics_and_editors_are_checked_and_tables_of_facts_are_not():
    modules = shaped_modules()
    assert {"factlens.engines.one_pass", "factlens.metrics", "factlens.editors.rome"} <= {*modules}
    assert "factlens.atlas.tables" not in modules
