import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageColor

from dit_detection.visualize import draw_detections, draw_grid, plot_history

GREY = (128, 128, 128)


def blank(width=320, height=240, mode="RGB"):
    return Image.new("RGB", (width, height), GREY).convert(mode)


def changed(image, background=GREY):
    """Boolean (H, W): the pixels that were drawn on."""
    return (np.asarray(image) != np.array(background)).any(axis=2)


def colors(image):
    return {color for _, color in image.convert("RGB").getcolors(1 << 24)}


def test_box_is_outlined_at_its_place_and_the_input_left_alone():
    image = blank()
    drawn = draw_detections(image, [[100, 80, 200, 160]], ["cell"], [0.5])
    assert not changed(image).any()
    assert drawn.size == image.size and drawn.mode == "RGB"
    rows, columns = np.nonzero(changed(drawn))
    # The tag stands above the box, everything else on its edges.
    assert (columns.min(), columns.max(), rows.max()) == (100, 200, 160)
    assert 60 < rows.min() < 80
    assert not changed(drawn)[90:150, 110:190].any()


@pytest.mark.parametrize("container", [list, np.array, lambda x: torch.tensor(x, dtype=torch.bfloat16)])
def test_boxes_and_scores_may_be_lists_arrays_or_tensors(container):
    drawn = draw_detections(blank(), container([[100.0, 80.0, 200.0, 160.0]]), ["cell"], container([0.5]))
    assert drawn == draw_detections(blank(), [[100, 80, 200, 160]], ["cell"], [0.5])


def test_nothing_to_draw_changes_nothing():
    assert not changed(draw_detections(blank(), [], [])).any()
    assert not changed(draw_detections(blank(), torch.zeros(0, 4), [], torch.zeros(0))).any()
    outside = [[-50, 10, -1, 50], [320, 10, 400, 50], [10, 300, 20, 310]]
    assert not changed(draw_detections(blank(), outside, ["cell"] * 3)).any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_mode_comes_back_as_rgb(mode):
    assert draw_detections(blank(mode=mode), [[10, 10, 90, 90]], ["cell"]).mode == "RGB"


def test_sixteen_bits_are_scaled():
    values = np.linspace(0, 65535, 100 * 100).reshape(100, 100).astype(np.uint16)
    for drawn in (draw_detections(Image.fromarray(values), [], []), draw_grid([Image.fromarray(values)])):
        assert (np.asarray(drawn) == 255).mean() < 0.5


@pytest.mark.parametrize("size", [(1, 1), (8, 5), (40, 300), (300, 40), (640, 480), (3000, 2000)])
@pytest.mark.parametrize("ground_truth", [False, True])
def test_any_image_size_and_boxes_over_its_edges_can_be_drawn(size, ground_truth):
    width, height = size
    boxes = [[-10, -10, width + 10, height + 10], [0, 0, 1, 1], [width - 1, height - 1, width, height], [0, 0, 0, 0]]
    names = ["a class with quite a long name", "b", "c", "d"]
    drawn = draw_detections(blank(*size), boxes, names, [0.9, 0.8, 0.7, 0.6], ground_truth=ground_truth)
    assert drawn.size == size and changed(drawn).any()


@pytest.mark.parametrize(
    "box", [(0, 0, 60, 40), (260, 0, 320, 40), (0, 200, 60, 240), (260, 200, 320, 240), (310, 100, 318, 110)]
)
def test_tag_is_whole_at_every_edge_of_the_image(box):
    # The same tag in the middle of the image; its letters are the only dark pixels.
    def letters(drawn):
        return int((np.asarray(drawn).max(axis=2) < 90).sum())

    middle = draw_detections(blank(), [[130, 100, 190, 140]], ["RBC"], [0.5], class_names=["WBC", "RBC"])
    drawn = draw_detections(blank(), [box], ["RBC"], [0.5], class_names=["WBC", "RBC"])
    assert letters(middle) > 20
    assert letters(drawn) == letters(middle)


def test_lines_grow_with_the_image():
    def line_width(factor):
        drawn = draw_detections(blank(320 * factor, 240 * factor), [[100 * factor] * 2 + [200 * factor] * 2], ["cell"])
        return int(changed(drawn)[150 * factor, : 150 * factor].sum())

    assert line_width(1) == 1
    assert line_width(2) == 2
    assert line_width(8) == 10


def test_ground_truth_looks_different():
    arguments = (blank(), [[100, 80, 200, 160]], ["cell"])
    solid, dashed = draw_detections(*arguments), draw_detections(*arguments, ground_truth=True)
    edge = {tuple(pixel) for pixel in np.asarray(dashed)[160, 105:195].tolist()}
    assert (255, 255, 255) in edge and len(edge) == 2
    assert {tuple(pixel) for pixel in np.asarray(solid)[160, 105:195].tolist()} == edge - {(255, 255, 255)}


def test_classes_keep_their_colour_across_pictures_and_processes():
    names = [f"class {index}" for index in range(20)]
    seen = set()
    for name in names:
        drawn = draw_detections(blank(), [[100, 80, 200, 160]], [name], class_names=names)
        seen.add(drawn.getpixel((150, 160)))
    assert len(seen) == 20

    # Without the list, the name alone decides: crc32("cell") = 3414656994, and 3414656994 % 20 = 14.
    unnamed = draw_detections(blank(), [[100, 80, 200, 160]], ["cell"])
    fifteenth = draw_detections(blank(), [[100, 80, 200, 160]], ["cell"], class_names=[*"abcdefghijklmn", "cell"])
    assert unnamed == fifteenth


def test_best_scored_box_is_on_top():
    box = [100, 80, 200, 160]
    names = ["low", "high"]
    for order in (names, names[::-1]):
        scores = [0.9 if name == "high" else 0.1 for name in order]
        drawn = draw_detections(blank(), [box, box], order, scores, class_names=names)
        alone = draw_detections(blank(), [box], ["high"], [0.9], class_names=names)
        assert drawn.getpixel((150, 160)) == alone.getpixel((150, 160))


def test_tags_of_neighbours_do_not_hide_each_other():
    # Three boxes with the same upper left corner: their tags find three places.
    boxes = [[100, 80, 200, 160], [100, 80, 210, 170], [100, 80, 220, 180]]
    single = draw_detections(blank(), boxes[:1], ["RBC"], class_names=["WBC", "RBC"])
    crowd = draw_detections(blank(), boxes, ["RBC"] * 3, class_names=["WBC", "RBC"])
    dark = [int((np.asarray(image).max(axis=2) < 90).sum()) for image in (single, crowd)]
    assert dark[0] > 10 and dark[1] == 3 * dark[0]


def test_draw_detections_refuses_what_does_not_fit_together():
    with pytest.raises(ValueError, match="got 1, 2 and none"):
        draw_detections(blank(), [[0, 0, 5, 5]], ["a", "b"])
    with pytest.raises(ValueError, match="got 1, 1 and 2"):
        draw_detections(blank(), [[0, 0, 5, 5]], ["a"], [0.5, 0.5])
    with pytest.raises(ValueError, match="labels must be of class_names, cat, dog, got owl"):
        draw_detections(blank(), [[0, 0, 5, 5]], ["owl"], class_names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"must be xyxy in pixels, got \[90.0, 90.0, 10.0, 10.0\]"):
        draw_detections(blank(), [[90, 90, 10, 10]], ["a"])


def test_a_name_of_several_lines_is_drawn_as_one():
    image = Image.new("RGB", (200, 100))
    names = ("red cell", "red\ncell")
    drawn = [draw_detections(image, [[20, 40, 180, 90]], [name], class_names=[name]) for name in names]
    assert drawn[0].tobytes() == drawn[1].tobytes()


def test_grid_places_every_image():
    reds = [Image.new("RGB", (200, 100), (200, 10 * index, 0)) for index in range(5)]
    grid = draw_grid(reds, columns=2, cell_size=100)
    # Two columns of 100 and three rows of 50, with gaps of 4 around.
    assert grid.size == (3 * 4 + 2 * 100, 4 * 4 + 3 * 50)
    centres = [(54, 29), (158, 29), (54, 83), (158, 83), (54, 137)]
    assert [grid.getpixel(centre) for centre in centres] == [(200, 10 * index, 0) for index in range(5)]
    assert grid.getpixel((158, 137)) == (255, 255, 255)


def test_grid_captions_stay_in_their_cells():
    images = [blank(100, 100), blank(100, 50)]
    short = draw_grid(images, cell_size=120, captions=["a", "b"])
    long = draw_grid(images, cell_size=120, captions=["a", "b" * 500])
    assert short.size == long.size
    assert short.size[1] > draw_grid(images, cell_size=120).size[1]
    left_half = (0, 0, short.width // 2, short.height)
    assert short.crop(left_half) == long.crop(left_half)
    assert ImageChops.difference(short, long).getbbox() is not None


def test_grid_refuses_nonsense():
    with pytest.raises(ValueError, match="got 0 images"):
        draw_grid([])
    with pytest.raises(ValueError, match="columns=0"):
        draw_grid([blank()], columns=0)
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        draw_grid([blank(), blank()], captions=["one"])


def test_history_has_a_panel_for_what_was_logged():
    losses = [{"epoch": float(epoch), "loss": 2.0 / epoch} for epoch in range(1, 6)]
    scores = [{"epoch": float(epoch), "eval_map": 0.1 * epoch, "eval_map_50": 0.15 * epoch} for epoch in range(1, 6)]
    both, one = plot_history([*losses, *scores, {"train_runtime": 3.0, "epoch": 5.0}]), plot_history(losses)
    assert both.mode == "RGB" and both.width == 2 * one.width and both.height == one.height
    blue = ImageColor.getrgb("#0b6cf0")
    assert blue in colors(both) and blue in colors(one)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_history([{"epoch": 1.0, "eval_map": -1.0}, {"train_runtime": 3.0}])
