"""Every transformation of the serving graph, on or off, against Hugging Face's own forward of one user at a time."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from forward import FAMILIES, NUM_ITEMS, WINDOW, expected_list, scores_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from slmrec.config import ExportConfig
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

OPTIONS = ("fold_prefix", "newest_only", "fold_items", "join_projections", "fuse_kernels", "block_max")


def require_equal(model, graph, rows, k=5):
    answer = graph.recommend(Histories.of(Ragged.from_rows(rows)), k)
    for row, history in enumerate(rows):
        items, scores = expected_list(scores_of(model, history[-WINDOW:]), history, k)
        np.testing.assert_allclose(answer.scores[row], scores, rtol=0, atol=2e-5 * np.abs(scores).max())
        gaps = np.abs(np.diff(scores)) > 1e-4 * np.abs(scores).max()
        if gaps.all():
            assert answer.item_ids[row].tolist() == items.tolist()


@pytest.mark.parametrize(
    "off", [*itertools.combinations(OPTIONS, 1), OPTIONS, ()], ids=lambda off: "-".join(off) or "all on"
)
@pytest.mark.parametrize(("family", "window"), FAMILIES)
def test_each_transformation_can_be_turned_off_and_changes_nothing(tiny_model, tmp_path, family, window, off):
    model = tiny_model(family=family, sliding_window=window, prompt="slmrec", positions="compact").eval()
    export_model(model, tmp_path, replace(ExportConfig(), **dict.fromkeys(off, False)))
    require_equal(model, OnnxRecommender(tmp_path), [[1, 2, 3], [5], list(range(1, 15)), [4, 4, 9, 1, 2, 7, 3]])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FAMILIES), st.sampled_from(["none", "prefix", "slmrec"]), st.sampled_from(["compact", "padded"]),
    st.sampled_from(["tied", "linear"]), st.integers(1, 3), st.sets(st.sampled_from(OPTIONS)),
    st.lists(st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=14), min_size=1, max_size=5),
)  # fmt: skip
def test_any_graph_equals_the_forward_of_hugging_face(
    tiny_model, tmp_path_factory, family, prompt, positions, head, num_layers, off, rows
):
    name, window = family
    model = tiny_model(
        family=name, sliding_window=window, num_layers=num_layers, prompt=prompt, positions=positions, head=head
    ).eval()
    folder = tmp_path_factory.mktemp("graph")
    export_model(model, folder, replace(ExportConfig(), **dict.fromkeys(off, False)))
    require_equal(model, OnnxRecommender(folder), rows)
