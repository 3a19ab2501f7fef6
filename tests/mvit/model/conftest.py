"""Let the tests of this folder import the golden replay."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "goldens"))
