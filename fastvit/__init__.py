"""FastViT in its train-time form: seven variants, a backbone, and strict weights."""

from fastvit.config import FastViTConfig, Preprocessing
from fastvit.errors import (
    ConfigError,
    CorruptFile,
    FastViTError,
    FusedCheckpoint,
    KeyMismatch,
    UnsafePickle,
    WeightsError,
    WeightsNotFound,
)
from fastvit.model import FastViT, FastViTBackbone
from fastvit.variants import (
    VARIANTS,
    create_model,
    fastvit_ma36,
    fastvit_s12,
    fastvit_sa12,
    fastvit_sa24,
    fastvit_sa36,
    fastvit_t8,
    fastvit_t12,
    preprocessing,
)
from fastvit.weights import (
    LoadedWeights,
    load_state_dict_strictly,
    load_weights,
    read_state_dict,
)

__all__ = [
    "VARIANTS",
    "ConfigError",
    "CorruptFile",
    "FastViT",
    "FastViTBackbone",
    "FastViTConfig",
    "FastViTError",
    "FusedCheckpoint",
    "KeyMismatch",
    "LoadedWeights",
    "Preprocessing",
    "UnsafePickle",
    "WeightsError",
    "WeightsNotFound",
    "create_model",
    "fastvit_ma36",
    "fastvit_s12",
    "fastvit_sa12",
    "fastvit_sa24",
    "fastvit_sa36",
    "fastvit_t8",
    "fastvit_t12",
    "load_state_dict_strictly",
    "load_weights",
    "preprocessing",
    "read_state_dict",
]
