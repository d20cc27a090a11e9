"""Ask a server what the child says, over the OpenAI API, and compare every token with Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from openai import OpenAI
from transformers import GenerationConfig

GENERATED = 16
# Largest difference of a token's log probability; float32 on both sides, with sums in another order.
TOLERANCE = 1e-3
PROMPTS = (
    "Hello",
    "The three largest cities of Japan are",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969, two astronauts walked on the Moon. 12345 people watched; it's said that",
)
LONG = " ".join(f"Line {i}: the quick brown fox jumps over the lazy dog number {i * 7}." for i in range(40))


class Different(AssertionError):
    """The server's answer is not what Transformers computes."""


@dataclass(frozen=True)
class Answer:
    """A completion: its text, and the log probability of every generated token."""

    text: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Expected:
    """What the child says in Transformers."""

    model: Any
    tokenizer: Any

    def answer(self, prompt: str) -> Answer:
        """The greedy continuation."""
        ids = torch.tensor([self.tokenizer(prompt).input_ids])
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=GENERATED, pad_token_id=0, eos_token_id=self.tokenizer.eos_token_id
        )
        made = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        logprobs = tuple(float(step[0].float().log_softmax(-1).max()) for step in made.logits)
        return Answer(self.tokenizer.decode(made.sequences[0, ids.shape[1] :], skip_special_tokens=True), logprobs)

    @cached_property
    def answers(self) -> dict[str, Answer]:
        return {prompt: self.answer(prompt) for prompt in (*PROMPTS, LONG)}


def _plain(text: str) -> str:
    """Servers render bytes that are no whole character in different ways."""
    return "".join(c for c in text if c.isascii())


@dataclass(frozen=True)
class Client:
    """A server's completions."""

    url: str

    @cached_property
    def _api(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", timeout=600, max_retries=0)

    def complete(self, prompt: str, **more: Any) -> Any:
        # llama-cpp-python's server would penalize repeated tokens by default; vLLM has another name for that.
        plain = {"repeat_penalty": 1.0, "repetition_penalty": 1.0}
        return self._api.completions.create(
            model="child", prompt=prompt, max_tokens=GENERATED, temperature=0, extra_body=plain, **more
        )

    def answer(self, prompt: str) -> Answer:
        choice = self.complete(prompt, logprobs=1).choices[0]
        return Answer(choice.text, tuple(choice.logprobs.token_logprobs))

    def streamed(self, prompt: str) -> str:
        return "".join(part.choices[0].text for part in self.complete(prompt, stream=True) if part.choices)


def compare(url: str, expected: Expected) -> str:
    """Ask one prompt after another, all at once, a long one, and one as a stream.

    Returns:
        What was equal, in words.

    Raises:
        Different: Something was not.
    """
    client, largest, count = Client(url), 0.0, 0
    for prompt in (*PROMPTS, LONG):
        difference, tokens = _check(prompt, client.answer(prompt), expected.answers[prompt], "alone")
        largest, count = max(largest, difference), count + tokens
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        for prompt, answer in zip(PROMPTS, threads.map(client.answer, PROMPTS), strict=True):
            largest = max(largest, _check(prompt, answer, expected.answers[prompt], "together with others")[0])
    for prompt in PROMPTS[:2]:
        if _plain(client.streamed(prompt)) != _plain(client.answer(prompt).text):
            raise Different(f"{prompt!r}: streamed, the text is another.")
    return f"{count} tokens equal, log probabilities within {largest:.0e}"


def _check(prompt: str, answer: Answer, wanted: Answer, how: str) -> tuple[float, int]:
    pairs = list(zip(answer.logprobs, wanted.logprobs, strict=False))
    difference = max((abs(a - b) for a, b in pairs), default=float("inf"))
    ended_early = len(pairs) < len(wanted.logprobs) - 1  # servers leave out the token that ends a text
    if ended_early or difference > TOLERANCE or not _plain(wanted.text).startswith(_plain(answer.text)):
        raise Different(
            f"{prompt[:30]!r} {how}: {answer.text!r} instead of {wanted.text!r}, log probabilities differ by "
            f"{difference:.1e}"
        )
    return difference, len(pairs)


def lines(results: dict[str, dict[str, str]], columns: list[str]) -> Iterator[str]:
    """A Markdown table of results by child and column."""
    yield "| child | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for child, cells in results.items():
        yield f"| {child} | " + " | ".join(cells.get(column, "not run") for column in columns) + " |"
