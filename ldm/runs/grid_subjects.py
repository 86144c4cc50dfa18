"""The subjects of a study or a search: folders of photos, storybook subjects, and several in one run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import yaml

from ldm.errors import UserError
from ldm.shipped import find_file
from ldm.storybook.subjects import new_subject, write_subject
from ldm.storybook.world import CLASSES

IDENTIFIERS = ("sks", "zwx", "qpv", "ohk", "vtj", "xld")  # of subjects in one run, in their order
SINGLE = ("subject_root", "class_word", "identifier")


class Subject(TypedDict, total=False):
    """`class_word`, and either the folder `photos` or the `seed` of a storybook subject, which is drawn with
    the exact `masks` of its photos if that is true; or `together`: the names of other subjects, all of which
    one run learns."""

    class_word: str
    photos: str
    seed: int
    masks: bool
    together: list[str]


Subjects = Mapping[str, Subject]


def read_mapping(path: str | Path, kind: str) -> dict:
    """What a YAML file of keys holds. kind: "study", as errors name the file. Raises UserError."""
    try:
        content = yaml.safe_load(find_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"The {kind} cannot be read", where=path, remedy="Give a YAML file.") from error
    if not isinstance(content, dict):
        raise UserError(f"The file is not a {kind}", where=path, remedy="Give a YAML file of keys.")
    return content


def read_group(name: str, path: str | Path) -> Any:
    """The subjects of a group, named "FILE:GROUP", that several studies share; not checked yet.

    path: of the study that names it. Raises UserError.
    """
    file, _, group = name.rpartition(":")
    if not file or not group:
        remedy = "Write `FILE:GROUP`, as in configs/studies/subjects.yaml:studies, or the subjects."
        raise UserError(f"`{name}` names no group of subjects", where=path, remedy=remedy)
    groups = read_mapping(file, "file of subjects")
    if group not in groups:
        remedy = f"It has {', '.join(map(str, groups)) or 'none'}."
        raise UserError(f"There is no group `{group}` of subjects", where=file, remedy=remedy)
    return groups[group]


def check_subjects(subjects: Subjects, path: str | Path) -> None:
    """Raises UserError for subjects that are not complete. path: of the study."""
    for name, subject in subjects.items():
        if "together" in subject:
            _check_together(name, subjects, path)
            continue
        if "class_word" not in subject or ("photos" in subject) == ("seed" in subject):
            remedy = "Give it a class_word, and either a folder of photos or a seed."
            raise UserError(f"The subject `{name}` is not complete", where=path, remedy=remedy)
        if "seed" in subject and subject["class_word"] not in CLASSES:
            remedy = f"It draws {', '.join(CLASSES)}."
            raise UserError(f"The storybook has no `{subject['class_word']}`", where=path, remedy=remedy)


def _check_together(name: str, subjects: Subjects, path: str | Path) -> None:
    subject = subjects[name]
    single = [other for other, found in subjects.items() if "together" not in found]
    named = subject["together"]
    if len(subject) > 1 or not 1 < len(set(named)) == len(named) <= len(IDENTIFIERS):
        remedy = f"Give it nothing else than the names of 2 to {len(IDENTIFIERS)} others."
        raise UserError(f"The subject `{name}` is not several", where=path, remedy=remedy)
    for other in named:
        if other not in single:
            remedy = f"Choose of {', '.join(single)}."
            raise UserError(f"`{other}` of `{name}` is not a single subject", where=path, remedy=remedy)


def subject_params(name: str, subjects: Subjects, folder: Path) -> dict[str, Any]:
    """The params of the data that name a subject, or several; writes the photos of storybook subjects.

    folder: where these are written.
    """
    subject = subjects[name]
    if "together" not in subject:
        return {"subject_root": _photos(name, subject, folder), "class_word": subject["class_word"]}
    concepts = [
        {
            "root": _photos(other, subjects[other], folder),
            "identifier": identifier,
            "class_word": subjects[other]["class_word"],
            "name": other,
        }
        for other, identifier in zip(subject["together"], IDENTIFIERS, strict=False)  # there may be more
    ]
    return {**dict.fromkeys(SINGLE), "concepts": concepts}


def without_group(params: Mapping[str, Any], group: str) -> dict[str, Any]:
    """Params of data without the name of their study, in whose folder storybook subjects are."""

    def general(root: str | None) -> str:
        return str(root).replace(f"logs/{group}/", "logs/")

    found = {**params, "subject_root": general(params.get("subject_root"))}
    if params.get("concepts"):
        found["concepts"] = [{**c, "root": general(c["root"])} for c in params["concepts"]]
    return found


def _photos(name: str, subject: Subject, folder: Path) -> str:
    if "photos" in subject:
        return subject["photos"]
    individual = new_subject(subject["class_word"], seed=subject["seed"])
    write_subject(folder / slug(name), individual, masks=subject.get("masks", False))
    return str(folder / slug(name))


def slug(text: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
