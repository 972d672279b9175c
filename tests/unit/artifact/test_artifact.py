"""Writing and reading a delta; what a hostile or damaged one must not get past."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.manifest import BaseRef, ClassBytes, Manifest, SourceRef
from deltaserve.artifact.reader import Delta
from deltaserve.artifact.safetensors_io import SafetensorsWriter
from deltaserve.artifact.staging import StagedDirectory, replacing
from deltaserve.artifact.writer import DeltaWriter
from deltaserve.errors import ArtifactError, BaseMismatchError, ConfigError, OutputExistsError

DIGEST = "sha256:" + "ab" * 32


def tensors():
    gen = torch.Generator().manual_seed(0)
    base = torch.randn(24, 40, generator=gen).bfloat16()
    tuned = (base.float() + 0.01 * torch.randn(24, 40, generator=gen)).bfloat16()
    return base, tuned


PLAN = {
    "a.int.weight": ("int", {"bits": 3, "group_size": 16, "symmetric": False}),
    "b.rows.weight": ("rows", {}),
    "c.xor.weight": ("xor", {}),
    "d.nm24.weight": ("nm24", {}),
    "e.lowrank.weight": ("lowrank", {"rank": 2}),
    "f.nf4.weight": ("nf4", {}),
    "g.raw.weight": ("raw", {}),
    "h.coarse.weight": ("rows", {"bits": 4}),
}


def write(out, **options):
    base, tuned = tensors()
    with DeltaWriter(out, **options) as writer:
        for name, (codec, params) in PLAN.items():
            enc = get_codec(codec).encode(tuned, base, **params)
            writer.add(name, enc, kind="linear", error=0.25)
        manifest = writer.finish(
            base=BaseRef("base", None, DIGEST),
            source=SourceRef("tuned", DIGEST, "full"),
            architecture="LlamaForCausalLM",
            full=ClassBytes.of([("linear", 8 * 24 * 40 * 2)]),
        )
        writer.commit()
    return manifest


@pytest.fixture
def artifact(tmp_path):
    write(tmp_path / "delta")
    return tmp_path / "delta"


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 1000])
def test_what_is_written_is_read(tmp_path, max_shard_bytes):
    base, tuned = tensors()
    written = write(tmp_path / "delta", max_shard_bytes=max_shard_bytes)
    delta = Delta.open(tmp_path / "delta")
    assert delta.manifest == written
    assert delta.names() == list(PLAN)
    delta.verify_digest()
    for name, (codec, params) in PLAN.items():
        direct = get_codec(codec).encode(tuned, base, **params)
        assert torch.equal(delta.decode(name, base), get_codec(codec).decode(direct, base))
        assert delta.manifest.tensors[name].bytes == direct.num_bytes
    files = sorted((tmp_path / "delta").glob("delta*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 1000)
    sizes = delta.manifest.sizes
    assert sizes.disk.total == sum(file.stat().st_size for file in files)
    assert sizes.resident.total == sum(e.resident_bytes for e in delta.manifest.tensors.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta"]


def test_digest_depends_on_content_not_on_shards(tmp_path):
    first = write(tmp_path / "a")
    assert write(tmp_path / "b").digest == first.digest
    assert load_file(tmp_path / "a" / "delta.safetensors").keys() == (
        load_file(tmp_path / "b" / "delta.safetensors").keys()
    )


def test_the_base_is_checked_and_both_digests_are_shown(artifact):
    delta = Delta.open(artifact)
    delta.check_base(DIGEST)
    other = "sha256:" + "cd" * 32
    with pytest.raises(BaseMismatchError) as caught:
        delta.check_base(other)
    assert DIGEST in str(caught.value)
    assert other in str(caught.value)


def test_written_files_are_aligned_and_loadable(tmp_path):
    writer = SafetensorsWriter(tmp_path, "model")
    wanted = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.arange(5, dtype=torch.int64),
        "half": torch.randn(7).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "turned": torch.randn(4, 6).T,
    }
    for name, tensor in wanted.items():
        writer.add(name, tensor)
    written = writer.finish()
    assert written.files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            width = wanted[name].element_size()
            assert (8 + size + entry["data_offsets"][0]) % width == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name, tensor in wanted.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_nothing_is_left_after_an_error_in_the_middle(tmp_path):
    out = tmp_path / "new" / "parents" / "delta"
    base, tuned = tensors()
    with pytest.raises(KeyboardInterrupt), DeltaWriter(out) as writer:  # noqa: PT012
        enc = get_codec("raw").encode(tuned, base)
        writer.add("x.weight", enc, kind="linear", error=0.0)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "delta")
    assert list(tmp_path.iterdir()) == []


def test_output_must_be_free(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert Delta.open(tmp_path / "empty").names() == list(PLAN)
    with pytest.raises(OutputExistsError, match="not empty"):
        write(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match="a file is in the way"),
        StagedDirectory(tmp_path / "file" / "delta"),
    ):
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    with replacing(path, durable=True) as partial:
        partial.write_text("old")
        assert not path.exists()
    with pytest.raises(TypeError), replacing(path) as partial, partial.open("w") as file:
        print("half", file=file, end=0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def edit(artifact, change):
    manifest = json.loads((artifact / "delta.json").read_text())
    change(manifest)
    (artifact / "delta.json").write_text(json.dumps(manifest))


def test_manifest_survives_json(artifact):
    value = json.loads((artifact / "delta.json").read_text())
    assert Manifest.from_json(value).to_json() == value


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


T = "tensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("format", "deltaserve/2"), "format"),
        (put("base", None), "base is missing"),
        (put("base", "digest", "sha256:xyz"), "base.digest"),
        (put("base", "revision", 3), "base.revision"),
        (put("source", "kind", "half"), "source.kind"),
        (put("architecture", ""), "architecture"),
        (put(T, []), "tensors"),
        (put(T, "a.int.weight", "codec", "gzip"), "codec is 'gzip'"),
        (put(T, "a.int.weight", "dtype", "float12"), "dtype is 'float12'"),
        (put(T, "a.int.weight", "kind", "wing"), "kind is 'wing'"),
        (put(T, "a.int.weight", "params", "bits", 7), "bits must be one of"),
        (put(T, "a.int.weight", "params", "bits", 2), "bytes is"),
        (put(T, "a.int.weight", "params", "extra", 2), "no setting"),
        (put(T, "a.int.weight", "params", None), "params is missing"),
        (put(T, "a.int.weight", "shape", [24, -40]), "not a shape"),
        (put(T, "a.int.weight", "shape", [24, True]), "not a shape"),
        (put(T, "a.int.weight", "shape", [1 << 30, 1 << 30]), "too large"),
        (put(T, "a.int.weight", "shape", []), "cannot quantise"),
        (put(T, "a.int.weight", "bytes", -1), "bytes"),
        (put(T, "a.int.weight", "error", "NaN"), "error"),
        (put(T, "a.int.weight", "dtype", "int64"), "does not fit its codec"),
        (put(T, "b.rows.weight", "params", "rows", 25), "do not fit"),
        (put(T, "e.lowrank.weight", "params", "scale", "1"), "scale must be float"),
        (put("sizes", "disk", "total", 1.5), "sizes.disk.total"),
        (put("digest", ""), "digest"),
    ],
)
def test_wrong_manifest_fields_are_named(artifact, change, words):
    edit(artifact, change)
    with pytest.raises(ArtifactError, match=words):
        Delta.open(artifact)


def rewrite(artifact, change):
    path = artifact / "delta.safetensors"
    parts = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(parts)
    save_file(parts, path)


def assign(part, index, value):
    def change(parts):
        parts[part].view(-1)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("a.int.weight.codes"), "a.int.weight.codes is missing"),
        (lambda p: p.update(stranger=torch.ones(2)), "stranger is not part"),
        (lambda p: p.update({"a.int.weight.codes": torch.ones(1, dtype=torch.uint8)}), "requires"),
        (lambda p: p.update({"f.nf4.weight.absmax": torch.ones(15).half()}), "requires"),
    ],
)
def test_wrong_parts_are_refused_at_open(artifact, change, words):
    rewrite(artifact, change)
    with pytest.raises(ArtifactError, match=words):
        Delta.open(artifact)


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (assign("b.rows.weight.index", 0, -1), "b.rows.weight", "outside"),
        (assign("b.rows.weight.index", -1, 24), "b.rows.weight", "outside"),
        (assign("b.rows.weight.index", 1, 0), "b.rows.weight", "ascending"),
        (assign("h.coarse.weight.scales", 0, float("nan")), "h.coarse.weight", "NaN"),
        (assign("a.int.weight.zeros", 0, 200), "a.int.weight", "zero point"),
        (assign("a.int.weight.scales", 0, float("inf")), "a.int.weight", "NaN"),
        (assign("d.nm24.weight.index", 0, 0), "d.nm24.weight", "share a place"),
        (assign("e.lowrank.weight.u", 0, float("nan")), "e.lowrank.weight", "NaN"),
        (assign("f.nf4.weight.absmax", 0, float("nan")), "f.nf4.weight", "NaN"),
        (assign("g.raw.weight.values", 0, float("nan")), "g.raw.weight", "NaN"),
        (assign("c.xor.weight.data", 0, 7), "c.xor.weight", "stream"),
        (assign("c.xor.weight.data", slice(20, 60), 0), "c.xor.weight", "stream"),
    ],
)
def test_wrong_values_are_refused_before_use(artifact, change, name, words):
    rewrite(artifact, change)
    delta = Delta.open(artifact)
    with pytest.raises(ArtifactError, match=words) as caught:
        delta.decode(name, tensors()[0])
    assert name in str(caught.value)
    with pytest.raises(ArtifactError, match="damaged"):
        delta.verify_digest()


def test_changed_bytes_are_found_by_the_digest(artifact):
    rewrite(artifact, assign("g.raw.weight.values", 5, 1.0))
    with pytest.raises(ArtifactError, match="damaged"):
        Delta.open(artifact).verify_digest()


def test_missing_and_truncated_files_are_named(artifact, tmp_path):
    with pytest.raises(ArtifactError, match="not a directory"):
        Delta.open(tmp_path / "absent")
    path = artifact / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=r"delta\.safetensors is truncated"):
        Delta.open(artifact)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"delta\.safetensors is missing"):
        Delta.open(artifact)
    (artifact / "delta.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"delta\.json cannot be read"):
        Delta.open(artifact)
    shutil.rmtree(artifact)
    artifact.mkdir()
    with pytest.raises(ArtifactError, match=r"has no delta\.json"):
        Delta.open(artifact)


def test_a_base_of_another_shape_is_an_artifact_error(artifact):
    with pytest.raises(ArtifactError, match="align"):
        Delta.open(artifact).decode("a.int.weight", torch.zeros(24, 41).bfloat16())
