"""The run file: a value per section (`adapter`, `data`, `train`, `evaluate`), all in `run`, read by `load`."""

from deltaw.config.adapter import TARGET_GROUPS, AdapterSpec, names_module
from deltaw.config.data import DataConfig
from deltaw.config.evaluate import METRICS, EvaluateConfig, metric_key, own_metric
from deltaw.config.load import config_of, load_config, parse_config, read_text, setting_meant
from deltaw.config.objective import ObjectiveConfig, Shape
from deltaw.config.problems import fields_at
from deltaw.config.run import BaseWeights, RunConfig
from deltaw.config.strict import Strict
from deltaw.config.train import Dtype, TrainConfig

__all__ = [
    "METRICS",
    "TARGET_GROUPS",
    "AdapterSpec",
    "BaseWeights",
    "DataConfig",
    "Dtype",
    "EvaluateConfig",
    "ObjectiveConfig",
    "RunConfig",
    "Shape",
    "Strict",
    "TrainConfig",
    "config_of",
    "fields_at",
    "load_config",
    "metric_key",
    "names_module",
    "own_metric",
    "parse_config",
    "read_text",
    "setting_meant",
]
