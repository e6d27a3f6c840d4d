"""Checkpoints: reading one or many shards, refusing what does not fit together, writing as a stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitfold.errors import PackedDataError
from bitfold.io import safetensors_file
from bitfold.io.safetensors_file import DTYPES, SafetensorsFile
from bitfold.io.safetensors_writer import SafetensorsWriter, TensorSpec, file_nbytes
from bitfold.io.shards import Checkpoint, ShardedWriter, parse_size, plan_shards

safetensors_torch = pytest.importorskip("safetensors.torch")


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype in (torch.bool, torch.uint8, torch.int8):
        return torch.randint(0, 2, shape).to(dtype)
    return torch.randn(shape).abs().mul(50).to(dtype)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    result = {f"t.{name}": sample(dtype, (3, 5)) for name, dtype in DTYPES.items()}
    return {**result, "scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "ü.weight": torch.randn(7)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def test_reads_what_the_package_writes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors_torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.tensors) == set(tensors)
        assert all(same(file.read(name), tensor) for name, tensor in tensors.items())
        with pytest.raises(PackedDataError, match="no tensor 'nope'"):
            file.read("nope")


def test_conversion_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE", 7)
    tensor = torch.randn(5, 6)
    safetensors_torch.save_file({"a": tensor}, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            assert same(file.read("a", dtype), tensor.to(dtype))


def test_package_reads_what_the_writer_writes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, specs, {"format": "pt"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert path.stat().st_size == file_nbytes(specs, {"format": "pt"})
    loaded = safetensors_torch.load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    with SafetensorsWriter(tmp_path / "x.safetensors", {"a": TensorSpec.of(tensor)}, {}) as writer:
        writer.write("a", tensor)
    assert safetensors_torch.load_file(tmp_path / "x.safetensors")["a"].equal(tensor)


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.int8, (1,))}
    writer = SafetensorsWriter(tmp_path / "x", specs, {})
    with pytest.raises(PackedDataError, match="'c' was not announced"):
        writer.write("c", torch.zeros(2))
    with pytest.raises(PackedDataError, match=r"'a' is float16 \[2\], expected float32 \[2\]"):
        writer.write("a", torch.zeros(2, dtype=torch.float16))
    writer.write("a", torch.zeros(2))
    with pytest.raises(PackedDataError, match="'a' was already written"):
        writer.write("a", torch.zeros(2))
    with pytest.raises(PackedDataError, match="1 announced tensors never came: b"), writer:
        pass


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.full((100,), float(i)) for i in range(7)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with ShardedWriter(tmp_path, specs, 1000, {"format": "pt"}, total_parameters=700) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2800, "total_parameters": 700}
    assert len(set(index["weight_map"].values())) == 4
    with Checkpoint(tmp_path) as checkpoint:
        assert all(checkpoint.read(name).equal(tensor) for name, tensor in tensors.items())
        assert checkpoint.nbytes == ShardedWriter.predict(specs, 1000, {"format": "pt"})
        assert [info.name for info in checkpoint] == list(tensors)


def test_shards_are_dealt_as_the_hub_library_deals_them() -> None:
    hub = pytest.importorskip("huggingface_hub")
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 400, (60,), generator=generator).tolist()
    tensors = {f"t{i}": torch.empty(size) for i, size in enumerate(sizes)}
    theirs = hub.split_torch_state_dict_into_shards(tensors, max_shard_size=1000)
    ours = plan_shards({name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, 1000)
    assert {shard: sorted(group) for shard, group in ours.items()} == {
        shard: sorted(group) for shard, group in theirs.filename_to_tensors.items()
    }


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for number in (1, 2):
        tensor = {f"w{number}": torch.zeros(4)}
        safetensors_torch.save_file(tensor, tmp_path / f"model-0000{number}-of-00002.safetensors")
    index = {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def edit_index(directory: Path, **changes: object) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(PackedDataError, match=r"model-00002-of-00002.safetensors: this shard is named"):
        Checkpoint(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    tensors = {"w1": torch.zeros(4), "w2": torch.zeros(4)}
    safetensors_torch.save_file(tensors, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(PackedDataError, match=r"'w1' is stored twice, in model-00001.* and in model-00002"):
        Checkpoint(sharded)


def test_index_that_names_a_tensor_nobody_has(sharded: Path) -> None:
    edit_index(sharded, w3="model-00002-of-00002.safetensors")
    with pytest.raises(
        PackedDataError, match=r"says that tensor 'w3' is in model-00002.*found it in no shard"
    ):
        Checkpoint(sharded)


def test_index_with_the_wrong_shard(sharded: Path) -> None:
    edit_index(sharded, w1="model-00002-of-00002.safetensors")
    edit_index(sharded, w2="model-00001-of-00002.safetensors")
    with pytest.raises(PackedDataError, match="found it in model-0000"):
        Checkpoint(sharded)


def test_tensor_missing_from_the_index(sharded: Path) -> None:
    tensors = {"w2": torch.zeros(4), "spare": torch.zeros(4)}
    safetensors_torch.save_file(tensors, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(PackedDataError, match=r"'spare' is in model-00002.* but not in"):
        Checkpoint(sharded)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "weights.bin", "sub/x.safetensors"])
def test_index_that_points_elsewhere(sharded: Path, shard: str) -> None:
    edit_index(sharded, w1=shard)
    with pytest.raises(PackedDataError, match=r"expected a .safetensors file beside the index"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{" * 9999]
)
def test_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(PackedDataError, match=r"index.json"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"]
)
def test_pickles_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(PackedDataError, match=rf"{name}, a pickle; reading a pickle can run code in it"):
        Checkpoint(tmp_path)
    with pytest.raises(PackedDataError, match="a pickle"):
        Checkpoint(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Checkpoint(tmp_path / "nope")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1 GiB", 2**30), ("1.5MB", 1_500_000), ("200", 200), (7, 7), ("2kb", 2000)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", 0, "1e9"])
def test_impossible_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)
