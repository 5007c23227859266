"""What people fine-tune for, and the settings that each purpose changes from the defaults."""

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any


class UseCaseId(StrEnum):
    """The purposes a client can name."""

    CHATBOT = "chatbot"
    CODE_GENERATION = "code-generation"
    SUMMARIZATION = "summarization"
    QUESTION_ANSWERING = "question-answering"
    CREATIVE_WRITING = "creative-writing"
    DOMAIN_ADAPTATION = "domain-adaptation"


@dataclass(frozen=True)
class UseCase:
    """A purpose with the settings it asks for and why.

    Attributes:
        rate_factor: What the model's learning rate is multiplied by.
        rate_reason: Why, where it is not one.
    """

    id: UseCaseId
    name: str
    summary: str
    defaults: MappingProxyType[str, Any]
    reasons: MappingProxyType[str, str]
    rate_factor: float
    rate_reason: str


def _use_case(
    id_: UseCaseId, name: str, summary: str, rate_factor: tuple[float, str] = (1.0, ""), **settings: tuple[Any, str]
) -> UseCase:
    return UseCase(
        id_,
        name,
        summary,
        MappingProxyType({key: value for key, (value, _) in settings.items()}),
        MappingProxyType({key: reason for key, (_, reason) in settings.items()}),
        *rate_factor,
    )


# Ranks follow how much must be learned, not how large the model is ("LoRA Without Regret", Thinking Machines
# Lab, 2025: capacity must exceed the information in the data, and rank 16 or 32 holds most instruction sets). Alpha
# stays 32 at every rank, as there: with alpha / r the best learning rate then hardly depends on the rank.
USE_CASES: MappingProxyType[UseCaseId, UseCase] = MappingProxyType(
    {
        case.id: case
        for case in (
            _use_case(
                UseCaseId.CHATBOT,
                "Chatbot",
                "A persona or assistant style, learned from conversations.",
                rank=(16, "style and persona need little capacity"),
                dropout=(0.05, "small conversational sets overfit"),
                epochs=(3.0, "small sets are seen a few times"),
                train_on=("assistant", "every answer of a conversation teaches"),
                max_seq_length=(2048, "several turns"),
            ),
            _use_case(
                UseCaseId.CODE_GENERATION,
                "Code generation",
                "Programs from instructions, or completion in a house style.",
                rank=(32, "syntax and libraries need more capacity than style"),
                dropout=(0.0, "code has little redundancy to drop"),
                epochs=(2.0, "code sets are large"),
                max_seq_length=(4096, "files are long"),
            ),
            _use_case(
                UseCaseId.SUMMARIZATION,
                "Summarization",
                "Short texts from long ones.",
                rank=(16, "the skill is in the base; the form is learned"),
                dropout=(0.05, "outputs are short, so there are few trained tokens"),
                train_on=("last_assistant", "the summary is the last turn"),
                max_seq_length=(4096, "documents are long"),
            ),
            _use_case(
                UseCaseId.QUESTION_ANSWERING,
                "Question answering",
                "Answers from knowledge or from a passage in the prompt.",
                rank=(16, "form more than knowledge"),
                dropout=(0.05, "answers are short, so there are few trained tokens"),
                train_on=("last_assistant", "the answer is the last turn"),
                max_seq_length=(2048, "a passage and a question"),
            ),
            _use_case(
                UseCaseId.CREATIVE_WRITING,
                "Creative writing",
                "A voice or genre, learned from texts.",
                rank=(32, "a voice has many small habits"),
                dropout=(0.1, "keeps it from reciting its examples"),
                rate_factor=(0.5, "a gentler rate keeps the base's variety"),
                max_seq_length=(4096, "scenes are long"),
            ),
            _use_case(
                UseCaseId.DOMAIN_ADAPTATION,
                "Domain adaptation",
                "The vocabulary and facts of a field, learned from its texts.",
                rank=(64, "facts need capacity"),
                dropout=(0.0, "large corpora seen once do not overfit"),
                epochs=(1.0, "large corpora are seen once"),
                train_on=("all", "questions carry the field's vocabulary too"),
                max_seq_length=(4096, "documents are long"),
            ),
        )
    }
)
