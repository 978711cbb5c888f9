import contextlib
import io
import multiprocessing
import socket

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dit_detection.metrics import CocoMetric

OVERALL_KEYS = [
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
]


@pytest.fixture
def metric(tmp_path):
    """A `CocoMetric` whose files stay in the test's own folder."""
    return lambda *args, **kwargs: CocoMetric(*args, cache_dir=str(tmp_path), **kwargs)


def example(image_id=1, labels=(), boxes=(), **columns):
    return {"image_id": image_id, "labels": list(labels), "boxes": [list(box) for box in boxes], **columns}


def random_images(seed, num_images=6, num_classes=4):
    """Images with crowds, tied scores, areas on the limits, empty images and a class (the last) without objects."""
    rng = np.random.default_rng(seed)
    predictions, references = [], []
    for image_id in rng.permutation(50)[:num_images].tolist():
        count = int(rng.integers(0, 7)) * int(rng.random() < 0.8)
        sides = np.where(
            rng.random((count, 1)) < 0.4,
            rng.choice([8.0, 32.0, 96.0, 100.0], (count, 1)).repeat(2, axis=1),
            rng.uniform(2, 150, (count, 2)),
        )
        corners = rng.integers(0, 100, (count, 2)).astype(float)
        boxes = np.hstack([corners, corners + sides])
        labels = rng.integers(0, num_classes - 1, count)
        reference = {"image_id": image_id, "labels": labels, "boxes": boxes}
        reference["iscrowd"] = (rng.random(count) < 0.15).astype(int)
        reference["area"] = np.prod(sides, axis=1) * rng.choice([1.0, 1.0, 0.6], count)
        references.append(reference)

        copies = boxes.repeat(int(rng.integers(0, 4)), axis=0)
        copies = copies + rng.normal(0, 1, copies.shape) * rng.choice([0.0, 2.0, 8.0])
        strays = np.sort(rng.uniform(0, 200, (int(rng.integers(0, 6)), 2, 2)), axis=1).reshape(-1, 4)
        found = np.vstack([np.hstack([np.minimum(copies[:, :2], copies[:, 2:]), copies[:, 2:]]), strays])
        found[:, 2:] = np.maximum(found[:, :2], found[:, 2:])
        keep = rng.random() < 0.9
        predictions.append(
            {
                "image_id": image_id,
                "scores": np.round(rng.random(len(found)), 1)[: len(found) * keep].astype(np.float32),
                "labels": rng.integers(0, num_classes, len(found))[: len(found) * keep],
                "boxes": found[: len(found) * keep],
            }
        )
    return predictions, references


def pycocotools_metrics(predictions, references, num_classes, max_detections=(1, 10, 100)):
    """The same keys by the reference implementation, averaged here: its own summary needs the limits (1, 10, 100)."""
    annotations = [
        {
            "id": 0,
            "image_id": reference["image_id"],
            "category_id": int(label),
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": area,
            "iscrowd": int(iscrowd),
        }
        for reference in references
        for label, box, area, iscrowd in zip(
            reference["labels"], reference["boxes"], reference["area"], reference["iscrowd"], strict=True
        )
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    rows = [
        [prediction["image_id"], box[0], box[1], box[2] - box[0], box[3] - box[1], score, label]
        for prediction in predictions
        for score, label, box in zip(prediction["scores"], prediction["labels"], prediction["boxes"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": reference["image_id"]} for reference in references],
            "categories": [{"id": label} for label in range(num_classes)],
            "annotations": annotations,
        }
        truth.createIndex()
        # pycocotools cannot load an empty list of detections.
        found = truth.loadRes(np.array(rows, dtype=float)) if rows else COCO()
        evaluator = COCOeval(truth, found, "bbox")
        evaluator.params.imgIds = sorted(reference["image_id"] for reference in references)
        evaluator.params.catIds = list(range(num_classes))
        evaluator.params.maxDets = list(max_detections)
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else -1.0

    result = {"map": precision[..., 0, -1], "map_50": precision[0, ..., 0, -1], "map_75": precision[5, ..., 0, -1]}
    result |= {f"map_{area}": precision[..., i, -1] for i, area in enumerate(("small", "medium", "large"), 1)}
    result |= {f"mar_{limit}": recall[..., 0, i] for i, limit in enumerate(max_detections)}
    result |= {f"mar_{area}": recall[..., i, -1] for i, area in enumerate(("small", "medium", "large"), 1)}
    result |= {f"map_class {label}": precision[:, :, label, 0, -1] for label in range(num_classes)}
    return {key: mean(values) for key, values in result.items()}


@pytest.mark.parametrize(("max_detections", "num_sets"), [((1, 10, 100), 100), ((2, 5), 30)])
def test_metric_equals_pycocotools_on_random_sets(metric, max_detections, num_sets):
    id2label = {label: f"class {label}" for label in range(4)}
    coco = metric(id2label, max_detections=max_detections, keep_in_memory=True)
    seen = []
    for seed in range(num_sets):
        predictions, references = random_images(seed)
        result = coco.compute(predictions=predictions, references=references)
        expected = pycocotools_metrics(predictions, references, 4, max_detections)
        assert list(result) == list(expected)
        assert result == pytest.approx(expected, abs=1e-6), f"seed {seed}"
        assert result["map_class 3"] == -1
        seen.append(result["map"])
    # The sets are worth comparing: neither all right nor all wrong.
    assert 0.05 < np.mean(seen) < 0.95


def test_metric_equals_pycocotools_beyond_the_limit_of_detections(metric):
    predictions, references = random_images(0, num_images=3, num_classes=2)
    rng = np.random.default_rng(1)
    for prediction in predictions:
        corners = rng.uniform(0, 100, (150, 2))
        prediction["boxes"] = np.hstack([corners, corners + rng.uniform(1, 120, (150, 2))])
        prediction["scores"], prediction["labels"] = rng.random(150), np.zeros(150, int)
    result = metric({0: "class 0", 1: "class 1"}).compute(predictions=predictions, references=references)
    assert result == pytest.approx(pycocotools_metrics(predictions, references, 2), abs=1e-6)


def test_hand_worked_average_precision(metric):
    # Two objects; the detections in the order of their scores: right (IoU 1), wrong, right (IoU 0.62).
    # IoU 0.50, 0.55, 0.60: recall 0.5 at precision 1, recall 1 at 2/3. Of the 101 recall points 0.00 to 1.00, 51 take
    # 1 and the other 50 take 2/3. From IoU 0.65 on only the first is right: 51 points at 1, 50 at 0.
    low, high = (51 + 50 * 2 / 3) / 101, 51 / 101
    result = metric({0: "cell"}).compute(
        predictions=[
            example(7, [0, 0, 0], [(0, 0, 100, 100), (400, 0, 500, 100), (200, 0, 262, 100)], scores=[0.9, 0.8, 0.7])
        ],
        references=[example(7, [0, 0], [(0, 0, 100, 100), (200, 0, 300, 100)])],
    )
    expected = {"map": (3 * low + 7 * high) / 10, "map_50": low, "map_75": high, "map_small": -1, "map_medium": -1}
    expected |= {"map_large": (3 * low + 7 * high) / 10, "mar_1": 0.5, "mar_10": 0.65, "mar_100": 0.65}
    expected |= {"mar_small": -1, "mar_medium": -1, "mar_large": 0.65, "map_cell": (3 * low + 7 * high) / 10}
    assert result == pytest.approx(expected)
    assert list(result) == [*OVERALL_KEYS, "map_cell"]
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize(
    ("side", "sizes"), [(31, ["small"]), (32, ["small", "medium"]), (96, ["medium", "large"]), (97, ["large"])]
)
def test_sizes_include_both_of_their_limits(metric, side, sizes):
    box = [(0, 0, side, side)]
    result = metric().compute(predictions=[example(1, [0], box, scores=[1.0])], references=[example(1, [0], box)])
    assert [size for size in ("small", "medium", "large") if result[f"map_{size}"] == pytest.approx(1)] == sizes


def test_given_area_decides_the_size_and_a_crowd_takes_any_number_of_detections(metric):
    crowd, cell = (0, 0, 100, 100), (200, 200, 250, 250)
    result = metric({0: "cell"}).compute(
        predictions=[
            example(1, [0, 0, 0], [(0, 0, 50, 50), (50, 50, 100, 100), cell], scores=torch.tensor([0.9, 0.8, 0.7]))
        ],
        references=[example(1, [0, 0], [crowd, cell], area=[10_000, 900], iscrowd=[1, 0])],
    )
    assert result["map"] == result["map_small"] == pytest.approx(1)
    assert result["map_medium"] == -1


@pytest.mark.parametrize("id2label", [None, {0: "cell", 1: "platelet"}])
def test_empty_inputs(metric, id2label):
    box = [(0, 0, 10, 10)]
    nothing = metric(id2label).compute(predictions=[example(scores=[])], references=[example()])
    assert set(nothing.values()) == {-1.0}
    no_images = metric(id2label).compute(predictions=[], references=[])
    assert set(no_images.values()) == {-1.0}
    only_detections = metric(id2label).compute(
        predictions=[example(1, [0], box, scores=[1.0])], references=[example()]
    )
    assert set(only_detections.values()) == {-1.0}
    only_objects = metric(id2label).compute(predictions=[example(scores=[])], references=[example(1, [0], box)])
    assert only_objects["map"] == only_objects["map_50"] == only_objects["mar_100"] == 0
    assert only_objects["map_large"] == -1
    empty_arrays = metric(id2label).compute(
        predictions=[
            {"image_id": 1, "scores": torch.zeros(0), "labels": torch.zeros(0), "boxes": torch.zeros(0, 4)},
            {"image_id": 2, "scores": np.zeros(1), "labels": np.zeros(1, int), "boxes": np.array(box)},
        ],
        references=[example(1), example(2, [0], box)],
    )
    assert empty_arrays["map"] == pytest.approx(1)


def test_first_object_of_the_set_counts_when_found(metric):
    # An annotation numbered 0 is taken for "no match" by the COCO protocol's code.
    box = [(0, 0, 10, 10)]
    result = metric().compute(predictions=[example(0, [0], box, scores=[0.5])], references=[example(0, [0], box)])
    assert result["map"] == pytest.approx(1)


def test_add_add_batch_and_compute_agree_for_any_container(metric):
    predictions, references = random_images(3)
    expected = metric().compute(predictions=predictions, references=references)

    one_by_one = metric()
    for prediction, reference in zip(predictions, references, strict=True):
        one_by_one.add(
            prediction={key: torch.as_tensor(value) for key, value in prediction.items()},
            reference={
                key: torch.as_tensor([value] if key == "image_id" else value) for key, value in reference.items()
            },
        )
    assert one_by_one.compute() == expected

    in_batches = metric(keep_in_memory=True)
    in_batches.add(prediction=predictions[3], reference=references[3])
    for start in (4, 0, 2):
        batch = slice(start, start + 2)
        in_batches.add_batch(
            predictions=[{key: np.asarray(value).tolist() for key, value in p.items()} for p in predictions[batch]],
            references=[{key: np.asarray(value).tolist() for key, value in r.items()} for r in references[batch]],
        )
    assert in_batches.compute() == expected
    # And once more with the same object, for the next evaluation of a training run.
    assert in_batches.compute(predictions=predictions, references=references) == expected


def test_repeated_image_counts_once(metric):
    predictions, references = random_images(5)
    expected = metric().compute(predictions=predictions, references=references)
    repeated = metric().compute(predictions=predictions + predictions[:2], references=references + references[:2])
    assert repeated == expected


def test_repeated_image_with_other_objects_is_an_error(metric):
    first, second = example(42, [0], [(0, 0, 10, 10)]), example(42, [0], [(0, 0, 10, 12)])
    with pytest.raises(ValueError, match="image_id 42 came twice"):
        metric(keep_in_memory=True).compute(predictions=[example(42, scores=[])] * 2, references=[first, second])
    with pytest.raises(ValueError, match="image_id 42 came twice"):
        metric(keep_in_memory=True).compute(predictions=[example(42, scores=[])] * 2, references=[first, example(42)])


def test_class_names_never_overwrite_the_metrics_own_keys(metric):
    id2label = {0: "50", 1: "small", 2: "cell"}
    box = [(0, 0, 200, 200)]
    result = metric(id2label).compute(
        predictions=[example(1, [0, 2], box * 2, scores=[1.0, 1.0])], references=[example(1, [0, 1, 2], box * 3)]
    )
    assert list(result) == [*OVERALL_KEYS, "map_50_0", "map_small_1", "map_cell"]
    assert result["map_50"] == pytest.approx(2 / 3)
    assert (result["map_50_0"], result["map_small_1"], result["map_small"]) == pytest.approx((1, 0, -1))
    # Without names, the numbers of COCO's own classes 50 and 75 meet the same rule.
    unnamed = metric().compute(predictions=[example(1, scores=[])], references=[example(1, [50, 3], box * 2)])
    assert list(unnamed) == [*OVERALL_KEYS, "map_3", "map_50_50"]


def test_keys_of_id2label_may_be_strings_as_json_gives_them(metric):
    result = metric({"0": "cell"}).compute(predictions=[example(scores=[])], references=[example()])
    assert result["map_cell"] == -1


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        (example(1, scores=[]), example(2), "prediction of image 1 with the reference of image 2"),
        (example("a", scores=[]), example(1), "image_id of a prediction must be one integer of 64 bits, got 'a'"),
        (
            example(2**63, scores=[]),
            example(2**63),
            "image_id of a prediction must be one integer of 64 bits, got 922",
        ),
        (example(1.5, scores=[]), example(1), "image_id of a prediction must be one integer"),
        ({"labels": [], "boxes": [], "scores": []}, example(1), "got 'no such key'"),
        (example(1), example(1), "the prediction of image 1 has no 'scores'"),
        (example(1, [0], [(0, 0, 1, 1)], scores=[]), example(1), r"scores of .* must have shape \(1,\), got \(0,\)"),
        (example(1, [0], [], scores=[1.0]), example(1), r"labels of .* must have shape \(0,\), got \(1,\)"),
        (example(1, [0], [(0, 0, 1)], scores=[1.0]), example(1), r"boxes of .* must have shape \(None, 4\)"),
        (example(1, [0], [(5, 5, 4, 9)], scores=[1.0]), example(1), "must be xyxy in original pixels"),
        (example(1, [0], [(0, 0, 1, 1)], scores=[np.nan]), example(1), "scores of .* must be finite numbers, got nan"),
        (example(1, [9], [(0, 0, 1, 1)], scores=[1.0]), example(1), "labels of the prediction .* in id2label.* got 9"),
        (example(1, scores=[]), example(1, [-100], [(0, 0, 1, 1)]), "labels of the reference of image 1 .* got -100"),
        (
            example(1, scores=[]),
            example(1, [0], [(0, 0, 1, 1)], iscrowd=[0, 0]),
            r"iscrowd .* shape \(1,\), got \(2,\)",
        ),
        (example(1, [0], [(0, 0, 1, 1)], scores=np.ones(1, np.float16)), example(1), "half precision"),
        (example(1, [0], [(0, 0, 1, 1)], scores=torch.ones(1, dtype=torch.bfloat16)), example(1), "half precision"),
    ],
)
def test_malformed_examples_are_refused_at_once(metric, prediction, reference, message):
    coco = metric({0: "cell"})
    with pytest.raises(ValueError, match=message):
        coco.add(prediction=prediction, reference=reference)
    # What was refused leaves nothing behind.
    box = [(0, 0, 10, 10)]
    coco.add(prediction=example(1, [0], box, scores=[1.0]), reference=example(1, [0], box))
    assert coco.compute()["map"] == pytest.approx(1)


def test_misuse_is_refused(metric):
    with pytest.raises(ValueError, match="needs both"):
        metric().compute(predictions=[example(scores=[])])
    with pytest.raises(ValueError, match="got 1 and 0"):
        metric().add_batch(predictions=[example(scores=[])], references=[])
    with pytest.raises(ValueError, match=r"Classes 0 and 2 .* 'map_cell'"):
        metric({0: "cell", 1: "platelet", 2: "cell"})
    with pytest.raises(ValueError, match="max_detections"):
        metric(max_detections=(0, 10))


def test_metric_is_silent_offline_and_documented(metric, monkeypatch, capfd):
    def no_network(*args):
        raise AssertionError("the metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    coco = metric({0: "cell"}, max_detections=(1, 10, 300))
    result = coco.compute(predictions=[example(scores=[])], references=[example()])
    assert "mar_300" in result and "mar_100" not in result
    assert capfd.readouterr() == ("", "")
    assert "original pixels" in coco.add_batch.__doc__ and "original pixels" in coco.add.__doc__


def evaluate_one_share(process_id, cache_dir):
    coco = CocoMetric(num_process=2, process_id=process_id, experiment_id="shares", cache_dir=cache_dir, timeout=20)
    predictions, references = random_images(11, num_images=5)
    # Five images on two processes: the sampler repeats the first one to fill the last share.
    for index in [*range(5), 0][process_id::2]:
        coco.add(prediction=predictions[index], reference=references[index])
    return coco.compute()


def test_two_processes_give_what_one_gives(metric, tmp_path):
    # Forked, because a fresh process takes as long to import evaluate as all of these tests take to run.
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        other = pool.apply_async(evaluate_one_share, (1, str(tmp_path)))
        result = evaluate_one_share(0, str(tmp_path))
        assert other.get(timeout=20) is None
    predictions, references = random_images(11, num_images=5)
    assert result == metric().compute(predictions=predictions, references=references)
