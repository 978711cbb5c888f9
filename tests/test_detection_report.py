import dataclasses
import json

import numpy as np
import pytest

from dit_detection.card.detection_report import (
    DetectionReport,
    ImageDetections,
    ImageErrors,
    choose_threshold,
    report_detections,
)
from dit_detection.metrics import CocoMetric

NAMES = {0: "a", 1: "b", 2: "c"}


def image(image_id, found=(), expected=()):
    """Detections (xyxy, score, label) and objects (xyxy, label[, iscrowd])."""
    rows = []
    for box in expected:
        x0, y0, x1, y1, label, iscrowd = (*box, 0)[:6]
        rows.append([x0, y0, x1, y1, label, iscrowd, (x1 - x0) * (y1 - y0)])
    return ImageDetections(
        image_id, np.array(found, dtype=np.float32).reshape(-1, 6), np.array(rows, dtype=np.float32).reshape(-1, 7)
    )


def random_images(seed, num_images=6, crowds=0.0, most=8, labels=(0, 1, 2), ties=False):
    rng = np.random.default_rng(seed)
    images = []
    for image_id in range(num_images):
        expected = []
        for _ in range(rng.integers(0, most)):
            corner, sides = rng.integers(0, 60, 2), rng.integers(15, 45, 2)
            expected.append([*corner, *(corner + sides), rng.choice(labels), rng.random() < crowds])
        found = []
        for _ in range(rng.integers(0, 2 * most)):
            # Half of them near an object, most with its label.
            if expected and rng.random() < 0.6:
                box = expected[rng.integers(len(expected))]
                corners = np.array(box[:4]) + rng.integers(-5, 6, 4)
                label = box[4] if rng.random() < 0.7 else rng.choice(labels)
            else:
                corner, sides = rng.integers(0, 60, 2), rng.integers(15, 45, 2)
                corners, label = np.concatenate([corner, corner + sides]), rng.choice(labels)
            found.append([*corners, rng.integers(1, 10) / 10 if ties else rng.random(), label])
        images.append(image(100 + image_id, found, expected))
    return images


def overlap(box, other, iscrowd=False):
    width, height = (min(box[i + 2], other[i + 2]) - max(box[i], other[i]) for i in (0, 1))
    if width <= 0 or height <= 0:
        return 0.0
    area, other_area = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return width * height / (area if iscrowd else area + other_area - width * height)


def match(row, objects, taken):
    """The object of its own class that a detection finds by COCO's rules: a crowd region only if nothing else."""
    for iscrowd in (0, 1):
        near = [
            (overlap(row, other, iscrowd), index)
            for index, other in enumerate(objects)
            if other[4] == row[5] and other[5] == iscrowd and (iscrowd or index not in taken)
        ]
        near = [pair for pair in near if pair[0] >= 0.5]
        if near:
            return max(near)[1]
    return None


def reference(images, threshold):
    """Per image and class `[correct, wrong, missed]`, and the table of what is taken for what."""
    counts = {(one.image_id, label): [0, 0, 0] for one in images for label in NAMES}
    table = np.zeros((4, 4), dtype=int)
    for one in images:
        objects, taken, kept = one.expected.tolist(), set(), []
        for row in sorted(one.found.tolist(), key=lambda row: -row[4]):
            index = match(row, objects, taken)
            on_crowd = index is not None and objects[index][5]
            if index is not None and not on_crowd:
                taken.add(index)
            if np.float32(row[4]) > np.float32(threshold) and not on_crowd:
                counts[one.image_id, row[5]][int(index is None)] += 1
                kept.append(row)
        left = {index: other for index, other in enumerate(objects) if not other[5]}
        for other in left.values():
            counts[one.image_id, other[4]][2] += 1
        for label in NAMES:
            counts[one.image_id, label][2] -= counts[one.image_id, label][0]
        for row in kept:
            near = [(overlap(row, other), -index) for index, other in left.items() if overlap(row, other) >= 0.5]
            annotated = int(left.pop(-max(near)[1])[4]) if near else 3
            table[annotated, int(row[5])] += 1
        for other in left.values():
            table[int(other[4]), 3] += 1
    return counts, table


CASES = {
    "random": {},
    "one class": {"labels": (1,)},
    "crowds": {"crowds": 0.4},
    "nothing but crowds": {"crowds": 1.0},
    "equal scores": {"ties": True},
    "many": {"num_images": 20, "most": 30},
    "one image": {"num_images": 1},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_counts_are_those_of_the_written_out_rules(case, seed, threshold):
    images = random_images(seed, **CASES[case])
    counts, table = reference(images, threshold)
    report, errors = report_detections(images, NAMES, threshold)
    for label, one in enumerate(report.classes):
        expected = np.sum([counts[image.image_id, label] for image in images], axis=0).tolist()
        assert [one.correct, one.wrong, one.objects - one.correct] == expected
    for one in errors:
        expected = np.sum([counts[one.image_id, label] for label in NAMES], axis=0).tolist()
        assert [one.correct, one.wrong, one.missed] == expected
    assert [one.image_id for one in errors] == [image.image_id for image in images]
    assert report.confusion_matrix().tolist() == table.tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_threshold_has_the_highest_f1_there_is(case):
    images = random_images(5, **CASES[case])
    f1 = []
    for candidate in range(0, 100):
        report, _ = report_detections(images, NAMES, candidate / 100)
        correct = sum(one.correct for one in report.classes)
        f1.append(2 * correct / max(1, sum(one.objects + one.correct + one.wrong for one in report.classes)))
    chosen = choose_threshold(images, NAMES)
    if max(f1) == 0:
        assert chosen is None
    else:
        assert f1[round(100 * chosen)] == pytest.approx(max(f1))


@pytest.mark.parametrize("case", [name for name in CASES if name != "nothing but crowds"])
def test_curves_average_to_what_the_metric_says(case):
    images = random_images(7, **CASES[case])
    metric = CocoMetric(NAMES, keep_in_memory=True)
    for one in images:
        found, expected = one.found, one.expected
        metric.add(
            prediction={
                "image_id": one.image_id,
                "boxes": found[:, :4],
                "scores": found[:, 4].astype(float),
                "labels": found[:, 5],
            },
            reference={
                "image_id": one.image_id,
                "boxes": expected[:, :4],
                "labels": expected[:, 4],
                "iscrowd": expected[:, 5],
                "area": expected[:, 6],
            },
        )
    report, _ = report_detections(images, NAMES, 0.5)
    defined = [one.ap_50 for one in report.classes if one.ap_50 is not None]
    assert np.mean(defined) == pytest.approx(metric.compute()["map_50"], abs=1e-6)
    for one in report.classes:
        assert (one.ap_50 is None) == (one.objects == 0) == (one.curve == [])
        if one.curve:
            assert len(one.curve) == 101 and np.mean(one.curve) == pytest.approx(one.ap_50, abs=1e-4)


def test_by_hand():
    # The first image: a found, b taken for c, a third box on nothing. The second: nothing found of two.
    images = [
        image(
            1,
            [[0, 0, 10, 10, 0.9, 0], [20, 20, 30, 30, 0.8, 2], [50, 50, 60, 60, 0.7, 0], [0, 0, 10, 10, 0.2, 0]],
            [[0, 0, 10, 10, 0], [20, 20, 30, 30, 1]],
        ),
        image(2, [], [[0, 0, 10, 10, 0], [20, 20, 30, 30, 0]]),
        image(3),
    ]
    report, errors = report_detections(images, NAMES, 0.5)
    assert [(one.objects, one.correct, one.wrong) for one in report.classes] == [(3, 1, 1), (1, 0, 0), (0, 0, 1)]
    assert (report.precision, report.recall) == (pytest.approx(1 / 3), pytest.approx(1 / 4))
    assert [one.precision for one in report.classes] == [0.5, None, 0.0]
    assert [one.recall for one in report.classes] == [pytest.approx(1 / 3), 0.0, None]
    assert sorted(report.confusion) == [[0, 0, 1], [0, 3, 2], [1, 2, 1], [3, 0, 1]]
    assert errors == [ImageErrors(1, 1, 2, 1), ImageErrors(2, 0, 0, 2), ImageErrors(3, 0, 0, 0)]
    assert [one.f1 for one in errors] == [pytest.approx(2 / 5), 0.0, 1.0]


def test_a_score_equal_to_the_threshold_is_below_it():
    # As the image processor has it, which compares in float32: 0.7 there is a little less than 0.7.
    images = [image(1, [[0, 0, 10, 10, 0.7, 0]], [[0, 0, 10, 10, 0]])]
    assert report_detections(images, NAMES, 0.7)[0].classes[0].correct == 0
    assert report_detections(images, NAMES, 0.69)[0].classes[0].correct == 1
    # Any of 0.00 to 0.69 is as good: the middle one.
    assert choose_threshold(images, NAMES) == 0.35


@pytest.mark.parametrize(
    "images",
    [
        [],
        [image(1)],
        [image(1, [[0, 0, 9, 9, 0.9, 0]]), image(2)],
        [image(1, [], [[0, 0, 9, 9, 0]])],
        [image(1, [[0, 0, 9, 9, 0.9, 1]], [[50, 50, 60, 60, 1]])],
    ],
    ids=["no image", "an empty image", "no objects", "no detections", "nothing right"],
)
def test_without_one_right_detection_there_is_no_best_threshold(images):
    assert choose_threshold(images, NAMES) is None
    report, errors = report_detections(images, NAMES, 0.5)
    assert len(errors) == len(images) and not any(one.correct for one in report.classes)


def test_a_report_goes_through_json():
    report, _ = report_detections(random_images(3), NAMES, 0.25)
    assert DetectionReport.from_dict(json.loads(json.dumps(dataclasses.asdict(report)))) == report
