"""With SAM 3's tracker as base: learned from, saved in part, evaluated, given domains, and exchanged with PEFT."""

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, Sam3TrackerVideoModel

from helpers.reference import ROOT, run_memory_attention
from peers import base_of
from samoe_hf import SamoeConfig, SamoeModel, VideoSession
from samoe_hf.analysis.routing import route_all_to
from samoe_hf.cli import main
from samoe_hf.continual.adapt import adapt
from samoe_hf.data.synthetic import SyntheticVideos
from samoe_hf.inference import evaluation_mode
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.loras import add_expert, export_expert

BLOBS = {"kind": "synthetic", "domain": "blobs", "num_frames": 3, "image_size": [64, 64]}
RUN = {
    "train_data": [{**BLOBS, "num_videos": 8, "seed": 1}], "eval_data": [{**BLOBS, "num_videos": 1, "seed": 2}],
    "num_frames": 3, "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 1.0e-2, "lora_rank": 2,
    "num_experts": 2, "num_correction_clicks": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of the tracker as transformers saves it."""
    torch.manual_seed(0)
    model = SamoeModel(SamoeConfig(**yaml.safe_load((ROOT / "configs" / "model_sam3_nano.yaml").read_text())))
    model.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(5.0)  # or masks would be empty
    folder = tmp_path_factory.mktemp("base")
    base_of(model).save_pretrained(folder)
    build_processor(model.config).save_pretrained(folder)
    return folder


def run_file(folder, **changes):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, **changes}))
    return str(path)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The folder of experts that a run of training saved, whose layers are of encoder and memory attention."""
    folder = tmp_path_factory.mktemp("trained")
    output = folder / "out"
    run = run_file(
        folder,
        model_name_or_path=str(base),
        output_dir=str(output),
        expert_modules=["memory_attention.*[qv]_proj", "vision_encoder.*[qv]_proj"],
        gradient_checkpointing=True,
    )
    main(["train", run])
    return output


def track(model, domain=None):
    video = SyntheticVideos(1, 4, domain="blobs", seed=2)[0]
    processor = build_processor(model.config)
    session = VideoSession(video.frames, processor, domain=domain)
    mask = video.masks(0, video.visible(0)[:1])[0]
    processor.add_inputs_to_inference_session(session, 0, 1, input_masks=mask)
    with evaluation_mode(model):
        return torch.stack([x.pred_masks for x in model.propagate_in_video_iterator(session, 0)])


def test_training_saves_experts_alone_which_load_onto_the_base(base, trained):
    tensors = load_file(trained / "model.safetensors")
    assert tensors and all(map(is_expert_parameter, tensors))
    assert any(name.startswith("vision_encoder.") and x.any() for name, x in tensors.items() if "lora_B" in name)
    model = AutoModel.from_pretrained(trained)
    plain = SamoeModel.from_pretrained(base).state_dict()
    assert all(torch.equal(x, plain[n]) for n, x in model.state_dict().items() if not is_expert_parameter(n))
    assert not torch.equal(track(model), track(SamoeModel.from_pretrained(base)))


@pytest.mark.slow
def test_domains_are_added_and_nothing_is_forgotten(base, tmp_path):
    modules = ["memory_attention.*[qv]_proj", "vision_encoder.*[qv]_proj"]
    first = adapt(base, "soft", [run_file(tmp_path, expert_modules=modules)], tmp_path / "first")
    assert first.gate_videos == 8
    model = SamoeModel.from_pretrained(tmp_path / "first")
    before, plain = track(model, "soft"), track(model, None)
    assert not torch.equal(before, plain) and torch.equal(plain, track(SamoeModel.from_pretrained(base)))
    data = [{**RUN["train_data"][0], "domain": "stripes"}]
    run = run_file(tmp_path, train_data=data, expert_modules=modules)
    adapt(tmp_path / "first", "lines", [run], tmp_path / "second")
    model = SamoeModel.from_pretrained(tmp_path / "second")
    assert model.config.domain_names == ["soft", "lines"] and model.domain_gate.counts.tolist() == [8, 8]
    assert torch.equal(track(model, "soft"), before) and torch.equal(track(model, None), plain)


def test_an_expert_is_exchanged_with_peft_on_transformers_model(base, trained, tmp_path):
    model = SamoeModel.from_pretrained(trained)
    export_expert(model, 1, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(Sam3TrackerVideoModel.from_pretrained(base), tmp_path / "lora").base_model.model
    frames = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with route_all_to(model, 1), torch.no_grad():
        found, expected = (x.eval().get_image_features(frames).fpn_hidden_states for x in (model, theirs))
        plain = SamoeModel.from_pretrained(base).get_image_features(frames).fpn_hidden_states
        for a, b, c in zip(found, expected, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert (a - c).abs().max() > 1e-4
        tokens = torch.randn(64, 1, 128, generator=torch.Generator().manual_seed(1))
        memory = torch.randn(128, 1, 64, generator=torch.Generator().manual_seed(2))
        outputs = [run_memory_attention(x.memory_attention, tokens, memory, tokens, memory) for x in (model, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    again = SamoeModel.from_pretrained(base, num_experts=2, lora_rank=2, expert_modules=model.config.expert_modules)
    assert add_expert(again, tmp_path / "lora") == 2
