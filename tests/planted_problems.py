"""A clean data set on the disk, and what gets each kind of problem that `dit-detect check` finds into it."""

import json

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
BOXES = [[2, 2, 20, 16], [30, 5, 22, 20], [10, 26, 24, 20]]
NUM_TRAIN, NUM_VALIDATION = 24, 4


class Planted:
    """A data set as it lies on the disk: `train` and `val` as COCO content, and their images."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "images").mkdir()
        self.splits = {"train": self._content("train", NUM_TRAIN), "val": self._content("val", NUM_VALIDATION)}

    def _content(self, split, count):
        images, annotations = [], []
        for image_id in range(1, count + 1):
            self.save(self.pixels(image_id + (100 if split == "val" else 0)), f"{split}_{image_id}.png")
            images.append({"id": image_id, "file_name": f"{split}_{image_id}.png", "width": WIDTH, "height": HEIGHT})
            for label, box in enumerate(BOXES):
                annotations.append(self.annotation(image_id, 10 * (label + 1), box, len(annotations) + 1))
        categories = [{"id": 10, "name": "ant"}, {"id": 20, "name": "bee"}, {"id": 30, "name": "cow"}]
        return {"images": images, "annotations": annotations, "categories": categories}

    @staticmethod
    def annotation(image_id, category_id, box, annotation_id):
        return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": box}

    @staticmethod
    def pixels(seed, mode="RGB"):
        noise = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        return Image.fromarray(noise).convert(mode)

    def save(self, image, name, **options):
        image.save(self.folder / "images" / name, **options)

    def rename(self, name, split="train", row=0):
        """Give an image another file name."""
        entry = self.splits[split]["images"][row]
        if entry["file_name"] != name:
            (self.folder / "images" / entry["file_name"]).unlink()
        entry["file_name"] = name

    def add(self, box, category_id=10, split="train", image_id=1):
        annotations = self.splits[split]["annotations"]
        annotations.append(self.annotation(image_id, category_id, box, len(annotations) + 1000))

    def keep(self, condition, split="train"):
        """Keep the annotations that meet a condition."""
        self.splits[split]["annotations"] = [a for a in self.splits[split]["annotations"] if condition(a)]

    def add_category(self, category_id, name):
        for content in self.splits.values():
            content["categories"].append({"id": category_id, "name": name})

    def write(self):
        for split, content in self.splits.items():
            (self.folder / f"annotations_{split}.json").write_text(json.dumps(content))
        return str(self.folder)


def cut_off(data):
    data.save(data.pixels(1), "a.jpg")
    path = data.folder / "images" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    data.rename("a.jpg")


def wrong_extension(data):
    data.save(data.pixels(1), "a.jpg", format="PNG")
    data.rename("a.jpg")


def orient(stored_upright):
    def plant(data):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90°
        image = data.pixels(1)
        data.save(image if stored_upright else image.transpose(Image.Transpose.ROTATE_90), "train_1.png", exif=exif)

    return plant


def rename_classes(names):
    def plant(data):
        for content in data.splits.values():
            for category, name in zip(content["categories"], names, strict=True):
                category["name"] = name

    return plant


def copy_image(source, target):
    def plant(data):
        data.save(Image.open(data.folder / "images" / source), target)

    return plant


def convert(mode, name="train_1.png"):
    def plant(data):
        data.save(Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)), name) if (
            mode == "I;16"
        ) else data.save(data.pixels(1, mode), name)
        data.rename(name)

    return plant


def remove_training(data):
    for image in data.splits.pop("train")["images"]:
        (data.folder / "images" / image["file_name"]).unlink()


def add_crowds(data):
    for image_id in range(1, NUM_TRAIN + 1):
        for left in range(4):
            data.add([left, 1, 30, 30], image_id=image_id)
            data.splits["train"]["annotations"][-1]["iscrowd"] = 1


# kind → its severity, how often, and how it gets into a clean set. The kinds of the reader are tested with the reader;
# here are a few, to see that they arrive.
PLANTS = {
    "missing image file": ("error", 1, lambda d: (d.folder / "images" / "train_1.png").unlink()),
    "empty box": ("error", 1, lambda d: d.add([5, 5, 0, 4])),
    "box outside the image": ("error", 1, lambda d: d.add([60, 5, 20, 4])),
    "non-finite box": ("error", 1, lambda d: d.add([float("nan"), 5, 20, 4])),
    "unknown category": ("error", 1, lambda d: d.add([5, 30, 4, 5], category_id=40)),
    "no training split": ("error", 1, remove_training),
    "image cannot be decoded": ("error", 1, cut_off),
    "two boxes for one object": ("warning", 1, lambda d: d.add([2.2, 2.2, 20, 16])),
    "two classes at one place": ("warning", 1, lambda d: d.add([2, 2.2, 20, 16], category_id=20)),
    "box of the whole image": ("warning", 1, lambda d: d.add([0, 0, 63, 48])),
    "object too small for the canvas": ("warning", 1, lambda d: d.add([2, 30, 3, 6])),
    "extreme aspect ratio": ("note", 1, lambda d: d.add([2, 40, 60, 5])),
    "labels may be one class off": ("warning", 1, lambda d: d.add_category(0, "things")),
    "class for the background": ("warning", 1, lambda d: d.add_category(0, "__background__")),
    "class that is never used": ("warning", 1, lambda d: d.add_category(25, "dog")),
    "class without training objects": ("warning", 1, lambda d: d.keep(lambda a: a["category_id"] != 20)),
    "class in training only": ("note", 1, lambda d: d.keep(lambda a: a["category_id"] != 20, "val")),
    "mostly crowd regions": ("warning", 4 * NUM_TRAIN, add_crowds),
    "class with few training objects": (
        "warning",
        1,
        lambda d: d.keep(lambda a: a["category_id"] != 20 or a["image_id"] < 10),
    ),
    "classes without names": ("note", 3, rename_classes(["0", "1", "2"])),
    "split without objects": ("warning", 1, lambda d: d.keep(lambda a: False, "val")),
    "image without objects": ("note", 2, lambda d: d.keep(lambda a: a["image_id"] > 2)),
    "image without a usual class": (
        "note",
        1,
        lambda d: d.keep(lambda a: a["image_id"] > 1 or a["category_id"] != 20),
    ),
    "same image in two splits": ("warning", 1, copy_image("train_3.png", "val_2.png")),
    "same image twice in a split": ("warning", 1, copy_image("train_3.png", "train_5.png")),
    "wrong file name extension": ("note", 1, wrong_extension),
    "turned by its EXIF orientation": ("note", 1, orient(stored_upright=False)),
    "annotated against its EXIF orientation": ("note", 1, orient(stored_upright=True)),
    "CMYK image": ("note", 1, convert("CMYK", "a.jpg")),
    "more than 8 bits per channel": ("note", 1, convert("I;16")),
    "palette image": ("note", 1, convert("P")),
    "transparent image": ("note", 1, convert("RGBA")),
    "greyscale image": ("note", 1, convert("L")),
}
