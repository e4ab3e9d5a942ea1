"""The plan of a run: what every step is, as a pure function of the config and the tokens seen. No torch.

Neither the number of processes nor how a step is cut into micro-batches enters. Samples are numbered through the whole
run; a step is a range of numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from k2train.config import ConfigError, PhaseConfig, RopeScalingConfig, RunConfig
from k2train.data.phases import DataPhase
from k2train.train.schedule import Decay, warmup
from k2train.units import count


@dataclass(frozen=True)
class Stretch:
    """Steps of one size, one after the other."""

    first_step: int  # of the run, from 0
    steps: int
    first_sample: int
    first_token: int
    batch: int  # samples a step
    phase: int

    def tokens(self, step: int, *, length: int) -> int:
        """Seen by the run before a step of the stretch, or after its last."""
        return self.first_token + (step - self.first_step) * self.batch * length


@dataclass(frozen=True)
class Phase:
    """A part of the run; see ``PhaseConfig``."""

    index: int
    name: str
    first_step: int
    steps: int
    first_sample: int
    samples: int
    first_token: int
    tokens: int
    sequence_length: int
    micro_batch_size: int
    batches: tuple[int, ...]  # samples a step; several while the batch is ramped up
    weights: Mapping[str, float] | None  # of the data's sources at the beginning; None: the data's own
    final_weights: Mapping[str, float] | None  # at the end, reached linearly in samples
    rope_scaling: RopeScalingConfig | None
    decay: Decay


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    number: int  # from 0; metrics and checkpoints count those that are done
    phase: Phase
    first_sample: int
    samples: int
    first_token: int
    lr_ratio: float  # of each role's peak learning rate

    @property
    def tokens(self) -> int:
        """Of this step."""
        return self.samples * self.phase.sequence_length

    @property
    def tokens_after(self) -> int:
        """That the run has seen when the step is done."""
        return self.first_token + self.tokens

    def micro_batches(self, *, rank: int, processes: int) -> list[range]:
        """The samples of each micro-batch that a rank computes."""
        size = self.phase.micro_batch_size
        starts = range(self.first_sample + rank * size, self.first_sample + self.samples, processes * size)
        return [range(start, start + size) for start in starts]


@dataclass(frozen=True)
class Plan:
    """All steps of a run."""

    phases: tuple[Phase, ...]
    stretches: tuple[Stretch, ...]
    warmup_tokens: int

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.phases[-1].first_step + self.phases[-1].steps

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.phases[-1].first_token + self.phases[-1].tokens

    def step(self, number: int) -> Step:
        """The step of a number from 0 to ``steps`` - 1."""
        assert 0 <= number < self.steps, f"step {number} of a run of {self.steps}"
        stretch = self.stretches[bisect_right(self.stretches, number, key=lambda s: s.first_step) - 1]
        phase = self.phases[stretch.phase]
        first_token = stretch.tokens(number, length=phase.sequence_length)
        after = first_token + stretch.batch * phase.sequence_length
        return Step(
            number,
            phase,
            stretch.first_sample + (number - stretch.first_step) * stretch.batch,
            stretch.batch,
            first_token,
            warmup(after, length=self.warmup_tokens) * phase.decay.ratio(after),
        )

    def tokens_before(self, number: int) -> int:
        """Seen when so many steps are done."""
        return self.step(number).first_token if number < self.steps else self.tokens

    def samples_before(self, number: int) -> int:
        """Seen when so many steps are done."""
        last = self.phases[-1]
        return self.step(number).first_sample if number < self.steps else last.first_sample + last.samples

    def data_phases(self) -> list[DataPhase]:
        """What the training stream reads."""
        return [DataPhase(p.samples, p.sequence_length, p.weights, p.final_weights) for p in self.phases]

    def table(self, *, lr: float) -> list[str]:
        """Lines of text that show the phases.

        Args:
            lr: the peak learning rate.
        """
        rows: list[tuple[str, ...]] = [("phase", "steps", "tokens", "length", "batch", "lr", "data", "rope")]
        rows += [self._row(phase, lr) for phase in self.phases]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _row(self, phase: Phase, lr: float) -> tuple[str, ...]:
        ratios = [phase.decay.before, self.step(phase.first_step + phase.steps - 1).lr_ratio]
        if phase.first_token < self.warmup_tokens:
            ratios.insert(0, self.step(phase.first_step).lr_ratio)
        data = "as it is" if phase.weights is None else _weights(phase.weights)
        if phase.final_weights is not None:
            data += f" to {_weights(phase.final_weights)}"
        scaling = phase.rope_scaling
        return (
            phase.name,
            f"{phase.steps:,}",
            count(phase.tokens),
            f"{phase.sequence_length:,}",
            _path(f"{size:,}" for size in (phase.batches[0], phase.batches[-1])),
            _path(f"{lr * ratio:.2e}" for ratio in ratios),
            data,
            "plain" if scaling is None else f"YaRN x{scaling.factor:g}",
        )


def build_plan(config: RunConfig) -> Plan:
    """The plan of a run.

    Raises:
        ConfigError: warm-up, decays or the ramp do not fit into the lengths they are part of.
    """
    schedule, phases, stretches, faults = config.schedule, [], [], []
    at, scaling, ratio = Stretch(0, 0, 0, 0, 0, 0), config.model.rope_scaling, 1.0  # where the next phase begins
    for index, (name, part) in enumerate(schedule.parts().items()):
        key = f"schedule.phases.{name}" if schedule.phases else "schedule"
        length = part.sequence_length or config.train.sequence_length
        own = part.global_batch_size
        ramp = () if own is not None else schedule.batch_ramp
        batches = [*ramp, (own or config.train.global_batch_size, None)]
        found = list(_stretches(replace(at, phase=index), part, batches, length=length))
        end = _after(found[-1], length=length)
        scaling = part.rope_scaling or scaling
        decay = _decay(part, found, end, length=length, before=ratio)
        if decay.start < at.first_token:
            faults.append(f"{key}: the decay is longer than the {end.first_step - at.first_step} steps that it ends")
        ratio = decay.after
        phases.append(
            Phase(
                index,
                name,
                at.first_step,
                end.first_step - at.first_step,
                at.first_sample,
                end.first_sample - at.first_sample,
                at.first_token,
                end.first_token - at.first_token,
                length,
                part.micro_batch_size or config.train.micro_batch_size,
                tuple(stretch.batch for stretch in found),
                part.weights,
                part.final_weights,
                scaling,
                decay,
            )
        )
        stretches += found
        at = end
    plan = Plan(tuple(phases), tuple(stretches), 0)
    if (schedule.warmup_steps or 0) > plan.steps:
        faults.append(f"schedule.warmup_steps={schedule.warmup_steps} is longer than the run of {plan.steps} steps")
    if (schedule.warmup_tokens or 0) > plan.tokens:
        faults.append(f"schedule.warmup_tokens={schedule.warmup_tokens} are more than the run's {plan.tokens} tokens")
    if schedule.batch_ramp and schedule.batch_ramp[-1][1] >= plan.tokens:
        faults.append(
            f"schedule.batch_ramp ends at {schedule.batch_ramp[-1][1]} tokens and the run at {plan.tokens}: "
            "train.global_batch_size would never be reached; end the ramp earlier"
        )
    if faults:
        raise ConfigError(faults)
    return replace(plan, warmup_tokens=schedule.warmup_tokens or plan.tokens_before(schedule.warmup_steps or 0))


def _stretches(
    at: Stretch, part: PhaseConfig, batches: Sequence[tuple[int, int | None]], *, length: int
) -> Iterator[Stretch]:
    """A phase's steps, cut where their size changes; the tokens at a step's beginning decide its size."""
    first_step, first_token = at.first_step, at.first_token
    for batch, until in batches:
        if part.steps is not None:
            steps = part.steps - (at.first_step - first_step)
        else:
            assert part.tokens is not None
            steps = -(-(part.tokens - (at.first_token - first_token)) // (batch * length))
        if until is not None:
            steps = min(steps, -(-(until - at.first_token) // (batch * length)))
        if steps > 0:
            at = replace(at, steps=steps, batch=batch)
            yield at
            at = replace(_after(at, length=length), phase=at.phase)


def _after(stretch: Stretch, *, length: int) -> Stretch:
    """An empty one where this one ends."""
    samples = stretch.steps * stretch.batch
    return replace(
        stretch,
        first_step=stretch.first_step + stretch.steps,
        steps=0,
        first_sample=stretch.first_sample + samples,
        first_token=stretch.first_token + samples * length,
    )


def _decay(part: PhaseConfig, stretches: Sequence[Stretch], end: Stretch, *, length: int, before: float) -> Decay:
    """The end of the phase in which the learning rate moves."""
    if part.final_lr_ratio is None or part.decay_shape is None:
        return Decay(end.first_token, end.first_token, "linear", before, before)
    steps = end.first_step - stretches[0].first_step
    if part.decay_tokens is not None:
        start = end.first_token - part.decay_tokens
    else:
        number = part.decay_steps if part.decay_steps is not None else round(steps * (part.decay_fraction or 0.0))
        first = end.first_step - number
        stretch = next((s for s in reversed(stretches) if s.first_step <= first), stretches[0])
        start = stretch.tokens(first, length=length)
    return Decay(start, end.first_token, part.decay_shape, before, part.final_lr_ratio)


def _path(values: Iterable[str]) -> str:
    return " to ".join(value for value, _ in groupby(values))


def _weights(weights: Mapping[str, float]) -> str:
    total = sum(weights.values())
    return ", ".join(f"{name} {share / total:.0%}" for name, share in weights.items())
