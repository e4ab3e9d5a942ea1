"""The knobs of a run's plan: how long it is, how the learning rate moves, and its phases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from k2train.config.rules import rule


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """YaRN (arXiv 2309.00071) with DeepSeek-V3's names; null in the model config switches it off."""

    factor: float = rule(above=1)
    original_max_position_embeddings: int = rule(at_least=1)
    beta_fast: float = rule(above=0)
    beta_slow: float = rule(above=0)
    mscale: float = rule(at_least=0)
    mscale_all_dim: float = rule(at_least=0)


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """A length, and how the learning rate falls over the last part of it. Lengths are steps or tokens, never times."""

    steps: int | None = rule(at_least=1, default=None)
    tokens: int | None = rule(at_least=1, default=None)  # rounded up to whole steps
    decay_fraction: float | None = rule(at_least=0, at_most=1, default=None)  # of the steps; or one of the next two
    decay_steps: int | None = rule(at_least=0, default=None)
    decay_tokens: int | None = rule(at_least=0, default=None)
    decay_shape: str | None = rule(one_of=("linear", "cosine"), default=None)
    final_lr_ratio: float | None = rule(at_least=0, default=None)  # at the end, of the peak; null: no decay

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls, or rises, to another one."""
        return self.final_lr_ratio is not None

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if (self.steps is None) == (self.tokens is None):
            yield (
                f"steps={self.steps} and tokens={self.tokens}: give exactly one as the length, null as the other, as "
                "in schedule.steps=null schedule.tokens=2000000"
            )
        yield from self._check_decay()

    def _check_decay(self) -> Iterator[str]:
        lengths = {
            "decay_fraction": self.decay_fraction,
            "decay_steps": self.decay_steps,
            "decay_tokens": self.decay_tokens,
        }
        given = [f"{name}={value}" for name, value in lengths.items() if value is not None]
        if len(given) > 1:
            yield f"{' and '.join(given)}: give one length of the decay, null as the others"
        if self.decays != bool(given) or self.decays != (self.decay_shape is not None):
            yield (
                f"final_lr_ratio={_null(self.final_lr_ratio)}, {' and '.join(given) or 'no length of the decay'} and "
                f"decay_shape={_null(self.decay_shape)}: a decay needs all three, and without one all are null"
            )


@dataclass(frozen=True, kw_only=True)
class PhaseConfig(CurveConfig):
    """A part of a run: what differs from the rest of it. The learning rate begins where the phase before left it."""

    sequence_length: int | None = rule(at_least=2, default=None)  # tokens; null: train.sequence_length
    global_batch_size: int | None = rule(at_least=1, default=None)  # sequences a step; null: train.global_batch_size
    micro_batch_size: int | None = rule(at_least=1, default=None)  # sequences; null: train.micro_batch_size
    weights: dict[str, float] | None = rule(at_least=0, default=None)  # of the data's sources; null: the data's own
    final_weights: dict[str, float] | None = rule(at_least=0, default=None)  # linearly there; null: they stay
    rope_scaling: RopeScalingConfig | None = rule(default=None)  # from here on; null: as before, at first the model's

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        yield from super().check()
        for name in ("weights", "final_weights"):
            if (weights := getattr(self, name)) is not None and not sum(weights.values()):
                yield f"{name}={weights} add up to 0: give at least one source a weight above 0"
        if self.final_weights is not None and self.weights is None:
            yield "final_weights is given without weights: give those that the phase begins with too"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(CurveConfig):
    """A run of one phase by the curve's own keys, or of several by ``phases``; warm-up and batch ramp at its start."""

    warmup_steps: int | None = rule(at_least=0, default=None)  # over which lr rises from 0; or in tokens; null: none
    warmup_tokens: int | None = rule(at_least=0, default=None)
    # [sequences a step, until so many tokens of the run], in order; then train.global_batch_size
    batch_ramp: tuple[tuple[int, int], ...] = rule(at_least=1)
    phases: dict[str, PhaseConfig] = rule()  # by name, in order; {}: one

    def check(self) -> Iterator[str]:
        """Sentences on fields that contradict each other."""
        if not self.phases:
            yield from super().check()
        elif given := [name for name in CurveConfig.__dataclass_fields__ if getattr(self, name) is not None]:
            yield f"phases are given, which have lengths and decays of their own: set {', '.join(given)} to null"
        if self.warmup_steps is not None and self.warmup_tokens is not None:
            yield f"warmup_steps={self.warmup_steps} and warmup_tokens={self.warmup_tokens}: set one of them to null"
        ends = [end for _, end in self.batch_ramp]
        if ends != sorted(set(ends)):
            yield f"batch_ramp={[list(pair) for pair in self.batch_ramp]}: the tokens of its entries must rise"

    def parts(self) -> dict[str, PhaseConfig]:
        """The phases by name, of which a run without any has one."""
        if self.phases:
            return self.phases
        curve = {name: getattr(self, name) for name in CurveConfig.__dataclass_fields__}
        return {"training": PhaseConfig(**curve)}


def _null(value: object) -> object:
    return "null" if value is None else value
