from .augmentation import DetectionAugmentation, DetectionTarget
from .collator import collate_detection
from .problems import InvalidDatasetError
from .reader import load_detection_dataset
from .row_format import class_names_of, detection_features, id2label_of
from .shapes import draw_shapes_dataset
from .transforms import DetectionTransform

__all__ = [
    "DetectionAugmentation",
    "DetectionTarget",
    "DetectionTransform",
    "InvalidDatasetError",
    "class_names_of",
    "collate_detection",
    "detection_features",
    "draw_shapes_dataset",
    "id2label_of",
    "load_detection_dataset",
]
