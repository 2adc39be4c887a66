"""Pickles of others: tensors come out, and nothing else happens."""

import collections
import io
import pickle
import struct

import numpy as np
import pytest
import torch
from published import Explosive
from safetensors.torch import save_file

from slmrec.errors import DataError
from slmrec.foreign.pickles import read_pickle
from slmrec.foreign.tensors import read_table, read_tensors

TABLE = torch.arange(12.0).reshape(4, 3)


class Call:
    """Pickled as a call of a function with arguments, whatever they are."""

    def __init__(self, function, *arguments):
        self.parts = (function, arguments)

    def __reduce__(self):
        return self.parts


def inner(value, **settings):
    """Bytes that torch.save writes, which a tensor's pickle holds inside."""
    stream = io.BytesIO()
    torch.save(value, stream, **settings)
    return stream.getvalue()


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "value",
    [TABLE, torch.nn.Parameter(TABLE), {"item_embedding": TABLE}, collections.OrderedDict(weight=TABLE), TABLE.half(),
     TABLE[:, 1:].bfloat16()],
    ids=["tensor", "parameter", "dict", "ordered dict", "half", "a view"],
)  # fmt: skip
def test_a_pickled_table_is_read_as_it_was(tmp_path, value, protocol):
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    expected = value if isinstance(value, torch.Tensor) else next(iter(value.values()))
    table = read_table(tmp_path / "t.pkl")
    assert torch.equal(table, expected.detach().float())
    assert not table.requires_grad


def nested(canary, **settings):
    return Call(torch.storage._load_from_bytes, inner(Explosive(canary), **settings))


ATTACKS = {
    "a call": Explosive,
    "in a dict beside a tensor": lambda canary: {"item_embedding": TABLE, "x": Explosive(canary)},
    "inside the inner pickle": lambda canary: nested(canary, _use_new_zipfile_serialization=False),
    "inside the inner zip": nested,
    "an inner pickle within an inner pickle": lambda canary: Call(
        torch.storage._load_from_bytes, inner(nested(canary), _use_new_zipfile_serialization=False)
    ),
    "torch.load by name": lambda canary: Call(torch.load, io.BytesIO(inner(Explosive(canary)))),
    "eval": lambda canary: Call(eval, f"open({canary!r}, 'w')"),
    "getattr": lambda canary: Call(getattr, Explosive(canary), "canary"),
    "import": lambda canary: Call(__import__, "antigravity"),
}

NAMED = dict.fromkeys(ATTACKS, r"calls (io|_io)\.open") | {
    "inside the inner pickle": r"Unsupported global: GLOBAL (io|_io)\.open",
    "inside the inner zip": r"Unsupported global: GLOBAL (io|_io)\.open",
    "an inner pickle within an inner pickle": r"Unsupported global: GLOBAL torch\.storage\._load_from_bytes",
    "torch.load by name": r"calls torch\.serialization\.load",
    "eval": r"calls (__builtin__|builtins)\.eval",
    "getattr": r"calls (__builtin__|builtins)\.getattr",
    "import": r"calls (__builtin__|builtins)\.__import__",
}
"""What the message has to name, so that no refusal is an accident."""


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_pickle_is_refused_and_executes_nothing(tmp_path, attack, protocol):
    canary = tmp_path / "canary"
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(ATTACKS[attack](str(canary)), protocol=protocol))
    with pytest.raises(DataError, match=rf"{NAMED[attack]}.*nothing of it was run") as refusal:
        read_table(tmp_path / "t.pkl")
    assert "numpy.save" in refusal.value.remedy
    assert not canary.exists()


@pytest.mark.parametrize(
    "attack", ["a call", "inside the inner pickle", "inside the inner zip", "an inner pickle within an inner pickle"]
)
def test_the_attack_would_succeed_with_pythons_own_unpickler(tmp_path, attack):
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(ATTACKS[attack](str(canary)))).close()
    assert canary.exists()


def global_call(module, name, *rest):
    """A protocol 2 pickle that fetches a global, then does the rest."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"".join(rest) + b"."


@pytest.mark.parametrize(
    "content",
    [
        global_call("torch._utils", "_rebuild_tensor_v2", b"}X\x01\x00\x00\x00aK\x01sb"),  # BUILD on a function
        global_call("collections", "OrderedDict", b")\x81"),  # NEWOBJ
        b"(S'x'\nios\nsystem\n.",  # INST
        b"\x82\x01.",  # EXT1
        b"Pfile\n.",  # PERSID
        global_call("torch._utils", "_rebuild_tensor_v2.__globals__"),
        b"\x80\x04\x8c\x0btorch._utils\x8c\x1b_rebuild_tensor_v2.__code__\x93.",
        global_call("_codecs", "encode", b"X\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R"),
        global_call("torch.storage", "_load_from_bytes", b"K\x01\x85R"),
        b"",
        b"\x80\x04",
        b"not a pickle",
        struct.pack("<cB", b"\x80", 9) + b".",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",  # a string longer than the file
    ],
)  # fmt: skip
def test_what_no_tensor_needs_is_refused(tmp_path, content):
    (tmp_path / "t.pkl").write_bytes(content)
    with pytest.raises(DataError):
        read_pickle(tmp_path / "t.pkl")


def test_a_pickle_cannot_change_the_functions_it_may_call(tmp_path):
    function = torch._utils._rebuild_tensor_v2
    before = function.__defaults__
    state = pickle.dumps((None, {"__defaults__": (1, 2)}), protocol=2)[2:-1]
    (tmp_path / "t.pkl").write_bytes(global_call("torch._utils", "_rebuild_tensor_v2", state, b"b"))
    with pytest.raises(DataError):
        read_pickle(tmp_path / "t.pkl")
    assert function.__defaults__ == before


@pytest.mark.parametrize("content", [b"\x80\x04garb", b"", b"row,item_id\n1,2\n"], ids=["broken", "empty", "text"])
def test_what_is_no_pickle_is_not_called_untrusted(tmp_path, content):
    (tmp_path / "t.pkl").write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)t.pkl is damaged, cut off or no pickle.*the whole file, or"):
        read_table(tmp_path / "t.pkl")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("ending", [".pkl", ".npy", ".safetensors", ".bin"])
def test_a_file_cut_off_is_a_message(tmp_path, ending, share):
    path = tmp_path / f"t{ending}"
    {
        ".pkl": lambda: path.write_bytes(pickle.dumps(TABLE)),
        ".npy": lambda: np.save(path, TABLE.numpy()),
        ".safetensors": lambda: save_file({"item_embedding": TABLE}, path),
        ".bin": lambda: torch.save({"weight": TABLE}, path),
    }[ending]()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=path.name):
        (read_tensors if ending == ".bin" else read_table)(path)


@pytest.mark.parametrize("settings", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before zip"])
def test_a_state_dict_is_read_and_a_malicious_one_executes_nothing(tmp_path, settings):
    torch.save({"input_proj": {"weight": TABLE}, "note": "text"}, tmp_path / "good.pth", **settings)
    assert {name: value.tolist() for name, value in read_tensors(tmp_path / "good.pth").items()} == {
        "input_proj.weight": TABLE.tolist()
    }
    canary = tmp_path / "canary"
    torch.save({"weight": TABLE, "x": Explosive(str(canary))}, tmp_path / "bad.pth", **settings)
    with pytest.raises(DataError, match=r"not readable as tensors: .*open.*; nothing of it was run") as refusal:
        read_tensors(tmp_path / "bad.pth")
    assert not canary.exists()
    assert "weights_only" not in str(refusal.value), "torch's advice to read it unsafely is not repeated"


def test_what_torch_says_around_the_cause_is_left_out(tmp_path, recwarn):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"x": Explosive(str(tmp_path / "canary"))}, protocol=4))
    torch.save({"weight": TABLE}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    for name, cause in (("bare", "Unsupported operand 149"), ("cut", "failed finding central directory")):
        with pytest.raises(DataError) as refusal:
            read_tensors(tmp_path / f"{name}.pth")
        assert str(refusal.value).splitlines()[0].endswith(f"{cause}; nothing of it was run")
        assert "miniz" not in str(refusal.value)
    assert not list(recwarn)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "no item table"),
        ("gone.npy", None, "gone.npy is no file"),
        ("ints.npy", np.arange(6).reshape(2, 3), r"holds int64 \[2, 3\]"),
        ("line.npy", np.zeros(3, dtype=np.float32), r"\[3\]"),
        ("nan.npy", np.full((2, 2), np.nan, dtype=np.float32), "finite"),
        ("objects.npy", np.array([[{}]], dtype=object), "not readable as a numpy array"),
        ("two.safetensors", {"a": TABLE, "b": TABLE.clone()}, "holds 2 tensors"),
        ("none.pkl", {"user": "x"}, "holds 0 tensors"),
    ],
)
def test_a_table_that_is_none_is_a_message(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, dict) and path.suffix == ".safetensors":
        save_file(content, path)
    elif content is not None:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message) as refusal:
        read_table(path)
    assert refusal.value.remedy
