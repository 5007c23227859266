"""Proves on a CUDA machine what can only be proved there: `make gpu-check`. It needs no network."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKEND = ROOT / "backend"
sys.path.insert(0, str(BACKEND))
