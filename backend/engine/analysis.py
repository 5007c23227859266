"""The `analyze` command: what a fine-tune would learn from a dataset, with the tokenizer that it would use."""

import math
from array import array
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from domain.peft.objectives import SPECS as OBJECTIVES
from domain.protocol import Analyze, Progress
from domain.results import (
    DatasetFigures,
    EpochFigures,
    Finding,
    Findings,
    LeftOut,
    LengthBin,
    Piece,
    Refusal,
    RenderedRow,
    TokenFigures,
)
from engine.batches import FALLBACK_TEMPLATE, best_fit, read_rows
from engine.channel import Channel
from engine.errors import BadData, BadModel
from engine.examples import ExampleTokenizer, conversations, teaches
from engine.lost_thinking import lost_thinking
from engine.optimizer import planned_steps
from engine.rows import IGNORED, Row
from engine.served_tokenizer import complete_tokenizer
from engine.transformers_backend import load_tokenizer

_BINS = 20
_EXAMPLES = 10  # rows named for each finding
_LOOKED_AT = 200  # rows in which it is looked for what the template drops: a few renderings more each
_EXAMPLE_CHARACTERS = 20_000
_PROGRESS_ROWS = 100


def analyze(command: Analyze, channel: Channel) -> DatasetFigures:
    """Tokenize every row as training would.

    Raises:
        BadModel: The tokenizer cannot be loaded, or its chat template does not come to an end.
    """
    path = Path(command.model_path)
    try:
        tokenizer = load_tokenizer(path)
    except (OSError, ValueError, KeyError) as error:
        raise BadModel(f"{path.name} has no tokenizer that can be loaded: {error}") from error
    complete_tokenizer(tokenizer)
    findings = _Findings(command, tokenizer)
    for number, row in enumerate(read_rows(Path(command.dataset_path))):
        if number % _PROGRESS_ROWS == 0:
            channel.check_stop(command.request_id)
            fraction = min(1.0, number / max(1, command.rows))
            channel.emit(Progress(request_id=command.request_id, stage="tokenizing", fraction=fraction))
        findings.add(number, row)
    return findings.result()


class _Findings:
    """Counts in bounded memory: 12 bytes a row."""

    def __init__(self, command: Analyze, tokenizer: Any) -> None:
        self._config, self._tokenizer = command.config, tokenizer
        self._examples_of = ExampleTokenizer(tokenizer, command.config)
        self._rows = self._examples_of.rows
        self._wanted_example = command.example_row
        self._lengths, self._learned, self._kept = array("I"), array("I"), array("I")
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[int]] = {}
        self._refusals: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._example: tuple[int, dict[str, Any]] | None = None
        self._specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def add(self, number: int, row: dict[str, Any]) -> None:
        self._counts["rows"] += 1
        try:
            wholes = [(self._rows.whole(number, one), one) for one in conversations(row)]
            for _, one in wholes:
                self._look_for_losses(number, one)
        except BadData as error:
            self._note("refused", number)
            self._refusals[error.message.partition(": ")[2]] += 1
            return
        examples = self._examples_of.cut(wholes, row)
        learning = [example for example in examples if teaches(example)]
        self._lengths.extend(len(whole.ids) for whole, _ in wholes)
        self._learned.append(sum(sequence.trained_tokens for example in learning for sequence in example))
        self._kept.extend(sum(len(sequence.ids) for sequence in example) for example in learning)
        for at, (whole, _) in enumerate(wholes):
            self._judge(number, whole, [example[at] for example in examples], learned=bool(learning))
        chosen = number == self._wanted_example if self._wanted_example is not None else bool(learning)
        if chosen and self._example is None:
            self._example = (number, row)

    def _judge(self, number: int, whole: Row, pieces: list[Row], *, learned: bool) -> None:
        if pieces[0].truncated:
            self._note("truncated", number)
            if whole.trained_tokens and not learned:
                self._note("answer_lost", number)
            elif pieces[0].trained_tokens < whole.trained_tokens:
                self._note("answer_cut", number)
        if len(pieces) > 1:
            self._note("split", number)
        if not learned:
            self._note("nothing_to_learn", number)
            return
        last = next((label for label in reversed(whole.labels) if label != IGNORED), None)
        if last not in self._specials:
            self._note("without_end_mark", number)

    def _look_for_losses(self, number: int, row: dict[str, Any]) -> None:
        if "messages" in row and self._counts["looked_at"] < _LOOKED_AT:
            self._counts["looked_at"] += 1
            self._left_out.update(self._rows.renderer.left_out(number, row))
        if "messages" in row:
            lost = lost_thinking(self._rows.renderer, number, row)
            if lost.earlier:
                self._note("earlier_thinking_left_out", number)
            if lost.last:
                self._note("last_thinking_left_out", number)

    def _note(self, finding: str, number: int) -> None:
        self._counts[finding] += 1
        examples = self._examples.setdefault(finding, [])
        if len(examples) < _EXAMPLES:
            examples.append(number)

    def result(self) -> DatasetFigures:
        findings = {
            name: Finding(rows=self._counts[name], examples=self._examples.get(name, []))
            for name in Findings.model_fields
        }
        return DatasetFigures(
            rows=self._counts["rows"],
            findings=Findings(**findings),
            refusals=[Refusal(reason=reason, rows=rows) for reason, rows in self._refusals.most_common(_EXAMPLES)],
            left_out=[LeftOut(what=what, rows=rows) for what, rows in sorted(self._left_out.items())],
            looked_at_rows=self._counts["looked_at"],
            tokens=_figures(self._lengths),
            trained_tokens=_figures(self._learned),
            histogram=_histogram(self._lengths),
            epoch=self._epoch(),
            template="none: a plain one is used" if self._tokenizer.chat_template == FALLBACK_TEMPLATE else "model",
            example=self._shown(0),
            worse_example=self._shown(1),
        )

    def _epoch(self) -> EpochFigures:
        """Count one pass over the data as the trainer makes it, and all passes."""
        config = self._config
        sequences = len(self._kept)
        if config.packing:
            capacity = config.max_seq_length * OBJECTIVES[config.objective].sequences
            sequences = len(best_fit(self._kept, capacity))
        batches = -(-sequences // config.batch_size)
        steps = planned_steps(config, batches) if batches else 0
        tokens = sum(self._kept)
        return EpochFigures(
            rows=len(self._kept),
            sequences=sequences,
            batches=batches,
            tokens=tokens,
            trained_tokens=sum(self._learned),
            steps=math.ceil(batches / config.gradient_accumulation),
            total_steps=steps,
            total_tokens=round(tokens * steps * config.gradient_accumulation / batches) if batches else 0,
        )

    def _shown(self, which: int) -> RenderedRow | None:
        """Show a row as the model sees it, with its better answer (0) or its worse one (1) if it has two.

        Each piece is learned, not learned, or cut off.
        """
        if self._example is None:
            return None
        number, chosen = self._example
        sequences = conversations(chosen)
        if which >= len(sequences):
            return None
        row = sequences[which]
        encoded = self._rows.encode(number, row)
        count = len(encoded.ids)
        limit = self._config.max_seq_length if "messages" in row else count
        kinds = [(label != IGNORED, at < limit) for at, label in enumerate(encoded.labels)]
        bounds = [0, *(at for at in range(1, count) if kinds[at] != kinds[at - 1]), count]
        places = [start for start, _ in encoded.offsets] + [len(encoded.text)]
        pieces, shown = [], 0
        for low, high in pairwise(bounds):
            text = encoded.text[places[low] : places[high]][: _EXAMPLE_CHARACTERS - shown]
            learned, kept = kinds[low]
            pieces.append(Piece(text=text, trained=learned and kept, cut_off=not kept, tokens=high - low))
            shown += len(text)
        return RenderedRow(row=number, pieces=pieces, complete=shown == len(encoded.text))


def _figures(values: "array[int]") -> TokenFigures:
    ordered = sorted(values) or [0]

    def percentile(share: int) -> int:
        """Return a percentile by the nearest rank, which is the value of some row."""
        return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]

    return TokenFigures(
        total=sum(ordered),
        minimum=ordered[0],
        mean=sum(ordered) / len(ordered),
        maximum=ordered[-1],
        p50=percentile(50),
        p90=percentile(90),
        p95=percentile(95),
        p99=percentile(99),
    )


def _histogram(lengths: "array[int]") -> list[LengthBin]:
    """Count rows by length in at most twenty bins of one width; the last one holds the longest row."""
    if not lengths:
        return []
    width = max(1, math.ceil((max(lengths) + 1) / _BINS))
    counts = Counter(length // width for length in lengths)
    return [
        LengthBin(from_tokens=at * width, to_tokens=(at + 1) * width - 1, rows=counts[at])
        for at in range(max(counts) + 1)
    ]
