"""Puts the configs into wheels, where ``k2train.paths.config_dir`` finds them; a source checkout has them already."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsHook(BuildHookInterface):
    """Maps configs/ to k2train/configs in every wheel but those of ``pip install -e``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel is built."""
        if version != "editable":
            build_data["force_include"]["configs"] = "k2train/configs"
