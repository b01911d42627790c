"""Load the golden values of the 2023 code, from ../shared beside the checkout. Their texts never
enter this repository.
"""

import gzip
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="golden values of the 2023 code: ../shared/golden is absent"
)


def load(name: str):
    """Return the contents of a gzipped JSON file."""
    return json.loads(gzip.open(GOLDEN / name).read())
