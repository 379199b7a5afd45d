"""The gate tells domains apart, refuses what it does not know, and changes nothing that it knew before."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from samoe_hf.model.domain_gate import NO_DOMAIN, REFUSING, DomainGate, num_pooled_features, pooled_features
from samoe_hf.model.frame_step import encode_frames
from samoe_hf.surgery.gate import (
    append_rows,
    confirm_row,
    distances_between,
    fit_row,
    remove_row,
    rename_row,
    video_spread,
)

FEATURES = 24


def domain(seed, num_videos=40, num_frames=3, num_features=FEATURES, center_seed=None):
    """Frames of a domain of its own center, directions and scales. Frames of a video lie close together."""
    shape = torch.Generator().manual_seed(seed if center_seed is None else center_seed)
    center = 4 * torch.randn(num_features, generator=shape)
    directions = torch.randn(3, num_features, generator=shape)
    draw = torch.Generator().manual_seed(1000 + seed)
    videos = torch.arange(num_videos).repeat_interleave(num_frames)
    between = torch.randn(num_videos, 3, generator=draw) @ directions
    between = between + 0.3 * torch.randn(num_videos, num_features, generator=draw)
    within = 0.1 * torch.randn(len(videos), num_features, generator=draw)
    return center + between[videos] + within, videos


def gate(*domains, num_features=FEATURES, spread=None):
    result = DomainGate(num_features)
    for number, one in enumerate(domains):
        append_rows(result, DomainGate(result.sizes, [str(number)]))
        fit_row(result, number, *one, spread)
    return result


def same_buffers(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def held_out(seed, **sizes):
    """Other videos of the domain that `domain(seed)` draws."""
    return domain(seed + 100, center_seed=seed, **sizes)[0]


@pytest.mark.parametrize(("num_videos", "share"), [(1, 0), (6, 0.75), (40, 0.97)])
@pytest.mark.parametrize("num_features", [128])
def test_further_videos_go_to_their_domain_or_to_none_and_those_of_no_domain_to_none(num_features, num_videos, share):
    """The more videos a domain was fitted to, the more further ones it takes."""
    known = gate(*(domain(k, num_videos, num_features=num_features) for k in range(6)), num_features=num_features)
    right = 0.0
    for index in range(6):
        decision = known.decide(held_out(index, num_features=num_features))
        accepted = decision.domain == index
        right += accepted.float().mean().item() / 6
        assert set(decision.domain.unique().tolist()) <= {index, NO_DOMAIN}
        assert (decision.distances[accepted, index] <= 1).all() and (decision.confidence[accepted] >= 0.5).all()
        assert decision.distances.shape == (120, 6) and (decision.confidence <= 1).all()
    assert right >= share
    decision = known.decide(held_out(6, num_features=num_features))
    assert (decision.domain == NO_DOMAIN).all() and (decision.distances > 1).all() and (decision.confidence > 0.5).all()


def test_it_says_how_likely_each_domain_is():
    (first, videos), far = domain(0), domain(1)
    halves = [(first[videos % 2 == half], videos[videos % 2 == half]) for half in (0, 1)]
    decision = gate(*halves, far).decide(held_out(0))
    near = decision.likelihoods[:, :2]
    torch.testing.assert_close(decision.likelihoods.sum(1), torch.ones(len(near), dtype=near.dtype))
    assert (near.sum(1) > 0.99).all() and near.amin(1).mean() > 0.05
    assert torch.equal(decision.likelihoods.argmax(1)[decision.domain >= 0], decision.domain[decision.domain >= 0])


def test_what_is_unlike_a_domain_in_one_kind_of_features_is_refused():
    (first, videos), (second, _) = domain(0), domain(1)
    known = gate((torch.cat([first, second], 1), videos), num_features=(FEATURES, FEATURES))
    like, unlike = held_out(0), held_out(2)
    rows = [torch.cat(parts, 1) for parts in ((like, held_out(1)), (like, unlike), (unlike, held_out(1)))]
    shares = [(known.decide(x).domain == 0).float().mean().item() for x in rows]
    assert shares[0] >= 0.95 and shares[1:] == [0, 0]
    assert known.thresholds.shape == (1, 2)


def test_the_contrast_of_a_picture_tells_its_scale_and_colour():
    size = 64
    checks = (torch.arange(size)[:, None] + torch.arange(size)) % 2 * 2 - 1.0
    coarse = checks[:16, :16].repeat_interleave(4, 0).repeat_interleave(4, 1)
    gray = torch.ones(3)[:, None, None]
    green = torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    image = SimpleNamespace(fine=torch.zeros(4, 2, 16, 16))
    pictures = torch.stack([gray * checks, gray * coarse, green * checks, 0 * gray * checks])
    pooled = pooled_features(image, pictures)[:, 4:19].exp().reshape(4, 5, 3) - 0.02
    expected = torch.zeros(4, 5, 3)
    expected[0, 0, 0] = expected[1, 2, 0] = 1  # lightness, at the scale of one pixel and of four
    expected[2, 0, 1] = 2  # red against green
    assert_close(pooled, expected, atol=1e-5, rtol=0)


def test_further_features_tell_edges_from_noise_and_whether_contrast_grows_with_lightness():
    draw = torch.Generator().manual_seed(0)
    noise, light = torch.randn(1, 64, 64, generator=draw), torch.linspace(0, 2, 64).expand(3, 64, 64)
    edge = (torch.arange(64) > 30).float().expand(3, 64, 64)
    pictures = torch.stack([noise.expand(3, 64, 64), edge, light * (1 + 0.3 * noise), -light * (1 + 0.3 * noise)])
    further = pooled_features(SimpleNamespace(fine=torch.zeros(4, 2, 16, 16)), pictures)[:, 19:].reshape(4, 5, 2, 3)
    spread, growth = further[:, 0, 0, 0], further[:, 0, 1, 0]
    assert spread[1] > spread[0] and abs(growth[0]) < 0.2 and growth[2] > 0.5 and growth[3] < -0.5
    assert further.isfinite().all() and (further[:, :, :, 1:].abs() < 1e-5).all()  # no colours


def with_further(features, seed):
    """The same, with 8 further features of other values for each seed."""
    return torch.cat([features, seed + torch.randn(len(features), 8, generator=torch.Generator().manual_seed(seed))], 1)


def test_further_features_tell_rivals_apart_and_let_in_what_was_let_in():
    (first, videos), sizes = domain(0), (4, FEATURES - 4, 8)
    rivals = gate((with_further(first, 0), videos), (with_further(first, 9), videos), num_features=sizes)
    alike = gate((first, videos), (first, videos), num_features=sizes[:2])
    for seed, index in ((0, 0), (9, 1)):
        decision, before = rivals.decide(with_further(held_out(0), seed)), alike.decide(held_out(0))
        assert torch.equal(decision.distances, before.distances) and (before.likelihoods == 0.5).all()
        assert torch.equal(decision.domain == index, before.domain == 0)
        assert (decision.likelihoods[:, index] > 0.9).all()
    assert torch.equal(rivals.thresholds, alike.thresholds)


def test_domains_of_older_files_decide_as_they_did_alone_and_beside_new_ones():
    (first, videos), (second, _), sizes = domain(0), domain(1), (4, FEATURES - 4, 8)
    old = gate((first, videos), (second, videos), num_features=sizes[:2])
    loaded = DomainGate(sizes, "01")
    missing, unexpected = loaded.load_state_dict(old.state_dict(), strict=False)
    assert len(missing) == 7 and all(name.startswith("further_") for name in missing) and not unexpected
    for name, further in (("2", 5), ("3", 7)):
        for rows in (held_out(0), held_out(1), held_out(2)):
            assert all(map(torch.equal, loaded.decide(with_further(rows, 3)), old.decide(rows)))
        assert (distances_between(loaded) == distances_between(old)).all() and loaded.problem() is None
        frames = domain(int(name))[0]
        for known, features in ((loaded, with_further(frames, further)), (old, frames)):
            append_rows(known, DomainGate(known.sizes, [name]))
            fit_row(known, int(name), features, videos)
    odd = first[:3] + 4
    confirm_row(loaded, 0, with_further(odd, 3)), confirm_row(old, 0, odd)
    assert all(map(torch.equal, loaded.decide(with_further(odd, 3)), old.decide(odd)))
    assert not loaded.further_noises[:2].any() and (loaded.further_noises[2:] > 0).all()


def alike_videos(seed, count, draw):
    """A domain of 8 + 28 features: one of all videos, and directions that all domains share, and its spread."""
    directions = torch.randn(28, 28, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 29)
    center = 2 * torch.randn(36, generator=torch.Generator().manual_seed(seed))
    values = torch.randn(count, 36, generator=torch.Generator().manual_seed(draw))
    return center + torch.cat([values[:, :8], values[:, 8:] @ directions.T], 1), directions @ directions.T


def test_of_few_videos_more_are_recognized_where_it_is_known_how_videos_vary():
    """Beside a domain of an older file, which decides as it did."""
    sizes, (first, spread), videos = (8, 20, 8), alike_videos(1, 3, 11), range(3)
    (second, _), (further, _), (stranger, _) = (
        alike_videos(2, 3, 12),
        alike_videos(1, 200, 13),
        alike_videos(3, 200, 14),
    )
    old = gate((second, videos), (first, videos), num_features=sizes)
    known = gate((second, videos), num_features=sizes)
    append_rows(known, gate((first, videos), num_features=sizes, spread=spread))
    rename_row(known, 1, "1")
    shares = [
        [(one.decide(rows).domain == 1).float().mean().item() for rows in (further, stranger)] for one in (old, known)
    ]
    assert shares[0][0] < 0.6 and shares[1][0] > 0.9 and shares[1][1] < 0.01, shares
    for rows in (further, stranger):
        assert torch.equal(known.decide(rows).distances[:, 0], old.decide(rows).distances[:, 0])
        assert torch.equal(known.decide(rows).likelihoods, old.decide(rows).likelihoods)
    loaded = DomainGate(sizes, "01")
    state = {name: values for name, values in known.state_dict().items() if not name.startswith(REFUSING)}
    assert len(loaded.load_state_dict(state, strict=False).missing_keys) == 4
    assert all(map(torch.equal, loaded.decide(further), old.decide(further)))
    assert (distances_between(known).diagonal() < 0.1).all() and loaded.problem() is None
    for row in alike_videos(1, 30, 15)[0]:
        confirm_row(known, 1, row[None], spread)
    assert (known.decide(further).domain == 1).float().mean() > 0.95
    known.further_refusing_thresholds[1] = 0
    assert known.problem() is not None


def test_how_videos_vary_is_of_the_pictures_features_and_of_each_look():
    spread = video_spread(192)
    _, picture, further = num_pooled_features(SimpleNamespace(mask_decoder_config=SimpleNamespace(hidden_size=64)))
    assert spread.shape == 2 * (picture + further,)
    assert (torch.linalg.eigvalsh(spread) > 0).all()
    assert_close(video_spread(768), spread / 2)
    assert not torch.equal(video_spread(192, without=["night"]), spread)


def test_it_stays_on_the_cpu_beside_apples_gpus_which_have_no_float64():
    known = gate(domain(0))
    known._apply(lambda x: SimpleNamespace(device=torch.device("mps")))  # as `model.to("mps")` does where there is one
    assert known.decide(held_out(0)).confidence.device.type == "cpu"


@pytest.mark.parametrize(("num_videos", "num_frames", "value"), [(1, 1, 0.0), (4, 5, 3.0)])
def test_constant_features_are_recognized_and_nothing_else(num_videos, num_frames, value):
    frames = torch.full((num_videos * num_frames, FEATURES), value)
    known = gate((frames, torch.arange(num_videos).repeat_interleave(num_frames)), domain(1))
    assert known.decide(torch.cat([frames[:1], frames[:1] + 0.5])).domain.tolist() == [0, NO_DOMAIN]


def test_an_added_domain_leaves_all_others_as_they_were():
    known = gate(domain(0), domain(1))
    before, state = known.decide(held_out(0)), {k: v.clone() for k, v in known.state_dict().items()}
    append_rows(known, DomainGate(known.sizes, ["2"]))
    fit_row(known, 2, *domain(2))
    after = known.decide(held_out(0))
    assert all(torch.equal(x[:2], state[k]) for k, x in known.state_dict().items())
    assert torch.equal(after.domain, before.domain)
    assert torch.equal(after.distances[:, :2], before.distances)


@pytest.mark.parametrize("sizes", [(16,), (8, 6, 2)])
@pytest.mark.parametrize("num_videos", [1, 2, 12])
def test_a_confirmed_video_is_known_as_if_it_had_been_there_before(num_videos, sizes):
    """With no more features than directions are kept of how they vary together."""
    features, videos = domain(0, num_videos + 1, num_features=16)
    last, other = videos == num_videos, domain(1, num_features=16)
    spread = domain(2, num_features=8)[0].T.cov()
    known = gate((features[~last], videos[~last]), other, num_features=sizes, spread=spread)
    before = {name: buffer.clone() for name, buffer in known.state_dict().items()}
    confirm_row(known, 0, features[last], spread)
    expected = gate((features, videos), other, num_features=sizes, spread=spread)
    assert known.counts.tolist() == expected.counts.tolist()
    for prefix in ("", "further_", REFUSING) if known.has_further else [""]:
        for name in ("means", "noises"):
            one, two = (x.get_buffer(prefix + name)[0] for x in (known, expected))
            assert_close(one, two, rtol=1e-3, atol=1e-3)
        one, two = (x.get_buffer(f"{prefix}factors")[0] for x in (known, expected))
        assert_close(one.T @ one, two.T @ two, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(known.get_buffer(name)[1], buffer[1]) for name, buffer in before.items())


def test_a_confirmed_video_that_was_refused_lets_others_like_it_in():
    known = gate(domain(0, 30))
    odd = domain(0, 30)[0][:3] + 4
    near = odd + 0.1 * torch.randn(3, FEATURES, generator=torch.Generator().manual_seed(9))
    assert known.decide(near).domain.tolist() == [NO_DOMAIN] * 3
    confirm_row(known, 0, odd)
    assert known.decide(near).domain.tolist() == [0] * 3
    assert (known.decide(held_out(0)).domain == 0).float().mean() > 0.95
    unknown = DomainGate(FEATURES, "a")
    confirm_row(unknown, 0, odd)
    assert unknown.counts.tolist() == [1] and unknown.decide(odd[:1]).domain.tolist() == [0]


def test_distances_between_domains_are_those_of_their_means():
    known = gate(domain(0), domain(1))
    append_rows(known, DomainGate(known.sizes, ["new"]))
    distances = distances_between(known)
    assert (distances.diagonal()[:2] < 0.1).all() and distances[0, 1] > 1 < distances[1, 0]
    assert not torch.tensor(distances)[2].isfinite().any() and not torch.tensor(distances)[:, 2].isfinite().any()


def test_rows_are_fitted_merged_removed_and_forgotten(tmp_path):
    known = DomainGate(FEATURES, "01")
    assert (known.decide(held_out(1)).domain == NO_DOMAIN).all() and len(known) == 2
    fit_row(known, 1, *domain(1))
    assert (known.decide(held_out(1, num_videos=20)).domain == 1).float().mean() >= 0.9
    assert known.decide(held_out(1)).distances[:, 0].isinf().all()
    frames, videos = domain(0)
    fit_row(known, 0, frames, [f"video {int(i)}" for i in videos])
    assert same_buffers(known, gate(domain(0), domain(1)))
    others = gate(domain(2), domain(3))
    rename_row(others, 0, "2"), rename_row(others, 1, "3")
    append_rows(known, others)
    assert same_buffers(known, gate(domain(0), domain(1), domain(2), domain(3)))
    remove_row(known, 1)
    rename_row(known, 1, "1"), rename_row(known, 2, "2")
    assert same_buffers(known, gate(domain(0), domain(2), domain(3))) and known.domains == ["0", "1", "2"]
    save_file(known.state_dict(), tmp_path / "gate.safetensors")
    loaded = DomainGate(FEATURES, "012")
    loaded.load_state_dict(load_file(tmp_path / "gate.safetensors"))
    assert all(map(torch.equal, loaded.decide(held_out(0)), known.decide(held_out(0))))
    known.reset_parameters()
    assert same_buffers(known, DomainGate(FEATURES, "012"))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casts_of_the_model_leave_what_is_known_as_it_is(cast):
    known = gate(domain(0), domain(1))
    model = torch.nn.ModuleDict({"gate": known, "layer": torch.nn.Linear(2, 2)})
    cast(model)
    assert model["layer"].weight.dtype != torch.float32
    assert same_buffers(known, gate(domain(0), domain(1)))
    with torch.device("meta"):
        empty = DomainGate(FEATURES, "01")
    cast(empty)
    assert empty.to_empty(device="cpu").means.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    frames, videos = domain(0)
    frames[7, 3] = value
    known = gate(domain(1))
    before = {k: v.clone() for k, v in known.state_dict().items()}
    for call in (lambda: fit_row(known, 0, frames, videos), lambda: known.decide(frames)):
        with pytest.raises(ValueError, match="not finite"):
            call()
    assert all(torch.equal(known.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.decide(torch.zeros(2, 7)), r"\(rows, 24\), not \(2, 7\)"),
        (lambda g: fit_row(g, 0, torch.zeros(3, FEATURES), [0, 1]), "each of the 3 frames.* not 2"),
        (lambda g: fit_row(g, 0, torch.zeros(0, FEATURES), []), "at least one"),
        (lambda g: append_rows(g, DomainGate(7)), "7 features, and this one 24"),
    ],
)
def test_wrong_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(gate(domain(0)))


@torch.no_grad()
def test_pooled_features_are_mean_and_deviation_of_the_finest_features_and_contrasts(nano):
    pixels = nano.load("train_step")["pixel_values"][:2]
    image = encode_frames(nano.model, pixels)
    pooled = pooled_features(image, pixels)
    channels = image.fine.shape[1]
    sizes = num_pooled_features(nano.model.config)
    assert sizes == (2 * channels, 15, 30) and pooled.shape == (2, sum(sizes)) and pooled.dtype == torch.float32
    assert_close(pooled[1, :channels], image.fine[1].mean((1, 2)))
    assert_close(pooled[1, channels : 2 * channels], image.fine[1].flatten(1).std(1, correction=0))
    half = pooled_features(image._replace(fine=image.fine.bfloat16()), pixels.bfloat16())
    assert half.dtype == torch.float32
    assert_close(half, pooled, atol=0.02, rtol=0.02)
    # Two looks of the same frames are told apart with a random encoder too.
    noise = 0.02 * torch.randn(20, *pixels.shape, generator=torch.Generator().manual_seed(0))
    looks = [
        pooled_features(encode_frames(nano.model, x), x)
        for x in ((pixels + noise).flatten(0, 1), (0.3 * pixels + noise).flatten(0, 1))
    ]
    known = gate(*((x[:20], range(20)) for x in looks), num_features=sizes)
    assert [known.decide(x[20:]).domain.unique().tolist() for x in looks] == [[0], [1]]


def test_rows_are_loaded_by_the_names_of_their_domains():
    known = gate(domain(0), domain(1))
    other = DomainGate(FEATURES, "10")
    other.load_state_dict(known.state_dict())
    assert torch.equal(other.decide(held_out(0)).domain, 1 - known.decide(held_out(0)).domain.clamp(max=1).abs())
    with pytest.raises(RuntimeError, match="other domains than this model's, 0, 2"):
        DomainGate(FEATURES, "02").load_state_dict(known.state_dict())


@pytest.mark.parametrize(("buffer", "value"), [("noises", 0), ("thresholds", -1), ("counts", -3), ("names", 5)])
def test_values_that_cannot_work_are_told(buffer, value):
    known = gate(domain(0))
    assert known.problem() is None
    known.get_buffer(buffer).fill_(value)
    assert known.problem() is not None
