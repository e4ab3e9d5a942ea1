"""Every knob of a run, typed and checked, without torch.

``schema`` holds the knobs, ``keys`` lists them, ``parse`` turns a plain mapping (from Hydra, JSON or Python) into them,
``compare`` says whether two configs are the same run, ``own`` finds the classes of a person's own that it names.
"""

from k2train.config.cluster import ClusterConfig, PlanConfig, RehearseConfig
from k2train.config.compare import Change, changed_settings, is_harmless, leaves, refuse_changes
from k2train.config.data import DataConfig, DropConfig, OrderConfig, SourceConfig, TokenizerConfig
from k2train.config.keys import find_key, key_types, suggest_key
from k2train.config.monitor import InjectConfig, MonitorConfig
from k2train.config.own import OwnPart, explain, own_part, own_place
from k2train.config.parse import ConfigError, parse, to_dict
from k2train.config.rules import is_own
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
    HookConfig,
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
    "HookConfig",
    "ImportConfig",
    "InjectConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "OrderConfig",
    "OwnPart",
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
    "explain",
    "find_key",
    "is_harmless",
    "is_own",
    "key_types",
    "leaves",
    "own_part",
    "own_place",
    "parse",
    "refuse_changes",
    "suggest_key",
    "to_dict",
]
