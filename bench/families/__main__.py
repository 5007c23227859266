"""Makes and tries every family, and writes docs/families.md: python -m families [FAMILY...].

One process a family at most 9 GiB large: a family whose sizes are not made small must not take the machine along. It is
split off one that has everything imported.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path

from engine.guards import hide_broken_torchvision

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "families.md"
_MOST_BYTES = 9 * 2**30
_LIMIT_S = 600
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CHECKS = (
    *("verdict", "exact count", "lora", "qlora", "dora", "pissa", "rslora", "resume to the bit", "stock PEFT"),
    *("merge", "generate"),
)
_ABOUT = """# Every family in small

Written by `make families`; nothing here is written by hand. transformers {version}. For each family that
predicts the next token, and each of pictures and text that is tuned on text, a model of random weights was made small,
and on it: the verdict of the memory estimate, parameters and trained parameters counted exactly before loading, three
steps with each method, a run stopped and resumed that gives the same bytes, the adapter in stock PEFT and the merged
model in stock transformers with the same logits (fp32, within 2e-4 of the largest), and an answer.

{good} of {tried} families that could be made small pass everything; {made} of {known} could be made. {commits}

| family | class's attention | {heads} |
|---|---|{lines}|
"""


def main() -> int:
    """Try the families that are named, or all, and write the table if all were tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help="keep each result here, a line each, and go on from what is there")
    chosen = parser.parse_args()
    if chosen.one:
        return _one(chosen.one)
    os.environ |= _QUIET
    warnings.simplefilter("ignore")
    hide_broken_torchvision()
    import engine.warming
    from families.small_models import families
    from families.trial import try_family  # noqa: F401 - so that the processes that are split off have it

    engine.warming.warm_up()
    names = chosen.family or families()
    results, commit = _kept(chosen.results), _commit()
    for number, name in enumerate(names, 1):
        if name not in results:
            started = time.monotonic()
            results[name] = _try_split_off(name) | {"commit": commit}
            if chosen.results is not None:
                with chosen.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[name]) + "\n")
            print(
                f"{number}/{len(names)} {name} {time.monotonic() - started:.0f} s {_short(results[name])}", flush=True
            )
    if not chosen.family:
        TABLE.write_text(_table([results[name] for name in names]), encoding="utf-8")
    return 0


def _commit() -> str:
    """Return the commit that is tried; nothing where git does not say."""
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip()


def _by_commit(rows: list[dict[str, object]]) -> str:
    """Say at which commits the rows were made: they are not all of one where an earlier run's are kept."""
    named: dict[str, list[str]] = {}
    for row in rows:
        named.setdefault(str(row.get("commit") or "an unknown commit"), []).append(str(row["family"]))
    most = max(named, key=lambda commit: len(named[commit]))
    said = [f"Made at {most}"] + [f"at {commit}: {', '.join(of)}" for commit, of in named.items() if commit != most]
    return "; ".join(said) + "."


def _kept(path: Path | None) -> dict[str, dict[str, object]]:
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {row["family"]: row for row in rows}


def try_apart(name: str) -> dict[str, object]:
    """Try a family in a process of its own; return what it says, or how it ended."""
    environment = {**os.environ, **_QUIET, "PYTHONWARNINGS": "ignore", "PYTHONPATH": "../bench"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "families", "--one", name],
            cwd=ROOT / "backend", env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"family": name, "not_made": f"took longer than {_LIMIT_S} s", "results": {}}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if lines:
        row: dict[str, object] = json.loads(lines[-1])
        return row
    return {"family": name, "not_made": f"ended with {done.returncode}: {done.stderr[-200:]}", "results": {}}


def _try_split_off(name: str) -> dict[str, object]:
    """Try a family in a process that is split off this one, which has computed nothing; return what it says."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if child == 0:
            ended = 1
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(log.fileno(), 2)
                signal.alarm(_LIMIT_S)
                ended = _one(name)
                sys.stdout.flush()
            except BaseException:  # noqa: BLE001 - nothing may go on in this process as if it were the first
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(ended)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        lines = [line for line in said if line.startswith("{")]
        if lines:
            row: dict[str, object] = json.loads(lines[-1])
            return row
        log.seek(0)
        code = os.waitstatus_to_exitcode(status)
        why = f"took longer than {_LIMIT_S} s" if code == -signal.SIGALRM else f"ended with {code}: {log.read()[-200:]}"
    return {"family": name, "not_made": why, "results": {}}


def _one(name: str) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    hide_broken_torchvision()
    from engine.dora import use_blocks
    from families.small_models import make_small
    from families.trial import try_family
    from tests.support.tiny_model import copy_tiny_model

    use_blocks()
    with tempfile.TemporaryDirectory() as scratch:
        copy_tiny_model(Path(scratch, "tokenizer"))
        folder = Path(scratch, "model")
        try:
            make_small(name, folder, Path(scratch, "tokenizer"))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is why there is no small model
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(json.dumps({"family": name, "not_made": why, "results": {}}))
            return 0
        print(try_family(name, folder, Path(scratch, "runs")).as_json())
        shutil.rmtree(folder)
    return 0


def _short(row: dict[str, object]) -> str:
    if "not_made" in row:
        return f"not made: {row['not_made']}"
    bad = {name: why for name, why in results_of(row).items() if why != "yes"}
    return "yes" if not bad else str(bad)


def results_of(row: dict[str, object]) -> dict[str, str]:
    """Return what came of each check."""
    results = row["results"]
    assert isinstance(results, dict)
    return results


def _table(rows: list[dict[str, object]]) -> str:
    made = [row for row in rows if "not_made" not in row]
    good = [row for row in made if all(results_of(row).get(name) == "yes" for name in CHECKS)]
    head = _ABOUT.format(
        version=version("transformers"), good=len(good), tried=len(made), made=len(made), known=len(rows),
        commits=_by_commit(rows), heads=" | ".join(CHECKS), lines="|".join("---" for _ in CHECKS),
    )  # fmt: skip
    notes: list[str] = []
    lines = []
    for row in made:
        cells = []
        for name in CHECKS:
            why = results_of(row).get(name, "-")
            if why not in ("yes", "-"):
                notes.append(f"{row['family']}, {name}: {why}")
                why = f"no ({len(notes)})"
            cells.append(why)
        lines.append(f"| {row['family']} | {row['attention']} | {' | '.join(cells)} |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    left_out = [f"- {row['family']}: {row['not_made']}" for row in rows if "not_made" in row]
    parts = [head + "\n".join(lines), "## What did not go", *["\n".join(numbered)], "## Not made small"]
    return "\n\n".join([*parts, "\n".join(left_out)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
