"""Every knob of a run, typed and checked, without torch.

``schema`` holds the knobs, ``keys`` lists them, ``parse`` turns a plain mapping (from Hydra, JSON or Python) into them.
"""

from k2train.config.keys import find_key, key_types, suggest_key
from k2train.config.parse import ConfigError, parse, to_dict
from k2train.config.schema import (
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    GenerateConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RoleConfig,
    RopeScalingConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrackConfig,
    TrainConfig,
    ValidateConfig,
    WriteConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "FaultsConfig",
    "GenerateConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RoleConfig",
    "RopeScalingConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrackConfig",
    "TrainConfig",
    "ValidateConfig",
    "WriteConfig",
    "find_key",
    "key_types",
    "parse",
    "suggest_key",
    "to_dict",
]
