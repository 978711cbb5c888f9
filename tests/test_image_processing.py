import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou, nms
from transformers import AutoImageProcessor

from dit_detection import DiTDetectionImageProcessor, DiTObjectDetectionOutput
from dit_detection.model import image_processing_dit_detection as module


def array(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, channels), dtype=np.uint8)


def annotation(*boxes, image_id=5, **extra):
    return {
        "image_id": image_id,
        "annotations": [{"bbox": box, "category_id": i, **extra} for i, box in enumerate(boxes)],
    }


# images


def test_by_default_a_square_canvas_of_512():
    outputs = DiTDetectionImageProcessor()(array(30, 60), return_tensors="pt")
    assert outputs["pixel_values"].shape == (1, 3, 512, 512)
    assert outputs["pixel_values"].dtype == torch.float32
    # The long side becomes 512, the short one 256; the image lies at the top left.
    assert outputs["pixel_mask"].shape == (1, 512, 512)
    assert outputs["pixel_mask"][0, :256].all()
    assert not outputs["pixel_mask"][0, 256:].any()
    assert (outputs["pixel_values"][0, :, 256:] == 0).all()


@pytest.mark.parametrize("image", [np.full((20, 30, 3), 4000, dtype=np.uint16), torch.full((3, 20, 30), 4000.0)])
def test_arrays_of_more_than_8_bits_are_refused(image):
    with pytest.raises(ValueError, match=r"values up to 4000\. Scale it to 0 to 255"):
        DiTDetectionImageProcessor(size=32)([image], return_tensors="pt")


def test_arrays_from_0_to_1_are_warned_of(monkeypatch):
    """As skimage and torchvision's ToTensor make them: divided by 255 once more they are black."""
    warned = []
    monkeypatch.setattr(module.logger, "warning_once", warned.append)
    image = np.random.default_rng(0).random((20, 30, 3), dtype=np.float32)
    DiTDetectionImageProcessor(size=32)([255 * image, image.astype(np.uint8)], return_tensors="pt")
    DiTDetectionImageProcessor(size=32, do_rescale=False)([image], return_tensors="pt")
    assert warned == []
    DiTDetectionImageProcessor(size=32)([image], return_tensors="pt")
    assert "values up to 1, which becomes black" in warned[0]


@pytest.mark.parametrize(
    ("size", "canvas", "valid"),
    [
        # For images of 30 x 60 and 50 x 20 (height x width) in one batch.
        (64, (64, 64), [(32, 64), (64, 26)]),  # 20 * 64/50 = 25.6
        ({"max_height": 64, "max_width": 64}, (64, 64), [(32, 64), (64, 26)]),
        ({"max_height": 40, "max_width": 96}, (40, 96), [(40, 80), (40, 16)]),
        ({"height": 48, "width": 80}, (48, 80), [(48, 80), (48, 80)]),
        # Short side 16, long side at most 32: 16 x 32 and 32 x 13 (20 * 32/50 = 12.8); padded to the batch.
        ({"shortest_edge": 16, "longest_edge": 32}, (32, 32), [(16, 32), (32, 12)]),
    ],
)
@pytest.mark.parametrize("when", ["made", "called"])
def test_every_form_of_size(size, canvas, valid, when):
    images = [array(30, 60), array(50, 20)]
    if when == "made":
        outputs = DiTDetectionImageProcessor(size=size)(images, return_tensors="pt")
    else:
        outputs = DiTDetectionImageProcessor()(images, size=size, return_tensors="pt")
    assert outputs["pixel_values"].shape == (2, 3, *canvas)
    for mask, (height, width) in zip(outputs["pixel_mask"], valid, strict=True):
        assert abs(int(mask.any(dim=1).sum()) - height) <= 1
        assert abs(int(mask.any(dim=0).sum()) - width) <= 1
        assert mask[: int(mask.any(dim=1).sum()), : int(mask.any(dim=0).sum())].all()
    if "shortest_edge" not in str(size):
        assert [(int(m.any(dim=1).sum()), int(m.any(dim=0).sum())) for m in outputs["pixel_mask"]] == valid


@pytest.mark.parametrize("shape", [(64, 64), (1, 200), (200, 1), (3, 1000), (1, 1), (640, 481), (333, 500), (97, 64)])
def test_the_canvas_is_exact_for_every_image(shape):
    # As the official scripts ask for it; they stack what they get.
    processor = DiTDetectionImageProcessor(
        do_resize=True, size={"max_height": 64, "max_width": 64}, do_pad=True, pad_size={"height": 64, "width": 64}
    )
    outputs = processor(array(*shape), annotations=annotation([0, 0, shape[1], shape[0]]), return_tensors="pt")
    assert outputs["pixel_values"].shape == (1, 3, 64, 64)
    assert outputs["pixel_mask"].any()
    height, width = outputs["labels"][0]["size"].tolist()
    assert max(height, width) == 64
    assert (outputs["pixel_mask"].sum()) == height * width


def test_pad_size_of_its_own_and_no_padding():
    processor = DiTDetectionImageProcessor(size=64, pad_size={"height": 80, "width": 96})
    assert processor(array(30, 60), return_tensors="pt")["pixel_values"].shape == (1, 3, 80, 96)
    plain = DiTDetectionImageProcessor(size=64, do_pad=False)(array(30, 60), return_tensors="pt")
    assert plain["pixel_values"].shape == (1, 3, 32, 64)
    assert "pixel_mask" not in plain
    with pytest.raises(ValueError, match="pad_size"):
        DiTDetectionImageProcessor(size=64, pad_size={"height": 20, "width": 20})(array(64, 64), return_tensors="pt")


def test_pixels_go_from_0_255_to_minus_1_1():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    processor = DiTDetectionImageProcessor(do_resize=False, do_pad=False)
    values = processor(ramp, return_tensors="pt")["pixel_values"][0]
    expected = torch.arange(256).reshape(16, 16) / 127.5 - 1
    torch.testing.assert_close(values, expected.expand(3, 16, 16), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK"])
def test_pil_images_of_any_mode(mode):
    image = Image.fromarray(array(20, 30)).convert(mode)
    values = DiTDetectionImageProcessor(size=32)(image, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 32, 32)
    expected = DiTDetectionImageProcessor(size=32)(np.array(image.convert("RGB")), return_tensors="pt")["pixel_values"]
    assert torch.equal(values, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_numpy_and_torch_images_channels_first_and_last(channels):
    image = array(20, 30, channels)
    processor = DiTDetectionImageProcessor(size=32)
    expected = processor(Image.fromarray(image.repeat(3 // channels, axis=2)), return_tensors="pt")["pixel_values"]
    first = image.transpose(2, 0, 1)
    for variant in (image, first, torch.from_numpy(image), torch.from_numpy(first), torch.from_numpy(first)[None]):
        assert torch.equal(processor(variant, return_tensors="pt")["pixel_values"], expected)


def test_an_image_does_not_depend_on_its_batch():
    images = [array(30, 60), array(50, 20, seed=1), array(30, 60, seed=2)]
    processor = DiTDetectionImageProcessor(size=64)
    together = processor(images, return_tensors="pt")
    for index, image in enumerate(images):
        alone = processor(image, return_tensors="pt")
        assert torch.equal(together["pixel_values"][index], alone["pixel_values"][0])
        assert torch.equal(together["pixel_mask"][index], alone["pixel_mask"][0])


# annotations


def test_labels_by_hand():
    # 30 high, 60 wide; the box spans x 6 .. 36, y 3 .. 18: cxcywh (0.35, 0.35, 0.5, 0.5) of the image, padded or not.
    objects = [
        {"bbox": [6, 3, 30, 15], "category_id": 2, "area": 123.5, "iscrowd": 1},
        {"bbox": [50.0, 20.0, 20.0, 20.0], "category_id": 0},  # reaches out: clipped to 50 .. 60 and 20 .. 30
    ]
    outputs = DiTDetectionImageProcessor(size=64)(
        array(30, 60), annotations={"image_id": 7, "annotations": objects}, return_tensors="pt"
    )
    (labels,) = outputs["labels"]
    expected = {
        "image_id": torch.tensor([7]),
        "class_labels": torch.tensor([2, 0]),
        "boxes": torch.tensor([[0.35, 0.35, 0.5, 0.5], [55 / 60, 25 / 30, 10 / 60, 10 / 30]]),
        "area": torch.tensor([123.5, 400.0]),  # 20 * 20 where it is not given
        "iscrowd": torch.tensor([1, 0]),
        "orig_size": torch.tensor([30, 60]),
        "size": torch.tensor([32, 64]),
    }
    assert set(labels) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(labels[key], value, msg=key)  # dtypes and shapes too


def test_an_image_without_objects_has_empty_labels():
    outputs = DiTDetectionImageProcessor(size=64)(
        [array(8, 8)] * 2, annotations=[annotation(), annotation([1, 1, 2, 2])], return_tensors="pt"
    )
    empty = outputs["labels"][0]
    assert {
        key: (tuple(empty[key].shape), empty[key].dtype) for key in ("boxes", "class_labels", "area", "iscrowd")
    } == {
        "boxes": ((0, 4), torch.float32),
        "class_labels": ((0,), torch.int64),
        "area": ((0,), torch.float32),
        "iscrowd": ((0,), torch.int64),
    }
    assert outputs["labels"][1]["boxes"].shape == (1, 4)


def test_images_and_annotations_must_agree():
    processor = DiTDetectionImageProcessor(size=64)
    with pytest.raises(ValueError, match=r"The number of images \(2\) and annotations \(1\) do not match."):
        processor([array(8, 8)] * 2, annotations=[annotation()])
    for wrong in ({"annotations": []}, {"image_id": 1, "annotations": {}}, {"image_id": 1}):
        with pytest.raises(ValueError, match="Invalid COCO detection annotations"):
            processor(array(8, 8), annotations=wrong)


@pytest.mark.parametrize(
    "box",
    [
        [1, 1, 0, 5],
        [1, 1, 5, 0],
        [1, 1, -2, 5],
        [float("nan"), 1, 2, 2],
        [1, 1, float("nan"), 2],
        [1, 1, float("inf"), 2],
        [float("-inf"), 1, float("inf"), 2],
        [8, 0, 4, 4],  # begins where the image ends
        [-4, 0, 4, 4],
        [0, -9, 4, 4],
        [3.0, 3.0, 1e-300, 1.0],  # vanishes beside its corner
    ],
)
def test_boxes_without_area_in_the_image_are_refused(box):
    annotations = annotation([1, 1, 2, 2], box, image_id=42)
    with pytest.raises(
        ValueError, match=r"Object 1 of image_id 42: bbox .* has no area inside the image of 8 x 6 pixels"
    ):
        DiTDetectionImageProcessor(size=64)(array(6, 8), annotations=annotations)


def test_the_smallest_box_keeps_its_area():
    outputs = DiTDetectionImageProcessor(size=64)(array(600, 800), annotations=annotation([700, 500, 1e-6, 1e-6]))
    assert (outputs["labels"][0]["boxes"][0, 2:] > 0).all()


# saving


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": 64, "nms_threshold": 0.3, "max_detections": 7},
        {"size": {"height": 48, "width": 80}, "do_pad": False},
        {"size": {"shortest_edge": 16, "longest_edge": 32}},
        {"size": {"max_height": 32, "max_width": 64}, "pad_size": {"height": 80, "width": 96}},
    ],
)
def test_survives_a_folder(settings, tmp_path):
    processor = DiTDetectionImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    for reloaded in (
        DiTDetectionImageProcessor.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path, use_fast=True, trust_remote_code=True),
    ):
        assert type(reloaded) is DiTDetectionImageProcessor
        assert reloaded.to_dict() == processor.to_dict()
        images = [array(30, 60)]
        assert torch.equal(
            reloaded(images, return_tensors="pt")["pixel_values"],
            processor(images, return_tensors="pt")["pixel_values"],
        )
    assert AutoImageProcessor.from_pretrained(tmp_path, size=96, nms_threshold=0.9).nms_threshold == 0.9


# detections


def outputs_of(logits, boxes):
    return DiTObjectDetectionOutput(logits=torch.as_tensor(logits), pred_boxes=torch.as_tensor(boxes))


def random_outputs(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(2, count, 4, generator=generator) * 0.5 + 0.25
    return outputs_of(torch.randn(2, count, 3, generator=generator) * 3, boxes)


def test_detections_by_hand():
    # Class 0 twice on nearly the same place (IoU 0.9): one falls. Class 1 there too: stays. 0.5 is not above 0.5.
    boxes = [[[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.36], [0.25, 0.5, 0.5, 1.0]]]
    logits = [[[2.0, 1.0], [3.0, -9.0], [-9.0, 0.0]]]
    processor = DiTDetectionImageProcessor()
    (found,) = processor.post_process_object_detection(outputs_of(logits, boxes), 0.5, [(100, 200)])
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 1.0]).sigmoid())
    # (0.4, 0.32) .. (0.6, 0.68) and (0.4, 0.3) .. (0.6, 0.7), times 200 across and 100 down.
    torch.testing.assert_close(found["boxes"], torch.tensor([[80.0, 32, 120, 68], [80, 30, 120, 70]]))
    (found,) = processor.post_process_object_detection(outputs_of(logits, boxes), 0.49)
    assert found["labels"].tolist() == [0, 1, 1]
    torch.testing.assert_close(found["boxes"][2], torch.tensor([0.0, 0, 0.5, 1.0]))  # without target_sizes: of 1


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("nms_threshold", [0.1, 0.5, 0.9])
def test_suppression_is_torchvisions_class_by_class(threshold, nms_threshold):
    outputs = random_outputs()
    processor = DiTDetectionImageProcessor(nms_threshold=nms_threshold, max_detections=10_000)
    results = processor.post_process_object_detection(outputs, threshold, torch.tensor([[480, 640], [33, 77]]))
    for index, (height, width) in enumerate([(480, 640), (33, 77)]):
        scores = outputs.logits[index].sigmoid()
        centers, sides = outputs.pred_boxes[index].chunk(2, dim=1)
        boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
        boxes = boxes * torch.tensor([width, height, width, height])
        expected = []
        for label in range(3):
            above = (scores[:, label] > threshold).nonzero().squeeze(1)
            kept = above[nms(boxes[above].double(), scores[above, label].double(), nms_threshold)]
            expected += [(float(scores[i, label]), label, boxes[i].tolist()) for i in kept]
        expected.sort(key=lambda row: -row[0])
        found = results[index]
        torch.testing.assert_close(found["scores"], torch.tensor([row[0] for row in expected]))
        assert found["labels"].tolist() == [row[1] for row in expected]
        torch.testing.assert_close(found["boxes"], torch.tensor([row[2] for row in expected]).reshape(-1, 4))


@pytest.mark.parametrize(
    "target_sizes",
    [
        [(100, 200), (50, 60)],
        [[100, 200], [50, 60]],
        torch.tensor([[100, 200], [50, 60]]),
        np.array([[100, 200], [50, 60]]),
        [torch.tensor([100, 200]), torch.tensor([50, 60])],  # `[labels["orig_size"] for labels in …]`
    ],
)
def test_target_sizes_of_any_kind(target_sizes):
    processor, outputs = DiTDetectionImageProcessor(), random_outputs()
    results = processor.post_process_object_detection(outputs, 0.2, target_sizes)
    relative = processor.post_process_object_detection(outputs, 0.2)
    for result, plain, (height, width) in zip(results, relative, [(100, 200), (50, 60)], strict=True):
        expected = plain["boxes"] * torch.tensor([width, height, width, height])
        torch.testing.assert_close(result["boxes"], expected)


def test_target_sizes_must_be_as_many_as_the_images():
    for wrong in ([(1, 1)], torch.ones(3, 2), []):
        with pytest.raises(ValueError, match=f"got {len(wrong)} for 2 images"):
            DiTDetectionImageProcessor().post_process_object_detection(random_outputs(), 0.5, wrong)


def test_scores_fall_and_stay_within_the_limits(monkeypatch):
    outputs, processor = random_outputs(500), DiTDetectionImageProcessor(nms_threshold=0.99)
    for found in processor.post_process_object_detection(outputs, 0.0):
        assert len(found["scores"]) == 100
        assert (found["scores"].diff() <= 0).all()
    everything = processor.post_process_object_detection(outputs, 0.0, max_detections=10_000)[0]
    assert len(everything["scores"]) <= module.MAX_BEFORE_NMS < 1500
    few = processor.post_process_object_detection(outputs, 0.0, max_detections=3)[0]
    assert torch.equal(few["scores"], everything["scores"][:3])
    strict = processor.post_process_object_detection(outputs, 0.0, nms_threshold=0.2)[0]
    iou = box_iou(strict["boxes"], strict["boxes"]).fill_diagonal_(0)
    assert (iou[strict["labels"][:, None] == strict["labels"]] <= 0.2).all()


def test_nothing_found_keeps_its_shape():
    outputs = outputs_of(torch.full((2, 5, 3), torch.finfo(torch.float32).min), torch.zeros(2, 5, 4))
    for threshold in (0.0, 0.5):
        for found in DiTDetectionImageProcessor().post_process_object_detection(outputs, threshold, [(10, 10)] * 2):
            assert {key: (tuple(value.shape), value.dtype) for key, value in found.items()} == {
                "scores": ((0,), torch.float32),
                "labels": ((0,), torch.int64),
                "boxes": ((0, 4), torch.float32),
            }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype):
    exact = random_outputs()
    rounded = outputs_of(exact.logits.to(dtype), exact.pred_boxes.to(dtype))
    again = outputs_of(rounded.logits.float(), rounded.pred_boxes.float())
    processor = DiTDetectionImageProcessor()
    results = (processor.post_process_object_detection(o, 0.2, [(480, 640)] * 2) for o in (rounded, again))
    for one, other in zip(*results, strict=True):
        assert one["scores"].dtype == one["boxes"].dtype == torch.float32
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_equal_scores_keep_their_order_and_equal_boxes_of_other_classes_stay():
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]]).repeat(1, 10, 1)
    (found,) = DiTDetectionImageProcessor().post_process_object_detection(outputs_of(torch.ones(1, 20, 2), boxes), 0.5)
    assert found["labels"].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(found["boxes"][:, 0], torch.tensor([0.15, 0.15, 0.75, 0.75]))
