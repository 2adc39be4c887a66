"""A contestant of `serving_speed.py` in the project's own environment: an exported graph, or Hugging Face in eager.

    python benchmarks/contestant.py graph FOLDER [--unpacked]
    python benchmarks/contestant.py append FOLDER
    python benchmarks/contestant.py eager FOLDER [--compile]

Eager reads a folder of `plain_folder` in `serving_speed.py`: a decoder whose vocabulary is instruction, response and
items, and `head.npz`. Unpacked weights stay where they are mapped, so that processes share them.
"""

import sys
from pathlib import Path

import numpy as np
from contest import answer


def graph(folder: Path, *, unpacked: bool) -> None:
    """An exported graph, called as the runtime calls it."""
    from export.runtime import OnnxRecommender

    recommender = OnnxRecommender(folder)
    if unpacked:
        import onnxruntime as ort

        from export.sessions import session_options
        from slmrec.machine import usable_cores

        options = session_options(usable_cores())
        options.add_session_config_entry("session.disable_prepacking", "1")
        recommender.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    nobody = np.zeros((1, 0), dtype=np.int64)

    def call(item_ids: np.ndarray) -> np.ndarray:
        return recommender.run(item_ids, np.repeat(nobody, len(item_ids), axis=0))[0]

    answer(call, {"precision": recommender.signature["precision"]})


def append(folder: Path) -> None:
    """The newest item of a user whose other items' keys and values are known."""
    from export.states import AppendingRecommender, StateStore

    recommender = AppendingRecommender(folder, StateStore(max_bytes=2**30))
    known: dict[bytes, dict[str, np.ndarray]] = {}

    def call(item_ids: np.ndarray) -> np.ndarray:
        request = known.get(item_ids.tobytes())
        if request is None:
            nothing, nobody = recommender.nothing, np.zeros((1, 0), dtype=np.int64)
            request = {
                "new_item": item_ids[:, :-1], "seen_ids": nobody, "past_length": np.array([0]),
                "past_keys": nothing.keys[None], "past_values": nothing.values[None], "exclude_ids": nobody,
            }  # fmt: skip
            keys, values = recommender.session.run(["new_keys", "new_values"], request)
            request |= {
                "new_item": item_ids[:, -1:], "seen_ids": item_ids[:, :-1], "past_length": np.array([keys.shape[3]]),
                "past_keys": keys, "past_values": values,
            }  # fmt: skip
            known[item_ids.tobytes()] = request
        return recommender.session.run(["top_items", "new_keys", "new_values"], request)[0]  # type: ignore[no-any-return]

    answer(call)


def eager(folder: Path, *, compiled: bool) -> None:
    """A transformers decoder, the item head and top-K of PyTorch."""
    import torch
    from plain_student import recommending
    from transformers import AutoModel

    from slmrec.machine import usable_cores

    torch.set_num_threads(usable_cores())
    decoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    run = torch.compile(decoder) if compiled else decoder
    answer(recommending(folder, lambda words: run(input_ids=words, use_cache=False).last_hidden_state))


if __name__ == "__main__":
    kind, path = sys.argv[1], Path(sys.argv[2])
    if kind == "graph":
        graph(path, unpacked="--unpacked" in sys.argv)
    elif kind == "append":
        append(path)
    else:
        eager(path, compiled="--compile" in sys.argv)
