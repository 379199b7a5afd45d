"""Damaged and hostile checkpoints and YAML files of the original, made from the small reference."""

import copy
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import yaml


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_checkpoints(source: Path, canary: Path) -> Iterator[tuple[str, bytes | Callable[[], bytes]]]:
    """Names and contents of `.pt` files, or functions that make them, none of which is a checkpoint.

    Args:
        source: a checkpoint that is one.
        canary: a file that some of them would write if they were executed.
    """
    whole = source.read_bytes()
    yield from _damaged(whole)
    yield from _repacked(whole)
    yield from _pickles(canary)
    tensors = torch.load(source, weights_only=True)["model"]
    for name, content in _contents(tensors):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        yield name, buffer.getvalue()


def _damaged(whole: bytes) -> Iterator[tuple[str, bytes]]:
    size = len(whole)
    for part in (0, 10, 1000, size // 2, size - 10):
        yield f"cut_{part}", whole[:part]
    yield "zeros", bytes(100_000)
    yield "headless", whole[100:]
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        changed = bytearray(whole)
        # The directory at the end, and the pickle near the beginning, say what is where.
        low, high = ((size - 20_000, size), (0, 20_000))[seed % 2]
        for position in torch.randint(low, high, (40,), generator=generator).tolist():
            changed[position] ^= 0xFF
        yield f"flipped_{seed}", bytes(changed)


def _repacked(whole: bytes) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    largest = max(files, key=lambda name: len(files[name]))
    smallest_data = min((name for name in files if "/data/" in name), key=lambda name: len(files[name]))
    prefix = largest.split("/")[0]
    for missing in (f"{prefix}/data.pkl", largest):
        others = {name: data for name, data in files.items() if name != missing}
        yield f"without_{Path(missing).name}", partial(_zip, others)
    yield "short_tensor", partial(_zip, files | {largest: files[largest][:100]})
    for name in (smallest_data, f"{prefix}/data.pkl"):
        yield f"bomb_{Path(name).name}", partial(_zip, files | {name: b""}, bomb=name)
    yield "no_pickle", partial(_zip, files | {f"{prefix}/data.pkl": b"\xff\x00garbage"})
    for size in (10**6, 10**10, 2**62):
        yield f"sizes_{size}", partial(_zip, _with_sizes(files, prefix, size))


def _with_sizes(files: dict[str, bytes], prefix: str, size: int) -> dict[str, bytes]:
    """A checkpoint whose first tensor claims to have `size` values; its storage has a few."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "0", "cpu", size) if isinstance(item, Storage) else None

    buffer = io.BytesIO()
    tensor = Call(torch._utils._rebuild_tensor_v2, Storage(), 0, (size,), (1,), False, OrderedDict())
    Pickler(buffer, protocol=2).dump({"model": {"no_mem_embed": tensor}})
    return {name: data for name, data in files.items() if "/data/" not in name and not name.endswith("data.pkl")} | {
        f"{prefix}/data.pkl": buffer.getvalue(),
        f"{prefix}/data/0": bytes(64),
    }


def _zip(files: dict[str, bytes], bomb: str | None = None) -> bytes:
    """An archive; the file `bomb` in it is 2 GB of zeros, compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            if name != bomb:
                archive.writestr(name, data)
                continue
            info = zipfile.ZipInfo(name)
            info.compress_type, info._compresslevel = zipfile.ZIP_DEFLATED, 1
            with archive.open(info, "w", force_zip64=True) as file:
                for _ in range(200):
                    file.write(bytes(10_000_000))
    return buffer.getvalue()


def _pickles(canary: Path) -> Iterator[tuple[str, bytes]]:
    write = Call(exec, f"open({str(canary)!r}, 'w').close()")
    nested, itself = [], [1]
    itself.append(itself)
    for _ in range(5000):
        nested = [nested]
    yield "bare_pickle", pickle.dumps({"model": write}, protocol=2)
    for name, content in (
        ("exec", {"model": write}), ("exec_aside", {"model": {"a": torch.zeros(1)}, "extra": write}),
        ("getattr", {"model": Call(getattr, "text", "upper")}), ("bytearray", {"model": Call(bytearray, 62 * 10**9)}),
        ("nested", {"model": nested}), ("itself", {"model": itself}),
    ):  # fmt: skip
        for zipped in (True, False):
            buffer = io.BytesIO()
            try:
                torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            except RecursionError:
                continue
            yield f"{name}_{'new' if zipped else 'old'}", buffer.getvalue()
    huge = torch.zeros(1).expand(2**40)
    buffer = io.BytesIO()
    torch.save({"model": {"no_mem_embed": huge}}, buffer)
    yield "expanded", buffer.getvalue()


def _contents(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, object]]:
    name, first = next(iter(tensors.items()))
    for label, content in (
        ("nothing", None), ("list_of_tensors", [first]), ("numbers_as_names", {"model": {1: first}}),
    ):  # fmt: skip
        yield label, content
    for label, changed in (
        ("complex", first.to(torch.complex64)),
        ("sparse", first.float().to_sparse()), ("meta", first.to("meta")), ("scalar", torch.zeros(())),
        ("expanded_shape", torch.zeros(()).expand(2**40)), ("no_values", torch.zeros(0)),
        ("long_shape", torch.zeros([1] * 60)),
        ("quantized", torch.quantize_per_tensor(first.float(), 0.1, 0, torch.qint8)),
    ):  # fmt: skip
        yield label, {"model": tensors | {name: changed}}
    for label, key in {
        "newline": "a\nb", "long_name": "a" * 1_000_000, "other_expert": "x.experts.0.lora_up.weight",
        "many_experts": f"x.experts.{10**18}.lora_down.weight", "digits": f"x.experts.{'9' * 5000}.lora_up.weight",
        "path": "../../etc/passwd", "empty_name": "",
    }.items():  # fmt: skip
        yield label, {"model": tensors | {key: torch.zeros(1, 1)}}


def hostile_yaml(source: Path, canary: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of YAML files, none of which describes the model; arguments as above."""
    text = source.read_text()
    document = yaml.safe_load(text)
    command = f"touch {canary}"
    texts = {
        "empty": "", "text": "no YAML at all", "list": "[1, 2]", "tabs": "model:\n\t- 1", "null_bytes": "model: \0",
        "apply": f"model: !!python/object/apply:os.system ['{command}']",
        "new": f"model: !!python/object/new:os.system ['{command}']",
        "module": "model: !!python/module:os", "name": "model: !!python/name:os.system",
        "two_documents": f"{text}\n---\n{text}", "date": "model: 2001-99-99", "binary": "model: !!binary '?'",
        "hash": "model: {? [1] : 2}", "set": "model: !!set {a, b}", "omap": "model: !!omap [a: 1]",
        "digits": f"model: {'9' * 5000}", "hex": f"model: 0x{'f' * 50_000}", "base_60": f"model: {'59:' * 10_000}59",
        "deep_lists": "model: " + "[" * 40_000, "deep_maps": "model: " + "{a: " * 10_000,
        "deep_blocks": "\n".join(" " * i + "a:" for i in range(400)), "closed": "model: " + "[" * 2000 + "]" * 2000,
        "long": f"{text}\n# {'x' * 30_000_000}",
        "many_keys": "model: {" + ", ".join(f"k{i}: 1" for i in range(200_000)) + "}",
        "itself": "model: &a\n  a: *a", "merge_itself": "model: &a {<<: *a}", "unknown_alias": "model: *a",
        "laughs": _repeated("[lol]", "[{}]"), "merges": _repeated("{k: 1}", "{{<<: [{}]}}"),
        "alias_in_place": text.replace("model:", "model: &m", 1) + "\nother: *m",
        "latin": "model: caf\xe9",
    }  # fmt: skip
    for name, content in texts.items():
        yield name, content.encode("latin-1")
    yield "utf_16", text.encode("utf-16")[:-1]
    yield "control", b"model: \x07"
    for field, values in _bad_fields().items():
        for value in values:
            changed = copy.deepcopy(document)
            *parents, last = field.split(".")
            section = changed["model"]
            for parent in parents:
                section = section[parent]
            section[last] = value
            yield f"{last}_{str(value)[:20]}".replace("/", "_"), yaml.safe_dump(changed).encode()


def _repeated(first: str, form: str) -> str:
    """A value of 9 aliases of a value of 9 aliases, 29 times."""
    lines = [f"a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 30)]
    return "\n".join([f"a0: &a0 {first}", *lines, "model: *a29"])


def _bad_fields() -> dict[str, list]:
    attention = "memory_attention.layer.self_attention"
    return {
        "image_size": [0, 2**62, 10**400, True, float("nan")], "num_maskmem": [-1, 10**12],
        "memory_attention.num_layers": [10**9, 10**30], "memory_attention.layer.dim_feedforward": [-8, 10**15],
        "memory_attention.layer.dropout": [2.0, float("nan")], f"{attention}.rope_theta": [-1.0, float("inf")],
        f"{attention}.feat_sizes": [[], [10**9, 10**9], [8] * 100_000],
        "image_encoder.trunk.stages": [[0, 0, 0, 0], [10**9, 1, 1, 1], [2**70, 1, 1, 1]],
        "image_encoder.trunk.embed_dim": [-16, 10**9], "image_encoder.trunk.num_heads": [0],
        "image_encoder.trunk.q_pool": [100], "image_encoder.trunk.window_spec": [[-8, 4, 7, 7], [10**9] * 4],
        "image_encoder.trunk.window_pos_embed_bkg_spatial_size": [[10**9, 10**9]],
        "image_encoder.trunk.global_att_blocks": [[10**9], list(range(50_000))],
        "image_encoder.neck.fpn_top_down_levels": [[9]], "memory_encoder.fuser.num_layers": [10**8],
        "memory_encoder.fuser.layer.kernel_size": [0, 10**6], "memory_encoder.mask_downsampler.padding": [-1],
        "max_obj_ptrs_in_encoder": [10**12], "sigmoid_scale_for_mem_enc": [float("inf")],
        "sam_mask_decoder_extra_args": [{"dynamic_multimask_stability_thresh": float("nan")}, "x"],
        "_target_": ["os.system", 5],
    }  # fmt: skip
