import pytest
import torch

from dit_detection.model.labels import PADDING, make_targets, pad_labels


def test_pads_to_rectangles():
    labels = [
        {
            "class_labels": torch.tensor([2]),
            "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]]),
            "size": torch.tensor([4, 6]),
        },
        {"class_labels": torch.zeros(0), "boxes": torch.zeros(0, 4), "size": torch.tensor([5, 7])},
    ]
    padded = pad_labels(labels, 3)
    assert padded["class_labels"].tolist() == [[2, PADDING], [PADDING, PADDING]]
    assert padded["boxes"].shape == (2, 2, 4)
    assert torch.equal(padded["boxes"][0, 0], labels[0]["boxes"][0])
    assert not padded["iscrowd"].any()
    assert padded["size"].tolist() == [[4, 6], [5, 7]]
    targets = make_targets(padded, torch.tensor([[100.0, 200.0], [64.0, 64.0]]))
    torch.testing.assert_close(targets["boxes"][0, 0], torch.tensor([80.0, 30, 120, 70]))
    assert targets["class_labels"].dtype == torch.int64
    with pytest.raises(ValueError, match="labels of 2 images, but 3 images"):
        make_targets(padded, torch.ones(3, 2))


def test_the_model_takes_lists_and_rectangles_alike(tiny_model, random_labels):
    model, pixels = tiny_model(), torch.rand(3, 3, 64, 64)
    crowd = random_labels(2, seed=1, iscrowd=torch.tensor([1, 0]))
    labels = [random_labels(5), random_labels(0), crowd]
    expected = model(pixels, labels=labels)
    assert torch.equal(model(pixels, labels=pad_labels(labels, 3)).loss_per_image, expected.loss_per_image)
    # A longer rectangle is the same.
    longer = pad_labels([*labels, random_labels(9)], 3)
    found = model(pixels, labels={key: value[:3] for key, value in longer.items()})
    torch.testing.assert_close(found.loss_per_image, expected.loss_per_image, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("label", [3, 80, -1, -100])
def test_a_class_that_the_model_does_not_have_is_named(tiny_model, random_labels, label):
    wrong = random_labels(2)
    wrong["class_labels"][1] = label
    with pytest.raises(ValueError, match=rf"labels\[1\]\['class_labels'\] has {label}, but num_labels=3"):
        tiny_model()(torch.rand(2, 3, 64, 64), labels=[random_labels(1), wrong])


def test_as_many_classes_as_boxes(tiny_model, random_labels):
    wrong = random_labels(3)
    wrong["boxes"] = wrong["boxes"][:2]
    with pytest.raises(ValueError, match=r"labels\[0\] has 3 class_labels, 2 boxes and 3 iscrowd"):
        tiny_model()(torch.rand(1, 3, 64, 64), labels=[wrong])
