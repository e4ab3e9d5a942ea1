"""Every knob of a run, typed and checked, without torch.

``schema`` holds the knobs, ``parse`` turns a plain mapping (from Hydra, JSON or Python) into them.
"""

from k2train.config.parse import ConfigError, parse, to_dict
from k2train.config.schema import (
    CheckpointConfig,
    DataConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RoleConfig,
    RopeScalingConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrackConfig,
    TrainConfig,
    ValidateConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "GenerateConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RoleConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrackConfig",
    "TrainConfig",
    "ValidateConfig",
    "parse",
    "to_dict",
]
