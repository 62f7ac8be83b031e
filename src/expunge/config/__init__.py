"""Configurations: what they may say, how they are read, and their JSON schema."""

from __future__ import annotations

from expunge.config.load import load_config, parse_config, resolved_yaml
from expunge.config.models import BenchConfig, Reference, RequestConfig, RunConfig, TaskConfig, TrainConfig
from expunge.config.schema import json_schema
from expunge.config.text import Source, parse_overrides, read_source, with_overrides, write_yaml

__all__ = [
    "BenchConfig",
    "Reference",
    "RequestConfig",
    "RunConfig",
    "Source",
    "TaskConfig",
    "TrainConfig",
    "json_schema",
    "load_config",
    "parse_config",
    "parse_overrides",
    "read_source",
    "resolved_yaml",
    "with_overrides",
    "write_yaml",
]
