"""What is said of a scorer of one's own that fails: the file and the line."""

from pathlib import Path

import numpy as np
import pytest

from d3po_core.config import ScoringConfig
from d3po_core.errors import D3POError
from d3po_core.scorers.finding import check_scorer, load_scorer

SCORER = """
import numpy as np

def helper(images):
    return images.shape[9]

def fails(images, prompts):
    return helper(images)

def fails_in_a_library(images, prompts):
    return np.concatenate(5)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "my_wrong_scorer.py"
    file.write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return file


def test_a_failing_scorer_names_its_own_file_and_line(module: Path) -> None:
    for function, line in (("fails", 5), ("fails_in_a_library", 11)):
        scorer = load_scorer(f"my_wrong_scorer:{function}")
        with pytest.raises(D3POError, match=f"failed: .*Error: .*, in {module} line {line}$"):
            scorer(np.zeros((1, 8, 8, 3), np.uint8), ["a"])


def test_a_module_that_cannot_be_imported_names_the_line(module: Path) -> None:
    (module.parent / "my_broken_scorer.py").write_text("x = 1\nraise ValueError('not today')\n")
    with pytest.raises(
        D3POError, match=r"not today, in .*my_broken_scorer.py line 2\); is it in the project folder or on PYTHONPATH"
    ):
        check_scorer("my_broken_scorer:score", ScoringConfig())
    with pytest.raises(D3POError, match=r"\(ModuleNotFoundError: No module named 'nowhere_at_all'\)"):
        check_scorer("nowhere_at_all:score", ScoringConfig())
