"""Proves on a CUDA machine with no network what can only be proved there: `make gpu-check`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "backend"
sys.path.insert(0, str(BACKEND))
