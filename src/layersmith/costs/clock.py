"""Models against the clock, through Transformers' own ``generate``, all of a session in turns.

A time is told from rounds by a two-way fit of medians: how long a model takes, times how slow the machine was in that
round. A machine that is busy for a while thus slows all alike.
"""

from __future__ import annotations

import logging
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from layersmith.costs.counted import Workload
from layersmith.costs.times import ZERO, Timing
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.run.runtime import Runtime

# Fewer rounds tell nothing of the noise.
LEAST_ROUNDS = 3
# What others left in the caches makes the first tokens slow for about so long.
_SETTLING_SECONDS = 0.02
# A token whose cache is so much longer than the prompt, or more, has a run of its own.
_LONGER = 1.05
_SEED = 0


class _Marks(StoppingCriteria):
    """Notes when each token is there."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, [0.0]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, when a device has done what it was given.

    One thread on a CPU is told its own time, so that what others take of the machine is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


@dataclass(frozen=True)
class Served:
    """How a model is run when it is timed.

    Attributes:
        workload: batch, prompt, tokens that are written.
        steps: tokens of which the median is taken.
        backend: as in the recipe.
        vocab_size: random tokens are below it.
        warm: whether it first runs untimed each time, so that weights that others do not share are in the caches, as
            where it is served alone.
    """

    workload: Workload
    steps: int
    backend: str
    vocab_size: int
    warm: bool = False

    def once(self, model: PreTrainedModel, known: Timing | None = None) -> Timing:
        """Seconds to the first token, and of one more when half of those that are written are there.

        Args:
            model: that runs.
            known: about what it takes, if that is known: then tokens come first that are not timed, until it runs as
                it does after many.
        """
        prompt, room = self.workload.prompt, self.workload.generated - self.steps
        settling = 0 if known is None else max(0, min(int(_SETTLING_SECONDS / max(known.decode, 1e-9)), room // 2))
        if self.warm:
            self._tokens(model, prompt, 1)
        # The middle of the tokens that are timed is the middle of those that are written.
        start = max(1, prompt + room // 2 - settling)
        if start <= prompt * _LONGER:
            first, *steps = self._tokens(model, prompt, settling + self.steps + 1)
        else:
            first, *_ = self._tokens(model, prompt, 1)
            _, *steps = self._tokens(model, start, settling + self.steps + 1)
        return Timing(first, float(np.median(steps[settling:])))

    def _tokens(self, model: Any, prompt: int, tokens: int) -> list[float]:
        """Seconds that each token took."""
        generator = torch.Generator().manual_seed(_SEED)
        shape = (self.workload.batch, prompt)
        ids = torch.randint(0, self.vocab_size, shape, generator=generator).to(model.device)
        marks = _Marks(model.device)
        marks.times[0] = now(model.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._config(tokens),
            stopping_criteria=StoppingCriteriaList([marks]),
        )
        return [float(t) for t in np.diff(marks.times)]

    def _config(self, tokens: int) -> GenerationConfig:
        own: dict[str, Any] = {"disable_compile": True}
        if self.backend == "compile":
            own = {"cache_implementation": "static", "compile_config": _everywhere()}
        return GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0, **own
        )


def _everywhere() -> Any:
    from transformers import CompileConfig

    config: Any = CompileConfig(fullgraph=False)
    config._compile_all_devices = True  # what a GPU gets by itself, on a CPU too
    return config


@contextmanager
def quietly(backend: str) -> Iterator[None]:
    """Without what Transformers says of generation; as many compiled models at once as are timed."""
    logger = logging.getLogger("transformers.generation")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers():
            if backend == "compile":
                from torch._dynamo import config

                with config.patch(recompile_limit=4096, accumulated_recompile_limit=16384):
                    yield
            else:
                yield
    finally:
        logger.setLevel(level)


def in_turns(
    models: Sequence[Any],
    served: Served,
    rounds: int,
    seconds: float,
    advance: Callable[[float], None] = lambda rounds: None,
    repeats: Sequence[int] | None = None,
) -> tuple[list[Timing], list[Timing]]:
    """Time models in rounds of all of them, after one that warms up: times, and their standard errors.

    Args:
        models: that are timed.
        served: how they run.
        rounds: at most.
        seconds: about so many for all rounds, but a few rounds are always made.
        advance: told of rounds.
        repeats: how often each model runs in a round; default: once. A parent, beside which all others are told, is
            worth more than one.
    """
    places = [k for k, times in enumerate(repeats or [1] * len(models)) for _ in range(times)]
    order = list(range(len(places)))
    rng = random.Random(_SEED)
    with quietly(served.backend):
        known = [served.once(model) for model in models]
        advance(1)
        began = time.monotonic()
        seen: list[list[Timing]] = []
        while len(seen) < max(rounds, LEAST_ROUNDS):
            used = time.monotonic() - began
            if len(seen) >= LEAST_ROUNDS and used + used / len(seen) > seconds:
                break
            rng.shuffle(order)
            row = [ZERO] * len(places)
            for k in order:
                row[k] = served.once(models[places[k]], known[places[k]])
            seen.append(row)
            advance(1)
    prefill, decode = (
        told_apart([[getattr(t, phase) for t in row] for row in seen]) for phase in ("prefill", "decode")
    )
    own, errors = (
        [Timing(p, d) for p, d in zip(first, second, strict=True)]
        for first, second in zip(prefill, decode, strict=True)
    )
    roots = [places.count(k) ** -0.5 for k in range(len(models))]
    errors = [error.scaled(root, root) for error, root in zip(_together(errors, places), roots, strict=True)]
    return _together(own, places), errors


def _together(values: Sequence[Timing], places: Sequence[int]) -> list[Timing]:
    """Means over what is of the same model."""
    found = []
    for k in range(max(places) + 1):
        own = [value for value, place in zip(values, places, strict=True) if place == k]
        found.append(sum(own, ZERO).scaled(1 / len(own), 1 / len(own)))
    return found


def told_apart(seconds: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Times of models, and their standard errors, from times ``[R, M]`` in rounds.

    A time is the model's own times the round's, by medians (Tukey's polish). A round counts as it usually was: the
    median round is 1.
    """
    logs = np.log(np.array(seconds))
    own, rounds = np.median(logs, 0), np.zeros(len(logs))
    for _ in range(10):
        rounds = np.median(logs - own, 1)
        own = np.median(logs - rounds[:, None], 0)
    # A median's error is 1.25 times that of a mean; the deviation is told from the median of absolute ones.
    deviation = 1.4826 * np.median(np.abs(logs - own - rounds[:, None]), 0)
    own = np.exp(own + np.median(rounds))
    return own.tolist(), (own * 1.2533 * deviation / np.sqrt(len(logs))).tolist()


def device_name(runtime: Runtime) -> str:
    """The device that is timed, in words; times of equal names are alike."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{cpu}, {threads} thread{'s' if threads > 1 else ''}"
