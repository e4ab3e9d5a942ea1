"""Every knob of a run, typed and checked, without torch.

``schema`` holds the knobs, ``keys`` lists them, ``parse`` turns a plain mapping (from Hydra, JSON or Python) into them,
``compare`` says whether two configs are the same run.
"""

from k2train.config.cluster import ClusterConfig, PlanConfig, RehearseConfig
from k2train.config.compare import Change, changed_settings, is_harmless, leaves, refuse_changes
from k2train.config.data import DataConfig, DropConfig, OrderConfig, SourceConfig, TokenizerConfig
from k2train.config.keys import find_key, key_types, suggest_key
from k2train.config.monitor import InjectConfig, MonitorConfig
from k2train.config.parse import ConfigError, parse, to_dict
from k2train.config.schedule import PhaseConfig, RopeScalingConfig, ScheduleConfig
from k2train.config.schema import (
    MUON_ROLES,
    RESUME,
    CheckConfig,
    CheckpointConfig,
    EvaluateConfig,
    ExportConfig,
    FaultsConfig,
    GenerateConfig,
    ImportConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    RoleConfig,
    RunConfig,
    SampleConfig,
    TrackConfig,
    TrainConfig,
    ValidateConfig,
    WriteConfig,
)

__all__ = [
    "MUON_ROLES",
    "RESUME",
    "Change",
    "CheckConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ConfigError",
    "DataConfig",
    "DropConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FaultsConfig",
    "GenerateConfig",
    "ImportConfig",
    "InjectConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "OrderConfig",
    "ParallelConfig",
    "PhaseConfig",
    "PlanConfig",
    "ProfileConfig",
    "RehearseConfig",
    "RoleConfig",
    "RopeScalingConfig",
    "RunConfig",
    "SampleConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrackConfig",
    "TrainConfig",
    "ValidateConfig",
    "WriteConfig",
    "changed_settings",
    "find_key",
    "is_harmless",
    "key_types",
    "leaves",
    "parse",
    "refuse_changes",
    "suggest_key",
    "to_dict",
]
