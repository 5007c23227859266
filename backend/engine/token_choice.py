"""Which token follows, of one answer: its logits processors, its sampling, and its own random numbers."""

from typing import Any

import torch
from transformers import LogitsProcessorList

from engine.answer import Answer


class TokenChoice:
    """Chooses an answer's tokens as the class' own `generate` does for one row.

    Args:
        bare: The model without PEFT's wrapper. Its generation config counts where the answer asks for nothing.
        answer: Its processors come where `generate` puts those of its caller.
        device: Where the logits are.

    Attributes:
        plain: Whether the likeliest token is taken, and nothing looks at the logits or changes them.
        ends: The tokens that end the answer.
    """

    def __init__(self, bare: Any, answer: Answer, device: torch.device) -> None:
        config, _ = bare._prepare_generation_config(answer.config())
        bare._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device, batch_size=1)
        prompt = torch.tensor([answer.prompt_ids], device=device)
        self._processors = bare._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt.shape[1],
            encoder_input_ids=prompt,
            logits_processor=LogitsProcessorList(answer.processors),
            device=device,
        )
        ends = config._eos_token_tensor
        self.ends = frozenset(ends.tolist() if ends is not None else ())
        self.plain = not answer.sampled and not self._processors
        self._generator = _generator(answer.command.seed, device) if answer.sampled else None
        # Only processors read the tokens so far.
        self._ids = torch.nn.functional.pad(prompt, (0, answer.most)) if self._processors else prompt
        self._count = prompt.shape[1]

    @property
    def ids(self) -> torch.Tensor:
        """The prompt and the answer so far, of shape (1, tokens); without the answer where no processor reads them."""
        return self._ids[:, : self._count] if self._processors else self._ids

    def of(self, logits: torch.Tensor) -> int:
        """Choose a token.

        Args:
            logits: 1 × V, of any type. They stay as they are.

        Raises:
            RuntimeError: The probabilities are not finite.
        """
        scores = logits.to(dtype=torch.float32, copy=True)
        if self._processors:
            scores = self._processors(self.ids, scores)
        if self._generator is not None:
            chosen = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator)
        else:
            chosen = scores.argmax(dim=-1, keepdim=True)
        if self._processors:
            self._ids[:, self._count : self._count + 1] = chosen
        self._count += 1
        return int(chosen.item())


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
