"""What methods of a study change of a model."""

import pytest
import torch

from helpers.domains import new_model
from samoe_hf.data import SyntheticVideos
from samoe_hf.model.expert_layer import matching_linear_names
from samoe_hf.model.modeling_samoe import SamoeModel
from study_methods import SEQUENTIAL, train
from study_plan import StudyDomain, StudyPlan
from study_selectors import SELECTORS, selector_features

DOMAIN = StudyDomain("blobs", [], [], steps=2)
LAYERS = {"expert_modules": ["*"], "exclude_modules": ["mask_decoder.*"]}
FEW = {"num_frames": 2, "max_objects": 1, "batch_size": 1}
PLAN = StudyPlan("", StudyDomain("shapes", [], [], steps=2), [DOMAIN], [["blobs"]], [0], **LAYERS, **FEW)


def videos(look, count, seed):
    return [SyntheticVideos(count, 2, (64, 64), domain=look, seed=seed)[i] for i in range(count)]


@pytest.mark.parametrize("rate, moves", [(0.0, False), (1e-2, True)])
def test_orthogonal_subspaces_leave_a_plain_model_in_which_linear_layers_alone_have_moved(tmp_path, rate, moves):
    model, method = new_model(), SEQUENTIAL["osf"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finish = method.prepare(model, PLAN, 0)
    train(
        model, videos("blobs", 2, 0), DOMAIN, PLAN,
        trainable=method.trainable, learning_rate=rate, seed=0, on_step=lambda _: None,
    )  # fmt: skip
    finish()
    after = model.state_dict()
    assert after.keys() == before.keys()
    layers = {f"{name}.weight" for name in matching_linear_names(model, *LAYERS.values())}
    moved = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    assert moved <= layers and bool(moved) == moves
    model.save_pretrained(tmp_path)
    loaded = SamoeModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in after.items())


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_gives_videos_the_domain_that_they_look_like(name):
    torch.manual_seed(0)
    base, selector = new_model().eval(), SELECTORS[name]
    looks = ("stripes", "paper")
    features = {look: selector_features(selector, base, videos(look, 16, 0), 32) for look in looks}
    assert {len(of) for of in features.values()} == {32}
    choose, tensors = selector.fit(features)
    for look in looks:
        further = [selector_features(selector, base, [video], 1) for video in videos(look, 4, 1)]
        assert [choose(frame[0]) for frame in further] == [look] * 4
    assert tensors.keys() >= set(looks)
