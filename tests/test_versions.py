"""Bundles of other versions: yesterday's still verifies and answers, tomorrow's is refused by its number.

`fixtures/bundle_2026_11_25.tar.xz` was written by the version of that day (commit b819350): an 8-bit two-layer decoder
with an instruction over 40 synthetic items.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from export.golden import stored_golden
from export.runtime import OnnxRecommender
from export.update import update_items
from export.verify import verify
from slmrec.artifact import SCHEMA, open_artifact
from slmrec.errors import ArtifactError, DataError
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

FIXTURE = Path(__file__).parent / "fixtures" / "bundle_2026_11_25.tar.xz"


@pytest.fixture
def yesterdays(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "bundle"


def test_yesterdays_bundle_verifies_and_answers_as_it_did(yesterdays):
    verified = verify(yesterdays)
    assert verified.parity.num_users == 60
    histories, expected = stored_golden(yesterdays)
    found = OnnxRecommender(yesterdays).recommend(histories, 10)
    assert (found.item_ids == expected.item_ids[:, :10]).mean() > 0.99
    with pytest.raises(DataError, match="1 of 1 histories are empty"):  # it does not know yet what is popular
        OnnxRecommender(yesterdays).recommend(Histories.of(Ragged.from_rows([[]])), 3)


def test_items_can_leave_yesterdays_bundle(yesterdays, tmp_path):
    retire = tmp_path / "gone.txt"
    retire.write_text("5\n")
    made, _ = update_items(open_artifact(yesterdays), tmp_path / "new", items=None, retire=retire)
    verify(made.path)
    histories, _ = stored_golden(made.path)
    gone = int(np.flatnonzero(np.array(_external_ids(made.path)) == "5")[0]) + 1
    assert not (OnnxRecommender(made.path).recommend(histories, 20).item_ids == gone).any()


def test_a_bundle_of_a_later_schema_says_to_upgrade(yesterdays):
    manifest = json.loads((yesterdays / "manifest.json").read_text())
    assert manifest["schema"] == SCHEMA
    (yesterdays / "manifest.json").write_text(json.dumps(manifest | {"schema": SCHEMA + 1}))
    with pytest.raises(ArtifactError, match=f"newer slmcompress .schema {SCHEMA + 1}, this one reads {SCHEMA}"):
        open_artifact(yesterdays)


def _external_ids(folder):
    from slmrec.catalogue import load_catalogue

    return load_catalogue(folder).item_ids
