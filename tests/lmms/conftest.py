"""Tests that need lmms-eval; ``make matrix`` runs them in an environment of its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # official
