"""Setting images aside for validation and test, and what must not lie in two splits."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from datasets import Image as ImageFeature

from .duplicates import Place, find_duplicate_images
from .problems import InvalidDatasetError, ProblemLog


def check_fractions(validation_fraction: float | None, test_fraction: float | None) -> None:
    """
    Check the shares of "train" that are to be set aside.

    Raises:
        ValueError: One is not between 0 and 1, or nothing would be left.
    """
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"{name} is {fraction}; it must lie between 0 and 1.")
    if (validation_fraction or 0) + (test_fraction or 0) >= 1:
        raise ValueError(
            f"validation_fraction {validation_fraction} and test_fraction {test_fraction} leave nothing to train on."
        )


def split_train(
    dataset: DatasetDict,
    groups: Sequence[Any],
    duplicates: Sequence[Sequence[Place]],
    validation_fraction: float | None,
    test_fraction: float | None,
    seed: int,
) -> DatasetDict:
    """
    Set images of "train" aside for the splits that are asked for and not there.

    Args:
        dataset (`DatasetDict`): The splits that there are.
        groups (`Sequence`): Group of each row of "train", which is kept together; empty where each is its own.
        duplicates (`Sequence`): Places of the same image, which are kept together, too.
        validation_fraction (`float`, *optional*): Share of all rows of "train" that become "validation"; a last group
            may exceed it.
        test_fraction (`float`, *optional*): The same for "test".
        seed (`int`): Which ones they are.

    Raises:
        InvalidDatasetError: There are too few images or groups.
    """
    wanted = {"validation": validation_fraction, "test": test_fraction}
    fractions = {split: share for split, share in wanted.items() if share is not None and split not in dataset}
    if not fractions or "train" not in dataset:
        return dataset
    train = dataset["train"]
    numbers = np.unique(list(map(str, groups)), return_inverse=True)[1] if groups else np.arange(len(train))
    for places in duplicates:
        same = numbers[[row for split, row in places if split == "train"]]
        numbers[np.isin(numbers, same)] = same.min(initial=len(train))
    counts = np.unique(numbers, return_counts=True)[1]
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1])
    parts: dict[str, list[int]] = {split: [] for split in fractions}
    rest: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(members)):
        targets = (
            split for split, share in fractions.items() if len(parts[split]) < max(1, round(len(train) * share))
        )
        parts.get(next(targets, ""), rest).extend(members[index].tolist())
    if not rest or not all(parts.values()):
        raise InvalidDatasetError(
            f'The split "train" has {len(members)} images or groups of images; that is too few to set some aside for '
            f"{' and '.join(fractions)}. Add images, or a split of your own."
        )
    chosen = {split: train.select(sorted(rows)) for split, rows in {"train": rest, **parts}.items()}
    return DatasetDict(dataset | chosen)


def report_overlap(
    dataset: Mapping[str, Dataset], groups: Mapping[str, Sequence[Any]], problems: ProblemLog
) -> list[list[Place]]:
    """
    Note images and groups that are in two splits, and images that are twice in one.

    Args:
        dataset (`Mapping[str, Dataset]`): All splits, in the row format.
        groups (`Mapping`): Group of each row by split; may be empty.
        problems (`ProblemLog`): Where they are noted.

    Returns:
        `list`: The groups of the same image, as `find_duplicate_images` gives them.
    """
    duplicates = find_duplicate_images(dataset)
    images = {
        split: rows.select_columns(["image", "image_id"]).cast_column("image", ImageFeature(decode=False))
        for split, rows in dataset.items()
    }
    for places in duplicates:
        splits = {split for split, _ in places}
        kind = "same image in two splits" if len(splits) > 1 else "same image twice in a split"
        shown = [places[0], next((place for place in places if place[0] != places[0][0]), places[1])]
        rows = {place: images[place[0]][place[1]] for place in shown}
        where = " and ".join(f'"{split}" image {rows[split, row]["image_id"]}' for split, row in shown)
        path = rows[shown[0]]["image"]["path"]
        problems.add(kind, where, f"{len(places)} times the same content", path)
    seen: dict[str, str] = {}
    for split, values in groups.items():
        for value in dict.fromkeys(map(str, values)):
            if seen.setdefault(value, split) != split:
                problems.add("same group in two splits", f"group {value!r:.80}", f'in "{seen[value]}" and "{split}"')
    return duplicates
