"""Damaged files of every format; `test_data_damage.py` has the damages of single fields of a COCO JSON."""

from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_folders import objects_of, write_labelme, write_text, write_voc, write_yolo
from coco_folder import coco_content, write_coco, write_images
from more_annotation_files import CSV, link_out, with_image_list, with_list, write_csv, write_jsonl

from dit_detection.data import (
    InvalidDatasetError,
    ProblemLog,
    load_detection_dataset,
    read_detection_dataset,
)
from dit_detection.data.problems import REMEDIES

Damage = Callable[[Path], object]  # what is done to a file; it gets the path


def text(content: str) -> Damage:
    return lambda file: write_text(file, content)


def raw(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def replace(old: str, new: str) -> Damage:
    def damage(file: Path) -> None:
        content = file.read_text(encoding="utf-8")
        assert old in content
        file.write_text(content.replace(old, new, 1), encoding="utf-8")

    return damage


def cut(length: int) -> Damage:
    return lambda file: file.write_bytes(file.read_bytes()[:length])


def utf16(file: Path) -> None:
    file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


ENTITY_BOMB = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
    + "]><annotation>&j;</annotation>"
)
OUTSIDE_ENTITY = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><folder>&x;</folder></annotation>'
YAML_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)
A, B = "Annotations/a.xml", "Annotations/b.xml"
BOX = "<xmin>1</xmin>"
BAD_XML, BAD_SET = "unusable annotation file", "unusable data set"

# Name; what writes a sound data set of two images and three objects; the file that is damaged; how; the kind that is
# reported; part of the message; how many of the 3 objects are left with on_invalid="drop", or None where it stops.
DAMAGES: list[tuple[str, Callable[[Path], Path], str, Damage, str, str, int | None]] = [
    ("JSON with a number of 5000 digits", write_coco, "annotations_train.json", replace("40", "4" * 5000),
     "unusable file", "annotations_train.json: cannot be read: Exceeds the limit", None),
    ("JSON with half a character", write_coco, "annotations_train.json", replace("a.png", "a\\ud800.png"),
     "unusable image entry", "images[0]: field \"file_name\" is 'a\\ud800.png'", 2),
    ("JSON with a NUL in a file name", write_coco, "annotations_train.json", replace("a.png", "a\\u0000.png"),
     "unusable image entry", "images[0]: field \"file_name\" is 'a\\x00.png'", 2),
    ("JSON with a file name of 5000 letters", write_coco, "annotations_train.json", replace("a.png", "a" * 5000),
     "unreadable image", 'image 7 ("aaaaaaa', 2),
    ("JSON that is a folder", write_coco, "annotations_train.json", folder_instead,
     "unusable file", "annotations_train.json: cannot be read: [Errno 21] Is a directory", None),
    ("image that is a folder", write_coco, "images/a.png", folder_instead,
     "unreadable image", "a.png cannot be opened: [Errno 21] Is a directory", 2),
    ("image of 0 bytes", write_coco, "images/a.png", cut(0), "unreadable image", "cannot identify image file", 2),
    ("image cut short in its header", write_coco, "images/a.png", cut(20), "unreadable image", "a.png cannot be", 2),
    ("image that is a link out of the data set", write_coco, "images/a.png", link_out,
     "link leads outside the data set", "outside.png", 2),
    ("image that is a dangling link", write_coco, "images/a.png",
     lambda file: (file.unlink(), file.symlink_to(file.parent / "gone.png")), "missing image file", "a.png", 2),
    ("XML cut short", write_voc, B, cut(200), BAD_XML, "b.xml: cannot be read as XML: unclosed token", 1),
    ("XML that is none", write_voc, B, text("not XML"), BAD_XML, "b.xml: cannot be read as XML: syntax error", 1),
    ("XML that is empty", write_voc, B, text(""), BAD_XML, "b.xml: cannot be read as XML: no element found", 1),
    ("XML that is a folder", write_voc, B, folder_instead, BAD_XML, "b.xml: cannot be read as XML: [Errno 21]", 1),
    ("XML with an entity bomb", write_voc, B, text(ENTITY_BOMB), BAD_XML, "b.xml: declares entities", 1),
    ("XML with an entity from a file", write_voc, B, text(OUTSIDE_ENTITY), BAD_XML, "b.xml: declares entities", 1),
    ("XML in an encoding it does not name", write_voc, B, raw("<annotation>é</annotation>".encode("latin-1")),
     BAD_XML, "b.xml: cannot be read as XML: not well-formed", 1),
    ("XML in an encoding that does not exist", write_voc, B, text('<?xml version="1.0" encoding="x"?><annotation/>'),
     BAD_XML, "b.xml: cannot be read as XML: unknown encoding", 1),
    ("XML of another tool", write_voc, B, text("<annotations><version>1.1</version></annotations>"),
     BAD_XML, "b.xml: has the root element <annotations>, not <annotation>", 1),
    ("bndbox with its corners swapped", write_voc, B, replace(BOX, "<xmin>20</xmin>"),
     "empty box", "[20.0, 2.0, -9", 2),
    ("bndbox without a corner", write_voc, B, replace(BOX, ""), "unusable object", "{'xmin': '', 'ymin': '2'", 2),
    ("bndbox with a word", write_voc, B, replace(BOX, "<xmin>one</xmin>"), "unusable object", "{'xmin': 'one'", 2),
    ("bndbox with NaN", write_voc, B, replace(BOX, "<xmin>nan</xmin>"), "non-finite box", "[nan, 2.0, nan, 8.0]", 2),
    ("bndbox with infinity", write_voc, B, replace(BOX, "<xmin>1e999</xmin>"), "non-finite box", "[inf, 2.0", 2),
    ("bndbox outside the image", write_voc, B, replace("<xmax>11<", "<xmax>110<"),
     "box outside the image", "109.0", 2),
    ("object without a name", write_voc, B, replace("<name>dog</name>", ""),
     "unknown category", "field \"name\" is ''", 2),
    ("size that is no number", write_voc, B, replace("<width>40<", "<width>x<"),
     "unusable image entry", "b.xml\"): field \"size\" has could not convert string to float: 'x'", 1),
    ("size that is negative", write_voc, B, replace("<width>40<", "<width>-40<"), "unusable image entry", "'-40'", 1),
    ("size of another image", write_voc, B, replace("<width>40<", "<width>41<"),
     "image size differs from the annotation", "41 x 30, the file has 40 x 30 pixels", 1),
    ("XML without its image", write_voc, "JPEGImages/b.png", Path.unlink,
     "missing image file", 'there is no image "b" with a known suffix, and no file \'b.png\'', 1),
    ("list that names no XML", with_list, "ImageSets/Main/train.txt", text("a\nb\nc\n"),
     "missing annotation file", "train.txt: line 3: names 'c', but there is no file", 3),
    ("list that leads outside", with_list, "ImageSets/Main/train.txt", text("a\nb\n../../x\n"),
     "missing annotation file", "train.txt: line 3: names '../../x'", 3),
    ("list in UTF-16", with_list, "ImageSets/Main/train.txt", utf16, BAD_SET, "train.txt is not UTF-8 text", None),
    ("list of classes that repeats one", write_voc, "classes.txt", text("cat\ndog\ncat\n"),
     BAD_SET, "classes.txt: class 'cat' is there twice", None),
    ("list of classes with a gap", write_voc, "classes.txt", text("cat\n\ndog\n"),
     BAD_SET, "classes.txt: line 2 is empty", None),
    ("list of classes with a comment", write_voc, "classes.txt", text("# my classes\ncat\ndog\n"),
     BAD_SET, "classes.txt: line 1, '# my classes', reads as a comment", None),
    ("class number out of range", write_yolo, "labels/b.txt", replace("1 ", "2 "),
     "unknown category", "b.txt, line 1: class 2, not one of 0 to 1", 2),
    ("class number that is negative", write_yolo, "labels/b.txt", replace("1 ", "-1 "),
     "unknown category", "class -1", 2),
    ("class number with a fraction", write_yolo, "labels/b.txt", replace("1 ", "0.5 "),
     "unknown category", "class 0.5", 2),
    ("class name in place of its number", write_yolo, "labels/b.txt", replace("1 ", "dog "),
     "unusable label line", "b.txt, line 1: 'dog 0.15", 2),
    ("line with too few columns", write_yolo, "labels/b.txt", replace("\n", "\n0 0.1 0.1\n"),
     "unusable label line", "b.txt, line 2: 3 columns; a box has 5", 3),
    ("line with a score", write_yolo, "labels/b.txt", replace("\n", " 0.9\n"), "unusable label line", "6 columns", 2),
    ("line in pixels", write_yolo, "labels/b.txt", text("1 6 6 10 8\n"),
     "box not in fractions", "b.txt, line 1: '6 6 10 8' are not between 0 and 1", 1),
    ("line with NaN", write_yolo, "labels/b.txt", text("1 nan 0.5 0.1 0.1\n"), "non-finite box", "nan", 1),
    ("line with a box without area", write_yolo, "labels/b.txt", text("1 0.5 0.5 0 0.1\n"),
     "empty box", "20.0, 13.5", 1),
    ("polygon outside the image", write_yolo, "labels/b.txt", text("1 0.1 0.1 0.5 0.1 1.5 0.5\n"),
     "box not in fractions", "are not between 0 and 1", 1),
    ("labels in UTF-16", write_yolo, "labels/b.txt", utf16, BAD_XML, "b.txt is not UTF-8 text", 1),
    ("labels that are bytes", write_yolo, "labels/b.txt", raw(bytes(range(256))),
     BAD_XML, "b.txt is not UTF-8 text", 1),
    ("labels that are a folder", write_yolo, "labels/b.txt", folder_instead,
     BAD_XML, "cannot be read: Is a directory", 1),
    ("labels without an image", write_yolo, "labels/c.txt", text("0 0.5 0.5 0.1 0.1\n"),
     "label file without image", 'c.txt: there is no image "c"', 3),
    ("image that a list names and is not there", with_image_list, "train.txt", text("images/b.png\nimages/c.png\n"),
     "missing image file", 'image 1 ("images/c.png"): there is no file', 2),
    ("list of images that leads outside", with_image_list, "train.txt", text("images/b.png\n/etc/passwd\n"),
     BAD_SET, "'/etc/passwd' leads out of the data set's folder", None),
    ("list of images that climbs", with_image_list, "train.txt", text("images/b.png\n../../etc/passwd\n"),
     "missing image file", 'image 1 ("etc/passwd"): there is no file', 2),
    ("list of images that is bytes", with_image_list, "train.txt", raw(b"images/b.png\n\0\n"),
     BAD_SET, "train.txt: line 2 is no file name", None),
    ("YAML that runs a command", write_yolo, "data.yaml", text("train: !!python/object/apply:os.system ['exit']\n"),
     BAD_SET, "data.yaml cannot be read as plain YAML: could not determine a constructor", None),
    ("YAML cut short", write_yolo, "data.yaml", text("train: images\nnames: [cat, 'do"),
     BAD_SET, "as plain YAML", None),
    ("YAML that is bytes", write_yolo, "data.yaml", raw(b"\x80\x81"), BAD_SET, "data.yaml is not UTF-8 text", None),
    ("YAML with a control character", write_yolo, "data.yaml", raw(b"train: \x00"), BAD_SET, "as plain YAML", None),
    ("YAML that holds a list", write_yolo, "data.yaml", text("- a\n- b\n"), BAD_SET, "data.yaml holds a list", None),
    ("YAML that nests endlessly", write_yolo, "data.yaml", text("[" * 600), BAD_SET, "data.yaml cannot be", None),
    ("YAML with a bomb of aliases", write_yolo, "data.yaml", text(f"{YAML_BOMB}train: images\nnames: [*u]\n"),
     BAD_SET, 'data.yaml, key "names": class of type list is no name', None),
    ("YAML with yes for a name", write_yolo, "data.yaml", text("train: images\nnames: [yes, dog]\n"),
     BAD_SET, "class of type bool is no name", None),
    ("YAML with a gap in its classes", write_yolo, "data.yaml", text("train: images\nnames: {0: cat, 2: dog}\n"),
     BAD_SET, 'key "names" must count its classes from 0 without gaps', None),
    ("YAML with a class twice", write_yolo, "data.yaml", text("train: images\nnames: [cat, cat]\n"),
     BAD_SET, "class 'cat' is there twice", None),
    ("YAML with another number of classes", write_yolo, "data.yaml", text("train: images\nnc: 3\nnames: [cat, dog]\n"),
     BAD_SET, 'key "nc" is 3, but "names" has 2', None),
    ("YAML of another folder", write_yolo, "data.yaml", text("train: pictures\nnames: [cat, dog]\n"),
     BAD_SET, "data.yaml names no images that are there (train: 'pictures')", None),
    ("YAML of poses", write_yolo, "data.yaml", text("train: images\nkpt_shape: [17, 3]\nnames: [cat, dog]\n"),
     BAD_SET, "describes poses (kpt_shape), not boxes", None),
    ("JSON of LabelMe cut short", write_labelme, "b.json", cut(-20),
     BAD_XML, "b.json: cannot be read as JSON: Expecting", 1),
    ("JSON of LabelMe in UTF-16", write_labelme, "b.json", utf16, BAD_XML, "b.json: is not UTF-8 text", 1),
    ("JSON of LabelMe that nests endlessly", write_labelme, "b.json", text("[" * 10**5), BAD_XML, "b.json: cannot", 1),
    ("JSON among LabelMe's that is none", write_labelme, "b.json", text('{"shapes": {}}'),
     BAD_XML, 'b.json: is not a JSON of LabelMe, which has a list "shapes"', 1),
    ("JSON of LabelMe that is a folder", write_labelme, "b.json", folder_instead, BAD_XML, "Is a directory", 1),
    ("shape without a label", write_labelme, "b.json", replace('"label": "dog"', '"label": null'),
     "unusable shape", "shapes[0] is {'label': None, 'shape_type': 'rectangle', 'points': [[11,", 2),
    ("shape that is a line", write_labelme, "b.json", replace('"rectangle"', '"line"'),
     "unusable shape", "shapes[0] is {'label': 'dog', 'shape_type': 'line'", 2),
    ("shape of a list", write_labelme, "b.json", replace('"rectangle"', '["x"]'), "unusable shape", "['x']", 2),
    ("shape that is none", write_labelme, "b.json", replace('"shapes": [', '"shapes": [7, '),
     "unusable shape", "shapes[0] is 7", 3),
    ("shape with too few points", write_labelme, "b.json", replace("[[11, 10], [1, 2]]", "[[11, 10]]"),
     "unusable shape", "'points': [[11, 10]]}", 2),
    ("shape with a point of one number", write_labelme, "b.json", replace("[11, 10]", "[11]"),
     "unusable shape", "'points': [[11], [1, 2]]}", 2),
    ("shape with a word", write_labelme, "b.json", replace("[11, 10]", '[11, "ten"]'), "unusable shape", "'ten'", 2),
    ("shape with NaN", write_labelme, "b.json", replace("[11, 10]", "[NaN, 10]"), "unusable shape", "[[nan, 10]", 2),
    ("shape with infinity", write_labelme, "b.json", replace("[11, 10]", "[1e999, 10]"), "unusable shape", "[[inf", 2),
    ("shape outside the image", write_labelme, "b.json", replace("[11, 10]", "[110, 10]"),
     "box outside the image", "[1.0, 2.0, 109.0, 8.0]", 2),
    ("shape without area", write_labelme, "b.json", replace("[11, 10]", "[1, 10]"), "empty box", "0.0, 8.0]", 2),
    ("shape of a class that is not listed", write_labelme, "labels.txt", text("cat"),
     "unknown category", "field \"label\" is 'dog'; there are cat", 2),
    ("imageWidth that is no number", write_labelme, "b.json", replace('"imageWidth": 40', '"imageWidth": "40"'),
     "unusable image entry", "fields \"imageWidth\" and \"imageHeight\" are '40' and 30", 1),
    ("LabelMe's JSON in place of its folder", lambda folder: write_labelme(folder) / "b.json", ".", lambda file: None,
     BAD_SET, "b.json: is LabelMe's JSON of one image. Name the folder", None),
    ("imageWidth that is negative", write_labelme, "b.json", replace('"imageWidth": 40', '"imageWidth": -40'),
     "unusable image entry", "are -40 and 30", 1),
    ("pixels in the JSON alone", write_labelme, "b.png",
     lambda file: (file.unlink(), replace('"imageData": null', '"imageData": "A"')(file.with_suffix(".json"))),
     "missing image file", "its pixels are in the field \"imageData\"", 1),
    ("imageWidth of another image", write_labelme, "b.json", replace('"imageWidth": 40', '"imageWidth": 41'),
     "image size differs from the annotation", 'image 1 ("b.json")', 1),
    ("JSON of LabelMe without its image", write_labelme, "b.png", Path.unlink,
     "missing image file", "there is no image \"b\" with a known suffix, and no file 'b.png'", 1),
    ("CSV without a header", write_csv, "metadata.csv", text(CSV.partition("\n")[2]),
     BAD_SET, "metadata.csv: no column names the image; the first row has 'a.png, 0.5", None),
    ("CSV with nothing but a header", write_csv, "metadata.csv", text(CSV.partition("\n")[0]),
     BAD_SET, 'holds nothing of the format "imagefolder"', None),
    ("CSV that is empty", write_csv, "metadata.csv", text(""), BAD_SET, "no column names the image", None),
    ("CSV in UTF-16", write_csv, "metadata.csv", utf16, BAD_SET, "metadata.csv is not UTF-8 text", None),
    ("CSV with a longer row", write_csv, "metadata.csv", replace("dog", "dog,1"), BAD_SET, "line 3 has not", None),
    ("CSV with a shorter row", write_csv, "metadata.csv", replace(",10,dog", ""), BAD_SET, "line 3 has not", None),
    ("CSV with a word for a number", write_csv, "metadata.csv", replace("11", "eleven"),
     "unusable object", "[1.0, 2.0, 'eleven', 10.0], not four numbers", 2),
    ("CSV in fractions", write_csv, "metadata.csv", text(CSV.partition("\n")[0] + "\na.png,0.1,0.2,0.3,0.4,cat\n"),
     BAD_SET, "all boxes lie between 0 and 1, as fractions do", None),
    ("CSV with a file name that leads outside", write_csv, "metadata.csv", replace("a.png", "../../a.png"),
     "file name leads outside the image folder", "field \"file_name\" is '../../a.png'", 2),
    ("CSV with an absolute file name", write_csv, "metadata.csv", replace("a.png", "/etc/passwd"),
     "file name leads outside the image folder", "field \"file_name\" is '/etc/passwd'", 2),
    ("CSV without a class", write_csv, "metadata.csv", replace("dog", ""),
     "unknown category", "\"category\" is None", 2),
    ("JSON lines cut short", write_jsonl, "metadata.jsonl", cut(-20),
     "unusable metadata row", "metadata.jsonl: line 2: not valid JSON", 1),
    ("JSON lines that are no objects", write_jsonl, "metadata.jsonl", replace("\n", "\n[1]\n"),
     "unusable metadata row", "metadata.jsonl: line 2: holds a list, not an object", 3),
    ("JSON lines with an image twice", write_jsonl, "metadata.jsonl", replace("b.png", "a.png"),
     "image listed twice", "metadata.jsonl: line 2: field \"file_name\" is 'a.png' again", 1),
    ("JSON lines without a file name", write_jsonl, "metadata.jsonl", replace("file_name", "id"),
     "unusable image entry", "metadata.jsonl: line 1: no file name; it has the columns id, objects", 2),
    ("JSON lines with a file that is not there", write_jsonl, "metadata.jsonl", replace("b.png", "c.png"),
     "missing image file", 'image 1 ("c.png"): there is no file', 1),
    ("JSON lines with columns of different lengths", write_jsonl, "metadata.jsonl",
     replace('["dog", "cat"]', '["dog"]'), "unusable object", 'field "category" has 1 entries for 2 boxes', 1),
    ("JSON lines with words for boxes", write_jsonl, "metadata.jsonl",
     replace('"bbox": [[0.5, 0, 4, 30]]', '"bbox": 3'), "unusable object", 'field "objects" is', 2),
    ("CSV with a split of unknown name", write_csv, "metadata.csv",
     text("file_name,xmin,ymin,xmax,ymax,label,set\na.png,1,1,9,9,cat,x\nb.png,1,1,9,9,cat,\n"),
     "unknown split", "metadata.csv: line 2: column \"set\" is 'x'", 1),
    ("parquet that is none", write_images, "metadata.parquet", raw(b"PAR1 and no more"),
     BAD_SET, "metadata.parquet cannot be read as parquet", None),
    ("saved data set that is none", lambda folder: write_images(folder),
     "dataset_dict.json", text('{"splits": ["x"]}'),
     BAD_SET, "cannot be loaded: ", None),
    ("parquet of a data set that is none", lambda folder: write_images(folder), "train.parquet", raw(b"PAR1"),
     BAD_SET, "cannot be loaded: ", None),
    ("archive in place of a folder", lambda folder: write_coco(folder) / "a.zip", ".", raw(b"PK"),
     BAD_SET, "a.zip: is no file of annotations", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "file", "damage", "kind", "what", "num_left"),
    [row[1:] for row in DAMAGES],
    ids=[row[0] for row in DAMAGES],
)
def test_damage_is_reported(
    tmp_path: Path,
    write: Callable[[Path], Path],
    file: str,
    damage: Damage,
    kind: str,
    what: str,
    num_left: int | None,
) -> None:
    folder = write(tmp_path / "data")
    damage(folder / file if file != "." else folder)
    with pytest.raises(InvalidDatasetError) as error:
        load_detection_dataset(folder)
    message = str(error.value)
    assert what in message
    assert f" x {kind}: {REMEDIES[kind]}" in message
    assert str(tmp_path / "data") in message
    assert len(message) < 3000
    problems = ProblemLog("drop")
    dataset = read_detection_dataset(folder, problems)
    assert problems.counts[kind] >= 1
    assert (dataset is None) == (num_left is None) == problems.fatal
    if dataset is not None:
        problems.finish()
        assert sum(len(objects["bbox"]) for objects in dataset["train"]["objects"]) == num_left


def test_at_least_forty_damages_and_each_has_its_name() -> None:
    assert len({row[0] for row in DAMAGES}) == len(DAMAGES) >= 40


def test_byte_order_marks_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    for index, write in enumerate((write_coco, write_voc, write_yolo, write_labelme, write_csv, write_jsonl)):
        folder = write(tmp_path / str(index))
        expected = objects_of(load_detection_dataset(folder)["train"])
        for file in folder.rglob("*"):
            if file.suffix in (".json", ".txt", ".yaml", ".csv", ".jsonl", ".xml"):
                file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        assert objects_of(load_detection_dataset(folder)["train"]) == expected


def test_nothing_is_recognised_and_the_message_says_what_is_there(tmp_path: Path) -> None:
    write_images(tmp_path / "pictures")
    write_text(tmp_path / "readme.md", "")
    with pytest.raises(InvalidDatasetError, match=r"Looked for:(.|\n)*Found: 2 x .png, 1 x .md, pictures/"):
        load_detection_dataset(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidDatasetError, match="Found: nothing"):
        load_detection_dataset(tmp_path / "empty")


def test_problems_are_kept_with_image_and_box(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] += [
        {"id": 10 + index, "image_id": 9, "category_id": 5, "bbox": [50 + index, 2, 3, 4]} for index in range(30)
    ]
    content["images"].append({"id": 11, "file_name": "gone.png"})
    problems = ProblemLog("error")
    dataset = read_detection_dataset(write_coco(tmp_path, content), problems)
    assert dataset is not None
    assert [len(objects["id"]) for objects in dataset["train"]["objects"]] == [1, 2]  # as with on_invalid="drop"
    assert problems.counts == {"missing image file": 1, "box outside the image": 30}
    kept = problems.examples["box outside the image"]
    assert len(kept) == 20
    assert (kept[1].image, kept[1].box) == (str(tmp_path / "images" / "b.png"), (51, 2, 3, 4))
    assert problems.examples["missing image file"][0].image == str(tmp_path / "images" / "gone.png")
    with pytest.raises(InvalidDatasetError, match="31 problems"):
        problems.finish()
