"""Log-likelihoods of several continuations of the same context, which the model reads once.

lm-eval runs the context again for every choice of a question. Here contexts of the same length are run together, and
the choices of each then go on from its cache. Nothing is padded on the left, so no mask and no positions are needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from layersmith.execution.exchange import tolerance

# Log-likelihood in nats, and whether the continuation is what greedy decoding gives.
Answer = tuple[float, bool]


@dataclass(frozen=True)
class Question:
    """A context and its continuations, in token ids.

    Attributes:
        context: At least two tokens.
        continuations: The continuations.
        places: Where their answers belong among those of all requests.
    """

    context: tuple[int, ...]
    continuations: Sequence[Sequence[int]]
    places: Sequence[int]


def questions(requests: Sequence[tuple[Any, list[int], list[int]]], longest: int) -> list[Question]:
    """Contexts that several requests have; not those that have to be cut to ``longest`` tokens.

    Args:
        requests: A key, the context and the continuation of each request.
        longest: The model's longest sequence.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for i, (_, context, _) in enumerate(requests):
        places.setdefault(tuple(context), []).append(i)
    made = [Question(c, [requests[i][2] for i in here], here) for c, here in places.items()]
    return [
        question
        for question in made
        if len(question.places) > 1
        and len(question.context) > 1
        and len(question.context) + max(map(len, question.continuations)) <= longest
    ]


def in_batches(asked: Sequence[Question], sequences: int) -> Iterator[list[Question]]:
    """Questions with contexts of the same length and as many continuations, the longest first.

    Args:
        asked: The questions.
        sequences: Number of continuations in a batch, at most; but at least one question is in it.
    """
    alike: dict[tuple[int, int], list[Question]] = {}
    for question in asked:
        alike.setdefault((len(question.context), len(question.continuations)), []).append(question)
    for (_, count), those in sorted(alike.items(), key=lambda item: item[0], reverse=True):
        for i in range(0, len(those), size := max(1, sequences // count)):
            yield those[i : i + size]


@torch.no_grad()
def answers(model: PreTrainedModel, batch: Sequence[Question]) -> dict[int, Answer] | None:
    """The answers to a batch of :func:`in_batches`, by their places; None if the model's cache cannot be repeated."""
    device = model.device
    contexts = torch.tensor([question.context for question in batch], device=device)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache: Any = getattr(model(input_ids=contexts[:, :-1], use_cache=True, **last_only), "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):
        return None
    count = len(batch[0].continuations)
    cache.batch_repeat_interleave(count)
    continuations = [torch.tensor(c, device=device) for question in batch for c in question.continuations]
    following = torch.nn.utils.rnn.pad_sequence(continuations, batch_first=True)
    read = torch.cat([contexts[:, -1:].repeat_interleave(count, 0), following[:, :-1]], 1)
    logits = model(input_ids=read, past_key_values=cache, use_cache=True).logits.float()
    likelihoods = logits.log_softmax(-1).gather(-1, following[..., None])[..., 0]
    is_greedy = logits.argmax(-1) == following
    result: dict[int, Answer] = {}
    places = [place for question in batch for place in question.places]
    for i, (place, continuation) in enumerate(zip(places, continuations, strict=True)):
        n = len(continuation)
        result[place] = float(likelihoods[i, :n].sum()), bool(is_greedy[i, :n].all())
    return result


def agree(some: Sequence[Answer], others: Sequence[Answer], dtype: torch.dtype) -> bool:
    """Whether answers are the same but for rounding; ties in greedy decoding may go either way."""
    return all(abs(a - b) <= tolerance(dtype) * max(10.0, abs(b)) for (a, _), (b, _) in zip(some, others, strict=True))
