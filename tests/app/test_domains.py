"""The page's domains: seen, changed for oneself, taken from others, found on the Hub, and saved."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.app import state_of
from helpers.app_server import Visitor
from helpers.domains import add_learned_domain, new_model
from helpers.hub_server import HubServer, use_hub
from samoe_hf import SamoeModel
from samoe_hf.app.models import load_model
from samoe_hf.app.uploads import Limits
from samoe_hf.model.processing_samoe import build_processor
from samoe_hf.surgery.domains import rename_domain


class Person(Visitor):
    """A page, with the words of somebody who cares for domains."""

    def __init__(self, app):
        super().__init__(app.url)
        assert self.load().success
        self.on_server = self.person(app)
        self.see()

    def do(self, element, *values, event="click", **others) -> str:
        answer = self.act(element, event, *values, **others)
        return answer.text if answer.success else f"refused: {answer.text}"

    def see(self, model="domains") -> str:
        return self.do("domains-tab", model, event="select")


@pytest.fixture
def person(served):
    return Person(served)


@pytest.fixture(scope="module")
def refused(served):
    """Whose wishes change nothing."""
    return Person(served)


@pytest.fixture(scope="module")
def other(two_domains, served):
    """Another's domain `lines` on the same base, with a picture, in the place for models."""
    model, folder = two_domains.copied().model, served.store / "other"
    rename_domain(model, "second", "lines")
    model.save_pretrained(folder)
    (folder / "examples").mkdir()
    Image.fromarray(np.full((40, 60, 3), (255, 0, 255), np.uint8)).save(folder / "examples" / "lines.png")
    return folder


def test_a_change_is_for_whoever_made_it_and_an_open_video_goes_on_as_it_was(person, served, two_domains, small_video):
    before, counts = two_domains.domains, two_domains.model.domain_gate.counts.clone()
    person.open(small_video)
    bystander = Person(served)
    bystander.open(small_video)
    assert "some_video: the gate took it for" in person.do("domains-confirm", "domains", "second")
    assert "second is now night." in person.do("domains-rename", "domains", "second", "night")
    assert "Removed first." in (said := person.do("domains-remove", "domains", "first"))
    assert "Changed for you alone" in said and "keeps what it has" in said and "night" in person.see()
    mine = person.on_server.changed["domains"]
    assert mine.domains == ["night"] and mine.model.domain_gate.counts.tolist() == [counts[1] + 1]
    assert mine.model.mask_decoder.iou_token.weight is two_domains.model.mask_decoder.iou_token.weight
    assert two_domains.domains == before and torch.equal(two_domains.model.domain_gate.counts, counts)
    assert "night" not in bystander.see() and not bystander.on_server.changed
    for one in (person, bystander):
        assert "Tracked." in one.do("track", 0)
    assert state_of(person.on_server.session) == state_of(bystander.on_server.session)
    assert "learning reads" in person.do("learn", "mine", 10)
    person.open(small_video)
    assert person.on_server.session.loaded is mine
    assert "As it was loaded." in person.do("domains-back", "domains") and not person.on_server.changed


def test_a_domain_of_others_is_added_with_its_picture_and_saved_for_everybody(person, served, two_domains, other):
    assert "Added striped, of other." in person.do("domains-add", "domains", "other", "lines", "striped")
    assert "Removed second." in person.do("domains-remove", "domains", "second")
    assert "Saved" in person.do("domains-save", "domains", "three")
    assert Person(served).see("three").count("striped") and (served.store / "three/examples/striped.png").exists()
    loaded = SamoeModel.from_pretrained(served.store / "three")
    assert loaded.config.domain_names == ["first", "striped"] and not person.on_server.changed
    given = SamoeModel.from_pretrained(other).state_dict()
    for name, tensor in loaded.state_dict().items():
        if "domain_gate" not in name:
            assert torch.equal(tensor, given[name.replace("striped", "lines")])
    assert "is there; choose another name" in (
        person.do("domains-rename", "domains", "first", "x") and person.do("domains-save", "domains", "three")
    )


@pytest.mark.parametrize(
    ("element", "values", "message"),
    [
        ("domains-rename", ["domains", "first", "../x"], "A domain's name must be of letters"),
        ("domains-remove", ["domains", "third"], "Value: third is not in the list"),
        ("domains-confirm", ["domains", "first"], "There is no video yet"),
        ("domains-add", ["domains", "FOLDER", "", ""], "Domains are added of a model here"),
        ("domains-add", ["domains", "../..", "", ""], "Domains are added of a model here"),
        ("domains-add", ["domains", "other", "", ""], "Both models have a domain 'first'"),
        ("domains-add", ["domains", "nano", "", ""], "The other model's experts belong to no domain"),
        ("domains-save", ["domains", "new"], "Nothing was changed"),
        ("domains-save", ["domains", "../new"], "The name must be of letters"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(refused, served, other, element, values, message):
    answer = refused.do(element, *(str(other) if value == "FOLDER" else value for value in values))
    assert message in answer and not refused.on_server.changed and str(served.store) not in answer
    assert not (served.store / "new").exists() and not (served.store.parent / "new").exists()


def test_without_a_place_for_models_nothing_is_taken_or_saved(serve, two_domains):
    with serve([two_domains], Limits()) as running:
        person = Person(running)
        assert "Removed first." in person.do("domains-remove", "domains", "first")
        for element, values in (("add", ["a/b", "", ""]), ("save", ["x"]), ("find", [])):
            assert "where the app has a place for models" in person.do(f"domains-{element}", "domains", *values)


def test_domains_on_the_same_base_are_found_on_the_hub_and_added(serve, tmp_path, monkeypatch):
    with HubServer() as hub:
        use_hub(hub, monkeypatch, tmp_path / "cache")
        base = new_model()
        base.push_to_hub("tester/base", processor=build_processor(base.config))
        trained = SamoeModel.from_pretrained("tester/base")
        add_learned_domain(trained, "night", 1)
        trained.push_to_hub("tester/night", experts_only=True)
        with serve([load_model("tester/base", "cpu")], Limits(), models=tmp_path / "models") as running:
            person = Person(running)
            assert "It has no domains" in person.see("base")
            assert "tester/night: night" in person.do("domains-find", "base")
            assert "Added night, of tester/night." in person.do("domains-add", "base", "tester/night", "", "")
            assert "tester/no" in person.do("domains-add", "base", "tester/no", "", "")
            assert "Saved" in person.do("domains-save", "base", "mine")
    assert load_model(str(tmp_path / "models" / "mine"), "cpu").domains == ["night"]
