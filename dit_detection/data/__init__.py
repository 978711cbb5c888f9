from .augmentation import DetectionAugmentation
from .collator import collate_detection
from .problems import InvalidDatasetError, Problem, ProblemLog
from .reader import load_detection_dataset, read_detection_dataset
from .row_format import class_names_of, detection_features, id2label_of
from .sampling import EpochCallback, RepeatFactorSampler, class_weights_of, repeat_factors_of
from .shapes import draw_shapes_dataset
from .target import DetectionTarget
from .transforms import DetectionDataset, DetectionIterableDataset

__all__ = [
    "DetectionAugmentation",
    "DetectionDataset",
    "DetectionIterableDataset",
    "DetectionTarget",
    "EpochCallback",
    "InvalidDatasetError",
    "Problem",
    "ProblemLog",
    "RepeatFactorSampler",
    "class_names_of",
    "class_weights_of",
    "collate_detection",
    "detection_features",
    "draw_shapes_dataset",
    "id2label_of",
    "load_detection_dataset",
    "read_detection_dataset",
    "repeat_factors_of",
]
