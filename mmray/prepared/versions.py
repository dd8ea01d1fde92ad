"""What an earlier version's prepared dataset is still good for, and whether labels are what was counted.

Version 2 found the turns of chats by a scan alone, and kept of a message its role and content. Its other rows are as
they would be now. Of its chats nothing tells which would train otherwise, as a dataset does not hold what it left out;
so a new run does not begin on them, and a run that has begun ends as it began.
"""

from typing import Any

from mmray.errors import UserError
from mmray.masks.labels import IGNORE_INDEX, LabelMaker
from mmray.prepared.dataset import Bin, PreparedDataset
from mmray.prepared.schema import FORMAT_VERSION

_BY_TURNS = ("roles", "template", "boundaries")
"""Sources of the loss of version 2 that depend on where turns are."""
_CHECKED_BINS = 16


def old_chats(manifest: dict[str, Any]) -> list[int]:
    """The numbers of the sets of chats of an earlier version that might train otherwise now."""
    if manifest["format_version"] == FORMAT_VERSION:
        return []
    kinds = [dataset["kind"] for dataset in manifest["record"]["datasets"]]
    sources = manifest.get("loss_sources") or ["roles"] * len(kinds)
    return [n for n, (kind, source) in enumerate(zip(kinds, sources)) if kind == "chat" and source in _BY_TURNS]


def check_new_run(prepared: PreparedDataset) -> None:
    """Raise UserError where no run should begin on a dataset, since an earlier version found what trains of it."""
    if chats := old_chats(prepared.manifest):
        raise UserError(
            f"{prepared.path} was prepared by an earlier version (format {prepared.manifest['format_version']}), and "
            f"its set {chats[0]} holds chats, of which some rows may train otherwise or be refused now: prepare it "
            "anew (jobs/prepare.py --replace). A run that has begun on it goes on with it"
        )


def labels_record(labels: LabelMaker, sources: list[str]) -> dict[str, Any]:
    """What the labels of a dataset depend on besides its rows, as plain JSON. sources: of its sets' loss."""
    record: dict[str, Any] = {"media": sorted(labels.media_token_ids)}
    if "roles" in sources:
        record |= {
            "boundaries": [
                [each.role, list(each.start), list(each.end), each.include_start, each.include_end, each.until_next]
                for each in labels.boundaries
            ],
            "roles": sorted(labels.roles_to_train),
            "train_on_eos": labels.train_on_eos,
        }
    return record


def check_labels(prepared: PreparedDataset, labels: LabelMaker) -> None:
    """Raise UserError where training would find other labels than were counted when preparing.

    A dataset that does not say by what it found them is tried: some of its bins are labelled.
    """
    recorded = prepared.manifest.get("labels")
    if recorded is not None:
        now = labels_record(labels, prepared.manifest["loss_sources"])
        wrong = sorted(key for key in recorded.keys() | now.keys() if recorded.get(key) != now.get(key))
        if wrong:
            raise UserError(
                f"{prepared.path}: this version of mmray finds what trains in another way than the one that prepared "
                f"it ({', '.join(wrong)} of the model family): prepare it anew (jobs/prepare.py --replace)"
            )
        return
    count = len(prepared)
    for number in sorted({place * count // _CHECKED_BINS for place in range(_CHECKED_BINS)} if count else ()):
        shown = prepared.bin(number)
        if trained_tokens(shown, labels) != shown.trained_tokens:
            raise UserError(
                f"{prepared.path}: bin {number} trains other tokens than were counted when preparing (loss): prepare "
                "it anew (jobs/prepare.py --replace)"
            )


def trained_tokens(shown: Bin, labels: LabelMaker) -> int:
    """How many tokens of a bin train."""
    blocks = [(image["first_token"], image["num_tokens"]) for image in shown.images]
    given = shown.given if len(shown.given) else shown.input_ids < 0
    made = labels.of_arrays(shown.input_ids, shown.sample_lengths, shown.sample_rules, given, blocks)
    return int((made != IGNORE_INDEX).sum())
