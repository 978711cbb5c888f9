import io
from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from dit_detection import (
    DetectionAugmentation,
    DetectionDataset,
    DetectionIterableDataset,
    DetectionTrainer,
    DetectionTrainingArguments,
    DiTDetectionImageProcessor,
)
from dit_detection.data import (
    EpochCallback,
    RepeatFactorSampler,
    class_weights_of,
    detection_features,
    draw_shapes_dataset,
    repeat_factors_of,
)

NO_EVALUATION: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def make_rows(categories: list[list[int]], crowds: list[list[int]] | None = None) -> datasets.Dataset:
    """One image per entry, with an object of each of the categories; three classes."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    rows = []
    for image_id, labels in enumerate(categories):
        iscrowd = crowds[image_id] if crowds else [0] * len(labels)
        count = len(labels)
        objects = {"id": list(range(count)), "bbox": [[1.0, 1, 4, 4]] * count, "category": labels}
        objects |= {"area": [16.0] * count, "iscrowd": iscrowd}
        image = {"bytes": file.getvalue(), "path": None}
        rows.append({"image": image, "image_id": image_id, "width": 8, "height": 8, "objects": objects})
    return datasets.Dataset.from_list(rows, features=detection_features(["a", "b", "c"]))


def test_repeat_factors_by_hand() -> None:
    # Class 0 is in 4 of 8 images, class 1 in 1, class 2 in none but as a crowd region. Threshold 1/2: 1, 2, nothing.
    rows = make_rows(
        [[0, 0], [0], [0, 1, 1], [0], [], [], [], [2]],
        [[0, 0], [0], [0, 0, 0], [0], [], [], [], [1]],
    )
    assert repeat_factors_of(rows, 0.5).tolist() == [1, 1, 2, 1, 1, 1, 1, 1]
    # Threshold 1: sqrt(1 / 0.5), sqrt(1 / 0.125).
    expected = [2**0.5, 2**0.5, 8**0.5, 2**0.5, 1, 1, 1, 1]
    np.testing.assert_allclose(repeat_factors_of(rows, 1.0), expected)
    # Rows that were picked from others.
    np.testing.assert_allclose(repeat_factors_of(rows.select([7, 2, 4]), 1.0), [1, 3**0.5, 1])
    assert repeat_factors_of(rows.select([]), 0.5).shape == (0,)
    with pytest.raises(ValueError, match="threshold is 0"):
        repeat_factors_of(rows, 0)


def test_class_weights_by_hand() -> None:
    # 4, 1 and 0 objects; of the last one there is a crowd region. 0.5 / (1 - 1/16) = 8/15 and 0.5 / 0.5 = 1, their
    # mean is 23/30.
    rows = make_rows([[0, 0, 1], [0, 0, 2], []], [[0, 0, 0], [0, 0, 1], []])
    assert class_weights_of(rows, beta=0.5) == pytest.approx([16 / 23, 30 / 23, 1])
    assert class_weights_of(rows, beta=0) == [1, 1, 1]
    # Towards 1 weights are inverse to the counts.
    heavy, light, _ = class_weights_of(rows, beta=1 - 1e-6)
    assert light / heavy == pytest.approx(4, rel=1e-4)
    assert class_weights_of(rows.select([2])) == [1, 1, 1]
    with pytest.raises(ValueError, match="beta is 1"):
        class_weights_of(rows, beta=1)


@settings(max_examples=50, deadline=None)
@example(factors=[1.6] * 5, seed=0)
@given(factors=st.lists(st.floats(1, 5) | st.just(1.0), max_size=40), seed=st.integers(0, 2**31))
def test_no_index_is_left_out_and_all_epochs_are_equally_long(factors: list[float], seed: int) -> None:
    sampler = RepeatFactorSampler(factors, seed)
    assert sum(factors) - 1e-6 <= len(sampler) < sum(factors) + 1
    for epoch in range(3):
        sampler.set_epoch(epoch)
        counts = Counter(sampler)
        assert sum(counts.values()) == len(sampler)
        assert set(counts) == set(range(len(factors)))
        assert all(int(factor) <= counts[index] <= factor + 2 for index, factor in enumerate(factors))


def test_indices_come_as_often_as_their_factors_say() -> None:
    factors = [1.0, 1.25, 1.5, 2.75, 3.0, 1.5]  # 11 in total, so nothing has to be added
    sampler = RepeatFactorSampler(factors)
    assert len(sampler) == 11
    counts: Counter[int] = Counter()
    for epoch in range(1000):
        sampler.set_epoch(epoch)
        counts.update(sampler)
    # The standard deviation of each mean is at most sqrt(0.25 / 1000) = 0.016.
    np.testing.assert_allclose([counts[index] / 1000 for index in range(6)], factors, atol=0.08)


def test_the_order_follows_from_seed_and_epoch() -> None:
    factors = np.linspace(1, 2, 30)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = RepeatFactorSampler(factors, seed)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def epoch_begins(loader: Any, epoch: int) -> None:
    """What the Trainer does before an epoch."""
    state = TrainerState(epoch=epoch + 0.4)
    EpochCallback().on_epoch_begin(TrainingArguments("unused"), state, TrainerControl(), train_dataloader=loader)


@pytest.mark.parametrize("num_skipped", [0, 1])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_data_set_and_sampler_hear_of_the_epoch(num_processes: int, num_skipped: int) -> None:
    class Indices(torch.utils.data.Dataset):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> int:
            return index

    sampler = RepeatFactorSampler([1.5] * 8, seed=5)
    seen: list[list[list[int]]] = []
    for process_index in range(num_processes):
        dataset = Indices()
        loader = prepare_data_loader(
            DataLoader(dataset, batch_size=2, sampler=RepeatFactorSampler([1.5] * 8, seed=5)),
            num_processes=num_processes,
            process_index=process_index,
        )
        epoch_begins(loader, 3)
        running = skip_first_batches(loader, num_skipped) if num_skipped else loader
        running.set_epoch(3)
        seen.append([batch.tolist() for batch in running])
        assert dataset.epoch == 3
    sampler.set_epoch(3)
    expected = np.array(list(sampler)).reshape(-1, 2).tolist()
    # Batch by batch, the processes take turns.
    assert [batch for turn in zip(*seen, strict=True) for batch in turn] == expected[num_skipped * num_processes :]


class RecordingDataset(DetectionDataset):
    """Remembers what was asked of it."""

    def get_view(self, index: int, view: int) -> dict[str, Any]:
        self.__dict__.setdefault("asked", []).append((index, view))
        return super().get_view(index, view)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_training_sees_a_view_per_epoch_and_goes_on_where_it_stopped(tiny_model, tmp_path, threshold) -> None:
    rows = draw_shapes_dataset(10, 0, 0, image_size=64)["train"]
    image_processor = DiTDetectionImageProcessor(size=64)

    length = 10 if threshold is None else len(RepeatFactorSampler(repeat_factors_of(rows, threshold)))
    assert (length == 10) == (threshold is None)
    middle = -(-length // 4) + 1  # steps: the first epoch and one of the second

    def train(**options: Any) -> list[tuple[int, int]]:
        dataset = RecordingDataset(rows, image_processor, DetectionAugmentation(), seed=1)
        arguments = DetectionTrainingArguments(
            str(tmp_path),
            use_cpu=True,
            disable_tqdm=True,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            repeat_factor_threshold=threshold,
            **(NO_EVALUATION | {"save_strategy": "steps", "save_steps": middle}),
        )
        names = dict(enumerate("abcde"))
        model = tiny_model(num_labels=5, id2label=names, label2id={name: label for label, name in names.items()})
        trainer = DetectionTrainer(model, arguments, processing_class=image_processor, train_dataset=dataset)
        trainer.train(**options)
        return dataset.__dict__["asked"]

    asked = train()
    assert len(asked) == 2 * length
    assert {view for _, view in asked[:length]} == {0} and {view for _, view in asked[length:]} == {1}
    assert {index for index, _ in asked[:length]} == {index for index, _ in asked[length:]} == set(range(10))
    assert [index for index, _ in asked[:length]] != [index for index, _ in asked[length:]]
    resumed = train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{middle}"))
    assert resumed == asked[length + 4 :]


def test_streamed_rows_reach_the_model_with_all_their_objects(tiny_model, tmp_path) -> None:
    rows = make_rows([[0, 1, 2, 0, 1], [0], [], [2, 2, 2]])
    image_processor = DiTDetectionImageProcessor(size=64)
    arguments = DetectionTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, **NO_EVALUATION
    )
    stream = DetectionIterableDataset(rows.to_iterable_dataset(), image_processor)
    trainer = DetectionTrainer(tiny_model(), arguments, processing_class=image_processor, train_dataset=stream)
    labels = [image_labels for batch in trainer.get_train_dataloader() for image_labels in batch["labels"]]
    assert [image_labels["class_labels"].tolist() for image_labels in labels] == rows["objects"]["category"]
    assert [len(image_labels["boxes"]) for image_labels in labels] == [5, 1, 0, 3]


def test_repeating_needs_rows_to_count_in(tiny_model, tmp_path) -> None:
    arguments = DetectionTrainingArguments(str(tmp_path), repeat_factor_threshold=0.1, use_cpu=True, **NO_EVALUATION)
    with pytest.raises(ValueError, match=r"repeat_factor_threshold=0.1 needs a DetectionDataset .* got list: images"):
        DetectionTrainer(tiny_model(), arguments, processing_class=DiTDetectionImageProcessor(), train_dataset=[1])
