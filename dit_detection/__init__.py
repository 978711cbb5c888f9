"""Object detection on Diffusion Transformers (DiT, Peebles & Xie), in the shape of a transformers model."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection, AutoVideoProcessor

from .adapters import add_lora, load_detector
from .data import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionIterableDataset,
    InvalidDatasetError,
    collate_detection,
    id2label_of,
    load_detection_dataset,
)
from .metrics import CocoMetric
from .model.configuration_dit_detection import DiTDetectionConfig
from .model.image_processing_dit_detection import DiTDetectionImageProcessor
from .model.modeling_dit_detection import DiTDetectionModel, DiTForObjectDetection, DiTObjectDetectionOutput
from .training.hp_search import config_space, hp_space
from .training.trainer import DetectionTrainer
from .training.training_args import DetectionTrainingArguments
from .visualize import draw_detections, draw_grid

__all__ = [
    "CocoMetric",
    "DetectionAugmentation",
    "DetectionDataset",
    "DetectionIterableDataset",
    "DetectionTrainer",
    "DetectionTrainingArguments",
    "DiTDetectionConfig",
    "DiTDetectionImageProcessor",
    "DiTDetectionModel",
    "DiTForObjectDetection",
    "DiTObjectDetectionOutput",
    "InvalidDatasetError",
    "add_lora",
    "collate_detection",
    "config_space",
    "draw_detections",
    "draw_grid",
    "hp_space",
    "id2label_of",
    "load_detection_dataset",
    "load_detector",
]

AutoConfig.register("dit_detection", DiTDetectionConfig, exist_ok=True)
AutoModel.register(DiTDetectionConfig, DiTDetectionModel, exist_ok=True)
AutoModelForObjectDetection.register(DiTDetectionConfig, DiTForObjectDetection, exist_ok=True)
AutoImageProcessor.register(
    DiTDetectionConfig, image_processor_classes={"torchvision": DiTDetectionImageProcessor}, exist_ok=True
)

# `pipeline` also looks for a video processor: it guesses a name for one from the image processor's `auto_map` and asks
# in the terminal whether to run that code (transformers 5.23). Told that there is none, it does not ask.
AutoVideoProcessor.register(DiTDetectionConfig, None, exist_ok=True)

# What makes `save_pretrained` and `push_to_hub` copy the code of `model/` beside the weights.
DiTDetectionConfig.register_for_auto_class()
DiTDetectionModel.register_for_auto_class("AutoModel")
DiTForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
DiTDetectionImageProcessor.register_for_auto_class("AutoImageProcessor")
