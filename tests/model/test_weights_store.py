"""Experts of domains stay in the files of a loaded model until they are needed, and all else is as if they did not."""

import copy
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.domains import add_learned_domain, clip_masks
from helpers.reference import assert_same_tensors
from samoe_hf import SamoeModel
from samoe_hf.evaluation.evaluate import evaluate_videos
from samoe_hf.inference import VideoPrompt, track_video
from samoe_hf.model import domain_experts
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import merge_domains, remove_domain, rename_domain

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def copies():
    """Each model is loaded here: a copy of one has read all."""


@pytest.fixture(scope="module")
def whole(gated):
    """Domains a, b and c; c is of a's kind."""
    model = copy.deepcopy(gated)
    add_learned_domain(model, "c", 3, num_experts=3, num_experts_per_tok=1, lora_rank=2)
    return model


@pytest.fixture(scope="module")
def folders(whole, tmp_path_factory):
    """The model with one file beside those of its domains, with several, and what was trained alone."""
    folder = tmp_path_factory.mktemp("stored")
    whole.save_pretrained(folder / "whole")
    whole.save_pretrained(folder / "shards", max_shard_size="300KB")
    base = copy.deepcopy(whole)
    for name in NAMES:
        remove_domain(base, name)
    base.save_pretrained(folder / "base")
    trained = SamoeModel.from_pretrained(folder / "base")
    merge_domains(trained, whole)
    trained.save_pretrained(folder / "trained", experts_only=True)
    for kind in ("whole", "trained"):
        write_as_early_versions(shutil.copytree(folder / kind, folder / f"early {kind}"))
    return folder


def write_as_early_versions(folder):
    """All tensors in one file."""
    path = folder / "model.safetensors"
    tensors = [load_file(one) for one in (path, *(folder / "domains").iterdir())]
    save_file({name: tensor for own in tensors for name, tensor in own.items()}, path, metadata={"format": "pt"})
    shutil.rmtree(folder / "domains")


@pytest.fixture
def stored(folders):
    return SamoeModel.from_pretrained(folders / "whole")


@pytest.fixture
def files(folders, tmp_path):
    """A folder that may be changed, and the model that was loaded from it."""
    folder = shutil.copytree(folders / "whole", tmp_path / "model")
    return folder, SamoeModel.from_pretrained(folder)


def layers_of(model):
    return [model.get_submodule(name) for name in model.expert_module_names]


def unread(model) -> set[str]:
    """Domains with experts that are in a file alone."""
    return {name for layer in layers_of(model) for name in layer.stored if name not in layer.lent}


def track(model, video, domain):
    prompts = [VideoPrompt(i, mask=video.masks(0, [i])[0]) for i in video.visible(0)]
    frames = track_video(model, build_processor(model.config), video.frames, prompts, domain=domain)
    return torch.stack([frame.logits for frame in frames])


@pytest.mark.parametrize("folder", ["whole", "shards", "trained", "early whole", "early trained"])
def test_a_video_reads_its_domain_alone(folders, folder, whole, domain_videos):
    model, video = SamoeModel.from_pretrained(folders / folder), domain_videos["shapes"][0]
    assert model.config.domains == whole.config.domains and unread(model) == {*NAMES}
    assert model.expert_module_names == whole.expert_module_names
    for domain, left in ((None, {"a", "b", "c"}), ("b", {"a", "c"}), ("c", {"a"})):
        assert torch.equal(track(model, video, domain), track(whole, video, domain))
        assert unread(model) == left
    assert_same_tensors(model, whole)
    assert unread(model) == set()


def test_scoring_videos_reads_their_domain_alone(stored, domain_videos):
    evaluate_videos(stored, build_processor(stored.config), [domain_videos["shapes"][0]], False, domain="b")
    assert unread(stored) == {"a", "c"}


def test_what_was_read_is_let_go_when_others_are_read(stored, whole, two_clips, monkeypatch):
    monkeypatch.setattr(domain_experts, "MOST_LENT", 1)
    for domain in ("a", "c", "a"):
        assert torch.equal(clip_masks(stored, two_clips, domain), clip_masks(whole, two_clips, domain))
        assert {name for layer in layers_of(stored) for name in layer.lent} == {domain}
    assert_same_tensors(stored, whole)


def state(model):
    return model.state_dict()


def of_submodule(model):
    return {f"memory_attention.{name}": x for name, x in model.memory_attention.state_dict().items()}


def parameters(model):
    return dict(model.named_parameters())


def modules(model):
    return {f"{n}.{name}": x for n, m in model.named_modules() for name, x in m.named_parameters(recurse=False)}


def by_name(model):
    layer = next(name for name in model.expert_module_names if name.startswith("memory_attention."))
    found = {domain: model.get_parameter(f"{layer}.domain_{domain}.lora_A") for domain in ("c", "a")}
    assert not hasattr(model.get_submodule(layer), "domain_x")
    return found


def printed(model):
    return {line: torch.zeros(()) for line in repr(model).splitlines()}


def deepcopy(model):
    return copy.deepcopy(model).state_dict()


def pickled(model):
    return pickle.loads(pickle.dumps(model)).state_dict()


def applied(model):
    model.apply(lambda module: [x.data.mul_(2) for x in module.parameters(recurse=False)])
    return model.state_dict()


def half(model):
    return model.to(torch.bfloat16).state_dict()


def half_after_use(model):
    with torch.no_grad():
        for layer in layers_of(model):
            layer.experts_of("a")
    return model.to(torch.bfloat16).state_dict()


def half_and_whole_again(model):
    return model.half().float().state_dict()


def renamed(model):
    rename_domain(model, "b", "z")
    remove_domain(model, "a")
    return model.state_dict()


def trainable(model):
    model.set_trainable("domain:c")
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def merged(model):
    other = copy.deepcopy(model)
    for name in NAMES:
        rename_domain(other, name, f"{name}_2")
    merge_domains(model, other)
    return model.state_dict()


@pytest.mark.parametrize(
    "use",
    [
        *(state, of_submodule, parameters, modules, by_name, printed, deepcopy, pickled, applied),
        *(half, half_after_use, half_and_whole_again, renamed, trainable, merged),
    ],
)
def test_whoever_asks_for_tensors_gets_those_of_all_domains(stored, whole, use):
    found, expected = use(stored), use(copy.deepcopy(whole))
    assert list(found) == list(expected)
    assert all(torch.equal(x, expected[name]) and x.dtype == expected[name].dtype for name, x in found.items())
    requires = [{name: x.requires_grad for name, x in model.named_parameters()} for model in (stored, whole)]
    assert use in (renamed, trainable, merged) or requires[0] == {name: "domain_" in name for name in requires[1]}


@pytest.mark.parametrize("part", ["", "memory_attention"])
def test_a_state_dict_is_loaded_into_all_domains(stored, whole, part):
    values = {name: 2 * x for name, x in whole.get_submodule(part).state_dict().items() if ".domain_" in name}
    found = stored.get_submodule(part).load_state_dict(values, strict=False)
    assert not found.unexpected_keys
    assert all(torch.equal(stored.get_submodule(part).state_dict()[name], x) for name, x in values.items())


def test_training_reads_all_and_changes_its_domain_alone(stored, whole, two_clips):
    stored.train()
    stored(*two_clips, domain="a").loss.backward()  # before an optimizer asks for parameters
    assert unread(stored) == set()
    optimizer = torch.optim.AdamW(stored.parameters(), lr=1e-2)
    optimizer.step()
    before = whole.state_dict()
    changed = {name for name, x in stored.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(".domain_a." in name for name in changed)


def test_what_is_read_while_a_video_is_tracked_can_be_kept_and_trained(stored, two_clips):
    with torch.inference_mode():
        stored(*two_clips, domain="a")
    stored(*two_clips, domain="a").loss.backward()
    grads = {name for name, x in stored.named_parameters() if x.grad is not None}
    assert grads and all(".domain_a." in name for name in grads)
    assert not any(x.is_inference() for x in stored.parameters())


def test_threads_read_at_once(stored, whole, domain_videos, monkeypatch):
    monkeypatch.setattr(domain_experts, "MOST_LENT", 1)
    video, found = domain_videos["shapes"][0], {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: track(stored, video, name)})) for name in NAMES
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], track(whole, video, name)) for name in NAMES)


@pytest.mark.parametrize("other", [lambda layer: layer.state_dict(), lambda layer: layer.eval()], ids=["all", "none"])
def test_another_thread_may_read_all_or_let_go_meanwhile(stored, whole, other):
    """Here it does right after this one has seen that experts are to be read, and after it has read them."""
    name = next(name for name in stored.expert_module_names if "a" in stored.get_submodule(name).stored)
    layer, expected = stored.get_submodule(name), whole.get_submodule(name).domain_a

    class Seen(dict):
        def __contains__(self, key):
            return super().__contains__(key) and (other(layer), True)[1]

    class Lent(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            other(layer)

    layer.stored, layer.lent = Seen(layer.stored), Lent()
    with torch.no_grad():
        assert torch.equal(layer.experts_of("a").lora_A, expected.lora_A)


def replaced(path):
    tensors = {name: torch.zeros_like(x) for name, x in load_file(path).items()}
    save_file(tensors, path.with_name("new"), metadata={"format": "pt"})
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("change", [os.remove, replaced])
def test_a_file_that_was_removed_or_replaced_is_read_on(files, whole, two_clips, change):
    for path in (files[0] / "domains").iterdir():
        change(path)
    assert torch.equal(clip_masks(files[1], two_clips, "c"), clip_masks(whole, two_clips, "c"))
    assert_same_tensors(files[1], whole)


def test_a_file_that_was_written_to_is_refused_by_name(files, two_clips):
    folder, model = files
    path = folder / "domains" / "a.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:] = b"\x00" * 4
    path.write_bytes(content)
    for use in (lambda: clip_masks(model, two_clips, "a"), lambda: model.save_pretrained(folder)):
        with pytest.raises(ValueError, match=r"a\.safetensors was changed after the model was loaded"):
            use()
    clip_masks(model, two_clips, "b")


def test_values_are_checked_when_they_are_read(files, two_clips):
    path = files[0] / "domains" / "b.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if name.endswith("lora_A"))
    changes = (
        (name, whole[name] * torch.nan, rf"b\.safetensors: the tensor '{name}' has NaN"),
        (name, whole[name].mT.contiguous(), rf"b\.safetensors has '{name}' of shape .*; expected \("),
        (f"{name}_", whole[name], rf"b\.safetensors has no tensor '{name}'"),
    )
    for other, tensor, message in changes:
        tensors = {**{key: x for key, x in whole.items() if key != name}, other: tensor}
        save_file(tensors, path, metadata={"format": "pt"})
        model = SamoeModel.from_pretrained(files[0])
        clip_masks(model, two_clips, "a")
        with pytest.raises(ValueError, match=message):
            clip_masks(model, two_clips, "b")


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (os.remove, r"has no domains/b\.safetensors; expected the experts of the domain 'b' there"),
        (cut, r"b\.safetensors holds tensors of [\d,]+ bytes, but .* [\d,]+ values .* for the domain 'b'"),
        (pointer, r"b\.safetensors is truncated, damaged or no safetensors file"),
        (lambda path: path.write_bytes(b""), r"b\.safetensors is truncated, damaged or no safetensors file"),
    ],
)
@pytest.mark.parametrize("kind", ["whole", "trained"])
def test_a_file_that_lacks_or_is_of_another_size_is_found_at_once(folders, tmp_path, kind, change, message):
    folder = shutil.copytree(folders / kind, tmp_path / "model")
    change(folder / "domains" / "b.safetensors")
    with pytest.raises((ValueError, OSError), match=message):
        SamoeModel.from_pretrained(folder)


@pytest.mark.parametrize("experts_only", [False, True])
def test_a_model_is_saved_over_the_folder_that_it_was_loaded_from(folders, whole, tmp_path, experts_only, two_clips):
    folder = shutil.copytree(folders / ("trained" if experts_only else "whole"), tmp_path / "model")
    model, other = (SamoeModel.from_pretrained(folder) for _ in range(2))
    clip_masks(model, two_clips, "b")
    remove_domain(model, "a")
    model.save_pretrained(folder, experts_only=experts_only)
    assert sorted(path.name for path in (folder / "domains").iterdir()) == ["b.safetensors", "c.safetensors"]
    assert SamoeModel.from_pretrained(folder).config.domain_names == ["b", "c"]
    assert_same_tensors(other, whole)  # somebody else's, who had loaded it before


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which files are mapped")
@pytest.mark.parametrize("kind", ["shards", "trained"])
def test_on_windows_no_file_stays_mapped_and_so_can_be_replaced(folders, whole, tmp_path, monkeypatch, kind):
    shutil.copytree(folders, tmp_path / "models")
    monkeypatch.setattr(sys, "platform", "win32")
    model = SamoeModel.from_pretrained(tmp_path / "models" / kind)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert_same_tensors(model, whole)


def test_experts_that_a_file_lacks_are_new_where_that_is_allowed(folders, whole, tmp_path):
    for kind in ("whole", "trained"):
        folder = shutil.copytree(folders / kind, tmp_path / kind)
        path = folder / "domains" / "b.safetensors"
        tensors = load_file(path)
        layer = next(iter(tensors)).partition("domain_b")[0]
        for name in [name for name in tensors if name.startswith(f"{layer}domain_b")]:
            del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"b\.safetensors holds tensors of"):
            SamoeModel.from_pretrained(folder)
        model, info = SamoeModel.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
        assert len(info["missing_keys"]) == 4 and not info["unexpected_keys"]
        found, expected = model.state_dict(), whole.state_dict()
        assert found.keys() == expected.keys()
        odd = {name for name, x in found.items() if not torch.equal(x, expected[name])}
        assert odd and all(name.startswith(f"{layer}domain_b.") for name in odd)
