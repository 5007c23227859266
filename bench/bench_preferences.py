"""The loss curves of DPO and KTO on the embedded model, by the engine and by TRL's trainers.

    python bench/bench_preferences.py

It prints the largest relative difference of a step's loss, and exits with 1 if it is beyond 1e-5. Tokens, order,
adapter, optimizer and schedule are the same. All rows are in one batch, since KTO compares the answers of a batch. ORPO
is not compared: TRL's takes the cross-entropy of the prompt too, where the paper has the answer's alone. It takes some
minutes.
"""

import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "backend"))

from engine.guards import hide_broken_torchvision

hide_broken_torchvision()

from services.models.embedded import EmbeddedModel
from tests.support.preferences_in_trl import config_for, losses_in_trl, rows_for
from tests.support.three_ways import engine_losses

TOLERANCE = 1e-5


def main() -> int:
    """Run each objective both ways."""
    logging.disable(logging.WARNING)
    apart = 0.0
    print(f"{'objective':9} {'first':>9} {'last':>9} {'TRL':>9}")
    with tempfile.TemporaryDirectory() as scratch:
        path = EmbeddedModel(ROOT / ".cache", Path(scratch)).prepare(lambda stage, fraction: None)
        for objective in ("dpo", "kto"):
            config = config_for(objective, learning_rate=5e-4)
            rows = rows_for(path, config)
            ours, trl = engine_losses(path, config, rows), losses_in_trl(path, config, rows, Path(scratch))
            difference = max(abs(one / other - 1) for one, other in zip(ours, trl, strict=True))
            apart = max(apart, difference)
            print(f"{objective:9} {ours[0]:9.6f} {ours[-1]:9.6f} {difference:9.1e}", flush=True)
    print(f"largest difference {apart:.1e}, allowed {TOLERANCE:.0e}")
    return 0 if apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
