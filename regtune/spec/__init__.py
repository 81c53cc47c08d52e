"""What a person may post: a study, validated field by field, with every default filled in.

Nothing is left implicit: ``StudySpec`` holds the ranges that will be searched also where the
person named none, so that what is stored and shown is what is run.
"""

from regtune.spec.change import StudyChange
from regtune.spec.datasets import ImageFolderSettings, SyntheticSettings, TableSettings
from regtune.spec.models import (
    STOCHASTIC_DEPTH_MODELS,
    TORCHVISION_MODELS,
    CnnSettings,
    LinearSettings,
    MlpSettings,
    TabularResnetSettings,
    TorchvisionSettings,
    VitTinySettings,
)
from regtune.spec.plain import plain_data
from regtune.spec.reading import (
    MAX_BODY_BYTES,
    changed,
    load_yaml,
    parse_change,
    parse_spec,
    parse_text,
    read_spec,
)
from regtune.spec.search import STRENGTHS, Search, default_search
from regtune.spec.shape import NO_SHAPE, read_shape
from regtune.spec.study import (
    MOST_TRIALS,
    NAME_PATTERN,
    REFERENCE_TRIALS,
    Requires,
    StudySpec,
    Validation,
)
from regtune.spec.task import (
    CLASSIFICATION_SCORES,
    REGRESSION_SCORES,
    AnyTask,
    NamedTask,
    ScoreName,
    TaskSpec,
)
from regtune.spec.training import Training

__all__ = [
    "CLASSIFICATION_SCORES",
    "MAX_BODY_BYTES",
    "MOST_TRIALS",
    "NAME_PATTERN",
    "NO_SHAPE",
    "REFERENCE_TRIALS",
    "REGRESSION_SCORES",
    "STOCHASTIC_DEPTH_MODELS",
    "STRENGTHS",
    "TORCHVISION_MODELS",
    "AnyTask",
    "CnnSettings",
    "ImageFolderSettings",
    "LinearSettings",
    "MlpSettings",
    "NamedTask",
    "Requires",
    "ScoreName",
    "Search",
    "StudyChange",
    "StudySpec",
    "SyntheticSettings",
    "TableSettings",
    "TabularResnetSettings",
    "TaskSpec",
    "TorchvisionSettings",
    "Training",
    "Validation",
    "VitTinySettings",
    "changed",
    "default_search",
    "load_yaml",
    "parse_change",
    "parse_spec",
    "parse_text",
    "plain_data",
    "read_shape",
    "read_spec",
]
