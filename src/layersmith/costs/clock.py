"""Models against the clock: time to first token and time per token through Transformers' own ``generate``.

All models of a session are timed in rounds, in shuffled order. Times are estimated from the rounds by median polish
(model effect x effect of the machine's state in that round), so a machine that is busy for a while slows all models
alike and the ratios between them hold.
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

from layersmith import upstream
from layersmith.costs.budget import Workload
from layersmith.costs.times import ZERO, Timing
from layersmith.model_descriptor.stock import quiet_transformers
from layersmith.run.runtime import Runtime

# With fewer rounds there is no estimate of the noise.
LEAST_ROUNDS = 3
# Repeats of one model that differ by more than this share of their median call the machine busy.
BUSY_SPREAD = 1 / 3
# After a prefill the caches hold other data: the first tokens are slow for about this long and are not timed.
_SETTLING_SECONDS = 0.02
# The timed tokens get a run of their own if their cache is longer than the prompt by this factor or more.
_LONGER = 1.05
_SEED = 0


@dataclass(frozen=True)
class Measurement:
    """What one model takes, and how reliable that is.

    Attributes:
        time: Seconds, by median polish.
        error: Standard errors of the time, in seconds.
        spread: Distance between the 10th and the 90th percentile of the repeats, as they were timed, over their median.
    """

    time: Timing
    error: Timing
    spread: Timing

    @property
    def busy(self) -> bool:
        """Whether other work on the machine disturbed the repeats, so that the time is not to be relied on."""
        return max(self.spread.prefill, self.spread.decode) > BUSY_SPREAD


class _TokenClock(StoppingCriteria):
    """Records the time at which each token is complete; never stops the generation."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, [0.0]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, once the device has finished its queue.

    A single CPU thread is timed in thread time, which leaves out what other processes take; all else in wall time.
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
        workload: Batch, length of the prompt, and number of generated tokens.
        steps: Number of decode steps of which the median is taken.
        backend: ``eager`` or ``compile``, as in the recipe.
        vocab_size: Random token ids are below this.
        warm: Whether the model first runs untimed each time. Its weights are then in the caches, as they are when it is
            served alone.
    """

    workload: Workload
    steps: int
    backend: str
    vocab_size: int
    warm: bool = False

    def once(self, model: PreTrainedModel, known: Timing | None = None) -> Timing:
        """Seconds to the first token, and of one decode step when half of the generated tokens exist.

        Args:
            model: Model to run.
            known: Roughly what the model takes. If given, tokens are generated untimed first until the caches settle.
        """
        prompt, room = self.workload.prompt, self.workload.generated - self.steps
        settling = 0 if known is None else max(0, min(int(_SETTLING_SECONDS / max(known.decode, 1e-9)), room // 2))
        if self.warm:
            self._tokens(model, prompt, 1)
        # The middle of the timed tokens is the middle of the generated ones.
        start = max(1, prompt + room // 2 - settling)
        if start <= prompt * _LONGER:
            first, *steps = self._tokens(model, prompt, settling + self.steps + 1)
        else:
            first, *_ = self._tokens(model, prompt, 1)
            _, *steps = self._tokens(model, start, settling + self.steps + 1)
        return Timing(first, float(np.median(steps[settling:])))

    def _tokens(self, model: Any, prompt: int, tokens: int) -> list[float]:
        """Seconds that each of ``tokens`` generated tokens took."""
        generator = torch.Generator().manual_seed(_SEED)
        shape = (self.workload.batch, prompt)
        ids = torch.randint(0, self.vocab_size, shape, generator=generator).to(model.device)
        token_clock = _TokenClock(model.device)
        token_clock.times[0] = now(model.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._config(tokens),
            stopping_criteria=StoppingCriteriaList([token_clock]),
        )
        return [float(t) for t in np.diff(token_clock.times)]

    def _config(self, tokens: int) -> GenerationConfig:
        compilation: dict[str, Any] = {"disable_compile": True}
        if self.backend == "compile":
            compilation = {"cache_implementation": "static", "compile_config": upstream.compile_on_any_device()}
        return GenerationConfig(
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            **compilation,
        )


@contextmanager
def quietly(backend: str) -> Iterator[None]:
    """Silence Transformers' messages about generation, and let torch keep every timed model compiled."""
    generation_logger = logging.getLogger("transformers.generation")
    level = generation_logger.level
    generation_logger.setLevel(logging.ERROR)
    try:
        with quiet_transformers():
            if backend == "compile":
                with upstream.many_compiled_models():
                    yield
            else:
                yield
    finally:
        generation_logger.setLevel(level)


def time_in_turns(
    models: Sequence[Any],
    served: Served,
    rounds: int,
    seconds: float,
    advance: Callable[[float], None] = lambda rounds: None,
    repeats: Sequence[int] | None = None,
) -> list[Measurement]:
    """Time models in rounds of all of them, after one round that warms up.

    Args:
        models: Models to time.
        served: How they run.
        rounds: Maximum number of rounds.
        seconds: Approximate limit for all rounds; ``LEAST_ROUNDS`` are always made.
        advance: Called with the number of rounds just done.
        repeats: Number of runs of each model in a round, once by default. The reference of a comparison is worth more
            than one.
    """
    slots = [k for k, times in enumerate(repeats or [1] * len(models)) for _ in range(times)]
    order = list(range(len(slots)))
    rng = random.Random(_SEED)
    with quietly(served.backend):
        known = [served.once(model) for model in models]
        advance(1)
        began = time.monotonic()
        timed_rounds: list[list[Timing]] = []
        while len(timed_rounds) < max(rounds, LEAST_ROUNDS):
            used = time.monotonic() - began
            if len(timed_rounds) >= LEAST_ROUNDS and used + used / len(timed_rounds) > seconds:
                break
            rng.shuffle(order)
            row = [ZERO] * len(slots)
            for k in order:
                row[k] = served.once(models[slots[k]], known[slots[k]])
            timed_rounds.append(row)
            advance(1)
    return _measurements(timed_rounds, slots)


def _measurements(rounds: Sequence[Sequence[Timing]], slots: Sequence[int]) -> list[Measurement]:
    """A measurement of each model from times ``[rounds][slots]``; ``slots`` says which model ran in each slot."""
    by_phase = {}
    for phase in ("prefill", "decode"):
        seconds = np.array([[getattr(timing, phase) for timing in row] for row in rounds])
        times, errors = median_polish(seconds)
        rows = []
        for k in range(max(slots) + 1):
            of_model = [slot for slot, model in enumerate(slots) if model == k]
            low, middle, high = np.quantile(seconds[:, of_model], [0.1, 0.5, 0.9])
            mean_time, mean_error = (
                sum(values[slot] for slot in of_model) * (1 / len(of_model)) for values in (times, errors)
            )
            rows.append((mean_time, mean_error * len(of_model) ** -0.5, float((high - low) / middle)))
        by_phase[phase] = rows
    return [
        Measurement(*(Timing(p, d) for p, d in zip(prefill, decode, strict=True)))
        for prefill, decode in zip(by_phase["prefill"], by_phase["decode"], strict=True)
    ]


def median_polish(seconds: Any) -> tuple[list[float], list[float]]:
    """Times of models and their standard errors, from times ``[R, M]`` of M models in R rounds.

    With logs, ``log seconds[r, m] = time[m] + state[r] + noise``: both effects are estimated by taking out medians of
    rows and columns in turn. A round counts as the machine usually was: the median round has state 0.

    Source: Tukey, "Exploratory Data Analysis" (1977).
    """
    logs = np.log(np.array(seconds))
    models, states = np.median(logs, 0), np.zeros(len(logs))
    for _ in range(10):
        states = np.median(logs - models, 1)
        models = np.median(logs - states[:, None], 0)
    # 1.4826 x the median absolute residual estimates the standard deviation of normal noise; the standard error of a
    # median is 1.2533 times that of a mean.
    deviation = 1.4826 * np.median(np.abs(logs - models - states[:, None]), 0)
    times = np.exp(models + np.median(states))
    return times.tolist(), (times * 1.2533 * deviation / np.sqrt(len(logs))).tolist()


def device_name(runtime: Runtime) -> str:
    """Name of the timed device. Times on devices of the same name are comparable."""
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
