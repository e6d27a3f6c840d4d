"""bitfold.save and load_into: plain torch models in one safetensors file."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import bitfold
from bitfold.errors import PackedDataError
from bitfold.nn import QuantLinear

pytest.importorskip("safetensors")

FORMATS = ("nf4", "int8-row", "int4-g64-fz", "int3-g64", "int2-g64-zp", "kmeans3-tensor", "log4")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 17)
        self.fc = nn.Linear(17, 17)
        self.again = self.fc  # one module, two names
        self.norm = nn.LayerNorm(17)
        self.head = nn.Linear(17, 20)
        self.head.weight = self.embed.weight
        self.outer_bias = self.head.bias
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, indices):
        return self.head(self.norm(self.again(self.fc(self.embed(indices)))))


INDICES = torch.arange(6)


def saved(path: Path, fmt: str = "nf4") -> Toy:
    model = bitfold.quantize(Toy(), fmt, progress=False).eval()
    bitfold.save(model, path)
    return model


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip(tmp_path, fmt, device):
    file = tmp_path / "model.safetensors"
    model = saved(file, fmt)
    with torch.device(device):
        fresh = Toy()
    assert bitfold.load_into(fresh, file) is fresh
    assert torch.equal(fresh.eval()(INDICES), model(INDICES))
    assert fresh.again is fresh.fc
    assert fresh.head.source is fresh.embed
    assert not any(tensor.is_meta for tensor in fresh.state_dict().values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_the_file_is_as_small_as_promised_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "model.safetensors"
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    bitfold.save(bitfold.quantize(model, "nf4", progress=False), file)
    assert file.stat().st_size < bitfold.summary(model).total.disk + 4096
    assert list(tmp_path.iterdir()) == [file]


def test_metadata_is_the_manifest(tmp_path):
    from safetensors import safe_open

    file = tmp_path / "model.safetensors"
    model = saved(file)
    with safe_open(file, "pt") as stored:
        description = json.loads(stored.metadata()["bitfold"])
        names = set(stored.keys())
    aliases = description.pop("aliases")
    assert description == bitfold.manifest.describe(model)
    assert aliases["again.weight"] == "fc.weight"
    assert not names & set(aliases)
    assert names | set(aliases) == set(model.state_dict())


def test_float_models_and_views_can_be_saved_too(tmp_path):
    file = tmp_path / "model.safetensors"
    model = nn.Linear(4, 4)
    model.register_buffer("view", torch.arange(10)[2:5])
    bitfold.save(model, file)
    fresh = nn.Linear(4, 4)
    fresh.register_buffer("view", torch.zeros(3, dtype=torch.long))
    bitfold.load_into(fresh, file)
    assert torch.equal(fresh.weight, model.weight)
    assert fresh.view.tolist() == [2, 3, 4]


def test_floats_take_the_dtype_of_the_model(tmp_path):
    file = tmp_path / "model.safetensors"
    saved(file)
    fresh = bitfold.load_into(Toy().bfloat16(), file)
    assert fresh.norm.weight.dtype == torch.bfloat16
    assert fresh(INDICES).dtype == torch.bfloat16


def test_buffers_of_every_dtype_that_safetensors_knows_come_back(tmp_path):
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 8))
        for name in ("float8_e4m3fn", "uint16", "complex64", "bool"):
            model.register_buffer(name, torch.ones(3).to(getattr(torch, name)))
        return model

    bitfold.save(bitfold.quantize(make(), "nf4", progress=False), tmp_path / "m.safetensors")
    loaded = bitfold.load_into(make(), tmp_path / "m.safetensors")
    assert [str(buffer.dtype) for buffer in loaded.buffers(recurse=False)] == [
        "torch.float8_e4m3fn",
        "torch.uint16",
        "torch.complex64",
        "torch.bool",
    ]


def test_loading_into_a_folded_model(tmp_path):
    file = tmp_path / "model.safetensors"
    model = saved(file)
    other = bitfold.quantize(Toy(), "nf4", progress=False)
    assert torch.equal(bitfold.load_into(other, file).eval()(INDICES), model(INDICES))
    with pytest.raises(PackedDataError, match="packed as"):
        bitfold.load_into(bitfold.quantize(Toy(), "int8-row", progress=False), file)


# Bad files


def rewrite(file: Path, change) -> None:
    """Change the JSON header of a safetensors file; the tensor bytes stay."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite_manifest(file: Path, change) -> None:
    def on_header(header):
        description = json.loads(header["__metadata__"]["bitfold"])
        change(description)
        header["__metadata__"]["bitfold"] = json.dumps(description)

    rewrite(file, on_header)


def assert_refused(file: Path, message: str) -> None:
    fresh = Toy()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(PackedDataError, match=message):
        bitfold.load_into(fresh, file)
    assert type(fresh.fc) is nn.Linear
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -400])
def test_truncated_files(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    saved(file)
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert_refused(file, "not a whole safetensors file")


def test_not_a_safetensors_file(tmp_path):
    file = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(3)}, file)
    assert_refused(file, "not a whole safetensors file")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        bitfold.load_into(Toy(), tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        bitfold.load_into(Toy(), tmp_path)


def test_a_file_without_a_manifest(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, file)
    assert_refused(file, "no 'bitfold' in the metadata")
    save_file({"a": torch.zeros(3)}, file, metadata={"bitfold": "{"})
    assert_refused(file, "is not JSON")
    save_file({"a": torch.zeros(3)}, file, metadata={"bitfold": "[]"})
    assert_refused(file, "expected a JSON object")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["modules"].pop("fc"), r"fc\.weight is int8 .*, expected float32"),
        (lambda d: d["modules"]["fc"].update(format="int8-row"), r"fc\.weight.* is .*expected"),
        (lambda d: d["modules"]["fc"].update(shape=[17, 18]), r"fc: the manifest says shape \[17, 18\]"),
        (lambda d: d["modules"]["fc"].update(bias=False), r"fc: the manifest says bias=False"),
        (
            lambda d: d["modules"].update(gone=d["modules"]["fc"]),
            "gone: named by the manifest but not a module",
        ),
        (lambda d: d["aliases"].update({"x": "y"}), "alias 'x' of 'y'"),
        (lambda d: d.update(aliases=[]), "aliases is list"),
        (lambda d: d.update(format_version=7), "format_version is 7"),
        (lambda d: d["modules"]["head"].update(tied_to="fc"), "the packed matrix to share is"),
    ],
)
def test_manifests_that_lie(tmp_path, change, message):
    file = tmp_path / "model.safetensors"
    saved(file)
    rewrite_manifest(file, change)
    assert_refused(file, message)


def test_renamed_and_misshapen_tensors(tmp_path):
    file = tmp_path / "model.safetensors"
    saved(file)
    original = file.read_bytes()
    rewrite(file, lambda header: header.update(other=header.pop("norm.weight")))
    assert_refused(file, r"norm\.weight is missing, expected float32 \[17\]")
    file.write_bytes(original)
    rewrite(file, lambda header: header["norm.weight"].update(shape=[1, 17]))
    assert_refused(file, r"norm\.weight is float32 \[1, 17\], expected float32 \[17\]")
    file.write_bytes(original)
    rewrite(file, lambda header: header["fc.weight"].update(dtype="U8"))
    assert_refused(file, r"fc\.weight is uint8 .*, expected int8")
    file.write_bytes(original)
    rewrite(file, lambda header: header["steps"].update(dtype="F64"))
    assert_refused(file, r"steps is float64 \[\], expected int64")


def test_a_tensor_too_many(tmp_path):
    file = tmp_path / "model.safetensors"
    model = bitfold.quantize(Toy(), "nf4", progress=False)
    model.extra = nn.Parameter(torch.zeros(2))
    bitfold.save(model, file)
    assert_refused(file, "extra is in the file but not in the model Toy")


def test_what_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(ValueError, match="is on the meta device"):
        bitfold.save(model, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_previous_file(tmp_path, monkeypatch):
    from bitfold.io.safetensors_writer import SafetensorsWriter

    file = tmp_path / "model.safetensors"
    saved(file)
    before = file.read_bytes()

    def failing(self, name, tensor):
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        saved(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = saved(tmp_path / "first")
    for _ in range(8):  # a writer that hashes its keys would agree with itself by chance once or twice
        bitfold.save(model, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "first").read_bytes()


def test_a_bare_packed_module(tmp_path):
    file = tmp_path / "layer.safetensors"
    layer = QuantLinear.from_float(nn.Linear(8, 8), "nf4")
    bitfold.save(layer, file)
    fresh = QuantLinear(8, 8, format="nf4")
    bitfold.load_into(fresh, file)
    x = torch.randn(2, 8)
    assert torch.equal(fresh(x), layer(x))
