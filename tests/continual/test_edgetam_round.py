"""With EdgeTAM as base: a domain is learned, merged for transformers and exported."""

import pytest
import yaml
from safetensors.torch import load_file
from transformers import EdgeTamVideoModel

from helpers.edgetam import edgetam_model, needs_timm
from helpers.export import compare, drawn_video
from helpers.export import load_tracker as load_exported
from helpers.prompted import PROMPTS, track
from helpers.reference import assert_tensors
from samoe_hf import SamoeModel
from samoe_hf.cli import main
from samoe_hf.continual.adapt import adapt
from samoe_hf.inference import load_tracker
from samoe_hf.model.expert_layer import is_expert_parameter
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.merge import merge_into_base

pytestmark = needs_timm
BLOBS = {"kind": "synthetic", "domain": "blobs", "num_frames": 3, "image_size": [64, 64]}
RUN = {
    "train_data": [{**BLOBS, "num_videos": 4, "seed": 1}], "eval_data": [{**BLOBS, "num_videos": 1, "seed": 2}],
    "num_frames": 3, "per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.3, "lora_rank": 2,
    "num_experts": 1, "num_experts_per_tok": 1, "num_correction_clicks": 1, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": True,
    "expert_modules": ["memory_attention.*[qv]_proj", "spatial_perceiver.*_proj", "memory_attention.*.mlp.*_proj"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as transformers saves it."""
    folder, model = tmp_path_factory.mktemp("base"), edgetam_model()
    merge_into_base(model, "base").save_pretrained(folder)
    build_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def learned(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN | {"feature_cache": str(folder / "features")}))
    adapt(base, "soft", [str(folder / "run.yaml")], folder / "model")
    return folder / "model"


def test_a_domain_is_learned_and_nothing_is_forgotten(base, learned):
    tensors = load_file(learned / "model.safetensors") | load_file(learned / "domains" / "soft.safetensors")
    changed = {name.split(".")[0] for name, x in tensors.items() if name.endswith("lora_B") and x.any()}
    assert changed == {"memory_attention", "spatial_perceiver"}
    assert all(is_expert_parameter(name) or name.startswith("domain_gate.") for name in tensors)
    model, plain = SamoeModel.from_pretrained(learned), SamoeModel.from_pretrained(base)
    assert model.config.domain_names == ["soft"] and model.domain_gate.counts.tolist() == [4]
    # The statistics of batch norms as well.
    assert_tensors(model, {name: x for name, x in plain.state_dict().items() if not is_expert_parameter(name)})


def test_it_is_merged_for_transformers(base, learned, tmp_path):
    main(["convert", str(learned), "--domain", "soft", "--to", "transformers", "--output", str(tmp_path / "out")])
    theirs, info = EdgeTamVideoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    model, processor = load_tracker(learned, "cpu")
    model.config.previous_mask_with_clicks = False
    sessions = processor, PROMPTS["box"]
    merged = merge_into_base(model, "soft")
    outputs = [track(x.eval(), *sessions) for x in (merged, theirs)]
    # A file's tensors lie elsewhere in memory, where kernels add up in another order.
    assert (outputs[0] - outputs[1])[:3].abs().mean() < 1e-4
    plain = track(SamoeModel.from_pretrained(base).eval(), *sessions)
    assert (outputs[0] - plain).abs().mean() > 1e-4
    assert_tensors(SamoeModel.from_pretrained(tmp_path / "out"), merged.state_dict())


@pytest.mark.slow
def test_it_is_exported(learned, tmp_path):
    main(["export", str(learned), "--domain", "soft", "--output", str(tmp_path / "out")])
    model, processor = load_tracker(learned, "cpu")
    frames, masks = drawn_video(6, (128, 128))
    prompts = [{"frame": 0, "object": 1, "mask": masks[1]}, {"frame": 1, "object": 2, "box": [20, 20, 90, 80]}]
    result = compare(model, processor, load_exported(tmp_path / "out"), frames, prompts, domain="soft")
    assert result.mean < 1e-3 and result.iou > 0.99
