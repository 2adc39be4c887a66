"""A contestant of `serving_speed.py`: a transformers decoder exported by optimum-onnx, in fp32 or its dynamic int8.

    .venv/bin/python contestant.py FOLDER fp32|int8

Run with the Python of `requirements.txt` and PYTHONPATH=benchmarks; nothing of slmcompress is imported. FOLDER is one
of `plain_folder` in `serving_speed.py`; exports are kept in it.
"""

import os
import sys
from pathlib import Path

import torch
from contest import answer
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig
from plain_student import recommending


def exported(folder: Path) -> Path:
    """The decoder as optimum exports it."""
    target = folder / "optimum"
    if not (target / "model.onnx").exists():
        ORTModelForFeatureExtraction.from_pretrained(folder, export=True).save_pretrained(target)
    return target


def quantized(source: Path) -> Path:
    """The same in optimum's dynamic int8 for processors with VNNI."""
    target = source.parent / "optimum-int8"
    if not target.exists():
        settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        ORTQuantizer.from_pretrained(source).quantize(save_dir=target, quantization_config=settings)
    return target


def main() -> None:
    """Load and answer."""
    folder, precision = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = exported(folder) if precision == "fp32" else quantized(exported(folder))
    model = ORTModelForFeatureExtraction.from_pretrained(path, file_name=next(path.glob("*.onnx")).name)

    def states(words: torch.Tensor) -> torch.Tensor:
        places = torch.arange(words.shape[1]).expand_as(words)
        found = model(input_ids=words, attention_mask=torch.ones_like(words), position_ids=places)
        return found.last_hidden_state  # type: ignore[no-any-return]

    answer(recommending(folder, states))


if __name__ == "__main__":
    main()
